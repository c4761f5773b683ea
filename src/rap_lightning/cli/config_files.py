"""The config files that a command line names: what they hold, and the line on which each option is given."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

from rap_lightning.errors import first_line


def configs_named(args: Sequence[str]) -> list[str]:
    """The files of ``-c`` and ``--config``, in their order.

    >>> configs_named(["fit", "-c", "a.yaml", "--config=b.yaml", "--x", "1"])
    ['a.yaml', 'b.yaml']
    """
    found = []
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            found += [value] if equals else list(args[place + 1 : place + 2])
    return found


def content_of(path: str) -> dict[str, Any]:
    """The sections of a config; empty where it can't be read, which the parser reports."""
    content, _ = read_yaml(path)
    return content if isinstance(content, dict) else {}


def read_yaml(path: str) -> tuple[Any, str]:
    """The content of a YAML file, and why it can't be read."""
    try:
        return load_unique(Path(path).read_text(encoding="utf-8")), ""
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        return None, (f"line {mark.line + 1}, column {mark.column + 1}: " if mark else "") + str(error.problem)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return None, first_line(error)


LONG = 50_000
"""Characters from which JSON is read as JSON: jsonargparse (4.53) looks for options in any file that an option names,
data files among them, four times, and PyYAML takes 2.5 s for a megabyte each time."""


def load_unique(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Load YAML, in which the last of two equal keys would silently win.

    Raises:
        yaml.YAMLError: a mapping has a key twice; it can't be read.
    """
    try:
        if len(text) > LONG and text.lstrip()[:1] in ("[", "{"):
            with suppress(ValueError):  # no JSON, or a key twice: YAML says where
                return json.loads(text, object_pairs_hook=_distinct)
        if text.count(":") > 1:
            _refuse_duplicates(yaml.compose(text, yaml.SafeLoader))
        return load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs) or "<<" in found:
        raise ValueError
    return found


def _refuse_duplicates(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {name.value} is there twice", problem_mark=name.start_mark)
            seen.add((name.tag, str(name.value)))
            _refuse_duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value)


def copy_pipes(args: Sequence[str]) -> list[str]:
    """Return the arguments with configs that can be read only once, such as ``-c <(...)``, as temporary files."""
    copied = list(args)
    for path in configs_named(args):
        if not Path(path).is_fifo():
            continue
        with NamedTemporaryFile("w", prefix="config-", suffix=".yaml", encoding="utf-8", delete=False) as file:
            file.write(Path(path).read_text(encoding="utf-8", errors="replace"))
        atexit.register(Path(file.name).unlink, missing_ok=True)
        place = next(i for i, arg in enumerate(copied) if arg in (path, f"--config={path}", f"-c={path}"))
        copied[place] = copied[place].removesuffix(path) + file.name
    return copied


def where(key: str, args: Sequence[str]) -> str:
    """Where an option was given: the flag as typed, or a config's line. The last place counts, as in parsing."""
    bare = _bare(key)
    flags = [arg.partition("=")[0].rstrip("+") for arg in args if arg.startswith("--")]
    for flag in reversed(flags):
        if _bare(flag[2:]) == bare:
            return flag
    for path in reversed(configs_named(args)):
        if line := _line_of(path, bare):
            return f"{path} line {line}: {key}"
    for flag in reversed(flags):
        if bare.startswith(f"{_bare(flag[2:])}."):  # a whole section as one value
            return f"{flag}: {key}"
    return f"--{key}"


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("init_args", "class_path", "dict_kwargs"))


def _line_of(path: str, bare: str) -> int:
    """The line that gives a key, from 1; 0 where the file doesn't."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return 0
    return next((line for name, line in _keys(root, "") if name == bare), 0)


def _keys(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = _bare(f"{prefix}.{name.value}".strip("."))
            if key != prefix:
                yield key, name.start_mark.line + 1
            yield from _keys(value, key)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys(value, prefix)
