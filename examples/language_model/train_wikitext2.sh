#!/usr/bin/env bash
# Train a small word-level model on WikiText-2 (prepared by `prepare.sh wikitext-2`) and evaluate it at 1 to 16 experts.
#
#   train_wikitext2.sh [DATA [OUT_DIR [OPTION...]]]      default: data-bin/wikitext-2 runs/wikitext-2
#
# Any further OPTION goes to fairseq-train, as in --moe-router smoe-dropout. UPDATES=1000 is one epoch.
set -euo pipefail
data=${1:-data-bin/wikitext-2}
out=${2:-runs/wikitext-2}
updates=${UPDATES:-2000}
fairseq-train "$data" --user-dir "$(fairseq-hyperrouter user-dir)" \
    --task hyperrouter --arch transformer_lm_hyperrouter_small --criterion moe_cross_entropy \
    --moe-router hyperrouter --moe-top-k 16 --moe-top-k-schedule linear --moe-top-k-start 8 --valid-top-k 1,2,4,8 \
    --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4 --decoder-normalize-before \
    --adaptive-input --adaptive-input-cutoff 2000,10000 --adaptive-softmax-cutoff 2000,10000 \
    --tie-adaptive-weights --tie-adaptive-proj \
    --tokens-per-sample 128 --batch-size 16 --dropout 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 2e-3 --lr-scheduler cosine --warmup-updates 200 --clip-norm 0.25 \
    --max-update "$updates" --save-dir "$out" --no-epoch-checkpoints --save-interval-updates 500 \
    --keep-interval-updates 1 --log-interval 20 --max-valid-steps 50 --required-batch-size-multiple 1 "${@:3}"
fairseq-hyperrouter sweep "$out/checkpoint_last.pt" "$data" --top-k 1,2,4,8,16 --out "$out/sweep"
