"""Facts about a run in plain values, for run.json, for checkpoints, and for the card of the exported model."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from rap_lightning import provenance
from rap_lightning.callbacks.trackers import tracked
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.data_report import KINDS
from rap_lightning.preferences.template_options import defaults_of


def run_facts(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Return data and counts, method, hyperparameters, metrics so far, goal, tracked runs, versions, where known."""
    facts: dict[str, Any] = {"step": trainer.global_step, "versions": provenance.versions(), "seed": seed()}
    facts["metrics"] = {name: round(float(v), 6) for name, v in trainer.callback_metrics.items() if v.numel() == 1}
    if isinstance(module, PreferenceModule):
        facts |= _module_facts(trainer, module)
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PreferenceDataModule):
        facts["data"] = {
            "sources": [name(source.path) for source in data.sources],
            "relabel": data.relabelling.mode,
            "best_goal": data.relabelling.best_goal,
            "goals_per_pair": data.relabelling.goals_per_pair,
            "rejected_weight": data.rejected_weight,
            "best_goal_weight": data.best_goal_weight,
            "weight_column": data.weight_column,
            "splits": [_report_counts(report.as_dict()) for parts in data.reports.values() for report in parts],
        }
        facts.setdefault("hyperparameters", {}).update(
            {"batch_size": data.batch_size, "max_length": data.max_length, "data_seed": data.seed}
        )
    facts["trackers"] = tracked(trainer.loggers) if trainer.is_global_zero else []
    return {key: value for key, value in facts.items() if value not in (None, {}, [])}


def name(path: str) -> dict[str, Any]:
    """Return the name of a data source or model as it may be published: of a local one the last part only."""
    local = os.path.exists(path) or path.startswith(("/", ".", "~"))
    return {"name": Path(path).name or path if local else provenance.mask_keys(path), "local": local}


def seed() -> int | None:
    """Return the argument of ``seed_everything``."""
    value = os.environ.get("PL_GLOBAL_SEED")
    return int(value) if value is not None and value.isdigit() else None


def _report_counts(report: dict[str, Any]) -> dict[str, Any]:
    """Return the counts, without the places, which name the user's files."""
    kinds = {k: {reason: t["count"] for reason, t in report[k].items()} for k in KINDS}
    counts = {k: v for k, v in report.items() if isinstance(v, int)}
    return {"split": report["split"], "source": name(report["source"])["name"], **counts, **kinds}


def _module_facts(trainer: pl.Trainer, module: PreferenceModule) -> dict[str, Any]:
    policy = module.policy_config
    hyperparameters: dict[str, Any] = {
        "precision": str(trainer.precision),
        "max_epochs": trainer.max_epochs if trainer.max_steps < 0 else None,
        "max_steps": trainer.max_steps if trainer.max_steps >= 0 else None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "gradient_clip_val": trainer.gradient_clip_val,
    }
    if trainer.optimizers:
        optimizer = trainer.optimizers[0]
        shown = ("initial_lr", "lr", "betas", "momentum", "weight_decay")
        values = {k: optimizer.param_groups[0][k] for k in shown if k in optimizer.param_groups[0]}
        values["lr"] = values.pop("initial_lr", values.get("lr"))
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        hyperparameters["optimizer"] = f"{kind}({', '.join(f'{k}={v}' for k, v in sorted(values.items()))})"
        hyperparameters["schedule"] = _shown(module.schedule)
    if module.warm_up is not None:
        hyperparameters["warm_up"] = str(module.warm_up)
    lora = policy.lora
    return {
        "base_model": name(policy.path) | {"revision": policy.revision},
        "loss": {"name": type(module.loss).__name__, "shown": str(module.loss), "about": _first_line(module.loss)},
        "reference": type(module.reference).__name__,
        "adapter": None if lora is None else dataclasses.asdict(lora),
        "hyperparameters": {k: v for k, v in hyperparameters.items() if v is not None},
        "last_logged": {"step": module.step_logger.last.step, "values": dict(module.step_logger.last.values)},
        "goal": module.goal_record(),
        "chat_template_kwargs": defaults_of(module.chat_template()),
    }


def _shown(thing: Any) -> str:
    if dataclasses.is_dataclass(thing):
        return str(thing)
    options = ", ".join(f"{k}={v}" for k, v in sorted(vars(thing).items()) if not k.startswith("_"))
    return f"{type(thing).__name__}({options})"


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(type(thing)) or "").strip().split("\n\n")[0].replace("\n", " ")
