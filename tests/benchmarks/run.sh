#!/usr/bin/env bash
# tests/benchmarks/run.sh [bench_ppo.py's arguments]: installs TRL beside the tests' libraries, runs every case of the
# benchmark, prints the tables and writes tests/benchmarks/results/DATE.json. Half an hour on two cores with nothing else
# running.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/install.sh
install_engine test bench
exec python tests/benchmarks/bench_ppo.py --output "tests/benchmarks/results/$(date -u +%Y-%m-%d).json" "$@"
