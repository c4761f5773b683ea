"""Scored preference data to goal-conditioned batches."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from rap_lightning.batches.dataset import EncodedPairs, encode_pairs
from rap_lightning.batches.encode import Encoder, Notes
from rap_lightning.batches.layouts import LAYOUTS, Collate
from rap_lightning.batches.loader import PairLoader
from rap_lightning.batches.pair_encoder import PairEncoder, note_encoding
from rap_lightning.batches.sampler import Packing, StepSampler
from rap_lightning.batches.stream import StepShape, StreamedPairs, StreamLoader
from rap_lightning.batches.types import PromptBatch
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.generation import Generation, left_pad
from rap_lightning.models.judge_rewards import judge_rewards
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.hashing import hash_text
from rap_lightning.preferences.judge import Judge, rated_goal
from rap_lightning.preferences.pair_cache import as_pair, stored_pairs
from rap_lightning.preferences.pairs import BadRow, Pair
from rap_lightning.preferences.read_pairs import fit_scale, unreached_goal_note
from rap_lightning.preferences.relabelling import Mode, Relabelling
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import Selection
from rap_lightning.preferences.source_mix import copies, stream_mixed
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, as_sources, having, splits_of
from rap_lightning.training.protocols import policy_of
from rap_lightning.training.run_state import batches_done

Prompt = tuple[list[int], dict[str, Any], list[int] | None]
"""Token ids at the goal, what is written beside the response, and with guidance the ids at the low goal."""
FIRST_LOOK = 1000
"""Pairs of a stream that are read before the model is loaded."""


@dataclass
class Prompts:
    """What ``predict`` generates for.

    Args:
        source: a file, folder or Hub id in any format that is read for training; by default the validation split. Each
            distinct conversation is one prompt.
        goal: the number to ask for, on the scale that goals state; by default the best of the goal
            template, and none where training pairs state none (relabel none).
        limit: at most this many prompts.
    """

    source: str | None = None
    goal: float | None = None
    limit: int | None = None


class PreferenceDataModule(pl.LightningDataModule):
    """Reads scored preferences, relabels them as in the paper, tokenises and batches them.

    Every row that is dropped, repaired or truncated is counted in ``reports`` and printed with its reason.

    Args:
        source: a parquet, arrow, json or json-lines file (text also compressed), a folder of them, or a Hub id; or a
            list of sources with weights. How rows look is found by their columns: scored pairs, several scored
            responses to a prompt, raw UltraFeedback, HelpSteer, ranked answers, ShareGPT.
        goal: how the goal reads in the prompt; null trains on the plain pairs, without goals (the usual DPO), and needs
            no scores.
        relabel: both halves of each pair (the paper), the chosen or the rejected one only, none (plain pairs, chosen by
            the same rules: the baseline), or half (both halves of a seeded half of the prompts: the paper's Half-RA).
            By default both, and none where there is no goal.
        rejected_weight: what the loss of a pair under its rejected response's goal counts in the mean over a step,
            where others count 1: below 1, the policy imitates bad responses less. 0 is relabel chosen. Logged means
            stay plain ones over pairs; those by origin tell the halves apart.
        keep_original: also train on each pair without a goal.
        ties: a pair whose goals print the same: drop it, keep its chosen half only, or stop with an error.
        rewards: a judge that gives every response its reward before training, in the place of the scores that the data
            have or lack: ImplicitReward (the log-ratio of a trained DPO model and its base, for data without scores),
            RewardModel, or any other that score takes. What is judged once is kept in ~/.cache/rap-lightning. Goals
            then state how a reward ranks in the training split (QuantileScale), unless the goal's scale maps them
            otherwise. Where rewards contradict the data's labels the higher reward wins, and they are counted.
        selection: which pairs are made of several responses to a prompt; by default the best against a random other,
            as in the paper (BestVsRandom; also BestVsWorst, AllPairs, AdjacentPairs).
        filters: what is left out on purpose; each filter counts what it removes.
        outside_scale: scores outside the goal's scale: stop with an error, drop such pairs or responses, or clip them.
        bad_rows: rows that can't be used: drop and count them, or stop with an error.
        format: of the rows: auto, pairs, completions, ultrafeedback, helpsteer, ranked, sharegpt, or the import path of
            a function that makes one of these of a row.
        columns: new names for columns, {theirs: ours}, as in {chosen_score: score_chosen}.
        train_split: name of the split to train on.
        val_split: name of the split to validate and test on; by default the first that exists of validation, valid,
            val, test_prefs, test. It is relabelled like the training split.
        streaming: read the training split while training on it, for data larger than disk. Rows are looked at one by
            one, so repeats and contradictions are not found; set trainer.max_steps.
        shuffle_buffer: training pairs that a stream is shuffled among; by default 10,000.
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
        num_proc: processes that read and tokenise; by default one.
        seed: of the order in which pairs are seen, of the half that relabel half takes, and of what weights draw.
        predict: what ``predict`` generates for.
    """

    def __init__(
        self,
        source: str | list[Source],
        goal: GoalTemplate | None = OverallGoal(),  # noqa: B008 (immutable; jsonargparse wants an instance)
        relabel: Mode | None = None,
        rejected_weight: float = 1.0,
        keep_original: bool = False,
        ties: Literal["drop", "chosen", "error"] = "drop",
        rewards: Judge | None = None,
        selection: Selection | None = None,
        filters: Filters = Filters(),  # noqa: B008
        outside_scale: Literal["error", "drop", "clip"] = "error",
        bad_rows: Literal["drop", "error"] = "drop",
        format: str = "auto",
        columns: dict[str, str] | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        layout: Literal["auto", "padded", "packed", "tree"] = "auto",
        batch_size: int = 4,
        token_budget: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 42,
        predict: Prompts = Prompts(),  # noqa: B008
    ) -> None:
        super().__init__()
        _check_least(
            max_length=(max_length, 1), batch_size=(batch_size, 1), num_workers=(num_workers, 0),
            token_budget=(token_budget, 1), num_proc=(num_proc, 1), shuffle_buffer=(shuffle_buffer, 1),
            **{"predict.limit": (predict.limit, 1)},
        )  # fmt: skip
        self.rewards, goal = rewards, rated_goal(rewards, goal)
        if streaming:
            _check_stream(rewards, goal, filters, token_budget)
        elif shuffle_buffer is not None:
            raise ConfigError("--data.shuffle_buffer has no effect without --data.streaming true; remove it.")
        _check_predicted(predict.goal, goal)
        self.sources, self.goal = as_sources(source), goal
        self.relabelling = Relabelling.of(relabel, goal, keep_original, seed)
        self.rejected_weight = rejected_weight
        self.origin_weights = self.relabelling.weights(rejected_weight)
        self.rules = Rules(
            goal, self.relabelling, ties, selection, filters, outside_scale, bad_rows, format, columns, tool_turns=True
        )
        self.train_split, self.val_split = train_split, val_split
        self.streaming, self.shuffle_buffer = streaming, 10_000 if shuffle_buffer is None else shuffle_buffer
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.layout = "tree" if layout == "auto" else layout
        self.token_budget = token_budget
        assert self.layout in LAYOUTS
        self.batch_size, self.num_workers, self.num_proc, self.seed = batch_size, num_workers, num_proc, seed
        self.predict = predict
        self.reports: dict[str, list[DataReport]] = {}
        self._pairs: dict[str, EncodedPairs] = {}
        self._encoder: Encoder | None = None
        self._prompts: list[Prompt] = []
        self._unscored = False
        self._in_stream = sys.maxsize  # training pairs, where all of them were seen at the first look
        self._tables: dict[str, RewardTable] = {}

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
        validation = self.validation_split()
        wanted = {"fit": [self.train_split, validation], "predict": []}
        self._fit_scale()
        for split in dict.fromkeys(wanted.get(stage, [validation])):
            if split is not None and not (self.streaming and split == self.train_split):
                self._encode(split)

    def setup(self, stage: str) -> None:
        """Load what the stage needs; raises DataError with what is wrong before any model is loaded."""
        self._fit_scale()
        if stage == "predict":
            self._prompts = self._load_prompts()
            return
        validation = self.validation_split()
        if stage in ("validate", "test") and validation is None:
            raise DataError(f"{self._named()} has no split to {stage} on. Name one with --data.val_split.")
        names = [self.train_split, validation] if stage == "fit" else [validation]
        for name in names:
            if name is None or name in self.reports:
                continue
            if self.streaming and name == self.train_split:
                self.reports[name] = [self._first_look()]
            else:
                self._pairs[name], self.reports[name] = self._encode(name)
            rank_zero_info("\n".join(line for report in self.reports[name] for line in report.lines()))
            whole = name == self.train_split and not self.streaming  # of a stream the beginning alone was seen
            if whole and (note := unreached_goal_note(self.rules, self.reports[name])):
                rank_zero_info(note)
            self._refuse_idle_ranks(name)
        if stage == "fit" and validation is None:
            rank_zero_info(f"no validation: {self._named()} has no split named {', '.join(VALIDATION_NAMES)}")

    def _refuse_idle_ranks(self, split: str) -> None:
        """A rank without a pair of its own would only wait for the others."""
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
        """The sources that have a split; all of them must have the one that is trained on."""
        if split == self.train_split or len(self.sources) == 1:
            return self.sources
        return having(self.sources, split, self.train_split)

    def digests(self) -> dict[str, str]:
        """Of each split that is loaded: what must be the same on every rank."""
        found = {f"data of split {name}": pairs.digest() for name, pairs in self._pairs.items()}
        return found | {
            f"rows of split {name}": str([(r.read, r.kept) for r in reports]) for name, reports in self.reports.items()
        }

    def _fit_scale(self) -> None:
        """Take a scale's open numbers from the training split."""
        if self.goal is None or not self.goal.scale.needs_fit:
            return
        if fit_scale(self._rules(self.train_split), self.sources, self.train_split, num_proc=self.num_proc):
            rank_zero_info(f"scale fitted on the training split: {self.goal.scale}")

    def _rules(self, split: str) -> Rules:
        """The rules for a split, with the judge's rewards of its responses where a judge gives them."""
        if self.rewards is None:
            return self.rules
        if split not in self._tables:
            first = self.trainer is None or self.trainer.local_rank == 0  # it has prepared the data for the others
            self._tables[split], lines = judge_rewards(
                self.rewards, self._having(split), split, self.rules, num_proc=self.num_proc, asks=first
            )
            rank_zero_info("\n".join(lines))
        return replace(self.rules, rewards=self._tables[split])

    def _encode(self, split: str) -> tuple[EncodedPairs, list[DataReport]]:
        """The encoded pairs of all sources that have the split, each as often as its weight says."""
        from datasets import concatenate_datasets

        parts, reports = [], []
        for source in self._having(split):
            table, report = stored_pairs(source, split, self._rules(split), num_proc=self.num_proc)
            encoded = encode_pairs(
                table,
                self.encoder,
                self.relabelling,
                report,
                num_proc=self.num_proc,
                strict=self.rules.bad_rows == "error",
            )
            parts.append((encoded.table, encoded.index.pairs, source.weight if split == self.train_split else 1.0))
            reports.append(report)
        if len(parts) == 1 and parts[0][2] == 1.0:
            return encoded, reports
        untied, tied = [], []
        for table, pairs, weight in parts:
            ids = table.select_columns(["pair_id"])[:]["pair_id"]
            times = [copies(ids[row], weight, self.seed) for row in range(len(table))]
            untied.append(table.select([row for row in range(pairs) for _ in range(times[row])]))
            tied.append(table.select([row for row in range(pairs, len(table)) for _ in range(times[row])]))
        whole = concatenate_datasets([*untied, *tied])
        if len(whole) == 0:
            raise DataError(f"{self._named()} (split {split}): the weights leave no pair.")
        rank_zero_info(f"{split}: {len(whole):,} scored pairs an epoch, by the weights of {len(parts)} sources")
        return EncodedPairs(whole, self.relabelling, self.max_length, sum(map(len, tied))), reports

    def _first_look(self) -> DataReport:
        """Read and encode the beginning of the stream, so that most faults show before the model is loaded."""
        report = DataReport(self._named(), f"{self.train_split} (first {FIRST_LOOK:,} pairs of the stream)")
        stream = stream_mixed(self.sources, self.train_split, self.rules, report, self.seed)
        pairs = list(islice(stream, FIRST_LOOK))
        self._unscored = any(math.isnan(pair.rewards[0]) for pair in pairs)
        rows = PairEncoder(self.encoder, self.relabelling)(pairs)
        encoded = note_encoding(rows, report)
        self._in_stream = sum(encoded) if len(pairs) < FIRST_LOOK else sys.maxsize
        if not any(encoded):
            raise DataError(
                "\n".join([f"{self._named()}: no pair of the first {FIRST_LOOK:,} is left.", *report.lines()])
            )
        return report

    @property
    def has_rewards(self) -> bool:
        """Whether every training pair has rewards; with a goal they must. Known after ``setup``."""
        if self.goal is not None or self.train_split not in self._pairs:
            return self.goal is not None or not self._unscored
        rewards = self._pairs[self.train_split].table.select_columns(["rewards"])
        return all(math.isfinite(row["rewards"][0]) for row in rewards)

    # -- loaders --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> PairLoader | StreamLoader:
        """Shuffled; the whole split once per epoch, however many devices share it."""
        return self._stream_loader() if self.streaming else self._loader(self.train_split, shuffle=True)

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

        def collate(items: list[Prompt]) -> PromptBatch:
            batch = left_pad([ids for ids, _, _ in items], pad, [record for _, record, _ in items])
            low = [ids for _, _, ids in items if ids is not None]
            return replace(batch, against=left_pad(low, pad, [{}] * len(low))) if low else batch

        return DataLoader(self._prompts, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def _loader(self, split: str, *, shuffle: bool) -> PairLoader:
        pairs, trainer = self._pairs[split], self.trainer
        if trainer is not None and trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ConfigError("--trainer.overfit_batches isn't supported; use --trainer.limit_train_batches.")
        # a loss that compares the pairs of a batch must not get batches of one length
        packing, module = None, policy_of(trainer)
        if module is None or not module.compares_pairs:
            packing = Packing(pairs.sizes(), LAYOUTS[self.layout].tokens, self.token_budget or sys.maxsize)
        sampler = StepSampler(
            len(pairs),
            self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer is not None and shuffle else 1,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            shuffle=shuffle,
            seed=self.seed,
            packing=packing,
            weigh=None if self.rejected_weight == 1 else lambda number: self.origin_weights[pairs.index[number][1]],
        )
        resumes = trainer is not None and shuffle

        def skip() -> int:
            return batches_done(trainer) if resumes else 0

        collate = Collate(self.layout, self.pad_id)
        return PairLoader(pairs, sampler, collate, skip, num_workers=self.num_workers, generator=self._generator())

    def _stream_loader(self) -> StreamLoader:
        trainer = self.trainer
        shape = StepShape(
            self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer is not None else 1,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
        )
        stream = StreamedPairs(
            self.sources, self.train_split, self.rules, PairEncoder(self.encoder, self.relabelling), shape,
            buffer=self.shuffle_buffer, seed=self.seed, max_length=self.max_length,
            origin_weights=self.origin_weights,
        )  # fmt: skip

        def position() -> tuple[int, int]:
            return (trainer.current_epoch, batches_done(trainer)) if trainer is not None else (0, 0)

        return StreamLoader(
            stream, Collate(self.layout, self.pad_id), position, num_workers=self.num_workers,
            generator=self._generator(),
        )  # fmt: skip

    def _generator(self) -> torch.Generator:
        """Seeds of workers must not be drawn from the run's own random numbers, which a resumed run goes on with."""
        return torch.Generator().manual_seed(self.seed)

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
        text = None
        if self.goal is not None and goal is not None:
            text = self.goal.write(goal, self.goal.best_attributes)
        return self._encode_prompts(histories, text)

    def prompt_batch(self, histories: list[Any], goal: float | None, generation: Generation) -> PromptBatch:
        """Conversations at a goal, ready for :func:`rap_lightning.models.generation.generate`, guidance included.

        Raises:
            BadRow: the chat template refuses a conversation.
            ConfigError: guidance is asked for, and the data have no goal, or the low goal is outside its scale.
        """
        batch = left_pad(self.encode_prompts(histories, goal), self.pad_id, [{}] * len(histories))
        if generation.guidance == 0:
            return batch
        low = self._encode_prompts(histories, self._low(generation)[0])
        return replace(batch, against=left_pad(low, self.pad_id, [{}] * len(histories)))

    def _low(self, generation: Generation) -> tuple[str | None, str]:
        """Text and print of the goal that guidance pushes away from."""
        if self.goal is None:
            raise ConfigError(
                "--model.generation.guidance needs goals to push away from, and there are none with --data.goal null."
            )
        return self.goal.low(generation.against)

    def _encode_prompts(self, histories: list[Any], text: str | None) -> list[list[int]]:
        encoder = self.encoder
        room = encoder.max_length - encoder.max_prompt_length
        prompts = [encoder.fit(encoder.prompt(history, text, Notes()), history, room) for history in histories]
        if cut := sum(prompt.cut > 0 for prompt in prompts):
            rank_zero_info(f"{cut:,} of {len(prompts):,} prompts cut to {encoder.max_prompt_length} tokens, goal kept")
        return [prompt.ids for prompt in prompts]

    def histories(self, split: str | None = None, source: str | None = None) -> list[Any]:
        """The distinct conversations of a split, in order; rows that can't be used are left out and counted."""
        plain = replace(
            self.rules, goal=None, relabelling=Relabelling("none"), ties="drop", outside_scale="error",
            filters=Filters(), selection=None, tool_turns=False,
        )  # fmt: skip
        name = split or self.validation_split() or self.train_split
        seen: dict[str, Any] = {}
        for one in [Source(source)] if source is not None else self._having(name):
            table, report = stored_pairs(one, name, plain, num_proc=self.num_proc)
            if report.dropped:
                rank_zero_info("\n".join(report.lines()))
            for row in table.select_columns(["history"]):
                seen.setdefault(row["history"], None)
        return [json.loads(history) for history in seen]

    def scored_pairs(self, split: str, limit: int, seed: int) -> list[Pair]:
        """At most ``limit`` scored pairs of a split, drawn by the seed and their content alone, in the data's order.

        Raises:
            ConfigError: the split is a stream.
        """
        if self.streaming and split == self.train_split:
            raise ConfigError(f"the split {split} is a stream, which shows each pair once; name a --data.val_split.")
        found: dict[str, Pair] = {}
        for source in self._having(split):
            table, _ = stored_pairs(source, split, self._rules(split), num_proc=self.num_proc)
            ids = table.select_columns(["id"])[:]["id"]
            first = {one: row for row, one in reversed(list(enumerate(ids)))}
            drawn = sorted(first, key=lambda one: hash_text(f"{seed} {one}"))[:limit]
            found |= {one: as_pair(table[first[one]]) for one in sorted(drawn, key=first.__getitem__)}
        kept = set(sorted(found, key=lambda one: hash_text(f"{seed} {one}"))[:limit])
        return [pair for one, pair in found.items() if one in kept]

    def _load_prompts(self) -> list[Prompt]:
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        generation: Generation = getattr(module, "generation", None) or Generation()
        source = self.predict.source
        split = None
        if source is not None:
            available = splits_of(Source(source))
            split = next((n for n in (*VALIDATION_NAMES, self.train_split) if n in available), available[0])
        histories = self.histories(split, source)[: self.predict.limit]
        goal = None
        if self.goal is not None and (self.relabelling.conditioned or self.predict.goal is not None):
            goal = self.goal.best if self.predict.goal is None else self.predict.goal
        printed = None if self.goal is None or goal is None else self.goal.printed(goal)
        records: list[dict[str, Any]] = [{"messages": list(history), "goal": printed} for history in histories]
        try:
            prompts = self.encode_prompts(histories, goal)
            if generation.guidance == 0:
                return [(ids, record, None) for ids, record in zip(prompts, records, strict=True)]
            text, against = self._low(generation)
            if goal is not None and self.goal is not None and text == self.goal.write(goal, self.goal.best_attributes):
                raise ConfigError(
                    f"--model.generation.guidance has no effect: the goal that it pushes away from, {against}, is the "
                    "one that is asked for. Ask for a higher one (--data.predict.goal), or remove it."
                )
            for record in records:
                record |= {"guidance": generation.guidance, "against": against}
            return list(zip(prompts, records, self._encode_prompts(histories, text), strict=True))
        except BadRow as problem:
            raise DataError(f"{source or self._named()}: a prompt can't be written: {problem.reason}") from problem


def _check_least(**least: tuple[int | None, int]) -> None:
    """Options by name: the value, and the lowest that it may have."""
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ConfigError(f"--data.{name} must be at least {lowest}, found {value}")


def _check_stream(
    rewards: Judge | None, goal: GoalTemplate | None, filters: Filters, token_budget: int | None
) -> None:  # fmt: skip
    """A stream shows each row once, and no row before the first step."""
    if rewards is not None:
        raise ConfigError(
            f"--data.rewards {type(rewards).__name__} looks at all data before the first step, and a stream is "
            "read while training on it. Score it beforehand: rap-lightning score."
        )
    if goal is not None and goal.scale.needs_fit:
        raise ConfigError(
            f"--data.goal.scale: {type(goal.scale).__name__} is fitted on the training split, which a stream shows "
            "only once. Give its numbers (rap-lightning inspect prints those of a sample)."
        )
    if token_budget is not None:
        raise ConfigError(
            "--data.token_budget needs to know the length of every pair, which a stream doesn't tell: set a "
            "smaller --data.batch_size and more --trainer.accumulate_grad_batches instead."
        )
    if filters.repeats == "drop":
        raise ConfigError("--data.filters.repeats drop has no effect on a stream, whose rows are read one by one.")


def _check_predicted(asked: float | None, goal: GoalTemplate | None) -> None:
    """The goal that ``predict`` asks for is one of the scale."""
    if asked is None:
        return
    if goal is None:
        raise ConfigError("--data.predict.goal has no effect with --data.goal null; remove one of the two.")
    if not goal.scale.low <= asked <= goal.scale.high:
        scale = f"the scale from {goal.scale.low:g} to {goal.scale.high:g}"
        raise ConfigError(f"--data.predict.goal must lie on {scale}, found {asked:g}")
