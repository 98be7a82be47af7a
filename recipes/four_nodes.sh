#!/usr/bin/env bash
# Four machines of eight GPUs: the model sharded over all of them (FSDP2). Run it on every machine, with
# MASTER_ADDR (the first machine) and NODE_RANK (0 to 3) set. OUT and DATA lie on a file system that all of them share.
# Usage: DATA=text recipes/four_nodes.sh OUT [options of vwn train]
set -euo pipefail
out=$1
shift

# The dashes after -m: without them the launcher takes --m and --n for abbreviations of its own options.
exec python -m torch.distributed.run --nnodes "${NODES:-4}" --nproc-per-node "${PROCESSES:-8}" \
    --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m -- vwn train --out "$out" --resume auto --parallel "${PARALLEL:-fsdp2}" \
    --data "${DATA:?set DATA to your text: a folder, a .jsonl or .parquet file, or a hub id}" --tokenizer bpe:8192 --window 1024 \
    --backbone large --m 4 --n 16 --mtp 1 --batch-size 1024 --gradient-accumulation 2 --steps 5000 \
    "$@"
