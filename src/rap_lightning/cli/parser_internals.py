"""Everything that the command line needs of argparse and jsonargparse without a public name: the only file that may.

argparse has no public list of a parser's options or groups. jsonargparse (pinned to 4.53) resolves classes and their
signatures in private modules, and raises plain TypeErrors and ValueErrors whose texts alone say which option is wrong;
its exceptions carry attributes only where Python's own do (ModuleNotFoundError, AttributeError). Those texts are in
`TEXTS`; tests/test_error_messages.py has a case of each, so that a new version is noticed.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jsonargparse import _typehints
from jsonargparse._completions_jsonschema import ParserJsonschema as ParserJsonschema
from jsonargparse._completions_jsonschema import new_object as new_object
from jsonargparse._namespace import NSKeyError
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._subcommands import find_action
from jsonargparse._util import get_import_path as get_import_path
from jsonargparse._util import import_object as import_object

from rap_lightning.errors import UserError

OURS = ("rap_lightning.", "torch.optim.")
"""Packages whose classes' options are suggested before the class is named."""
TEXTS = {
    "missing": r"the following arguments are required: (.+)",
    "no file": r"(?:.*: )?File does not exist: '(.+)'",
    "unrecognized": r"unrecognized arguments: (.*)",
    "unknown option": r"(?:(?:Group '(.+?)'|Subcommand '\w+') does not accept option|Option) '(.+?)'",
    "short class name": r"(?:--\S+: )?Expected a dot import path string: (\S+)$",
    "no value": r"argument (?:\S+/)?(\S+): expected (?:one|at least one) argument",
    "no class": r"Dict must include a class_path.*?(?:NestedArg\(key='(.+?)'|$)",
    "argparse value": r"argument (\S+): invalid (?:\w+ value|choice): '(.*?)'",
    "wrong value": r"(?s)Expected an? (.+)\. Got value: (.*)",
}
_KEY = r'Parser key "(.+?)":'
_OWNER = r"Problem with given class_path '(.+?)'|.*is not accepted\. Got value: Namespace\(class_path='(.+?)'"


class Fault(NamedTuple):
    """What jsonargparse says of a mistake.

    Attributes:
        keys: the options that it is nested in, the outermost first.
        owners: import paths of the classes that those are options of.
        texts: of each level, the outermost first.
        error: the innermost exception.
    """

    keys: list[str]
    owners: list[str]
    texts: list[str]
    error: BaseException | None

    def says(self, text: str) -> re.Match[str] | None:
        """Match the innermost text with one of `TEXTS`."""
        return re.match(TEXTS[text], self.texts[-1])

    @property
    def unknown_option(self) -> str:
        """The option that its group or class does not have."""
        if isinstance(self.error, NSKeyError) and (found := self.says("unknown option")):
            return ".".join(filter(None, found.groups()))
        nested = self.says("unrecognized") if self.keys else None
        return nested[1].lstrip("-").partition("=")[0] if nested else ""


def read_fault(message: str, chain: Sequence[BaseException]) -> Fault:
    """Read a parser's message and the exceptions beneath it, the outermost first."""
    keys: list[str] = []
    owners: list[str] = []
    texts: list[str] = []
    for text in (str(part).strip() for part in (message, *chain)):
        if not text or text in texts[-1:]:
            continue
        texts.append(text)
        if found := re.match(_KEY, text):
            keys.append(found[1])
        if found := re.match(_OWNER, text):
            owners.append(found[1] or found[2])
    return Fault(keys, owners, texts, chain[-1] if chain else None)


# -- parsers --------------------------------------------------------------------------------------------------------


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """A parser's options by flag."""
    return parser._option_string_actions


def actions_of(parser: Any) -> list[argparse.Action]:
    """The options and positionals of a parser, or of one of its groups: a list that may be changed."""
    actions: list[argparse.Action] = getattr(parser, "_group_actions", parser._actions)
    return actions


def groups_of(parser: argparse.ArgumentParser) -> list[Any]:
    """A parser's groups as its help shows them: a list that may be changed."""
    return parser._action_groups


def has_subcommands(parser: Any) -> bool:
    """Whether a parser is that of several commands."""
    return bool(getattr(parser, "_subcommands_action", None))


def type_of(action: Any) -> Any:
    """The type that jsonargparse checks an option's value with; None where there is none."""
    return getattr(action, "_typehint", None)


def option_type(parser: Any, fault: Fault) -> Any:
    """The type of the option that a fault is in; None where it isn't known."""
    keys, owners = fault.keys, fault.owners
    if not keys:
        return None
    if len(keys) == 1 or len(keys) - 1 > len(owners):
        return type_of(find_action(parser, keys[0]))
    kind = import_object(owners[len(keys) - 2])
    for name in keys[-1].split("."):  # the fields of a dataclass are options of the class that takes it
        own = get_signature_parameters(kind, None) if callable(kind) else []
        kind = next((one.annotation for one in own if one.name == name), None)
    return kind


