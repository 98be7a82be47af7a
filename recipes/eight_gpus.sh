#!/usr/bin/env bash
# Eight GPUs of one machine, the model sharded over them (FSDP2). Usage: DATA=text recipes/eight_gpus.sh OUT [options]
# Where the model fits on one GPU, recipes/eight_gpus_ddp.yaml is faster: ACCELERATE=recipes/eight_gpus_ddp.yaml
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift

# The dashes after -m: without them the launcher takes --m and --n for abbreviations of its own options.
exec python -m accelerate.commands.launch --config_file "${ACCELERATE:-$here/eight_gpus_fsdp2.yaml}" \
    ${PROCESSES:+--num_processes "$PROCESSES"} -m -- vwn train --out "$out" --resume auto \
    --data "${DATA:?set DATA to your text: a folder, a .jsonl or .parquet file, or a hub id}" --tokenizer bpe:8192 --window 1024 \
    --backbone large --m 4 --n 16 --mtp 1 --batch-size 256 --gradient-accumulation 2 --steps 5000 \
    "$@"
