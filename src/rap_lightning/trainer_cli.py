"""fit, validate, test and predict: LightningCLI with our defaults."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _typehints, namespace_to_dict
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from rap_lightning import losses
from rap_lightning.callbacks import Checkpoints, ConsoleLines, ExportHF, RunRecord, WholeSteps, WritePredictions
from rap_lightning.class_names import check_class_names
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.checkpoints import refuse_unreadable
from rap_lightning.models.reference import Reference
from rap_lightning.models.stored import Stored
from rap_lightning.models.synchronised import Synchronised
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.scales import RewardScale
from rap_lightning.preferences.select import Selection
from rap_lightning.schedules import Schedule
from rap_lightning.strategies import FSDP2, check_size
from rap_lightning.together import Together, flat

SHORT_NAMES = (Stored, Synchronised, FSDP2)  # jsonargparse knows a class by its short name once it has been imported
OWN_BASES = (PreferenceLoss, Reference, GoalTemplate, Schedule)

CLASS_OPTIONS = {
    "--model.loss": PreferenceLoss,
    "--model.reference": Reference,
    "--model.schedule": Schedule,
    "--data.goal": GoalTemplate,
    "--data.goal.scale": RewardScale,
    "--data.selection": Selection,
}

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "default_root_dir": "runs",
}


class PreferenceCLI(LightningCLI):
    """LightningCLI whose checkpoints, export and console output work without being asked for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Two callbacks that are always there, configurable at the top level."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {"checkpoint.save_last": "link", "checkpoint.save_on_exception": True, "checkpoint.save_top_k": 1}
        )
        parser.add_lightning_class_args(ExportHF, "export")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and look at the checkpoint to go on from before anything is loaded."""
        super().parse_arguments(parser, args)
        options = self.config[self.config["subcommand"]]
        if options.get("weights_only") is None:
            options["weights_only"] = True  # Lightning would run what a local file has pickled
        path = options.get("ckpt_path")
        if path not in (None, "best", "last", "hpc", "registry"):
            refuse_unreadable(Path(path))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the console, the run record and the logger where the config names no other."""
        config = self._get(self.config_init, "trainer", default={})
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.get("enable_progress_bar") is None and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [*callbacks, RichProgressBar() if _terminal() else ConsoleLines()]
            if not _terminal():
                kwargs["enable_progress_bar"] = False
        kwargs["callbacks"] = [*callbacks, RunRecord(), WholeSteps(), WritePredictions()]
        if config.get("logger") is None:
            kwargs["logger"] = CSVLogger(config.get("default_root_dir") or "runs", name="")
        facts = namespace_to_dict(self.config[self.config["subcommand"]]) if "subcommand" in self.config else {}
        self.together = Together(flat(facts))
        kwargs["callbacks"].append(self.together)
        trainer = super().instantiate_trainer(**kwargs)
        check_size(trainer.strategy)
        self.together.attach(trainer.strategy)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        with self.together.explained():
            super()._run_subcommand(subcommand)


def run(args: list[str]) -> None:
    """Run one of LightningCLI's subcommands."""
    _fresh_defaults_for_new_classes()
    _quieten()
    check_class_names(args, CLASS_OPTIONS)
    try:
        PreferenceCLI(**_cli_options(args))
    except SystemExit as stop:
        if not stop.code and {"-h", "--help"} & set(args[1:]):
            print(losses_by_family())
        raise


def parse_only(args: list[str]) -> PreferenceCLI:
    """Parse options of fit and make model and data module of them, without a trainer: nothing is loaded."""
    _fresh_defaults_for_new_classes()
    _quieten()
    check_class_names(args, CLASS_OPTIONS)
    warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
    return _ParseOnly(**_cli_options(args) | {"args": args, "run": False, "seed_everything_default": False})


