"""``rap-lightning completion``: a shell script that completes commands, options and their values."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from rap_lightning.cli.error_messages import parts_of
from rap_lightning.cli.help_format import PlainParser
from rap_lightning.cli.parser_internals import actions_of, class_names, flags_of, nested_options, type_of
from rap_lightning.commands import COMMANDS, TRAINER_COMMANDS
from rap_lightning.errors import ConfigError
from rap_lightning.planning.gpus import GPUS

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = """Print a shell script that completes commands, options and their values.

Example: mkdir -p ~/.local/share/bash-completion/completions
         rap-lightning completion bash > ~/.local/share/bash-completion/completions/rap-lightning

zsh:     rap-lightning completion zsh > "${fpath[1]}/_rap-lightning"
fish:    rap-lightning completion fish > ~/.config/fish/completions/rap-lightning.fish

It takes effect in new shells. The script contains all options (of fit's sections and of classes too), so that nothing
is imported while you type; write it again after an upgrade. It needs shtab: pip install 'rap-lightning[completion]'"""


def run(args: list[str]) -> int:
    """Parse and print."""
    shell = own_parser().parse_args(args).shell
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            "completion needs shtab, which isn't installed. Install it: pip install 'rap-lightning[completion]'"
        ) from error
    print(shtab.complete(parser_of_all_commands(shtab.FILE), shell))
    return 0


def own_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = PlainParser("completion", DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def parser_of_all_commands(file: Any) -> argparse.ArgumentParser:
    """One parser of all commands, for shtab: option strings, help, and the choices of their values.

    Args:
        file: shtab's marker of an option that takes a file name.
    """
    whole = argparse.ArgumentParser(prog="rap-lightning", add_help=False)
    whole.add_argument("-h", "--help", action="help", help="list the options")
    whole.add_argument("-V", "--version", action="version", help="print the version")
    commands = whole.add_subparsers()
    for name in COMMANDS:
        parsers = list(parsers_of(name))
        summary = (parsers[0].description or "").strip().split("\n\n")[0].partition(". ")[0]
        made = commands.add_parser(name, help=_one_line(" ".join(summary.split())), add_help=False)
        for parser in parsers:
            _copy(parser, made, file)
    return whole


def parsers_of(name: str) -> Iterator[argparse.ArgumentParser]:
    """The parser of a command; two for evaluate, and for plan, which takes the options of fit too."""
    from jsonargparse import capture_parser

    from rap_lightning.cli.trainer_cli import fit_parser
    from rap_lightning.commands.options import runner_of

    if name in TRAINER_COMMANDS:
        yield fit_parser(name)
        return
    command = import_module(f"rap_lightning.commands.{name}")
    yield command.own_parser() if hasattr(command, "own_parser") else capture_parser(runner_of(name), [])
    if name == "plan":
        yield fit_parser()
    if name == "evaluate":
        yield capture_parser(command.run, ["--suite", "LMEval"])


def _copy(parser: argparse.ArgumentParser, made: argparse.ArgumentParser, file: Any) -> None:
    for action in actions_of(parser):
        strings = [one for one in action.option_strings if one not in flags_of(made)]
        if action.option_strings and not strings:
            continue
        names = strings or [action.dest]
        if action.nargs == 0:
            made.add_argument(*names, action="store_true", help=_one_line(action.help))
            continue
        positional: dict[str, Any] = {} if strings else {"nargs": action.nargs}
        choices = _choices(action)
        added = made.add_argument(*names, help=_one_line(action.help), choices=choices or None, **positional)
        if not choices and _names_files(action):
            added.complete = file  # type: ignore[attr-defined]
    for name in nested_options(parser):
        if f"--{name}" not in flags_of(made):
            made.add_argument(f"--{name}", help=f"an option of the class that --{name.rpartition('.')[0]} names")


def _choices(action: argparse.Action) -> list[str]:
    if action.choices:
        return [str(choice) for choice in action.choices]
    if "--gpu" in action.option_strings:
        return list(GPUS)  # plan checks them itself, to explain what else can be given
    kind = type_of(action)
    if kind is None:
        return []
    found = class_names(kind)
    for part in parts_of(kind):
        if part is bool:
            found += ["true", "false"]
        elif typing.get_origin(part) is typing.Literal:
            found += [str(one).lower() if isinstance(one, bool) else str(one) for one in typing.get_args(part)]
    return list(dict.fromkeys(found))


def _names_files(action: argparse.Action) -> bool:
    kind = type_of(action)
    if kind is None:
        return action.type in (None, str)  # -c, --config, the runs of report
    return any(part is str or getattr(part, "__name__", "") == "Path" for part in parts_of(kind))


def _one_line(text: str | None) -> str:
    """Help as shtab takes it: one line, with argparse's % escaped."""
    return " ".join((text or "").replace("%", "%%").split())
