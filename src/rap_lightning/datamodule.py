"""Scored preference data to goal-conditioned batches.

``prepare_data`` fills the caches on disk once per machine; ``setup`` reads the splits that the stage needs; the
``*_dataloader`` methods batch them. How rows are read is in rap_lightning.preferences, token ids and layouts are in
rap_lightning.batches.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from rap_lightning.batches.data_identity import DataIdentity
from rap_lightning.batches.dataset import EncodedPairs, PairEncoder, encode_pairs, join_weighted, note_encoding
from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.layouts import LAYOUTS, Collate
from rap_lightning.batches.loader import PairLoader
from rap_lightning.batches.prompts import (
    GOAL_OPTION,
    PredictPrompts,
    Prompt,
    PromptEncoder,
    collate_prompts,
    distinct_histories,
)
from rap_lightning.batches.sampler import Packing, StepSampler
from rap_lightning.batches.stream import StepShape, StreamedPairs
from rap_lightning.batches.types import PromptBatch, copies_at_once
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.generation import Generation
from rap_lightning.models.judge_rewards import judge_rewards
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pair_cache import draw_pairs, stored_pairs
from rap_lightning.preferences.pairs import BadRow, Message, Pair
from rap_lightning.preferences.read_pairs import fit_scale, unreached_goal_note
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.source_mix import stream_mixed
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, having, splits_of
from rap_lightning.training.protocols import policy_of
from rap_lightning.training.run_state import batches_done

FIRST_LOOK = 1000
"""Pairs of a stream that are read before the model is loaded."""


class PreferenceDataModule(pl.LightningDataModule):
    """Reads scored preferences, relabels them as in the paper, tokenises and batches them.

    Every row that is dropped, repaired or truncated is counted in ``reports`` and printed with its reason.

    Args:
        source: a parquet, arrow, json or json-lines file (text also compressed), a folder of them, or a Hub id; or a
            list of sources with weights. The format is found by the columns: scored pairs, several scored responses to
            a prompt, raw UltraFeedback, HelpSteer, ranked answers, ShareGPT.
        rejected_weight: weight of the loss of a pair under its rejected response's goal, or under a drawn one near it
            (goals_per_pair), in the mean over a step, where other pairs have weight 1: below 1, the policy imitates bad
            responses less. 0 is relabel chosen. Logged means stay plain means over pairs; those by origin tell the
            halves apart.
        best_goal_weight: weight of the loss of a pair under the best goal (best_goal), in the same mean.
        train_split: name of the split to train on.
        val_split: name of the split to validate and test on; by default the first that exists of validation, valid,
            val, test_prefs, test. It is relabelled like the training split.
        streaming: read the training split while training on it, for data larger than disk. Rows are read one by one,
            so repeats and contradictions are not found; set trainer.max_steps.
        shuffle_buffer: training pairs that a stream is shuffled among; by default 10,000.
        max_length: tokens of prompt and response together; longer ones are cut, and counted.
        max_prompt_length: a prompt is cut only where it and its longer response exceed max_length, and never below
            this many tokens; by default half of max_length. The goal is never cut.
        layout: how a batch is laid out for the model. padded: a row per response. packed: one row of all responses,
            each after its prompt. tree: one row in which responses share their common prefixes. auto: tree. Where a
            model can't do that (checked at the start), its sequences are processed one at a time.
        batch_size: pairs per device and batch. Pairs per optimizer step are batch_size times
            trainer.accumulate_grad_batches times the number of devices.
        token_budget: tokens, padding included, in one forward pass: a batch with more is split into several passes,
            which changes memory and speed and nothing else. By default a batch is one forward pass.
        num_workers: processes that prepare batches; 0 prepares them in the main process. By default 2 for each GPU (1
            for a stream, which every one of them reads), so that a GPU doesn't wait for its batches, and 0 without one.
        allow_changed: resume from a checkpoint though the training data have changed since: the run continues at the
            same place in the epoch. By default that is refused, because pairs would be repeated or left out. Of a
            stream, the first 1,000 pairs are compared.
        predict: what ``predict`` generates for.
        reading: how rows become pairs (goal, relabel, filters, ...): the options of
            rap_lightning.preferences.reading_options.ReadingOptions.
    """

    def __init__(
        self,
        source: str | list[Source],
        *,
        rejected_weight: float = 1.0,
        best_goal_weight: float = 1.0,
        train_split: str = "train",
        val_split: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        layout: Literal["auto", "padded", "packed", "tree"] = "auto",
        batch_size: int = 4,
        token_budget: int | None = None,
        num_workers: int | None = None,
        allow_changed: bool = False,
        predict: PredictPrompts = PredictPrompts(),  # noqa: B008 (jsonargparse wants an instance)
        **reading: Any,
    ) -> None:
        super().__init__()
        read = ReadingOptions(source, tool_turns=True, **reading)
        _check_least(
            max_length=(max_length, 1), batch_size=(batch_size, 1), num_workers=(num_workers, 0),
            token_budget=(token_budget, 1), num_proc=(read.num_proc, 1), shuffle_buffer=(shuffle_buffer, 1),
            **{"predict.limit": (predict.limit, 1)},
        )  # fmt: skip
        if streaming:
            _check_stream(read, token_budget)
        elif shuffle_buffer is not None:
            raise ConfigError("--data.shuffle_buffer has no effect without --data.streaming true; remove it.")
        predict.check(read.goal)
        self.template = read.template
        self.sources, self.goal, self.rules, self.relabelling = read.sources, read.goal, read.rules, read.relabelling
        self.rewards, self.num_proc, self.seed = read.rewards, read.num_proc, read.seed
        self.rejected_weight, self.best_goal_weight = rejected_weight, best_goal_weight
        self.weight_column = read.rules.weight_column
        self.origin_weights = self.relabelling.weights(rejected_weight, best_goal_weight)
        self.train_split, self.val_split = train_split, val_split
        self.streaming, self.shuffle_buffer = streaming, 10_000 if shuffle_buffer is None else shuffle_buffer
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.layout = "tree" if layout == "auto" else layout
        self.batch_size, self.token_budget, self.num_workers = batch_size, token_budget, num_workers
        self.allow_changed, self.predict = allow_changed, predict
        self.reports: dict[str, list[DataReport]] = {}
        self._pairs: dict[str, EncodedPairs] = {}
        self._prompts: list[Prompt] = []
        self._unscored = False
        self._in_stream = sys.maxsize  # training pairs of a stream, where the first look saw all of them
        self._tables: dict[str, RewardTable] = {}
        self._identity: DataIdentity | None = None  # of the training split

    # -- preparing ----------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """Renders and tokenises conversations at a goal, with the policy's tokenizer.

        Raises:
            ConfigError: no PreferenceModule is attached.
        """
        policy = policy_of(self.trainer)
        if policy is None:
            raise ConfigError("PreferenceDataModule takes its tokenizer from a PreferenceModule; none is attached.")
        tokenizer = self.template.applied(policy.tokenizer)  # in place: export and sampling use the same one
        encoder = Encoder(tokenizer, self.goal, self.max_length, self.max_prompt_length)
        encoder.check_thinking(self.rules.thinking)
        return encoder

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def prepare_data(self) -> None:
        """Fill the on-disk cache once per machine, before the other processes read it."""
        stage = str(self.trainer.state.fn.value) if self.trainer is not None and self.trainer.state.fn else "fit"
        validation = self.validation_split()
        wanted = {"fit": [self.train_split, validation], "predict": []}
        self._fit_scale()
        for split in dict.fromkeys(wanted.get(stage, [validation])):
            if split is not None and not (self.streaming and split == self.train_split):
                self._encode(split)

    def setup(self, stage: str) -> None:
        """Read what the stage needs, before any model is loaded.

        Raises:
            DataError: with what is wrong in the data.
        """
        self._fit_scale()
        if stage == "predict":
            self._prompts = self._load_prompts()
            return
        validation = self.validation_split()
        if stage in ("validate", "test") and validation is None:
            raise DataError(
                f"{self._named()} has no split to {TrainerFn(stage).value} on. Name one with --data.val_split."
            )
        names = [self.train_split, validation] if stage == "fit" else [validation]
        for name in names:
            if name is None or name in self.reports:
                continue
            if self.streaming and name == self.train_split:
                self.reports[name] = [self._first_look()]
            else:
                self._pairs[name], self.reports[name] = self._encode(name)
                if name == self.train_split:
                    self._identity = DataIdentity.of_table(self._pairs[name])
            rank_zero_info("\n".join(line for report in self.reports[name] for line in report.lines()))
            whole = name == self.train_split and not self.streaming  # only the beginning of a stream was read
            if whole and (note := unreached_goal_note(self.rules, self.reports[name])):
                rank_zero_info(note)
            self._refuse_idle_ranks(name)
        if stage == "fit" and validation is None:
            rank_zero_info(f"no validation: {self._named()} has no split named {', '.join(VALIDATION_NAMES)}")

    def _refuse_idle_ranks(self, split: str) -> None:
        """Raise DataError where a rank would have no pair of its own, and only wait for the others."""
        ranks = self.trainer.world_size if self.trainer is not None else 1
        pairs = len(self._pairs[split]) if split in self._pairs else self._in_stream
        if split == self.train_split and pairs < ranks:
            raise DataError(
                f"{self._named()} (split {split}) has {pairs:,} training pairs for {ranks:,} processes: some would "
                "never have one. Use at most as many --trainer.devices times --trainer.num_nodes as there are pairs."
            )

    def validation_split(self) -> str | None:
        """The split to validate on: the one named, else the first usual name that exists, else none."""
        if self.val_split is not None:
            return self.val_split
        available = {name for source in self.sources for name in splits_of(source)}
        return next((n for n in VALIDATION_NAMES if n in available and n != self.train_split), None)

    def _named(self) -> str:
        return ", ".join(source.path for source in self.sources)

    def _having(self, split: str) -> list[Source]:
        """The sources that have a split; all of them must have the training split."""
        if split == self.train_split or len(self.sources) == 1:
            return self.sources
        return having(self.sources, split, self.train_split)

    def digests(self) -> dict[str, str]:
        """Digests of each split that is loaded; they must be the same on every rank."""
        found = {f"data of split {name}": pairs.digest() for name, pairs in self._pairs.items()}
        return found | {
            f"rows of split {name}": str([(r.read, r.kept) for r in reports]) for name, reports in self.reports.items()
        }

    def _fit_scale(self) -> None:
        if self.goal is None or not self.goal.needs_fit:
            return
        if fit_scale(self._rules(self.train_split), self.sources, self.train_split, num_proc=self.num_proc):
            rank_zero_info(f"goal fitted on the training split: {self.goal.fitted()}")

    def _rules(self, split: str) -> Rules:
        """The rules for a split, with the judge's rewards of its responses where a judge gives them.

        Weights of pairs are those of the training split: validation means are not weighted.
        """
        rules = self.rules if split == self.train_split else replace(self.rules, weight_column=None)
        if self.rewards is None:
            return rules
        if split not in self._tables:
            first = self.trainer is None or self.trainer.local_rank == 0  # it prepares the data for the others
            self._tables[split], lines = judge_rewards(
                self.rewards, self._having(split), split, self.rules, num_proc=self.num_proc, asks=first
            )
            rank_zero_info("\n".join(lines))
        return replace(rules, rewards=self._tables[split])

    def _encode(self, split: str) -> tuple[EncodedPairs, list[DataReport]]:
        """The encoded pairs of all sources that have the split, each as often as its weight says."""
        parts, reports = [], []
        for source in self._having(split):
            table, report = stored_pairs(source, split, self._rules(split), num_proc=self.num_proc)
            encoded = encode_pairs(
                table, self.encoder, self.relabelling, report,
                num_proc=self.num_proc, strict=self.rules.bad_rows == "error",
            )  # fmt: skip
            parts.append((encoded, source.weight if split == self.train_split else 1.0))
            reports.append(report)
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0], reports
        whole = join_weighted(parts, self.seed)
        if len(whole) == 0:
            raise DataError(f"{self._named()} (split {split}): the source weights select no pairs.")
        rank_zero_info(f"{split}: {len(whole.table):,} scored pairs an epoch, by the weights of {len(parts)} sources")
        return whole, reports

    def _first_look(self) -> DataReport:
        """Read and encode the beginning of the stream, to find most errors before the model is loaded."""
        report = DataReport(self._named(), f"{self.train_split} (first {FIRST_LOOK:,} pairs of the stream)")
        stream = stream_mixed(self.sources, self.train_split, self.rules, report, self.seed)
        pairs = list(islice(stream, FIRST_LOOK))
        self._unscored = any(math.isnan(pair.rewards[0]) for pair in pairs)
        rows = PairEncoder(self.encoder, self.relabelling)(pairs)
        self._identity = DataIdentity.of_stream(pairs, rows)
        encoded = note_encoding(rows, report)
        self._in_stream = sum(encoded) if len(pairs) < FIRST_LOOK else sys.maxsize
        if not any(encoded):
            raise DataError(
                "\n".join([f"{self._named()}: no pair of the first {FIRST_LOOK:,} is left.", *report.lines()])
            )
        return report

    @property
    def has_rewards(self) -> bool:
        """Whether every training pair has rewards, which a goal requires. Known after ``setup``."""
        if self.goal is not None or self.train_split not in self._pairs:
            return self.goal is not None or not self._unscored
        rewards = self._pairs[self.train_split].table.select_columns(["rewards"])
        return all(math.isfinite(row["rewards"][0]) for row in rewards)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which data the run is trained on."""
        return {} if self._identity is None else self._identity.as_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the data of the checkpoint.

        Raises:
            ConfigError: they have changed, and ``allow_changed`` is not set.
        """
        if self._identity is None or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if not (change := self._identity.change_since(state_dict)):
            return
        text = f"the checkpoint was trained on other data than {self._named()} (split {self.train_split}): {change}."
        if not self.allow_changed:
            raise ConfigError(
                f"{text} Resume with the data of that run, start anew without --ckpt_path, or set "
                "--data.allow_changed true to continue at the same place in the epoch with these data."
            )
        rank_zero_warn(f"{text} The run continues at the same place in the epoch with these data.")

    # -- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> PairLoader:
        """Shuffled batches: the whole split once per epoch, however many devices share it."""
        return self._stream_loader() if self.streaming else self._loader(self.train_split, shuffle=True)

    def val_dataloader(self) -> PairLoader | list[Any]:
        """Batches of the validation split in order; an empty list where there is none."""
        split = self.validation_split()
        return [] if split is None else self._loader(split, shuffle=False)

    def test_dataloader(self) -> PairLoader | list[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        collate = partial(collate_prompts, pad_id=self.pad_id)
        return DataLoader(self._prompts, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def _loader(self, split: str, *, shuffle: bool) -> PairLoader:
        pairs, policy = self._pairs[split], policy_of(self.trainer)
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ConfigError("--trainer.overfit_batches isn't supported; use --trainer.limit_train_batches.")
        # Packing sorts pairs by length. A loss that compares the pairs of a batch must not get batches of one length.
        packing = None
        if policy is None or not policy.compares_pairs:
            packing = Packing(pairs.sizes(), LAYOUTS[self.layout].tokens, self.token_budget or sys.maxsize)
        shape, loss_weights = self._step_shape(), pairs.loss_weights(self.origin_weights)
        sampler = StepSampler(
            len(pairs), shape.batch_size, accumulate=shape.accumulate if shuffle else 1,
            num_replicas=shape.num_replicas, rank=shape.rank, shuffle=shuffle, seed=self.seed, packing=packing,
            weigh=None if loss_weights is None else loss_weights.__getitem__,
        )  # fmt: skip
        return self._pair_loader(pairs, sampler, resumes=shuffle)

    def _stream_loader(self) -> PairLoader:
        stream = StreamedPairs(
            self.sources, self.train_split, self.rules, PairEncoder(self.encoder, self.relabelling), self._step_shape(),
            buffer=self.shuffle_buffer, seed=self.seed, origin_weights=self.origin_weights,
        )  # fmt: skip
        return self._pair_loader(stream, None, resumes=True)

    def _pair_loader(
        self, pairs: EncodedPairs | StreamedPairs, sampler: StepSampler | None, *, resumes: bool
    ) -> PairLoader:
        trainer = self.trainer

        def position() -> tuple[int, int]:
            return (trainer.current_epoch, batches_done(trainer)) if trainer is not None and resumes else (0, 0)

        # Workers must not take their seeds from the run's own generator: a resumed run restores that one's state.
        generator = torch.Generator().manual_seed(self.seed)
        collate = Collate(self.layout, self.pad_id)
        return PairLoader(pairs, collate, position, sampler, generator=generator, **self._feeding(pairs))

    def _feeding(self, pairs: EncodedPairs | StreamedPairs) -> dict[str, Any]:
        """Return the DataLoader's options that keep a device supplied: workers that stay, and page-locked batches."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        feeds, streamed = copies_at_once(device), isinstance(pairs, StreamedPairs)
        workers = self.num_workers
        if workers is None:
            workers = (1 if streamed else 2) if feeds else 0
        # Workers of a stream start with each epoch: they hold a copy of it, and it is told where to begin.
        stay = feeds and workers > 0 and not streamed
        return {"num_workers": workers, "persistent_workers": stay, "pin_memory": feeds}

    def _step_shape(self) -> StepShape:
        trainer = self.trainer
        if trainer is None:
            return StepShape(self.batch_size)
        return StepShape(self.batch_size, trainer.accumulate_grad_batches, trainer.world_size, trainer.global_rank)

    # -- prompts and pairs for predict and callbacks ------------------------------------------------------------------

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.encoder, rank_zero_info)

    def prompt_batch(self, histories: list[list[Message]], goal: float | None, generation: Generation) -> PromptBatch:
        """Conversations at a goal, ready for :func:`rap_lightning.models.generation.generate`, guidance included."""
        prompts = self.prompt_encoder.prompts(histories, goal, generation.guidance, generation.against)
        return collate_prompts(prompts, self.pad_id)

    def histories(self, split: str | None = None, source: str | None = None) -> list[list[Message]]:
        """The distinct conversations of a split, in order; rows that can't be used are left out and counted."""
        name = split or self.validation_split() or self.train_split
        sources = [Source(source)] if source is not None else self._having(name)
        return distinct_histories(sources, name, self.rules, self.num_proc, rank_zero_info)

    def scored_pairs(self, split: str, limit: int, seed: int) -> list[Pair]:
        """At most ``limit`` scored pairs of a split, drawn by the seed and their content alone, in the data's order.

        Raises:
            ConfigError: the split is a stream.
        """
        if self.streaming and split == self.train_split:
            raise ConfigError(f"the split {split} is a stream, which shows each pair once; name a --data.val_split.")
        tables = [
            stored_pairs(source, split, self._rules(split), num_proc=self.num_proc)[0] for source in self._having(split)
        ]
        return draw_pairs(tables, limit, seed)

    def _load_prompts(self) -> list[Prompt]:
        policy = policy_of(self.trainer)
        generation = Generation() if policy is None else policy.generation
        source = self.predict.source
        split = None
        if source is not None:
            available = splits_of(Source(source))
            split = next((n for n in (*VALIDATION_NAMES, self.train_split) if n in available), available[0])
        histories = self.histories(split, source)[: self.predict.limit]
        goal = self.predict.goal
        if goal is None and self.goal is not None and self.relabelling.conditioned:
            goal = self.goal.best
        elif goal is not None and self.goal is not None and (note := self.goal.refuse_outside(goal, GOAL_OPTION)):
            rank_zero_info(note)
        if generation.guidance:
            self.prompt_encoder.check_guidance(goal, generation.against)
        try:
            return self.prompt_encoder.prompts(histories, goal, generation.guidance, generation.against)
        except BadRow as problem:
            raise DataError(f"{source or self._named()}: a prompt can't be encoded: {problem.reason}") from problem


