"""Responses for conversations, into a file that survives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rap_lightning import __version__
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.asked_goals import Asked
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.jsonl_ledger import Ledger, digest_of, shard_path, write_lines
from rap_lightning.onpolicy.request_progress import Progress
from rap_lightning.onpolicy.requests import Answer, Request, prompt_id_of, seed_of
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.preferences.pairs import BadRow, Message
from rap_lightning.preferences.rendering import resolve_placement, with_goal

if TYPE_CHECKING:
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.models.generation import Generation

CUT = "prompt cut to fit, goal kept"


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        total: requests of this process; before: finished by earlier runs; finished: in all; failed: asked in vain.
        tokens: of this run's responses; seconds: that they took.
        counts: what was cut, repaired or failed, in words.
    """

    total: int
    before: int
    finished: int
    failed: int
    tokens: int
    seconds: float
    counts: Counter[str]

    def lines(self, path: Path) -> list[str]:
        """For people."""
        fresh = self.finished - self.before
        speed = (
            f", {self.tokens:,} tokens, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""
        )
        lines = [
            f"{path}: {self.finished:,} of {self.total:,} responses ({self.before:,} from before, {fresh:,} new{speed})"
        ]
        return lines + [f"  {count:,}: {what}" for what, count in self.counts.most_common()]


