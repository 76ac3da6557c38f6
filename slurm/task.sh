# One task of a job:  bash slurm/task.sh COMMAND...   (started by job.sh, whose process is $TELL)
# The task becomes the command. Beside rank 0, which is on the node of the job's shell, a process stays that tells the
# shell of a USR1 the moment it comes, and ends with the command.
# One of several tasks starts without an ear for TERM, and gets one when the command says how it is to be handled: what
# the first of them to be refused ends with, the others end with as well, instead of being told to end by srun before.
if [ "$SLURM_PROCID" = 0 ]; then
  {
    trap 'kill -USR1 "$TELL"' USR1
    trap : TERM INT
    while kill -0 $$; do
      sleep 5 & # a trap waits for the end of a command, but not of a wait
      wait
    done
  } </dev/null >/dev/null 2>&1 &
fi
[ "$SLURM_NTASKS" = 1 ] || trap '' TERM
exec "$@"
