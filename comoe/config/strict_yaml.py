"""YAML of strangers: plain values, no key twice, none that YAML 1.1 reads as another; limits on size and depth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
"""Of a file."""

MAX_NODES = 20_000
"""Keys and values of a file, each alias counted as all that it stands for."""

MAX_DEPTH = 50
"""Levels of sections and lists in one another."""


class StrictLoader(yaml.SafeLoader):
    """Plain YAML values; ValueError with the line for what may mean something else, or is too large.

    Source of the values that are read otherwise: YAML 1.1, which PyYAML follows (octal and base 60
    numbers, dates).
    """

    max_nodes = MAX_NODES

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def refuse(self, node: yaml.Node | yaml.Event, rule: str) -> ValueError:
        """An error in the line of a node."""
        return ValueError(f"{self.name}:{node.start_mark.line + 1}: {rule}")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node, unless it is too deep, or one too many."""
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > MAX_DEPTH:
            raise self.refuse(self.peek_event(), f"more than {MAX_DEPTH} levels in one another.")
        if self._nodes > self.max_nodes:
            raise self.refuse(self.peek_event(), f"more than {self.max_nodes:,} keys and values.")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        """The whole document, unless its aliases make it too large or endless."""
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(
        self, node: yaml.Node, known: dict[int, tuple[int, int] | None]
    ) -> tuple[int, int]:
        """Nodes and levels of a node, aliases written out; what an alias stands for is always known before."""
        if id(node) in known:
            found = known[id(node)]
            if found is None:
                raise self.refuse(node, "it holds itself by an alias (*); write it out.")
            return found
        known[id(node)] = None
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else (
            node.value if isinstance(node, yaml.SequenceNode) else []
        )  # fmt: skip
        measured = [self._measure(part, known) for part in parts]
        size = 1 + sum(nodes for nodes, _ in measured)
        depth = 1 + max((levels for _, levels in measured), default=0)
        if size > self.max_nodes:
            raise self.refuse(
                node, f"its aliases (*) stand for more than {self.max_nodes:,} keys and values."
            )
        if depth > MAX_DEPTH:
            raise self.refuse(node, f"its aliases (*) make more than {MAX_DEPTH} levels.")
        known[id(node)] = size, depth
        return size, depth

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A section, with no key twice."""
        # YAML itself would silently keep the last one.
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise self.refuse(
                    key_node, f"{key} is given twice, first in line {seen[key]}; keep one."
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer, unless it is one in a base that nobody sees."""
        digits = node.value.lstrip("+-").replace("_", "")
        if len(digits) > 4000:
            raise self.refuse(node, f"a number of {len(digits):,} digits.")
        value = super().construct_yaml_int(node)
        hidden = ":" in digits or (len(digits) > 1 and digits[0] == "0" and digits.isdecimal())
        return self._told(node, value) if hidden else value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number, unless it is one to the base 60."""
        value = super().construct_yaml_float(node)
        return self._told(node, value) if ":" in node.value else value

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> Any:
        """No option is a date."""
        raise self.refuse(node, f"{node.value} is a date to YAML; put it in quotes.")

    def _told(self, node: yaml.ScalarNode, value: float) -> Any:
        raise self.refuse(
            node, f"{node.value} is {value} to YAML 1.1; write {value}, or put it in quotes."
        )


for kind in ("int", "float", "timestamp"):
    construct = getattr(StrictLoader, f"construct_yaml_{kind}")
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{kind}", construct)


def read_yaml(path: Path, *, saved: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's nested dicts, and "file:line" of each dotted key.

    Args:
        path: the file.
        saved: that of a run that was begun, which may be a hundred times as large.

    Raises:
        ValueError: no such file, no YAML, no mapping, or what ``StrictLoader`` refuses.
    """
    times = 100 if saved else 1
    try:
        with path.open("rb") as file:
            content = file.read(times * MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # str(error) of an OSError would name the path a second time.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path}: the recipe cannot be read ({reason}); give an existing UTF-8 YAML file."
        ) from error
    if len(content) > times * MAX_BYTES:
        raise ValueError(f"{path}: a recipe has at most {MAX_BYTES:,} bytes.")
    try:
        loader = StrictLoader(text.removeprefix("\ufeff"))
        loader.name, loader.max_nodes = str(path), times * MAX_NODES
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        advice = "look at the quotes, colons and indents"
        raise ValueError(
            f"{path}:{line}: this is not valid YAML: {error.problem}; {advice}."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not valid YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path}:1: a recipe is a mapping with sections such as train: and tasks:, not {str(raw)[:100]!r}."
        )
    return raw, dict(_key_lines(node, name=str(path)))


def _key_lines(node: yaml.Node | None, *, name: str, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, "file:line") of every key below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            path = f"{prefix}{key_node.value}"
            yield path, f"{name}:{key_node.start_mark.line + 1}"
            yield from _key_lines(value_node, name=name, prefix=f"{path}.")
