"""What a user types or has on disk reaches the option that it is for, or one clear message."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import read_jsonl, run_command, scored_rows, write_jsonl
from rap_lightning.cli import config_files


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", scored_rows(8))
    return folder


@pytest.mark.parametrize(
    ("command", "weight"), [("fit", "0"), ("inspect", "0"), ("inspect", "-1"), ("inspect", ".nan"), ("relabel", "-1")]
)
def test_the_weight_of_a_source_must_be_above_0(command: str, weight: str, data: Path, tmp_path: Path) -> None:
    text = f"source:\n- {{path: {data}, weight: {weight}}}\n"
    options: list[Any] = []
    if command == "fit":
        text = f"model: {{policy: {{path: nowhere}}}}\ndata:\n  {text.replace('- ', '  - ')}"
    if command == "relabel":
        options = ["--output", tmp_path / "out"]
    (tmp_path / "c.yaml").write_text(text)
    result = run_command(command, "-c", tmp_path / "c.yaml", *options)
    assert result.returncode == 2
    assert f"error: source {data}: weight must be above 0, found" in result.stderr


def test_a_clone_with_several_configs_says_which(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    card = ["---", "configs:"]
    for name in ("preference", "critique"):
        (clone / name).mkdir(parents=True)
        write_jsonl(clone / name / "train.jsonl", scored_rows(5))
        card += [f"- config_name: {name}", f"  data_files: {name}/train.jsonl"]
    (clone / "README.md").write_text("\n".join([*card, "---", ""]))
    result = run_command("inspect", "--source", clone)
    assert "is the clone of a dataset with the configs preference, critique" in result.stderr
    result = run_command("inspect", "--source", f"[{{path: {clone}, config: preference}}]")
    assert result.returncode == 2
    assert "config has no effect on local files" in result.stderr
    assert run_command("inspect", "--source", clone / "preference").returncode == 0


@pytest.mark.parametrize("form", ["-c", "--config", "--config="])
def test_a_config_from_a_pipe_is_read_once(form: str, data: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, f"source: {data}\nexamples: 0\n".encode())
    os.close(write)
    path = f"/dev/fd/{read}"
    try:
        result = run_command("inspect", *([form + path] if form.endswith("=") else [form, path]))
    finally:
        os.close(read)
    assert result.returncode == 0, result.stderr
    assert "8 rows read" in result.stdout


def test_the_copy_of_a_pipe_stands_where_the_pipe_did(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"a: 1\n")
    os.close(write)
    args = ["fit", "-c", "base.yaml", "-c", f"/dev/fd/{read}", "--x", "1"]
    copied = config_files.copy_pipes(args)
    os.close(read)
    assert [*copied[:4], *copied[5:]] == [*args[:4], *args[5:]]
    assert Path(copied[4]).read_text() == "a: 1\n"


def test_a_long_data_file_of_json_is_not_read_as_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """jsonargparse looks for options in any file that an option names, and PyYAML is slow."""
    rows, compose = scored_rows(300), yaml.compose
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert (tmp_path / "rows.json").stat().st_size > 2 * config_files.LONG
    composed: list[int] = []
    monkeypatch.setattr(yaml, "compose", lambda text, *rest: composed.append(len(text)) or compose(text, *rest))
    result = run_command("inspect", "--source", tmp_path / "rows.json", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["splits"][0]["rows_read"] == 300
    assert max(composed, default=0) < config_files.LONG
    text = json.dumps(rows)[:-1]
    assert config_files.load_unique(f"{text}]") == rows
    with pytest.raises(yaml.YAMLError, match="the key a is there twice"):
        config_files.load_unique(f'{text}, {{"a": 1, "a": 2}}]')


@pytest.mark.parametrize("number", ["-2e1", "-20", "-2E+1", "-20."])
def test_a_negative_number_is_a_value_however_it_is_written(number: str, data: Path) -> None:
    result = run_command("inspect", "--source", data, "--goal.scale.low", number)
    assert result.returncode == 0, result.stderr
    assert "scale of -20" in result.stdout.replace("\n", " ")


def test_an_option_after_an_option_is_no_number(data: Path) -> None:
    result = run_command("inspect", "--source", data, "--goal.scale.low", "--json")
    assert result.returncode == 2
    assert "--goal.scale.low: expected a value after it" in result.stderr


@pytest.mark.parametrize("source", ["data", "data/train.jsonl"])
def test_a_cache_that_can_not_be_written_is_not_the_datas_fault(
    source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from rap_lightning.preferences.pair_cache import stored_pairs
    from rap_lightning.preferences.relabelling import Relabelling
    from rap_lightning.preferences.rules import Rules
    from rap_lightning.preferences.sources import Source

    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere/datasets"))
    with pytest.raises(ValueError, match=r"the cache /proc/nowhere\S* can't be used: .*Set HF_HOME"):
        stored_pairs(Source(str(tmp_path / source)), "train", Rules(None, Relabelling("none")))


def test_home_is_expanded_before_anything_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(data)
    (tmp_path / "c.yaml").write_text("model: {policy: {path: ~/none}}\ndata: {source: [{path: ~/data}]}\n")
    result = run_command("fit", "--config=~/c.yaml", "--trainer.accelerator", "cpu")
    assert result.returncode == 2
    assert f"--model.policy.path {tmp_path}/none" in result.stderr
    for command in (
        ["inspect", "--source=~/data", "--dropped", "~/rows"],
        ["relabel", "--source", "~/data", "--output=~/made"],
    ):
        result = run_command(*command)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    assert {"rows", "made"} <= {path.name for path in tmp_path.iterdir()}
    assert not (data / "~").exists()


@pytest.mark.slow
def test_home_is_expanded_in_every_option(
    data: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(data)
    (tmp_path / "c.yaml").write_text("model: {policy: {path: ~/model}}\ndata: {source: [{path: ~/data}]}\n")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    result = run_command("fit", "--config=~/c.yaml", *quiet, "--trainer.default_root_dir=~/runs")
    assert result.returncode == 0, result.stderr[-2000:]
    (checkpoint,) = [p for p in (tmp_path / "runs").rglob("*.ckpt") if not p.is_symlink()]
    short = "~/" + str(checkpoint.relative_to(tmp_path))
    for command in (
        ["inspect", "--source", "~/data", "--tokenizer", "~/model", "--dropped", "~/dropped.jsonl"],
        ["relabel", "--source", "~/data", "--output", "~/relabelled"],
        ["generate", "--model", "~/model", "--prompts", "~/data", "--output", "~/g.jsonl", "--max_new_tokens", "1"],
        ["export", "--checkpoint", short, "--output", "~/exported"],
        ["report", "~/runs/version_0", "--output", "~/page"],
        ["schema", "--output", "~/schema.json"],
        ["configs", "--output", "~/configs"],
    ):
        result = run_command(*command)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    made = {"dropped.jsonl", "relabelled", "g.jsonl", "exported", "page", "schema.json", "configs"}
    assert made <= {path.name for path in tmp_path.iterdir()}
    assert not (data / "~").exists()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_words_for_nothing_are_text_in_texts_and_missing_in_numbers(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    rows = [
        ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"],
        ["q1", "None", "text 1", "9", "1"],
        ["q2", "null", "text 2", "9", "1"],
        ["q3", "NA", "nan", "8", "1"],
        ["q4", "", "text 4", "8", "1"],
        ["q5", "text 5", "N/A", "NA", "2"],
    ]
    separator = "," if kind == "csv" else "\t"
    (folder / f"train.{kind}").write_text("\n".join(separator.join(row) for row in rows) + "\n")
    result = run_command("inspect", "--source", folder, "--json", "--dropped", tmp_path / "dropped.jsonl")
    assert result.returncode == 0, result.stderr + result.stdout
    found = json.loads(result.stdout)
    dropped = read_jsonl(tmp_path / "dropped.jsonl")
    assert [(row["row"], row["column"]) for row in dropped] == [(4, "chosen"), (5, "score_chosen")]
    assert found["splits"][0]["pairs_kept"] == 3
