"""What every suite is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.asked_goals import Asked
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.jsonl_ledger import parts_of, read_rows
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.preferences.pairs import Message

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation
    from rap_lightning.onpolicy.response_generator import Generator


@dataclass
class Work:
    """What a suite works with.

    Attributes:
        model: to be evaluated; name: what the judges' tables call it.
        goal: what it is asked for.
        engine: what it runs in.
        generation: how to sample, where the suite doesn't say so itself.
        output: folder for everything.
        max_prompt_length: longer prompts are cut, goal kept.
        limit: at most this many questions.
        seed: of sampling.
    """

    model: Model
    name: str
    goal: Asked
    engine: Engine
    generation: Generation
    output: Path
    max_prompt_length: int | None
    limit: int | None
    seed: int

    def generator(self) -> Generator:
        """A generator for this work's model."""
        from rap_lightning.onpolicy.response_generator import Generator

        return Generator(self.model, self.engine, max_prompt_length=self.max_prompt_length)

    def answers(
        self, generator: Generator, histories: Sequence[Sequence[Message]], name: str, temperature: float | None = None
    ) -> dict[str, dict[str, Any]]:
        """A response to each conversation, by the conversation's digest; resumed where a file of the name is there.

        Raises:
            DataError: some could not be generated.
        """
        generation = self.generation if temperature is None else replace(self.generation, temperature=temperature)
        if generation.temperature == 0:
            generation = replace(generation, top_p=1.0)
        distinct = list({prompt_id_of(history): history for history in histories}.values())
        path = self.output / "generations" / f"{name}.jsonl"
        outcome = generator.run(distinct, path, [self.goal], generation, 1, self.seed)
        if outcome.failed:
            raise DataError(
                f"{outcome.failed:,} answers could not be generated; {path}.failed.jsonl lists them. Start the "
                "same command again "
                "to ask for them once more."
            )
        wanted = {prompt_id_of(history) for history in distinct}
        rows = {row["prompt_id"]: row for row in read_rows(parts_of(path)) if row["goal"] == self.goal.printed}
        return {prompt_id: row for prompt_id, row in rows.items() if prompt_id in wanted}


class Suite(ABC):
    """A benchmark. Named by import path: ``--suite my_pkg.MySuite``."""

    samples: bool = True
    """Whether it samples with ``--engine`` and the options of sampling; they have no effect otherwise."""

    @abstractmethod
    def run(self, work: Work) -> int:
        """Write the answers, judge them where that is possible; the command's exit code."""


def from_hub(repo: str, file: str, kind: str = "dataset") -> Path:
    """A file of a benchmark, from the Hub or its cache.

    Raises:
        ConfigError: it can't be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type=kind))
    except Exception as error:  # offline, moved, gated: whatever the client says
        raise ConfigError(
            f"the questions ({repo}, {file}) can't be had from the Hub: {type(error).__name__}. Name a file of "
            "them with "
            "--suite.questions."
        ) from error


def read_questions(path: Path, needs: Sequence[str], limit: int | None) -> list[dict[str, Any]]:
    """The questions of a JSON array or json-lines file.

    Raises:
        DataError: it can't be read, or lacks a column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    else:
        rows = list(read_rows([path]))
    if not rows:
        raise DataError(f"{path}: no questions.")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in needs if name not in row]:
            raise DataError(f"{path}, question {number}: no {missing[0]}; expected {', '.join(needs)}.")
    kept: list[dict[str, Any]] = rows[:limit]
    return kept


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text}
