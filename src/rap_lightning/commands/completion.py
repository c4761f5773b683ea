"""``rap-lightning completion``: a script with which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from rap_lightning.cli.error_messages import class_names, nested_options
from rap_lightning.cli.help_format import PlainParser
from rap_lightning.commands import COMMANDS, TRAINER_COMMANDS
from rap_lightning.errors import ConfigError
from rap_lightning.planning.gpus import GPUS

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = """Print a script with which your shell completes commands, options and their values.

Example: mkdir -p ~/.local/share/bash-completion/completions
         rap-lightning completion bash > ~/.local/share/bash-completion/completions/rap-lightning

zsh:     rap-lightning completion zsh > "${fpath[1]}/_rap-lightning"
fish:    rap-lightning completion fish > ~/.config/fish/completions/rap-lightning.fish

New shells then complete. The script holds all options (fit's sections and the classes' own too), so that nothing is
imported while you type; make it again after an upgrade. shtab writes it: pip install 'rap-lightning[completion]'"""


def run(args: list[str]) -> int:
    """Parse and print."""
    shell = own_parser().parse_args(args).shell
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            "completion is written by shtab, which isn't installed here. Install it: "
            "pip install 'rap-lightning[completion]'"
        ) from error
    print(shtab.complete(whole_parser(shtab.FILE), shell))
    return 0


def own_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = PlainParser("completion", DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS, help="that completes")
    return parser


def whole_parser(file: Any) -> argparse.ArgumentParser:
    """One parser of all commands, as shtab reads it: option strings, help, and what may follow them.

    Args:
        file: what says that file names follow an option.
    """
    whole = argparse.ArgumentParser(prog="rap-lightning", add_help=False)
    whole.add_argument("-h", "--help", action="help", help="what there is")
    whole.add_argument("-V", "--version", action="version", help="the version")
    commands = whole.add_subparsers()
    for name in COMMANDS:
        parsers = list(_trainer(name) if name in TRAINER_COMMANDS else _parsers(name))
        summary = (parsers[0].description or "").strip().split("\n\n")[0].partition(". ")[0]
        made = commands.add_parser(name, help=_plain(" ".join(summary.split())), add_help=False)
        for parser in parsers:
            _copy(parser, made, file)
    return whole


def _trainer(name: str) -> Iterator[argparse.ArgumentParser]:
    from rap_lightning.cli.trainer_cli import fit_parser

    yield fit_parser(name)


def _parsers(name: str) -> Iterator[argparse.ArgumentParser]:
    """The parser of a command; two where one command is two, or takes the options of fit too."""
    from jsonargparse import capture_parser

    command = import_module(f"rap_lightning.commands.{name}")
    if hasattr(command, "own_parser"):
        yield command.own_parser()
    else:
        yield capture_parser(command.run, [])
    if name == "plan":
        yield from _trainer("fit")
    if name == "evaluate":
        yield capture_parser(command.run, ["--suite", "LMEval"])


def _copy(parser: argparse.ArgumentParser, made: argparse.ArgumentParser, file: Any) -> None:
    for action in parser._actions:
        strings = [one for one in action.option_strings if one not in made._option_string_actions]
        if action.option_strings and not strings:
            continue
        names = strings or [action.dest]
        if action.nargs == 0:
            made.add_argument(*names, action="store_true", help=_plain(action.help))
            continue
        positional: dict[str, Any] = {} if strings else {"nargs": action.nargs}
        choices = _choices(action)
        added = made.add_argument(*names, help=_plain(action.help), choices=choices or None, **positional)
        if not choices and _names_files(action):
            added.complete = file  # type: ignore[attr-defined]
    for name in nested_options(parser):
        if f"--{name}" not in made._option_string_actions:
            made.add_argument(f"--{name}", help=f"an option of the class that --{name.rpartition('.')[0]} names")


def _choices(action: argparse.Action) -> list[str]:
    if action.choices:
        return [str(choice) for choice in action.choices]
    if "--gpu" in action.option_strings:
        return list(GPUS)  # which plan checks by itself, to say what else can be given
    kind = getattr(action, "_typehint", None)
    if kind is None:
        return []
    found = class_names(kind)
    for part in _parts(kind):
        if part is bool:
            found += ["true", "false"]
        elif typing.get_origin(part) is typing.Literal:
            found += [str(one).lower() if isinstance(one, bool) else str(one) for one in typing.get_args(part)]
    return list(dict.fromkeys(found))


def _names_files(action: argparse.Action) -> bool:
    kind = getattr(action, "_typehint", None)
    if kind is None:
        return action.type in (None, str)  # -c, --config, the runs of report
    return any(part is str or getattr(part, "__name__", "") == "Path" for part in _parts(kind))


def _parts(kind: Any) -> Iterator[Any]:
    """The types of a union; of any other type itself."""
    inner = typing.get_args(kind) if typing.get_origin(kind) in UNIONS else ()
    for part in inner:
        yield from _parts(part)
    if not inner:
        yield kind


UNIONS = (typing.Union, type(int | str))


def _plain(text: str | None) -> str:
    """Help as shtab takes it: one line, without argparse's formats."""
    return " ".join((text or "").replace("%", "%%").split())
