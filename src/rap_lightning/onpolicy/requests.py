"""What is asked of a model, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rap_lightning.onpolicy.jsonl_ledger import digest_of
from rap_lightning.preferences.pairs import Message


@dataclass(frozen=True)
class Request:
    """One response to be generated.

    Attributes:
        id: digest of the conversation, the goal's text, the sample's number and the settings of the file it goes to.
        prompt_id: digest of the conversation alone.
        history: the conversation as the data have it.
        messages: the same with the goal in it.
        ids: token ids of ``messages`` up to where the response begins, as training encodes them; empty for an engine
            that is sent messages.
        goal: the goal as it is printed; None where none is asked for.
        sample: which of the samples of this prompt at this goal, from 0.
        seed: of this response alone. It depends on the run's seed, the conversation and the sample's number, but not
            on model or goal, so that comparisons between them share their random numbers.
        cut: tokens of the prompt that didn't fit.
        against: token ids of the same conversation at the low goal that guidance pushes away from; empty without it.
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


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        id: of the request.
        text: the response without control tokens.
        tokens: of the response, the end of turn included.
        finish: ``stop`` where the model ended its turn, ``length`` where it ran out of tokens.
        error: why there is no response; such requests are asked again by the next run.
    """

    id: str
    text: str = ""
    tokens: int = 0
    finish: str = "stop"
    error: str = ""


def seed_of(seed: int, prompt_id: str, sample: int) -> int:
    """63 bits."""
    digest = hashlib.sha256(f"{seed} {prompt_id} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_id_of(history: Sequence[Message]) -> str:
    """Digest of a conversation."""
    return digest_of([dict(turn) for turn in history])


def chunks_by_length(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Requests of similar length together, the longest first, so that what doesn't fit in memory shows at once.

    The same requests always make the same chunks: a resumed run computes what an uninterrupted one would.
    """
    ordered = sorted(requests, key=lambda r: (-len(r.ids), r.prompt_id, r.id))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
