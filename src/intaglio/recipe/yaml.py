"""YAML with line numbers: plain data only, and the line of every value for error messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from intaglio.errors import IntaglioError, shorten

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
# YAML 1.1 reads 1e-3 as a string, because it has no dot; users mean a number.
_NUMBER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
_OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken
)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_REFUSED = {yaml.TagToken: "a tag", yaml.AnchorToken: "an anchor", yaml.AliasToken: "an alias"}

Position = tuple[str | int, ...]
"""A path of keys and indices into a document."""


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Args:
        name: of the file, for error messages.
        value: plain dicts, lists and scalars.
        lines: line number (from 1) of each position.
    """

    name: str
    value: Any
    lines: dict[Position, int]

    def where(self, position: Position) -> str:
        """Return `FILE, line N, steps[1].wanda.sparsity`; the line is that of the nearest position with one."""
        near = position
        while near and near not in self.lines:
            near = near[:-1]
        line = self.lines.get(near)
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" for part in position)
        text = text.removeprefix(".")
        return ", ".join(part for part in (self.name, f"line {line}" if line else "", text) if part)


def read_yaml(path: Path) -> Document:
    """Read a YAML file of plain data.

    Raises:
        IntaglioError: the file is missing, too large, not UTF-8 text or not YAML, repeats a key, is nested too deeply,
            or uses tags, anchors or aliases.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise IntaglioError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise IntaglioError(f"{path} is over {MAX_BYTES >> 20} MiB, too large for a recipe")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntaglioError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str = "recipe") -> Document:
    """Parse YAML text of plain data; `name` stands for the file in error messages. See `read_yaml`."""
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            line = token.start_mark.line + 1
            if depth > MAX_DEPTH:
                raise IntaglioError(f"{name}, line {line}: it is nested too deeply, over {MAX_DEPTH} levels")
            if type(token) in _REFUSED:
                kind = _REFUSED[type(token)]
                raise IntaglioError(
                    f"{name}, line {line}: {kind} of YAML is not accepted in a recipe; write plain values"
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise IntaglioError(f"{name}{at} is not valid YAML: {problem}") from error
    lines: dict[Position, int] = {}
    value = None if node is None else _plain(node, (), lines, name, yaml.SafeLoader(""))
    return Document(name, value, lines)


def _plain(node: yaml.Node, position: Position, lines: dict[Position, int], name: str, loader: yaml.SafeLoader) -> Any:
    lines[position] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*position, index), lines, name, loader) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise IntaglioError(f"{name}, line {line}: a key must be a word")
            key = str(key_node.value)
            if key in mapping:
                raise IntaglioError(f"{name}, line {line}: the key {shorten(key)!r} is repeated")
            mapping[key] = _plain(value_node, (*position, key), lines, name, loader)
            lines[(*position, key)] = line
        return mapping
    assert isinstance(node, yaml.ScalarNode)
    if node.style is None:
        # YAML 1.1 reads "2:4" as a number in base 60; here it is a pattern.
        if ":" in node.value:
            return node.value
        if _NUMBER.fullmatch(node.value):
            return float(node.value)
    try:
        return loader.construct_object(node)
    except (ValueError, yaml.YAMLError) as error:
        line, problem = node.start_mark.line + 1, getattr(error, "problem", None) or error
        raise IntaglioError(f"{name}, line {line}: {shorten(node.value)} cannot be read: {problem}") from error
