#!/usr/bin/env bash
# bash scripts/failure_drills.sh [arguments of pytest]
# What can go wrong in a run of several processes, done on purpose on this machine's CPU: SIGTERM in the middle of a step,
# a killed rank, NaN in one rank's gradient, a full disk, a damaged checkpoint, another number of ranks, other settings.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt requirements-dev.txt

cd "$ROOT"
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -m pytest -v --durations=0 tests/trainer/parallel/test_failure_drills.py "$@"
