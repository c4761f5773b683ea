"""What every engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rap_lightning.onpolicy.requests import Answer, Request
from rap_lightning.onpolicy.sampled_model import Model

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


class Engine(ABC):
    """Generates responses. Named by import path: ``--engine my_pkg.MyEngine``."""

    reads_ids: ClassVar[bool] = True
    """Whether it takes token ids, so that prompts equal training's; otherwise it is sent messages."""

    def context(self, model: Model) -> int:
        """The longest sequence it takes, in tokens."""
        return model.context()

    def identity(self, model: Model) -> dict[str, Any]:
        """What tells the model from another one, in plain values: part of the settings that a file is made with."""
        return model.identity()

    def settings(self) -> dict[str, Any]:
        """Its own options that change responses, in plain values."""
        return {}

    def notes(self) -> dict[str, Any]:
        """What else is worth recording, and may change between runs."""
        return {}

    def sends(self, model: Model) -> None:  # noqa: B027
        """Look at what is known of the model before messages are sent; only for an engine that takes no ids."""

    def no_guidance(self) -> str:
        """Why it can't sample with guidance (from ``request.against``, too) or a floor; "" where it can."""
        return f"{type(self).__name__} doesn't say that it can"

    @abstractmethod
    def open(self, model: Model, rank: int) -> None:
        """Load the model. Called once, and only when there is something to generate.

        Args:
            model: which.
            rank: of this process among those on this machine, which picks a device.
        """

    @abstractmethod
    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Answer]]:
        """Responses, some at a time, as they are finished.

        Args:
            requests: all of this process, finished ones among them, so that batches are made up alike in every run.
            generation: how to sample.
            wanted: ids of those that aren't finished; others need no answer.
        """

    def close(self) -> None:  # noqa: B027
        """Free what ``open`` took."""
