# Sourced by the scripts beside it: makes .venv from the lock, once, and sets $PYTHON.
#   environment LOCKFILE
#   processes                 how many this machine should run: one a GPU, one without a GPU
#   run COMMAND...            say the command, then become it
# PYTHON_BIN chooses the interpreter (3.11 to 3.13), DIFFUSION_VENV another place than .venv.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE  # without .pyc files importing lightning takes 19 s instead of 7
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "$@" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON_BIN:-python3.11 python3.12 python3.13 python3 python}; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "error: Python 3.11, 3.12 or 3.13 is needed and none was found; name one with PYTHON_BIN=/path/to/python."
  exit 2
}

environment() {
  local lock=$1 venv=${DIFFUSION_VENV:-.venv} mark
  PYTHON=$venv/bin/python
  mark=$venv/.installed-$(basename "$lock")
  # The test lock holds all of the other one: an environment made for the tests serves both.
  if [ -x "$PYTHON" ] && { cmp -s "$lock" "$mark" ||
    { [ "$lock" = requirements.lock ] && cmp -s requirements-test.lock "$venv/.installed-requirements-test.lock"; }; }; then
    return
  fi
  local python
  python=$(find_python)
  say "Making $venv from $lock with $("$python" --version) (5.5 GB with the CUDA libraries; minutes, once)"
  [ -x "$PYTHON" ] || "$python" -m venv "$venv"
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null # an environment that uv made has none
  if [ -x "$venv/bin/uv" ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check uv==0.13.9 >&2; then
    "$venv/bin/uv" pip install --quiet --python "$PYTHON" --compile-bytecode --requirement "$lock"
  else
    say "uv cannot be installed, pip does it instead: some minutes more"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$lock"
  fi
  cp "$lock" "$mark"
}

processes() { "$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))'; }

run() {
  printf '+'
  printf ' %q' "$@"
  echo
  exec "$@"
}
