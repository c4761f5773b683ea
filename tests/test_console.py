"""The lines that stand in for progress bars: nothing that takes long is silent."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments import slurm

from conftest import build, make_trainer, run_command
from rap_lightning.callbacks import ConsoleLines
from rap_lightning.callbacks import console_lines as console
from rap_lightning.cli import trainer_cli
from rap_lightning.losses import DPO
from rap_lightning.preferences.sources import VALIDATION_NAMES


def lines(folder: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    module, datamodule = build(model, data, loss=DPO(0.5), batch_size=4)
    trainer = make_trainer(folder, callbacks=[ConsoleLines()], max_steps=3, num_sanity_val_steps=1, **options)
    trainer.fit(module, datamodule)
    trainer.test(module, datamodule, verbose=False)
    return capsys.readouterr().out.splitlines()


def test_what_comes_before_the_first_line_of_training_is_announced(
    tiny: Path, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = lines(tmp_path, tiny, pairs_folder, capsys, log_every_n_steps=2)
    assert said[:2] == [
        "sanity-checking validation on one batch",
        "training: steps 1 to 3, a line every 2 and for the first",
    ]
    assert said[2].startswith("step 1/3 ")
    assert not any(": batch " in line for line in said), "what is quick needs no lines of its own"


def test_data_without_a_validation_split_announce_no_validation_and_warn_of_nothing(
    tiny: Path, pairs_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(pairs_folder, tmp_path / "data"))
    for split in VALIDATION_NAMES:
        for file in data.glob(f"{split}*"):
            file.unlink()
    common = ["--model.policy.path", tiny, "--data.source", data, "--data.max_length", "160", "--trainer.accelerator"]
    common += ["cpu", "--trainer.default_root_dir", tmp_path / "runs"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = run_command(
            "fit", *common, "--export.enabled", "false", "--trainer.max_steps", "1", "--trainer.log_every_n_steps", "1"
        )
    assert done.returncode == 0, done.stderr
    assert f"no validation: {data} has no split named validation" in caplog.text
    assert "sanity" not in done.stdout
    assert not [str(one.message) for one in caught if "zero" in str(one.message)]
    done = run_command("validate", *common)
    assert done.returncode == 2
    assert f"error: {data} has no split to validate on. Name one with --data.val_split." in done.stderr


def test_long_validations_and_tests_say_how_far_they_are(
    tiny: Path, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    said = lines(tmp_path, tiny, pairs_folder, capsys, val_check_interval=3)
    batches = 5  # 18 pairs, 4 a batch
    for what in ("validation", "test"):
        found = [line.partition(",")[0] for line in said if line.startswith(f"{what}: batch")]
        assert found == [f"{what}: batch {i}/{batches}" for i in range(1, batches)]
    assert any(line.startswith("validation at step 3 ") for line in said)


@pytest.mark.parametrize("in_slurm", [False, True])
def test_srun_is_advised_within_slurm_only(in_slurm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    if in_slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm, "_is_srun_used", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_cli._set_up_libraries()
        slurm.SLURMEnvironment._validate_srun_used()
    assert any("srun" in str(one.message) for one in caught) is in_slurm
