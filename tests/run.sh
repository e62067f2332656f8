#!/usr/bin/env bash
# tests/run.sh [pytest arguments]: installs with the test extra, lints, runs the tests, and exits with pytest's code
# (or 1 when only the linter complained). Paths are relative to the project's root; without one, all of tests/ is run.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/algorithms -k gae -x
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
source launch/install.sh
install_engine test

# Several ranks share this machine's cores, and nothing in the tests needs a network.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export WANDB_MODE=offline

lint=passed
ruff check --quiet --output-format concise . || lint=failed
ruff format --check --output-format concise . || lint=failed
if [[ "$lint" == failed ]]; then
    echo "lint: failed; most of it is mended by: .venv/bin/ruff check --fix . && .venv/bin/ruff format ." >&2
fi

code=0
# testpaths holds when the arguments name no path of their own. Two files at a time: much of a test is waiting for one
# core, as processes start one after another; `-n 0` runs one.
python -m pytest --rootdir "$root" --override-ini testpaths=tests -n 2 --dist loadfile "$@" || code=$?

echo "tests/run.sh: $((SECONDS / 60)) min $((SECONDS % 60)) s, lint $lint"
if [[ "$code" == 0 && "$lint" == failed ]]; then
    code=1
fi
exit "$code"
