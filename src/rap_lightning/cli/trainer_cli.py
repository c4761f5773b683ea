"""fit, validate, test and predict: LightningCLI with our defaults.

`run` runs a command with `PreferenceCLI`, whose methods follow in the order in which Lightning calls them.
`parse_only` and `fit_parser` are for commands that take fit's options without training.
"""

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
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

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
from rap_lightning.callbacks.run_folder import ClaimedFolder
from rap_lightning.callbacks.run_tracking import RunTracking
from rap_lightning.callbacks.trackers import Continued
from rap_lightning.cli.config_files import configs_named, content_of
from rap_lightning.cli.error_messages import LIBRARIES, ExplainsErrors, causes, check_nulls, raised_in
from rap_lightning.cli.help_format import ReadableDefaultsHelp, arrange_trainer
from rap_lightning.cli.logger_options import (
    as_list,
    continue_tracked,
    make_track_repeatable,
    other_folders,
    require_packages,
    take_secrets_from_environment,
    with_metrics_csv,
)
from rap_lightning.cli.parser_internals import prefer_own_short_names, start_new_classes_from_their_defaults
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.distributed.consistency import comparable, model_files, without_address
from rap_lightning.distributed.deepspeed_checks import check_deepspeed_config
from rap_lightning.distributed.rank_monitor import RankMonitor
from rap_lightning.errors import ConfigError, UserError, first_line
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.checkpoint.read_checkpoint import (
    all_checkpoints,
    newest_whole,
    recorded,
    refuse_damaged,
    run_key,
)
from rap_lightning.models.checkpoint.saved_policy import FACTS
from rap_lightning.models.references.base import Reference
from rap_lightning.models.references.policy_copy import AdapterAsLoaded
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.module import PreferenceModule
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.provenance import flatten, masked
from rap_lightning.strategies import FSDP2, check_requested, check_resumes, check_size
from rap_lightning.training.checks import check_attention, check_strength
from rap_lightning.training.protocols import PreferenceData
from rap_lightning.training.schedules import Schedule

# jsonargparse knows a class by its short name once it has been imported
CLASSES_BY_SHORT_NAME = (AdapterAsLoaded, Stored, Synchronised, FSDP2)
OWN_BASES = (PreferenceLoss, Reference, GoalTemplate, Schedule, Judge)

TrackerName = Literal["wandb", "mlflow", "tensorboard", "comet"]
TRACK_HELP = (
    "a tracker that gets metrics, hyperparameters and samples too, beside metrics.csv; repeatable. Its project and "
    "address come from its environment variables, its files are in the run's folder; docs/tracking.md"
)

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "default_root_dir": "runs",
}


def run(args: list[str]) -> None:
    """Run one of LightningCLI's subcommands."""
    _set_up_libraries()
    try:
        _cli_of(args[0])(**_cli_options(args))
    except SystemExit as stop:
        if not stop.code and {"-h", "--help"} & set(args[1:]):
            print(losses_by_family())
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(stop)):
            sys.exit(130)  # Lightning's is 1, as if something had failed
        raise
    # leave the process group: gloo's threads abort a process that exits while they run
    gc.collect()  # sharded weights hold on to the group
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class TrainerParser(ExplainsErrors, LightningArgumentParser):
    """LightningCLI's parser, with errors explained."""


