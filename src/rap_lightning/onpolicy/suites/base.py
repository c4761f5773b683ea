"""Base class of benchmarks, and what they share: questions, and answers in files that a killed run resumes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.engines.base import prompt_id_of
from rap_lightning.onpolicy.jsonl_ledger import parts_of, read_rows
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.requested_goals import RequestedGoal
from rap_lightning.onpolicy.response_generator import ResponseGenerator
from rap_lightning.preferences.bounded_json import load_json
from rap_lightning.preferences.pairs import Message

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


@dataclass
class SuiteRun:
    """The model that answers a suite, and the options of its answers; the docstring of the command describes each."""

    model: ModelSource
    name: str
    """The model's name in the judges' tables."""
    goal: RequestedGoal
    engine: Engine
    generation: Generation
    output: Path
    max_prompt_length: int | None
    limit: int | None
    seed: int

    def generator(self) -> ResponseGenerator:
        """Return a generator for the model."""
        return ResponseGenerator(self.model, self.engine, max_prompt_length=self.max_prompt_length)

    def answers(
        self, generator: ResponseGenerator, histories: Sequence[Sequence[Message]], name: str,
        temperature: float | None = None,
    ) -> list[str]:  # fmt: skip
        """Return the response to each conversation, without surrounding whitespace.

        Responses are rows of ``generations/NAME.jsonl``; existing ones are used again.
        """
        generation = self.generation if temperature is None else replace(self.generation, temperature=temperature)
        if generation.temperature == 0:
            generation = replace(generation, top_p=1.0)
        ids = [prompt_id_of(history) for history in histories]
        distinct = list(dict(zip(ids, histories, strict=True)).values())
        path = self.output / "generations" / f"{name}.jsonl"
        failed = generator.run(distinct, path, [self.goal], generation, 1, self.seed).failed
        if failed:
            raise DataError(
                f"{len(failed):,} answers could not be generated; {path}.failed.jsonl lists them. Start the same "
                "command again to retry them."
            )
        rows = read_rows(parts_of(path))
        texts = {row["prompt_id"]: row["response"].strip() for row in rows if row["goal"] == self.goal.printed}
        return [texts[one] for one in ids]


class Suite(ABC):
    """A benchmark. Named by import path: ``--suite my_pkg.MySuite``."""

    samples: bool = True
    """Whether it samples with ``--engine`` and the sampling options; otherwise they have no effect."""

    @abstractmethod
    def run(self, run: SuiteRun) -> int:
        """Write the answers, judge them if possible, and return the command's exit code."""


def read_questions(
    file: str | None, hub: tuple[str, ...], needs: Sequence[str], limit: int | None
) -> list[dict[str, Any]]:  # fmt: skip
    """Read questions with the columns ``needs``: a JSON array or JSON lines, from ``--suite.questions`` or the Hub."""
    path = Path(file) if file is not None else _from_hub(*hub)
    try:
        text = path.read_text(encoding="utf-8")
        rows = load_json(text) if text.lstrip().startswith("[") else list(read_rows([path]))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not rows:
        raise DataError(f"{path}: no questions.")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in needs if name not in row]:
            raise DataError(f"{path}, question {number}: no {missing[0]}; expected {', '.join(needs)}.")
    kept: list[dict[str, Any]] = rows[:limit]
    return kept


def _from_hub(repo: str, file: str, kind: str = "dataset") -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type=kind))
    except Exception as error:  # offline, moved, gated: whatever the client raises
        raise ConfigError(
            f"the questions ({repo}, {file}) can't be had from the Hub: {type(error).__name__}. Name a file of them "
            "with --suite.questions."
        ) from error


def user(text: str) -> Message:
    """Return a user turn."""
    return {"role": "user", "content": text}