def options_of(path: str) -> list[str]:
    """The options of a class or function by import path; empty where it can't be inspected."""
    try:
        return [one.name for one in get_signature_parameters(import_object(path), None) if one.name != "params"]
    except Exception:  # a class of the user's own; this is for a hint
        return []


def nested_options(parser: Any) -> list[str]:
    """Options of classes, as flags name them: ``model.loss.beta``; those of the default classes come first."""
    if not hasattr(parser, "get_defaults"):
        return []
    names = [re.sub(r"\.init_args\b", "", key) for key in parser.get_defaults(skip_validation=True).keys()]  # noqa: SIM118
    for action in actions_of(parser):
        kind = None if action.dest.endswith(".help") else type_of(action)
        paths = [path for path, _ in subclasses_of(kind) if path.startswith(OURS)] if kind is not None else []
        names += [f"{action.dest}.{option}" for path in paths for option in options_of(path)]
    return [name for name in dict.fromkeys(names) if not name.endswith(".class_path")]


# -- classes --------------------------------------------------------------------------------------------------------


def subclasses_of(kind: Any) -> Iterator[tuple[str, Any]]:
    """Import paths of the classes that an option's type accepts, with the classes.

    Those that exist only while a program runs are left out: Lightning makes such subclasses of optimizers.
    """
    for path in _typehints.get_all_subclass_paths(kind):
        try:
            yield path, import_object(path)
        except (ImportError, AttributeError):
            continue


def class_names(kind: Any) -> list[str]:
    """Names of the classes that an option's type accepts, without abstract ones and, where there are others, its own.

    >>> from rap_lightning.training.schedules import Schedule
    >>> class_names(Schedule | None)
    ['ConstantWithWarmup', 'CosineWithWarmup', 'TransformersSchedule']
    >>> class_names(int)
    []
    """
    bases = _typehints.get_help_types(kind) or ()
    kinds = [one for _, one in subclasses_of(kind) if not inspect.isabstract(one)]
    kinds = [one for one in kinds if one not in bases] or kinds
    return sorted({one.__name__ for one in kinds}, key=str.lower)


def start_new_classes_from_their_defaults(bases: tuple[type, ...]) -> None:
    """Make a class of these bases that an overlay names over another start from its own defaults.

    jsonargparse keeps those arguments of the replaced class that the new one accepts too: SimPO would silently run with
    DPO's beta. It has no option for this, so its function is wrapped; a test checks the effect.
    """
    original = _typehints.discard_init_args_on_class_path_change
    if getattr(original, "drops_all", False):
        return

    def discard(parser_or_action: Any, prev_val: Any, value: Any) -> None:
        if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
            loaded = import_object(value["class_path"])
            if isinstance(loaded, type) and issubclass(loaded, bases):
                for key in list(vars(_typehints.subclass_spec_as_namespace(prev_val).init_args)):
                    prev_val["init_args"].pop(key)
                return
        original(parser_or_action, prev_val, value)

    discard.drops_all = True  # type: ignore[attr-defined]
    _typehints.discard_init_args_on_class_path_change = discard


def prefer_own_short_names() -> None:
    """Make ``AdamW`` mean torch's (and ``DPO`` ours) where another imported package has a class of that name too.

    peft imports bitsandbytes where that is installed, whose optimizers have the names of torch's.
    """
    original = _typehints.resolve_class_path_by_name
    if getattr(original, "prefers_own", False):
        return

    def resolve(kind: Any, name: str) -> str:
        try:
            found: str = original(kind, name)
        except ValueError:
            paths = [path for path, _ in subclasses_of(kind) if path.startswith(OURS)]
            own = [path for path in paths if path.rpartition(".")[2] == name]
            if len(own) != 1:
                raise
            found = own[0]
        return found

    resolve.prefers_own = True  # type: ignore[attr-defined]
    _typehints.resolve_class_path_by_name = resolve


def keep_user_errors_in_unions() -> None:
    """Make an error of ours, raised while a value is tried as one of several types, the error of the whole."""
    original = _typehints.raise_union_unexpected_value

    def raise_first(subtypes: Any, value: Any, errors: list[Exception]) -> None:
        for error in errors:
            if isinstance(error, UserError):
                raise error
        original(subtypes, value, errors)

    _typehints.raise_union_unexpected_value = raise_first


def take_negative_numbers(parser: argparse.ArgumentParser) -> None:
    """Make ``-2e1`` and ``-inf`` values, as ``-20`` is; argparse does so from Python 3.14 on."""
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf$)")


def expand_home(config: Any) -> Any:
    """Return a parsed config with ``~/`` expanded at the beginning of every text, in place where it is a namespace."""
    if isinstance(config, str):
        return os.path.expanduser(config) if config.startswith("~/") else config
    if isinstance(config, list):
        return [expand_home(one) for one in config]
    if isinstance(config, dict):
        return {key: expand_home(one) for key, one in config.items()}
    if isinstance(config, argparse.Namespace):
        for key, one in list(vars(config).items()):
            setattr(config, key, expand_home(one))
    return config
