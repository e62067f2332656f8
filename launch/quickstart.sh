#!/usr/bin/env bash
# launch/quickstart.sh [OUT]: installs, then trains a small actor with PPO on two local ranks: on the CPU where there is
# no GPU, on up to two GPUs where there are. Everything it makes lies in OUT (default: runs/quickstart).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
if (($# > 1)) || [[ "${1:-}" == -* ]]; then
    echo "usage: bash launch/quickstart.sh [OUT]" >&2
    exit 2
fi
out="${1:-$root/runs/quickstart}"
[[ "$out" == /* ]] || out="$PWD/$out"
if [[ -e "$out" && ! -d "$out" ]]; then
    echo "quickstart: $out is a file; give the folder to write to: bash launch/quickstart.sh OUT" >&2
    exit 1
fi
if [[ -d "$out" && -n "$(ls -A "$out")" ]]; then
    echo "quickstart: $out is not empty. Remove it, or write elsewhere: bash launch/quickstart.sh OUT" >&2
    exit 1
fi

cd "$root"
source launch/install.sh
install_engine

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if ((gpus == 0)); then
    ranks=2
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    echo "quickstart: no GPU, $ranks ranks on the CPU"
else
    ranks=$((gpus < 2 ? gpus : 2))
    echo "quickstart: $ranks of $gpus GPUs"
fi

# A free port, so that two quickstarts can run side by side.
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
launch=(deepspeed --master_port "$port")
if ((gpus > 0)) && [[ "${CUDA_VISIBLE_DEVICES:-}" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    # DeepSpeed 0.19 heeds CUDA_VISIBLE_DEVICES only while no number of devices is given.
    CUDA_VISIBLE_DEVICES="$(cut -d , -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")"
    export CUDA_VISIBLE_DEVICES
else
    launch+=(--num_accelerators "$ranks")
fi

"${launch[@]}" launch/train_ppo.py --config launch/recipes/quickstart_ppo.yaml --output_dir "$out"

python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
scores = [json.loads(line)["score/mean"] for line in (out / "metrics.jsonl").read_text().splitlines()]
last = scores[-5:]
print(f"\nquickstart: {len(scores)} iterations of PPO")
print(f"  score/mean of the first iteration     {scores[0]:8.3f}")
print(f"  score/mean of the last {len(last)}, averaged    {sum(last) / len(last):8.3f}")
print(f"everything lies in {out}:")
for path in sorted(out.iterdir()):
    print(f"  {path.name}{'/' if path.is_dir() else ''}")
PYTHON
echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
