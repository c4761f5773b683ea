"""The measurements of an evaluation: judged samples at goals, and log-probabilities of responses under goals.

Both are ledgers in the folder ``work``: a stopped evaluation resumes from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.evaluation import Samples
from rap_lightning.onpolicy.evaluate.evaluation_data import EvaluatedData
from rap_lightning.onpolicy.evaluate.evaluation_plan import EvaluationPlan
from rap_lightning.onpolicy.jsonl_ledger import Ledger, Row, digest_of, parts_of, read_rows
from rap_lightning.onpolicy.model_source import ModelSource, default_device, free_memory, weights_dtype
from rap_lightning.onpolicy.requested_goals import RequestedGoal
from rap_lightning.onpolicy.response_generator import ResponseGenerator
from rap_lightning.onpolicy.scoring import judge_items
from rap_lightning.preferences.goals import StatedGoal
from rap_lightning.preferences.judge import Item
from rap_lightning.preferences.pairs import Message
from rap_lightning.progress_bar import progress

if TYPE_CHECKING:
    from rap_lightning.batches.dataset import Example
    from rap_lightning.batches.encode import Encoder

LAYOUT = "tree"
MAX_LENGTH = 1024
"""The data module's default."""
Key = tuple[str, str | None]
"""A pair's id, and the key of the goal that was asked for."""


@dataclass
class JudgedSamples:
    """Judged samples as rows of samples.jsonl, in the order of prompts, goals and sample numbers.

    ``missing`` counts responses that could not be generated or judged; ``counts`` has the problems in words.
    """

    rows: list[Row] = field(default_factory=list)
    missing: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def scored(self, *, greedy: bool) -> Samples:
        """Return the samples with a score, either the sampled or the greedy ones."""
        rows = [row for row in self.rows if row["greedy"] is greedy and row["score"] is not None]
        return Samples(*([row[name] for row in rows] for name in ("prompt_id", "goal", "score", "tokens")))


def sample_and_judge(
    plan: EvaluationPlan, evaluated: EvaluatedData, requested: Sequence[RequestedGoal], work: Path
) -> JudgedSamples:
    """Generate and judge the samples that ``work`` doesn't have yet."""
    assert plan.judge is not None, "parts from samples have a judge"
    sampling, histories = plan.sampling, evaluated.histories
    runs = [("sampled.jsonl", sampling, plan.samples)]
    if plan.greedy:  # a plausibility floor without guidance never excludes the most likely token
        floor = sampling.plausibility if sampling.guidance else None
        runs.append(("greedy.jsonl", replace(sampling, temperature=0.0, top_p=1.0, plausibility=floor), 1))
    found, drawn = JudgedSamples(), list[Row]()
    with ResponseGenerator(plan.model, plan.engine, max_prompt_length=plan.max_prompt_length) as generator:
        for name, generation, count in runs:
            every = list(histories.values())
            found.missing += len(generator.run(every, work / name, requested, generation, count, plan.seed).failed)
            for row in _requested_rows(work / name, evaluated, requested, count):
                drawn.append(row | {"greedy": generation.temperature == 0})
    items: dict[str, Item] = {}
    for row in drawn:
        one = _item_id(row)
        items.setdefault(one, Item(one, tuple(histories[row["prompt_id"]]), row["response"]))
    verdicts, _, failed = judge_items(items, work / "verdicts.jsonl", plan.judge)
    found.counts.update(plan.judge.counts)
    found.counts.update(f"not judged: {row['error'][:200]}" for row in failed)
    goals = {one.printed: goal for one, goal in zip(requested, plan.goals, strict=True)}
    for row in drawn:
        verdict = verdicts.get(_item_id(row))
        found.missing += verdict is None
        found.rows.append({
            "prompt": _as_text(histories[row["prompt_id"]]), "prompt_id": row["prompt_id"], "goal": goals[row["goal"]],
            "response": row["response"], "score": None if verdict is None else verdict["overall_score"],
            "tokens": row["tokens"], "greedy": row["greedy"], "sample": row["sample"], "finish": row["finish"],
        })  # fmt: skip
    return found


def _item_id(row: Row) -> str:
    return digest_of(row["prompt_id"], row["response"])


