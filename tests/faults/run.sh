#!/usr/bin/env bash
# tests/faults/run.sh: everything that is done to runs and readers, at full length, and the table of what became of the
# runs. The test suite takes a few of these cases.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export RLHF_ENGINE_FAULTS=all RLHF_ENGINE_FUZZ="${RLHF_ENGINE_FUZZ:-600}"
exec bash tests/run.sh tests/faults tests/fuzz "$@"
