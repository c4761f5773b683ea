"""Client for an OpenAI-compatible chat endpoint that may be down, slow, busy or wrong.

:meth:`ChatClient.each` keeps a limited number of requests in flight; :meth:`ChatClient.chat` sends one and retries
transient failures with exponential backoff. A ``Retry-After`` header delays all requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rap_lightning.errors import ConfigError, UserError
from rap_lightning.preferences.bounded_json import load_json
from rap_lightning.preferences.pairs import shown
from rap_lightning.provenance import MASK, flatten, names_secret

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

T = TypeVar("T")
R = TypeVar("R")
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # status codes that are retried
FATAL = {401: "the key is not accepted", 403: "access is refused", 404: "no such address or model"}
LONGEST = 64 << 20  # bytes of an answer, decompressed; one of 100,000 tokens has less than one MiB
SHORTEST_KEY = 8  # characters; a shorter one may be part of a word in a response
MAX_BACKOFF = 60.0  # seconds between two attempts, unless the server asks for more
MAX_RETRY_AFTER = 600.0  # seconds that a server may ask for


class EndpointDown(UserError):
    """The endpoint answers no request at all; finished work is kept."""


class RequestFailed(Exception):
    """A request without a usable answer: rejected by the server, or unanswered after all attempts."""

    def __init__(self, reason: str, *, rejected: bool = False) -> None:
        super().__init__(reason)
        self.rejected = rejected


class ChatClient:
    """An OpenAI-compatible endpoint.

    Args:
        url: base URL including the version: http://localhost:8000/v1
        model: the model's name on the server.
        api_key_env: environment variable with the API key; the key is read from nowhere else.
        concurrency: requests in flight.
        timeout: seconds for one response.
        attempts: attempts for one request; ``Retry-After`` is respected.
        requests_per_minute: rate limit.
        extra_body: additional fields of every request: {chat_template_kwargs: {enable_thinking: false}}
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
        if concurrency < 1 or attempts < 1:
            raise ConfigError(f"concurrency and attempts must be at least 1, found {concurrency} and {attempts}")
        if timeout <= 0 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise ConfigError("timeout and requests_per_minute must be above 0")
        self.url, self.model, self.api_key_env = url.rstrip("/"), model, api_key_env
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.requests_per_minute, self.extra_body = requests_per_minute, extra_body or {}
        self.counts: Counter[str] = Counter()  # how often what happened, in words
        self._quiet_until = self._next_slot = 0.0  # time.monotonic()
        self._session: ClientSession

    def each(
        self, items: Iterable[T], answer: Callable[[T], Coroutine[Any, Any, R]]
    ) -> Iterator[tuple[T, R | RequestFailed]]:
        """Yield (item, result) in the order of completion; the result of a failed item is its RequestFailed.

        Raises:
            EndpointDown: as many requests in a row as are in flight (at least 4) failed, or the server refuses all.
        """
        results = self._results(items, answer)

        async def following() -> tuple[T, R | RequestFailed] | None:
            return await anext(results, None)

        # The loop runs only while a result is awaited: the caller writes each one to disk before the next is taken.
        with asyncio.Runner() as runner:
            try:
                while (found := runner.run(following())) is not None:
                    yield found
            finally:
                runner.run(results.aclose())

    async def _results(
        self, items: Iterable[T], answer: Callable[[T], Coroutine[Any, Any, R]]
    ) -> AsyncGenerator[tuple[T, R | RequestFailed]]:
        waiting, running, in_a_row = iter(items), dict[asyncio.Task[R], T](), 0
        async with self._open_session() as self._session:
            try:
                while True:
                    for item in islice(waiting, self.concurrency - len(running)):
                        running[asyncio.create_task(answer(item))] = item
                    if not running:
                        return
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        item, problem = running.pop(task), task.exception()
                        if problem is None:
                            in_a_row = 0
                            yield item, task.result()
                            continue
                        if not isinstance(problem, RequestFailed):
                            raise problem
                        in_a_row = 0 if problem.rejected else in_a_row + 1
                        yield item, problem
                        if in_a_row >= max(4, self.concurrency):
                            raise EndpointDown(
                                f"{self.url} has not answered {in_a_row} requests in a row, each tried "
                                f"{self.attempts} times ({problem}). What is finished is kept; start the same command "
                                "again to resume."
                            )
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _open_session(self) -> ClientSession:
        import aiohttp

        key = os.environ.get(self.api_key_env)
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        headers = {"Accept-Encoding": "gzip, deflate"} | ({"Authorization": f"Bearer {key}"} if key else {})
        return aiohttp.ClientSession(
            headers=headers, trust_env=not local, auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=self.timeout), connector=aiohttp.TCPConnector(limit=self.concurrency),
        )  # fmt: skip

    async def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Return the first choice of a chat completion (``message``, ``finish_reason``) with the ``usage``.

        Raises:
            RequestFailed: the server rejects this request, or there is no usable answer after all attempts.
            EndpointDown: the server refuses all requests.
        """
        import aiohttp

        body = {"model": self.model, "messages": list(messages), **options, **self.extra_body}
        why = ""
        for attempt in range(1, self.attempts + 1):
            await self._wait_for_turn()
            pause = random.uniform(0.5, 1) * min(MAX_BACKOFF, 2.0 ** (attempt - 1))
            try:
                status, headers, text = await self._post(body)
            except TimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except (OSError, aiohttp.ClientError) as error:
                why = _without(self._secrets(), _in_a_line(error))
            else:
                if status == 200:
                    try:
                        # local servers take "EMPTY" or "x" as a key: in a response, that is text
                        keys = [key for key in self._secrets() if len(key) >= SHORTEST_KEY]
                        found = _first_choice(text)
                        choice: dict[str, Any] = _without(keys, found)
                        if choice != found:
                            self.counts[f"responses that repeat a key that was sent, which is replaced by {MASK}"] += 1
                        return choice
                    except (ValueError, KeyError, IndexError, TypeError) as error:
                        why = f"not a chat completion ({_in_a_line(error)}), found {self._excerpt(text)}"
                elif status in FATAL:
                    raise EndpointDown(f"{self.url}: {FATAL[status]} (HTTP {status}): {self._excerpt(text)}")
                elif status in TRANSIENT:
                    why = f"HTTP {status}: {self._excerpt(text)}"
                    if (asked := _retry_after(headers)) is not None:
                        pause = min(MAX_RETRY_AFTER, asked)
                        self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
                else:
                    raise RequestFailed(f"HTTP {status}: {self._excerpt(text)}", rejected=True)
            if attempt < self.attempts:
                self.counts["requests tried again"] += 1
                await asyncio.sleep(pause)
        raise RequestFailed(why)

    async def _wait_for_turn(self) -> None:
        """Wait for the rate limit, and while ``Retry-After`` holds all requests back."""
        if self.requests_per_minute is not None:
            now = time.monotonic()
            slot = max(now, self._next_slot)
            self._next_slot = slot + 60.0 / self.requests_per_minute
            await asyncio.sleep(slot - now)
        while (left := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _post(self, body: dict[str, Any]) -> tuple[int, Mapping[str, str], str]:
        # A redirect could send the key to another host: it is not followed.
        url = f"{self.url}/chat/completions"
        async with self._session.post(url, json=body, allow_redirects=False) as response:
            return response.status, response.headers, (await _read(response)).decode("utf-8", "replace")

    def _excerpt(self, text: str) -> str:
        """Return the beginning of a server's message, with the key masked in case the message repeats it."""
        return shown(_without(self._secrets(), text), 300)

    def _secrets(self) -> list[str]:
        """Return the keys that are sent."""
        sent = [value for name, value in flatten(self.extra_body).items() if names_secret(name)]
        return [str(one) for one in (os.environ.get(self.api_key_env), *sent) if one and not isinstance(one, bool)]


