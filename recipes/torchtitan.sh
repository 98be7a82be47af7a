#!/usr/bin/env bash
# Llama 3 8B with a virtual width in torchtitan 0.3: on each machine of eight GPUs tensor parallelism over two, FSDP2 over
# the rest of all ranks. Run it on every machine, with MASTER_ADDR and NODE_RANK set. Not measured: docs/titan.md.
# Usage: TOKENIZER=folder [DATA='shards/*.parquet'] recipes/torchtitan.sh OUT [options of torchtitan]
set -euo pipefail
out=$1
shift

exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-8}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m torchtitan.train --module vwn.titan --config "${CONFIG:-llama_8b}" --dump_folder "$out" \
    --hf_assets_path "$TOKENIZER" ${DATA:+--dataloader.dataset parquet --dataloader.dataset_path "$DATA"} \
    --parallelism.tensor_parallel_degree "${TP:-2}" --checkpoint.enable \
    "$@"