class PreferenceCLI(LightningCLI):
    """LightningCLI whose checkpoints, export and console output work without being configured."""

    # Lightning 2.6.6 has no public hooks for a subcommand's help, its parser and its run: these names are private

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        arrange_trainer(parser, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, configurable at the top level."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {"checkpoint.save_last": "link", "checkpoint.save_on_exception": True, "checkpoint.save_top_k": 1}
        )
        parser.add_lightning_class_args(ExportHF, "export")
        parser.add_lightning_class_args(Guard, "guard")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_argument("--track", type=list[TrackerName], default=[], help=TRACK_HELP)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then check what is known without a model: the strategy, and the checkpoint to resume from."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            raise unwrap_user_error(error) from error
        command = self.config["subcommand"]
        options = self.config[command]
        check_nulls(self._parser(command), options)
        take_secrets_from_environment(options, _notice)
        require_packages(options)
        check_deepspeed_config(options)
        if options.get("weights_only") is None:
            options["weights_only"] = True  # Lightning's default would unpickle, and so run, a local file's objects
        check_requested(options["trainer"].get("strategy"), options["trainer"].get("accelerator"))
        self._run_key = run_key_of(options)
        options["ckpt_path"] = self._checkpoint_to_load(options)

    def _checkpoint_to_load(self, options: Namespace) -> str | None:
        """Resolve ``--ckpt_path``, of which ``last`` is the newest undamaged checkpoint of a run with these options."""
        path: str | None = options.get("ckpt_path")
        root = Path(options["trainer"].get("default_root_dir") or ".")
        fits = self.config["subcommand"] == "fit"
        if path is None and fits and SLURMEnvironment.detect():
            if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
                path = "last"
            elif left := sorted(root.glob("hpc_ckpt_*.ckpt")):
                raise ConfigError(
                    f"{left[-1]} was left by another SLURM job, and Lightning would resume from it. Set another "
                    "--trainer.default_root_dir for this job, give --ckpt_path, or remove the file."
                )
        if path == "last":
            elsewhere = other_folders(options)
            found = newest_whole(root, self._is_of_this_run, _notice, elsewhere)
            if found is None and not fits:
                raise ConfigError(f"--ckpt_path last: no checkpoint below {root} is of a run with these options.")
            there = len(all_checkpoints(root, *elsewhere))
            none = f"none of the {there} checkpoints below {root} matches" if there else ""
            begins = f"{none or f'no checkpoint below {root} yet'}, so this run begins at step 0"
            _notice(f"--ckpt_path last: {found or begins}")
            return None if found is None else str(found)
        if path is not None and path not in ("best", "hpc", "registry"):
            refuse_damaged(Path(path))
        return path

    def _is_of_this_run(self, path: Path) -> bool:
        if (key := run_key(path)) is None:
            raise ConfigError(
                f"{path} doesn't say which options it was trained with; if it is of this run, give its path."
            )
        return key == self._run_key

    def instantiate_classes(self) -> None:
        """Instantiate, and give the module the key by which its checkpoints are found again."""
        self._given, self._continued = self.config, self._tracked_before()
        self.config = self.config.clone()
        for logger in as_list(self.config[self.config["subcommand"]]["trainer"].get("logger")):
            continue_tracked(logger, self._continued)
        try:
            super().instantiate_classes()
        except Exception as error:
            raise unwrap_user_error(error) from error
        if isinstance(self.model, PreferenceModule):
            self.model.run_key = self._run_key
            if isinstance(self.datamodule, PreferenceData):
                # before data are downloaded
                check_strength(self.datamodule.goal, self.model.policy_config)
                check_attention(self.model.policy_config, self.datamodule.layout)

    def _tracked_before(self) -> Continued:
        """Return the tracked runs of the run that is resumed; none where another run's checkpoint is trained on."""
        path = self.config[self.config["subcommand"]]["ckpt_path"]
        if self.config["subcommand"] != "fit" or path is None or not Path(path).exists():
            return Continued()
        saved = recorded(Path(path))
        if (saved.get("rap_lightning") or {}).get("run_key") != self._run_key:
            return Continued()
        return Continued((saved.get(FACTS) or {}).get("trackers") or (), int(saved.get("global_step") or 0))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add metrics.csv and trackers, console output, the run record and checkpoint digests."""
        self.config = self._given  # config.yaml is of the options as given
        config = self.config_init[self.config["subcommand"]]["trainer"]
        callbacks, plugins = as_list(config.get("callbacks")), as_list(config.get("plugins"))
        if config.get("enable_progress_bar") is None and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar() if _on_terminal() else ConsoleLines())
            if not _on_terminal():
                kwargs["enable_progress_bar"] = False
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        options = self.config[self.config["subcommand"]]
        kwargs["logger"] = with_metrics_csv(as_list(config.get("logger")), config.get("default_root_dir") or "runs")
        facts = comparable(options.as_dict())
        if isinstance(self.model, PreferenceModule):
            facts |= model_files(self.model.policy_config.path)
        self.rank_monitor = RankMonitor(facts)
        kwargs["callbacks"] = [*callbacks, RunRecord(), WholeSteps(), WritePredictions(), self.rank_monitor]
        trainer = super().instantiate_trainer(**kwargs)
        tracking = RunTracking(options["track"], flatten(masked(options.as_dict())), self._continued)
        trainer.callbacks[:0] = [ClaimedFolder(trainer), tracking]  # type: ignore[attr-defined]
        check_size(trainer.strategy)
        check_resumes(trainer.strategy, options.get("ckpt_path"))
        self.rank_monitor.attach(trainer.strategy)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        with self.rank_monitor.reporting():
            super()._run_subcommand(subcommand)


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml without secrets."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, masked(config), **options)


def run_key_of(options: Any) -> str:
    """Digest of the options that say what is trained on what: a run resumes from checkpoints with the same key.

    Options that may change when a run is resumed (workers, sampling, the number of steps) are left out.
    """
    sections = {name: options[name].as_dict() for name in ("model", "data") if hasattr(options.get(name), "as_dict")}
    for name in ("num_workers", "num_proc", "predict", "allow_changed"):
        sections.get("data", {}).pop(name, None)
    sections.get("model", {}).pop("generation", None)
    policy = sections.get("model", {}).get("policy")
    for name in ("gradient_checkpointing", "activation_offloading", "compile") if isinstance(policy, dict) else ():
        policy.pop(name, None)  # memory and speed: changed after a run has run out of memory
    content = json.dumps([masked(sections), options.get("seed_everything")], sort_keys=True, default=without_address)
    return hashlib.sha256(content.encode()).hexdigest()


def unwrap_user_error(error: Exception) -> Exception:
    """The UserError beneath what jsonargparse raised; for an error of a library, a ConfigError with its text."""
    chain = list(causes(error))
    if ours := [one for one in chain if isinstance(one, UserError)]:
        return ours[-1]
    if raised_in(chain[-1]) not in LIBRARIES:
        return error  # of the user's own class: they need its traceback
    text = first_line(chain[-1])
    return ConfigError(f"the options can't be used: {type(chain[-1]).__name__}: {text}")


def _notice(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # each process of a run parses the command line
        print(text, file=sys.stderr, flush=True)


def _on_terminal() -> bool:
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


# -- for other commands: fit's options without a trainer ------------------------------------------------------------


def parse_only(args: list[str], command: str = "fit", other_options: Sequence[str] = ()) -> PreferenceCLI:
    """Parse options of fit and instantiate model and data module, without a trainer: nothing is loaded.

    ``command`` is the one that takes them; its ``other_options`` are suggested for a misspelt one too.
    """
    _set_up_libraries()
    options = _cli_options(args) | {"args": args, "run": False, "seed_everything_default": False}
    options["parser_kwargs"]["prog"] += f" {command}"
    options["parser_class"] = type("TrainerParser", (TrainerParser,), {"other_options": other_options})
    return _ParseOnlyCLI(**options)


def _cli_of(command: str) -> type[PreferenceCLI]:
    """Return the CLI with a single subcommand: the parsers of all four take 0.15 s more."""

    class OneCommandCLI(PreferenceCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: PreferenceCLI.subcommands()[command]}

    return OneCommandCLI


class _ParseOnlyCLI(PreferenceCLI):
    def _set_seed(self) -> None:
        """Leave the random number generators as they are."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            LightningCLI.parse_arguments(self, parser, args)
        except Exception as error:
            raise unwrap_user_error(error) from error
        check_nulls(parser, self.config)
        check_deepspeed_config(self.config)

    def instantiate_classes(self) -> None:
        """Instantiate model and data module alone: a strategy may need a GPU to be instantiated."""
        config = self.config.clone()
        config["trainer"]["strategy"] = "auto"
        for name in ("callbacks", "logger", "plugins", "profiler"):
            config["trainer"][name] = None
        made = self.parser.instantiate_classes(config)
        self.model, self.datamodule = made["model"], made["data"]


