"""Losses and options that make conditioning win, on relabelled pairs: what each half and each original gets."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.batches.types import PairLogps
from rap_lightning.losses import DPO, SFT, APOZero, DPOPositive, Mixture, PreferenceLoss
from rap_lightning.module import Pass
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.relabelling import ORIGINS
from rap_lightning.training.schedules import ConstantWithWarmup


def one_step(folder: Path, model: Path, data: Path, **options: Any) -> tuple[Pass, Any]:
    """The single forward pass of a step over all training pairs."""
    module, datamodule = build(
        model, data, batch_size=200, layout="padded", optimizer=sgd, schedule=ConstantWithWarmup(), **options
    )
    make_trainer(folder, max_steps=1).fit(module, datamodule)
    (one,) = module.passes
    return one, module


def responses(one: Pass, tokenizer: Any) -> list[str]:
    """The text of each of the 2B responses, from the ids that are predicted."""
    batch = one.batch
    parts = batch.target.split(batch.lengths.tolist())
    return [tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts]


def test_sft_beside_dpo_imitates_each_response_under_its_own_goal_and_the_winner_without_one(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    rows = {row["chosen"][0]["content"]: row for row in scored_rows(16) if len(row["chosen"]) == 2}
    write_jsonl(tmp_path / "data" / "train.jsonl", list(rows.values()))
    loss = Mixture([DPO(0.5), SFT()], [1.0, 0.3])
    one, module = one_step(tmp_path / "run", tiny, tmp_path / "data", loss=loss, keep_original=True, best_goal=True)
    batch, terms, texts = one.batch, loss.terms(), responses(one, module.tokenizer)
    assert sorted({ORIGINS[i] for i in batch.origin.tolist()}) == sorted(ORIGINS[:4])
    best = sum(row["score_chosen"] < 10 for row in rows.values())
    assert len(batch) == 3 * len(rows) + best
    torch.testing.assert_close(terms["SFT"], -one.policy.chosen / batch.lengths[0::2])
    torch.testing.assert_close(one.losses, terms["DPO"] + 0.3 * terms["SFT"])
    by_text = {
        row[side][-1]["content"]: row[f"score_{side}"] for row in rows.values() for side in ("chosen", "rejected")
    }
    winners = {row["chosen"][-1]["content"] for row in rows.values()}
    for i, origin in enumerate(batch.origin.tolist()):
        imitated, goal = texts[2 * i], batch.goals[i]
        assert (imitated in winners) is (ORIGINS[origin] != "rejected-goal")
        assert (goal is None) is (ORIGINS[origin] == "unconditioned")
        if ORIGINS[origin] == "best-goal":
            assert goal == "10"
        else:
            assert goal is None or float(goal) == by_text[imitated], "under its own score"


@pytest.mark.parametrize("loss", [DPOPositive(0.5), APOZero(0.5)])
def test_terms_against_lost_likelihood_are_of_chosen_under_its_own_goal_in_every_origin(
    loss: PreferenceLoss, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    one, _ = one_step(tmp_path, tiny, pairs_folder, loss=loss, keep_original=True)
    reference, batch = one.reference, one.batch
    assert reference is not None
    assert {int(o) for o in batch.origin} == {0, 1, 2}
    fallen = torch.linspace(0, 3, len(batch))  # nats that both responses have lost: no margin has changed
    both = PairLogps(
        reference.chosen - fallen, reference.rejected - fallen, reference.chosen_lengths, reference.rejected_lengths
    )
    chosen = both.chosen.clone().requires_grad_()
    losses = loss(PairLogps(chosen, both.rejected, both.chosen_lengths, both.rejected_lengths), reference)
    plain = DPO(0.5)(both, reference)
    torch.testing.assert_close(plain, torch.full_like(plain, 0.6931472), msg="DPO sees nothing of it")
    (pull,) = torch.autograd.grad(losses.sum(), chosen)
    (dpo,) = torch.autograd.grad(
        DPO(0.5)(PairLogps(chosen, both.rejected, both.chosen_lengths, both.rejected_lengths), reference).sum(), chosen
    )
    assert (pull < 0).all(), "chosen is raised, under whatever goal"
    if isinstance(loss, DPOPositive):
        for origin in range(3):
            mine = (batch.origin == origin) & (fallen > 0)
            assert (pull[mine] < 1.5 * dpo[mine]).all(), "and harder than by DPO, once it has lost likelihood"


def test_a_minimum_gap_takes_all_of_a_pair_out_or_none(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    one, module = one_step(tmp_path, tiny, pairs_folder, loss=DPO(), keep_original=True, filters=Filters(min_gap=2.0))
    gaps = (one.batch.rewards[:, 0] - one.batch.rewards[:, 1]).abs()
    assert gaps.min() >= 2
    kept = [row for row in scored_rows(23) if row["score_chosen"] - row["score_rejected"] >= 2]
    assert 5 < len(kept) < 23
    counts = torch.bincount(one.batch.origin, minlength=3).tolist()
    assert counts == [len(kept)] * 3
    (report,) = module.trainer.datamodule.reports["train"]
    assert sum(
        tally.count for reason, tally in report.dropped.items() if "gap" in reason or "differ" in reason
    ) == 23 - len(kept)
