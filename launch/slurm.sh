#!/usr/bin/env bash
# Submit to SLURM, from the top folder of a checkout: train, and when that has ended well, score:
#   bash launch/slurm.sh [flags of sbatch] [overrides...] [-- [flags of sbatch] [overrides of diffusion.evaluate...]]
#   bash launch/slurm.sh --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 +experiment=lsun_church -- --gpus-per-node=1
# Flags are the words that begin with a dash, values joined to them by "=". Both configurations are looked at before
# anything is submitted: a misspelt key is refused here and not hours later in the queue. SBATCH_PARTITION and
# SBATCH_ACCOUNT are taken from the environment.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
command -v sbatch >/dev/null || { say "error: sbatch not found: submit from a machine with SLURM."; exit 2; }
environment requirements.lock

submit() { # COMMAND...: say it, run it, say the job's id; leaves that in $job
  printf '+'
  printf ' %q' "$@"
  echo
  job=$("$@")
  job=${job%%;*}
  echo "job $job"
}

train_flags=() train=() evaluate_flags=() evaluate=() after=
for word in "$@"; do
  case $after$word in
    --) after=evaluate: ;;
    -*) train_flags+=("$word") ;;
    evaluate:-*) evaluate_flags+=("$word") ;;
    evaluate:*) evaluate+=("$word") ;;
    *) train+=("$word") ;;
  esac
done

config=$("$PYTHON" -m diffusion.train trainer=slurm "${train[@]}" --cfg job --resolve)
folder=$("$PYTHON" -c "import sys, yaml; print(yaml.safe_load(sys.stdin)[\"run_dir\"])" <<<"$config")
"$PYTHON" -m diffusion.evaluate "checkpoint=$folder" "${evaluate[@]}" --cfg job --resolve >/dev/null

submit sbatch --parsable "${train_flags[@]}" slurm/train.sbatch "${train[@]}"
submit sbatch --parsable --dependency="afterok:$job" --kill-on-invalid-dep=yes "${evaluate_flags[@]}" \
  slurm/evaluate.sbatch "$folder" -- "${evaluate[@]}"
