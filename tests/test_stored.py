"""The stored reference: computed once, found again by exactly what changes its numbers, never wrong, never lost."""

from __future__ import annotations

import errno
import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from conftest import build, make_model, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.errors import ConfigError
from rap_lightning.losses import DPO, Hinge
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references import logp_store, precomputed
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.logp_store import LogpStore
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.training.schedules import ConstantWithWarmup
from test_fit import Interrupt, StopAt, assert_same, checkpoints, logged, weights

RESPONSES = 4 * (23 + 9)  # two goals, two responses, training and validation split


def fit(
    run: Path, model: Path, data: Path, store: Path | None, trainer: dict[str, Any] | None = None, **options: Any
) -> Any:
    reference = Frozen() if store is None else Stored(folder=str(store))
    defaults = {"optimizer": sgd, "schedule": ConstantWithWarmup(), "loss": DPO(0.5), "reference": reference}
    module, datamodule = build(model, data, **(defaults | options))
    make_trainer(run, **({"max_steps": 3} | (trainer or {}))).fit(module, datamodule)
    return module


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The digests of what is computed anew."""
    found: list[bytes] = []
    add = LogpStore.add
    monkeypatch.setattr(
        LogpStore, "add", lambda self, digest, values: found.append(digest) or add(self, digest, values)
    )
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_training_is_that_of_a_live_reference_and_a_second_run_computes_nothing_again(
    lora: bool, tiny: Path, pairs_folder: Path, tmp_path: Path, added: list[bytes]
) -> None:
    live = fit(tmp_path / "live", tiny, pairs_folder, None, lora=lora)
    runs = [fit(tmp_path / name, tiny, pairs_folder, tmp_path / "store", lora=lora) for name in ("first", "second")]
    assert len(set(added)) == len(added) == RESPONSES
    for name, module in zip(("first", "second"), runs, strict=True):
        assert_same(weights(live), weights(module), 1e-6)
        assert abs(logged(tmp_path / name)[0]["loss"] - math.log(2)) < 1e-6


def test_no_second_model_stays_in_memory(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    import gc

    other = make_model(tmp_path / "other", num_hidden_layers=1)
    module = fit(tmp_path / "run", tiny, pairs_folder, None, reference=Stored(str(other), folder=str(tmp_path / "s")))
    assert abs(logged(tmp_path / "run")[0]["rewards/margins"]) > 0.01, "another model was named"
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, Policy) and x.causal_lm.config.name_or_path == str(other)]
    assert not alive
    assert module.policy is not None


def test_what_changes_no_number_uses_what_is_there(
    tiny: Path, pairs_folder: Path, tmp_path: Path, added: list[bytes]
) -> None:
    fit(tmp_path / "first", tiny, pairs_folder, tmp_path / "store")
    added.clear()
    adam = lambda params: torch.optim.AdamW(params, lr=1e-3)  # noqa: E731
    changes: list[dict[str, Any]] = [
        {"loss": DPO(0.01)}, {"loss": Hinge(1.0)}, {"optimizer": adam}, {"layout": "padded"}, {"layout": "packed"},
        {"batch_size": 7}, {"token_budget": 400}, {"lora": True}, {"seed": 1}, {"trainer": {"max_epochs": 2}},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        fit(tmp_path / str(number), tiny, pairs_folder, tmp_path / "store", **change)
        assert not added, change


class OtherWords(OverallGoal):
    def text(self, reward: float) -> str:
        return super().text(reward).replace("Overall", "Total")


def one_character(folder: Path) -> Path:
    """The pairs of ``pairs_folder`` with one character of one response changed."""
    folder.mkdir()
    rows = scored_rows(23)
    text = rows[5]["chosen"][-1]["content"]
    rows[5]["chosen"][-1]["content"] = text[:-1] + "!"
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", scored_rows(9, seed=1))
    return folder


def test_what_changes_a_number_is_computed_again_and_nothing_else_is(
    tiny: Path, pairs_folder: Path, tmp_path: Path, added: list[bytes]
) -> None:
    store = tmp_path / "store"
    fit(tmp_path / "first", tiny, pairs_folder, store)

    def again(name: str, model: Path = tiny, data: Path = pairs_folder, **options: Any) -> int:
        added.clear()
        fit(tmp_path / name, model, data, store, **options)
        return len(added)

    assert again("character", data=one_character(tmp_path / "changed")) == 2, "that response under its two goals"
    assert again("goal", goal=OtherWords()) == RESPONSES
    assert 0 < again("length", max_length=90) < RESPONSES, "those that are cut"
    assert again("template", model=_changed(tiny, tmp_path / "template", template=True)) == RESPONSES
    assert again("weights", model=_changed(tiny, tmp_path / "weights", weight=True)) == RESPONSES
    assert again("config", model=_changed(tiny, tmp_path / "config", config=True)) == RESPONSES
    assert again("precision", trainer={"precision": "bf16-mixed"}) == RESPONSES
    assert again("dtype", policy=PolicyConfig(str(tiny), dtype="bfloat16")) == RESPONSES
    assert again("attention", policy=PolicyConfig(str(tiny), attn_implementation="eager"), layout="padded") == RESPONSES
    assert again("same") == 0


def _changed(model: Path, folder: Path, *, template: bool = False, weight: bool = False, config: bool = False) -> Path:
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    if template:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>\n\n"))
    if weight:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, path, {"format": "pt"})
    if config:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"rms_norm_eps": 1e-5}))
    return folder


def fit_until_killed(run: Path, model: Path, data: Path, store: Path) -> None:
    """Fit in a process of its own, which is killed when it adds its 50th response to the store."""
    logp_store.FLUSH_SECONDS = 0.0
    add, count = LogpStore.add, 0

    def dying(self: Any, *values: Any) -> None:
        nonlocal count
        count += 1
        if count == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *values)

    LogpStore.add = dying  # type: ignore[method-assign]
    fit(run, model, data, store)


def test_a_killed_run_goes_on_with_what_it_had(
    process_server: Any, tiny: Path, pairs_folder: Path, tmp_path: Path, added: list[bytes]
) -> None:
    store = tmp_path / "store"
    killed = process_server.Process(target=fit_until_killed, args=(tmp_path / "killed", tiny, pairs_folder, store))
    killed.start()
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    live = fit(tmp_path / "live", tiny, pairs_folder, None)
    module = fit(tmp_path / "on", tiny, pairs_folder, store)
    assert RESPONSES - 50 <= len(added) < RESPONSES - 30, "at most one batch is lost"
    assert_same(weights(live), weights(module), 1e-6)


def test_a_resumed_run_computes_with_the_reference_and_not_with_the_trained_policy(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    trainer = {"max_steps": 6}
    whole = fit(tmp_path / "whole", tiny, pairs_folder, None, trainer=trainer)
    saver = ModelCheckpoint(tmp_path / "saved", save_last="link", save_on_exception=True)
    stopping = {"enable_checkpointing": True, "callbacks": [saver, Interrupt(3, "before")]}
    with pytest.raises(StopAt):
        fit(tmp_path / "part", tiny, pairs_folder, tmp_path / "store", trainer=trainer | stopping)
    saved = checkpoints(tmp_path / "saved")[-1]
    module, data = build(
        tiny, pairs_folder, optimizer=sgd, schedule=ConstantWithWarmup(), loss=DPO(0.5),
        reference=Stored(folder=str(tmp_path / "another store")),
    )  # fmt: skip
    make_trainer(tmp_path / "rest", **trainer).fit(module, data, ckpt_path=str(saved))
    assert_same(weights(whole), weights(module), 1e-6)


def test_step_zero_in_bf16_is_within_what_layouts_differ_by(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    bf16 = {"precision": "bf16-mixed", "max_steps": 1}
    fit(tmp_path / "same", tiny, pairs_folder, tmp_path / "store", trainer=bf16, loss=DPO(1.0))
    assert abs(logged(tmp_path / "same")[0]["loss"] - math.log(2)) < 1e-6, "the same forward passes"
    fit(tmp_path / "other", tiny, pairs_folder, tmp_path / "store", trainer=bf16, loss=DPO(1.0), layout="padded")
    assert abs(logged(tmp_path / "other")[0]["loss"] - math.log(2)) < 0.05


@pytest.fixture
def one_file(tiny: Path, pairs_folder: Path, tmp_path: Path) -> Path:
    fit(tmp_path / "first", tiny, pairs_folder, tmp_path / "store", trainer={"max_steps": 1})
    (path,) = (tmp_path / "store").rglob("*.safetensors")
    return path


@pytest.mark.parametrize("damage", ["a bit", "cut off", "foreign", "another model's"])
def test_a_damaged_or_foreign_file_is_refused_by_name(
    damage: str, one_file: Path, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    content = bytearray(one_file.read_bytes())
    if damage == "a bit":
        content[-100] ^= 1
        one_file.write_bytes(content)
    elif damage == "cut off":
        one_file.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        (one_file.parent / "other.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    else:
        other = LogpStore(tmp_path / "store", {"weights": "another"})
        other.add(b"0" * 16, np.zeros(3, np.float32))
        other.flush()
        (path,) = other.folder.glob("*.safetensors")
        path.replace(one_file.parent / path.name)
    with pytest.raises(ConfigError, match=r"safetensors is refused: .*Remove it"):
        fit(tmp_path / "again", tiny, pairs_folder, tmp_path / "store")


def test_values_that_the_reference_does_not_give_are_found_out(
    one_file: Path, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    import json

    store = LogpStore(tmp_path / "store", json.loads((one_file.parent / "key.json").read_text()))
    entries = {digest: store[digest] for digest in store._places}
    one_file.unlink()
    for digest, values in entries.items():
        store.add(digest, values + 0.01)
    store.flush()
    with pytest.raises(ConfigError, match=r"differ from those of the reference by 0\.01 nats per token"):
        fit(tmp_path / "again", tiny, pairs_folder, tmp_path / "store")


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    key = {"weights": "w"}
    writers = [LogpStore(tmp_path, key) for _ in range(2)]
    for number in range(6):
        writer = writers[number % 2]
        writer.add(bytes([number]) * 16, np.full(number + 1, -float(number), np.float32))
        writer.add(b"written by both!", np.full(2, -0.5, np.float32))
        writer.flush()
    assert not list(tmp_path.rglob("*.partial"))
    for reader in (*writers, LogpStore(tmp_path, key)):
        reader.refresh()
        assert len(reader) == 7
        for number in range(6):
            assert reader[bytes([number]) * 16].tolist() == [-float(number)] * (number + 1)


def test_a_full_disk_is_said_and_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LogpStore(tmp_path, {"weights": "w"})
    store.add(b"a" * 16, np.array([-1.0], np.float32))
    store.flush()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    store.add(b"b" * 16, np.array([-2.0], np.float32))
    with pytest.raises(ConfigError, match=r"No space left on device.*--model.reference.folder"):
        store.flush()
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    again = LogpStore(tmp_path, {"weights": "w"})
    assert again[b"a" * 16].tolist() == [-1.0]
    assert b"b" * 16 not in again


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(
    tiny: Path, pairs_folder: Path, tmp_path: Path, added: list[bytes]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"can't be written to .*file"):
        fit(tmp_path / "run", tiny, pairs_folder, tmp_path / "file")
    assert not added


def test_a_revision_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="revision has no effect without path"):
        Stored(revision="main")


def test_the_sample_is_small() -> None:
    assert precomputed.SAMPLE <= 4, "every start computes it"


def test_a_policy_trained_in_this_process_is_never_taken_for_the_reference(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """fit, then test on other data in the same process: what is missing must come from the initial weights."""
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "train.jsonl", scored_rows(9, seed=7))
    write_jsonl(other / "test.jsonl", scored_rows(7, seed=8))

    def module_for(data: Path) -> tuple[Any, Any]:
        return build(tiny, data, optimizer=sgd, reference=Stored(folder=str(tmp_path / "store")))

    module, data = module_for(pairs_folder)
    trainer = make_trainer(tmp_path / "a", max_steps=4)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)  # the store is right, and must not be called wrong
    _, more = module_for(other)
    make_trainer(tmp_path / "b").test(module, more, verbose=False)
    fresh, again = module_for(other)
    fresh_trainer = make_trainer(tmp_path / "c", max_steps=1)
    fresh_trainer.fit(fresh, again)
    live, same = build(tiny, other, optimizer=sgd, reference=Frozen())
    live_trainer = make_trainer(tmp_path / "d", max_steps=1)
    live_trainer.fit(live, same)
    found = []
    for one, tested, source in ((fresh_trainer, fresh, again), (live_trainer, live, same)):
        one.test(tested, source, verbose=False)
        found.append(float(one.callback_metrics["test/loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_layout_that_rounds_in_another_way_is_said(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.models.policy_config import PolicyConfig

    def started(name: str, layout: str) -> str:
        policy = PolicyConfig(str(tiny), dtype="bfloat16")
        reference = Stored(folder=str(tmp_path / "store"))
        module, data = build(tiny, pairs_folder, policy=policy, optimizer=sgd, reference=reference, layout=layout)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            make_trainer(tmp_path / name, max_steps=1, max_epochs=1).validate(module, data, verbose=False)
        return " ".join(str(one.message) for one in said)

    assert "differ from what is stored" not in started("first", "padded")
    assert "differ from what is stored" not in started("same", "padded")
    assert "differ from what is stored by up to" in started("other", "tree")
