#!/usr/bin/env bash
# bash serve.sh [arguments of serve.py]
# Sets up what is missing (first run only), then starts the server, with a worker process for each GPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
set_up requirements.txt requirements-demo.txt
exec "$PYTHON" "$ROOT/serve.py" "$@"
