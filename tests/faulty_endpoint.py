"""A chat endpoint on the loopback interface that fails on a schedule."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next reply of the schedule; its last reply is repeated."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Server = self.server.owner  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            reply = server.schedule.pop(0) if len(server.schedule) > 1 else server.schedule[0]
            server.requests.append((time.monotonic(), body, dict(self.headers)))
        reply(self, body)

    def send(self, status: int, text: str, **headers: str) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Server:
    """A context manager; ``url`` is the value for --engine.url."""

    def __init__(self, *schedule: Reply) -> None:
        self.schedule = list(schedule)
        self.requests: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.owner = self  # type: ignore[attr-defined]
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> Server:
        serve = partial(self.http.serve_forever, poll_interval=0.01)  # for which its shutdown waits
        threading.Thread(target=serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def asked(self) -> list[str]:
        """The last user turn of each request."""
        return [body["messages"][-1]["content"] for _, body, _ in self.requests]


def completion(text: str, finish: str = "stop") -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})


def says(text: str) -> Reply:
    return lambda handler, body: handler.send(200, completion(text))


def echo(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, completion("answer to " + body["messages"][-1]["content"]))


def status(code: int, **headers: str) -> Reply:
    return lambda handler, body: handler.send(code, json.dumps({"error": {"message": "no"}}), **headers)


def raw(text: str) -> Reply:
    return lambda handler, body: handler.send(200, text)


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler: Handler, body: dict[str, Any]) -> None:
    """Send fewer bytes than the header says."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("cut off")[:30].encode())
    handler.close_connection = True


def slow(seconds: float) -> Reply:
    def reply(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        handler.send(200, completion("too late"))

    return reply


def unless(text: str, reply: Reply, otherwise: Reply) -> Reply:
    """Return ``otherwise`` for requests whose last turn contains ``text``, ``reply`` for all others."""

    def choose(handler: Handler, body: dict[str, Any]) -> None:
        (otherwise if text in body["messages"][-1]["content"] else reply)(handler, body)

    return choose
