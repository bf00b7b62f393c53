#!/usr/bin/env bash
# Full-size training on several machines under Slurm: sbatch --nodes=8 scripts/train_slurm.sh [arguments of train.py]
# One task a machine; training.sh starts a process for each of its GPUs. Submitting it again resumes the run.
#SBATCH --job-name=diagonal
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=logs/slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}"

export NNODES="$SLURM_NNODES"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
export MASTER_PORT="${MASTER_PORT:-29500}"

[ "$#" -gt 0 ] || set -- --config_path configs/train_wan2.1_t2v_1.3b.yaml --logdir logs/wan2.1_t2v_1.3b
# shellcheck disable=SC2016  # SLURM_NODEID is that of each machine
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash training.sh "$@"' training "$@"
