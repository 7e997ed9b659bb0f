"""``python -m comoe``: the command ``comoe`` where its folder is not on the PATH."""

from comoe.commands.main import main

if __name__ == "__main__":
    main()
