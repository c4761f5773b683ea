"""How a typed function becomes a command line, and loading the tokenizer that a command names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import import_module
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile

from rap_lightning.cli.error_messages import check_nulls
from rap_lightning.cli.help_format import FunctionParser, ReadableDefaultsHelp, arrange
from rap_lightning.errors import ConfigError, first_line
from rap_lightning.preferences.chat_template import read_tokenizer, restore_own_template
from rap_lightning.preferences.sources import refuse_no_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

command_line: list[str] = []
"""The running command with its arguments, so that it can start other processes of the same command."""


def load_tokenizer(path: str, option: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or Hub id; ``option`` names it, for messages."""
    refuse_no_model(option, path)
    try:
        with contextlib.redirect_stderr(None):
            return restore_own_template(read_tokenizer(path))
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise ConfigError(f"{option} {path}: no tokenizer can be loaded from it: {reason}") from error


def run(function: Callable[..., Any], args: list[str], name: str, flags: tuple[str, ...] = ()) -> Any:
    """Parse a command line for a function and call it."""
    command_line[:] = [name, *args]
    summary = cleandoc(function.__doc__ or "").split("Args:")[0].strip()
    prog = f"rap-lightning {name}"
    parser = FunctionParser(prog=prog, description=summary, allow_abbrev=False, formatter_class=ReadableDefaultsHelp)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with these options")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=_flag_help(function, flag))
    parser.add_function_arguments(function, as_group=False, skip=set(flags), sub_configs=True, fail_untyped=True)
    arrange(parser)
    config = parser.parse_args(args)
    check_nulls(parser, config)
    options = parser.instantiate(config).as_dict()
    options.pop("config", None)
    return function(**options)


def runner_of(name: str) -> Callable[[list[str]], int]:
    """Return what runs a command: ``run`` of its module, or else its function with the options of the command line."""
    module = import_module(f"rap_lightning.commands.{name}")
    found: Callable[[list[str]], int] = getattr(module, "run", None) or (
        lambda args: run(getattr(module, name), args, name)
    )
    return found


def _flag_help(function: Callable[..., Any], flag: str) -> str:
    lines = (function.__doc__ or "").splitlines()
    found = next((line.strip() for line in lines if line.strip().startswith(f"{flag}:")), f"{flag}:")
    return found.split(":", 1)[1].strip()
