#!/usr/bin/env bash
# bash scripts/ablate_tiny.sh [arguments of scripts/ablate_tiny.py]
# Trains and measures each row of the ablation on the tiny world; the same command goes on where it was stopped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt
exec "$PYTHON" "$ROOT/scripts/ablate_tiny.py" "$@"
