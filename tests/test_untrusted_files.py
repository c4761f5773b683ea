"""Files of others never run code: checkpoints of every kind with a payload, the files beside them, records of goals."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemWriter, save

from conftest import build, called, make_trainer
from rap_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.integrity import write_index_checksum
from rap_lightning.models.checkpoint.open_saved import open_saved
from rap_lightning.models.checkpoint.read_checkpoint import newest_whole, refuse_damaged
from rap_lightning.models.checkpoint.sharded_folder import INDEX, load_plain, read_index
from rap_lightning.models.references.logp_store import LogpStore
from rap_lightning.onpolicy.requested_goals import template_of
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.training.checks import check_folders_on_load


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


def plain_folder(folder: Path, rate: Any = 0.1) -> Path:
    """What FSDP2 leaves of one weight and an optimizer."""
    state = {
        "state_dict": {"policy.a": torch.ones(4)},
        "optimizer_0": {"state": {"policy.a": {"step": torch.tensor(3.0)}}, "param_groups": {"0": {"lr": rate}}},
    }
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"rap_lightning": {"run_key": "this"}}, folder / "meta.pt")
    write_index_checksum(folder)
    return folder


def in_value(folder: Path, payload: Payload) -> None:
    plain_folder(folder, payload)


def in_index(folder: Path, payload: Payload) -> None:
    index = read_index(plain_folder(folder))
    index.planner_data = payload
    (folder / INDEX).write_bytes(pickle.dumps(index))
    write_index_checksum(folder)


def in_deepspeed(folder: Path, payload: Payload) -> None:
    deepspeed_folder(folder, payload)


def in_deepspeeds_optimizer(folder: Path, payload: Payload) -> None:
    deepspeed_folder(folder, None)
    torch.save({"optimizer_state_dict": payload}, folder / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def in_a_bare_pickle_for_deepspeed(folder: Path, payload: Payload) -> None:
    deepspeed_folder(folder, None)
    (folder / "checkpoint" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(payload))


def outside_of_deepspeeds_folder(folder: Path, payload: Payload) -> None:
    deepspeed_folder(folder.parent / "elsewhere", payload)
    deepspeed_folder(folder, None)
    (folder / "latest").write_text("../elsewhere/checkpoint")


def behind_a_link(folder: Path, payload: Payload) -> None:
    deepspeed_folder(folder.parent / "elsewhere", payload)
    deepspeed_folder(folder, None)
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    (folder / "checkpoint").rmdir()
    (folder / "checkpoint").symlink_to(folder.parent / "elsewhere" / "checkpoint")


def deepspeed_folder(folder: Path, payload: Payload | None) -> None:
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint\n")
    content = {"module": {"policy.a": torch.ones(4)}, "rap_lightning": {"run_key": "this"}, "lr": payload}
    torch.save(content, folder / "checkpoint" / "mp_rank_00_model_states.pt")


FOLDERS: list[Callable[[Path, Payload], None]] = [
    in_value, in_index, in_deepspeed, in_deepspeeds_optimizer, in_a_bare_pickle_for_deepspeed,
    outside_of_deepspeeds_folder, behind_a_link,
]  # fmt: skip


@pytest.mark.parametrize("plant", FOLDERS, ids=lambda plant: str(plant.__name__))
def test_code_in_a_sharded_checkpoint_is_refused_on_every_way_in(plant: Any, marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "step=4.ckpt"
    plant(folder, Payload(marker))
    for way_in in (refuse_damaged, open_saved):
        with pytest.raises(ConfigError, match=r"is refused: it holds \w+\.system|can't be read|which isn't there"):
            way_in(folder)
    said: list[str] = []
    assert newest_whole(tmp_path / "runs", lambda path: True, said.append) is None
    assert "skipping: " in said[0]
    assert not marker.exists()


@pytest.mark.parametrize("plant", [in_value, in_index], ids=lambda plant: str(plant.__name__))
def test_a_strategy_reads_shards_without_running_their_code(plant: Any, marker: Path, tmp_path: Path) -> None:
    plain = plain_folder(tmp_path / "plain")
    state: dict[str, Any] = {"optimizer_0": {"param_groups": {"0": {"lr": 0.0}}}}
    load_plain(state, plain)
    assert state["optimizer_0"]["param_groups"]["0"]["lr"] == 0.1
    plant(tmp_path / "evil", Payload(marker))
    with pytest.raises(BaseException, match=r"system|Weights only load failed"):  # torch's is no Exception
        load_plain(state, tmp_path / "evil")
    assert not marker.exists()


@pytest.mark.parametrize("plant", [in_value, in_index, in_deepspeed], ids=lambda plant: str(plant.__name__))
def test_a_trainer_in_python_refuses_code_in_a_folder_before_its_strategy_reads_it(
    plant: Any, marker: Path, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    plant(tmp_path / "evil", Payload(marker))
    module, data = build(tiny, pairs_folder)
    with pytest.raises(ConfigError, match=r"is refused: it holds \w+\.system"):
        make_trainer(tmp_path, max_steps=1).fit(module, data, ckpt_path=tmp_path / "evil")
    strategy = ModelParallelStrategy()
    check_folders_on_load(strategy)
    with pytest.raises(ConfigError, match=r"is refused: it holds \w+\.system"):
        strategy.load_checkpoint(tmp_path / "evil")
    assert not marker.exists()


@pytest.mark.parametrize("given", ["its path", "last"])
def test_fit_refuses_code_in_shards(
    given: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rap_lightning.cli import trainer_cli

    monkeypatch.setattr(trainer_cli, "run_key_of", lambda options: "this")
    folder = tmp_path / "runs" / "version_0" / "step=4.ckpt"
    in_value(folder, Payload(marker))
    options = ["--model.policy.path", "nowhere", "--data.source", "nowhere", "--trainer.accelerator", "cpu"]
    path = str(folder) if given == "its path" else "last"
    more = ["--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.strategy", "fsdp2", "--ckpt_path", path]
    assert called("fit", *options, *more) == 2
    said = capfd.readouterr().err
    assert "__0_0.distcp is refused: it holds posix.system, and unpickling it would run that" in said
    assert "Traceback" not in said
    assert not marker.exists()


def test_code_in_a_single_file_is_refused(marker: Path, tmp_path: Path) -> None:
    torch.save({"rap_lightning": {}, "state_dict": Payload(marker)}, tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match="holds more than plain values and tensors"):
        open_saved(tmp_path / "one.ckpt")
    for weights_only in (None, True):
        with pytest.raises(pickle.UnpicklingError):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "one.ckpt", weights_only=weights_only)
    with pytest.raises(pickle.UnpicklingError):  # which Lightning by itself unpickles where no choice is made
        AtomicCheckpointIO().load_checkpoint(f"file://{tmp_path / 'one.ckpt'}")
    assert not marker.exists()


def test_stored_rewards_and_log_probabilities_are_never_unpickled(marker: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "rewards.npz", keys=np.array([Payload(marker)], dtype=object), values=np.ones(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        _ = RewardTable(tmp_path / "rewards.npz").rewards
    store = LogpStore(tmp_path, {"model": "one"})
    with io.BytesIO() as file:
        torch.save(Payload(marker), file)
        (store.folder / "a.safetensors").write_bytes(file.getvalue())
    with pytest.raises(ConfigError, match=r"a\.safetensors is refused"):
        store.refresh()
    assert not marker.exists()


@pytest.mark.parametrize("change", ["template", "scale"])
def test_a_goal_record_names_goal_templates_and_scales_only(change: str) -> None:
    record = OverallGoal().record()
    template_of(record)
    record |= {"template": "rap_lightning.cli.main.main"} if change == "template" else {}
    record["scale"] |= {"class": "fields"} if change == "scale" else {}
    with pytest.raises(ConfigError, match="goal record can't be read"):
        template_of(record)
