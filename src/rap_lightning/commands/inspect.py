"""``rap-lightning inspect``: what would be trained on."""

from __future__ import annotations

import json as jsonlib
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from rap_lightning.commands.options import fit_on_training_split, load_tokenizer, make_rules
from rap_lightning.commands.options import run as run_function
from rap_lightning.errors import ConfigError, DataError, print_error
from rap_lightning.preferences.data_report import DataReport, write_rows
from rap_lightning.preferences.data_stats import PairStatistics
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs, unreached_goal_note
from rap_lightning.preferences.relabelling import Mode, RelabelledPair, relabel
from rap_lightning.preferences.rendering import with_goal
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import Selection
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, as_sources, having, splits_among

MEASURED = 20_000  # pairs that are tokenised
LOT = 250  # pairs that are tokenised at a time
SHOWN = 300  # characters of a response


def run(args: list[str]) -> int:
    """Parse and look; 1 where fit would stop at the data."""
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
    goal: GoalTemplate | None = OverallGoal(),  # noqa: B008
    relabel: Mode | None = None,
    keep_original: bool = False,
    ties: Literal["drop", "chosen", "error"] = "drop",
    selection: Selection | None = None,
    filters: Filters = Filters(),  # noqa: B008
    outside_scale: Literal["error", "drop", "clip"] = "error",
    bad_rows: Literal["drop", "error"] = "drop",
    format: str = "auto",
    columns: dict[str, str] | None = None,
    examples: int | None = None,
    num_proc: int | None = None,
    seed: int = 42,
    dropped: str | None = None,
    json: bool = False,
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
        goal: how the goal reads in the prompt; null for plain pairs, which need no scores.
        relabel: as in the data module: both, chosen, rejected, none or half.
        keep_original: also each pair without a goal.
        ties: a pair whose goals print the same: drop, keep its chosen half, or error.
        selection: which pairs are made of several responses to a prompt.
        filters: what is left out on purpose.
        outside_scale: scores outside the goal's scale: error, drop or clip.
        bad_rows: rows that can't be used: drop or error.
        format: of the rows: auto, a known format, or the import path of a function.
        columns: new names for columns, {theirs: ours}.
        examples: scored pairs that are shown as relabelled; by default 2.
        num_proc: processes that share the reading.
        seed: of the half that relabel half takes.
        dropped: a file to write (json lines) that lists every row left out, repaired, cut or noted: file, line or row,
            column and reason.
        json: print one JSON document for machines instead of tables.
    """
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
    sources = as_sources(source)
    rules = make_rules(
        goal, relabel, keep_original, ties, selection, filters, outside_scale, bad_rows, format, columns, seed,
        tool_turns=tokenizer is not None,
    )  # fmt: skip
    encode = _encoder(tokenizer, rules, max_length) if tokenizer is not None else None
    splits = [split] if split is not None else splits_among(sources)
    fitted = fit_on_training_split(rules, sources, splits, num_proc)
    documents, faulty, empty = [], False, list[str]()
    notes: dict[str, str] = {}
    noted: list[DataReport] = []
    for name in splits:
        reports = []
        for one in having(sources, name):
            report = DataReport(one.path, name, rows=None if target is None else [])
            statistics, shown = _read(one, name, rules, encode, max_length, examples, num_proc, report)
            reports.append(report)
            faulty = faulty or bool(report.faults)
            empty += [] if report.pairs else [f"{report.source} (split {name})"]
            documents.append({**report.as_dict(), "figures": statistics.as_dict()})
            if not json:
                _print(report, statistics, max_length)
                _print_examples(shown, rules, encode)
        noted += reports
        if name not in VALIDATION_NAMES and (note := unreached_goal_note(rules, reports)):
            notes[name] = note
    listed = write_rows(target, noted) if target is not None else 0
    failed = faulty or bool(empty)
    if json:
        scale = rules.goal.record()["scale"] if rules.goal is not None else None
        found = {"splits": documents, "scale": scale, "notes": notes, "faults": failed}
        print(jsonlib.dumps(found, ensure_ascii=False))
    elif fitted and rules.goal is not None:
        print(f"scale fitted: {rules.goal.scale}")
    if not json and any(one.weight != 1.0 for one in sources):
        print("every pair is shown once; the sources' weights apply in training")
    if not json:
        for name, note in notes.items():
            print(f"{name}: {note}")
        if target is not None:
            print(f"{dropped}: {listed:,} rows listed")
        if faulty:
            print("Faults were found: fit would stop.", file=sys.stderr)
        elif empty:
            print(f"No pair is left of {', '.join(empty)}: fit would stop.", file=sys.stderr)
    return int(failed)


def _new_file(path: str | None) -> Path | None:
    """A file to write, or none."""
    if path is None:
        return None
    target = Path(path).expanduser()
    if target.exists():
        raise ConfigError(f"--dropped {path} exists. Name another file, or remove it.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"--dropped {path}: no such folder: {target.parent}")
    return target


def _encoder(path: str, rules: Rules, max_length: int) -> Any:
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.batches.pair_encoder import PairEncoder

    return PairEncoder(Encoder(load_tokenizer(path), rules.goal, max_length), rules.relabelling)


def _read(
    source: Source,
    split: str,
    rules: Rules,
    encode: Any,
    max_length: int,
    examples: int,
    num_proc: int | None,
    report: DataReport,
) -> tuple[PairStatistics, list[Pair]]:
    """Read a split and count it into ``report``; return its statistics, and pairs to show."""
    statistics = PairStatistics()
    shown: list[Pair] = []
    lot: list[Pair] = []
    pairs = read_pairs(
        source, split, rules, report, num_proc=num_proc, collect_faults=True, progress=sys.stderr.isatty()
    )
    for number, pair in enumerate(pairs):
        statistics.add(pair)
        if number < examples:
            shown.append(pair)
        if encode is not None and number < MEASURED:
            lot.append(pair)
        if len(lot) == LOT:
            _measure(lot, encode, statistics, report, max_length)
            lot = []
    if lot:
        _measure(lot, encode, statistics, report, max_length)
    return statistics, shown


def _measure(pairs: list[Pair], encode: Any, statistics: PairStatistics, report: DataReport, max_length: int) -> None:
    from rap_lightning.batches.pair_encoder import note_encoding

    rows = encode(pairs)
    for row, encoded in zip(rows, note_encoding(rows, report), strict=True):
        if not encoded:
            report.pairs -= 1
            report.relabelled -= len(encode.relabelling.origins)
            continue
        prompt = max(map(len, row["prompt_ids"])) + row["cut_prompt"]
        chosen, rejected = map(len, row["response_ids"])
        statistics.add_tokens(prompt, chosen, rejected, max_length)


def _print(report: DataReport, statistics: PairStatistics, max_length: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for line in report.lines():
        console.print(escape(visible(line)), soft_wrap=True)
    if not statistics.pairs:
        return
    histogram = statistics.histogram()
    if histogram:
        table = Table(title=f"rewards of both responses, {statistics.pairs:,} pairs", box=None)
        table.add_column("from", justify="right")
        table.add_column("to", justify="right")
        table.add_column("count", justify="right")
        table.add_column("")
        most = max(count for _, _, count in histogram)
        for low, high, count in histogram:
            table.add_row(f"{low:g}", f"{high:g}", f"{count:,}", "█" * round(40 * count / most))
        console.print(table)
    figures = statistics.as_dict()
    table = Table(box=None)
    for name in ("", "min", "p25", "p50", "p75", "p95", "max"):
        table.add_column(name, justify="right" if name else "left")
    rows = {"gap between rewards": figures["gap"]} if figures["gap"] else {}
    for name, counts in figures.get("tokens", {}).items():
        if isinstance(counts, dict):
            rows[f"tokens: {name}"] = counts
    for name, found in rows.items():
        table.add_row(name, *(f"{found[key]:g}" for key in ("min", "p25", "p50", "p75", "p95", "max")))
    if rows:
        console.print(table)
    console.print(f"the chosen response is the longer one in {figures['chosen_longer_share']:.0%} of the pairs")
    if statistics.tokenised:
        part = "" if statistics.tokenised == statistics.pairs else f" (of the first {statistics.tokenised:,} pairs)"
        share = figures["tokens"]["share_over_max_length"]
        console.print(f"{share:.1%} of the pairs{part} are longer than max_length {max_length} and would be truncated")


def _print_examples(pairs: Iterable[Pair], rules: Rules, encode: Any) -> None:
    for number, pair in enumerate(pairs, 1):
        print(f"\n== pair {number}: {visible(pair.place)}, id {pair.id}")
        for origin in rules.relabelling.origins_of(pair):
            half = relabel(pair, rules.goal, origin)
            print(f"-- {half.origin}" + (f", goal {half.goal}" if half.goal is not None else ""))
            print(_indented(_rendered(half, rules, encode)))
            for name, text, reward in (("chosen", half.chosen, 0), ("rejected", half.rejected, 1)):
                print(f"   {name} (reward {half.rewards[reward]:g}):")
                print(_indented(_short(text), "   | "))


def _rendered(half: RelabelledPair, rules: Rules, encode: Any) -> str:
    if encode is not None:
        from rap_lightning.batches.encode import MARK, Notes
        from rap_lightning.preferences.pairs import BadRow

        try:
            return _short(
                encode.encoder.prompt(half.history, half.goal_text, Notes()).text.replace(MARK, ""), 3 * SHOWN
            )
        except BadRow as problem:
            return f"({problem.reason})"
    placement: Literal["system", "user"] = "system"
    if rules.goal is not None and rules.goal.placement == "user":
        placement = "user"
    turns = with_goal(half.history, half.goal_text, placement)
    return "\n".join(f"[{turn['role']}] {_short(turn['content'])}" for turn in turns)


def _short(text: str, limit: int = SHOWN) -> str:
    return visible(text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}")


def _indented(text: str, lead: str = "   ") -> str:
    return "\n".join(lead + line for line in text.split("\n"))


def visible(text: str) -> str:
    """Text for a terminal: what it would obey, or not show, is written as an escape."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in hidden else ascii(character)[1:-1]
        for character in text
    )
