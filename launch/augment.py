"""``comoe augment`` of this checkout, installed or not."""

import sys
from pathlib import Path

# An installed comoe comes first; without one, the package beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from comoe.commands.augment import main  # noqa: E402

if __name__ == "__main__":
    main()
