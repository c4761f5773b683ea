"""The command line as a stranger meets it: help, configs, overlays, wrong input, Ctrl-C, two processes."""

import csv
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cli_process import RankPair
from conftest import ROOT, call, run_command, scored_rows, write_jsonl
from rap_lightning.cli import main as cli
from rap_lightning.losses import DPO, SimPO

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "rounds")
COMMAND = [sys.executable, "-m", "rap_lightning.cli.main"]


@pytest.fixture
def config(tiny: Path, pairs_folder: Path, tmp_path: Path) -> Path:
    """A run of a few seconds."""
    content = {
        "model": {
            "policy": {"path": str(tiny)},
            "loss": {"class_path": "DPO", "init_args": {"beta": 0.5, "label_smoothing": 0.1}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"source": str(pairs_folder), "max_length": 160, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path / "runs"), "log_every_n_steps": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_neither_torch_nor_lightning(flag: str) -> None:
    code = (
        "import sys; from rap_lightning.cli.main import main\n"
        f"try: main(['{flag}'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "rap-lightning" in result.stdout
    assert time.perf_counter() - started < 5, "under a second on an idle machine; this one may be busy"


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fitt"])
    assert stop.value.code == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_opens_with_its_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    name = str(path.relative_to(ROOT))
    first = path.read_text().splitlines()[0]
    assert first.startswith("# rap-lightning fit ")
    assert first.endswith(name)
    arguments = first.removeprefix("# rap-lightning ").split()
    assert call(monkeypatch, *arguments, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]


def test_the_recipes_say_where_they_leave_the_paper() -> None:
    """Every key the paper fixes is there, and a value that isn't the paper's has a comment that says why."""
    paper: dict[str, Any] = {
        "model.loss.init_args.beta": 0.01,
        "model.optimizer.init_args.lr": 5e-7,
        "model.schedule.init_args.warmup_ratio": 0.1,
        "data.max_length": 1024,
        "data.max_prompt_length": 512,
        "trainer.max_epochs": 1,
        "trainer.precision": "bf16-mixed",
        "trainer.devices": 8,
        "seed_everything": 42,
    }
    smoothing = {"qwen2-7b-instruct": 0.3, "gemma-2-9b-it": 0.3}
    recipes = [path for path in CONFIGS if "instruct" in path.stem or "-it" in path.stem]
    assert len(recipes) == 6
    for path in recipes:
        text, content = path.read_text(), yaml.safe_load(path.read_text())

        def value(key: str, node: Any = content) -> Any:
            for part in key.split("."):
                node = node[part]
            return node

        wanted = paper | {"model.loss.init_args.label_smoothing": smoothing.get(path.stem, 0.0)}
        for key, expected in wanted.items():
            if value(key) != expected:
                line = next(line for line in text.splitlines() if re.search(rf"\b{key.rsplit('.', 1)[1]}:", line))
                comment = line.partition("#")[2]
                assert re.search(r"the paper's \S+ .{8,}|= the paper's", comment), (
                    f"{path.name}: {key} differs from the paper without a word"
                )
        ranks = value("trainer.devices") * content["trainer"].get("num_nodes", 1)
        assert value("data.batch_size") * ranks * value("trainer.accumulate_grad_batches") == 128
        assert value("trainer.val_check_interval") == 100 * value("trainer.accumulate_grad_batches")


def test_print_config_round_trips_into_a_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "fit", "--config", str(config), "--print_config") == 0
    whole = tmp_path / "whole.yaml"
    whole.write_text(capfd.readouterr().out)
    assert call(monkeypatch, "fit", "--config", str(whole), "--trainer.max_steps", "2") == 0
    run = tmp_path / "runs" / "version_0"
    assert float(rows(run)[0]["loss"]) == pytest.approx(0.693147, abs=1e-6)
    printed_steps = capfd.readouterr().out
    for row in rows(run)[:2]:  # the console says what the log says, at the same step
        assert f"step {row['step']}/2  loss {float(row['loss']):.4f}" in printed_steps
    assert {"config.yaml", "metrics.csv", "data_report.json", "hf", "checkpoints"} <= {p.name for p in run.iterdir()}
    report = json.loads((run / "data_report.json").read_text())
    assert {(part["split"], part["rows_read"], part["relabelled_pairs"]) for part in report} == {
        ("train", 23, 46), ("test", 9, 18),
    }  # fmt: skip
    # the run's own record of its config runs again
    again = ["fit", "--config", str(run / "config.yaml"), "--trainer.max_steps", "1"]
    assert call(monkeypatch, *again) == 0


def test_help_lists_every_loss_with_a_line_of_its_docstring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loss_cases import LOSSES

    assert call(monkeypatch, "fit", "--help") == 0
    text = capsys.readouterr().out
    for kind in LOSSES:
        first = inspect.cleandoc(kind.__doc__).splitlines()[0]
        assert re.search(rf"^  {kind.__name__} +{re.escape(first)}$", text, re.MULTILINE), kind.__name__
    assert "RewardAwareLoss " not in text, "what can't be named in a config is no choice"


def test_help_teaches_the_options_of_a_run_that_can_be_trusted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "fit", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for taught in (
        "continue training this LoRA adapter, a peft folder or Hub id (safetensors only)",
        "hold the base model's weights in 4", "a parameter is not trained if its name contains a match",
        "scale rotary positions for longer texts",
        "--guard.non_finite", "skip: leave that step out", "--watchdog.chosen_drop", "Only on request",
    ):  # fmt: skip
        assert taught in text, taught


def test_a_mixture_and_a_following_reference_train_from_overlays(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlays = [arg for name in ("mpo", "tr-dpo") for arg in ("-c", str(ROOT / f"configs/loss/{name}.yaml"))]
    steps = ["--trainer.max_steps", "3", "--model.reference.every", "2"]
    assert call(monkeypatch, "fit", "-c", str(config), *overlays, *steps) == 0
    run = tmp_path / "runs" / "version_0"
    first = rows(run)[0]
    whole = 0.8 * float(first["loss/DPO"]) + 0.2 * float(first["loss/BCO"]) + float(first["loss/SFT"])
    assert float(first["loss"]) == pytest.approx(whole, rel=1e-4)
    written = yaml.safe_load((run / "config.yaml").read_text())["model"]["loss"]["init_args"]["losses"]
    assert [part["class_path"].rpartition(".")[2] for part in written] == ["DPO", "BCO", "SFT"]
    again = ["fit", "--config", str(run / "config.yaml"), "--trainer.max_steps", "1"]
    assert call(monkeypatch, *again) == 0, "the run's own record runs again"
    last = str(run / "checkpoints" / "last.ckpt")
    assert call(monkeypatch, "export", "--checkpoint", last, "--output", str(tmp_path / "out")) == 0


def parsed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert call(monkeypatch, "fit", *args, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_an_overlay_swaps_the_loss_and_starts_from_its_own_defaults(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = parsed(monkeypatch, capsys, "-c", str(config), "-c", str(ROOT / "configs/loss/simpo.yaml"))["model"]["loss"]
    assert loss["class_path"].endswith(".SimPO")
    assert loss["init_args"] == {"beta": 2.0, "gamma": 1.0}
    # named alone, a class must not inherit the beta of the one it replaces
    loss = parsed(monkeypatch, capsys, "-c", str(config), "--model.loss", "SimPO")["model"]["loss"]
    assert loss["init_args"] == {"beta": SimPO().beta, "gamma": SimPO().gamma}
    loss = parsed(monkeypatch, capsys, "-c", str(config), "--model.loss", "Hinge", "--model.loss.beta", "0.2")["model"]
    assert loss["loss"]["init_args"] == {"beta": 0.2}
    # an option alone changes the class that is there
    loss = parsed(monkeypatch, capsys, "-c", str(config), "--model.loss.beta", "0.2")["model"]["loss"]
    assert loss["init_args"] == {"beta": 0.2, "label_smoothing": 0.1}
    bare = parsed(monkeypatch, capsys, "--model.policy.path", "x", "--data.source", "y", "--model.loss.beta", "0.3")
    assert bare["model"]["loss"]["init_args"] == {"beta": 0.3, "label_smoothing": DPO().label_smoothing}


def test_classes_of_the_users_own_work_by_import_path(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_losses.py").write_text(
        "import torch\n"
        "from rap_lightning import PreferenceLoss, PreferenceModule\n"
        "class Square(PreferenceLoss):\n"
        "    def forward(self, policy, reference):\n"
        "        h = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)\n"
        "        return (self.beta * h - 1) ** 2\n"
        "class Doubled(PreferenceModule):\n"
        "    def pair_losses(self, policy, reference, rewards):\n"
        "        losses, implicit = super().pair_losses(policy, reference, rewards)\n"
        "        return 2 * losses, implicit\n"
    )
    monkeypatch.chdir(tmp_path)
    steps = ["--trainer.max_steps", "1", "--config", str(config)]
    assert call(monkeypatch, "fit", *steps, "--model.loss", "mine_losses.Square", "--model.loss.beta", "0.2") == 0
    assert float(rows(tmp_path / "runs" / "version_0")[0]["loss"]) == pytest.approx(1.0)
    assert call(monkeypatch, "fit", "--model", "mine_losses.Doubled", *steps) == 0
    assert float(rows(tmp_path / "runs" / "version_1")[0]["loss"]) == pytest.approx(2 * 0.693147, abs=1e-5)


WRONG: list[tuple[list[str], str]] = [
    (["--data.source", "/nowhere/pairs.jsonl"], r"no such file or folder"),
    (["--data.source", "no-such-folder"], r"no such file or folder"),
    (["--data.sourc", "x"], r"data\.sourc"),
    (["--data.batch_size", "many"], r"data\.batch_size.*\n?.*(int|many)"),
    (["--data.batch_size", "0"], r"batch_size must be at least 1"),
    (["--data.layout", "spiral"], r"data\.layout.*\n?.*(auto|padded)"),
    (["--model.loss", "DPOO"], r"DPOO"),
    (["--model.loss", "SimPO", "--model.loss.label_smoothing", "0.1"], r"label_smoothing"),
    (["--model.loss.beta", "-1"], r"beta must be above 0"),
    (["--model.loss", "RobustDPO", "--model.loss.label_smoothing", "0.5"], r"must be from 0 to below 0\.5"),
    (["--model.loss", "Hinge", "--model.loss.label_smoothing", "0.1"], r"label_smoothing"),
    (["--model.loss", "KTO", "--data.batch_size", "1"], r"KTO needs at least 2 pairs in a batch.*batch_size 1"),
    (["-c", str(ROOT / "configs/loss/mpo.yaml"), "--model.loss.weights", "[0, 0, 0]"], r"sum to more than 0"),
    (["-c", str(ROOT / "configs/loss/tr-dpo.yaml"), "--model.policy.lora.r", "4"], r"with an adapter alpha must be 1"),
    (["--model.loss", "my_pkg.Nowhere"], r"my_pkg\.Nowhere"),
    (["--model.reference", "AdaptersOff"], r"needs an adapter"),
    (["--model.loss", "SimPO", "--model.reference", "Frozen"], r"needs no reference"),
    (["--model.policy.path", "/nowhere/model"], r"--model\.policy\.path /nowhere/model"),
    (["--data.goal", "null", "--data.predict.goal", "3"], r"predict\.goal has no effect"),
    (["--data.predict.goal", "11"], r"scale from 1 to 10"),
    (["--data.goal.scale.high", "5"], r"score outside the declared scale.* so far\)\n.*from 1 to 5"),
    (["--model.generation.temperature", "0", "--model.generation.top_p", "0.5"], r"top_p has no effect"),
    (["--export.merge", "true"], r"merge has no effect without an adapter"),
    (["--model.loss.beta", "null"], r"--model\.loss\.beta: expected a number; found null\. Leave it out for its"),
    (["--model.policy.freeze", "['lm_haed']"], r"'lm_haed' matches no parameter"),
    (["--model.policy.adapter", "/nowhere/adapter"], r"adapter /nowhere/adapter: no such folder"),
    (["--model.policy.adapter", "x", "--model.policy.lora.r", "4"], r"lora has no effect with"),
    (["--model.policy.rope", "{rope_type: linear, factor: 0}"], r"factor must be a number of at least 1"),
    (["--model.policy.resize_embeddings", "true"], r"resize_embeddings has no effect"),
    (["--model.reference", "AdapterAsLoaded"], r"needs an adapter to continue"),
    (["--model.optimizer.lr", "-1"], r"--model\.optimizer: Invalid learning rate: -1"),
    (["--guard.limit", "3"], r"--guard\.limit has no effect"),
    (["--guard.non_finite", "ignore"], r"guard\.non_finite"),
    (["--watchdog.margin", "0"], r"must be above 0"),
    (["--data.num_proc", "0"], r"num_proc must be at least 1"),
    (["--data.num_workers", "-1"], r"num_workers must be at least 0"),
    (["--trainer.log_every_n_steps", "0"], r"log_every_n_steps"),
    (["--trainer.val_check_interval", "5000"], r"val_check_interval"),
    (["--trainer.overfit_batches", "2"], r"overfit_batches isn't supported"),
    (["--trainer.max_epochs", "-1"], r"needs the number of optimizer steps"),
    (["--config", "/nowhere/config.yaml"], r"/nowhere/config\.yaml"),
    (["--ckpt_path", "/nowhere/last.ckpt"], r"/nowhere/last\.ckpt"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_ends_in_one_clear_message_and_leaves_nothing_behind(
    arguments: list[str], message: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert call(monkeypatch, "fit", "--config", str(config), *arguments) not in (0, None)
    captured = capfd.readouterr()
    assert re.search(message, captured.err), captured.err[-2000:]
    assert "Traceback" not in captured.err + captured.out
    written = [p for p in tmp_path.rglob("*") if p.suffix in (".ckpt", ".safetensors")]
    assert not written


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"layout": None}, r"line \d+: data\.layout: expected one of auto, .*; found null\. Leave it"),
        ("model", {"policy": {"path": "x", "freeze": None}}, r"model\.policy\.freeze: expected a list.*; found null"),
        ("model", {"schedule": {"class_path": "CosineWithWarmup", "init_args": {"warmup_ratio": None}}}, "warmup"),
    ],
)  # fmt: skip
def test_null_where_it_means_nothing_is_named(
    section: str, change: dict[str, Any], message: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = yaml.safe_load(config.read_text())
    kinds = {"data": "rap_lightning.PreferenceDataModule", "model": "rap_lightning.PreferenceModule"}
    content[section] = {"class_path": kinds[section], "init_args": content[section] | change}
    config.write_text(yaml.safe_dump(content))
    assert call(monkeypatch, "fit", "--config", str(config)) == 2
    said = capfd.readouterr().err
    assert re.search(message, said), said[-1500:]
    assert "Traceback" not in said


def test_a_key_that_jsonargparse_stumbles_over_ends_in_a_message(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "config: 0.5\n")
    assert call(monkeypatch, "fit", "--config", str(config)) == 2
    assert "error: the options can't be used: AttributeError" in capfd.readouterr().err


def test_predict_test_and_export_from_a_checkpoint(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "fit", "--config", str(config), "--model.policy.lora.r", "4") == 0
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    common = ["--config", str(config), "--model.policy.lora.r", "4", "--ckpt_path", str(last)]
    goal = ["--data.predict.goal", "4", "--data.predict.limit", "3", "--model.generation.max_new_tokens", "4"]
    assert call(monkeypatch, "predict", *common, *goal) == 0
    (path,) = tmp_path.rglob("predictions.jsonl")
    assert [json.loads(line)["goal"] for line in path.read_text().splitlines()] == ["4"] * 3
    step = torch.load(last, weights_only=True)["global_step"]
    assert step > 0
    for command, prefix, title in (("test", "test", "test"), ("validate", "val", "validation")):
        assert call(monkeypatch, command, *common) == 0
        row = rows(sorted((tmp_path / "runs").glob("version_*"))[-1])[-1]
        assert (float(row[f"{prefix}/pairs"]), int(row["step"])) == (18, step)
        assert f"{title} at step {step} " in capfd.readouterr().out, "the checkpoint's, in the log and on the console"
    out = tmp_path / "out"
    assert call(monkeypatch, "export", "--checkpoint", str(last), "--output", str(out), "--merge", "true") == 0
    assert (out / "model.safetensors").is_file()
    assert call(monkeypatch, "export", "--checkpoint", str(last), "--output", str(out)) == 2


def test_ctrl_c_stops_within_seconds_and_leaves_a_checkpoint_to_go_on_from(
    config: Path, start_process: Any, tmp_path: Path
) -> None:
    process = start_process(["fit", "--config", str(config), "--trainer.max_epochs", "100000"])
    process.wait_for("^step 20/")
    os.kill(process.process.pid, signal.SIGINT)
    assert process.end(20) == 130
    assert "Traceback" not in process.said
    hint = re.search(r"--ckpt_path (\S+)", process.said)
    assert hint, process.said[-2000:]
    step = torch.load(hint[1], weights_only=True)["global_step"]
    assert step >= 20
    steps = str(step + 2)
    longer = ["--trainer.max_epochs", "100000", "--trainer.max_steps", steps]
    again = start_process(["fit", "--config", str(config), *longer, "--ckpt_path", hint[1]])
    assert again.end() == 0, again.said[-2000:]
    assert f"step {steps}/{steps}" in again.said
    assert "step 20/" not in again.said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one_with_rows_that_do_not_divide(
    strategy: str, config: Path, tiny: Path, start_process: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    # 46 pairs: three steps of 16 (8 each, then 7 and 7) and validation of 18 in batches of 8 and 2
    options = {
        "ddp": ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.process_group_backend", "gloo"],
        "fsdp2": [
            "--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "2",
            "--trainer.strategy.tensor_parallel_size", "1", "--trainer.strategy.process_group_backend", "gloo",
        ],
    }  # fmt: skip
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--trainer.gradient_clip_val", "0"]
    common = ["fit", "--config", str(config), *sgd]
    runs = {
        "one": ["--data.batch_size", "16"],
        # in forward passes of their own number, and with the reference's log-probabilities computed by both
        "two": [
            "--data.batch_size", "8", "--data.token_budget", "500",
            "--model.reference", "Stored", "--model.reference.folder", str(tmp_path / "store"),
        ],
    }  # fmt: skip
    whole, two = ([*common, *runs[name], "--trainer.default_root_dir", str(tmp_path / name)] for name in runs)
    alone = start_process(whole)
    if strategy == "ddp":  # Lightning itself starts the second process
        command = [*COMMAND, *two, *options[strategy], "--trainer.devices", "2"]
        subprocess.run(command, check=True, timeout=200)
    else:
        pair = RankPair(start_process, two, options[strategy])
        assert pair.end() == [0, 0], pair.said[-3000:]
    assert alone.end() == 0, alone.said[-3000:]
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 2, "a file of each process"
    one, both = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(both) > 3
    for a, b in zip(one, both, strict=True):
        for key in a:
            if a[key] and "per_second" not in key:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-5), key
    (first,), (second,) = (list((tmp_path / name).rglob("hf/model.safetensors")) for name in runs)
    start_weights = load_file(tiny / "model.safetensors")
    for key, value in load_file(first).items():
        torch.testing.assert_close(load_file(second)[key], value, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(value, start_weights[key]) for key, value in load_file(first).items())


def test_a_tokenizer_without_a_template_stops_before_the_model_loads(
    config: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from shutil import copytree

    bare = copytree(tiny, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    (bare / "model.safetensors").unlink()  # would be missed if the model were loaded first
    assert call(monkeypatch, "fit", "--config", str(config), "--model.policy.path", str(bare)) == 2
    assert "no chat template" in capfd.readouterr().err


def test_a_data_set_without_scores_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = [{k: v for k, v in row.items() if "score" not in k} for row in scored_rows(3)]
    source = write_jsonl(tmp_path / "plain.jsonl", plain)
    assert call(monkeypatch, "fit", "--config", str(config), "--data.source", str(source)) == 2
    assert re.search(r"missing score_chosen, score_rejected.*Goals need a score", capfd.readouterr().err)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_resuming_never_runs_what_a_checkpoint_has_pickled(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "fit", "--config", str(config), "--trainer.max_steps", "1") == 0
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save(content | {"bomb": Bomb(str(tmp_path / "ran"))}, tmp_path / "bad.ckpt")
    assert call(monkeypatch, "fit", "--config", str(config), "--ckpt_path", str(tmp_path / "bad.ckpt")) == 2
    assert "more than plain values and tensors" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_optimizers_short_name_means_torchs_beside_other_packages(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = types.ModuleType("other_optimizers")
    other.AdamW = type("AdamW", (torch.optim.Optimizer,), {"__module__": other.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, other.__name__, other)
    done = run_command(
        "fit", "--model.policy.path", tiny, "--data.source", pairs_folder, "--model.optimizer", "AdamW",
        "--model.optimizer.lr", "1e-3", "--trainer.accelerator", "cpu", "--trainer.max_steps", 1,
        "--trainer.default_root_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.rglob("config.yaml")
    assert "class_path: torch.optim.AdamW" in config.read_text()
