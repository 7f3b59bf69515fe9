#!/usr/bin/env bash
# Train three models on Tiny Shakespeare, byte by byte, and compare them at 1 to 16 experts per token: HyperRouter and
# SMoE-Dropout with a k that grows from 8 to 16, as their papers do, and HyperRouter with a k that is drawn (elastic).
# Some minutes on two CPU cores; the fairseq commands must be on PATH (`make quickstart` sees to that).
#
#   quickstart.sh [OUT_DIR]      default: runs/quickstart
#
# UPDATES=1000 and THREADS=1 may be set in the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/quickstart}
updates=${UPDATES:-1000}
export OMP_NUM_THREADS=${THREADS:-1} # per training

data=$out/data-bin
if [ ! -f "$data/test.idx" ]; then
    python "$here/../language_model/characters.py" "$here/tinyshakespeare.txt" "$out/text"
    fairseq-preprocess --only-source --trainpref "$out/text/train.txt" --validpref "$out/text/valid.txt" \
        --testpref "$out/text/test.txt" --destdir "$data" --workers 2 > "$out/preprocess.log" 2>&1
fi

train() { # NAME OPTION...: one training, into $out/NAME
    fairseq-train "$data" --user-dir "$(fairseq-hyperrouter user-dir)" \
        --task hyperrouter --criterion moe_cross_entropy \
        --arch transformer_lm_hyperrouter_small --moe-expert-count 16 --moe-top-k 16 "${@:2}" \
        --decoder-embed-dim 64 --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 \
        --share-decoder-input-output-embed --dropout 0 --tokens-per-sample 128 --batch-size 8 \
        --optimizer adam --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 100 --clip-norm 0.25 \
        --max-update "$updates" --valid-top-k 1,16 --save-dir "$out/$1" --no-epoch-checkpoints \
        --validate-interval-updates 500 --max-valid-steps 20 --required-batch-size-multiple 1 --log-interval 50 --no-progress-bar --cpu
}

growing=(--moe-top-k-schedule linear --moe-top-k-start 8)
names=()
pids=()
trap 'kill "${pids[@]}" 2> /dev/null || true' EXIT
start() { # NAME OPTION...
    echo "training $1 for $updates updates; log: $out/$1.log"
    train "$@" > "$out/$1.log" 2>&1 &
    names+=("$1")
    pids+=($!)
}
start hyperrouter --moe-router hyperrouter "${growing[@]}"
start smoe-dropout --moe-router smoe-dropout "${growing[@]}"
start hyperrouter-elastic --moe-router hyperrouter --moe-top-k-schedule elastic
for index in "${!pids[@]}"; do
    while kill -0 "${pids[$index]}" 2> /dev/null; do # show the newest training line of each, now and then
        sleep 20
        for name in "${names[@]}"; do
            line=$(grep -oE ' loss=[0-9.]+|num_updates=[0-9]+|moe_top_k=[0-9.]+' "$out/$name.log" | tail -3 | tr '\n' ' ' || true)
            echo "  $name: ${line:-starting}"
        done
    done
    wait "${pids[$index]}" || { tail -n 1 "$out/${names[$index]}.log"; exit 1; }
done

checkpoints=("${names[@]/#/$out/}")
checkpoints=("${checkpoints[@]/%//checkpoint_best.pt}")
OMP_NUM_THREADS=2 fairseq-hyperrouter sweep "${checkpoints[@]}" \
    "$data" --top-k 1,2,4,8,16 --out "$out/sweep" --batch-size 32
