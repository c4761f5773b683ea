"""Input of others without an end: bodies, compressed bodies, and JSON that is nested too deeply."""

from __future__ import annotations

import contextlib
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from conftest import make_model, run_command, scored_rows
from faulty_endpoint import Handler, Reply, Server, completion, raw
from rap_lightning.cli.config_files import read_yaml
from rap_lightning.onpolicy import chat_client
from rap_lightning.onpolicy.chat_client import ChatClient, EndpointDown, RequestFailed
from rap_lightning.onpolicy.jsonl_ledger import read_rows
from rap_lightning.preferences.bounded_json import DEEPEST, TooDeep, load_json

MEGA = 1 << 20


def endless(code: int, **headers: str) -> Reply:
    def reply(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for _ in range(400):
                handler.wfile.write(b" " * MEGA)

    return reply


def compressed(content: bytes, encoding: str) -> Reply:
    def reply(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", encoding)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(content)

    return reply


def answers(reply: Reply, count: int = 1) -> list[Any]:
    with Server(reply) as server:
        client = ChatClient(server.url, "m", attempts=1, concurrency=1)
        return [
            found for _, found in client.each(range(count), lambda i: client.chat([{"role": "user", "content": ""}]))
        ]


BOMB = gzip.compress(b"\0" * (64 * MEGA), 1)


@pytest.mark.parametrize(
    "reply",
    [endless(200), endless(500), compressed(BOMB, "gzip"), endless(200, Content_Encoding="gzip")],
    ids=["endless", "endless error", "bomb", "endless gzip"],
)
def test_a_body_without_an_end_is_a_failed_request_and_takes_no_memory(
    reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_client, "LONGEST", MEGA)
    tracemalloc.start()
    try:
        (found,) = answers(reply)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(found, RequestFailed)
    assert "an answer of more than 1 MiB" in str(found)
    assert peak < 40 * MEGA


def test_compressed_answers_are_read() -> None:
    text = completion("fine").encode()
    (found,) = answers(compressed(gzip.compress(text), "gzip"))
    assert found["message"]["content"] == "fine"
    for content, encoding in ((text, "gzip"), (text, "br"), (gzip.compress(text)[:20], "gzip")):
        (found,) = answers(compressed(content, encoding))
        assert isinstance(found, RequestFailed), (content, encoding)


def test_an_endpoint_that_only_sends_too_much_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "LONGEST", MEGA)
    with pytest.raises(EndpointDown, match="more than 1 MiB"):
        answers(endless(200), count=8)


@pytest.mark.parametrize("depth", [DEEPEST + 1, 400, 100_000])
def test_deep_json_is_too_deep_wherever_it_is_read(depth: int, tmp_path: Path) -> None:
    nested = "[" * depth + "]" * depth
    with pytest.raises(TooDeep):
        load_json(nested)
    with pytest.raises(TooDeep):
        load_json('{"a":' * depth + "1" + "}" * depth)
    text = completion("x")[:-1] + f', "more": {nested}}}'
    (found,) = answers(raw(text))
    assert isinstance(found, RequestFailed)
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": {nested}}}\n')
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        list(read_rows([path]))
    rows = [json.dumps(row) for row in scored_rows(8)]
    tool_call = {"type": "function", "function": {"name": "f", "arguments": nested}}
    with_tools = scored_rows(1)[0] | {"tools": nested}
    with_call = scored_rows(1)[0]
    with_call["chosen"][-1]["tool_calls"] = [tool_call]
    rows[2] = rows[2][:-1] + f', "extra": {nested}}}'
    rows[3:5] = [json.dumps(with_tools), json.dumps(with_call)]
    path.write_text("\n".join(rows) + "\n")
    result = run_command("inspect", "--source", path, "--json")
    assert result.returncode == 1
    (split,) = json.loads(result.stdout)["splits"]
    assert split["rows_read"] == 8
    assert split["pairs_kept"] == 5
    array = tmp_path / "rows.json"
    array.write_text(f"[{rows[0]}, {rows[2]}]")
    assert "nested too deeply" in run_command("inspect", "--source", array).stderr
    (tmp_path / "c.yaml").write_text(f"data: {nested}\n")
    if depth == 100_000:
        assert "nested too deeply" in read_yaml(str(tmp_path / "c.yaml"))[1]


def test_what_is_not_too_deep_is_read() -> None:
    assert load_json("[" * DEEPEST + "]" * DEEPEST) is not None
    assert load_json(json.dumps([[]] * 1000)) == [[]] * 1000


def test_score_and_fit_refuse_deep_rows(tmp_path: Path) -> None:
    nested = "[" * 500 + "]" * 500
    rows = [json.dumps(row) for row in scored_rows(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*rows, rows[0][:-1] + f', "extra": {nested}}}']) + "\n")
    judge = ["--judge", "Function", "--judge.function", "stub_judges.face_value"]
    prompts = [{"prompt": "a", "completions": [{"response": "b"}]}, {"prompt": "c", "completions": [{"response": "d"}]}]
    lines = [json.dumps(row) for row in prompts]
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines, lines[0][:-1] + f', "extra": {nested}}}']) + "\n")
    result = run_command("score", "--source", tmp_path / "samples.jsonl", "--output", tmp_path / "scored.jsonl", *judge)
    assert result.returncode in (1, 2)
    assert "deep" in result.stderr + result.stdout
    model = make_model(tmp_path / "model")
    result = run_command("fit", "--model.policy.path", model, "--data.source", path, "--trainer.accelerator", "cpu")
    assert result.returncode == 2
    assert "nested too deeply" in result.stderr
