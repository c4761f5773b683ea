"""Inputs of public bug reports, each with the command that its README names.

The kinds of fault have tests on inputs of their own. These inputs are kept outside the repository, and the tests are
skipped without them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, run_command

CASES = ROOT.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the reported cases are not at {CASES}")


def fit(model: str = "model", *more: str) -> list[str]:
    return [
        "fit", "--model.policy.path", model, "--data.source", "pairs", "--trainer.accelerator", "cpu",
        "--trainer.max_steps", "4", "--data.batch_size", "4", "--data.max_length", "256",
        "--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3", *more,
    ]  # fmt: skip


def inspect(source: str, model: str = "model") -> list[str]:
    return ["inspect", "--source", source, "--tokenizer", model]


def messages(*more: str) -> list[str]:
    return ["fit", "-c", "base.yaml", *more]


REFUSED: list[tuple[str, list[str], str]] = [
    ("four-bit-checkpoint", fit(), "4-bit bitsandbytes.*can't be trained"),
    ("missing-weights", fit("onemissing", "--model.policy.lora.r", "4"), r"1 missing \(model\.layers\.1\.mlp\.up_proj"),
    ("mixed-kinds-in-a-folder", inspect("pairs"), r"would be left out: train-1\.jsonl"),
    ("template-loses-text", fit("parts-model"), "does not write the text of user messages"),
    ("messages", messages("-c", "weight.yaml"), "weight must be above 0, found 0"),
    ("messages", inspect("clone"), "configs preference, feedback.*Name the files or the folder of one"),
    ("messages", messages("--data.source", "[{path: clone, config: preference}]"), "config has no effect on local"),
    ("messages", messages("--trainer.default_root_dir", "/proc/out"), "run's folder /proc/out.*can't be written"),
]


@pytest.mark.parametrize(("case", "command", "expected"), REFUSED, ids=lambda one: one if isinstance(one, str) else "")
def test_a_reported_input_is_refused_in_one_message(
    case: str, command: list[str], expected: str, tmp_path: Path
) -> None:
    if command[0] == "fit" and "/proc/out" not in command:
        command = [*command, "--trainer.default_root_dir", str(tmp_path)]
    done = run_command(*command, cwd=CASES / case)
    assert done.returncode in (1, 2)
    assert re.search(expected, done.stderr), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert "step 1/" not in done.stdout + done.stderr


READ: list[tuple[str, list[str], str]] = [
    ("folder-named-like-a-kind", inspect("parquet"), "3 rows read, 3 pairs kept"),
    ("folder-named-like-a-kind", inspect("./parquet"), "3 rows read, 3 pairs kept"),
    ("folder-name-is-a-glob", inspect("run[12]"), "2 rows read, 2 pairs kept"),
    ("source-dot/pairs", inspect(".", "../model"), "8 rows read, 8 pairs kept"),
    ("source-dot/pairs", inspect("./", "../model"), "8 rows read, 8 pairs kept"),
    ("system-column", inspect("system"), "Answer as a pirate"),
    ("think-tokens-become-text", inspect("pairs", "think-model"), "⟦<think>⟧"),
    ("messages", inspect("csvdata"), "8 rows read, 8 pairs kept"),  # responses None, null and NA are text
]


@pytest.mark.parametrize(("case", "command", "expected"), READ, ids=lambda one: one if isinstance(one, str) else "")
def test_a_reported_input_is_read_as_it_stands(case: str, command: list[str], expected: str) -> None:
    done = run_command(*command, cwd=CASES / case)
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout
    assert "imitates a control token" not in done.stdout


def test_tools_of_json_lines_and_parquet_are_the_same_prompts(tmp_path: Path) -> None:
    shown = [run_command(*inspect(f"tools_{kind}"), cwd=CASES / "tools").stdout for kind in ("jsonl", "parquet")]
    first, second = (
        re.sub(r"tools_(jsonl|parquet)|train\.\w+ (line|row)", "", text) for text in shown
    )  # the names of files alone may differ
    assert '"parameters"' in first
    assert first == second
    output = tmp_path / "relabelled"
    done = run_command(
        "relabel", "--source", "tools_jsonl", "--tokenizer", "model", "--output", output, cwd=CASES / "tools"
    )
    assert done.returncode == 0
    assert any(b"tools" in file.read_bytes() for file in output.rglob("*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "command"),
    [
        ("adapter-tokenizer", fit("base", "--model.policy.adapter", "adapter")),
        ("generation-config", fit()),
        ("named-templates", fit()),
        ("prompt-is-no-prefix", fit("mistral-style")),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_reported_model_is_trained_and_exported_whole(case: str, command: list[str], tmp_path: Path) -> None:
    done = run_command(*command, "--trainer.default_root_dir", tmp_path, cwd=CASES / case)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "version_0" / "hf"
    given = CASES / case / command[command.index("--model.policy.path") + 1]
    if case == "adapter-tokenizer":
        assert (CASES / case / "adapter" / "chat_template.jinja").read_text() in (
            folder / "chat_template.jinja"
        ).read_text()
    elif case == "generation-config":
        assert json.loads((folder / "generation_config.json").read_text())
    elif case == "named-templates":
        assert (folder / "additional_chat_templates").stat().st_mode & 0o777 == 0o755
    else:
        assert (given / "chat_template.jinja").read_text() in (folder / "chat_template.jinja").read_text()
        shown = run_command(*inspect("pairs", "mistral-style"), cwd=CASES / case)
        assert "8 rows read, 8 pairs kept" in shown.stdout


@pytest.mark.slow
def test_reported_data_that_changed_before_a_resume_are_refused(tmp_path: Path) -> None:
    case = CASES / "resume-after-data-changed"
    (tmp_path / "pairs").mkdir()
    shutil.copytree(case / "model", tmp_path / "model")
    more = ("--trainer.default_root_dir", str(tmp_path / "runs"))
    shutil.copy(case / "before.jsonl", tmp_path / "pairs" / "train.jsonl")
    assert run_command(*fit(), *more, cwd=tmp_path).returncode == 0
    shutil.copy(case / "after.jsonl", tmp_path / "pairs" / "train.jsonl")
    again = [*fit(), *more, "--ckpt_path", "last"]
    again[again.index("--trainer.max_steps") + 1] = "12"
    done = run_command(*again, cwd=tmp_path)
    assert done.returncode == 2
    assert "the checkpoint was trained on other data" in done.stderr


@pytest.mark.slow
def test_two_reported_runs_started_together_have_a_folder_each(start_process: Any, tmp_path: Path) -> None:
    case = CASES / "two-runs-at-once"
    command = fit(str(case / "model"), "--trainer.default_root_dir", str(tmp_path / "runs"))
    command[command.index("pairs")] = str(case / "pairs")
    runs = [start_process([*command, *more]) for more in (
        ("--seed_everything", "1"), ("--seed_everything", "2", "--model.loss", "IPO"))]  # fmt: skip
    for one in runs:
        one.process.join(240)
        assert one.process.exitcode == 0
    configs = [(tmp_path / "runs" / f"version_{n}" / "config.yaml").read_text() for n in (0, 1)]
    assert sorted("IPO" in text for text in configs) == [False, True]
    for n in (0, 1):
        assert (tmp_path / "runs" / f"version_{n}" / "hf" / "model.safetensors").is_file()
