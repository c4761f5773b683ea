"""A small reward model on this machine: a frozen chat model with a head found by ridge regression.

    python benchmarks/reward_head.py --model HuggingFaceTB/SmolLM2-135M-Instruct --train scored/train.parquet \\
        --test scored/test.parquet --output reward-model

Rows are prompts with scored completions. It prints how often, of two responses to a test prompt whose scores differ by
more than a point, the better one gets the higher reward. It is a folder that ``--judge RewardModel`` reads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random

import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def features(model: torch.nn.Module, tokenizer: object, pairs: list[tuple[str, str]], longest: int) -> torch.Tensor:
    """[N, hidden] float64: the hidden state of the last token of each conversation."""
    found = torch.empty(len(pairs), model.config.hidden_size, dtype=torch.float64)
    ids = []
    for prompt, response in pairs:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"][:longest])
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in tqdm(range(0, len(order), 16), desc="features"):
        part = order[first : first + 16]
        width = max(len(ids[i]) for i in part)
        batch = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in part])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in part])
        with torch.inference_mode():
            hidden = model.model(input_ids=batch, attention_mask=mask).last_hidden_state
        for row, i in enumerate(part):
            found[i] = hidden[row, len(ids[i]) - 1].double()
    return found


def rows_of(
    path: str, prompts: int, responses: int, seed: int
) -> tuple[list[tuple[str, str]], torch.Tensor, list[int]]:
    """(conversations, scores, which prompt each is of)."""
    rng = random.Random(seed)
    rows = pq.read_table(path).to_pylist()
    pairs, scores, groups = [], [], []
    for number, row in enumerate(rng.sample(rows, min(prompts, len(rows)))):
        for one in rng.sample(row["completions"], min(responses, len(row["completions"]))):
            pairs.append((row["prompt"], one["response"]))
            scores.append(one["overall_score"])
            groups.append(number)
    return pairs, torch.tensor(scores, dtype=torch.float64), groups


def accuracy(rewards: torch.Tensor, scores: torch.Tensor, groups: list[int]) -> tuple[float, int]:
    """How often the better response has the higher reward, among pairs more than a point apart; how many pairs."""
    hits = []
    for a, b in itertools.combinations(range(len(groups)), 2):
        if groups[a] == groups[b] and abs(scores[a] - scores[b]) > 1:
            hits.append(bool((rewards[a] - rewards[b]) * (scores[a] - scores[b]) > 0))
    return sum(hits) / len(hits), len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--prompts", type=int, default=150, help="of each file")
    parser.add_argument("--responses", type=int, default=4, help="of each prompt")
    parser.add_argument("--longest", type=int, default=192, help="tokens of a conversation")
    parser.add_argument("--ridge", type=float, default=300.0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32).eval()
    parts = [rows_of(path, options.prompts, options.responses, 0) for path in (options.train, options.test)]
    found = [features(model, tokenizer, pairs, options.longest) for pairs, _, _ in parts]
    mean, scale = found[0].mean(0), found[0].std(0)
    x = (found[0] - mean) / scale
    y = parts[0][1] - parts[0][1].mean()
    weights = torch.linalg.solve(x.T @ x + options.ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y) / scale
    for name, (_, scores, groups), values in zip(("train", "test"), parts, found, strict=True):
        share, pairs = accuracy(values @ weights, scores, groups)
        print(
            json.dumps({"split": name, "responses": len(groups), "pairs": pairs, "pairwise_accuracy": round(share, 4)})
        )
    with torch.no_grad():
        model.score.weight.copy_(weights.float()[None])
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
