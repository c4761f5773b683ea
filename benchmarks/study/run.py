"""One training run with the package's own classes, and its figures.

Everything is asked through the goal template, as ``predict`` asks. Of an arm trained without goals, the adapter
itself can be scaled (decoding-time realignment): the control that an arm by strength has to beat.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from benchmarks.study.arms import ARMS, Arm, Trial
from benchmarks.study.laboratory import Laboratory
from benchmarks.study.settings import BEST_GOAL, GOOD, TEMPERATURES, Precision, Size
from torch import Tensor

from rap_lightning.batches.encode import Conversation, Encoder
from rap_lightning.batches.layouts import lay_out_responses
from rap_lightning.batches.prompts import PromptEncoder, left_pad
from rap_lightning.batches.types import Batch
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.evaluation.statistics import curve_spearman
from rap_lightning.models.generation import Generation, generate
from rap_lightning.models.policy import Policy, evaluating
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.token_strength import attach
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import StatedGoal

MAX_LENGTH = 224
"""Tokens of prompt and response; nothing is cut."""
AT_ONCE = 304


class Remembered(Frozen):
    """Frozen, whose numbers are kept for all runs of this process over the same base, by the ids of each response."""

    _known: ClassVar[dict[str, dict[bytes, float]]] = {}

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:
        super().load(policy, dtype)
        self._mine = self._known.setdefault(policy.path, {})

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        if not all(digest in self._mine for digest in batch.digests):
            self._mine.update(zip(batch.digests, super().logps(policy, batch).tolist(), strict=True))
        return torch.tensor([self._mine[digest] for digest in batch.digests])


def fit(
    lab: Laboratory, arm: Arm, trial: Trial, steps: int, batch: int, seed: int, precision: Precision = "32-true"
) -> tuple[PreferenceModule, Asker]:
    """Train one arm; the module with its policy, and what asks it."""
    data = PreferenceDataModule(
        str(lab.train), goal=arm.goal(), max_length=MAX_LENGTH, batch_size=batch, seed=seed, **arm.data
    )
    loss = arm.loss(trial.beta)
    module = PreferenceModule(
        PolicyConfig(lab.base, lora=Lora(r=16, alpha=16)), loss,
        reference=Remembered() if "reference" in loss.requires else None,
        optimizer=partial(torch.optim.AdamW, lr=trial.lr, weight_decay=0.0, fused=True),
    )  # fmt: skip
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, precision=precision, max_steps=steps, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, log_every_n_steps=max(1, steps // 5),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert module.policy is not None, "fit builds the policy"
    if not arm.by_strength:
        attach(module.policy.causal_lm)  # so that its adapter can be scaled as well
    return module, Asker(module.policy, data.encoder, arm)


class Asker:
    """Asks a trained policy for a goal, or for its adapter at a scale.

    Args:
        policy: with an adapter.
        encoder: of the data module that it was trained with.
        arm: says whether it knows goals.
    """

    def __init__(self, policy: Policy, encoder: Encoder, arm: Arm) -> None:
        self.policy, self.encoder, self.arm = policy, encoder, arm
        self._prompts = PromptEncoder(encoder, lambda note: None)

    def at(self, goal: float) -> StatedGoal:
        """How it is asked for a goal; an arm without goals is asked as it is."""
        return self._prompts.stated(goal) if self.arm.conditioned else StatedGoal()

    def scaled(self, scale: float) -> StatedGoal:
        """The best goal, with the adapter times a factor on its strength there."""
        best = self.at(BEST_GOAL)
        return StatedGoal(best.text, (1.0 if best.strength is None else best.strength) * scale)

    def ids(self, prompt: str, stated: StatedGoal) -> list[int]:
        """The prompt's ids."""
        return self._prompts.encode([[{"role": "user", "content": prompt}]], stated.text)[0]

    def samples(
        self, lab: Laboratory, stated: StatedGoal, times: int, temperature: float, seed: int
    ) -> list[tuple[str, str]]:
        """(prompt, response), ``times`` for each held-out prompt."""
        asked = [prompt for prompt in lab.prompts for _ in range(times)]
        options = Generation(max_new_tokens=lab.max_new_tokens, temperature=temperature)
        torch.manual_seed(seed)
        texts: list[str] = []
        for first in range(0, len(asked), AT_ONCE):
            ids = [self.ids(prompt, stated) for prompt in asked[first : first + AT_ONCE]]
            strengths = [stated.strength] * len(ids) if stated.strength is not None else []
            batch = left_pad(ids, self.encoder.pad_id, [{}] * len(ids), strengths)
            texts += generate(self.policy, self.encoder.tokenizer, batch, options)
        return list(zip(asked, texts, strict=True))

    @torch.no_grad()
    def logps(self, pairs: Sequence[tuple[str, str]], stated: StatedGoal) -> list[float]:
        """Log-probability of each (prompt, response) up to its end of turn, in nats."""
        asked = [(self.ids(prompt, stated), self._response(prompt, text)) for prompt, text in pairs]
        found = [0.0] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: sum(map(len, asked[i])))
        with evaluating(self.policy):
            for first in range(0, len(order), 64):
                rows = order[first : first + 64]
                batch = lay_out_responses([asked[i] for i in rows], self.encoder.pad_id)
                if stated.strength is not None:
                    batch = replace(batch, strength=torch.full(batch.input_ids.shape, stated.strength))
                for i, value in zip(rows, self.policy.logps(batch).tolist(), strict=True):
                    found[i] = value
        return found

    def _response(self, prompt: str, text: str) -> list[int]:
        # what follows the end of turn (a line break, say) is the template's, and no answer contains it
        one = self.encoder.encode([Conversation([{"role": "user", "content": prompt}], responses=(text,))])[0]
        ids = one.response_ids[0]  # type: ignore[union-attr]
        end = self.encoder.tokenizer.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else ids


