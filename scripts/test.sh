#!/usr/bin/env bash
# bash scripts/test.sh [arguments of pytest]
# Sets up what is missing (first run only), then runs the linter and all tests. No GPU and no network is needed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt requirements-demo.txt requirements-client.txt requirements-dev.txt

cd "$ROOT"
"$PYTHON" -m ruff check .
cores="$(nproc 2>/dev/null || echo 1)"
workers="$((cores < 4 ? cores : 4))"
# A process for each core, one thread each: twice as fast on two cores as two threads in one process.
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # which has every process compile our modules again
exec "$PYTHON" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
