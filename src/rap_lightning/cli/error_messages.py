"""A mistake on a command line or in a config, told in a few lines: where it is, what was expected, what to do.

argparse and jsonargparse would print their whole usage (fit's is 130 lines), and a text for each level that an option
is nested in. What was found is read off those texts, for jsonargparse keeps no better record; its version is pinned,
and tests/test_mistakes.py has each kind.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from rap_lightning.errors import ConfigError, UserError

if TYPE_CHECKING:
    _Parser = argparse.ArgumentParser
else:
    _Parser = object

LIBRARIES = ("rap_lightning", "lightning", "jsonargparse", "argparse", "yaml", "torch", "transformers", "inspect")
FEW = 12
"""Names that are listed beside the nearest one."""
OURS = ("rap_lightning.", "torch.optim.")
"""Packages whose classes' options are suggested before the class is named."""
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list ([1, 2])",
    "NoneType": "null",
}


class Explains(_Parser):
    """Mixed in before a parser: it raises ConfigError where argparse would print its usage and exit."""

    beside: Sequence[str] = ()
    """Options of the command that another parser takes before this one sees the rest."""

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Called by the parser for whatever is wrong.

        Raises:
            ConfigError: always, but in the parser of a nested class, whose text is part of what is told further up.
        """
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)  # type: ignore[call-arg]  # jsonargparse's takes both
        raise ConfigError(explained(self, message, ex)) from ex


class _Fault(NamedTuple):
    keys: list[str]  # the options that it is nested in, outermost first
    owners: list[str]  # import paths of the classes that those are options of, where they are options of one
    texts: list[str]  # of each level, the outermost first

    @property
    def owner(self) -> str:
        return self.owners[-1] if self.owners else ""

    @property
    def core(self) -> str:
        return self.texts[-1]


def explained(parser: Any, message: str, error: BaseException | None = None) -> str:
    """What to tell of an error of argparse or jsonargparse: a line or a few."""
    parser = getattr(error, "subcommand_parser", None) or parser
    chain = list(causes(error))
    if ours := [one for one in chain if isinstance(one, UserError)]:
        return str(ours[-1])
    fault = _fault([message, *map(str, chain)])
    args: Sequence[str] = getattr(parser, "args", None) or ()
    for tell in (_missing, _config, _unknown_flags, _unknown_key, _no_class, _no_value, _wrong_value):
        if told := tell(parser, fault, args):
            return told
    lines = [line.strip() for line in fault.core.splitlines() if line.strip()]
    at = f"{where('.'.join(fault.keys), args)}: " if fault.keys else ""
    return at + "\n  ".join(lines[:3])


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those beneath it: what it was raised from, and what a library was at when it raised it.

    What a user's own code had caught before something else went wrong in it is no cause.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        within = None if error.__suppress_context__ or raised_in(error) not in LIBRARIES else error.__context__
        error = error.__cause__ or within


def raised_in(error: BaseException) -> str:
    """The package whose code raised an exception."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = str(last.tb_frame.f_globals.get("__name__", "")) if last is not None else ""
    return name.partition(".")[0]


def _fault(texts: Iterable[str]) -> _Fault:
    keys: list[str] = []
    kept: list[str] = []
    owners: list[str] = []
    for text in map(str.strip, texts):
        if not text or text in kept[-1:]:
            continue
        kept.append(text)
        if found := re.match(r'Parser key "(.+?)":', text):
            keys.append(found[1])
        called = r"is not accepted. Got value: Namespace\(class_path='(.+?)'"
        if found := re.match(r"Problem with given class_path '(.+?)'", text) or re.search(called, text):
            owners.append(found[1])
    return _Fault(keys, owners, kept)


