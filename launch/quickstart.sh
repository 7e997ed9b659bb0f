#!/usr/bin/env bash
# From a bare machine to a trained model: makes .venv, fetches the starter kit, trains launch/configs/starter.yaml.
#   bash launch/quickstart.sh [--config FILE] [key=value ...]
# On a CPU one rank uses all cores, which is faster than a rank per core; with GPUs there is a rank for each. A second
# call goes on where the first one stopped, and only shows the results when that is the end; run.overwrite=true begins
# anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source .venv/bin/activate

# The recipe is checked first: a wrong key must not cost a download.
plan="$(python - "$@" <<'PYTHON'
import argparse
import sys
from pathlib import Path

from comoe.config.load import load_recipe

parser = argparse.ArgumentParser("quickstart.sh")
parser.add_argument("--config", default="launch/configs/starter.yaml")
parser.add_argument("overrides", nargs="*", metavar="key=value")
given = parser.parse_intermixed_args()
try:
    recipe = load_recipe(given.config, given.overrides)
except ValueError as error:
    sys.exit(f"quickstart: {error}")
folder = Path(recipe.run.output_dir) / recipe.run.name
ready_made = [name for name in (recipe.model.encoder, recipe.data.root) if name.startswith(("kit:", "smoke:"))]
print(folder)
print("resume" if (folder / "config.yaml").exists() and not recipe.run.overwrite else "begin")
print(*ready_made)
PYTHON
)"
{ read -r run_folder; read -r how; read -r ready_made || true; } <<<"$plan"

if [ -n "$ready_made" ]; then
    # shellcheck disable=SC2086  # several names
    python -m comoe.starter $ready_made >/dev/null
fi

arguments=(--deepspeed ds_configs/zero2.json)
if [ "$how" = resume ]; then
    # A run goes on by its own recipe: --config stays out, the options at its side do not.
    arguments+=(--resume "$run_folder")
    while [ $# -gt 0 ]; do
        case "$1" in
            --config) shift ;;
            --config=*) ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
else
    arguments+=("$@")
fi
echo "quickstart: python launch/train.py ${arguments[*]}"
python launch/train.py "${arguments[@]}"

# A run that a signal stops ends well too: the results are the proof.
if [ ! -f "$run_folder/results.json" ]; then
    echo "quickstart: the run wrote no $run_folder/results.json; the messages above say why. The same command goes on." >&2
    exit 1
fi

cat <<NEXT

before you type these lines, once per terminal, in $PWD:
  source .venv/bin/activate
  echo "what a lovely day :)" > posts.txt
NEXT
