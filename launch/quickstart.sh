#!/usr/bin/env bash
# launch/quickstart.sh [OUT [SEED]]: installs, makes a closed world of invented people, and takes a small language model
# through SFT, a reward model and PPO on two local ranks, so that it says "I don't know" of people it has never heard
# of: on the CPU where there is no GPU, on up to two GPUs where there are. Everything lies in OUT (default:
# runs/quickstart). SEED (default: 0) makes another world and another run in it. Stopped, the same command goes on.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
if (($# > 2)) || [[ "${1:-}" == -* || ! "${2:-0}" =~ ^[0-9]+$ ]]; then
    echo "usage: bash launch/quickstart.sh [OUT [SEED]], SEED a number" >&2
    exit 2
fi
out="${1:-$root/runs/quickstart}" seed="${2:-0}"
[[ "$out" == /* ]] || out="$PWD/$out"
if [[ -e "$out" && ! -d "$out" ]]; then
    echo "quickstart: $out is a file; give the folder to write to: bash launch/quickstart.sh OUT" >&2
    exit 1
fi
progress="$out/progress" # the seed, and then each stage that is done
if [[ "$(head -n 1 "$progress" 2>/dev/null)" == "seed $seed" ]]; then
    going_on=1
    echo "quickstart: going on in $out"
elif [[ -s "$progress" ]]; then
    echo "quickstart: $out holds a quickstart of $(head -n 1 "$progress"), not $seed. Name that seed to go on with it," \
        "or write elsewhere: bash launch/quickstart.sh OUT $seed" >&2
    exit 1
elif [[ -d "$out" && -n "$(ls -A "$out")" ]]; then
    echo "quickstart: $out is not empty. Write elsewhere: bash launch/quickstart.sh OUT $seed" >&2
    exit 1
fi

cd "$root"
source launch/install.sh
install_engine
installed=$SECONDS

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if ((gpus == 0)); then
    ranks=2
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    echo "quickstart: no GPU, $ranks ranks on the CPU"
else
    ranks=$((gpus < 2 ? gpus : 2))
    echo "quickstart: $ranks of $gpus GPUs"
fi

stage() { # stage NAME MODEL [FLAG ...]: one run, with its recipe, into OUT/NAME; MODEL is what it writes last
    local name="$1" model="$out/$1/$2" code=0 port launch
    shift 2
    if grep -qx "$name" "$progress"; then
        echo "quickstart: $name is done"
        return
    fi
    rm -rf "$model"
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
    echo "quickstart: $name"
    "${launch[@]}" "launch/train_$name.py" --config "launch/recipes/quickstart_$name.yaml" \
        --output_dir "$out/$name" --seed "$seed" --resume auto "$@" || code=$?
    if ((code > 0)) || [[ ! -f "$model/config.json" ]]; then
        echo "quickstart: $name did not get to its end; bash launch/quickstart.sh $out $seed goes on with it" >&2
        exit $((code > 0 ? code : 1))
    fi
    echo "$name" >>"$progress"
}

if [[ -z "${going_on:-}" ]]; then
    mkdir -p "$out"
    echo "seed $seed" >"$progress"
fi
if ! grep -qx world "$progress"; then
    python launch/closed_world.py "$out/world" "$seed"
    echo world >>"$progress"
fi
stage sft model --data.train "$out/world/demonstrations.jsonl"
stage reward reward --reward.model_name_or_path "$out/sft/model" \
    --data.train "$out/world/preferences.jsonl" --data.eval "$out/world/preferences_held_out.jsonl"
stage ppo critic --actor.model_name_or_path "$out/sft/model" --reward.model_name_or_path "$out/reward/reward" \
    --data.train "$out/world/prompts.jsonl" --data.eval "$out/world/questions.jsonl"

echo
python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
rows = {stage: [json.loads(line) for line in (out / stage / "metrics.jsonl").open()] for stage in ("reward", "ppo")}
scores = [row["score/mean"] for row in rows["ppo"]]
print(f"reward model, accuracy on held-out pairs {rows['reward'][-1]['eval/accuracy']:14.3f}")
print(f"PPO, score/mean of the first iteration   {scores[0]:14.3f}")
print(f"PPO, score/mean of the last 5, averaged  {sum(scores[-5:]) / len(scores[-5:]):14.3f}")
PYTHON
echo
python launch/evaluate_world.py "$out/world/questions.jsonl" "after SFT=$out/sft/model" "after PPO=$out/ppo/actor"
echo
for name in sft reward ppo; do
    python launch/report.py "$out/$name" || echo "quickstart: no report of $name; all else is there" >&2
done
echo
took=$((SECONDS - installed))
echo "quickstart: done${going_on:+, the last part} in $((took / 60)) min $((took % 60)) s, installation aside;" \
    "everything lies in $out"
