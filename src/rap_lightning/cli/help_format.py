"""How a command's help reads: what it needs first, options in groups, types and classes by their short names."""

from __future__ import annotations

import re
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any

from rap_lightning.cli.error_messages import Explains

NEEDED = "needed"
CONFIGS = """\
A config gives options by section (model, data, trainer, checkpoint, export, guard, watchdog). Every key is a flag
too, as in --data.batch_size 8. What comes later wins: -c base.yaml -c overlay.yaml --trainer.max_steps 100

  --print_config           all options with their values, as a config to begin with
  --model.loss NAME        a class by its short name, or by import path where it is yours
  --model.loss.help NAME   the options of a class; so too --data.goal.help, --model.optimizer.help, ...
"""
OURS = {
    "--seed_everything": "of whatever is random: order, dropout, new adapters, sampling; true draws one",
    "--ckpt_path": "a checkpoint to go on from (fit), or to measure: a .ckpt file or folder. last is the newest whole "
    "one below --trainer.default_root_dir that a run with these options wrote",
    "--weights_only": "read only tensors and plain values of checkpoints, which is the default; with false, a file can "
    "run what it has pickled",
}
"""Where Lightning's own help says what isn't so here."""
TRAINER_HELP = {
    "fit": """\
Train a policy on scored pairs: each is relabelled with its goals, and a direct-alignment loss is applied.

Example: rap-lightning fit --config configs/quickstart.yaml
         rap-lightning fit --model.policy.path HuggingFaceTB/SmolLM2-135M-Instruct --data.source my-pairs/

It reads a model (--model.policy.path) and scored data (--data.source), and writes runs/version_N: metrics.csv,
config.yaml (runs again as it is), run.json, data_report.json, goal.json, checkpoints/, and hf/, a Hugging Face folder.
Ctrl-C stops it and saves; --ckpt_path last goes on.
""",
    "validate": """\
Measure a model on the validation split, without training: loss, rewards/accuracies, rewards/margins, ...

Example: rap-lightning validate --config runs/version_0/config.yaml --ckpt_path runs/version_0/checkpoints/last.ckpt

It reads a config of fit and a checkpoint of it (without --ckpt_path, the model as it was before training), and writes
metrics.csv in a folder runs/version_N of its own.
""",
    "test": """\
Measure a model as validate does, logged as test/...

Example: rap-lightning test --config runs/version_0/config.yaml --ckpt_path runs/version_0/checkpoints/last.ckpt

It reads a config of fit and a checkpoint of it (without --ckpt_path, the model as it was before training), and writes
metrics.csv in a folder runs/version_N of its own.
""",
    "predict": """\
Write a model's responses at a goal, the best by default, to the prompts of the validation split.

Example: rap-lightning predict --config runs/version_0/config.yaml --ckpt_path runs/version_0/checkpoints/last.ckpt
             --data.predict.goal 10 --data.predict.limit 20

It reads a config of fit and a checkpoint of it, and writes predictions.jsonl in a folder runs/version_N of its own.
rap-lightning generate does more: many goals, vLLM and endpoints, several processes, going on where it was stopped.
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
"""An option's name means the same in every command, so that it has one place in all of them."""
FULL = 110
"""Characters that a line of a docstring has, with the word that didn't fit."""
FROM = 12
"""Options from which on a command's are grouped."""


class Filled(RawDescriptionHelpFormatter):
    """Keeps the paragraphs of a description at any width, and leaves the inside of Python out of types.

    jsonargparse's own formatter comes after it; it isn't imported here, for some commands do without jsonargparse.
    """

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
        return plain(super()._expand_help(action))


class PlainParser(Explains, ArgumentParser):
    """argparse's, for the commands whose options aren't those of a function."""

    def __init__(self, command: str, description: str) -> None:
        prog = f"rap-lightning {command}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=Filled)


def _joined(lines: list[str]) -> list[str]:
    """Lines of one sentence as one, so that it can be broken anew; a line that is not full ends where it does."""
    found: list[str] = []
    for line in lines:
        full = found and len(found[-1]) + len(line.partition(" ")[0]) >= FULL
        if full and line and line[0] != " " and "rap-lightning " not in found[-1] + line:
            found[-1] += f" {line}"
        else:
            found.append(line)
    return found


def plain(text: str) -> str:
    """Types, defaults and classes as one would type them.

    >>> plain("x (type: <class 'a.Judge'>, default: {'class_path': 'a.b.RM'}, known subclasses: a.b.RM, a.c.LLM)")
    'x (type: Judge, default: RM, classes: RM, LLM)'
    >>> plain("x (type: Optional[Literal['a', 'b']], default: null)")
    'x (a | b | null)'
    >>> plain("x (type: Optional[list[Union[float, Literal['none']]]], default: null)")
    'x (list[float | none] | null)'
    >>> plain("x (required, type: str)")
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
    """Of fit, validate, test or predict: what the command does first, Lightning's own options last."""
    parser.usage = f"rap-lightning {command} --config CONFIG [--SECTION.OPTION VALUE ...]"
    parser.description = f"{TRAINER_HELP[command]}\n{CONFIGS}"
    groups, trainer, run = parser._action_groups, parser.groups["trainer"], parser._action_groups[-1]
    for section, group in parser.groups.items():
        group.title = f"{section}: {group.title}"
    trainer.title = "trainer: Lightning's, for devices, precision, how long, how often, what is logged"
    run.title = "the checkpoint to go on from, or to measure"
    groups[:] = [*groups[:2], run, *(group for group in groups[2:] if group not in (run, trainer)), trainer]
    for flag, text in OURS.items():
        parser._option_string_actions[flag].help = text


def arrange(parser: Any) -> None:
    """Say what a command needs in its usage, and put that first; group the rest where there is much of it.

    Args:
        parser: of jsonargparse, with its options; groups that it has already stay as they are.
    """
    rest = parser._action_groups[1]  # argparse's "options"
    needed = [action for action in rest._group_actions if action.required]
    names = [action.dest for action in needed]
    given = " ".join(f"--{action.dest} {action.dest.upper()}" for action in needed if "." not in action.dest)
    parser.usage = " ".join(filter(None, [parser.prog, given, "[options]"]))
    groups = [_group(parser, NEEDED, [a for a in rest._group_actions if a.dest.removesuffix(".help") in names])]
    if len(rest._group_actions) > FROM:
        groups += [
            _group(parser, title, [action for action in rest._group_actions if _key(action) in keys])
            for title, keys in GROUPS.items()
        ]
    rest._group_actions.sort(key=lambda action: action.dest in ("help", "config", "print_config"))
    others = [group for group in parser._action_groups[1:] if group is not rest and group not in groups]
    first, *more = groups
    parser._action_groups[:] = [group for group in (first, rest, *more, *others) if group is not None]


def _key(action: Any) -> str:
    return str(action.dest).partition(".")[0]


def _group(parser: Any, title: str, actions: list[Any]) -> Any:
    if not actions:
        return None
    group = parser.add_argument_group(title)
    rest = parser._action_groups[1]
    for action in actions:
        rest._group_actions.remove(action)
        group._group_actions.append(action)
    return group
