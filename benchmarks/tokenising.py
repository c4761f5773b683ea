"""Tokenising relabelled pairs: ours against TRL's preparation of the same pairs, in turns, in one process.

    python benchmarks/tokenising.py --source my-pairs.parquet --tokenizer FOLDER_OR_HUB_ID [--pairs 500] [--rounds 5]

Prints process CPU seconds of each round, the median of the paired ratios, and whether all ids are equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    import datasets
    from transformers import AutoTokenizer

    from rap_lightning.batches.dataset import PairEncoder
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.preferences.data_report import DataReport
    from rap_lightning.preferences.goals import OverallGoal
    from rap_lightning.preferences.read_pairs import read_pairs
    from rap_lightning.preferences.relabel_export import relabelled_batch
    from rap_lightning.preferences.relabelling import ORIGINS, Relabelling
    from rap_lightning.preferences.rules import Rules
    from rap_lightning.preferences.sources import Source

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    rules, encoder = Rules(), Encoder(tokenizer, OverallGoal(), 10**6)
    report = DataReport(options.source, options.split)
    pairs = []
    for pair in read_pairs(Source(options.source), options.split, rules, report, progress=False):
        texts = [turn["content"] for turn in pair.history] + list(pair.responses)
        if not any(map(encoder.imitates, texts)):  # TRL makes control tokens of such text, we don't
            pairs.append(pair)
        if len(pairs) == options.pairs:
            break
    table = datasets.Dataset(_as_table(relabelled_batch(pairs, rules, encoder.placement, encoder.system_shown, False)))
    print(f"{len(pairs)} scored pairs, {len(table)} training pairs")
    ratios = []
    for number in range(options.rounds):
        ours_s, ours = _timed(lambda: PairEncoder(encoder, Relabelling())(pairs))
        theirs_s, theirs = _timed(lambda: _trl(table, tokenizer))
        ratios.append(theirs_s / ours_s)
        print(f"round {number + 1}: ours {ours_s:.2f} s, TRL {theirs_s:.2f} s, ratio {ratios[-1]:.2f}")
    flat = [
        (row["prompt_ids"][half], row["response_ids"][half], row["response_ids"][1 - half])
        for row in ours for half in range(len(ORIGINS) - 1)
    ]  # fmt: skip
    same = flat == [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in theirs]
    rate = len(pairs) / statistics.median([_timed(lambda: PairEncoder(encoder, Relabelling())(pairs))[0]])
    print(f"median ratio {statistics.median(ratios):.2f}; ids equal: {same}; ours {rate:.0f} scored pairs/s of CPU")


def _as_table(batch: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches([batch])


def _trl(table: Any, tokenizer: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(str(Path(folder)), max_length=None, use_cpu=True, bf16=False)
        trainer = DPOTrainer.__new__(DPOTrainer)
        trainer._tokenizer = tokenizer
        fresh = table.map(lambda row: row, keep_in_memory=True, load_from_cache_file=False, new_fingerprint=_fresh())
        start = time.process_time()
        prepared = DPOTrainer._prepare_dataset(trainer, fresh, tokenizer, config, "train")
        _trl.seconds = time.process_time() - start  # type: ignore[attr-defined]
        return prepared.to_list()


def _fresh() -> str:
    """A fingerprint never seen, so that no cache answers."""
    return os.urandom(8).hex()


def _timed(work: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    own = _trl.__dict__.pop("seconds", None)  # without loading and listing, for the peer
    return (own if own is not None else seconds), result


if __name__ == "__main__":
    main()
