"""fit, validate, test and predict: LightningCLI with our defaults."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import DefaultHelpFormatter, Namespace, _typehints, namespace_to_dict
from jsonargparse._util import import_object
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from rap_lightning import losses
from rap_lightning.callbacks import (
    Checkpoints,
    ConsoleLines,
    ExportHF,
    Guard,
    RunRecord,
    Watchdog,
    WholeSteps,
    WritePredictions,
)
from rap_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from rap_lightning.cli.error_messages import LIBRARIES, Explains, causes, configs_named, content_of, raised_in
from rap_lightning.cli.help_format import Filled, arrange_trainer
from rap_lightning.cli.null_checks import refuse_nulls
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.distributed.consistency import flat, model_facts
from rap_lightning.distributed.deepspeed_checks import refuse_in_config
from rap_lightning.distributed.rank_monitor import Together
from rap_lightning.errors import ConfigError, UserError
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.checkpoint.read_checkpoint import all_checkpoints, newest_whole, refuse_damaged, run_key
from rap_lightning.models.references.base import Reference
from rap_lightning.models.references.policy_copy import AdapterAsLoaded
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.module import PreferenceModule
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.strategies import FSDP2, check_asked, check_resumes, check_size
from rap_lightning.training.schedules import Schedule

# jsonargparse knows a class by its short name once it has been imported
SHORT_NAMES = (AdapterAsLoaded, Stored, Synchronised, FSDP2)
OWN_BASES = (PreferenceLoss, Reference, GoalTemplate, Schedule, Judge)

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "default_root_dir": "runs",
}


class Parser(Explains, LightningArgumentParser):
    """LightningCLI's, which tells a mistake in a few lines."""


class Formatter(Filled, DefaultHelpFormatter):
    """In words that one would type."""


class PreferenceCLI(LightningCLI):
    """LightningCLI whose checkpoints, export and console output work without being asked for."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        arrange_trainer(parser, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that are always there, configurable at the top level."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {"checkpoint.save_last": "link", "checkpoint.save_on_exception": True, "checkpoint.save_top_k": 1}
        )
        parser.add_lightning_class_args(ExportHF, "export")
        parser.add_lightning_class_args(Guard, "guard")
        parser.add_lightning_class_args(Watchdog, "watchdog")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and look at the checkpoint to go on from before anything is loaded."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            raise _told(error) from error
        options = self.config[self.config["subcommand"]]
        refuse_in_config(options)
        if options.get("weights_only") is None:
            options["weights_only"] = True  # Lightning would run what a local file has pickled
        for section, kind in (("model", PreferenceModule), ("data", PreferenceDataModule)):
            _refuse_nulls(section, kind, options.get(section))
        check_asked(options["trainer"].get("strategy"), options["trainer"].get("accelerator"))
        self._run_key = run_key_of(options)
        path, root = options.get("ckpt_path"), Path(options["trainer"].get("default_root_dir") or ".")
        if path is None and SLURMEnvironment.detect() and self.config["subcommand"] == "fit":
            path = "last" if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else None
            if path is None and (left := sorted(root.glob("hpc_ckpt_*.ckpt"))):
                raise ConfigError(
                    f"{left[-1]} was left by another SLURM job, and Lightning would go on from it. Set a "
                    "--trainer.default_root_dir of this job's own, give --ckpt_path, or remove the file."
                )
        if path == "last":
            found = newest_whole(root, self._is_of_this_run, _notice)
            if found is None and self.config["subcommand"] != "fit":
                raise ConfigError(f"--ckpt_path last: no checkpoint below {root} is of a run with these options.")
            none = (
                f"none of the {there} checkpoints below {root} will do" if (there := len(all_checkpoints(root))) else ""
            )
            begins = f"{none or f'no checkpoint below {root} yet'}, so this run begins at step 0"
            _notice(f"--ckpt_path last: {found or begins}")
            options["ckpt_path"] = None if found is None else str(found)
        elif path not in (None, "best", "hpc", "registry"):
            refuse_damaged(Path(path))

    def _is_of_this_run(self, path: Path) -> bool:
        if (key := run_key(path)) is None:
            raise ConfigError(
                f"{path} doesn't say which options it was trained with; if it is of this run, give its path."
            )
        return key == self._run_key

    def instantiate_classes(self) -> None:
        """Also tell the module by which key its checkpoints are found again."""
        try:
            super().instantiate_classes()
        except Exception as error:
            raise _told(error) from error
        if isinstance(self.model, PreferenceModule):
            self.model.run_key = self._run_key

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
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if config.get("logger") is None:
            kwargs["logger"] = CSVLogger(config.get("default_root_dir") or "runs", name="")
        facts = namespace_to_dict(self.config[self.config["subcommand"]]) if "subcommand" in self.config else {}
        local = model_facts(self.model.policy_config.path) if isinstance(self.model, PreferenceModule) else {}
        self.together = Together(flat(facts) | local)
        kwargs["callbacks"].append(self.together)
        trainer = super().instantiate_trainer(**kwargs)
        check_size(trainer.strategy)
        if "subcommand" in self.config:
            check_resumes(trainer.strategy, self.config[self.config["subcommand"]].get("ckpt_path"))
        self.together.attach(trainer.strategy)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        with self.together.explained():
            super()._run_subcommand(subcommand)


def run_key_of(options: Any) -> str:
    """Digest of the options that say what is trained on what: runs with the same go on from each other's checkpoints.

    What may differ between a run and the one that goes on from it (workers, sampling, the number of steps) is left out.
    """
    sections = {name: options[name].as_dict() for name in ("model", "data") if hasattr(options.get(name), "as_dict")}
    for name in ("num_workers", "num_proc", "predict"):
        sections.get("data", {}).pop(name, None)
    sections.get("model", {}).pop("generation", None)
    policy = sections.get("model", {}).get("policy")
    for name in ("gradient_checkpointing", "activation_offloading", "compile") if isinstance(policy, dict) else ():
        policy.pop(name, None)  # memory and speed: what someone changes after a run has run out of memory
    content = json.dumps([sections, options.get("seed_everything")], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _refuse_nulls(section: str, kind: type, options: Any) -> None:
    if isinstance(options, Namespace):
        named = options.get("class_path")
        owner = import_object(named) if isinstance(named, str) else kind
        refuse_nulls(owner, options.get("init_args") or options, f"--{section}")


def _told(error: Exception) -> Exception:
    """The error of ours that is beneath what jsonargparse makes of it; else, of a library's refusal, its text."""
    chain = list(causes(error))
    if ours := [one for one in chain if isinstance(one, UserError)]:
        return ours[-1]
    if raised_in(chain[-1]) not in LIBRARIES:
        return error  # of the user's own class: its stack is what they need
    text = (str(chain[-1]).strip().splitlines() or [""])[0]
    return ConfigError(f"the options can't be used: {type(chain[-1]).__name__}: {text}")


