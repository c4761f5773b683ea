"""Folders, weights and configs that can't be used end in one message before the first step, not in a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import called, run_command, scored_rows, write_jsonl
from rap_lightning.atomic_write import atomic_file
from rap_lightning.cli.config_files import read_yaml
from rap_lightning.distributed.sharded_load import blank_model
from rap_lightning.errors import ConfigError
from rap_lightning.models.model_checks import check_head
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig


def fit(model: Path, data: Path, *more: object) -> Any:
    """Run fit in this process; a traceback would be an exception here."""
    options = [
        "--model.policy.path",
        model,
        "--data.source",
        data,
        "--data.max_length",
        "160",
        "--trainer.max_steps",
        "1",
    ]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return run_command("fit", *options, *quiet, *more)


def refused(result: Any, *expected: str) -> None:
    assert result.returncode == 2, result.stderr[-2000:]
    (message,) = [line for line in result.stderr.splitlines() if "error: " in line]
    for text in expected:
        assert text in message


@pytest.mark.parametrize("place", ["no such file system", "a file", "no room"])
def test_a_run_folder_that_can_not_be_written(place: str, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    if place == "no such file system":
        root = Path("/proc/out")
    elif place == "a file":
        root.write_text("")
    else:
        root.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(root)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting takes privileges")
    try:
        result = fit(tiny, pairs_folder, "--trainer.default_root_dir", root)
    finally:
        subprocess.run(["umount", str(root)], capture_output=True, check=False)
    refused(result, f"{root}/version_0 can't be written", "--trainer.default_root_dir")


@pytest.mark.parametrize("damage", ["empty", "cut off", "another file"])
def test_weights_that_can_not_be_read(damage: str, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    whole = (model / "model.safetensors").read_bytes()
    content = {"empty": b"", "cut off": whole[: len(whole) // 2], "another file": b"PK" * 500}[damage]
    (model / "model.safetensors").write_bytes(content)
    if damage == "cut off":
        refused(fit(model, pairs_folder, "--trainer.default_root_dir", tmp_path / "runs"), "no model could be loaded")
    with pytest.raises(ConfigError, match="no model could be loaded"):
        PolicyConfig(str(model)).load_model(torch.float32)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_generation_config_that_is_none(text: str, tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "generation_config.json").write_text(text)
    config = PolicyConfig(str(model))
    for load in (lambda: config.load_model(torch.float32), lambda: blank_model(config, torch.float32)):
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            load()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_numbers_are_named(value: str, tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    state = load_file(model / "model.safetensors")
    state["model.embed_tokens.weight"][300, 3] = float(value)  # a token that the check of the head doesn't use
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"1 weights have values that are infinite or not a number \(model\.embed_tok"
    ):
        PolicyConfig(str(model)).load_model(torch.float32)
    policy = Policy(PolicyConfig(str(tiny)).load_model(torch.float32))
    policy.causal_lm.model.layers[1].mlp.down_proj.weight.data[3, 4] = float(value)
    with pytest.raises(ConfigError, match=r"not finite: \S+down_proj\.weight \(1 of 2,048") as error:
        check_head(policy)
    assert "report" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trainer:\n  max_steps: 1\n  max_steps: 2\n", 3),
        ("data:\n  source: a\ntrainer: {}\ndata: {}\n", 4),
        ("data: {source: [{path: a, weight: 1, weight: 2}]}\n", 1),
        ("{'a': 1, \"a\": 2}", 1),
    ],
)
def test_a_key_that_is_given_twice(text: str, line: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    assert f"line {line}, " in read_yaml(str(path))[1]
    for command in ("fit", "generate"):
        assert called(command, "-c", path) == 2
        said = capfd.readouterr().err
        assert f"--config {path}: it can't be read as YAML: line {line}, " in said
        assert " is there twice" in said


def test_keys_that_are_equal_in_different_places_or_merged_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "fine.yaml"
    path.write_text("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: [{k: 1}, {k: 1}]\n'1': x\n1: y\n")
    content, problem = read_yaml(str(path))
    assert not problem
    assert content["b"] == {"k": 3, "l": 2}


def test_a_link_where_a_partial_file_goes_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for partial in (tmp_path / f".out.txt.{os.getpid()}.partial", tmp_path / ".named.partial"):
        partial.symlink_to(precious)
        named = tmp_path / ".named.partial" if "named" in partial.name else None
        with atomic_file(tmp_path / "out.txt", partial=named) as file:
            file.write("ours")
        assert precious.read_text() == "mine"
        assert (tmp_path / "out.txt").read_text() == "ours"
        assert not (tmp_path / "out.txt").is_symlink()


def test_rows_and_relabelled_data_do_not_follow_links_either(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", scored_rows(6))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("mine")
    (tmp_path / ".view.partial").symlink_to(precious)
    (tmp_path / ".rows.jsonl.partial").symlink_to(precious / "kept")
    result = run_command("relabel", "--source", data, "--output", tmp_path / "view")
    assert result.returncode == 0, result.stderr
    result = run_command("inspect", "--source", data, "--dropped", tmp_path / "rows.jsonl")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in precious.iterdir()] == ["kept"]
    assert (precious / "kept").read_text() == "mine"


def test_an_output_that_can_not_be_written_is_said_by_any_command(tiny: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", scored_rows(6))
    for command in (["inspect", "--dropped"], ["relabel", "--output"], ["schema", "--output"]):
        source = [] if command[0] == "schema" else ["--source", data]
        result = run_command(*command, data / "below-a-file" / "out", *source)
        refused(result, str(data))
