"""Run by torchrun, or alone: fits the cases of a plan, one after another, in these processes.

python rank_worker.py PLAN.json OUTPUT: for each case rank zero writes OUTPUT/NAME.pt with what was logged and the
final weights, gathered. Several cases in one start, because importing takes longer than training a tiny model.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

from conftest import build, make_trainer, sgd
from rap_lightning.callbacks import ExportHF
from rap_lightning.losses import DPO
from rap_lightning.models.hf_export import full_state
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.strategies import FSDP2
from rap_lightning.training.schedules import ConstantWithWarmup


def strategy(name: str, ranks: int, options: dict[str, Any]) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if name == "fsdp2":
        return FSDP2(**options)
    if name == "model-parallel":  # Lightning's own
        sizes = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
        return ModelParallelStrategy(process_group_backend="gloo", **sizes, **options)
    return DDPStrategy(process_group_backend="gloo", **options) if name == "ddp" else "auto"


def reference(name: str, folder: Path) -> Any:
    return {"frozen": Frozen, "off": AdaptersOff, "stored": lambda: Stored(folder=str(folder))}[name]()


def run(case: dict[str, Any], output: Path) -> None:
    name, ranks = case["name"], int(case["ranks"])
    config = PolicyConfig(
        case["model"],
        lora=Lora(r=4) if case.get("lora") else None,
        gradient_checkpointing=case.get("gradient_checkpointing"),
    )
    more = {} if "strength" not in case else {"goal": AdapterStrength(neutral=case["strength"])}
    module, data = build(
        Path(case["model"]), Path(case["data"]), policy=config, optimizer=sgd, schedule=ConstantWithWarmup(),
        loss=DPO(0.5), reference=reference(case["reference"], output / f"store-{name}"),
        batch_size=case["pairs_per_step"] // ranks // case.get("accumulate", 1), **case.get("data_options", {}), **more,
    )  # fmt: skip
    saver: dict[str, Any] = {}
    if save := case.get("save"):
        from lightning.pytorch.callbacks import ModelCheckpoint

        every = ModelCheckpoint(save, filename="{step}", every_n_train_steps=case.get("every", 2), save_top_k=-1)
        saver = {"enable_checkpointing": True, "callbacks": [every, *([ExportHF()] if case.get("export") else [])]}
    if case.get("measured"):
        from rap_lightning.callbacks import GoalSamples, LikelihoodProbe

        probes: list[Any] = [LikelihoodProbe(pairs=8, every_n_steps=2)]
        if case["strategy"] != "fsdp2":  # from which nothing can be sampled
            probes.append(GoalSamples(lambda prompt, response: len(response), prompts=3, every_n_steps=2))
        saver["callbacks"] = [*saver.get("callbacks", []), *probes]
    trainer = make_trainer(
        output / name,
        strategy=strategy(case["strategy"], ranks, case.get("strategy_options", {})),
        devices=ranks // case.get("nodes", 1), num_nodes=case.get("nodes", 1),
        accumulate_grad_batches=case.get("accumulate", 1),
        **({"gradient_clip_val": 1.0} | saver | case.get("trainer", {})),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=case.get("ckpt_path"), weights_only=True)
    state = full_state(module.policy)
    draws = trainer.strategy.all_gather(torch.rand(1)).flatten().tolist()  # of each rank's own generator
    if trainer.is_global_zero:
        path = max((output / name).rglob("metrics.csv"), key=lambda p: p.stat().st_mtime)
        with path.open() as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        for row in rows:
            row.pop("pairs_per_second", None), row.pop("tokens_per_second", None)
        torch.save({"rows": rows, "weights": state, "draws": draws}, output / f"{name}.pt")


def main() -> None:
    plan, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in plan:
        run(case, output)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
