"""Generate responses for conversations into a :class:`~rap_lightning.onpolicy.jsonl_ledger.Ledger`.

:meth:`ResponseGenerator.run` makes a :class:`Request` of each conversation, goal and sample number, has the engine
complete the unfinished ones, and appends each completion as a row. Prompts are encoded by the code that training uses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines.base import Completion, Engine, Request, prompt_id_of, seed_of
from rap_lightning.onpolicy.jsonl_ledger import Ledger, Row, digest_of, list_failed, shard_path
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.requested_goals import RequestedGoal
from rap_lightning.preferences.pairs import BadRow, Message, carried, messages_and_tools
from rap_lightning.preferences.rendering import resolve_placement, with_goal
from rap_lightning.progress_bar import progress

if TYPE_CHECKING:
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.models.generation import Generation

History = Sequence[Message]


@dataclass
class GenerationSummary:
    """Counts of one call of :meth:`ResponseGenerator.run`, for the requests of this process.

    ``before`` are finished by earlier runs, ``finished`` in all; ``failed`` are rows of requests without a response.
    """

    total: int = 0
    before: int = 0
    finished: int = 0
    failed: list[Row] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def lines(self, path: Path) -> list[str]:
        """Return a summary for the terminal."""
        rate = self.tokens / max(self.seconds, 1e-9)
        new = f"{self.finished - self.before:,} new" + (
            f", {self.tokens:,} tokens, {rate:,.0f} tokens/s" if self.tokens else ""
        )
        head = f"{path}: {self.finished:,} of {self.total:,} responses ({self.before:,} from before, {new})"
        return [head, *(f"  {count:,}: {what}" for what, count in self.counts.most_common())]


class ResponseGenerator:
    """A model in an engine. The model is loaded when there is something to generate. Used as a context manager.

    Longer prompts are truncated to ``max_prompt_length`` tokens, goal kept; by default to what the context leaves
    beside the longest response. ``shard`` of ``shards`` processes does its share of the work.
    """

    def __init__(
        self, model: ModelSource, engine: Engine, *, max_prompt_length: int | None = None, shard: int = 0,
        shards: int = 1, rank: int = 0,
    ) -> None:  # fmt: skip
        if max_prompt_length is not None and not engine.reads_ids:
            raise ConfigError(
                f"--max_prompt_length has no effect with {type(engine).__name__}: the server writes the prompts."
            )
        if model.template.name is not None and not engine.reads_ids and not model.place.is_dir():
            raise ConfigError(
                f"--chat_template {model.template.name} has no effect with {type(engine).__name__}: the server writes "
                "the prompts, and the API has no field for it. Start the server with that template."
            )
        self.model, self.engine, self.max_prompt_length = model, engine, max_prompt_length
        self.shard, self.shards, self.rank = shard, shards, rank
        self._open = False

    def __enter__(self) -> ResponseGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.engine.close()

    def run(
        self, histories: Sequence[History], path: Path, goals: Sequence[RequestedGoal], generation: Generation,
        samples: int, seed: int,
    ) -> GenerationSummary:  # fmt: skip
        """Generate what ``path`` lacks: each distinct conversation is answered ``samples`` times at each goal."""
        self._check(generation, samples, goals)
        encoder = self._encoder(generation) if self.engine.reads_ids else None
        if encoder is None:
            self.engine.sends(self.model)
        settings = self._settings(encoder, generation, seed, goals)
        summary, key = GenerationSummary(), digest_of(settings)
        own = list(histories)[self.shard :: self.shards]
        requests = self._requests(own, goals, samples, seed, key, encoder, summary)
        summary.total = len(requests) + len(summary.failed)
        notes = {
            "asked": [goal.stated.key for goal in goals], "samples": samples,
            "responses": len(histories) * len(goals) * samples, "package": __version__, **self.engine.notes(),
        }  # fmt: skip
        with Ledger(path, settings, notes, self.shard, self.shards) as ledger:
            summary.before = sum(request.id in ledger.done for request in requests)
            if summary.before < len(requests):
                self._generate(ledger, requests, generation, summary)
            summary.finished = sum(request.id in ledger.done for request in requests)
        listing = list_failed(shard_path(path, self.shard, self.shards), summary.failed)
        if summary.failed:
            summary.counts[f"failed, listed in {listing}; the same command tries them again"] = len(summary.failed)
        print("\n".join(summary.lines(ledger.path)), flush=True)
        return summary

    def _check(self, generation: Generation, samples: int, goals: Sequence[RequestedGoal]) -> None:
        if samples < 1:
            raise ConfigError(f"--samples must be at least 1, found {samples}")
        if samples > 1 and generation.temperature == 0:
            raise ConfigError("--samples above 1 would give equal responses at temperature 0; sample, or ask for one.")
        option = "guidance" if generation.guidance else "plausibility"
        reason = self.engine.no_guidance() if generation.guidance else self.engine.no_floor()
        if generation.processes_logits and reason:
            raise ConfigError(f"--{option}: {reason}. Use --engine Transformers, or remove it.")
        strengths = {one.stated.strength for goal in goals for one in (goal, goal.against) if one is not None}
        if strengths - {None, 0.0} and self.engine.reads_ids and not self.model.adapts:  # at 0, it is the model itself
            raise ConfigError(
                f"{self.model.option} {self.model.path} has no adapter, and these goals are strengths of one "
                "(AdapterStrength). Give the adapter's folder or its checkpoint, or write goals as text (--template "
                "OverallGoal)."
            )
        if strengths - {None, 1.0} and not self.engine.sets_strength:
            raise ConfigError(
                f"--engine {type(self.engine).__name__} runs an adapter at the strength of its weights, and these "
                "goals have others. Write an adapter for each (export --goals), or use --engine Transformers."
            )

    def _generate(
        self, ledger: Ledger, requests: list[Request], generation: Generation, summary: GenerationSummary
    ) -> None:
        if not self._open:
            self.engine.open(self.model, self.rank)
            self._open = True
        by_id = {request.id: request for request in requests}
        wanted = by_id.keys() - ledger.done
        started = time.monotonic()
        with progress(
            total=summary.total, initial=summary.before, desc=ledger.base.name, disable=self.shard > 0
        ) as bar:
            for completions in self.engine.run(requests, generation, set(wanted)):
                fresh = [one for one in completions if one.id in wanted]
                good = [one for one in fresh if not one.error]
                if good:
                    ledger.append([self._row(by_id[one.id], one) for one in good])
                summary.failed += [_failed_row(by_id[one.id], one.error) for one in fresh if one.error]
                wanted -= {one.id for one in fresh}
                summary.tokens += sum(one.tokens for one in good)
                summary.seconds = time.monotonic() - started
                bar.set_postfix_str(f"{summary.tokens / max(summary.seconds, 1e-9):,.0f} tokens/s", refresh=False)
                bar.update(len(good))
        summary.failed += [_failed_row(by_id[one], "the engine gave no answer") for one in sorted(wanted)]

    def _encoder(self, generation: Generation) -> Encoder:
        from rap_lightning.batches.encode import Encoder

        context = self.engine.context(self.model)
        room = context - generation.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"the model takes {context:,} tokens, and --max_new_tokens {generation.max_new_tokens:,} leaves no "
                "room for a prompt. Lower --max_new_tokens."
            )
        longest = room if self.max_prompt_length is None else self.max_prompt_length
        if not 1 <= longest <= room:
            raise ConfigError(
                f"the model takes {context:,} tokens: with --max_new_tokens {generation.max_new_tokens}, "
                f"--max_prompt_length can be up to {room:,}, found {longest:,}."
            )
        # max_length only decides where prompts are truncated: the longest prompt and response are enough
        return Encoder(self.model.tokenizer(), None, longest + generation.max_new_tokens, longest)

    def _settings(
        self, encoder: Encoder | None, generation: Generation, seed: int, goals: Sequence[RequestedGoal]
    ) -> dict[str, Any]:
        settings = {
            "model": self.engine.identity(self.model),
            "engine": {"class": type(self.engine).__name__, **self.engine.settings()},
            "generation": generation.settings(),
            "seed": seed,
        }
        if generation.guidance:
            settings["against"] = sorted({goal.against.stated.key or "" for goal in goals if goal.against is not None})
        if encoder is None and self.model.template.kwargs:
            settings["chat_template_kwargs"] = dict(self.model.template.kwargs)
        if encoder is not None:
            template = digest_of(encoder.tokenizer.chat_template)
            settings["prompts"] = {"template": template, "max_prompt_length": encoder.max_prompt_length}
        return settings

    def _requests(
        self, histories: Sequence[History], goals: Sequence[RequestedGoal], samples: int, seed: int, key: str,
        encoder: Encoder | None, summary: GenerationSummary,
    ) -> list[Request]:  # fmt: skip
        """Return a request for each history, goal and sample; a prompt that can't be encoded counts as failed."""
        requests: list[Request] = []
        placements = {goal: self._placement(goal, encoder) for goal in goals}
        for history in progress(histories, desc="prompts", leave=False):
            prompt_id = prompt_id_of(history)
            for goal in goals:
                try:
                    prompt = self._prompt(history, goal, placements[goal], encoder, summary.counts)
                except BadRow as problem:
                    error = f"{problem.column}: {problem.reason}"
                    row = {"id": "", **messages_and_tools(history), "goal": goal.printed, "error": error}
                    summary.failed += [{**row, "sample": sample} for sample in range(samples)]
                    continue
                requests += [
                    Request(
                        digest_of(prompt_id, goal.stated.key, sample, key), prompt_id, tuple(history),
                        goal=goal.printed, sample=sample, seed=seed_of(seed, prompt_id, sample), **prompt,
                    )
                    for sample in range(samples)
                ]  # fmt: skip
        return requests

    def _prompt(
        self, history: History, goal: RequestedGoal, placement: Any, encoder: Encoder | None, counts: Counter[str]
    ) -> dict[str, Any]:
        """Return ``messages``, ``ids``, ``cut`` and ``against`` of a request."""
        from rap_lightning.batches.encode import Conversation

        turns, tools = carried(history)
        if encoder is None:
            sent = with_goal(turns, goal.text, placement, system_shown=True)
            return {"messages": tuple(sent), "ids": (), "tools": tools}
        encoder.placement = placement
        texts = (goal.text,) if goal.against is None else (goal.text, goal.against.text)
        found = encoder.encode_one(Conversation(history, texts))
        ids, *low = map(tuple, found.prompt_ids)
        counts.update(found.repaired)
        if cut := found.cut_prompts[0]:
            counts["prompt cut to fit, goal kept"] += 1
        messages = with_goal(turns, goal.text, placement, system_shown=encoder.system_shown)
        return {
            "messages": tuple(messages), "ids": ids, "cut": cut, "against": low[0] if low else (),
            "strength": goal.stated.strength,
            "low_strength": None if goal.against is None else goal.against.stated.strength,
        }  # fmt: skip

    def _placement(self, goal: RequestedGoal, encoder: Encoder | None) -> Any:
        """Return where the goal is written: the tokenizer decides, or ``system`` if only the server has it."""
        if encoder is not None:
            return resolve_placement(encoder.tokenizer, goal.placement)
        if goal.placement != "auto":
            return goal.placement
        local = (self.model.place / "tokenizer_config.json").is_file()
        return resolve_placement(self.model.tokenizer(), "auto") if local else "system"

    def _row(self, request: Request, completion: Completion) -> Row:
        row: Row = {
            "id": request.id, "prompt_id": request.prompt_id, "sample": request.sample, "goal": request.goal,
            **messages_and_tools(request.history), "response": completion.text, "finish": completion.finish,
            "tokens": completion.tokens, "seed": request.seed,
            "model": self.model.place.name if self.model.place.exists() else self.model.path,
        }  # fmt: skip
        return row | ({"prompt_cut": request.cut} if request.cut else {})


def _failed_row(request: Request, error: str) -> Row:
    return {
        "id": request.id, **messages_and_tools(request.history), "goal": request.goal, "error": error,
        "sample": request.sample,
    }  # fmt: skip
