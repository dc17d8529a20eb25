"""Recipes in YAML: plain keys and values, and the line that each stands on.

YAML has more than a recipe needs, and much of it reads as something else than what was meant: of
two equal keys the last one would win, `off` would be a boolean, `010` eight and `12:30` a number.
What is not plain is refused with its line. `off`, `yes` and dates are text here, anchors, aliases
and merges (`<<`) are what they are in YAML.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alphaspin.errors import InputError

LARGEST = 2**20
"""Bytes of a recipe; also how many values it may have once its aliases are written out."""
DEEPEST = 30
"""Sections within sections."""

BOOL, MERGE, TIME = (f"tag:yaml.org,2002:{name}" for name in ("bool", "merge", "timestamp"))
OTHERWISE = re.compile(r"[-+]?(0[0-7_]*[0-7]|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers that are others than they look: octal and sexagesimal ones of YAML 1.1."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, whose only words for booleans are true and false."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (BOOL, TIME)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)


class YamlFile:
    """What a file holds.

    content: nested keys and values. lines: the line of each dotted key, from 1.
    """

    def __init__(self, path: Path):
        """Read it.

        Raises:
            InputError: it cannot be read, or is not plain; the message has file and line.
        """
        self.path = path
        self.lines: dict[str, int] = {}
        self._left = LARGEST
        text = ""
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise InputError(f"{path}: a recipe has at most {LARGEST:,} bytes")
            text = data.decode()
            self._loader = _Loader(text)
            self._check_events(text)
            node = self._loader.get_single_node()
            content = self._built(node, "", DEEPEST) if node else None
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{path}:{mark.line + 1}" if mark else f"{path}"
            raise InputError(f"{where}: not YAML: {error.problem or error.context}") from None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise InputError(f"{path}:{line}: not YAML: {error.reason}") from None
        except Exception as error:  # whatever a loader raises, it is about this file
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{path}: not YAML: {said}") from None
        if not isinstance(content, dict):
            kind = "nothing" if content is None else type(content).__name__
            raise InputError(f"{path}: expected keys and values, found {kind}")
        self.content: dict[str, Any] = content

    def at(self, key: str) -> str:
        """The file, and the line of a key or else of the section that it is missing from."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}" if key else f"{self.path}"

    def _refuse(self, mark: Any, what: str) -> InputError:
        return InputError(f"{self.path}:{mark.line + 1}: {what}")

    def _check_events(self, text: str) -> None:
        depth = 0
        for event in yaml.parse(text, _Loader):
            if tag := getattr(event, "tag", None):
                shown = tag.replace("tag:yaml.org,2002:", "!!")
                raise self._refuse(event.start_mark, f"{shown}: recipes have no tags; leave it out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise self._refuse(event.start_mark, "nested too deeply")

    def _built(self, node: Any, key: str, room: int) -> Any:
        """The value of a node; `room` is how deep it may go on, which an alias of itself would."""
        self._left -= 1
        if not room or not self._left:
            raise self._refuse(node.start_mark, "an alias without end, or one that grows too large")
        if isinstance(node, yaml.SequenceNode):
            return [self._built(part, key, room - 1) for part in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._section(node, key, room)
        try:
            value = self._loader.construct_object(node)
        except Exception:  # int() and float() raise a few; the value is what is wrong
            raise self._refuse(node.start_mark, f"{key}: what number is this?") from None
        plain = node.style is None and not isinstance(value, str)
        if plain and OTHERWISE.fullmatch(node.value) and str(value) != node.value:
            raise self._refuse(
                node.start_mark,
                f'{key} = {node.value}: YAML reads {value}; write that, or "{node.value}" for text',
            )
        return value

    def _section(self, node: Any, key: str, room: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first: dict[str, int] = {}
        prefix = f"{key}." if key else ""
        for name_node, value_node in node.value:
            mark, name = name_node.start_mark, name_node.value
            if name_node.tag == MERGE and name not in first:
                first[name] = mark.line + 1
                parts = value_node.value if value_node.id == "sequence" else [value_node]
                for part in parts:
                    found = self._built(part, key, room - 1)
                    if not isinstance(found, Mapping):
                        raise self._refuse(mark, "<< takes keys and values")
                    merged = {**found, **merged}
                continue
            if name_node.tag != MERGE and (
                not isinstance(name_node, yaml.ScalarNode)
                or not isinstance(self._loader.construct_object(name_node), str)
            ):
                raise self._refuse(mark, "a key is a name")
            if name in first:
                raise self._refuse(
                    mark,
                    f"{prefix}{name} stands here again, first in line {first[name]}: leave one out",
                )
            first[name] = mark.line + 1
            own[name] = self._built(value_node, prefix + name, room - 1)
            self.lines[prefix + name] = mark.line + 1
        return {**merged, **own}
