"""Judge by a language model at an endpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.chat_client import ChatClient, RequestFailed
from rap_lightning.onpolicy.judges import rubric
from rap_lightning.preferences.judge import Item, Judge, Verdict
from rap_lightning.provenance import masked


class LLMJudge(Judge):
    """A language model that grades by the attributes of UltraFeedback, 1 to 5 each, and overall from 1 to 10.

    Its answer counts only as the one JSON object that the rubric asks for; otherwise the question is repeated with the
    reason. With several votes the reward is their mean, and responses whose overall scores differ by more than one
    point are counted.

    Args:
        url: base URL of an OpenAI-compatible endpoint, including the version: http://localhost:8000/v1
        model: the judge's name on the server.
        votes: answers for each response; more than one needs a temperature.
        temperature: sampling temperature of the judge.
        max_tokens: longest answer.
        readings: how often to ask until an answer can be read.
        timeout: seconds for one answer.
        client: further options of the connection.
    """

    scale = rubric.OVERALL_SCALE

    def __init__(
        self,
        url: str,
        model: str,
        votes: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 256,
        readings: int = 3,
        timeout: float = 120.0,
        **client: Any,
    ) -> None:
        super().__init__()
        if votes < 1 or readings < 1:
            raise ConfigError(f"--judge.votes and --judge.readings must be at least 1, found {votes} and {readings}")
        if votes > 1 and temperature == 0:
            raise ConfigError("--judge.votes above 1 would all be the same at temperature 0; set --judge.temperature.")
        self.votes, self.temperature, self.max_tokens, self.readings = votes, temperature, max_tokens, readings
        self.client = ChatClient(url, model, timeout=timeout, **client)

    def settings(self) -> dict[str, Any]:
        """Return the judge, how it is asked, and the rubric's digest; the address may change from run to run."""
        endpoint = {"model": self.client.model, "extra_body": masked(self.client.extra_body)}
        return {
            "class": "LLMJudge", "endpoint": endpoint, "votes": self.votes,
            "temperature": self.temperature, "rubric": hashlib.sha256(rubric.SYSTEM.encode()).hexdigest()[:16],
        }  # fmt: skip

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """Yield verdicts one at a time, in the order in which they arrive."""
        for item, result in self.client.each(items, self._votes):
            if isinstance(result, Exception):
                yield [Verdict(item.id, error=str(result))]
                continue
            overall = [vote[rubric.OVERALL] for vote in result]
            if max(overall) - min(overall) > 1:
                self.counts["disagreement: votes on one response more than a point apart"] += 1
            attributes = {name: fmean(vote[name] for vote in result) for name in rubric.ATTRIBUTES}
            notes = {"votes": overall} if self.votes > 1 else {}
            yield [Verdict(item.id, fmean(overall), attributes, notes)]
        self.counts |= self.client.counts  # of all calls so far

    async def _votes(self, item: Item) -> list[dict[str, float]]:
        return [await self._vote(item, number) for number in range(self.votes)]

    async def _vote(self, item: Item, number: int) -> dict[str, float]:
        digest = hashlib.sha256(f"{item.id} {number}".encode()).hexdigest()
        question = rubric.messages_for(item.history, item.response, f"#{digest[:12]}#")
        messages, reason = question, ""
        for reading in range(self.readings):
            seed = (int(digest[12:20], 16) + reading) % 2**31
            choice = await self.client.chat(
                messages, temperature=self.temperature, max_tokens=self.max_tokens, seed=seed
            )
            text = choice["message"]["content"]
            try:
                return rubric.parse(text)
            except rubric.Malformed as error:
                reason = str(error)
                self.counts[f"an answer that can't be read: {reason}"] += 1
                again = rubric.AGAIN.format(reason=reason, keys=", ".join(rubric.KEYS))
                answer = {"role": "assistant", "content": text[:2000] or "-"}
                messages = [*question, answer, {"role": "user", "content": again}]
        raise RequestFailed(f"no answer of the judge could be read, the last because {reason}", rejected=True)
