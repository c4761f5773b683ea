"""`rap-lightning schema`: editors accept what fit accepts, and mark what fit refuses."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conftest import ROOT, run_command

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "rounds")


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("schema") / "s.json"
    done = run_command("schema", "--output", path)
    assert done.returncode == 0, done.stderr
    assert f"$schema={path}" in done.stdout
    found: dict[str, Any] = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def faults(schema: dict[str, Any], config: Any) -> list[str]:
    """Where a config breaks the schema, as keys joined by dots."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(config)
    return sorted(".".join(map(str, error.absolute_path)) for error in found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_that_is_shipped_keeps_to_it(schema: dict[str, Any], path: Path) -> None:
    assert faults(schema, yaml.safe_load(path.read_text())) == []


def test_a_whole_printed_config_keeps_to_it(schema: dict[str, Any]) -> None:
    done = run_command("fit", "--config", "configs/quickstart.yaml", "--print_config", cwd=ROOT)
    config = yaml.safe_load(done.stdout)
    assert len(config["trainer"]) > 30
    assert faults(schema, config) == []


@pytest.mark.parametrize(
    ("keys", "value", "place"),
    [
        (("trainer", "max_epoch"), 2, "trainer"),
        (("trainer", "max_epochs"), "two", "trainer.max_epochs"),
        (("model", "optimiser"), {}, "model"),
        (("model", "policy", "pth"), "x", "model.policy"),
        (("model", "policy", "lora"), {"r": "many"}, "model.policy.lora"),
        (("model", "loss"), {"class_path": "DPO", "init_args": {"betta": 0.1}}, "model.loss"),
        (("model", "loss"), {"class_path": "rap_lightning.losses.DPO", "init_args": {"beta": "low"}}, "model.loss"),
        (("model", "reference"), {"class_path": "Stored", "init_args": {"foldr": "x"}}, "model.reference"),
        (("data", "relabel"), "boht", "data.relabel"),
        (("data", "goal"), {"class_path": "OverallGoal", "init_args": {"scales": {}}}, "data.goal"),
        (("checkpoints",), {}, ""),
    ],
)
def test_what_fit_refuses_is_marked(schema: dict[str, Any], keys: tuple[str, ...], value: Any, place: str) -> None:
    config: Any = {"model": {"policy": {"path": "m"}}, "data": {"source": "d"}, "trainer": {}}
    assert faults(schema, config) == []
    node = config
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    assert faults(schema, config) == [place]


def test_classes_of_ones_own_are_accepted_with_any_options(schema: dict[str, Any]) -> None:
    config: Any = {
        "model": {
            "class_path": "my_pkg.MyModule",
            "init_args": {"policy": {"path": "m"}, "own": 1, "loss": {"class_path": "a.B", "init_args": {"c": 1}}},
        },
        "data": {"source": "d", "goal": {"class_path": "my_pkg.MyGoal", "init_args": {"own": 1}}},
    }
    assert faults(schema, config) == []
    wrong = copy.deepcopy(config)
    wrong["model"]["init_args"]["policy"]["pth"] = "x"
    assert faults(schema, wrong) == ["model.init_args.policy"]


def test_keys_carry_their_help_and_defaults(schema: dict[str, Any]) -> None:
    data = schema["properties"]["data"]["else"]["properties"]
    assert "without a goal" in data["keep_original"]["description"]
    assert data["keep_original"]["default"] is False
    dpo = next(case for case in schema["$defs"]["PreferenceLoss"]["anyOf"][1]["allOf"]
               if re.match(case["if"]["properties"]["class_path"]["pattern"], "DPO"))  # fmt: skip
    assert dpo["then"]["properties"]["init_args"]["properties"]["beta"]["default"] == 0.1


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    done = run_command("schema", "--output", tmp_path / "no" / "s.json")
    assert done.returncode == 2
    assert "can't be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_classes_that_exist_only_while_a_program_runs_are_passed_over() -> None:
    import torch
    from lightning.pytorch.core.optimizer import LightningOptimizer

    from rap_lightning.commands.schema import config_schema

    held = LightningOptimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    assert type(held).__name__ == "LightningAdamW"
    assert "LightningAdamW" not in json.dumps(config_schema())
