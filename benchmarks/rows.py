"""Reward-augmented rows for both sides: ``python rows.py SCORED_PAIRS.parquet OUT.jsonl --model MODEL``.

N scored pairs become 2N rows as in the paper. Pairs whose scores print the same are left out, and so are those that do
not fit ``--max-length`` under both goals: neither side may drop or cut anything.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from rap_lightning import OverallGoal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    tokenizer, goal = AutoTokenizer.from_pretrained(a.model), OverallGoal()

    def tokens(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, return_dict=False))

    rows: list[dict[str, object]] = []
    for pair in pq.read_table(a.source).to_pylist():
        high, low = pair["score_chosen"], pair["score_rejected"]
        first, second = pair["chosen"][-1], pair["rejected"][-1]
        history = pair["chosen"][:-1]
        empty = not first["content"].strip() or not second["content"].strip()
        if goal.printed(high) == goal.printed(low) or high < low or empty or history != pair["rejected"][:-1]:
            continue
        if history[0]["role"] == "system":
            continue
        both = []
        for reward, chosen, rejected in ((high, first, second), (low, second, first)):
            prompt = [{"role": "system", "content": goal.text(reward)}, *history]
            both.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
        if all(tokens([*row["prompt"], *row[side]]) <= a.max_length for row in both for side in ("chosen", "rejected")):
            rows += both
        if len(rows) >= 2 * a.pairs:
            break
    random.Random(a.seed).shuffle(rows)
    Path(a.out).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {a.out}")


if __name__ == "__main__":
    main()
