"""Checkpoint files: whole or not there, known when damaged, kept by rule, and never in the place of a better one."""

import errno
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, make_trainer, sgd
from rap_lightning.callbacks import AtomicCheckpointIO, Checkpoints, WholeSteps
from rap_lightning.errors import ConfigError, NotFinite, NotSaved
from rap_lightning.models.checkpoint import integrity
from rap_lightning.models.checkpoint.integrity import partial_of, verify, write_whole
from rap_lightning.models.checkpoint.read_checkpoint import newest_whole, read_checkpoint, refuse_damaged
from test_fit import assert_same, logged, weights
from test_resume import StopIn


def content() -> dict[str, Any]:
    return {"weights": torch.arange(60.0), "step": 3, "rap_lightning": {}}


def fit(run: Path, model: Path, data: Path, saver: Checkpoints, *callbacks: Any, **options: Any) -> Any:
    module, source = build(model, data, optimizer=sgd, lora=options.pop("lora", False))
    ckpt = options.pop("ckpt_path", None)
    trainer = make_trainer(
        run, enable_checkpointing=True, plugins=[AtomicCheckpointIO()], callbacks=[saver, WholeSteps(), *callbacks],
        **({"max_steps": 6} | options),
    )  # fmt: skip
    trainer.fit(module, source, ckpt_path=ckpt, weights_only=True)
    return module


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_is_an_ordinary_archive_whose_checksums_torch_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_whole(content(), path)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], content()["weights"])
    assert verify(path)
    torch.save(content(), tmp_path / "plain.ckpt")
    assert verify(tmp_path / "plain.ckpt"), "whoever wrote it"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), tmp_path / "without.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not verify(tmp_path / "without.ckpt"), "not a fault, but not verified"
    with pytest.warns(UserWarning, match="without.ckpt has no checksums, so it is loaded without being verified"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "without.ckpt", weights_only=True)


def test_every_flipped_bit_is_found_or_changes_nothing_and_every_cut_is_found(tmp_path: Path) -> None:
    """A zip archive has bits that nobody reads: padding, dates. All bits of what is loaded have a checksum."""
    write_whole(content(), tmp_path / "a.ckpt")
    whole, path, found = (tmp_path / "a.ckpt").read_bytes(), tmp_path / "b.ckpt", 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(changed)
        try:
            loaded = read_checkpoint(path)
        except ConfigError as error:
            assert re.search(r"is refused|can't be read", str(error))  # noqa: PT017
            found += 1
        else:
            assert loaded["step"] == 3
            assert torch.equal(loaded["weights"], content()["weights"])
    weights = whole.index(content()["weights"].numpy().tobytes())
    for place in range(weights, weights + 240):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ConfigError, match="is refused: its content is not what was written"):
            refuse_damaged(path)
    assert found > len(whole) / 2
    for length in random.Random(0).sample(range(len(whole)), 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="cut off"):
            refuse_damaged(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_whole(content(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(integrity.os, "fsync", full)
    with pytest.raises(NotSaved, match=r"a\.ckpt was not written: No space left on device.*Make room"):
        AtomicCheckpointIO().save_checkpoint(content(), path)
    assert path.read_bytes() == before
    assert names(tmp_path) == {"a.ckpt"}, "nor half a file"


def test_a_folder_that_may_not_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotSaved, match=r"was not written: (Not a directory|File exists)"):
        AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "file" / "a.ckpt")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="a small disk takes root to make")
