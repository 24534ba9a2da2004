#!/bin/bash
# A run of rlsys under Slurm: a Ray cluster on all nodes of the job, and one `rlsys train` on the first.
# The job is queued again until the run is finished. Checked for its syntax; not run.
#SBATCH --job-name=rlsys
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
umask 077

config=/shared/CONFIG.yaml
run=/shared/runs/mine
port=6379
limit=85000 # seconds: the job's 24 hours less the time of a step, an evaluation and a checkpoint

export RAY_AUTH_MODE=token # the token is in ~/.ray/auth_token: ray get-auth-token --generate
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
nodes=("$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')

srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  ray start --head --node-ip-address="$address" --port="$port" --block &
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" \
    bash -c "sleep 20; exec ray start --address=$address:$port --block" &
fi
sleep 40 # until all nodes have joined; rlsys itself waits for their GPUs

code=0
rlsys train "$config" run.dir="$run" run.address="$address:$port" run.time_limit="$limit" || code=$?
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
