# Sourced by the batch scripts beside it: which Python a job runs, one process a task, and when a job is to run again.
# Knows SLURM, and nothing of what is trained.
#
# USR1 means that the job's time is nearly over (--signal in the scripts) or that it is preempted. SLURM sends it to the
# processes: each ends with status 138, saved or with nothing to save yet, and task.sh tells this shell. A job that was
# told so, is not done and has not been cancelled is requeued; of an array that task alone. The status of srun cannot
# say it: --kill-on-bad-exit, which ends all processes when one has died, makes it that of any of them.
#
# A job that its time limit lets come no further than it was would be requeued for ever. So the command removes the file
# $DIFFUSION_NOT_YET when it has got on, and a job whose file is still there is requeued three times in all, unless
# it has been preempted.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # without .pyc files importing lightning takes 19 s instead of 7

refuse() {
  echo "error: $*" >&2
  exit 2
}

PYTHON=${DIFFUSION_VENV:-.venv}/bin/python
[ -x "$PYTHON" ] || refuse "there is no $PYTHON. Make it where there is a network, by: bash launch/train.sh --help"

[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # newer srun take it from here only
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Each task sees all GPUs of the job on its node, and takes that of its local rank; newer SLURM says it in both.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK

# As scontrol is to be asked for this job: the plain id of an array's task can be that of the whole array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

# COMMAND...: a process for each task of the job. Ends this shell with their status, after a requeue if one is due.
tasks() {
  local each=$SLURM_NTASKS_PER_NODE told='' status=0
  [ "$SLURM_NTASKS" = $((SLURM_NNODES * each)) ] ||
    refuse "$SLURM_NTASKS tasks on $SLURM_NNODES node(s): say it with --nodes and --ntasks-per-node, without --ntasks."
  [ "${SLURM_GPUS_ON_NODE:-$each}" = "$each" ] ||
    refuse "$SLURM_GPUS_ON_NODE GPU(s) but $each task(s) a node: give --ntasks-per-node=$SLURM_GPUS_ON_NODE, one a GPU."
  set -- srun --kill-on-bad-exit=1 --ntasks-per-node="$each" bash slurm/task.sh "$@"
  echo "Job $JOB on $SLURM_JOB_NODELIST${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}"
  printf '+'
  printf ' %q' "$@"
  echo
  export TELL=$BASHPID # for task.sh
  DIFFUSION_NOT_YET=$(mktemp)
  export DIFFUSION_NOT_YET
  trap 'told=1' USR1
  trap : TERM INT # the processes have these too, and end first
  "$@" || status=$?
  [ "$status" = 138 ] && told=1 # all of them died of it, before task.sh was up
  if [ -n "$told" ] && [ "$status" != 0 ] && [ "$status" != 2 ] && living; then
    if [ -e "$DIFFUSION_NOT_YET" ] && ((${SLURM_RESTART_COUNT:-0} >= 3)) && ! preempted; then
      echo "Job $JOB was warned before it had got on, and was started $((SLURM_RESTART_COUNT + 1)) times: it is not" \
        "requeued. Give it a longer time limit, by --time." >&2
    elif scontrol requeue "$JOB"; then
      echo "Job $JOB is requeued and goes on from its last checkpoint."
    else
      echo "Job $JOB could not be requeued. Submitted again, it goes on from its last checkpoint."
    fi
  fi
  rm -f "$DIFFUSION_NOT_YET"
  exit "$status"
}

living() { [[ $(squeue -h -j "$JOB" -o %T) =~ ^(RUNNING|SIGNALING)$ ]]; } # the latter: a signal is still under way
preempted() { [[ $(scontrol -o show job "$JOB") =~ PreemptTime=[0-9] ]]; }
