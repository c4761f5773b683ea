"""Explain a mistake on a command line or in a config in at most four lines: where it is, what was expected, what to do.

argparse and jsonargparse would print their whole usage (fit's is 130 lines), and a text for each level that an option
is nested in. `ExplainsErrors` is mixed in before a parser; `explain` makes the message, by trying one function for each
kind of mistake.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher, get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings

from rap_lightning.cli.config_files import configs_named, load_unique, read_yaml, where
from rap_lightning.cli.parser_internals import (
    Fault,
    actions_of,
    class_names,
    expand_home,
    flags_of,
    has_subcommands,
    keep_user_errors_in_unions,
    nested_options,
    option_type,
    options_of,
    read_fault,
    take_negative_numbers,
)
from rap_lightning.errors import ConfigError, UserError, join_some

if TYPE_CHECKING:
    _Parser = argparse.ArgumentParser
else:
    _Parser = object

keep_user_errors_in_unions()
set_loader("yaml", partial(load_unique, load=get_loader("yaml")), exceptions=(yaml.YAMLError,))

LIBRARIES = ("rap_lightning", "lightning", "jsonargparse", "argparse", "yaml", "torch", "transformers", "inspect")
MOST_LISTED = 12
"""Names that are listed beside the nearest one."""
TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list ([1, 2])",
    type(None): "null",
}


class ExplainsErrors(_Parser):
    """Mixed in before a parser: raises ConfigError where argparse would print its usage and exit."""

    other_options: Sequence[str] = ()
    """Options of the command that another parser takes before this one parses the rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_negative_numbers(self)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse a command line; ``~/`` is expanded, which a shell does at the beginning of an argument only."""
        return expand_home(super().parse_args(*args, **kwargs))

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Called by the parser for every mistake.

        Raises:
            ConfigError: always, except in the parser of a nested class, whose error is explained by the outer one.
        """
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)  # type: ignore[call-arg]  # jsonargparse's takes both
        raise ConfigError(explain(self, message, ex)) from ex


def check_nulls(parser: Any, config: Any) -> None:
    """Raise ConfigError for an option in a parsed config that is null and can't be.

    jsonargparse's parser accepts null in configs for every type: it stands for a value that was not given. With a
    sentinel for those, its validation checks null as every other value. (Parsing with the sentinel is not possible: in
    4.53 some nulls would then be written to config.yaml as the text None.)
    """
    set_parsing_settings(unset_sentinel=True)
    try:
        parser.validate(config, skip_unset=False)
    except (TypeError, ValueError, KeyError, argparse.ArgumentError) as error:
        parser.error(str(error), error)
    finally:
        set_parsing_settings(unset_sentinel=False)


def explain(parser: Any, message: str, error: BaseException | None = None) -> str:
    """The explanation of an error of argparse or jsonargparse."""
    parser = getattr(error, "subcommand_parser", None) or parser
    chain = list(causes(error))
    if ours := [one for one in chain if isinstance(one, UserError)]:
        return str(ours[-1])
    fault = read_fault(message, chain)
    args: Sequence[str] = getattr(parser, "args", None) or ()
    for explanation in (_missing, _config, _unknown_flags, _unknown_key, _no_class, _no_value, _wrong_value):
        if text := explanation(parser, fault, args):
            return text
    lines = [line.strip() for line in fault.texts[-1].splitlines() if line.strip()]
    at = f"{where('.'.join(fault.keys), args)}: " if fault.keys else ""
    return at + "\n  ".join(lines[:3])


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes; the context of one that a library raised counts as a cause.

    An error that a user's own code had handled before another one was raised is no cause.
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


# -- one function for each kind of mistake ------------------------------------------------------------------------


