#!/usr/bin/env bash
# One process per GPU on any number of nodes, which saves itself before the time limit and goes on in the next slot:
#
#   sbatch --nodes=8 tools/launch/slurm.sh v2_lite.pretrain --set schedule.total_tokens=2e9
#
# run from the project's folder. The arguments are those of experiments.run, without --workdir and --resume. Settings:
#
#   WORKDIR    the run's folder, on a disk that all nodes reach    (runs/JOBNAME)
#   VENV       a virtual environment that all nodes reach          (.venv)
#   CONTAINER  an image for pyxis' --container-image, instead of VENV
#   MOUNTS     more folders for the container, as FROM:TO,...
#
# README.md beside this file explains the flags below, the ports and the timeouts.

#SBATCH --job-name=deepseek_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

workdir=${WORKDIR:-runs/${SLURM_JOB_NAME:-deepseek_jax}}
[[ $workdir == /* ]] || workdir=$PWD/$workdir

# --- NCCL and XLA: what the user set comes last and counts --------------------------------------------------------------
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_all_gather_combine_threshold_bytes=268435456
  --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456
  --xla_gpu_all_reduce_combine_threshold_bytes=268435456
)
export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
# srun takes this from sbatch no more.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# --- the command --------------------------------------------------------------------------------------------------------
# Every process sees all GPUs of its node, so that NCCL can use NVLink between them, and takes the one of its number.
# One that ends must not end the others by itself: they say why they end, which takes them a few seconds.
launch=(srun --gpu-bind=none --kill-on-bad-exit=0 --wait=120 --label)
if [[ -n ${CONTAINER:-} ]]; then
  mkdir -p "$(dirname "$workdir")"  # what is mounted must be there
  mounts=$PWD:$PWD,$(dirname "$workdir"):$(dirname "$workdir")${MOUNTS:+,$MOUNTS}
  launch+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD" --no-container-mount-home)
  python=python
else
  python=${VENV:-.venv}/bin/python
fi
if [[ -e $workdir/config.json ]]; then
  command=("$python" -m experiments.run --resume --workdir "$workdir")
else
  command=("$python" -m experiments.run "$@" --workdir "$workdir")
fi

# --- run it, and again in the next slot ---------------------------------------------------------------------------------
time_is_up= woken=
stop() {
  woken=1
  [[ -z $time_is_up ]] || return  # a second SIGTERM would stop the run without saving
  echo "slurm.sh: the time limit is near; the run saves and is queued again"
  time_is_up=1
  # To the processes, and not to this script or to srun, which would take it as a wish to kill them.
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1

"${launch[@]}" "${command[@]}" &
running=$!
while true; do
  woken=
  wait "$running"
  code=$?
  # A signal to this script ends `wait`, and not what it waits for.
  [[ -n $woken ]] || break
done

# 143: the run was stopped by SIGTERM and has saved itself.
if [[ -n $time_is_up && $code == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
