"""A chat endpoint that may be down, slow, busy or wrong.

One client per run: requests in flight are limited, failures that may pass are tried again with growing pauses, and a
server that says how long to wait (``Retry-After``) is heard by all requests at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rap_lightning.errors import ConfigError, UserError
from rap_lightning.preferences.pairs import shown

T = TypeVar("T")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # status codes worth another try
STOPS = {401: "the key is not accepted", 403: "access is refused", 404: "no such address or model"}
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
LONGEST_WAIT = 600.0  # seconds that a server may ask for


class EndpointDown(UserError):
    """The endpoint answers nothing at all; what is finished is kept."""


class Refused(Exception):
    """This request can't be answered, however often it is sent."""


class Unanswered(Exception):
    """No answer after all tries."""


class Connection:
    """An OpenAI-compatible endpoint.

    Args:
        url: up to and including the version, http://localhost:8000/v1 say.
        model: the name that the server knows the model by.
        api_key_env: the environment variable that holds the key; a key is never taken from anywhere else.
        concurrency: requests in flight.
        timeout: seconds for one answer.
        attempts: tries for one request.
        requests_per_minute: no more than this many are sent.
        extra_body: further fields of every request, ``{chat_template_kwargs: {enable_thinking: false}}`` say.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 300.0,
        attempts: int = 6,
        requests_per_minute: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url: expected http://host:port/v1, found {shown(url)}")
        if parts.username or parts.password:
            raise ConfigError("url: no user names or passwords in it; name the environment variable of a key instead.")
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if timeout <= 0 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise ConfigError("timeout and requests_per_minute must be above 0")
        self.url, self.model, self.api_key_env = url.rstrip("/"), model, api_key_env
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.requests_per_minute, self.extra_body = requests_per_minute, extra_body or {}
        self.retries = 0
        self._quiet_until = self._next_slot = 0.0
        self._in_a_row = 0
        self._session: Any = None

    def __repr__(self) -> str:
        return f"Connection({self.url!r}, {self.model!r})"

    def settings(self) -> dict[str, Any]:
        """What changes answers. The address may change from run to run: the model's name says what answers."""
        return {"model": self.model, "extra_body": self.extra_body}

    # -- many at once ---------------------------------------------------------------------------------------------

    def each(self, items: Sequence[Any], answer: Callable[[Any], Awaitable[T]]) -> Iterator[tuple[Any, T | Exception]]:
        """(item, result) of each, as they come; of one that failed the reason, Refused or Unanswered.

        Raises:
            EndpointDown: every request fails, one after another, or the server refuses all.
        """
        loop = asyncio.new_event_loop()
        waiting = iter(items)
        running: dict[asyncio.Task[T], Any] = {}
        self._quiet_until = self._next_slot = 0.0  # clocks of another loop
        try:
            loop.run_until_complete(self._enter())
            while True:
                while len(running) < self.concurrency and (item := next(waiting, None)) is not None:
                    running[loop.create_task(answer(item))] = item  # type: ignore[arg-type]
                if not running:
                    return
                done, _ = loop.run_until_complete(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    item, problem = running.pop(task), task.exception()
                    if problem is None:
                        self._in_a_row = 0
                        yield item, task.result()
                        continue
                    if not isinstance(problem, Refused | Unanswered):
                        raise problem
                    self._in_a_row = self._in_a_row + 1 if isinstance(problem, Unanswered) else 0
                    yield item, problem
                    if self._in_a_row >= max(4, self.concurrency):
                        raise EndpointDown(
                            f"{self.url} has not answered {self._in_a_row} requests in a row, each tried "
                            f"{self.attempts} times "
                            f"({problem}). What is finished is kept; start the same command again to go on."
                        )
        finally:
            loop.run_until_complete(self._leave(list(running)))
            loop.close()

    async def _enter(self) -> None:
        import aiohttp

        key = os.environ.get(self.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=aiohttp.ClientTimeout(total=self.timeout), trust_env=not local,
            connector=aiohttp.TCPConnector(limit=self.concurrency),
        )  # fmt: skip

    async def _leave(self, running: list[asyncio.Task[Any]]) -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # transports close in the next turn of the loop

    # -- one ------------------------------------------------------------------------------------------------------

    async def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """The first choice of a chat completion, with its ``message`` and ``finish_reason``, and the ``usage``.

        Raises:
            Refused: the server won't answer this request.
            Unanswered: nothing usable after all tries.
            EndpointDown: the server refuses everybody.
        """
        body = {"model": self.model, "messages": list(messages), **options, **self.extra_body}
        why = ""
        for attempt in range(1, self.attempts + 1):
            await self._turn()
            pause = random.uniform(0.5, 1) * min(LONGEST_PAUSE, 2.0 ** (attempt - 1))
            try:
                status, headers, text = await self._post(body)
            except (OSError, TimeoutError) as error:  # aiohttp's client errors about connections are OSErrors
                why = f"no answer within {self.timeout:g} s" if isinstance(error, TimeoutError) else _plain(error)
            except Exception as error:
                if type(error).__module__.split(".")[0] != "aiohttp":
                    raise
                why = _plain(error)
            else:
                if status == 200:
                    try:
                        return _choice(text)
                    except (ValueError, KeyError, IndexError, TypeError) as error:
                        why = f"not a chat completion ({_plain(error)}), found {shown(text)}"
                elif status in STOPS:
                    raise EndpointDown(f"{self.url}: {STOPS[status]} (HTTP {status}): {self._said(text)}")
                elif status in PASSING:
                    why = f"HTTP {status}: {self._said(text)}"
                    if (asked := _retry_after(headers)) is not None:
                        pause = min(LONGEST_WAIT, asked)
                        self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
                else:
                    raise Refused(f"HTTP {status}: {self._said(text)}")
            if attempt < self.attempts:
                self.retries += 1
                await asyncio.sleep(pause)
        raise Unanswered(why)

    async def _turn(self) -> None:
        """Wait while the server wants to be left alone, and for a place under the rate limit."""
        if self.requests_per_minute is not None:
            now = time.monotonic()
            slot = max(now, self._next_slot)
            self._next_slot = slot + 60.0 / self.requests_per_minute
            await asyncio.sleep(slot - now)
        while (left := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _post(self, body: dict[str, Any]) -> tuple[int, Any, str]:
        url = f"{self.url}/chat/completions"
        async with self._session.post(url, json=body, allow_redirects=False) as response:
            raw = await response.read()
            return response.status, response.headers, raw.decode("utf-8", "replace")

    def _said(self, text: str) -> str:
        """A piece of a server's message, without the key should it repeat it."""
        key = os.environ.get(self.api_key_env)
        return shown(text.replace(key, "***") if key else text, 300)


def _choice(text: str) -> dict[str, Any]:
    found = json.loads(text)
    choice = found["choices"][0]
    if not isinstance(choice["message"]["content"], str):
        raise ValueError("no text in the message")
    return {**choice, "usage": found.get("usage") or {}}


def _plain(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
