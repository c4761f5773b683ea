"""Law 9: sums and counts over the epoch and all ranks; ties count half."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rap_lightning.batches.types import PairLogps
from rap_lightning.training.metrics import PairMetrics


def add(
    metrics: PairMetrics, chosen: list[float], rejected: list[float], origin: list[int], weights: list[float]
) -> None:
    c, r = torch.tensor(chosen), torch.tensor(rejected)
    n = torch.arange(1, len(chosen) + 1)
    batch: Any = SimpleNamespace(origin=torch.tensor(origin), weights=torch.tensor(weights), tokens=torch.tensor(100))
    metrics.update(c * 10, (c, r), PairLogps(c, r, n, n), batch)


def test_means_are_over_pairs_not_batches_and_split_by_origin() -> None:
    metrics = PairMetrics()
    add(metrics, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0, 1, 0], [1, 1, 1])
    add(metrics, [10.0], [20.0], [1], [1])
    values = metrics.compute()
    assert values["rewards/chosen"] == 4.0, "the mean of two batch means would be 6"
    assert values["rewards/margins"] == pytest.approx(-1.0)
    assert values["rewards/accuracies"] == 0.75
    assert values["rewards/chosen/chosen-goal"] == 2.0
    assert values["rewards/chosen/rejected-goal"] == 6.0
    assert values["rewards/accuracies/rejected-goal"] == 0.5
    assert values["loss"] == 40.0
    assert (values["pairs"], values["tokens"]) == (4.0, 200.0)


def test_ties_count_half_and_fillers_not_at_all() -> None:
    metrics = PairMetrics()
    add(metrics, [1.0, 5.0, 9.0], [1.0, 4.0, 0.0], [0, 0, 0], [1, 1, 0])
    values = metrics.compute()
    assert values["rewards/accuracies"] == 0.75
    assert values["rewards/chosen"] == 3.0
    assert values["pairs"] == 2


def test_one_origin_alone_is_not_repeated() -> None:
    metrics = PairMetrics()
    add(metrics, [1.0], [0.0], [2], [1])
    assert not any(name.endswith("unconditioned") for name in metrics.compute())
    assert PairMetrics().compute() == {}


def test_sums_stay_exact_where_float32_would_round() -> None:
    metrics = PairMetrics()
    add(metrics, [2.0**24], [0.0], [0], [1])
    for _ in range(300):
        add(metrics, [1.0, 1.0], [0.0, 0.0], [0, 0], [1, 1])
    assert metrics.compute()["rewards/chosen"] * 601 == 2**24 + 600
    assert metrics.compute()["pairs"] == 601
    metrics.reset()
    assert metrics.compute() == {}


def test_a_state_replaces_the_sums_and_one_of_other_terms_is_refused() -> None:
    whole, rest = PairMetrics(["won"]), PairMetrics(["won"])
    add(whole, [1.0, 2.0], [0.0, 0.0], [0, 1], [1, 1])
    rest.resume(whole.state_dict())
    for metrics in (whole, rest):
        add(metrics, [5.0], [0.0], [0], [1])
    values = whole.compute()
    assert math.isnan(values["loss/won"]), "a term that was not given"
    assert str(values) == str(rest.compute())
    with pytest.raises(ValueError, match="expected sums of shape"):
        PairMetrics().resume(whole.state_dict())
