#!/usr/bin/env bash
# One W&B agent per array task, one GPU each; the agents share the cells of one sweep:
#   SWEEP=entity/project/sweep sbatch --array=0-7 sweeps/slurm.sh
# A pre-empted task is queued again by SLURM, and its cell is handed out again by W&B and goes on from its checkpoint.
#SBATCH --job-name=unirecon
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.txt
# Two minutes before the end every task gets SIGTERM, which is enough for a cell to report itself as pre-empted.
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${SWEEP:?name the sweep: SWEEP=entity/project/sweep sbatch sweeps/slurm.sh}"
exec srun "${PYTHON:-.venv/bin/python}" -m sweeps agents "$SWEEP" ${GPUS:+--gpus "$GPUS"}
