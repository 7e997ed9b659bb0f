#!/usr/bin/env bash
# All checks and tests: makes .venv if need be, then ruff, then pytest. Arguments go to pytest.
#   bash launch/test.sh [-k name] [-m "not end_to_end"] [tests/unit/config]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source .venv/bin/activate

# Tests start two ranks and more: with one thread each they share two cores without fighting.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
ruff check .
if [ $# -gt 0 ]; then
    exec python -m pytest -q "$@"
fi
# First what keeps one core busy, then what starts ranks of its own: these often wait for one another. Files with the
# longest fixtures come first, so that no worker ends with one alone.
failed=0
python -m pytest -q -n 2 --dist worksteal -m "one_core or not end_to_end" tests/end_to_end tests/unit || failed=1
python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not one_core" \
    tests/multiprocess tests/end_to_end || failed=1
exit "$failed"
