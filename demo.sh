#!/usr/bin/env bash
# bash demo.sh [arguments of demo.py]
# Sets up what is missing (first run only), then starts the server of the demo.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
set_up requirements.txt requirements-demo.txt
exec "$PYTHON" "$ROOT/demo.py" "$@"
