# Sourced by the batch scripts beside it: which Python a job runs, one process per task, and when a job is requeued.
# Knows SLURM, and nothing of what is trained.
#
# A start of a job is interrupted when it ends by something other than its own decision:
#   a warning (USR1)        before the time limit (--signal in the scripts) or a preemption; the tasks save and end
#   a kill (TERM, KILL)     of the tasks, while SLURM still counts the job as running: it repeats a kill that a node has
#                           not answered, and such a kill can reach the next start of the job
#   the time limit itself   where the warning has not reached the tasks, as it came before they were started
#   a failed launch         SLURM could not start the tasks
# An interrupted job is requeued; of an array, that task alone. A job that was cancelled stays away, and so does one
# that failed. The status of srun does not tell them apart: with --kill-on-bad-exit, which ends all tasks when one has
# ended badly, it is the highest of all tasks. What counts is how the first task ended, which srun says on its stderr.
#
# A job that makes no progress would be requeued for ever. So the command removes the file $DIFFUSION_NOT_YET when it
# has saved something, and a job is given up when its fourth start in a row is interrupted while this file is there.
# SLURM keeps no such count, and a job moves from node to node: the count is kept in the job's comment, behind what the
# user has put there, as fruitless_starts=N. Each start takes it out, and puts it back increased if it was fruitless.
# So a start that made progress, or that ended without its shell, ends the row. A preempted start is not counted. Where
# the comment cannot be changed, the job is requeued without a count: better too many starts than a run that is lost.
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

told='' # 1: a warning has come
listen() {
  trap 'told=1' USR1
  trap : TERM INT # the tasks have these too, and end first
}
listen
STATE=$(mktemp -d) # of this start
trap 'rm -rf "$STATE"' EXIT
export DIFFUSION_NOT_YET=$STATE/not_yet
: >"$DIFFUSION_NOT_YET"

# ---- what SLURM keeps with the job ----

# Print fields of the job, in squeue's format. A controller that does not answer is asked again, for half a minute.
field() {
  local try
  for try in 1 2 3 4 5 6; do
    squeue -h -j "$JOB" -o "$1" && return
    sleep 5
  done
  return 1
}

# KEY: print its value in the job's comment, or nothing.
recall() { [[ " $(field %k) " =~ .*\ $1=([^ ]+)\  ]] && echo "${BASH_REMATCH[1]}"; }

# KEY [VALUE]: set it in the job's comment, or remove it. The rest of the comment stays.
remember() {
  local comment other
  comment=$(field %k) || return
  [ "$comment" != '(null)' ] || comment=
  other=$(sed -E "s/(^| )$1=[^ ]+//" <<<"$comment")
  scontrol update JobId="$JOB" Comment="$other${2:+${other:+ }$1=$2}"
}

FRUITLESS=$(recall fruitless_starts) || FRUITLESS=0 # starts in a row before this one
[[ $FRUITLESS =~ ^[0-9]$ ]] || FRUITLESS=0
[ "$FRUITLESS" = 0 ] || remember fruitless_starts || :

# ---- tasks ----

# COMMAND...: run it in each task of the job. Ends this shell with their status, after a requeue if one is due.
tasks() {
  local each=$SLURM_NTASKS_PER_NODE status=0
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
  listen # also where this is a subshell
  if [ -z "$told" ]; then
    launch "$@" || status=$?
  else
    status=138 # warned before the tasks were there
  fi
  [ "$status" != 0 ] || rm -f "$DIFFUSION_NOT_YET"
  if [ "$status" != 0 ] && interrupted && living; then again; fi
  exit "$status"
}

# COMMAND...: run srun, and keep what it says on its stderr in $STATE/said as well. Its status.
launch() {
  local status=0 copy watch
  rm -f "$STATE/pipe" "$STATE/quiet"
  mkfifo "$STATE/pipe" "$STATE/quiet"
  : >"$STATE/said"
  (trap '' TERM INT USR1 && exec tee "$STATE/said" <"$STATE/pipe" >&2) &
  copy=$!
  end_stragglers &
  watch=$!
  { # without a word of bash about a srun that is killed
    (echo "$BASHPID" >"$STATE/srun" && exec "$@") 2>"$STATE/pipe" || status=$?
  } 2>/dev/null
  kill "$watch" 2>/dev/null || :
  for watch in "$watch" "$copy"; do
    while kill -0 "$watch" 2>/dev/null; do wait "$watch" 2>/dev/null || :; done # a signal ends a wait
  done
  return "$status"
}

# When a task has ended badly, srun ends the others, and SLURM kills those that are left after KillWait. Both miss tasks
# that are started later than that, which would wait for the first one for ever.
end_stragglers() {
  local quiet wait
  exec {quiet}<>"$STATE/quiet" # nothing comes: a sleep without a process
  until grep -qE "$END" "$STATE/said"; do read -rt 5 -u "$quiet" || :; done
  wait=$(scontrol show config 2>/dev/null | sed -nE 's/^KillWait *= *([0-9]+).*/\1/p') || :
  read -rt $((${wait:-30} + 15)) -u "$quiet" || :
  kill -TERM "$(<"$STATE/srun")"
}

# How srun says that a task has ended, other than with status 0; what follows is how. A task's own last line may stand
# before it, if it has no line end.
END='srun: error: [^ ]+: tasks?[ :].*: '

# ---- after their end ----

# Whether it was something other than their own decision that has ended the tasks.
interrupted() {
  local first
  first=$(grep -m 1 -E "$END" "$STATE/said" 2>/dev/null | sed -E "s/.*$END//") || :
  case $first in
    'Exited with exit code 2') return 1 ;; # refused, whatever has come since
    'Exited with exit code 138' | 'Exited with exit code 143' | 'User defined signal 1'*) return 0 ;;
    Terminated* | Killed* | '') return 0 ;; # nothing: SLURM could not start them
    *) [ -n "$told" ] ;;
  esac
}

# Whether the job may be requeued: it runs (SIGNALING: a signal is still under way), or is over by its time limit.
# Where SLURM does not answer, it is tried.
living() {
  local state
  state=$(field '%T %r') || { echo "warning: SLURM does not tell the state of job $JOB." >&2 && return; }
  [[ $state =~ ^(RUNNING|SIGNALING)\ |\ TimeLimit$ ]]
}

preempted() { [[ $(scontrol -o show job "$JOB") =~ PreemptTime=[0-9] ]]; }

# Requeue the job, unless this is its fourth fruitless start in a row.
again() {
  local fruitless=0
  trap '' TERM INT USR1 # the requeue ends this shell and what it runs
  [ ! -e "$DIFFUSION_NOT_YET" ] || preempted || fruitless=$((FRUITLESS + 1))
  if ((fruitless > 3)); then
    echo "Job $JOB made no progress in $fruitless starts in a row: it is not requeued. If it needs more time to" \
      "start, give it a longer time limit, by --time." >&2
  elif scontrol requeue "$JOB"; then
    echo "Job $JOB is requeued and continues from its last checkpoint."
    # only now: the comment of a job that is over by its time limit cannot be changed before
    ((fruitless == 0)) || remember fruitless_starts "$fruitless" ||
      echo "warning: the comment of job $JOB cannot be changed: starts without progress are not counted." >&2
  else
    echo "Job $JOB could not be requeued. Submit it again: it continues from its last checkpoint."
  fi
}