def _missing(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    found = re.search(r"the following arguments are required: (.+)", fault.core)
    if not found:
        return ""
    names = [".".join([*fault.keys, one.removeprefix(f"{_subcommand(parser)}.")]) for one in found[1].split(", ")]
    flags = ", ".join(name if name.startswith("-") or name.isupper() else f"--{name}" for name in names)
    both = "it as an option" if len(names) == 1 else "them as options"
    config = f" Give {both}, or in a config (--config FILE)." if "--config" in parser._option_string_actions else ""
    return f"missing: {flags}.{config}\n  {_command(parser)} --help shows an example."


def _config(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    if missing := re.search(r"File does not exist: '(.+)'", fault.core):
        return f"--{'.'.join(fault.keys)}: no such file: {missing[1]}. Expected the path of a YAML file."
    if not any(text.startswith(("Problems parsing config", "Unexpected config")) for text in fault.texts):
        return ""
    for path in configs_named(args):
        content, problem = _read(path)
        if problem:
            return f"--config {path}: it can't be read as YAML: {problem}"
        if not isinstance(content, dict):
            return f"--config {path}: expected keys with values, found {_short(content)}."
    return ""


def _unknown_flags(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    found = re.match(r"unrecognized arguments: (.*)", fault.core)
    if not found or fault.keys:
        return ""
    words = found[1].split()
    flags = [word.partition("=")[0] for word in words if word.startswith("-") and not re.match(r"-[\d.]", word)]
    if not flags:
        hint = f" Did you mean --config {words[0]}?" if words[0].endswith((".yaml", ".yml")) else ""
        return f"{found[1]}: expected an option (--NAME VALUE).{hint} {_listed(parser)}"
    known = [name for name in parser._option_string_actions if name.startswith("--")] + list(parser.beside)
    known += [f"--{name}" for name in nested_options(parser)]
    return "\n  ".join([*(f"{flag}: no such option.{_meant(flag, known)}" for flag in flags), _listed(parser)])


def _unknown_key(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    option = re.search(r"(?:Option|does not accept option) '(.+?)'(?: is not accepted|$)", fault.core)
    group = re.match(r"Group '(.+?)' does not", fault.core)
    nested = re.match(r"unrecognized arguments: --([\w.]+)", fault.core)
    if not option and not nested:
        return ""
    name = (option or nested)[1]  # type: ignore[index]
    key = ".".join([*fault.keys, *([group[1]] if group else []), name])
    at = where(key, args)
    if not fault.owner:
        known = [*parser._option_string_actions, *(f"--{name}" for name in nested_options(parser))]
        near = _meant(f"--{key}", known)
        return f"{at}: no such option.{near if at.startswith('--') else near.replace('--', '')}\n  {_listed(parser)}"
    kind, first = fault.owner.rpartition(".")[2], name.partition(".")[0]
    own = options_of(fault.owner)
    more = f" and {len(own) - FEW} more" if len(own) > FEW else ""
    has = f" It has {', '.join(own[:FEW])}{more}." if own else " It has none."
    return f"{at}: {kind} has no option {first}.{_meant(first, own)}{has}\n  {_class_help(parser, fault)}"


def _class_help(parser: Any, fault: _Fault) -> str:
    """Where the options of a class are explained; those of a class within are explained with it."""
    flag = f"--{fault.keys[0]}.help"
    action = parser._option_string_actions.get(flag)
    if action is None:
        return _listed(parser)
    kind = "" if action.nargs == 0 else f" {fault.owners[0].rpartition('.')[2]}"
    return f"{_command(parser)} {flag}{kind} says what they do."


def _no_class(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    """A class path that leads nowhere."""
    short = re.search(r"Expected a dot import path string: (\S+)$", fault.core)
    gone = re.match(r"No module named '(.+)'", fault.core)
    lacks = re.match(r"(?:partially initialized )?module '(.+?)' has no attribute '(.+?)'", fault.core)
    if not (short or gone or lacks):
        return ""
    path = short[1] if short else fault.owner
    keys = fault.keys
    if gone and len(fault.owners) < len(keys):  # of a function's import path the text says no more
        path = gone[1]
    if asked := re.match(r"--(\S+)\.help: ", fault.texts[0]):
        at, keys = f"--{asked[1]}.help {path}", [asked[1]]
    else:
        at = where(".".join(keys), args)
        at = f"{at}: {path}" if " line " in at else f"{at} {path}"
    if gone and not f"{path}.".startswith(f"{gone[1]}."):
        return f"{at}: it can't be imported: {fault.core}"  # what its own module imports isn't there
    known = _subclasses(parser, keys, fault.owners)
    name, near = path.rpartition(".")[2], ""
    if lacks and not lacks[1].startswith("rap_lightning"):
        own = get_close_matches(name, vars(import_module(lacks[1])), 1, 0.5)
        near = f"{lacks[1]}.{own[0]}" if own else ""
    elif gone and (files := get_close_matches(gone[1], [file.stem for file in Path().glob("*.py")], 1, 0.8)):
        near = f"{files[0]}.{name}"
    elif found := get_close_matches(name, known, 1, 0.5):
        near = found[0]
    what = f"no module {gone[1]}." if gone else "no such class."
    hint = f" Did you mean {near}?" if near else ""
    few = known and (not near or len(known) <= FEW)
    there = f"There are {', '.join(known)};" if few else f"{_listed(parser)[:-1]};"
    return f"{at}: {what}{hint}\n  {there} or give the import path of one of your own."


def _no_value(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    found = re.match(r"argument (?:\S+/)?(\S+): expected (?:one|at least one) argument", fault.core)
    if found:
        last = [arg for arg in args if arg.startswith(found[1])][-1:] or [found[1]]
        return f"{last[0]}: expected a value after it; found none."
    if "Dict must include a class_path" in fault.core:
        name = fault.keys[-1]
        given = re.search(r"NestedArg\(key='(.+?)'", fault.core)
        at = where(".".join([*fault.keys, given[1]] if given else fault.keys), args)
        known = ", ".join(_subclasses(parser, fault.keys, fault.owners))
        return f"{at}: of which class? Name it before its options: --{name} CLASS. There are {known}."
    return ""


def _wrong_value(parser: Any, fault: _Fault, args: Sequence[str]) -> str:
    """A value of another type."""
    if found := re.match(r"argument (\S+): invalid (\w+) value: (.+)", fault.core):
        return f"{found[1]}: expected {TYPES.get(found[2], found[2])}; found {found[3]}."
    if found := re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.+)\)", fault.core):
        choices = [choice.strip("'") for choice in found[3].split(", ")]
        return f"{found[1]}: expected one of {', '.join(choices)}; found {found[2]!r}.{_meant(found[2], choices)}"
    found = re.match(r"Expected an? (.+)\. Got value: (.*)", fault.core, re.DOTALL)
    if not found or not fault.keys:
        return ""
    types = [found[1]]
    if len(fault.texts) > 1 and (union := fault.texts[-2]).startswith("Does not validate"):
        types = re.findall(r"^ +- Expected an? (.+)$", union, re.MULTILINE) or types
    choices = [choice for kind in types if "Literal[" in kind for choice in re.findall(r"'(.*?)'", kind)]
    plain = [_plain(kind) for kind in types if "Literal[" not in kind]
    wanted = (["one of " + ", ".join(choices)] if len(choices) > 1 else choices) + [
        kind for kind in dict.fromkeys(plain) if kind
    ]
    near = get_close_matches(found[2], choices, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{where('.'.join(fault.keys), args)}: expected {' or '.join(wanted)}; found {_short(found[2])}.{hint}"


def _plain(kind: str) -> str:
    named = re.match(r"<class '(.+)'>", kind)
    name = named[1] if named else kind
    return TYPES.get(name, re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(parser: Any) -> str:
    return f"{_command(parser)} --help lists all."


def _subcommand(parser: Any) -> str:
    """Of the parser of several commands, the one that runs."""
    return str(parser.args[0]) if getattr(parser, "_subcommands_action", None) and parser.args else ""


def _command(parser: Any) -> str:
    return f"{parser.prog.replace(' [options]', '')} {_subcommand(parser)}".strip()


def _meant(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The option that was meant, or a few; none where none is like it.

    >>> nearest("--trainer.max_stepss", ["--trainer.max_steps", "--trainer.max_epochs"])
    ['--trainer.max_steps']
    >>> nearest("--lr", ["--model.optimizer.lr", "--model.loss.beta"])
    ['--model.optimizer.lr']
    >>> nearest("--fruit", ["--model.optimizer.lr"])
    []
    """
    options = [option for option in dict.fromkeys(known) if not name.startswith(f"{option}.")]
    if near := get_close_matches(name, options, 1, 0.85):
        return near
    last = _last(name)
    if same := [option for option in options if _last(option) == last]:  # in another section than they looked for it in
        return sorted(same, key=lambda option: SequenceMatcher(None, name, option).ratio(), reverse=True)[:2]
    if near := get_close_matches(name, options, 1, 0.65):
        return near
    parts = {_last(option): option for option in options}
    return [parts[close] for close in get_close_matches(last, parts, 2, 0.75)]


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]


def nested_options(parser: Any) -> list[str]:
    """Options of classes, as flags name them: ``model.loss.beta``; those that are there by default come first."""
    from jsonargparse._typehints import get_all_subclass_paths

    if not hasattr(parser, "get_defaults"):
        return []
    names = [re.sub(r"\.init_args\b", "", key) for key in parser.get_defaults(skip_validation=True).keys()]  # noqa: SIM118
    for action in parser._actions:
        kind = None if action.dest.endswith(".help") else getattr(action, "_typehint", None)
        paths = [path for path in get_all_subclass_paths(kind) if path.startswith(OURS)] if kind is not None else []
        names += [f"{action.dest}.{option}" for path in paths for option in options_of(path)]
    return [name for name in dict.fromkeys(names) if not name.endswith(".class_path")]


def options_of(path: str) -> list[str]:
    """The options of a class or function by import path; none where it can't be looked into."""
    from jsonargparse._parameter_resolvers import get_signature_parameters
    from jsonargparse._util import import_object

    try:
        return [one.name for one in get_signature_parameters(import_object(path), None) if one.name != "params"]
    except Exception:  # a class of the user's own; this is for a hint
        return []


def _subclasses(parser: Any, keys: list[str], owners: list[str]) -> list[str]:
    """Names of the classes that an option takes, without abstract ones; of an option of a class by the class."""
    from jsonargparse._parameter_resolvers import get_signature_parameters
    from jsonargparse._subcommands import find_action
    from jsonargparse._util import import_object

    kind = getattr(find_action(parser, keys[0]), "_typehint", None) if keys else None
    if len(keys) > 1 and len(keys) - 1 <= len(owners):
        own = get_signature_parameters(import_object(owners[len(keys) - 2]), None)
        kind = next((one.annotation for one in own if one.name == keys[-1]), None)
    return class_names(kind)


def class_names(kind: Any) -> list[str]:
    """Names of the classes that a type of an option takes, without abstract ones and, where there are others, its own.

    >>> from rap_lightning.training.schedules import Schedule
    >>> class_names(Schedule | None)
    ['ConstantWithWarmup', 'CosineWithWarmup']
    >>> class_names(int)
    []
    """
    from jsonargparse._typehints import get_help_types

    bases = get_help_types(kind) or ()
    kinds = [one for _, one in subclasses_of(kind) if not inspect.isabstract(one)]
    kinds = [one for one in kinds if one not in bases] or kinds
    return sorted({one.__name__ for one in kinds}, key=str.lower)


def subclasses_of(kind: Any) -> Iterator[tuple[str, Any]]:
    """Import paths of the classes that a type of an option takes, with the classes.

    Those that exist only while a program runs are passed over: Lightning makes such of optimizers.
    """
    from jsonargparse._typehints import get_all_subclass_paths
    from jsonargparse._util import import_object

    for path in get_all_subclass_paths(kind):
        try:
            yield path, import_object(path)
        except (ImportError, AttributeError):
            continue


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


def where(key: str, args: Sequence[str]) -> str:
    """Where an option was given: the flag as it stands, or the line of a config. Later ones win, as in parsing."""
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


def _read(path: str) -> tuple[Any, str]:
    """What a YAML file holds, and what is wrong with it."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8")), ""
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        return None, (f"line {mark.line + 1}, column {mark.column + 1}: " if mark else "") + str(error.problem)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return None, str(error).splitlines()[0]


def content_of(path: str) -> dict[str, Any]:
    """A config's sections; nothing where it can't be read, of which the parser says what is wrong."""
    content, _ = _read(path)
    return content if isinstance(content, dict) else {}


def _line_of(path: str, bare: str) -> int:
    """The line that gives a key, from 1; 0 where the file doesn't."""
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return 0
    return next((line for name, line in _keys(root, "") if name == bare), 0)


def _keys(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = _bare(f"{prefix}.{name.value}".strip("."))
            if key != prefix:
                yield key, name.start_mark.line + 1
            yield from _keys(value, key)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys(value, prefix)
