"""A training step on the meta device, which holds shapes and no numbers: whatever asks for one fails there.

What asks would, on a GPU, wait for all work that is queued. There is nothing that a step is allowed to ask.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import encode, scored_rows
from loss_cases import LOSSES, make
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch, PairLogps, PairRewards, TokenLogps
from rap_lightning.batches.unrelated import unrelated
from rap_lightning.losses import DPO
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.training.metrics import PairMetrics

PAIRS = (0, 3, 8)


def _batch(tiny: Path, layout: str) -> Batch:
    pairs, _, _ = encode(PolicyConfig(str(tiny)).load_tokenizer(), scored_rows(6), max_length=160)
    places = tuple(range(len(PAIRS)))
    plan = BatchPlan(places, (1.0,) * len(PAIRS), len(PAIRS), (places,))
    return lay_out(LAYOUTS[layout], [pairs.example(i) for i in PAIRS], plan, pad_id=0)


def _pair_logps(batch: Batch, token_logps: Tensor, collisions: Tensor, other: Tensor) -> PairLogps:
    sums = sum_by_segment(token_logps, batch.segment, len(batch.lengths))
    tokens = TokenLogps.of(token_logps, batch.segment, collisions)
    return PairLogps.from_segments(sums, batch.lengths, tokens=tokens, unrelated=other)


@pytest.fixture
def autocast_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of autocast, as this step is: torch knows no autocast for the device, on or off."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.usefixtures("autocast_knows_meta")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_asks_the_device_for_no_number(layout: str, lora: bool, checkpointing: bool, tiny: Path) -> None:
    config = PolicyConfig(str(tiny), lora=Lora(r=4) if lora else None, gradient_checkpointing=checkpointing)
    policy = config.build(torch.float32).train().to("meta")
    on_host = _batch(tiny, layout)
    batch, other = on_host.to("meta"), unrelated(on_host).to("meta")
    with torch.no_grad():
        reference = AdaptersOff().token_logps(policy, batch) if lora else policy(batch)
        more = policy.logps(other)
    token_logps, collisions = policy(batch, collisions=True)
    token_logps.sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.is_meta for p in trained)
    assert torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).is_meta
    rewards = PairRewards(batch.rewards[:, 0], batch.rewards[:, 1], batch.goal_rewards)
    frozen = _pair_logps(batch, reference, collisions.detach(), more)
    # a loss sees log-probabilities, and nothing of how they were computed: all of them once for each layout
    for kind in [DPO] if lora or checkpointing else LOSSES:
        loss, metrics = make(kind).train().to("meta"), PairMetrics(make(kind).term_names()).to("meta")
        leaf = token_logps.detach().requires_grad_()
        ours = _pair_logps(batch, leaf, collisions.detach(), more)
        theirs = frozen if "reference" in loss.requires else None
        values = loss.per_pair(ours, theirs, rewards)
        (values * batch.loss_weights).sum().backward()
        assert leaf.grad is not None, kind.__name__
        metrics.update(values, loss.implicit_rewards(ours, theirs), ours, batch, loss.terms())
        assert metrics.totals().is_meta
        loss.after_step()


def test_fillers_are_known_without_asking(tiny: Path) -> None:
    whole = _batch(tiny, "tree")
    plan = BatchPlan((0, 1), (1.0, 0.0), 1, ((0, 1),))
    pairs: Any = encode(PolicyConfig(str(tiny)).load_tokenizer(), scored_rows(2), max_length=160)[0]
    filled = lay_out(LAYOUTS["tree"], [pairs.example(i) for i in (0, 1)], plan, pad_id=0)
    assert (whole.fillers, filled.fillers) == (0, 1)
    assert dataclasses.replace(whole.to("meta")).fillers == 0
