"""The command ``comoe``: a module per word, with ``parser()`` and ``main(argv)``; nothing heavy before the parsing."""
