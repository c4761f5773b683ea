"""A language model at an endpoint as judge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.http import Connection, Refused
from rap_lightning.onpolicy.judges import rubric
from rap_lightning.onpolicy.judges.base import Item, Judge, Verdict


class LLMJudge(Judge):
    """A language model that grades by the attributes of UltraFeedback, 1 to 5 each, and overall from 1 to 10.

    Its answer counts only as the one JSON object that the rubric asks for; anything else is asked again, with the
    reason. With several votes the reward is their mean, and responses whose overall scores lie more than one point
    apart are counted.

    Args:
        url: of an OpenAI-compatible endpoint, up to and including the version: http://localhost:8000/v1
        model: the name that the server knows the judge by.
        votes: answers for each response; more than one needs a temperature.
        temperature: of the judge.
        max_tokens: longest answer.
        readings: how often an answer that can't be read is asked for.
        api_key_env: the environment variable that holds the key.
        concurrency: responses judged at the same time.
        timeout: seconds for one answer.
        attempts: tries for one request; a server that says ``Retry-After`` is obeyed.
        requests_per_minute: no more than this many are sent.
        extra_body: further fields of every request.
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
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        requests_per_minute: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if votes < 1 or readings < 1:
            raise ConfigError(f"--judge.votes and --judge.readings must be at least 1, found {votes} and {readings}")
        if votes > 1 and temperature == 0:
            raise ConfigError(
                "--judge.votes above 1 would all be the same at temperature 0; set --judge.temperature 0.7 say."
            )
        self.votes, self.temperature, self.max_tokens, self.readings = votes, temperature, max_tokens, readings
        self.connection = Connection(
            url, model, api_key_env, concurrency, timeout, attempts, requests_per_minute, extra_body
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The judge, how it is asked, and the rubric's digest."""
        return {
            "class": "LLMJudge", "endpoint": self.connection.settings(), "votes": self.votes,
            "temperature": self.temperature, "rubric": hashlib.sha256(rubric.SYSTEM.encode()).hexdigest()[:16],
        }  # fmt: skip

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """One at a time, as they come."""
        for item, result in self.connection.each(items, self._votes):
            if isinstance(result, Exception):
                yield [Verdict(item.id, error=str(result))]
                continue
            overall = [vote[rubric.OVERALL] for vote in result]
            if max(overall) - min(overall) > 1:
                self.counts["disagreement: votes on one response more than a point apart"] += 1
            attributes = {name: fmean(vote[name] for vote in result) for name in rubric.ATTRIBUTES}
            notes = {"votes": overall} if self.votes > 1 else {}
            yield [Verdict(item.id, fmean(overall), attributes, notes)]

    async def _votes(self, item: Item) -> list[dict[str, float]]:
        return [await self._vote(item, number) for number in range(self.votes)]

    async def _vote(self, item: Item, number: int) -> dict[str, float]:
        digest = hashlib.sha256(f"{item.id} {number}".encode()).hexdigest()
        messages = rubric.messages_for(item.history, item.response, f"#{digest[:12]}#")
        reason = ""
        for reading in range(self.readings):
            seed = (int(digest[12:20], 16) + reading) % 2**31
            choice = await self.connection.chat(
                messages, temperature=self.temperature, max_tokens=self.max_tokens, seed=seed
            )
            text = choice["message"]["content"]
            try:
                return rubric.parse(text)
            except rubric.Malformed as error:
                reason = str(error)
                self.counts[f"an answer that can't be read: {reason}"] += 1
                again = rubric.AGAIN.format(reason=reason, keys=", ".join(rubric.KEYS))
                messages = [
                    *messages[:2], {"role": "assistant", "content": text[:2000] or "-"},
                    {"role": "user", "content": again}
                ]  # fmt: skip
        raise Unreadable(f"no answer of the judge could be read, the last because {reason}")


class Unreadable(Refused):
    """A judge that never answers in the form asked for."""
