"""How a command's help reads: required options first, options in groups, types and classes by their short names."""

from __future__ import annotations

import re
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse

from rap_lightning.cli.error_messages import ExplainsErrors
from rap_lightning.cli.parser_internals import actions_of, flags_of, groups_of

CONFIGS = """\
A config gives options by section (model, data, trainer, checkpoint, export, guard, watchdog). Every key is also a
flag: --data.batch_size 8. Later values override earlier ones: -c base.yaml -c overlay.yaml --trainer.max_steps 100

  --print_config           print all options with their values, as a config to start from
  --model.loss NAME        a class by its short name, or your own by its import path
  --model.loss.help NAME   the options of a class; also --data.goal.help, --model.optimizer.help, ...
"""
OPTION_HELP = {
    "--seed_everything": "seed for all random number generators (order, dropout, adapters, sampling); true draws one",
    "--ckpt_path": "checkpoint to resume from (fit) or to evaluate: a .ckpt file or folder; last: the newest undamaged "
    "one below --trainer.default_root_dir from a run with these options",
    "--weights_only": "load only tensors and plain values from checkpoints (the default); with false, loading a file "
    "can run code pickled in it",
}
"""Replaces Lightning's own help where it does not apply here."""
TRAINER_HELP = {
    "fit": """\
Train a policy on scored pairs, relabelled with goals, with a direct-alignment loss.

Example: rap-lightning fit --config configs/quickstart.yaml
         rap-lightning fit --model.policy.path HuggingFaceTB/SmolLM2-135M-Instruct --data.source my-pairs/

Input: a model (--model.policy.path) and scored data (--data.source). Output in runs/version_N: metrics.csv, config.yaml
(the run's config, to run again), run.json, data_report.json, goal.json, checkpoints/, and hf/, a Hugging Face folder.
Ctrl-C stops the run and saves a checkpoint; --ckpt_path last resumes it.
""",
    "validate": """\
Evaluate a model on the validation split: loss, rewards/accuracies, rewards/margins, ...

Example: rap-lightning validate --config runs/version_0/config.yaml --ckpt_path runs/version_0/checkpoints/last.ckpt

Input: a config of fit and a checkpoint of it (without --ckpt_path, the model before training). Output: metrics.csv in a
new folder runs/version_N.
""",
    "test": """\
Evaluate a model as validate does, with metrics logged as test/...

Example: rap-lightning test --config runs/version_0/config.yaml --ckpt_path runs/version_0/checkpoints/last.ckpt

Input: a config of fit and a checkpoint of it (without --ckpt_path, the model before training). Output: metrics.csv in a
new folder runs/version_N.
""",
    "predict": """\
Generate responses at a goal, by default the best, to the prompts of the validation split.

Example: rap-lightning predict --config runs/version_0/config.yaml --ckpt_path runs/version_0/checkpoints/last.ckpt
             --data.predict.goal 10 --data.predict.limit 20

Input: a config of fit and a checkpoint of it. Output: predictions.jsonl in a new folder runs/version_N.
rap-lightning generate does more: many goals, vLLM and endpoints, several processes, resuming.
""",
}
GROUPS: Mapping[str, Sequence[str]] = {
    "goals and pairs": (
        "goal", "goals", "first_goals", "sample_goals", "template", "goal_from", "scale", "relabel", "keep_original",
        "ties", "rewards", "selection",
    ),
    "reading": (
        "split", "format", "column", "columns", "limit", "bad_rows", "outside_scale", "num_proc", "held_out",
        "held_out_samples", "held_out_limit", "held_out_split",
    ),
    "sampling": (
        "engine", "samples", "greedy", "temperature", "top_p", "max_new_tokens", "guidance", "against", "plausibility",
        "max_prompt_length", "seed",
    ),
    "log-probabilities of the data's responses": ("base", "bins", "scale_points", "max_length", "token_budget"),
    "the model's files": ("revision", "dtype", "trust_remote_code", "max_shard_size", "base_model"),
    "upload": ("push_to_hub", "private", "license"),
}  # fmt: skip
"""An option's name means the same in every command, so it belongs to one group in all of them."""
FULL_LINE = 110
"""Characters of a docstring's line together with the first word of the next, above which the line was wrapped."""
GROUPED_ABOVE = 12
"""Number of options above which a command's are grouped."""


class ReadableHelp(RawDescriptionHelpFormatter):
    """Keep the paragraphs of a description at any width, and show types as one would type them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in _joined(super()._fill_text(text, width, indent).splitlines()):
            if len(line) <= width or "rap-lightning " in line:  # a command is copied whole
                lines.append(line)
            else:
                begin = re.match(r" *(?:\S.*?  +)?", line)
                lines += textwrap.wrap(line, width, subsequent_indent=" " * (begin.end() if begin else 0))
        return "\n".join(lines)

    def _expand_help(self, action: Any) -> str:
        return short_types(super()._expand_help(action))


class ReadableDefaultsHelp(ReadableHelp, jsonargparse.DefaultHelpFormatter):
    """The same for jsonargparse's parsers, with types and defaults."""