class Generator:
    """A model in an engine, for one file or several. The model is loaded when there is something to generate.

    Args:
        model: which.
        engine: what it runs in.
        max_prompt_length: longer prompts are cut, goal kept, to so many tokens; by default to what the context leaves
            beside the longest response.
        shard, shards: this process, and how many share the work.
        rank: of this process on its machine.
        quiet: print nothing.
    """

    def __init__(
        self, model: Model, engine: Engine, *, max_prompt_length: int | None = None, shard: int = 0, shards: int = 1,
        rank: int = 0, quiet: bool = False,
    ) -> None:  # fmt: skip
        if max_prompt_length is not None and not engine.reads_ids:
            raise ConfigError(
                f"--max_prompt_length has no effect with {type(engine).__name__}: the server writes the prompts."
            )
        self.model, self.engine, self.max_prompt_length = model, engine, max_prompt_length
        self.shard, self.shards, self.rank, self.quiet = shard, shards, rank, quiet
        self._open = False

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.engine.close()

    def run(
        self, histories: Sequence[Sequence[Message]], path: Path, asked: Sequence[Asked], generation: Generation,
        samples: int, seed: int,
    ) -> Outcome:  # fmt: skip
        """Generate what isn't there yet.

        Args:
            histories: distinct conversations.
            path: json lines, a response each.
            asked: goals; every conversation is answered at each of them.
            generation: how to sample.
            samples: responses for a conversation at a goal.
            seed: of all sampling.

        Raises:
            ConfigError: the file was made with other settings, or something has no effect.
        """
        if samples < 1:
            raise ConfigError(f"--samples must be at least 1, found {samples}")
        if samples > 1 and generation.temperature == 0:
            raise ConfigError("--samples above 1 would give equal responses at temperature 0; sample, or ask for one.")
        if generation.processes_logits and (reason := self.engine.no_guidance()):
            option = "guidance" if generation.guidance else "plausibility"
            raise ConfigError(f"--{option}: {reason}. Use --engine Transformers, or remove it.")
        if generation.guidance and any(goal.against is None for goal in asked):
            raise ConfigError("--guidance needs a goal to push away from (onpolicy.asked_goals.guided sets it).")
        if not self.engine.reads_ids:
            self.engine.sends(self.model)
        encoder = self._encoder(generation) if self.engine.reads_ids else None
        settings = self._settings(encoder, generation, seed, asked)
        counts: Counter[str] = Counter()
        key = digest_of(settings)
        mine = list(histories)[self.shard :: self.shards]
        requests, failed = self._requests(mine, asked, samples, seed, key, encoder, counts)
        notes = {
            "asked": [goal.text for goal in asked], "samples": samples,
            "responses": len(histories) * len(asked) * samples,
            "package": __version__, **self.engine.notes(),
        }  # fmt: skip
        with Ledger(path, settings, notes, self.shard, self.shards) as ledger:
            outcome = self._fill(ledger, requests, generation, counts, failed, path.name)
        lost = shard_path(path, self.shard, self.shards)
        lost = lost.with_name(lost.name + ".failed.jsonl")
        if failed:
            write_lines(lost, failed)
            counts[f"failed, listed in {lost.name}; the same command asks them again"] = len(failed)
        else:
            lost.unlink(missing_ok=True)
        if not self.quiet:
            print("\n".join(outcome.lines(ledger.path)), flush=True)
        return outcome

    def _fill(
        self, ledger: Ledger, requests: list[Request], generation: Generation, counts: Counter[str],
        failed: list[dict[str, Any]], name: str,
    ) -> Outcome:  # fmt: skip
        wanted = {request.id for request in requests} - ledger.done
        total, before = len(requests) + len(failed), len(requests) - len(wanted)
        tokens, seconds = 0, 0.0
        if wanted:
            if not self._open:
                self.engine.open(self.model, self.rank)
                self._open = True
            by_id = {request.id: request for request in requests}
            with Progress(name, total, before, shown=not self.quiet and self.shard == 0) as progress:
                for answers in self.engine.run(requests, generation, set(wanted)):
                    fresh = [answer for answer in answers if answer.id in wanted]
                    good = [answer for answer in fresh if not answer.error]
                    if good:
                        ledger.append([self._row(by_id[answer.id], answer) for answer in good])
                    failed += [self._lost(by_id[answer.id], answer.error) for answer in fresh if answer.error]
                    wanted -= {answer.id for answer in fresh}
                    progress.add([answer.tokens for answer in good])
                tokens, seconds = progress.tokens, progress.seconds
            failed += [self._lost(by_id[one], "the engine gave no answer") for one in sorted(wanted)]
        finished = sum(request.id in ledger.done for request in requests)
        return Outcome(total, before, finished, len(failed), tokens, seconds, counts)

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
        # what is beyond the longest prompt and response is not needed: max_length only says where prompts are cut
        return Encoder(self.model.tokenizer(), None, longest + generation.max_new_tokens, longest)

    def _settings(
        self, encoder: Encoder | None, generation: Generation, seed: int, asked: Sequence[Asked]
    ) -> dict[str, Any]:
        settings = {
            "model": self.engine.identity(self.model),
            "engine": {"class": type(self.engine).__name__, **self.engine.settings()},
            "generation": generation.settings(),
            "seed": seed,
        }
        if generation.guidance:
            settings["against"] = sorted({goal.against.text or "" for goal in asked if goal.against is not None})
        if encoder is not None:
            settings["prompts"] = {
                "template": digest_of(encoder.tokenizer.chat_template), "max_prompt_length": encoder.max_prompt_length
            }  # fmt: skip
        return settings

    def _requests(
        self, histories: Sequence[Sequence[Message]], asked: Sequence[Asked], samples: int, seed: int, key: str,
        encoder: Encoder | None, counts: Counter[str],
    ) -> tuple[list[Request], list[dict[str, Any]]]:  # fmt: skip
        from rap_lightning.batches.encode import Notes

        requests: list[Request] = []
        failed: list[dict[str, Any]] = []
        placements = {goal: self._placement(goal, encoder) for goal in asked}
        for history in tqdm(histories, desc="prompts", delay=2, leave=False, disable=self.quiet or None):
            prompt_id = prompt_id_of(history)
            for goal in asked:
                placement, shown = placements[goal]
                ids: tuple[int, ...] = ()
                against: tuple[int, ...] = ()
                cut = 0
                if encoder is None:
                    messages = with_goal(history, goal.text, placement, system_shown=shown)
                else:
                    encoder.placement, notes = placement, Notes()
                    room = encoder.max_length - encoder.max_prompt_length
                    try:
                        prompt = encoder.prompt(history, goal.text, notes)
                        prompt = encoder.fit(prompt, history, room)
                        if goal.against is not None:
                            low = encoder.prompt(history, goal.against.text, Notes())
                            against = tuple(encoder.fit(low, history, room).ids)
                    except BadRow as problem:
                        lost = {
                            "messages": list(history),
                            "goal": goal.printed,
                            "error": f"{problem.column}: {problem.reason}",
                        }
                        failed += [{"id": "", **lost, "sample": sample} for sample in range(samples)]
                        continue
                    messages, ids, cut = prompt.messages, tuple(prompt.ids), prompt.cut
                    counts.update(notes.repaired)
                    if cut:
                        counts[CUT] += 1
                for sample in range(samples):
                    own = digest_of(prompt_id, goal.text, sample, key)
                    requests.append(
                        Request(
                            own, prompt_id, tuple(history), tuple(messages), ids, goal.printed, sample,
                            seed_of(seed, prompt_id, sample), cut, against,
                        )
                    )  # fmt: skip
        return requests, failed

    def _placement(self, goal: Asked, encoder: Encoder | None) -> tuple[Any, bool]:
        if encoder is not None:
            return resolve_placement(encoder.tokenizer, goal.placement), encoder.system_shown
        if goal.placement != "auto":
            return goal.placement, True
        if self.model.place.is_dir() and (self.model.place / "tokenizer_config.json").is_file():
            return resolve_placement(self.model.tokenizer(), "auto"), True
        return "system", True

    def _row(self, request: Request, answer: Answer) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": request.id, "prompt_id": request.prompt_id, "sample": request.sample, "goal": request.goal,
            "messages": list(request.history), "response": answer.text, "finish": answer.finish,
            "tokens": answer.tokens,
            "seed": request.seed, "model": self.model.place.name if self.model.place.exists() else self.model.path,
        }  # fmt: skip
        return row | ({"prompt_cut": request.cut} if request.cut else {})

    def _lost(self, request: Request, error: str) -> dict[str, Any]:
        return {
            "id": request.id, "messages": list(request.history), "goal": request.goal, "error": error,
            "sample": request.sample,
        }  # fmt: skip
