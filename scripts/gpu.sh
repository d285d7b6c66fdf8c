#!/usr/bin/env bash
# The one run for a real card: 12 minutes at most, the most worthwhile first, results as JSON in scripts/results.
#
#     bash scripts/gpu.sh [PYTHON]            # what is there already, of this commit, is not done again
#     GPU_SECONDS=300 bash scripts/gpu.sh     # as much as there is time for
#
# Each stage is a file gpu-NAME.json with device, versions, date, command and exit code; what it printed lies beside it
# as gpu-NAME.log. A stage that fails or runs out of time does not stop the next one; the exit code is 1 then.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
results=scripts/results
until=$((SECONDS + ${GPU_SECONDS:-720}))
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
failed=0

# stage NAME SECONDS COMMAND...: run a command, and say in its file how it ended; no more than SECONDS or what is left.
stage() {
    local name=$1 most=$2 file=$results/gpu-$1.json log=$results/gpu-$1.log code began=$SECONDS left
    shift 2
    if grep -qs "\"commit\": \"$commit\".*\"exit\": 0" "$file"; then
        echo "there  $name"
        return
    fi
    left=$((until - SECONDS))
    if ((left < 10)); then
        echo "no time left for $name"
        failed=1
        return
    fi
    timeout "$((most < left ? most : left))" "$@" >"$log" 2>&1
    code=$?
    "$python" - "$file" "$log" "$commit" "$code" "$((SECONDS - began))" "$*" <<'PY'
import json, sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

file, log, commit, code, seconds, command = sys.argv[1:]
text = Path(log).read_text(errors="replace")
lines = text.splitlines()
last = text if text.startswith("[") else next((line for line in reversed(lines) if line.startswith("{")), None)
told = {
    "commit": commit,
    "exit": int(code),
    "seconds": int(seconds),
    "command": command,
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    "result": json.loads(last) if last else lines[-5:],
}
Path(file).write_text(json.dumps(told) + "\n")
PY
    echo "exit $code  $name  $((SECONDS - began)) s"
    ((code == 0)) || failed=1
}

stage doctor 60 "$python" -m qd2mora doctor --json
stage tests 240 "$python" -m pytest -q -m gpu
stage memory 120 "$python" scripts/bench_memory.py --shapes llama2-7b --tokens 512 2048 8192 --modes default offload streamed
stage step-qkvud 90 "$python" scripts/bench_step.py --device cuda --tokens 2048 --targets qkvud
stage step-qkv 60 "$python" scripts/bench_step.py --device cuda --tokens 2048 --targets qkv
stage layer 60 "$python" scripts/bench_layer.py --device cuda --tokens 1024
stage layer-dropout 60 "$python" scripts/bench_layer.py --device cuda --tokens 1024 --dropout 0.05
exit $failed
