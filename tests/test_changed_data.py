"""A resumed run has the data of its checkpoint, or is refused before its first step."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import kills
from conftest import build, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.adapter_strength import AdapterStrength

ROWS = scored_rows(20)


def swapped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"score_chosen": row["score_chosen"] + 0.25} if row is rows[7] else row for row in rows]


def other_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": "another answer, no"}
    return [row | {"rejected": [*row["rejected"][:-1], answer]} if row is rows[3] else row for row in rows]


CHANGES = {
    "one score": (swapped(ROWS), "same texts, and had other rewards"),
    "order": (list(reversed(ROWS)), "other texts or another order"),
    "more rows": (ROWS + scored_rows(24)[20:], "20 scored pairs, and there are 24 now"),
    "fewer rows": (ROWS[:9], "20 scored pairs, and there are 9 now"),
    "one text": (other_text(ROWS), "other texts or another order"),
}


def fit(model: Path, data: Path, folder: Path, steps: int, ckpt: Path | None = None, **options: Any) -> Any:
    module, source = build(model, data, optimizer=sgd, **options)
    saver = ModelCheckpoint(folder, filename="stop", every_n_train_steps=2)
    trainer = make_trainer(folder, max_steps=steps, max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(module, source, ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_with_changed_data_is_refused(streaming: bool, tiny: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    fit(tiny, data, tmp_path / "first", 2, streaming=streaming)
    stop = tmp_path / "first" / "stop.ckpt"
    for name, (rows, message) in CHANGES.items():
        write_jsonl(data, rows)
        with pytest.raises(ConfigError, match=message):
            fit(tiny, data, tmp_path / name, 4, stop, streaming=streaming)
        assert not (tmp_path / name / "stop.ckpt").exists(), name
        assert fit(tiny, data, tmp_path / f"{name}-allowed", 4, stop, streaming=streaming, allow_changed=True)
    write_jsonl(data, ROWS)
    assert fit(tiny, data, tmp_path / "same", 4, stop, streaming=streaming).global_step == 4


def test_other_strengths_are_other_data(tiny: Path, tmp_path: Path) -> None:
    """A stream's too: no token tells them apart."""
    data, options = write_jsonl(tmp_path / "train.jsonl", ROWS), {"lora": True, "streaming": True}
    fit(tiny, data, tmp_path / "first", 2, goal=AdapterStrength(neutral=4.0), **options)
    stop = tmp_path / "first" / "stop.ckpt"
    with pytest.raises(ConfigError, match="had other rewards, goals or weights"):
        fit(tiny, data, tmp_path / "other", 4, stop, goal=AdapterStrength(neutral=5.0), **options)
    assert fit(tiny, data, tmp_path / "same", 4, stop, goal=AdapterStrength(neutral=4.0), **options).global_step == 4


def test_another_split_or_a_stream_is_other_data_and_another_batch_or_file_is_not(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", scored_rows(20, seed=1))
    fit(tiny, folder, tmp_path / "first", 2)
    stop = tmp_path / "first" / "stop.ckpt"
    with pytest.raises(ConfigError, match="split test"):
        fit(tiny, folder, tmp_path / "split", 4, stop, train_split="test")
    with pytest.raises(ConfigError, match="streamed"):
        fit(tiny, folder, tmp_path / "stream", 4, stop, streaming=True)
    (folder / "test.jsonl").unlink()
    (folder / "train.jsonl").rename(folder / "train-0.jsonl")
    module, data = build(tiny, folder, optimizer=sgd, batch_size=2)
    trainer = make_trainer(tmp_path / "batch", max_steps=4, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(module, data, ckpt_path=str(stop))
    assert trainer.global_step == 4


def test_the_command_line_refuses_changed_data_and_goes_on_when_told_to(
    start_process: Any, world: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)

    def command(steps: int, *more: str) -> Any:
        arguments = kills.arguments(world, tmp_path / "runs", ("tree", "table", 0, "full"), steps=steps)
        arguments[arguments.index("--data.source") + 1] = str(data)
        return start_process(
            [*arguments, "--trainer.accumulate_grad_batches", "1", "--trainer.log_every_n_steps", "1", *more]
        )

    assert command(3).end() == 0
    write_jsonl(data, swapped(ROWS))
    refused = command(5)
    assert refused.end() == 2
    assert "trained on other data" in refused.said
    assert "--data.allow_changed true" in refused.said
    assert "Traceback" not in refused.said
    told = command(5, "--data.allow_changed", "true")
    assert told.end() == 0, told.said[-2000:]
    assert "continues at the same place" in told.said
    assert "step 4/5" in told.said
    assert "step 3/5" not in told.said