class _ParseOnly(PreferenceCLI):
    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        LightningCLI.parse_arguments(self, parser, args)

    def instantiate_classes(self) -> None:
        """Without what belongs to the trainer: a strategy may need a GPU only to be made."""
        config = self.config.clone()
        for name in ("strategy", "callbacks", "logger", "plugins", "profiler"):
            config["trainer"][name] = None
        made = self.parser.instantiate_classes(config)
        self.model, self.datamodule = made["model"], made["data"]


def _cli_options(args: list[str]) -> dict[str, Any]:
    sections = _sections_with_class(args)
    return {
        "model_class": PreferenceModule,
        "datamodule_class": PreferenceDataModule,
        "subclass_mode_model": "model" in sections,
        "subclass_mode_data": "data" in sections,
        "trainer_defaults": TRAINER_DEFAULTS,
        "seed_everything_default": 42,
        "auto_configure_optimizers": False,
        "save_config_kwargs": {"overwrite": True},
        # allow_abbrev: a misspelt option must not be taken for another
        "parser_kwargs": {"prog": "rap-lightning", "allow_abbrev": False},
        "args": None if args == sys.argv[1:] else args,  # LightningCLI warns of arguments given twice
    }


def losses_by_family() -> str:
    """Every loss of the package with the first line of its docstring, as ``fit --help`` shows them."""
    found: dict[str, list[str]] = {}
    for name in sorted(losses.__all__, key=str.lower):
        kind = getattr(losses, name)
        if not inspect.isabstract(kind):
            family = inspect.getdoc(inspect.getmodule(kind)) or ""
            line = (inspect.getdoc(kind) or "").splitlines()[0]
            found.setdefault(family.splitlines()[0], []).append(f"  {name:<20} {line}")
    blocks = ["\n".join([family, *lines]) for family, lines in sorted(found.items(), key=lambda item: -len(item[1]))]
    head = "The losses (--model.loss NAME, or an import path of your own; --model.loss.help NAME shows the options):"
    return "\n\n".join(["", head, *blocks])


def _quieten() -> None:
    """Leave out advertisements, and deprecations that only Lightning's, peft's or torch's authors can act on."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*recommended to use .self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    warnings.filterwarnings(
        "ignore", message=r".*does not have many workers.*"
    )  # tokens are ready, workers gain little


def _terminal() -> bool:
    from rich.console import Console

    return Console().is_terminal


def _sections_with_class(args: list[str]) -> set[str]:
    """Which of model and data are named by class (``--model my_pkg.MyModule``, or ``class_path`` in a config).

    Otherwise they are our own, and --help can show their options one by one.
    """
    found = set()
    for section in ("model", "data"):
        flag = f"--{section}"
        if any(arg in (flag, f"{flag}.class_path", f"{flag}.help") or arg.startswith(f"{flag}=") for arg in args):
            found.add(section)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("-c", "--config", action="append", default=[])
    for name in finder.parse_known_args(args)[0].config:
        try:
            config = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # the real parser says what is wrong with it
        for section in ("model", "data"):
            value = config.get(section) if isinstance(config, dict) else None
            if isinstance(value, str) or (isinstance(value, dict) and "class_path" in value):
                found.add(section)
    return found


def _fresh_defaults_for_new_classes() -> None:
    """A class of ours that an overlay names anew starts from its own defaults.

    jsonargparse keeps those arguments of the replaced class that the new one accepts too: SimPO would run with DPO's
    beta, silently. It has no option for this, hence the wrapped function (the version is pinned, and a test watches).
    """
    original = _typehints.discard_init_args_on_class_path_change
    if getattr(original, "drops_all", False):
        return

    def discard(parser_or_action: Any, prev_val: Any, value: Any) -> None:
        if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
            loaded = _typehints.import_object(value["class_path"])
            if isinstance(loaded, type) and issubclass(loaded, OWN_BASES):
                for key in list(vars(_typehints.subclass_spec_as_namespace(prev_val).init_args)):
                    prev_val["init_args"].pop(key)
                return
        original(parser_or_action, prev_val, value)

    discard.drops_all = True  # type: ignore[attr-defined]
    _typehints.discard_init_args_on_class_path_change = discard
