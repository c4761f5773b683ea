"""Engine for a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rap_lightning.onpolicy.chat_client import ChatClient
from rap_lightning.onpolicy.engines.base import Completion, Engine, Request
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.requested_goals import template_writes
from rap_lightning.provenance import masked

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


class Endpoint(Engine):
    """Any server of the OpenAI API: vLLM, SGLang, ``transformers serve``, a provider.

    The server's own chat template renders the prompt, so the server also decides how text that imitates a control token
    is tokenized. Seeds are sent, and plausibility as min_p; a server may ignore them. ``--model`` is the model's name
    on the server; the goal comes from ``--model`` if that is a local folder too, or from ``--goal_from``.

    Args:
        url: base URL including the version: http://localhost:8000/v1
        client: further options of the connection.
    """

    reads_ids: ClassVar[bool] = False

    def __init__(self, url: str, **client: Any) -> None:
        self.client = ChatClient(url, "", **client)

    def settings(self) -> dict[str, Any]:
        """Return the additional request fields; the address may change from run to run."""
        return {"extra_body": masked(self.client.extra_body)}

    def notes(self) -> dict[str, Any]:
        return {"url": self.client.url}

    def identity(self, model: ModelSource) -> dict[str, Any]:
        """Return the name alone: what the server runs under it is unknown here."""
        return {"path": model.path}

    def sends(self, model: ModelSource) -> None:
        """Send the switches of the chat template, and switch off the goal that the template writes on its own."""
        if (name := model.template.name) is not None:
            print(f"chat_template {name} is not sent, the API has no field for it: start the server with it")
        if model.template.kwargs:
            own = self.client.extra_body.get("chat_template_kwargs") or {}
            self.client.extra_body["chat_template_kwargs"] = {**own, **model.template.kwargs}
        record = model.record()
        if record is None or not model.place.is_dir():
            return
        sent = self.client.extra_body.get("chat_template_kwargs") or {}
        if "goal" not in sent and template_writes(model.tokenizer_as_saved(), record["best"]):
            self.client.extra_body["chat_template_kwargs"] = {**sent, "goal": False}
            print("the served chat template adds the best goal: switched off, since the messages state the goal")

    def no_guidance(self) -> str:
        """Return why guidance is unavailable: the API takes a single prompt."""
        return "the API has no place for a second prompt, whose log-probabilities each token is drawn with"

    def no_floor(self) -> str:
        """Return "": without guidance, the floor is the field min_p of vLLM, SGLang and others."""
        return ""

    def open(self, model: ModelSource, rank: int) -> None:
        self.client.model = model.path

    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Completion]]:
        """Yield completions one at a time, in the order in which they arrive."""

        floor = {} if generation.min_p is None else {"min_p": generation.min_p}

        async def ask(request: Request) -> dict[str, Any]:
            tools = {} if request.tools is None else {"tools": json.loads(request.tools)}
            return await self.client.chat(
                request.messages, **tools, **floor, max_tokens=generation.max_new_tokens,
                temperature=generation.temperature, top_p=generation.top_p, seed=request.seed % 2**31,
            )  # fmt: skip

        for request, result in self.client.each([r for r in requests if r.id in wanted], ask):
            if isinstance(result, Exception):
                yield [Completion(request.id, error=str(result))]
                continue
            tokens = int(result["usage"].get("completion_tokens") or 0)
            finish = str(result.get("finish_reason") or "stop")
            yield [Completion(request.id, result["message"]["content"], tokens, finish)]
        for what, count in self.client.counts.items():
            print(f"  {count:,}: {what}")