def test_a_real_disk_that_is_full_costs_the_run_nothing(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """On a tmpfs of 700 kB there is room for one checkpoint of 270 kB, and not for a second beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        saver = Checkpoints(disk / "saved", every_n_train_steps=2, save_top_k=1, save_last="link")
        with pytest.warns(UserWarning, match=r"was not written: it takes about .* Training continues") as said:
            module = fit(tmp_path / "run", tiny, pairs_folder, saver, default_root_dir=tmp_path / "root")
        assert sum("Training continues" in str(one.message) for one in said) == 2
        assert names(disk / "saved") == {"epoch=0-step=2.ckpt", "last.ckpt"}
        assert verify(disk / "saved" / "last.ckpt")
        assert [row["step"] for row in logged(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]
        (rescued,) = (tmp_path / "root").rglob("*.ckpt")
        assert any(f"is {rescued} instead" in str(one.message) for one in said)
        state = torch.load(rescued, weights_only=True)["state_dict"]
        assert_same({n: state[f"policy.{n}"] for n in weights(module)}, weights(module))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_where_no_disk_has_room_for_the_last_checkpoint_the_run_fails(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    saver = Checkpoints(tmp_path / "saved", every_n_train_steps=2)
    with (
        pytest.warns(UserWarning, match=r"has 0 MB left .*Training continues\. The newest checkpoint is none yet"),
        pytest.raises(NotSaved, match="Make room"),
    ):
        fit(tmp_path / "run", tiny, pairs_folder, saver)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_and_has_room_again_later(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync = [0], os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 3:  # a file and its folder have been written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(integrity.os, "fsync", full)
    saver = Checkpoints(tmp_path / "saved", every_n_train_steps=2, save_top_k=1, save_last="link")
    with pytest.warns(
        UserWarning, match=r"step=4\.ckpt was not written: No space left .*newest checkpoint is .*step=2"
    ):
        module = fit(tmp_path / "run", tiny, pairs_folder, saver)
    assert names(tmp_path / "saved") == {"epoch=0-step=6.ckpt", "last.ckpt"}
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert_same({n: saved["state_dict"][f"policy.{n}"] for n in weights(module)}, weights(module))


def test_the_last_k_and_the_best_by_a_metric_are_kept(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    last = Checkpoints(tmp_path / "last", every_n_train_steps=1, monitor="step", mode="max", save_top_k=2)
    best = Checkpoints(
        tmp_path / "best", monitor="val/loss", mode="min", save_top_k=1, filename="{step}",
        auto_insert_metric_name=False,
    )  # fmt: skip
    fit(tmp_path / "run", tiny, pairs_folder, last, best, val_check_interval=2)
    assert names(tmp_path / "last") == {"epoch=0-step=5.ckpt", "epoch=0-step=6.ckpt"}
    means = {row["val/loss"]: int(row["step"]) for row in logged(tmp_path / "run") if "val/loss" in row}
    assert names(tmp_path / "best") == {f"{means[min(means)]}.ckpt"}


def test_last_always_points_to_a_whole_checkpoint(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file system is asked for, at no moment is ``last.ckpt`` gone or pointing nowhere."""
    link, looked = tmp_path / "saved" / "last.ckpt", []

    def watched(name: str) -> None:
        original = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            if looked or os.path.lexists(link):
                looked.append(link.is_file())
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("remove", "unlink", "replace", "rename", "symlink", "rmdir"):
        watched(name)
    saver = Checkpoints(tmp_path / "saved", every_n_train_steps=1, save_top_k=1, save_last="link")
    fit(tmp_path / "run", tiny, pairs_folder, saver)
    assert len(looked) > 10
    assert all(looked)


def test_weights_that_are_not_finite_are_never_written(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                with torch.no_grad():
                    next(module.policy.parameters())[5, 5] = float("inf")

    saver = Checkpoints(tmp_path / "saved", every_n_train_steps=1, save_top_k=1, save_on_exception=True)
    with pytest.raises(NotFinite, match=r"step=3\.ckpt is not written: .*embed_tokens.weight \(1 of 16,384 values\)"):
        fit(tmp_path / "run", tiny, pairs_folder, saver, Break())
    assert names(tmp_path / "saved") == {"epoch=0-step=2.ckpt"}


def test_an_exception_within_an_update_writes_no_half_step(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    class Torn(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the driver has gone away")
            return result

    module, source = build(tiny, pairs_folder, optimizer=lambda params: Torn(params, lr=0.1))
    saver = Checkpoints(tmp_path / "saved", every_n_train_steps=1, save_on_exception=True)
    trainer = make_trainer(tmp_path / "run", enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(RuntimeError, match="driver"), pytest.warns(UserWarning, match="weights were being updated"):
        trainer.fit(module, source)
    assert names(tmp_path / "saved") == {"epoch=0-step=2.ckpt"}


def test_a_damaged_checkpoint_is_refused_and_another_one_named(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    saver = Checkpoints(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, save_last="link")
    fit(tmp_path / "run", tiny, pairs_folder, saver)
    newest = tmp_path / "saved" / "epoch=0-step=6.ckpt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    newest.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"is refused: its content is not what was written"):
        fit(tmp_path / "again", tiny, pairs_folder, Checkpoints(), ckpt_path=str(newest), max_steps=8)
    with pytest.raises(ConfigError, match=r"The newest whole one there is .*step=4\.ckpt: use that instead"):
        refuse_damaged(tmp_path / "saved" / "last.ckpt")
    newest.unlink()
    with pytest.raises(ConfigError, match=r"points to epoch=0-step=6\.ckpt, which is gone.*step=4\.ckpt"):
        refuse_damaged(tmp_path / "saved" / "last.ckpt")


def test_the_newest_whole_checkpoint_is_found_and_others_are_said(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c", "d")):
        write_whole(content() | {"name": name}, tmp_path / "runs" / name / f"{name}.ckpt")
        os.utime(tmp_path / "runs" / name / f"{name}.ckpt", (number, number))
    (tmp_path / "runs/d/d.ckpt").write_bytes((tmp_path / "runs/d/d.ckpt").read_bytes()[:-200])
    os.utime(tmp_path / "runs/d/d.ckpt", (9, 9))
    partial_of(tmp_path / "runs/d/e.ckpt").write_bytes(b"a run that was killed leaves this")
    said: list[str] = []
    found = newest_whole(tmp_path / "runs", lambda path: path.stem != "c", said.append)
    assert found == tmp_path / "runs/b/b.ckpt"
    assert len(said) == 2
    assert "d.ckpt" in said[0]
    assert said[1].startswith("skipping, of runs with other model, data or seed_everything options")
    assert said[1].endswith("runs/c/c.ckpt")
    assert newest_whole(tmp_path / "nowhere", lambda path: True, said.append) is None


def test_a_stop_in_the_middle_of_saving_lets_it_end(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """A second SIGTERM while the checkpoint of the first is written."""
    import signal

    from lightning.pytorch import Callback

    class Terminate(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_exception(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    saver = Checkpoints(tmp_path / "saved", save_on_exception=True)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", tiny, pairs_folder, saver, Terminate())
    assert stop.value.code == 143
    assert verify(tmp_path / "saved" / "epoch=0-step=3.ckpt")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_that_fails_alone_does_not_wait_for_the_others(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Checkpoints(tmp_path / "saved", save_on_exception=True)
    original = saver.on_exception

    def as_one_of_two(trainer: Any, *args: Any) -> None:
        monkeypatch.setattr(type(trainer), "world_size", property(lambda self: 2))
        with pytest.warns(UserWarning, match="one rank.s error ends the run, and saving takes all 2"):
            original(trainer, *args)

    monkeypatch.setattr(saver, "on_exception", as_one_of_two)
    from test_fit import StopAt

    with pytest.raises(StopAt):
        fit(tmp_path / "run", tiny, pairs_folder, saver, StopIn("on_train_batch_start", 3))
    assert not (tmp_path / "saved").exists()