def _notice(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # each process of a run parses the command line
        print(text, file=sys.stderr, flush=True)


def run(args: list[str]) -> None:
    """Run one of LightningCLI's subcommands."""
    _fresh_defaults_for_new_classes()
    _quieten()
    try:
        PreferenceCLI(**_cli_options(args))
    except SystemExit as stop:
        if not stop.code and {"-h", "--help"} & set(args[1:]):
            print(losses_by_family())
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(stop)):
            sys.exit(130)  # Lightning's is 1, as if something were wrong
        raise
    _leave_the_group()


def _leave_the_group() -> None:
    """Leave the process group once a run has ended well: gloo's threads abort a process that exits around them."""
    gc.collect()  # sharded weights hold on to the group
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse_only(args: list[str], command: str = "fit", beside: Sequence[str] = ()) -> PreferenceCLI:
    """Parse options of fit and make model and data module of them, without a trainer: nothing is loaded.

    Args:
        args: the options.
        command: that they were given to.
        beside: other options of that command, for what is told of a misspelt one.
    """
    _fresh_defaults_for_new_classes()
    _quieten()
    options = _cli_options(args) | {"args": args, "run": False, "seed_everything_default": False}
    options["parser_kwargs"]["prog"] += f" {command}"
    options["parser_class"] = type("Parser", (Parser,), {"beside": beside})
    return _ParseOnly(**options)


class _ParseOnly(PreferenceCLI):
    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            LightningCLI.parse_arguments(self, parser, args)
        except Exception as error:
            raise _told(error) from error
        refuse_in_config(self.config)

    def instantiate_classes(self) -> None:
        """Without what belongs to the trainer: a strategy may need a GPU only to be made."""
        config = self.config.clone()
        for name in ("strategy", "callbacks", "logger", "plugins", "profiler"):
            config["trainer"][name] = None
        made = self.parser.instantiate_classes(config)
        self.model, self.datamodule = made["model"], made["data"]


def fit_parser(command: str = "fit") -> LightningArgumentParser:
    """The parser of the options of fit, validate, test or predict, without their values: nothing is read or loaded."""
    _fresh_defaults_for_new_classes()
    _quieten()
    parser: LightningArgumentParser = _ParserOnly(**_cli_options(["fit"]) | {"args": []})._subcommand_parsers[command]
    return parser


class _ParserOnly(_ParseOnly):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = Namespace(subcommand="fit", fit=Namespace())

    def instantiate_classes(self) -> None:
        """Nothing is made."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


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
        "parser_class": Parser,
        "parser_kwargs": {"prog": "rap-lightning", "allow_abbrev": False, "formatter_class": Formatter},
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
    warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=r".*recommended to use .self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    warnings.filterwarnings(
        "ignore", message=r".*does not have many workers.*"
    )  # tokens are ready, workers gain little
    if not any(name.startswith("SLURM_") for name in os.environ):  # slurm is installed, and this is none of its jobs
        warnings.filterwarnings("ignore", message=r"The `srun` command is available")


def _terminal() -> bool:
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


def _sections_with_class(args: list[str]) -> set[str]:
    """Which of model and data are named by class (``--model my_pkg.MyModule``, or ``class_path`` in a config).

    Otherwise they are our own, and --help can show their options one by one.
    """
    found = set()
    for section in ("model", "data"):
        flag = f"--{section}"
        if any(arg in (flag, f"{flag}.class_path", f"{flag}.help") or arg.startswith(f"{flag}=") for arg in args):
            found.add(section)
    for name in configs_named(args):
        config = content_of(name)
        for section in ("model", "data"):
            value = config.get(section)
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
