"""What a policy does: scores of its samples, its log-probabilities against the base, the scores read off it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.study.settings import BINS, GOALS, MAX_LENGTH, Size

from rap_lightning.batches.encode import Conversation, Encoder
from rap_lightning.batches.layouts import lay_out_responses
from rap_lightning.batches.prompts import left_pad
from rap_lightning.batches.types import PromptBatch
from rap_lightning.evaluation import read_off
from rap_lightning.evaluation.response_figures import bin_numbers
from rap_lightning.evaluation.statistics import curve_spearman, slope, spearman
from rap_lightning.models.generation import Generation, generate
from rap_lightning.models.policy import Policy, evaluating
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.world.rule import attributes, score

AT_ONCE = 512
Goal = float | None


class Asker:
    """Prompts and responses as training encodes them.

    Args:
        tokenizer: the policy's.
        template: how goals read; None: as in the paper.
    """

    def __init__(self, tokenizer: Any, template: GoalTemplate | None) -> None:
        self.template = template or OverallGoal()
        self.encoder = Encoder(tokenizer, self.template, MAX_LENGTH, None)

    def ids(self, prompt: str, goal: Goal, own: Sequence[float] | None = None) -> list[int]:
        """A prompt at a goal, on the scale that goals state.

        Attributes, where the template states some, are ``own``, or else all the goal's number.
        """
        text = None
        if goal is not None:
            text = self.template.write(goal, own or [goal] * len(self.template.attributes))
        return self.encoder.prompt_ids([{"role": "user", "content": prompt}], text)

    def response(self, pair: dict[str, Any], side: str) -> list[int]:
        """The response's ids up to its end of turn.

        The chat template writes a line break after that, which is trained on too, but which the world's base has never
        seen there: it would cost every response the same 10 nats, and whatever imitates would win them back.
        """
        text = pair[side][-1]["content"]
        history = [{"role": "user", "content": pair["prompt"]}]
        (ids,) = self.encoder.encode_one(Conversation(history, responses=(text,))).response_ids
        return ids[: ids.index(self.encoder.tokenizer.eos_token_id) + 1]


@torch.no_grad()
def logps(policy: Policy, asked: Sequence[tuple[Sequence[int], Sequence[int]]], at_once: int = 128) -> list[float]:
    """Log-probability of each response after its prompt, in nats."""
    found = [0.0] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]) + len(asked[i][1]))
    with evaluating(policy):
        for first in range(0, len(order), at_once):
            rows = order[first : first + at_once]
            batch = lay_out_responses([asked[i] for i in rows], pad_id=0)
            for i, value in zip(rows, policy.logps(batch).tolist(), strict=True):
                found[i] = value
    return found


class Sampler:
    """Samples responses to the held-out prompts of a world.

    Args:
        policy: that writes.
        asker: writes its prompts.
        prompts: held out.
        seed: of the sampling.
    """

    def __init__(self, policy: Policy, asker: Asker, prompts: Sequence[str], seed: int) -> None:
        self.policy, self.asker, self.prompts, self.seed = policy, asker, prompts, seed

    def __call__(
        self,
        goal: Goal,
        times: int,
        guidance: float = 0.0,
        low: Goal = 1.0,
        plausibility: float | None = None,
        temperature: float = 1.0,
    ) -> list[tuple[str, str]]:
        """(prompt, response), ``times`` for each prompt.

        With guidance, log-probabilities are pushed away from those at the goal ``low`` (None: without a goal), and
        tokens below a ``plausibility`` are left out.
        """
        asked = [prompt for prompt in self.prompts for _ in range(times)]
        tokenizer = self.asker.encoder.tokenizer
        options = Generation(max_new_tokens=48, temperature=temperature, guidance=guidance, plausibility=plausibility)
        texts: list[str] = []
        torch.manual_seed(self.seed)
        for first in range(0, len(asked), AT_ONCE):
            part = asked[first : first + AT_ONCE]
            batch = self._batch(part, goal)
            if guidance:
                against = self._batch(part, low)
                batch = PromptBatch(batch.input_ids, batch.attention_mask, batch.records, against=against)
            texts += generate(self.policy, tokenizer, batch, options)
        return list(zip(asked, texts, strict=True))

    def _batch(self, prompts: Sequence[str], goal: Goal) -> PromptBatch:
        tokenizer = self.asker.encoder.tokenizer
        return left_pad([self.asker.ids(p, goal) for p in prompts], tokenizer.pad_token_id, [{}] * len(prompts))


def held_out(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """A world's held-out prompts, and its held-out pairs that don't tie."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    pairs = [row for row in rows if row["score_chosen"] > row["score_rejected"]]
    return sorted({row["prompt"] for row in rows}), pairs


