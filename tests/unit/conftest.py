"""Makes ``helpers_*.py`` of the folder above importable by their bare names."""

import sys
from pathlib import Path

# Last, not first: the folder tests/multiprocess must not hide the package multiprocess, which
# datasets imports.
sys.path.append(str(Path(__file__).parents[1]))
