#!/usr/bin/env bash
# One GPU, no launcher. Usage: DATA=text recipes/one_gpu.sh OUT [options of vwn train]
set -euo pipefail
out=$1
shift

CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} exec python -m vwn train --out "$out" --resume auto \
    --data "${DATA:?set DATA to your text: a folder, a .jsonl or .parquet file, or a hub id}" --tokenizer bpe:8192 --window 1024 \
    --backbone small --m 4 --n 16 --mtp 1 --batch-size 64 --gradient-accumulation 2 --steps 5000 \
    "$@"
