"""``rap-lightning inspect``: show what would be trained on."""

from __future__ import annotations

import json as jsonlib
import sys
import unicodedata
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rap_lightning.commands.goal_table import check_options, print_probes, probe_goals
from rap_lightning.commands.options import load_tokenizer
from rap_lightning.commands.options import run as run_function
from rap_lightning.errors import ConfigError, DataError, print_error
from rap_lightning.preferences.data_report import DataReport, write_rows
from rap_lightning.preferences.data_stats import PairStatistics
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import BadRow, Pair
from rap_lightning.preferences.read_pairs import read_pairs, unreached_goal_note
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.preferences.relabelling import RelabelledPair, relabel
from rap_lightning.preferences.rendering import with_goal
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, having, splits_among

Encode = Any
"""A PairEncoder. jsonargparse runs imports under TYPE_CHECKING to resolve annotations, and this one imports torch."""
MEASURED = 20_000
"""Pairs of a split that are tokenised."""
CHUNK = 250
"""Pairs that are tokenised at a time."""
SHOWN = 300
"""Characters of a response that are shown."""


def run(args: list[str]) -> int:
    """Parse a command line and inspect; returns 1 where fit would stop at the data."""
    try:
        return int(run_function(inspect, args, "inspect", flags=("json",)))
    except DataError as error:
        print_error(error)
        return 1


def inspect(
    source: str | list[Source],
    split: str | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    examples: int | None = None,
    dropped: str | None = None,
    json: bool = False,
    model: str | None = None,
    goals: list[GoalTemplate] | None = None,
    probe_pairs: int | None = None,
    **reading: Any,
) -> int:
    """Show what would be trained on: rows kept and dropped with reasons, rewards, gaps, lengths, two pairs as
    relabelled.

    Example: rap-lightning inspect --source my-pairs/ --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct

    It reads the data as fit does, and ends with 1 where fit would stop at a fault. Columns are renamed with
    --columns.chosen_score score_chosen.

    Args:
        source: a parquet, arrow, json or json-lines file (text also compressed), a folder, or a Hub id; or a list
            of them.
        split: by default each one.
        tokenizer: folder or Hub id of the model to train; with it, lengths are measured in tokens, and pairs rendered
            by its chat template.
        max_length: tokens of prompt and response together; with a tokenizer the share of longer pairs is shown. By
            default 1024.
        examples: scored pairs that are shown as relabelled; by default 2.
        dropped: a file to write (json lines) that lists every row left out, repaired, cut or noted: file, line or row,
            column and reason.
        json: print one JSON document for machines instead of tables.
        model: folder or Hub id of the model to train, in the place of tokenizer; with it, some pairs tell whether the
            model reads goals: how far its margins move between a pair's two goals, how much of plain DPO's gradient is
            left where the two halves of a pair meet, and whether pairs agree about it. A 135M model takes two minutes
            on a CPU.
        goals: goal templates that are probed on the same pairs instead of that of goal, to compare texts and
            placements.
        probe_pairs: pairs that are probed, those with the widest gaps of four times as many; by default 32.
        reading: how rows become pairs.
    """
    if model is not None and tokenizer is not None:
        raise ConfigError("--tokenizer has no effect with --model, which has one; remove one of the two.")
    tokenizer = tokenizer or model
    if max_length is not None and tokenizer is None:
        raise ConfigError("--max_length has no effect without --tokenizer, which says what a token is.")
    if examples is not None and json:
        raise ConfigError("--examples has no effect with --json, which prints figures alone; remove one of the two.")
    max_length = 1024 if max_length is None else max_length
    examples = (0 if json else 2) if examples is None else examples
    if max_length < 2:
        raise ConfigError(f"--max_length must be at least 2, found {max_length}")
    if examples < 0:
        raise ConfigError(f"--examples must be at least 0, found {examples}")
    target = _new_file(dropped)
    # without a tokenizer, nothing says whether a chat template renders tool calls
    read = ReadingOptions(source, rewards=None, tool_turns=tokenizer is not None, **reading)
    if tokenizer is None and read.template:
        raise ConfigError("--chat_template has no effect without --tokenizer (nor has chat_template_kwargs); name one.")
    check_options(model, goals, probe_pairs, read.goal)
    option = "--tokenizer" if model is None else "--model"
    encode = None if tokenizer is None else _pair_encoder(tokenizer, option, read, max_length)
    splits = [split] if split is not None else splits_among(read.sources)
    fitted = read.fit_on_training_split(splits)
    inspected: list[_Inspected] = []
    for name in splits:
        for one in having(read.sources, name):
            report = DataReport(one.path, name, rows=None if target is None else [])
            rules = read.rules_for(name, split)
            inspected.append(_inspect(one, rules, read.num_proc, encode, max_length, examples, report))
            if not json:
                _print(inspected[-1], max_length)
                _print_examples(inspected[-1].shown, read, encode)
    reports = [one.report for one in inspected]
    notes = {
        name: note
        for name in splits
        if name not in VALIDATION_NAMES
        and (note := unreached_goal_note(read.rules, [one for one in reports if one.split == name]))
    }
    faulty = any(report.faults for report in reports)
    empty = [f"{report.source} (split {report.split})" for report in reports if not report.pairs]
    listed = write_rows(target, reports) if target is not None else 0
    probes = []
    if model is not None and encode is not None and not faulty and reports and reports[0].pairs:
        probes = probe_goals(model, goals, probe_pairs, read, splits[0], encode.encoder)
    if json:
        documents = [{**one.report.as_dict(), "figures": one.statistics.as_dict()} for one in inspected]
        scale = read.goal.record()["scale"] if read.goal is not None else None
        found = {"splits": documents, "scale": scale, "notes": notes, "faults": faulty or bool(empty)}
        if probes:
            found["probes"] = [one.as_dict() for one in probes]
        print(jsonlib.dumps(found, ensure_ascii=False))
        return int(faulty or bool(empty))
    if fitted and read.goal is not None:
        print(f"scale fitted: {read.goal.fitted()}")
    if any(one.weight != 1.0 for one in read.sources):
        print("every pair is shown once; the sources' weights apply in training")
    for name, note in notes.items():
        print(f"{name}: {note}")
    if probes:
        print_probes(probes)
    if target is not None:
        print(f"{dropped}: {listed:,} rows listed")
    if faulty:
        print("Faults were found: fit would stop.", file=sys.stderr)
    elif empty:
        print(f"No pair is left of {', '.join(empty)}: fit would stop.", file=sys.stderr)
    return int(faulty or bool(empty))