def figures_of(samples: list[tuple[str, str]], base: Policy, asker: Asker, *, by_prompt: bool) -> dict[str, Any]:
    """Of samples at one goal: mean score, shares of top scores, length, and what the base thinks of them."""
    scores = [score(prompt, text) for prompt, text in samples]
    responses = [asker.encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in samples]
    few = range(0, len(samples), max(1, len(samples) // 100))
    known: dict[str, list[int]] = {}
    rows = [
        (known.setdefault(samples[i][0], asker.ids(samples[i][0], None)), responses[i]) for i in few if responses[i]
    ]
    fluent = [total / len(row[1]) for total, row in zip(logps(base, rows), rows, strict=True)]
    found: dict[str, Any] = {
        "score": round(statistics.fmean(scores), 4),
        "ten": round(sum(s == 10 for s in scores) / len(scores), 4),
        "top": round(sum(s >= 9 for s in scores) / len(scores), 4),
        "tokens": round(statistics.fmean(map(len, responses)), 2),
        "base_nats_per_token": round(statistics.fmean(fluent), 4) if fluent else None,
    }
    if by_prompt:
        mine: dict[str, list[float]] = {}
        for (prompt, _), value in zip(samples, scores, strict=True):
            mine.setdefault(prompt, []).append(value)
        found["by_prompt"] = [round(statistics.fmean(values), 2) for values in mine.values()]
    return found


def sampled(
    policy: Policy,
    base: Policy,
    asker: Asker,
    prompts: list[str],
    size: Size,
    seed: int,
    only: tuple[Goal, ...] | None = None,
) -> dict[str, Any]:
    """Figures without a goal and at every goal, and how well the goal steers; or the figures at some goals alone."""
    sampler = Sampler(policy, asker, prompts, seed)
    best = GOALS[-1]
    found: dict[str, Any] = {}
    judged: list[tuple[float, float]] = []
    for goal in (None, *GOALS) if only is None else only:
        ends = goal is None or goal == best
        samples = sampler(goal, size.samples if ends else size.samples_between)
        name = "none" if goal is None else f"{goal:g}"
        found[name] = figures_of(samples, base, asker, by_prompt=ends and only is None)
        if not ends:
            found[name] = {key: found[name][key] for key in ("score", "tokens")}
        if goal is not None:
            judged += [(goal, score(prompt, text)) for prompt, text in samples]
    if only is not None:
        return {"conditions": found}
    asked = np.asarray([goal for goal, _ in judged])
    scores = np.asarray([value for _, value in judged])
    means = np.asarray([[found[f"{goal:g}"]["score"] for goal in GOALS]])
    return {
        "conditions": found,
        "spearman": number_or_none(curve_spearman(np.asarray(GOALS), means)[0]),
        "slope": number_or_none(slope(asked, scores, np.ones((1, len(asked))))[0]),
        "peak": max(GOALS, key=lambda g: found[f"{g:g}"]["score"]),
    }


def number_or_none(value: float) -> float | None:
    """Rounded; None for nan."""
    return round(float(value), 4) if np.isfinite(value) else None


def probed(policy: Policy, base: Policy, asker: Asker, pairs: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    """How far log-probabilities of held-out responses moved, by role and reward; and their scores, read off."""
    rows = [(pair, side) for pair in pairs[: size.probed] for side in ("chosen", "rejected")]
    true = [score(pair["prompt"], pair[side][-1]["content"]) for pair, side in rows]
    written = [asker.response(pair, side) for pair, side in rows]
    number = bin_numbers(true, BINS)
    scale = asker.template.scale
    changes: dict[str, Any] = {}
    for condition in ("none", "best", "own"):
        asked = []
        for (pair, side), value, ids in zip(rows, true, written, strict=True):
            goal = {"none": None, "best": GOALS[-1], "own": scale.goal(value)}[condition]
            own = None
            if condition == "own" and asker.template.attributes:
                mine = attributes(pair["prompt"], pair[side][-1]["content"])
                own = [mine[name] for name in asker.template.attributes]
            asked.append((asker.ids(pair["prompt"], goal, own), ids))
        change = np.asarray(logps(policy, asked)) - np.asarray(logps(base, asked))
        changes[condition] = {
            side: [
                round(float(change[mask].mean()), 3) if (mask := (number == i) & side_is(rows, side)).any() else None
                for i in range(len(BINS))
            ]
            for side in ("chosen", "rejected")
        }
        if condition == "none":  # pair accuracy of the log-ratio, as DPO's implicit reward
            won = change[0::2] - change[1::2]
            changes["accuracy"] = round(float(np.mean((np.sign(won) + 1) / 2)), 4)
    few = range(min(size.read, len(rows)))
    grid = np.asarray(
        logps(policy, [(asker.ids(rows[i][0]["prompt"], goal), written[i]) for i in few for goal in GOALS])
    ).reshape(len(few), len(GOALS))
    read, truth = read_off(grid, np.asarray(GOALS)), np.asarray(true[: len(few)])
    ahead = (np.sign(read[0::2] - read[1::2]) * np.sign(truth[0::2] - truth[1::2]) + 1) / 2
    return {
        "changes": changes,
        "counts": {side: [int(((number == i) & side_is(rows, side)).sum()) for i in range(len(BINS))] for side in
                   ("chosen", "rejected")},
        "read_spearman": number_or_none(spearman(read, truth, np.ones((1, len(few))))[0]),
        "read_accuracy": number_or_none(ahead[truth[0::2] != truth[1::2]].mean()),
    }  # fmt: skip


def side_is(rows: Sequence[tuple[Any, str]], side: str) -> Any:
    """[M] bool."""
    return np.asarray([mine == side for _, mine in rows])