def _without(secrets: Sequence[str], value: Any) -> Any:
    """Return plain values with the secrets replaced by ***, in plain text and as JSON writes them."""
    if isinstance(value, dict):
        return {_without(secrets, name): _without(secrets, inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without(secrets, inner) for inner in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK).replace(json.dumps(secret)[1:-1], MASK)
    return value


async def _read(response: ClientResponse) -> bytes:
    """Return the body of a response, decompressed, which aiohttp would do without a limit.

    Raises:
        RequestFailed: it is longer than :data:`LONGEST`, or compressed in a way that was not asked for.
    """
    import aiohttp

    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise RequestFailed(f"an answer of more than {LONGEST >> 20} MiB")
    body, encoding = b"".join(parts), response.headers.get("Content-Encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise RequestFailed(f"an answer compressed with {shown(encoding)}, which was not asked for")
    try:
        text = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, LONGEST + 1)
    except zlib.error as error:
        raise aiohttp.ClientPayloadError(f"not {encoding}: {error}") from error
    if len(text) > LONGEST:
        raise RequestFailed(f"an answer of more than {LONGEST >> 20} MiB")
    return text


def _first_choice(text: str) -> dict[str, Any]:
    found = load_json(text)
    choice = found["choices"][0]
    if not isinstance(choice["message"]["content"], str):
        raise ValueError("no text in the message")
    return {**choice, "usage": found.get("usage") or {}}


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None without a usable one."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
