"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rap_lightning.onpolicy import asked_goals as goals
from rap_lightning.onpolicy.engines.base import Engine
from rap_lightning.onpolicy.http import Connection
from rap_lightning.onpolicy.requests import Answer, Request
from rap_lightning.onpolicy.sampled_model import Model

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


class Endpoint(Engine):
    """Any server of the OpenAI API: vLLM, SGLang, ``transformers serve``, a provider.

    The server's own chat template writes the prompt, and what the texts hold that imitates a control token is in its
    hands. Seeds are sent; whether they are heeded is the server's affair. ``--model`` names the model to the server;
    the goal comes from ``--model`` where that is a folder here too, or from ``--goal_from``.

    Args:
        url: up to and including the version: http://localhost:8000/v1
        api_key_env: the environment variable that holds the key.
        concurrency: requests in flight.
        timeout: seconds for one response.
        attempts: tries for one request; a server that says ``Retry-After`` is obeyed.
        requests_per_minute: no more than this many are sent.
        extra_body: further fields of every request.
    """

    reads_ids: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 300.0,
        attempts: int = 6,
        requests_per_minute: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        self.connection = Connection(
            url, "", api_key_env, concurrency, timeout, attempts, requests_per_minute, extra_body
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Further fields; the address may change from run to run."""
        return {"extra_body": self.connection.extra_body}

    def notes(self) -> dict[str, Any]:
        """The address."""
        return {"url": self.connection.url}

    def identity(self, model: Model) -> dict[str, Any]:
        """The name alone: what the server runs under it isn't known here."""
        return {"path": model.path}

    def sends(self, model: Model) -> None:
        """A template that writes a goal of its own, served from this folder, is told not to."""
        record = model.record()
        if record is None or not model.place.is_dir():
            return
        own = model.tokenizer_as_it_is()
        if goals.writes(own, record["best"]) and "chat_template_kwargs" not in self.connection.extra_body:
            self.connection.extra_body["chat_template_kwargs"] = {"goal": False}
            print(
                "the served chat template writes the best goal by itself: told not to, the goal stands in the messages"
            )

    def no_guidance(self) -> str:
        """A server gives tokens, and takes no second prompt."""
        return "the API has no place for a second prompt, whose log-probabilities each token is drawn with"

    def open(self, model: Model, rank: int) -> None:
        """Only the name is needed."""
        self.connection.model = model.path

    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Answer]]:
        """One at a time, as they come."""

        async def ask(request: Request) -> dict[str, Any]:
            return await self.connection.chat(
                request.messages, max_tokens=generation.max_new_tokens, temperature=generation.temperature,
                top_p=generation.top_p, seed=request.seed % 2**31,
            )  # fmt: skip

        for request, result in self.connection.each([r for r in requests if r.id in wanted], ask):
            if isinstance(result, Exception):
                yield [Answer(request.id, error=str(result))]
                continue
            finish = "length" if result.get("finish_reason") == "length" else str(result.get("finish_reason") or "stop")
            tokens = result["usage"].get("completion_tokens") or 0
            yield [Answer(request.id, result["message"]["content"], int(tokens), finish)]
