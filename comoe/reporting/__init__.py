"""A report of a corpus: ``comoe report`` makes one page of HTML of the predictions of ``comoe predict``."""