def _new_file(path: str | None) -> Path | None:
    if path is None:
        return None
    target = Path(path).expanduser()
    if target.exists():
        raise ConfigError(f"--dropped {path} exists. Name another file, or remove it.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"--dropped {path}: no such folder: {target.parent}")
    return target


def _pair_encoder(path: str, option: str, read: ReadingOptions, max_length: int) -> Encode:
    from rap_lightning.batches.dataset import PairEncoder
    from rap_lightning.batches.encode import Encoder

    encoder = Encoder(read.template.applied(load_tokenizer(path, option)), read.goal, max_length)
    encoder.check_thinking(read.rules.thinking)
    return PairEncoder(encoder, read.relabelling)


@dataclass(frozen=True)
class _Inspected:
    """What was found in a split of a source, and pairs to show."""

    report: DataReport
    statistics: PairStatistics
    shown: list[Pair]


def _inspect(
    source: Source, rules: Rules, num_proc: int | None, encode: Encode | None, max_length: int, examples: int,
    report: DataReport,
) -> _Inspected:  # fmt: skip
    found = _Inspected(report, PairStatistics(), [])
    pairs = read_pairs(
        source, report.split, rules, report,
        num_proc=num_proc, collect_faults=True, progress=sys.stderr.isatty(),
    )  # fmt: skip
    while chunk := list(islice(pairs, CHUNK)):
        found.shown.extend(chunk[: max(0, examples - found.statistics.pairs)])
        if encode is not None and found.statistics.pairs < MEASURED:
            _measure(chunk, encode, found, max_length)
        for pair in chunk:
            found.statistics.add(pair)
    return found


def _measure(pairs: list[Pair], encode: Encode, found: _Inspected, max_length: int) -> None:
    from rap_lightning.batches.dataset import note_encoding

    rows = encode(pairs)
    for pair, row, encoded in zip(pairs, rows, note_encoding(rows, found.report), strict=True):
        if not encoded:
            found.report.pairs -= 1
            found.report.relabelled -= len(encode.relabelling.made_of(pair, encode.encoder.goal))
            continue
        prompt = max(map(len, row["prompt_ids"])) + row["cut_prompt"]
        chosen, rejected = (len(ids) + cut for ids, cut in zip(row["response_ids"], row["cut_response"], strict=True))
        found.statistics.add_tokens(prompt, chosen, rejected, max_length)


def _print(inspected: _Inspected, max_length: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    report, statistics = inspected.report, inspected.statistics
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for line in report.lines():
        console.print(escape(visible(line)), soft_wrap=True)
    if not statistics.pairs:
        return
    histogram = statistics.histogram()
    if histogram:
        table = Table(title=f"rewards of both responses, {statistics.pairs:,} pairs", box=None)
        for name in ("from", "to", "count", ""):
            table.add_column(name, justify="right" if name else "left")
        most = max(count for _, _, count in histogram)
        for low, high, count in histogram:
            table.add_row(f"{low:g}", f"{high:g}", f"{count:,}", "█" * round(40 * count / most))
        console.print(table)
    figures = statistics.as_dict()
    table = Table(box=None)
    for name in ("", "min", "p25", "p50", "p75", "p95", "max"):
        table.add_column(name, justify="right" if name else "left")
    rows = {"gap between rewards": figures["gap"]} if figures["gap"] else {}
    rows |= {"weight": figures["weights"]} if "weights" in figures else {}
    rows |= {
        f"tokens: {name}": counts for name, counts in figures.get("tokens", {}).items() if isinstance(counts, dict)
    }
    for name, found in rows.items():
        table.add_row(name, *(f"{found[key]:g}" for key in ("min", "p25", "p50", "p75", "p95", "max")))
    if rows:
        console.print(table)
    console.print(f"the chosen response is the longer one in {figures['chosen_longer_share']:.0%} of the pairs")
    if statistics.tokenised:
        part = "" if statistics.tokenised == statistics.pairs else f" (of the first {statistics.tokenised:,} pairs)"
        share = figures["tokens"]["share_over_max_length"]
        console.print(f"{share:.1%} of the pairs{part} are longer than max_length {max_length} and would be truncated")


def _print_examples(pairs: list[Pair], read: ReadingOptions, encode: Encode | None) -> None:
    for number, pair in enumerate(pairs, 1):
        print(f"\n== pair {number}: {visible(pair.place)}, id {pair.id}")
        try:
            encoded = [] if encode is None else encode.readable(pair)
        except BadRow as problem:
            print(f"   can't be encoded: {problem.reason}")
            encoded = []
        for place, made in enumerate(read.relabelling.made_of(pair, read.goal)):
            half = relabel(pair, read.goal, *made)
            print(f"-- {half.origin}" + (f", goal {half.goal}" if half.goal is not None else ""))
            prompt, chosen, rejected = (
                encoded[place] if encoded else (_as_turns(half, read), half.chosen, half.rejected)
            )
            print(_indented(_short(prompt, 3 * SHOWN)))
            for name, text, reward in (("chosen", chosen, 0), ("rejected", rejected, 1)):
                print(f"   {name} (reward {half.rewards[reward]:g}):")
                print(_indented(_short(text), "   | "))


def _as_turns(half: RelabelledPair, read: ReadingOptions) -> str:
    """The prompt's turns: without a tokenizer, nothing says how they are written."""
    before_user = read.goal is not None and read.goal.placement == "user"
    turns = with_goal(half.history, half.goal_text, "user" if before_user else "system")
    return "\n".join(f"[{turn['role']}] {_short(turn['content'])}" for turn in turns)


def _short(text: str, limit: int = SHOWN) -> str:
    return visible(text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}")


def _indented(text: str, lead: str = "   ") -> str:
    return "\n".join(lead + line for line in text.split("\n"))


def visible(text: str) -> str:
    """Text for a terminal, with control and invisible characters as escapes."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in hidden else ascii(character)[1:-1]
        for character in text
    )
