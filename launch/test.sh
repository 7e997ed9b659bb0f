#!/usr/bin/env bash
# All checks and tests: makes .venv if need be, then ruff, then pytest. Arguments go to pytest.
#   bash launch/test.sh [-k name] [-m "not end_to_end"] [tests/unit/test_config.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source .venv/bin/activate

# Tests start two ranks and more: with one thread each they share two cores without fighting.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
ruff check .
python -m pytest -q "$@"
