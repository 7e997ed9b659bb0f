"""A deferred module is imported when something of it is first used, and is then the module itself."""

import subprocess
import sys

import pytest

from comoe.deferred import Deferred

LATE = """
import sys
from comoe.deferred import Deferred
late = Deferred("wave")
assert "wave" not in sys.modules
error = late.Error
import wave
assert error is wave.Error and late.open is wave.open
wave.open = None
assert late.open is None
"""


def test_it_is_imported_on_use_and_not_before():
    subprocess.run([sys.executable, "-c", LATE], check=True)


def test_what_is_missing_is_said_as_by_the_module():
    with pytest.raises(AttributeError, match="module 'math' has no attribute 'cosine'"):
        Deferred("math").cosine  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Deferred("no_such_module").anything  # noqa: B018