BASE = StatedGoal(None, 0.0)
"""The base model: the adapter at strength 0, and no text."""


def run(lab: Laboratory, name: str, trial: Trial, steps: int, size: Size, seed: int, *, tune: bool) -> dict[str, Any]:
    """Train an arm in a laboratory and measure it; for tuning, at the best goal alone."""
    module, asker = fit(lab, ARMS[name], trial, steps, size.batch, seed, size.precision)
    last = module.step_logger.last.values
    seen = {key: round(float(last[key]), 4) for key in ("loss", "rewards/accuracies") if key in last}
    return {"seen": seen, **measured(lab, asker, size, seed, tune=tune)}


def base_figures(lab: Laboratory, size: Size, seed: int) -> dict[str, Any]:
    """The base at every goal as text and temperature, with an adapter that is new and so has no effect."""
    _, asker = fit(lab, ARMS["text"], Trial(0.0, 0.1), 1, size.batch, seed)
    found = {}
    for goal in size.base_goals:
        stated = StatedGoal(None if goal is None else asker.at(goal).text, 0.0)
        scores = _by_temperature(lab, asker, stated, size, seed)
        found[str(goal)] = {key: statistics.fmean(values) for key, values in scores.items()}
    return {"base": found}


def measured(lab: Laboratory, asker: Asker, size: Size, seed: int, *, tune: bool) -> dict[str, Any]:
    """All figures of a trained policy: see the keys, which the tables of ``report`` name."""
    best = asker.at(BEST_GOAL)
    found: dict[str, Any] = {"best": _by_temperature(lab, asker, best, size, seed)}
    if tune:
        return found
    half = max(1, size.samples // 2)
    if asker.arm.conditioned:
        goals = (*size.goals, *(size.beyond if asker.arm.by_strength else ()))
        curve = {goal: _mean(lab, asker.samples(lab, asker.at(goal), half, 1.0, seed)) for goal in goals}
    else:  # the control: the adapter scaled over the same strengths, from -1 to 1 and beyond
        at = AdapterStrength(neutral=lab.neutral)
        strengths = {goal: at.strength(goal) for goal in (*size.goals, *size.beyond)}
        curve = {g: _mean(lab, asker.samples(lab, asker.scaled(s), half, 1.0, seed)) for g, s in strengths.items()}
    found["curve"] = {f"{goal:g}": round(value, 3) for goal, value in curve.items()}
    means = [curve[goal] for goal in size.goals]
    found["spearman"] = round(float(curve_spearman(np.asarray(size.goals), np.asarray([means]))[0]), 4)
    found["missed"] = round(statistics.fmean(abs(curve[goal] - goal) for goal in size.goals), 3)
    found["frontier"] = [_point(lab, asker, asker.scaled(scale), half, seed, scale) for scale in (1.0, *size.scales)]
    good = [(row["prompt"], row["rejected"][-1]["content"]) for row in lab.pairs if row["score_rejected"] >= GOOD][
        : size.probed
    ]
    if good:
        change = zip(asker.logps(good, best), asker.logps(good, BASE), strict=True)
        found["good_rejected"] = round(statistics.fmean(mine - base for mine, base in change), 3)
    return found


def _by_temperature(lab: Laboratory, asker: Asker, stated: StatedGoal, size: Size, seed: int) -> dict[str, list[float]]:
    """Mean score of each held-out prompt, by temperature."""
    found = {}
    for temperature in TEMPERATURES:
        times = size.samples if temperature else 1
        scores: dict[str, list[float]] = {}
        for prompt, text in asker.samples(lab, stated, times, temperature, seed):
            scores.setdefault(prompt, []).append(lab.judge(prompt, text))
        found[f"{temperature:g}"] = [round(statistics.fmean(values), 2) for values in scores.values()]
    return found


def _mean(lab: Laboratory, samples: Sequence[tuple[str, str]]) -> float:
    return statistics.fmean(lab.judge(prompt, text) for prompt, text in samples)


def _point(lab: Laboratory, asker: Asker, stated: StatedGoal, times: int, seed: int, scale: float) -> dict[str, float]:
    """Mean score at temperature 1, and KL(policy || base) in nats a response, estimated on the same samples."""
    samples = asker.samples(lab, stated, times, 1.0, seed)
    written = [one for one in samples if one[1].strip()]
    mine, base = asker.logps(written, stated), asker.logps(written, BASE)
    kl = statistics.fmean(ours - theirs for ours, theirs in zip(mine, base, strict=True))
    assert math.isfinite(kl)
    return {"scale": scale, "kl": round(kl, 3), "score": round(_mean(lab, samples), 3)}
