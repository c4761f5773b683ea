"""Recipes and launch templates for real nodes: what they resolve to, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision

from conftest import ROOT
from rap_lightning.cli.trainer_cli import parse_only
from rap_lightning.planning.trainer_options import precision_of, spread_of
from rap_lightning.strategies import FSDP2

RECIPES = sorted((ROOT / "configs").glob("*b-*.yaml"))
SHARDED = [[path] for path in RECIPES] + [
    [ROOT / "configs/llama-3.1-8b-instruct.yaml", ROOT / f"configs/strategy/{name}.yaml"]
    for name in ("fsdp2", "hsdp", "fsdp2-offload")
]
LAUNCH = [ROOT / "launch" / name for name in ("torchrun.sh", "slurm.sbatch", "kubernetes.yaml")]


def resolve_trainer(configs: list[Path]) -> Any:
    """The trainer's options, as ``fit`` parses them; no model is read."""
    return parse_only([part for path in configs for part in ("--config", str(path))]).config["trainer"]


def check_sharded(trainer: Any) -> None:
    """FSDP2 that gathers weights in bfloat16."""
    ranks = int(trainer["devices"] if trainer["devices"] != "auto" else 8) * int(trainer["num_nodes"])
    spread = spread_of(trainer["strategy"], ranks, 8, precision_of(trainer["precision"]))
    assert (spread.kind, spread.gather) == ("fsdp2", 0.5)
    options = trainer["strategy"]
    strategy = FSDP2(**(options.get("init_args") or {}))
    assert options["class_path"] == f"{FSDP2.__module__}.{FSDP2.__name__}"
    strategy.precision_plugin = MixedPrecision(trainer["precision"], "cuda")
    assert strategy._gather_dtype() == torch.bfloat16


@pytest.mark.parametrize("configs", SHARDED, ids=lambda configs: "+".join(path.stem for path in configs))
def test_recipes_shard_and_gather_weights_in_bfloat16(configs: list[Path]) -> None:
    assert len(RECIPES) == 5
    check_sharded(resolve_trainer(configs))


def test_the_recipe_of_rounds_shards_and_gathers_in_bfloat16(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "configs/rounds/llama-3-8b-instruct-armorm.yaml").read_text())
    fit = content["fit"]
    fit["model"]["policy"]["path"] = content["model"]
    fit["data"]["source"] = "pairs"
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit))
    check_sharded(resolve_trainer([tmp_path / "fit.yaml"]))


def test_the_70b_recipe_is_for_eight_nodes_and_needs_no_second_model() -> None:
    cli = parse_only(["--config", str(ROOT / "configs/llama-3.1-70b-instruct.yaml")])
    trainer = cli.config["trainer"]
    assert (trainer["num_nodes"], trainer["devices"]) == (8, 8)
    assert type(cli.model.reference).__name__ == "Stored"


@pytest.mark.parametrize("path", [*LAUNCH, ROOT / "docker/compose.yaml"], ids=lambda path: path.name)
def test_templates_let_segments_grow_and_allow_pinned_memory(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"PYTORCH_ALLOC_CONF\b.*expandable_segments:True", text)
    assert re.search(r"ulimit -l unlimited|IPC_LOCK", text)
    if path.suffix == ".yaml":
        list(yaml.safe_load_all(text))
    else:
        subprocess.run(["bash", "-n", path], check=True)
    for name in re.findall(r"configs/[\w./-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


def test_processes_of_a_slurm_job_get_their_cores() -> None:
    """srun does not take --cpus-per-task from the job."""
    assert re.search(r'^srun --cpus-per-task="\$\{SLURM_CPUS_PER_TASK', LAUNCH[1].read_text(), re.MULTILINE)