def _check_least(**least: tuple[int | None, int]) -> None:
    """Options by name: the value, and the lowest value that is allowed."""
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ConfigError(f"--data.{name} must be at least {lowest}, found {value}")


def _check_stream(read: ReadingOptions, token_budget: int | None) -> None:
    """Refuse options that need all rows before the first step: a stream gives each row once, during training."""
    if read.rewards is not None:
        raise ConfigError(
            f"--data.rewards {type(read.rewards).__name__} looks at all data before the first step, and a stream is "
            "read while training on it. Score it beforehand: rap-lightning score."
        )
    if read.goal is not None and read.goal.needs_fit:
        fitted = "scale" if read.goal.scale.needs_fit else "neutral"
        kind = read.goal.scale if fitted == "scale" else read.goal
        raise ConfigError(
            f"--data.goal.{fitted}: {type(kind).__name__} is fitted on the training split, which a stream "
            "shows only once. Give its numbers (rap-lightning inspect prints those of a sample)."
        )
    if token_budget is not None:
        raise ConfigError(
            "--data.token_budget needs to know the length of every pair, which a stream doesn't tell: set a "
            "smaller --data.batch_size and more --trainer.accumulate_grad_batches instead."
        )
    if read.rules.filters.repeats == "drop":
        raise ConfigError("--data.filters.repeats drop has no effect on a stream, whose rows are read one by one.")
