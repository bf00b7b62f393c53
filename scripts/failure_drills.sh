#!/usr/bin/env bash
# bash scripts/failure_drills.sh [--gpu] [arguments of pytest]
# What can go wrong in a run of several processes, done on purpose: SIGTERM in the middle of a step, a killed rank, NaN in
# one rank's gradient, a full disk, a damaged checkpoint, another number of ranks. On this machine's CPU; with --gpu on its
# GPUs (two or more), with networks of full width, and then also a rank that hangs. Each run says after how many seconds it
# had made its first step, and how long it took to end.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt requirements-dev.txt

if [ "${1:-}" = --gpu ]; then
  shift
  DRILLS_GPUS="$(count_gpus)"
  [ "$DRILLS_GPUS" -gt 1 ] || stop "--gpu needs two GPUs and $DRILLS_GPUS can be seen; leave it out for the CPU"
  export DRILLS_GPUS
fi
cd "$ROOT"
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -m pytest -v -s --tb=short --durations=0 tests/trainer/parallel/test_failure_drills.py "$@"
