"""``python -m comoe.starter``: prepare the starter kit."""

import sys

from comoe.starter.registry import main

if __name__ == "__main__":
    sys.exit(main())
