"""A weight for each pair, from the data: what it does to a step, and what becomes of weights that can't be used."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import run_command, scored_rows, write_jsonl
from rap_lightning.batches.data_identity import DataIdentity
from rap_lightning.batches.dataset import PairEncoder
from rap_lightning.batches.sampler import StepSampler
from rap_lightning.batches.stream import StepShape, StreamedPairs
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.preferences.pairs import BadRow, read_weight
from rap_lightning.preferences.relabelling import Relabelling
from test_fit import assert_same, logged, weights
from test_formats import read
from test_weights import one_step

WEIGHTS = (1, 2, 3)


def weighted_rows(count: int = 6) -> list[dict[str, Any]]:
    return [row | {"importance": WEIGHTS[i % 3]} for i, row in enumerate(scored_rows(count))]


def folder_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir()
    write_jsonl(path / "train.jsonl", rows)
    return path


def gradient(folder: Path, model: Path, data: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What a step of plain SGD changes, in float64."""
    start = PolicyConfig(str(model)).build(torch.float64)
    trainer = {"precision": "64-true", "gradient_clip_val": None} | options.pop("trainer", {})
    moved = weights(one_step(folder, model, data, trainer, **({"batch_size": 100} | options)))
    return {name: moved[name].double() - p.detach().double() for name, p in start.named_parameters()}


@pytest.mark.usefixtures("true_float64")
def test_a_weight_is_as_many_copies_of_the_pair_in_its_half(tiny: Path, tmp_path: Path) -> None:
    rows = weighted_rows()
    weighed = folder_of(tmp_path / "weighed", rows)
    copied = folder_of(tmp_path / "copied", [row for row in rows for _ in range(row["importance"])])
    expected = gradient(tmp_path / "a", tiny, copied, rejected_weight=0.25)
    plain = gradient(tmp_path / "b", tiny, weighed, rejected_weight=0.25)
    assert max(float((plain[n] - expected[n]).abs().max()) for n in plain) > 1e-5, "the weights do something"
    for name, options in {
        "whole": {},
        "parts": {"token_budget": 600, "batch_size": 2, "trainer": {"accumulate_grad_batches": 6}},
        "stream": {"streaming": True, "batch_size": 2, "trainer": {"accumulate_grad_batches": 6}},
    }.items():
        options |= {"weight_column": "importance", "rejected_weight": 0.25}
        assert_same(gradient(tmp_path / name, tiny, weighed, **options), expected, 1e-12)


def test_ranks_together_hold_the_weight_that_each_of_them_knows(tiny: Path, tmp_path: Path) -> None:
    data = one_step(
        tmp_path / "run", tiny, folder_of(tmp_path / "data", weighted_rows(7)), weight_column="importance"
    ).trainer.datamodule  # fmt: skip
    pairs, encode = data._pairs["train"], PairEncoder(data.encoder, data.relabelling)
    weigh = pairs.loss_weights(data.origin_weights).__getitem__
    table = [StepSampler(len(pairs), 2, accumulate=10, num_replicas=2, rank=rank, weigh=weigh) for rank in range(2)]
    shapes = [StepShape(2, 10, 2, rank) for rank in range(2)]
    sources = (data.sources, "train", data.rules, encode)
    streams = [StreamedPairs(*sources, shape, buffer=1, seed=0) for shape in shapes]
    for plans in ([*table[0], *table[1]], [plan for stream in streams for plan, _ in stream]):
        assert {plan.step_weight for plan in plans} == {2.0 * sum(row["importance"] for row in weighted_rows(7))}
        assert math.fsum(weight for plan in plans for weight in plan.loss_weights) == plans[0].step_weight