class FunctionParser(ExplainsErrors, jsonargparse.ArgumentParser):
    """jsonargparse's parser, for commands whose options are a function's parameters."""


class PlainParser(ExplainsErrors, ArgumentParser):
    """argparse's parser, for the other commands."""

    def __init__(self, command: str, description: str) -> None:
        prog = f"rap-lightning {command}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=ReadableHelp)


def _joined(lines: list[str]) -> list[str]:
    """Join the lines of a paragraph, so that it can be wrapped again; a line that was not wrapped stays as it is."""
    found: list[str] = []
    for line in lines:
        full = found and len(found[-1]) + len(line.partition(" ")[0]) >= FULL_LINE
        if full and line and line[0] != " " and "rap-lightning " not in found[-1] + line:
            found[-1] += f" {line}"
        else:
            found.append(line)
    return found


def short_types(text: str) -> str:
    """Show types, defaults and classes in a help text as one would type them.

    >>> short_types("x (type: <class 'a.Judge'>, default: {'class_path': 'a.b.RM'}, known subclasses: a.b.RM, a.c.LLM)")
    'x (type: Judge, default: RM, classes: RM, LLM)'
    >>> short_types("x (type: Optional[Literal['a', 'b']], default: null)")
    'x (a | b | null)'
    >>> short_types("x (type: Optional[list[Union[float, Literal['none']]]], default: null)")
    'x (list[float | none] | null)'
    >>> short_types("x (required, type: str)")
    'x (str)'
    """
    text = text.replace("Path to a configuration file.", "a YAML file with these options, or {name: value, ...}")
    body, opened, facts = text.rpartition(" (" if " (" in text else "(")
    if not re.match(r"(?:required, )?(?:type|default): ", facts):
        return text
    facts = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", facts)
    facts = re.sub(r"\{'class_path': '(?:\w+\.)*(\w+)'\}", r"\1", facts)
    facts = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), facts)
    facts = re.sub(r"Optional\[((?:[^][]|\[[^][]*(?:\[[^][]*\])?\])*)\]", r"\1 | null", facts)
    while (found := re.sub(r"Union\[([^][]*)\]", lambda found: found[1].replace(", ", " | "), facts)) != facts:
        facts = found
    facts = re.sub(r"Union\[(.*), null\]", lambda found: f"{found[1].replace(', ', ' | ')} | null", facts)
    facts = facts.removeprefix("required, ").replace(", default: null", "")
    head, known, names = facts.partition(", known subclasses: ")
    if known:
        short = dict.fromkeys(name.rpartition(".")[2] for name in names.rstrip(")").split(", "))
        facts = f"{head}, classes: {', '.join(short)})"
    if not known and "default" not in facts:
        facts = facts.removeprefix("type: ")
    return f"{body}{opened}{facts}"


def arrange_trainer(parser: Any, command: str) -> None:
    """Arrange the help of fit, validate, test or predict: what the command does first, Lightning's options last."""
    parser.usage = f"rap-lightning {command} --config CONFIG [--SECTION.OPTION VALUE ...]"
    parser.description = f"{TRAINER_HELP[command]}\n{CONFIGS}"
    groups, trainer, run = groups_of(parser), parser.groups["trainer"], groups_of(parser)[-1]
    for section, group in parser.groups.items():
        group.title = f"{section}: {group.title}"
    trainer.title = "trainer: Lightning's, for devices, precision, how long, how often, what is logged"
    run.title = "the checkpoint to resume from, or to evaluate"
    groups[:] = [*groups[:2], run, *(group for group in groups[2:] if group not in (run, trainer)), trainer]
    for flag, text in OPTION_HELP.items():
        flags_of(parser)[flag].help = text


def arrange(parser: Any) -> None:
    """Arrange the help of another command: required options in the usage and first, many options in groups.

    Args:
        parser: of jsonargparse, with its options; groups that it has already are kept.
    """
    rest = groups_of(parser)[1]  # argparse's "options"
    required = [action for action in actions_of(rest) if action.required]
    names = [action.dest for action in required]
    given = " ".join(f"--{name} {name.upper()}" for name in names if "." not in name)
    parser.usage = " ".join(filter(None, [parser.prog, given, "[options]"]))
    first = _group(parser, "required", [a for a in actions_of(rest) if a.dest.removesuffix(".help") in names])
    more = []
    if len(actions_of(rest)) > GROUPED_ABOVE:
        for title, keys in GROUPS.items():
            more += _group(parser, title, [a for a in actions_of(rest) if a.dest.partition(".")[0] in keys])
    actions_of(rest).sort(key=lambda action: action.dest in ("help", "config", "print_config"))
    others = [group for group in groups_of(parser)[1:] if group is not rest and group not in [*first, *more]]
    groups_of(parser)[:] = [*first, rest, *more, *others]


def _group(parser: Any, title: str, actions: list[Any]) -> list[Any]:
    """Move options into a new group; no group for no options."""
    if not actions:
        return []
    group, rest = parser.add_argument_group(title), groups_of(parser)[1]
    for action in actions:
        actions_of(rest).remove(action)
        actions_of(group).append(action)
    return [group]
