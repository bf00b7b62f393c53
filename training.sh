#!/usr/bin/env bash
# bash training.sh [arguments of train.py]
# Sets up what is missing (first run only), then trains: on every visible GPU through torchrun, else on the CPU.
# On several machines, run it on each with NNODES, NODE_RANK, MASTER_ADDR and, if 29500 is taken, MASTER_PORT set.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
set_up requirements.txt

config="configs/train_tiny.yaml"
has_config=0 has_logdir=0 help=0 previous=""
for argument in "$@"; do
  case "$argument" in
    --config_path) has_config=1 ;;
    --config_path=*) has_config=1 config="${argument#*=}" ;;
    --logdir | --logdir=*) has_logdir=1 ;;
    --help | -h) help=1 ;;
  esac
  if [ "$previous" = --config_path ]; then config="$argument"; fi
  previous="$argument"
done
defaults=()
if [ "$has_config" = 0 ]; then defaults+=(--config_path "$config"); fi
if [ "$has_logdir" = 0 ]; then defaults+=(--logdir "logs/$(basename "$config" .yaml)"); fi

# torchrun answers a signal by killing what has not ended 30 s later, too soon for a large checkpoint, and with code 1. So
# the signal goes to its ranks, which save and end with 0, and then so does torchrun: in a session of its own, or Ctrl-C
# would reach it.
stop_ranks() {
  local ranks
  ranks="$(cat /proc/"$1"/task/*/children 2>/dev/null || true)"
  # shellcheck disable=SC2086  # several numbers
  kill -TERM ${ranks:-$1} 2>/dev/null || true
}

run_ranks() {
  local agent status=0
  setsid "$PYTHON" -m torch.distributed.run "$@" &
  agent=$!
  trap 'stop_ranks "$agent"' TERM INT HUP
  while kill -0 "$agent" 2>/dev/null; do # a signal ends `wait`, not what is waited for
    status=0
    wait "$agent" || status=$?
  done
  exit "$status"
}

gpus="$(count_gpus)"
nodes="${NNODES:-1}"
if [ "$help" = 0 ] && { [ "$gpus" -gt 1 ] || [ "$nodes" -gt 1 ]; }; then
  launch=(--nproc_per_node="$((gpus > 0 ? gpus : 1))")
  if [ "$nodes" -gt 1 ]; then
    [ -n "${MASTER_ADDR:-}" ] || stop "NNODES=$nodes needs MASTER_ADDR, the host name of node 0"
    [ -n "${NODE_RANK:-}" ] || stop "NNODES=$nodes needs NODE_RANK, 0 to $((nodes - 1)), one for each machine"
    launch+=(--nnodes="$nodes" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}")
  else
    launch+=(--standalone)
  fi
  run_ranks "${launch[@]}" "$ROOT/train.py" ${defaults[@]+"${defaults[@]}"} "$@"
fi
exec "$PYTHON" "$ROOT/train.py" ${defaults[@]+"${defaults[@]}"} "$@"
