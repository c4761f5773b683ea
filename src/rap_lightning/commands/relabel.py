"""``rap-lightning relabel``: write the relabelled data as files."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rap_lightning import __version__
from rap_lightning.atomic_write import refuse_non_empty
from rap_lightning.commands.options import load_tokenizer
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.judges import Judge  # the classes that --rewards names are known once this is imported
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.preferences.relabel_export import BATCH, SHARD, ShardedFolder, has_tools, relabelled_batch, schema
from rap_lightning.preferences.relabelling import ORIGIN_TABLE
from rap_lightning.preferences.rendering import resolve_placement, shows_system
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.rules import Rules, key_of
from rap_lightning.preferences.source_mix import weighted
from rap_lightning.preferences.sources import Source, fingerprint, having, local_path, splits_among
from rap_lightning.preferences.template_options import TemplateOptions


def relabel(
    source: str | list[Source], output: str, split: str | None = None, tokenizer: str | None = None, **reading: Any
) -> None:
    """Write relabelled pairs as parquet, in the conversational layout (prompt, chosen, rejected) that trainers read.

    Example: rap-lightning relabel --source my-pairs/ --output relabelled/

    The folder appears when it is complete. To resume an interrupted run, start it again with the same options.
    fit needs none of this: it relabels as it reads.

    Args:
        source: a parquet, arrow, json or json-lines file (text also compressed), a folder, or a Hub id; or a list of
            them.
        output: folder to write; it must not exist, or be empty.
        split: by default each one.
        tokenizer: folder or Hub id of the model to train, whose chat template decides whether the goal is a system
            message or precedes the first user turn; without it, it is a system message.
        reading: how rows become pairs.
    """
    target = Path(output).expanduser().resolve()
    refuse_non_empty(target)
    read = ReadingOptions(source, tool_turns=tokenizer is not None, **reading)
    if isinstance(read.goal, AdapterStrength):
        raise ConfigError(
            "relabel writes goals into prompts, and goal AdapterStrength is no text: others would train without one. "
            "Use a goal of text (--goal OverallGoal)."
        )
    sources, rules, num_proc, seed = read.sources, read.rules, read.num_proc, read.seed
    if tokenizer is None and read.template:
        raise ConfigError("--chat_template has no effect without --tokenizer (nor has chat_template_kwargs); name one.")
    placement, system_shown = _placement(rules, tokenizer, read.template)
    splits = [split] if split is not None else splits_among(sources)
    tables = {} if read.rewards is None else _rated(read.rewards, read, splits, split)
    read.fit_on_training_split(splits, tables)
    parts = [(name, one) for name in splits for one in having(sources, name)]
    prints = [fingerprint(one, name) for name, one in parts]
    described = [table.describe() for table in tables.values()]
    settings = [repr(sources), repr(splits), placement, str(system_shown), str(seed), __version__]
    folder = ShardedFolder(target, key_of(rules, [*prints, *described, *settings]))
    if finished := folder.open():
        print(f"resuming: {finished} shards of an earlier run are complete")
    reports = []
    shards, tools = Counter[str](), None
    for name, one in parts:
        report = DataReport(_public(one.path), name)
        own = replace(read.rules_for(name, split), rewards=tables.get(name))
        pairs = read_pairs(one, name, own, report, num_proc=num_proc)
        if one.weight != 1.0 and name in ("train", split):
            pairs = weighted(pairs, one.weight, seed)
        for shard in _chunks(pairs, SHARD):
            here = any(map(has_tools, shard))
            tools = here if tools is None else tools
            if here and not tools:
                raise DataError(
                    f"{one.path} (split {name}): tools or tool calls begin after the first {SHARD:,} pairs, whose "
                    "files have no columns for them. Put rows with tools first, or relabel them apart."
                )
            label = f"{name}-{shards[name]:05d}.parquet"
            if not folder.has(label):
                columns = schema(tools, weights=rules.weight_column is not None)
                batches = (
                    relabelled_batch(chunk, rules, placement, system_shown, columns)
                    for chunk in _chunks(iter(shard), BATCH)
                )
                folder.write(label, batches, columns)
            shards[name] += 1
        reports.append(report)
        print("\n".join(report.lines()))
    folder.close(_card(rules, reports, placement))
    print(f"wrote {output}")


def _rated(judge: Judge, read: ReadingOptions, splits: list[str], named: str | None) -> dict[str, RewardTable]:
    from rap_lightning.models.judge_rewards import judge_rewards  # imported here: it imports torch, which takes seconds

    tables = {}
    for split in splits:
        rules = read.rules_for(split, named)
        tables[split], lines = judge_rewards(judge, having(read.sources, split), split, rules, num_proc=read.num_proc)
        print("\n".join(lines))
    return tables


def _placement(
    rules: Rules, tokenizer: str | None, template: TemplateOptions
) -> tuple[Literal["system", "user"], bool]:
    asked = rules.goal.placement if rules.goal is not None else "auto"
    if tokenizer is None:
        return ("user" if asked == "user" else "system"), True
    loaded = template.applied(load_tokenizer(tokenizer))
    return resolve_placement(loaded, asked), shows_system(loaded)


def _chunks(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    while chunk := list(islice(pairs, size)):
        yield chunk


def _public(path: str) -> str:
    """A source's name for the card, without folders of this machine, user names or keys of addresses."""
    if "://" in path:
        parts = urlsplit(path)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    local = local_path(path)
    return path if local is None else local.name


def _card(rules: Rules, reports: list[DataReport], placement: str) -> str:
    lines = ["---", "tags:", "- preference", "- reward-augmented", "---", "", "# Reward-augmented preference pairs", ""]
    lines += [
        f"Written by rap-lightning {__version__}, after *Reward-Augmented Data Enhances Direct Preference Alignment of "
        "LLMs* (Zhang et al., ICML 2025, arXiv 2410.08067). Each scored pair became:",
        "",
        *(f"- {ORIGIN_TABLE[i].name}: {ORIGIN_TABLE[i].description}" for i in rules.relabelling.origins),
        "",
    ]
    if rules.goal is not None and rules.relabelling.conditioned:
        record = rules.goal.record()
        lines += [f"Goal ({placement} message), at its best:", "", "```", record["best"], "```", ""]
        lines += [f"Scale: `{json.dumps(record['scale'])}`", ""]
    lines += [f"Relabelling: `{json.dumps(dataclasses.asdict(rules.relabelling))}`; ties: {rules.ties}", "", "```"]
    lines += [line for report in reports for line in report.lines()]
    return "\n".join([*lines, "```", ""])
