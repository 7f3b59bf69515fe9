#!/usr/bin/env bash
# Train HyperRouter and SMoE-Dropout on Tiny Shakespeare, byte by byte, and compare them at 1 to 16 experts per token.
# Some minutes on two CPU cores; the fairseq commands must be on PATH (`make quickstart` sees to that).
#
#   quickstart.sh [OUT_DIR]      default: runs/quickstart
#
# UPDATES=1000 and THREADS=1 may be set in the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/quickstart}
updates=${UPDATES:-1000}
export OMP_NUM_THREADS=${THREADS:-1} # one core for each of the two trainings

data=$out/data-bin
if [ ! -f "$data/test.idx" ]; then
    python "$here/../language_model/characters.py" "$here/tinyshakespeare.txt" "$out/text"
    fairseq-preprocess --only-source --trainpref "$out/text/train.txt" --validpref "$out/text/valid.txt" \
        --testpref "$out/text/test.txt" --destdir "$data" --workers 2 > "$out/preprocess.log" 2>&1
fi

train() { # ROUTER [OPTION...]: one training, into $out/ROUTER
    fairseq-train "$data" --user-dir "$(fairseq-hyperrouter user-dir)" \
        --task hyperrouter --criterion moe_cross_entropy \
        --arch transformer_lm_hyperrouter_small --moe-router "$1" --moe-expert-count 16 \
        --moe-top-k 16 --moe-top-k-schedule linear --moe-top-k-start 8 "${@:2}" \
        --decoder-embed-dim 64 --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 \
        --share-decoder-input-output-embed --dropout 0 --tokens-per-sample 128 --batch-size 8 \
        --optimizer adam --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 100 --clip-norm 0.25 \
        --max-update "$updates" --valid-top-k 1,16 --save-dir "$out/$1" --no-epoch-checkpoints \
        --validate-interval-updates 500 --max-valid-steps 20 --required-batch-size-multiple 1 --log-interval 50 --no-progress-bar --cpu
}

routers=(hyperrouter smoe-dropout)
pids=()
trap 'kill "${pids[@]}" 2> /dev/null || true' EXIT
for router in "${routers[@]}"; do
    echo "training $router for $updates updates; log: $out/$router.log"
    train "$router" > "$out/$router.log" 2>&1 &
    pids+=($!)
done
for index in 0 1; do
    while kill -0 "${pids[$index]}" 2> /dev/null; do # show the newest training line of both, now and then
        sleep 20
        for router in "${routers[@]}"; do
            line=$(grep -oE ' loss=[0-9.]+|num_updates=[0-9]+|moe_top_k=[0-9.]+' "$out/$router.log" | tail -3 | tr '\n' ' ' || true)
            echo "  $router: ${line:-starting}"
        done
    done
    wait "${pids[$index]}" || { tail -n 1 "$out/${routers[$index]}.log"; exit 1; }
done

OMP_NUM_THREADS=2 fairseq-hyperrouter sweep "$out/hyperrouter/checkpoint_best.pt" "$out/smoe-dropout/checkpoint_best.pt" \
    "$data" --top-k 1,2,4,8,16 --out "$out/sweep" --batch-size 32