def _missing(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    found = fault.says("missing")
    if not found:
        return ""
    names = [".".join([*fault.keys, one.removeprefix(f"{_subcommand(parser)}.")]) for one in found[1].split(", ")]
    flags = ", ".join(name if name.startswith("-") or name.isupper() else f"--{name}" for name in names)
    both = "it as an option" if len(names) == 1 else "them as options"
    config = f" Give {both}, or in a config (--config FILE)." if "--config" in flags_of(parser) else ""
    return f"missing: {flags}.{config}\n  {_command(parser)} --help shows an example."


def _config(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    if missing := fault.says("no file"):
        return f"--{'.'.join(fault.keys)}: no such file: {missing[1]}. Expected the path of a YAML file."
    if not any(text.startswith(("Problems parsing config", "Unexpected config")) for text in fault.texts):
        return ""
    for path in configs_named(args):
        content, problem = read_yaml(path)
        if problem:
            return f"--config {path}: it can't be read as YAML: {problem}"
        if not isinstance(content, dict):
            return f"--config {path}: expected keys with values, found {_short(content)}."
    return ""


def _unknown_flags(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    found = fault.says("unrecognized")
    if not found or fault.keys:
        return ""
    words = found[1].split()
    flags = [word.partition("=")[0] for word in words if word.startswith("-") and not word[1:2].isdigit()]
    if not flags:
        hint = f" Did you mean --config {words[0]}?" if words[0].endswith((".yaml", ".yml")) else ""
        return f"{found[1]}: expected an option (--NAME VALUE).{hint} {_help_hint(parser)}"
    known = [name for name in flags_of(parser) if name.startswith("--")] + list(parser.other_options)
    known += [f"--{name}" for name in nested_options(parser)]
    return "\n  ".join([*(f"{flag}: no such option.{_meant(flag, known)}" for flag in flags), _help_hint(parser)])


def _unknown_key(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    name = fault.unknown_option
    if not name:
        return ""
    key = ".".join([*fault.keys, name])
    at = where(key, args)
    if not fault.owners:
        known = [*flags_of(parser), *(f"--{name}" for name in nested_options(parser))]
        near = _meant(f"--{key}", known)
        return f"{at}: no such option.{near if at.startswith('--') else near.replace('--', '')}\n  {_help_hint(parser)}"
    kind, first = fault.owners[-1].rpartition(".")[2], name.partition(".")[0]
    own = options_of(fault.owners[-1])
    has = f"It has {join_some(own, MOST_LISTED)}." if own else "It has none."
    return f"{at}: {kind} has no option {first}.{_meant(first, own)} {has}\n  {_class_help(parser, fault)}"


def _class_help(parser: Any, fault: Fault) -> str:
    """Where the options of a class are described; those of a nested class are described with it."""
    flag = f"--{fault.keys[0]}.help"
    action = flags_of(parser).get(flag)
    if action is None:
        return _help_hint(parser)
    kind = "" if action.nargs == 0 else f" {fault.owners[0].rpartition('.')[2]}"
    return f"{_command(parser)} {flag}{kind} says what they do."


def _no_class(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    """A class path that can't be imported."""
    short, error = fault.says("short class name"), fault.error
    module = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    holder = error.obj.__name__ if isinstance(error, AttributeError) and isinstance(error.obj, types.ModuleType) else ""
    if not (short or module or holder):
        return ""
    path, keys = short[1] if short else (fault.owners or [module])[-1], fault.keys
    if module and len(fault.owners) < len(keys):  # a function's import path: no text has more of it
        path = module
    if fault.texts[0].startswith("--"):  # of --model.loss.help NAME
        keys = [fault.texts[0][2:].partition(".help:")[0]]
        at = f"--{keys[0]}.help {path}"
    else:
        at = where(".".join(keys), args)
        at = f"{at}: {path}" if " line " in at else f"{at} {path}"
    if module and not f"{path}.".startswith(f"{module}."):
        return f"{at}: it can't be imported: {error}"  # what its own module imports isn't there
    known = class_names(option_type(parser, fault._replace(keys=keys)))
    near = _nearest_class(path, module, holder, known)
    what = f"no module {module}." if module else "no such class."
    hint = f" Did you mean {near}?" if near else ""
    few = known and (not near or len(known) <= MOST_LISTED)
    there = f"There are {', '.join(known)};" if few else f"{_help_hint(parser)[:-1]};"
    return f"{at}: {what}{hint}\n  {there} or give the import path of one of your own."


def _nearest_class(path: str, module: str, holder: str, known: list[str]) -> str:
    """The class that an import path was meant to be, or nothing.

    Args:
        path: as given.
        module: a module of it that doesn't exist.
        holder: a module that has no such class.
        known: names of the classes that the option takes.
    """
    name = path.rpartition(".")[2]
    if holder and not holder.startswith("rap_lightning"):
        own = get_close_matches(name, vars(import_module(holder)), 1, 0.5)
        return f"{holder}.{own[0]}" if own else ""
    if module and (files := get_close_matches(module, [file.stem for file in Path().glob("*.py")], 1, 0.8)):
        return f"{files[0]}.{name}"
    return "".join(get_close_matches(name, known, 1, 0.5))


def _no_value(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    if found := fault.says("no value"):
        last = [arg for arg in args if arg.startswith(found[1])][-1:] or [found[1]]
        return f"{last[0]}: expected a value after it; found none."
    if found := fault.says("no class"):
        at = where(".".join(filter(None, [*fault.keys, found[1]])), args)
        known = ", ".join(class_names(option_type(parser, fault)))
        option = ".".join(fault.keys)
        return f"{at}: its class is not named. Name it before its options: --{option} CLASS. There are {known}."
    return ""


def _wrong_value(parser: Any, fault: Fault, args: Sequence[str]) -> str:
    """A value of another type."""
    if found := fault.says("argparse value"):
        at, value = found[1], found[2]
        action = next(one for one in actions_of(parser) if at in (*one.option_strings, one.dest))
        kind: Any = None if action.choices else action.type
        choices = list(action.choices or [])
    elif (found := fault.says("wrong value")) and fault.keys:
        at, value = where(".".join(fault.keys), args), found[2]
        kind, choices = option_type(parser, fault), []
    else:
        return ""
    words: list[str] = []
    for part in parts_of(kind):
        if typing.get_origin(part) is typing.Literal:
            choices += map(str, typing.get_args(part))
        elif part is not None:
            words.append(TYPES.get(typing.get_origin(part) or part) or str(getattr(part, "__name__", part)))
    if choices:
        words.insert(0, f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0])
    near = get_close_matches(value, choices, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if value == "None":
        value, hint = "null", " Leave it out for its default."
    else:
        value = _short(value)
    return f"{at}: expected {' or '.join(dict.fromkeys(words))}; found {value}.{hint}"


def parts_of(kind: Any) -> Iterator[Any]:
    """The types of a union, and of a list of choices its elements'; of any other type itself."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) or (origin is list and typing.get_origin(inner[0]) is typing.Literal):
        for part in inner:
            yield from parts_of(part)
    else:
        yield kind


# -- words --------------------------------------------------------------------------------------------------------


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _help_hint(parser: Any) -> str:
    return f"{_command(parser)} --help lists all."


def _subcommand(parser: Any) -> str:
    """The command that runs, where a parser is that of several."""
    return str(parser.args[0]) if has_subcommands(parser) and parser.args else ""


def _command(parser: Any) -> str:
    return f"{parser.prog.replace(' [options]', '')} {_subcommand(parser)}".strip()


def _meant(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The option that was probably meant, or two; empty where none is similar.

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
    if same := [option for option in options if _last(option) == last]:  # the name is right, its section is not
        return sorted(same, key=lambda option: SequenceMatcher(None, name, option).ratio(), reverse=True)[:2]
    if near := get_close_matches(name, options, 1, 0.65):
        return near
    parts = {_last(option): option for option in options}
    return [parts[close] for close in get_close_matches(last, parts, 2, 0.75)]


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]
