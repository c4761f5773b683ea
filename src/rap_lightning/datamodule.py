"""Scored preference data to goal-conditioned batches."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from rap_lightning.batches.dataset import EncodedPairs, encode_pairs
from rap_lightning.batches.encode import Encoder, Notes
from rap_lightning.batches.layouts import LAYOUTS, Collate
from rap_lightning.batches.loader import PairLoader
from rap_lightning.batches.sampler import Packing, StepSampler
from rap_lightning.batches.types import PromptBatch
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.generate import left_pad
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.pairs import BadRow, read_pair
from rap_lightning.preferences.report import DataReport
from rap_lightning.preferences.sources import load_split, splits_of
from rap_lightning.progress import batches_done

VALIDATION_NAMES = ("validation", "valid", "val", "test_prefs", "test")


@dataclass
class Prompts:
    """What ``predict`` generates for.

    Args:
        source: a parquet or json-lines file, folder or Hub id with the columns of a scored pair; by default the
            validation split. Each distinct conversation is one prompt.
        goal: the reward to ask for; by default the best of the goal template.
        limit: at most this many prompts.
    """

    source: str | None = None
    goal: float | None = None
    limit: int | None = None


class PreferenceDataModule(pl.LightningDataModule):
    """Reads scored pairs, relabels them as in the paper, tokenises and batches them.

    Every row that is dropped, repaired or truncated is counted in ``reports`` and printed with its reason.

    Args:
        source: a parquet or json-lines file, a folder of them, or a Hub id, with the columns prompt, chosen, rejected
            (message lists), score_chosen and score_rejected.
        goal: how the goal reads in the prompt; null trains on the plain pairs, without goals (the usual DPO).
        train_split: name of the split to train on.
        val_split: name of the split to validate and test on; by default the first that exists of validation, valid,
            val, test_prefs, test. It is relabelled like the training split.
        max_length: tokens of prompt and response together; longer ones are cut, and counted.
        max_prompt_length: a prompt is cut only where it and its longer response exceed max_length, and never below
            this many tokens; by default half of max_length. The goal is never cut.
        layout: how a batch is laid out for the model. padded: a row per response. packed: one row of all responses,
            each after its prompt. tree: one row in which responses share what they begin with. auto: tree. Where a
            model can't do that (checked at the start), its sequences go through it one at a time.
        batch_size: pairs per device and batch. Pairs per optimizer step are batch_size times
            trainer.accumulate_grad_batches times the number of devices.
        token_budget: tokens, padding included, in one forward pass: a batch with more is taken in several passes, which
            changes memory and speed and nothing else. By default a batch goes through the model at once.
        num_workers: processes that prepare batches; 0 does it in the main process.
        num_proc: processes that tokenise; by default one.
        outside_scale: what to do with scores outside the goal's scale: stop with an error, or drop such pairs, counted.
        seed: of the order in which pairs are seen.
        predict: what ``predict`` generates for.
    """

    def __init__(
        self,
        source: str,
        goal: GoalTemplate | None = OverallGoal(),  # noqa: B008 (immutable; jsonargparse wants an instance)
        train_split: str = "train",
        val_split: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        layout: Literal["auto", "padded", "packed", "tree"] = "auto",
        batch_size: int = 4,
        token_budget: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        outside_scale: Literal["error", "drop"] = "error",
        seed: int = 42,
        predict: Prompts = Prompts(),  # noqa: B008
    ) -> None:
        super().__init__()
        least: dict[str, tuple[int | None, int]] = {
            "max_length": (max_length, 1), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0),
            "token_budget": (token_budget, 1), "num_proc": (num_proc, 1), "predict.limit": (predict.limit, 1),
        }  # fmt: skip
        for name, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise ConfigError(f"--data.{name} must be at least {lowest}, found {value}")
        if goal is None and outside_scale != "error":
            raise ConfigError("--data.outside_scale has no effect with --data.goal null; remove one of the two.")
        if goal is None and predict.goal is not None:
            raise ConfigError("--data.predict.goal has no effect with --data.goal null; remove one of the two.")
        if goal is not None and predict.goal is not None and predict.goal not in goal.scale:
            scale = f"the scale from {goal.scale.low:g} to {goal.scale.high:g}"
            raise ConfigError(f"--data.predict.goal must lie on {scale}, found {predict.goal:g}")
        self.source, self.goal = source, goal
        self.train_split, self.val_split = train_split, val_split
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.layout = "tree" if layout == "auto" else layout
        self.token_budget = token_budget
        assert self.layout in LAYOUTS
        self.batch_size, self.num_workers, self.num_proc, self.seed = batch_size, num_workers, num_proc, seed
        self.predict, self.outside_scale = predict, outside_scale
        self.reports: dict[str, DataReport] = {}
        self._pairs: dict[str, EncodedPairs] = {}
        self._encoder: Encoder | None = None
        self._prompts: list[tuple[list[int], dict[str, Any]]] = []

    # -- preparing ------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        if self._encoder is not None:
            return self._encoder.tokenizer
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if hasattr(module, "tokenizer"):
            return module.tokenizer
        raise ConfigError("PreferenceDataModule takes its tokenizer from a PreferenceModule; none is attached.")

    @property
    def encoder(self) -> Encoder:
        """Renders and tokenises conversations at a goal."""
        if self._encoder is None:
            self._encoder = Encoder(self.tokenizer, self.goal, self.max_length, self.max_prompt_length)
        return self._encoder

    def prepare_data(self) -> None:
        """Fill the on-disk cache once per machine, before the other processes read it."""
        stage = str(self.trainer.state.fn.value) if self.trainer is not None and self.trainer.state.fn else "fit"
        wanted = {"fit": {self.train_split, self.validation_split()}, "predict": set()}
        for split in wanted.get(stage, {self.validation_split()}) - {None}:
            self._encode(str(split))

    def setup(self, stage: str) -> None:
        """Load what the stage needs; raises DataError with what is wrong before any model is loaded."""
        if stage == "predict":
            self._prompts = self._load_prompts()
            return
        validation = self.validation_split()
        if stage in ("validate", "test") and validation is None:
            raise DataError(f"{self.source} has no split to {stage} on. Name one with --data.val_split.")
        names = [self.train_split, validation] if stage == "fit" else [validation]
        for name in names:
            if name is not None and name not in self._pairs:
                self._pairs[name], self.reports[name] = self._encode(name)
                rank_zero_info("\n".join(self.reports[name].lines()))
        if stage == "fit" and validation is None:
            rank_zero_info(f"no validation: {self.source} has no split named {', '.join(VALIDATION_NAMES)}")

    def validation_split(self) -> str | None:
        """The split to validate on: the one named, else the first usual name that exists, else none."""
        if self.val_split is not None:
            return self.val_split
        available = splits_of(self.source)
        return next((n for n in VALIDATION_NAMES if n in available and n != self.train_split), None)

    def _encode(self, split: str) -> tuple[EncodedPairs, DataReport]:
        rows = load_split(self.source, split)
        return encode_pairs(
            rows, self.encoder, source=self.source, split=split, num_proc=self.num_proc,
            drop_outside=self.outside_scale == "drop",
        )  # fmt: skip

    # -- loaders --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> PairLoader:
        """Shuffled; the whole split once per epoch, however many devices share it."""
        return self._loader(self.train_split, shuffle=True)

    def val_dataloader(self) -> PairLoader | list[Any]:
        """In order; nothing if there is no validation split."""
        split = self.validation_split()
        return [] if split is None else self._loader(split, shuffle=False)

    def test_dataloader(self) -> PairLoader | list[Any]:
        """The validation split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Prompts at the goal, padded on the left."""
        pad = self.pad_id

        def collate(items: list[tuple[list[int], dict[str, Any]]]) -> PromptBatch:
            return left_pad([ids for ids, _ in items], pad, [record for _, record in items])

        return DataLoader(self._prompts, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def _loader(self, split: str, *, shuffle: bool) -> PairLoader:
        pairs, trainer = self._pairs[split], self.trainer
        if trainer is not None and trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ConfigError("--trainer.overfit_batches isn't supported; use --trainer.limit_train_batches.")
        sampler = StepSampler(
            len(pairs),
            self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer is not None and shuffle else 1,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            shuffle=shuffle,
            seed=self.seed,
            packing=Packing(pairs.sizes(), LAYOUTS[self.layout].tokens, self.token_budget or sys.maxsize),
        )
        resumes = trainer is not None and shuffle

        def skip() -> int:
            return batches_done(trainer) if resumes else 0

        collate = Collate(self.layout, self.pad_id)
        return PairLoader(pairs, sampler, collate, skip, num_workers=self.num_workers)

    @property
    def pad_id(self) -> int:
        """What padding is made of; masked, so any id would do."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    # -- predict --------------------------------------------------------------------------------------------------

    def encode_prompts(self, histories: list[Any], goal: float | None) -> list[list[int]]:
        """Token ids of conversations at a goal (``None`` without one), cut to max_prompt_length as in training.

        Raises:
            BadRow: the chat template refuses a conversation.
        """
        encoder = self.encoder
        room = encoder.max_length - encoder.max_prompt_length
        prompts = [encoder.fit(encoder.prompt(history, goal, Notes()), history, room) for history in histories]
        if cut := sum(prompt.cut > 0 for prompt in prompts):
            rank_zero_info(f"{cut:,} of {len(prompts):,} prompts cut to {encoder.max_prompt_length} tokens, goal kept")
        return [prompt.ids for prompt in prompts]

    def histories(self, split: str | None = None, source: str | None = None) -> list[Any]:
        """The distinct conversations of a split, in order; bad rows are left out and counted."""
        source = source or self.source
        rows = load_split(source, split or self.validation_split() or self.train_split)
        seen: dict[str, Any] = {}
        dropped = 0
        for row in rows:
            try:
                history = read_pair(row).history
            except BadRow:
                dropped += 1
                continue
            seen.setdefault(repr(history), history)
        if dropped:
            rank_zero_info(f"{source}: {dropped:,} of {len(rows):,} rows left out: not usable as pairs")
        if not seen:
            raise DataError(f"{source}: no usable prompt among {len(rows):,} rows.")
        return list(seen.values())

    def _load_prompts(self) -> list[tuple[list[int], dict[str, Any]]]:
        source = self.predict.source
        split = None
        if source is not None and Path(source).is_file():
            split = "train"
        histories = self.histories(split, source)[: self.predict.limit]
        goal = None
        if self.goal is not None:
            goal = self.goal.best if self.predict.goal is None else self.predict.goal
        printed = None if self.goal is None or goal is None else self.goal.printed(goal)
        records = [{"messages": list(history), "goal": printed} for history in histories]
        try:
            return list(zip(self.encode_prompts(histories, goal), records, strict=True))
        except BadRow as problem:
            raise DataError(f"{source or self.source}: a prompt can't be written: {problem.reason}") from problem
