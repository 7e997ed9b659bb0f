#!/usr/bin/env bash
# Makes .venv with everything comoe needs. Later runs do nothing until pyproject.toml changes.
#   bash launch/setup.sh && source .venv/bin/activate
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0"
VENV=".venv"
LOG="$VENV/setup.log"

stop() { echo "setup: $1" >&2; exit 1; }

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if recent_enough "$candidate"; then
            # Seen from inside a virtual environment (maybe our own, about to be made anew), the one beneath it.
            "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
            return
        fi
    done
    stop "comoe needs Python 3.11 or later; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing). Install one, or name it: PYTHON=/path/to/python3 bash launch/setup.sh"
}

checksum() { "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

# One step: its name, then a command that writes to the log; the end of the log is shown when it fails.
step() {
    local title="$1"; shift
    echo "setup: $title"
    "$@" >>"$LOG" 2>&1 || { tail -n 25 "$LOG" >&2; stop "'$title' failed; the whole log is $PWD/$LOG. Repeat the command once the cause is gone."; }
}

python="$(find_python)"
# The folder is part of the stamp: a virtual environment cannot be moved.
# An environment that is a link belongs to somebody else; making it anew would empty it.
[ ! -L "$VENV" ] || stop "$VENV is a link; remove it, so that this folder can have an environment of its own."
stamp="$( { pwd; echo "$TORCH"; "$python" --version; cat pyproject.toml; } | checksum "$python")"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.stamp" 2>/dev/null || true)" = "$stamp" ]; then
    exit 0
fi

compiler=""
for candidate in ${CC:-cc gcc clang}; do
    if command -v "$candidate" >/dev/null; then compiler="$candidate"; break; fi
done
[ -n "$compiler" ] || stop "no C compiler found (${CC:-cc, gcc, clang}); DeepSpeed builds small extensions with it. Install one, for example the package build-essential or gcc."

echo "setup: making $VENV with $("$python" --version); this takes a few minutes, once"
# A half-made environment, or one of another folder or Python, is made anew; one that only lacks a new package is kept.
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || [ "$(cat "$VENV/.home" 2>/dev/null || true)" != "$PWD $("$python" --version)" ]; then
    "$python" -m venv --clear "$VENV" || stop "Python cannot make a virtual environment; install its venv module, for example the package python3-venv."
    echo "$PWD $("$python" --version)" >"$VENV/.home"
fi
: >"$LOG"
pip=("$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-compile)

# torch comes first and alone, then stays: a package that asks for another build must not pull one in behind our back.
step "installing $TORCH" "${pip[@]}" "$TORCH"
"$VENV/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$VENV/constraints.txt"
step "installing comoe and its dependencies" "${pip[@]}" --constraint "$VENV/constraints.txt" --editable ".[dev]"
# Below a path with a space the first line of DeepSpeed's scripts names no interpreter (pip mends only those that it makes
# itself); the environment that is activated has one.
sed -i '1s|^#!.* .*|#!/usr/bin/env python|' "$VENV"/bin/deepspeed* "$VENV"/bin/ds*
echo "setup: compiling on all cores"
# pip would do it one file after another. Packages hold templates that are no Python: these stay as they are.
"$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" >>"$LOG" 2>&1 || true
step "checking that it imports" "$VENV/bin/python" -c "import torch, transformers, datasets, comoe.config.load"
echo "$stamp" >"$VENV/.stamp"
echo "setup: done; activate it with: source $VENV/bin/activate"
