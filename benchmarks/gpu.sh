#!/usr/bin/env bash
# All that wants a GPU, the most wanted first, each stopped after so many seconds: bash benchmarks/gpu.sh [TEXT].
# The benchmarks write their JSON row by row, so one that is stopped leaves what it had measured.
cd "$(dirname "$0")/.." || exit
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests ask PyTorch for deterministic algorithms

step() {
    echo "== python -m ${*:2}"
    timeout "$1" python -m "${@:2}" || echo "failed, or stopped after $1 s: ${*:2}"
}

step 180 pytest -q -n 8 tests/ops/test_triton_gpu.py tests/ops/test_triton.py
step 180 benchmarks.connections --widths 2048,4096
step 180 benchmarks.training_step --families dense --modes eager
step 180 benchmarks.training_step --families dense --modes compiled --out benchmarks/results/training_step_compiled-cuda.json
step 60 benchmarks.decoding
if [ -n "$1" ]; then
    for width in "" "--m 4 --n 16"; do
        # shellcheck disable=SC2086
        step 120 vwn train --backbone medium --steps 200 --eval-every 200 --data "$1" --out "runs/gpu${width// /}" $width
    done
fi
step 60 benchmarks.accuracy
step 60 benchmarks.memory
step 180 benchmarks.training_step --families moe --out benchmarks/results/training_step_moe-cuda.json
