"""How to test a loss of one's own: against its formula by another road, and by what it must become at its ends."""

import math

import pytest
import torch
from my_losses import FocalDPO

from rap_lightning import DPO
from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.contract import check_loss

LENGTHS = torch.tensor([4, 2, 3, 3])  # tokens of chosen, rejected, chosen, rejected
BEFORE = PairLogps.from_segments(torch.tensor([-9.0, -6.0, -5.0, -5.0]), LENGTHS)
AFTER = PairLogps.from_segments(torch.tensor([-7.0, -9.0, -6.0, -4.0]), LENGTHS)
MARGINS = (5.0, -2.0)


@pytest.mark.parametrize("focus", [0.5, 2.0])
def test_it_is_its_formula(focus: float) -> None:
    won = [1 / (1 + math.exp(-0.3 * m)) for m in MARGINS]
    expected = [-((1 - p) ** focus) * math.log(p) for p in won]
    assert FocalDPO(beta=0.3, focus=focus)(AFTER, BEFORE).tolist() == pytest.approx(expected, rel=1e-6)


def test_without_focus_it_is_dpo() -> None:
    torch.testing.assert_close(FocalDPO(0.3, focus=0)(AFTER, BEFORE), DPO(0.3)(AFTER, BEFORE))


def test_it_is_what_the_trainer_takes_it_for() -> None:
    check_loss(FocalDPO())
