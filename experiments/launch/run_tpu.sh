#!/usr/bin/env bash
# Runs a module of this checkout on a TPU host; the same command on every host of a slice:
#   bash experiments/launch/run_tpu.sh experiments.train --config=... --workdir=/mnt/...
# The first call makes a virtualenv (ZPPO_VENV), a newer setup.py brings it up to date. PYTHON names
# the interpreter; by default the newest from 3.11 on, else one that apt installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=${ZPPO_VENV:-$HOME/.zppo_jax_venv}

candidates=(python3.13 python3.12 python3.11 python3)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")

usable() {
  "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1
}

find_python() {
  local name
  for name in "${candidates[@]}"; do
    if usable "$name"; then
      echo "$name"
      return
    fi
  done
  return 1
}

if [ $# -eq 0 ]; then
  echo 'error: usage: run_tpu.sh MODULE [FLAGS...]' >&2
  exit 2
fi

# The mark is written last: an installation that was cut short starts anew.
if [ ! -e "$venv/.installed" ]; then
  if ! find_python > /dev/null && [ -z "${PYTHON:-}" ]; then  # Ubuntu 24.04, else 22.04
    sudo apt-get update -q
    sudo apt-get install -q -y python3.12-venv || sudo apt-get install -q -y python3.11-venv
  fi
  python=$(find_python) || {
    echo "error: none of ${candidates[*]} is Python >= 3.11 with venv; set PYTHON" >&2
    exit 2
  }
  "$python" -m venv --clear "$venv"
fi
if [ ! -e "$venv/.installed" ] || [ setup.py -nt "$venv/.installed" ]; then
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet '.[tpu]'
  touch "$venv/.installed"
fi

# exec: a signal to this process reaches Python, and its exit status is ours.
exec "$venv/bin/python" -m "$@"
