#!/usr/bin/env bash
# tests/gpu/run.sh: PPO iterations of a Llama of half a billion random weights in bf16 on one GPU: response tokens a
# second, every phase's distance from the GPU's own rate of matrix products, peak memory. Written to
# tests/benchmarks/results/gpu-DATE.json with the device's name. Without a GPU it says so and stops.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "tests/gpu/run.sh: there is no GPU here (or no torch that knows of it); nothing was measured"
    exit 0
fi
exec python tests/benchmarks/bench_ppo.py 0.5B --micro_batch_size 16 \
    --output "tests/benchmarks/results/gpu-$(date -u +%Y-%m-%d).json" "$@"
