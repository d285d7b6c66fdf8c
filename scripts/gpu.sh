#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command: the tests marked gpu, then the benches; JSON goes to scripts/results.
#
#     bash scripts/gpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
results=scripts/results
"$python" -m pytest -m gpu
"$python" scripts/bench_layer.py --device cuda --tokens 1024 --out $results/layer-cuda.json
"$python" scripts/bench_layer.py --device cuda --tokens 1024 --dropout 0.05 --out $results/layer-cuda-dropout.json
for targets in qkv qkvud all; do
    "$python" scripts/bench_step.py --device cuda --tokens 2048 --targets $targets --out $results/step-cuda-$targets.json
done
