"""Training from a stream: the same pairs as from a table, exact resume, and clear words where it can't work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from conftest import build, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.training.checks import check_steps


def stream_folder(tmp_path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    folder = tmp_path / "stream"
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train-0.jsonl", (rows or scored_rows(23))[:11])
    write_jsonl(folder / "train-1.jsonl", (rows or scored_rows(23))[11:])
    return folder


def run(model: Path, data: Path, folder: Path, ckpt: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
    names = {"max_steps", "max_epochs", "accumulate_grad_batches", "callbacks", "enable_checkpointing"}
    trainer_options = {k: v for k, v in options.items() if k in names}
    module, source = build(
        model, data, optimizer=sgd, **({"streaming": True} | {k: v for k, v in options.items() if k not in names})
    )
    trainer = make_trainer(folder, **({"max_epochs": -1, "accumulate_grad_batches": 2} | trainer_options))
    trainer.fit(module, source, ckpt_path=ckpt)
    return {name: value.clone() for name, value in module.policy.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_stream_in_order_trains_as_a_table_in_order(tiny: Path, tmp_path: Path) -> None:
    """One epoch in one step: whatever the order, the step's mean is over the same pairs."""
    data = stream_folder(tmp_path)
    once = {"max_steps": 1, "accumulate_grad_batches": 12}
    streamed = run(tiny, data, tmp_path / "a", shuffle_buffer=1, **once)
    table = run(tiny, data, tmp_path / "b", streaming=False, **once)
    for name, value in streamed.items():
        torch.testing.assert_close(value, table[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_stream_goes_on_bit_for_bit(workers: int, tiny: Path, tmp_path: Path) -> None:
    """Across the end of an epoch: 42 training pairs are 6 steps of 8, the last one a single batch of 2."""
    data = stream_folder(tmp_path, scored_rows(21))
    saves = [
        ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(tmp_path / "all", filename="epoch", save_on_train_epoch_end=True),
    ]
    whole = run(
        tiny, data, tmp_path / "whole", max_steps=9, shuffle_buffer=10, callbacks=saves, enable_checkpointing=True
    )
    for stop in ("step=3", "step=6", "epoch", "step=7"):
        resumed = run(
            tiny, data, tmp_path / f"rest{stop}", ckpt=str(tmp_path / "all" / f"{stop}.ckpt"), max_steps=9,
            shuffle_buffer=10, num_workers=workers,
        )  # fmt: skip
        assert same(resumed, whole), stop
    other = run(tiny, data, tmp_path / "other", max_steps=9, shuffle_buffer=2)
    assert not same(other, whole), "the buffer decides the order, so this must differ"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_exactly_with_the_default_number_of_epochs(workers: int, tiny: Path, tmp_path: Path) -> None:
    """max_epochs 1 is the command line's default: the number of steps must be known without starting the stream."""
    data = stream_folder(tmp_path, scored_rows(21))
    saver = ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 5, "max_epochs": 1, "shuffle_buffer": 10, "num_workers": workers}
    whole = run(tiny, data, tmp_path / "whole", callbacks=[saver], enable_checkpointing=True, **options)
    for stop in ("step=1", "step=3"):
        resumed = run(tiny, data, tmp_path / stop, ckpt=str(tmp_path / "all" / f"{stop}.ckpt"), **options)
        assert same(resumed, whole), stop


def test_a_stream_that_something_else_started_too_early_is_refused(tiny: Path, tmp_path: Path) -> None:
    class Asks(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert trainer.estimated_stepping_batches == 5

    data = stream_folder(tmp_path, scored_rows(21))
    saver = ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 5, "max_epochs": 1}
    run(tiny, data, tmp_path / "whole", callbacks=[saver, Asks()], enable_checkpointing=True, **options)
    with pytest.raises(ConfigError, match="started before the checkpoint"):
        run(tiny, data, tmp_path / "b", ckpt=str(tmp_path / "all" / "step=3.ckpt"), callbacks=[Asks()], **options)


def test_steps_of_a_stream_are_those_that_lightning_would_count(tiny: Path, tmp_path: Path) -> None:
    for number, (options, steps) in enumerate([
        ({"max_steps": 3, "max_epochs": 1}, 3),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4}, 4),
        ({"max_steps": 3, "max_epochs": 2, "limit_train_batches": 4}, 3),
    ]):  # fmt: skip
        module, data = build(tiny, stream_folder(tmp_path), streaming=True)
        trainer = make_trainer(tmp_path / str(number), accumulate_grad_batches=2, **options)
        trainer.fit(module, data)
        assert check_steps(trainer) == trainer.estimated_stepping_batches == trainer.global_step == steps


def test_a_stream_needs_to_know_how_long_to_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        run(tiny, stream_folder(tmp_path), tmp_path / "run", max_epochs=1, max_steps=-1)


def test_faults_at_the_beginning_of_a_stream_show_before_the_model_is_loaded(tiny: Path, tmp_path: Path) -> None:
    rows = scored_rows(23)
    rows[4]["score_chosen"] = "high"
    module, data = build(tiny, stream_folder(tmp_path, rows), streaming=True)
    with pytest.raises(DataError, match=r"train-0\.jsonl line 5"):
        make_trainer(tmp_path, max_steps=2).fit(module, data)
    assert module.policy is None


def test_options_that_a_stream_or_a_table_ignores_are_refused(tiny: Path, tmp_path: Path) -> None:
    from rap_lightning.preferences.filters import Filters
    from rap_lightning.preferences.goals import OverallGoal
    from rap_lightning.preferences.scales import QuantileScale

    for options, message in [
        ({"shuffle_buffer": 5}, "shuffle_buffer has no effect"),
        ({"streaming": True, "goal": OverallGoal(QuantileScale())}, "only once"),
        ({"streaming": True, "filters": Filters(repeats="drop")}, "no effect on a stream"),
        ({"relabel": "none", "keep_original": True}, "keep_original has no effect"),
        ({"goal": None, "relabel": "both"}, "needs a goal"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(tiny, tmp_path, **options)


def test_several_sources_with_weights_and_a_fitted_scale(tiny: Path, tmp_path: Path) -> None:
    from rap_lightning.datamodule import PreferenceDataModule
    from rap_lightning.preferences.goals import OverallGoal
    from rap_lightning.preferences.scales import LinearScale
    from rap_lightning.preferences.sources import Source

    hundred = [row | {"score_chosen": row["score_chosen"] * 10} for row in scored_rows(12, seed=4)]
    a = write_jsonl(tmp_path / "a.jsonl", hundred)
    b = write_jsonl(tmp_path / "b.jsonl", [row | {"score_rejected": -20.0} for row in hundred[:4]])
    module, _ = build(tiny, tmp_path)
    goal = OverallGoal(LinearScale())
    sources = [Source(str(a)), Source(str(b), weight=3.0)]
    data = PreferenceDataModule(sources, goal=goal, keep_original=True, max_length=160, batch_size=4)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    assert goal.scale.judge_low == -20.0
    assert goal.scale.judge_high == max(row["score_chosen"] for row in hundred)
    pairs = data._pairs["train"]
    assert len(pairs) == 3 * (12 + 3 * 4)
    record = data.goal.record()
    assert record["scale"]["judge_low"] == -20.0
    assert "Overall score: 10." in record["best"]
