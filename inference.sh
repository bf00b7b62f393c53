#!/usr/bin/env bash
# bash inference.sh [arguments of inference.py]
# Sets up what is missing (first run only), then makes a video of each prompt; on several GPUs the prompts are shared out.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
set_up requirements.txt

gpus="$(count_gpus)"
for argument in "$@"; do
  case "$argument" in --help | -h | --print_schedule | --dry_run) gpus=0 ;; esac
done
if [ "$gpus" -gt 1 ]; then
  exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$ROOT/inference.py" "$@"
fi
exec "$PYTHON" "$ROOT/inference.py" "$@"