def fit_parser(command: str = "fit") -> LightningArgumentParser:
    """The parser of fit, validate, test or predict, without values: nothing is read or loaded."""
    _set_up_libraries()
    return _ParserOnlyCLI(**_cli_options(["fit"]) | {"args": []})._parser(command)


class _ParserOnlyCLI(_ParseOnlyCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = Namespace(subcommand="fit", fit=Namespace())

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _cli_options(args: list[str]) -> dict[str, Any]:
    args = make_track_repeatable(args)
    sections = _sections_with_class(args)
    return {
        "model_class": PreferenceModule,
        "datamodule_class": PreferenceDataModule,
        "subclass_mode_model": "model" in sections,
        "subclass_mode_data": "data" in sections,
        "trainer_defaults": TRAINER_DEFAULTS,
        "seed_everything_default": 42,
        "auto_configure_optimizers": False,
        "save_config_callback": SaveConfig,
        "save_config_kwargs": {"overwrite": True},
        # allow_abbrev: a misspelt option must not be taken for another
        "parser_class": TrainerParser,
        "parser_kwargs": {"prog": "rap-lightning", "allow_abbrev": False, "formatter_class": ReadableDefaultsHelp},
        "args": None if args == sys.argv[1:] else args,  # LightningCLI warns of arguments given twice
    }


def _sections_with_class(args: list[str]) -> set[str]:
    """Which of model and data are named by class (``--model my_pkg.MyModule``, or ``class_path`` in a config).

    The others are our own classes, whose options --help lists one by one.
    """
    found = set()
    configs = [content_of(name) for name in configs_named(args)]
    for section in ("model", "data"):
        flag = f"--{section}"
        given = [config.get(section) for config in configs]
        if any(
            arg in (flag, f"{flag}.class_path", f"{flag}.help") or arg.startswith(f"{flag}=") for arg in args
        ) or any(isinstance(value, str) or (isinstance(value, dict) and "class_path" in value) for value in given):
            found.add(section)
    return found


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


def _set_up_libraries() -> None:
    """Configure jsonargparse; hide advertisements, and warnings that only the libraries' authors can act on."""
    start_new_classes_from_their_defaults(OWN_BASES)
    prefer_own_short_names()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=r".*recommended to use .self.log.*sync_dist.*")
    # our data module has an empty list of validation batches where there is no such split, and says so itself
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings(
        "ignore", message=r".*does not have many workers.*"
    )  # rows are tokenised, workers gain little
    if not any(name.startswith("SLURM_") for name in os.environ):  # SLURM is installed, and this is not one of its jobs
        warnings.filterwarnings("ignore", message=r"The `srun` command is available")
