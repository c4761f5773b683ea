"""What the text commands share: options of reading, and how a function becomes a command line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import cleandoc
from typing import Any, Literal

from jsonargparse import ActionConfigFile

from rap_lightning.cli.error_messages import check_nulls
from rap_lightning.cli.help_format import FunctionParser, ReadableDefaultsHelp, arrange
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.chat_template import restore_own_template
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.read_pairs import fit_scale
from rap_lightning.preferences.relabelling import Mode, Relabelling
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import Selection
from rap_lightning.preferences.sources import Source, having, refuse_no_model

command_line: list[str] = []
"""The command that runs, with its arguments, so that it can start others like itself."""


def make_rules(
    goal: GoalTemplate | None,
    relabel: Mode | None,
    keep_original: bool,
    ties: Literal["drop", "chosen", "error"],
    selection: Selection | None,
    filters: Filters,
    outside_scale: Literal["error", "drop", "clip"],
    bad_rows: Literal["drop", "error"],
    format: str,
    columns: dict[str, str] | None,
    seed: int,
    tool_turns: bool,
) -> Rules:
    """Rules as the data module makes them of the same options."""
    relabelling = Relabelling.of(relabel, goal, keep_original, seed)
    return Rules(
        goal, relabelling, ties, selection, filters, outside_scale, bad_rows, format, columns, tool_turns=tool_turns
    )


def fit_on_training_split(
    rules: Rules, sources: list[Source], splits: list[str], num_proc: int | None,
    rewards: Mapping[str, RewardTable] | None = None,
) -> bool:  # fmt: skip
    """Take a scale's open numbers from the training split (or the only one); whether there were any."""
    if rules.goal is None or not rules.goal.scale.needs_fit:
        return False  # a source without a training split is then no fault
    split = "train" if "train" in splits or len(splits) > 1 else splits[0]
    own = replace(rules, rewards=(rewards or {}).get(split))
    return fit_scale(own, having(sources, split), split, num_proc=num_proc)


def load_tokenizer(path: str) -> Any:
    """A tokenizer by folder or Hub id.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    refuse_no_model("--tokenizer", path)
    try:
        with contextlib.redirect_stderr(None):
            return restore_own_template(AutoTokenizer.from_pretrained(path))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--tokenizer {path}: no tokenizer can be loaded from it: {reason}") from error


def run(function: Callable[..., Any], args: list[str], name: str, flags: tuple[str, ...] = ()) -> Any:
    """Parse a command line for a function and call it.

    Args:
        function: its parameters are the options, its docstring is the help.
        args: the command line.
        name: of the command.
        flags: options without a value.
    """
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


def _flag_help(function: Callable[..., Any], flag: str) -> str:
    lines = (function.__doc__ or "").splitlines()
    found = next((line.strip() for line in lines if line.strip().startswith(f"{flag}:")), f"{flag}:")
    return found.split(":", 1)[1].strip()