def test_logged_means_stay_plain(tiny: Path, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", weighted_rows())
    one_step(tmp_path / "plain", tiny, data, batch_size=100)
    one_step(tmp_path / "weighed", tiny, data, batch_size=100, weight_column="importance")
    plain, weighed = (logged(tmp_path / name)[0] for name in ("plain", "weighed"))
    assert weighed["loss"] == plain["loss"]
    assert weighed["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_validation_needs_no_weights(tiny: Path, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", weighted_rows())
    write_jsonl(data / "test.jsonl", scored_rows(4, seed=1))
    module = one_step(tmp_path / "run", tiny, data, weight_column="importance")
    assert module.trainer.datamodule.reports["test"][0].pairs == 4
    assert len(module.trainer.datamodule.histories()) == 4, "nor do the prompts of samples"


def test_rows_whose_weight_can_not_be_used_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = scored_rows(9)
    found: list[Any] = [0.5, 0, -1, None, math.nan, math.inf, 1e-13, 2.0]
    for row, weight in zip(rows, found, strict=False):
        row["w"] = weight
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # the last one has no weight
    pairs, report = read(path, weight_column="w")
    assert [pair.weight for pair in pairs] == [0.5, 2.0]
    assert {reason: tally.count for reason, tally in report.dropped.items()} == {
        "a weight of 0": 1, "a weight below 0": 1, "no weight: null or empty": 2, "not a finite number": 2,
        "a weight that is not from 1e-12 to 1e+12": 1,
    }  # fmt: skip
    assert "  weights of pairs: from 0.5 to 2, mean 1.25; they average as 1 pairs of equal weight would" in [
        *report.lines()
    ]
    with pytest.raises(DataError, match="a weight below 0"):
        read(path, weight_column="w", bad_rows="error")
    for text in ("1.0", True, [1]):
        with pytest.raises(BadRow) as caught:
            read_weight(text, "w")
        assert caught.value.stops


def test_a_weight_of_zero_is_no_fault(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [row | {"w": i} for i, row in enumerate(scored_rows(3))])
    pairs, _ = read(tmp_path / "rows.jsonl", weight_column="w", bad_rows="error")
    assert [pair.weight for pair in pairs] == [1.0, 2.0]


def test_every_format_reads_it(tmp_path: Path) -> None:
    completions = [{"response": f"answer {i}", "overall_score": 9.0 - i} for i in range(3)]
    steer = [
        {"prompt": "why?", "response": f"r{i}", "helpfulness": 2 + i, "correctness": 1, "coherence": 1, "complexity": 1}
        | {"verbosity": 1, "w": 2.5} for i in range(2)
    ]  # fmt: skip
    for name, rows in {
        "completions": [{"prompt": "why?", "completions": completions, "w": 2.5}],
        "ultrafeedback": [{"instruction": "why?", "completions": completions, "w": 2.5}],
        "ranked": [{"prompt": "why?", "answers": [{"answer": f"a{i}", "rank": i + 1} for i in range(3)], "w": 2.5}],
        "helpsteer": steer,
        "sharegpt": [
            {"conversations": [{"from": "human", "value": "why?"}], "chosen": {"from": "gpt", "value": "a"},
             "rejected": {"from": "gpt", "value": "b"}, "score_chosen": 9.0, "score_rejected": 2.0, "w": 2.5}
        ],
    }.items():  # fmt: skip
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        (pair,), report = read(tmp_path / f"{name}.jsonl", weight_column="w", outside_scale="clip")
        assert pair.weight == 2.5, name
        assert "w" not in report.unread
    write_jsonl(tmp_path / "differ.jsonl", [steer[0], steer[1] | {"w": 1.0}])
    with pytest.raises(DataError, match="weights that differ between the rows of one prompt"):
        read(tmp_path / "differ.jsonl", weight_column="w", outside_scale="clip")


def test_a_repeat_with_another_weight_is_told_apart(tmp_path: Path) -> None:
    (row,) = scored_rows(1)
    write_jsonl(tmp_path / "rows.jsonl", [row | {"w": w} for w in (2.0, 2.0, 3.0)])
    pairs, report = read(tmp_path / "rows.jsonl", weight_column="w")
    assert [pair.weight for pair in pairs] == [2.0, 2.0, 3.0]
    assert sorted(report.noted) == ["a pair that was read before", "a pair that was read before, with another weight"]


def test_columns_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", weighted_rows())
    with pytest.raises(ConfigError, match=r"has no column 'weight'; found .*importance"):
        read(tmp_path / "rows.jsonl", weight_column="weight")
    pairs, _ = read(tmp_path / "rows.jsonl", weight_column="weight", columns={"importance": "weight"})
    assert [pair.weight for pair in pairs] == [1, 2, 3, 1, 2, 3]
    _, report = read(tmp_path / "rows.jsonl")
    assert report.unread == {"importance"}, "a column that no option names weighs nothing, and is named"


def test_relabel_carries_it_and_fit_reads_it_again(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    data, out = folder_of(tmp_path / "data", weighted_rows()), tmp_path / "out"
    run_command("relabel", "--source", data, "--output", out, "--weight_column", "importance")
    table = pq.read_table(out / "train-00000.parquet")
    assert table["weight"].to_pylist() == [w for w in (1.0, 2.0, 3.0) * 2 for _ in range(2)]
    pairs, _ = read(out, weight_column="weight", goal=None, relabelling=Relabelling("none"))
    assert sorted({pair.weight for pair in pairs}) == [1.0, 2.0, 3.0]
    run_command("relabel", "--source", data, "--output", tmp_path / "plain")
    assert "weight" not in pq.read_table(tmp_path / "plain" / "train-00000.parquet").column_names


def test_changed_weights_are_changed_data(tiny: Path, tmp_path: Path) -> None:
    rows = weighted_rows()
    found = []
    for number, changed in enumerate((rows, [*rows[:-1], rows[-1] | {"importance": 1}])):
        data = folder_of(tmp_path / f"data{number}", changed)
        module = one_step(tmp_path / f"run{number}", tiny, data, weight_column="importance")
        found.append(module.trainer.datamodule.state_dict())
    assert "had other rewards, goals or weights" in DataIdentity(**found[0]).change_since(found[1])


def test_inspect_reads_validation_without_weights_as_fit_does(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pairs", weighted_rows())
    write_jsonl(folder / "test.jsonl", scored_rows(3))  # without the column
    shown = run_command("inspect", "--source", folder, "--weight_column", "importance", "--json").stdout
    train, test = json.loads(shown)["splits"]
    assert "weights" in train["figures"]
    assert "weights" not in test["figures"]
    named = run_command("inspect", "--source", folder, "--weight_column", "importance", "--split", "test")
    assert named.returncode  # a split asked for by name is taken for training data
    assert "no column 'importance'" in named.stderr


def test_relabel_reads_validation_without_weights_as_fit_does(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder, out = folder_of(tmp_path / "pairs", weighted_rows()), tmp_path / "out"
    write_jsonl(folder / "test.jsonl", scored_rows(3))  # without the column
    options = ("--source", folder, "--weight_column", "importance")
    run_command("relabel", *options, "--output", out)
    assert set(pq.read_table(out / "train-00000.parquet")["weight"].to_pylist()) == {1.0, 2.0, 3.0}
    assert set(pq.read_table(out / "test-00000.parquet")["weight"].to_pylist()) == {1.0}, "the same columns"
    named = run_command("relabel", *options, "--split", "test", "--output", tmp_path / "named")
    assert "no column 'importance'" in named.stderr