def _as_text(history: Sequence[Message]) -> str:
    """Return a conversation as one text: a single user turn alone, otherwise each turn after its role."""
    if len(history) == 1:
        return str(history[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in history)


def _requested_rows(path: Path, evaluated: EvaluatedData, requested: Sequence[RequestedGoal], count: int) -> list[Row]:
    """Return the rows of this evaluation in order; the file may hold others, of other prompts, goals and numbers."""
    prompt = {prompt_id: i for i, prompt_id in enumerate(evaluated.histories)}
    goal = {one.printed: i for i, one in enumerate(requested)}
    rows = [
        row for row in read_rows(parts_of(path))
        if row["prompt_id"] in prompt and row["goal"] in goal and row["sample"] < count
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (prompt[row["prompt_id"]], goal[row["goal"]], row["sample"]))


class GoalLogps:
    """Log-probabilities of both responses of each pair under some goals, and under their own.

    What is repaired, truncated or left out is counted in the report of the data.
    """

    def __init__(self, plan: EvaluationPlan, evaluated: EvaluatedData, goals: Sequence[StatedGoal], work: Path) -> None:
        from rap_lightning.batches.at_goals import AtGoals

        self.plan, self.work, self.encoder = plan, work, _encoder(plan)
        encode = AtGoals(self.encoder, list(dict.fromkeys(goals)), plan.template)
        self.items = encode.examples(evaluated.pairs, evaluated.report)

    def tokens(self) -> dict[str, tuple[int, int]]:
        """Return the tokens of both responses, end of turn included, by pair id."""
        return {one.pair_id: (one.size.chosen, one.size.rejected) for one in self.items}

    def measure(
        self, model: ModelSource, wanted: Container[Key], name: str, title: str
    ) -> dict[Key, tuple[float, float]]:
        """Return the log-probabilities of both responses in nats, in float32; existing rows of the file are read."""
        path, settings = self.work / name, self._settings(model)
        key = digest_of(settings)
        items = {digest_of(*key_of(item), key): item for item in self.items if key_of(item) in wanted}
        if not items:
            return {}
        with Ledger(path, settings) as ledger:
            if not items.keys() <= ledger.done:
                self._fill(model, ledger, items, title)
        found = {row["id"]: row["logps"] for row in read_rows([path])}
        return {key_of(item): (found[one][0], found[one][1]) for one, item in items.items()}

    def _settings(self, model: ModelSource) -> dict[str, Any]:
        encoder = self.encoder
        return {
            "model": model.identity(),
            "dtype": self.plan.dtype,
            "prompts": {
                "tokenizer": digest_of(encoder.tokenizer.backend_tokenizer.to_str()),
                "template": digest_of(encoder.tokenizer.chat_template),
                "max_length": encoder.max_length,
                "max_prompt_length": encoder.max_prompt_length,
                "placement": encoder.placement,
            },
        }

    def _fill(self, model: ModelSource, ledger: Ledger, items: Mapping[str, Example], title: str) -> None:
        import torch

        from rap_lightning.batches.at_goals import batch_of, in_passes
        from rap_lightning.batches.types import split_segments
        from rap_lightning.models.model_checks import check_sharing
        from rap_lightning.models.token_strength import check_reach

        device = default_device()
        policy = model.load_policy(weights_dtype(self.plan.dtype, device), device)
        if policy.has_adapter and any(item.strength is not None for item in items.values()):
            check_reach(policy.model)
        if reason := check_sharing(policy):
            print(f"{model.path} shares no prefixes: {reason}. Sequences go through it one at a time.")
        id_of = {key_of(item): one for one, item in items.items()}
        done = sum(one in ledger.done for one in items)
        with progress(total=len(items), initial=done, desc=title) as bar, torch.inference_mode():
            for together in in_passes(list(items.values()), LAYOUT, self.plan.token_budget):
                ids = [id_of[key_of(item)] for item in together]
                if ledger.done.issuperset(ids):
                    continue
                # A partly finished pass is computed whole, so that its numbers are those of an uninterrupted run.
                logps = policy.logps(batch_of(together, LAYOUT, pad_id=0).to(policy.device)).tolist()
                both = zip(*split_segments(logps), strict=True)
                rows = [
                    {"id": one, "pair_id": item.pair_id, "goal": item.goal, "logps": list(two)}
                    for one, item, two in zip(ids, together, both, strict=True) if one not in ledger.done
                ]  # fmt: skip
                ledger.append(rows)
                bar.update(len(rows))
        del policy
        free_memory()


def key_of(item: Example) -> Key:
    """Return the key of an item's log-probabilities."""
    return item.pair_id, item.goal


def _encoder(plan: EvaluationPlan) -> Encoder:
    """Return the data module's encoder; ``max_length`` is by default the data module's, or the context if shorter."""
    from rap_lightning.batches.encode import Encoder

    context = plan.model.context()
    longest = min(MAX_LENGTH, context) if plan.max_length is None else plan.max_length
    if not 2 <= longest <= context:
        raise ConfigError(f"--max_length must be from 2 to what the model takes, {context:,}; found {longest:,}.")
    return Encoder(plan.model.tokenizer(), plan.template, longest)


def check_base(base: ModelSource, model: ModelSource) -> None:
    """Raise ConfigError if the base can't be read, or its vocabulary differs from the model's."""
    if base.tokenizer().get_vocab() != model.tokenizer().get_vocab():
        raise ConfigError(
            f"{base.path} has another vocabulary than {model.path}: their log-probabilities are not of the same "
            "tokens. Give the model that training began with as --base."
        )
