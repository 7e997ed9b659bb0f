"""Structured mutations of trees (YAML, JSON) and of bytes, and what a command may do with them."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("COMOE_FUZZ", "0"))
"""Examples of each test; 0 is few, always the same."""
HANG = 10.0
"""Seconds of the processor that an input of a few kilobytes may take."""


def fuzz(few: int) -> Callable[[Any], Any]:
    """Settings of a test: ``few`` examples in CI, ``COMOE_FUZZ`` random ones in a long run."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


STRANGE = [
    "", " ", "\t", "a" * 3000, "\x1b[31mred\x1b[0m", "\u202eright", "\ufeff", "a\u200db", "é", "e\u0301",
    "../up", "/dev/null", "/", "~", "$HOME", "%s%n", "{0.__class__}", "{", "null", "nan", "1e999", "yes", "0x10",
    "1:30", "*a", "&a", "!!python/none", "text", "auto", "all", "mood", "=1+1", "a,b", 'a"b', "a\nb", "a\rb",
]  # fmt: skip
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    10**4,
    10**9,
    10**15,
    2**31,
    2**63,
    10**30,
    -(10**30),
    0.5,
    1e-9,
    -0.5,
    1e30,
    1e300,
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.floats(),
    st.sampled_from(STRANGE),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(STRANGE[5:]), inner, max_size=3),
    ),
    max_leaves=6,
)


def _places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    found = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in found:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw: Any, trees: list[Any]) -> Any:
    """One of the trees with one to four changes: a value, a key gone, misspelled, moved or added."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(tree))
        if not places:
            return tree
        *above, key = draw(st.sampled_from(places))
        parent, how = _at(tree, tuple(above)), draw(st.integers(0, 5))
        if how <= 2:
            parent[key] = draw(VALUES)
        elif how == 3:
            del parent[key]
        elif how == 4:
            parent[key] = copy.deepcopy(_at(tree, draw(st.sampled_from(places))))
        elif isinstance(parent, dict):
            new = draw(st.sampled_from([f"{key}s", str(key)[:-1], str(key).upper(), *STRANGE]))
            parent[new] = parent.pop(key)
        else:
            parent.insert(0, draw(VALUES))
    return tree


@st.composite
def damaged(draw: Any, contents: list[bytes]) -> bytes:
    """One of the contents with some bytes changed, cut out, put in or repeated."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.integers(0, 3))
        if how == 0:
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
        elif how == 1:
            del content[at : at + draw(st.integers(1, 40))]
        elif how == 2:
            content[at:at] = draw(st.sampled_from(STRANGE)).encode()
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 200))]
    return bytes(content)


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Fault(AssertionError):
    """What no input may cause."""


def run_main(main: Callable[[list[str]], object], words: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process, which must behave whatever it read."""
    out, err = io.StringIO(), io.StringIO()
    began, code = time.process_time(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    said = out.getvalue() + err.getvalue()
    if re.search(r"Traceback|: unexpected \w+: ", err.getvalue()):
        raise Fault(said[-3000:])
    if time.process_time() - began > HANG:
        raise Fault(f"it took {time.process_time() - began:.0f} s")
    if CONTROL.search(said):
        raise Fault(f"a control character reaches the terminal: {said[-500:]!r}")
    if code and len(err.getvalue().strip().splitlines()) < 1:
        raise Fault(f"it ended with {code} and said nothing")
    return code, out.getvalue(), err.getvalue()


def files_below(folder: Path) -> set[str]:
    """Every path in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
