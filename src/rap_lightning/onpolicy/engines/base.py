"""Interface of an engine: requests for responses go in, completions come out.

A :class:`Request` is one response to be generated, a :class:`Completion` its result. An :class:`Engine` turns the
former into the latter; :mod:`rap_lightning.onpolicy.response_generator` makes the requests and stores the completions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rap_lightning.onpolicy.jsonl_ledger import digest_of
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.preferences.pairs import Message

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


@dataclass(frozen=True)
class Request:
    """One response to generate.

    Attributes:
        id: digest of conversation, goal, sample number and the settings of the output file.
        prompt_id: digest of the conversation alone.
        history: the conversation as in the data, with the tools that it carries.
        messages: the same with the goal in it.
        ids: token ids of ``messages`` with the generation prompt, as training encodes them; empty for an engine that
            takes messages.
        goal: the goal as it is printed; None without a goal.
        sample: number of the sample for this prompt and goal, from 0.
        seed: sampling seed of this response. It depends on the run's seed, the conversation and the sample number, but
            not on model or goal, so that comparisons between models or goals share their random numbers.
        cut: prompt tokens removed by truncation.
        against: token ids of the same conversation at the low goal of guidance; empty without guidance.
        strength, low_strength: of the policy's adapter at the goal and the low goal; None leaves it as it is.
        tools: the tools of ``messages``, as JSON, for an engine that takes messages.
    """

    id: str
    prompt_id: str
    history: tuple[Message, ...]
    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    goal: str | None
    sample: int
    seed: int
    cut: int = 0
    against: tuple[int, ...] = ()
    strength: float | None = None
    low_strength: float | None = None
    tools: str | None = None


@dataclass(frozen=True)
class Completion:
    """The result of a request.

    Attributes:
        id: id of the request.
        text: the response without special tokens.
        tokens: response tokens, end of turn included.
        finish: ``stop`` if the model ended its turn, ``length`` if it reached the token limit.
        error: why there is no response; the next run sends such requests again.
    """

    id: str
    text: str = ""
    tokens: int = 0
    finish: str = "stop"
    error: str = ""


def prompt_id_of(history: Sequence[Message]) -> str:
    """Return the digest of a conversation."""
    return digest_of([dict(turn) for turn in history])


def seed_of(seed: int, prompt_id: str, sample: int) -> int:
    """Return the 63-bit sampling seed of one response."""
    digest = hashlib.sha256(f"{seed} {prompt_id} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def chunks_by_length(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Group requests of similar prompt length, longest first, so that running out of memory shows at once.

    The same requests always give the same chunks, so a resumed run computes what an uninterrupted one would.
    """
    ordered = sorted(requests, key=lambda r: (-len(r.ids), r.prompt_id, r.id))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


class Engine(ABC):
    """Generates responses. Named by import path: ``--engine my_pkg.MyEngine``."""

    reads_ids: ClassVar[bool] = True
    """True if the engine takes token ids, so that prompts equal those of training; otherwise it takes messages."""

    @property
    def sets_strength(self) -> bool:
        """Whether it can run the adapter at another strength than that of its weights (AdapterStrength)."""
        return False

    def context(self, model: ModelSource) -> int:
        """Return the longest sequence in tokens."""
        return model.context()

    def identity(self, model: ModelSource) -> dict[str, Any]:
        """Return plain values that identify the model; they are part of the settings of an output file."""
        return model.identity()

    def settings(self) -> dict[str, Any]:
        """Return the engine's options that change responses, as plain values."""
        return {}

    def notes(self) -> dict[str, Any]:
        """Return further facts for the record; they may change between runs."""
        return {}

    def sends(self, model: ModelSource) -> None:  # noqa: B027
        """Prepare for sending messages; called only if the engine takes no token ids."""

    def no_guidance(self) -> str:
        """Return why the engine can't sample with guidance, or "" if it can."""
        return f"{type(self).__name__} doesn't say that it can"

    def no_floor(self) -> str:
        """Return why the engine can't exclude implausible tokens without guidance, or "" if it can."""
        return self.no_guidance()

    @abstractmethod
    def open(self, model: ModelSource, rank: int) -> None:
        """Load the model onto the device of the local rank. Called once, if there is something to generate."""

    @abstractmethod
    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Completion]]:
        """Yield completions in groups, as they are finished.

        Args:
            requests: all requests of this process, finished ones included, so that every run forms the same batches.
            generation: sampling options.
            wanted: ids of the unfinished requests; the others need no completion.
        """

    def close(self) -> None:  # noqa: B027
        """Free what ``open`` allocated."""
