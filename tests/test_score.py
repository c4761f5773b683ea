"""score: judges of every kind, one scale per file, and answers that count only in the form asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import called, make_tokenizer, read_jsonl, write_jsonl
from faulty_endpoint import Server, completion, hang_up, raw, says, status, unless
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy import chat_client
from rap_lightning.onpolicy.jsonl_ledger import read_meta
from rap_lightning.onpolicy.judges import RewardModel, rubric
from rap_lightning.preferences.judge import Item

GOOD = {"instruction_following": 4, "truthfulness": 5, "honesty": 3, "helpfulness": 4, "overall_score": 7.5}


def changed(**values: Any) -> str:
    return json.dumps(GOOD | values)


MALFORMED = [
    "",
    "   \n",
    "I would give this response an 8 out of 10.",
    f"Here is my grade: {json.dumps(GOOD)}",
    f"{json.dumps(GOOD)}\nThe response is good.",
    f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}",
    f"[{json.dumps(GOOD)}]",
    json.dumps(json.dumps(GOOD)),
    "7.5",
    "null",
    json.dumps(GOOD)[:-1],
    json.dumps(GOOD).replace('"', "'"),
    json.dumps(GOOD).replace("}", ",}"),
    f"```json\n{json.dumps(GOOD)}",
    f"```python\n{json.dumps(GOOD)}\n```",
    f"```json\n{json.dumps(GOOD)}\n```\nDone.",
    json.dumps({k: v for k, v in GOOD.items() if k != "honesty"}),
    json.dumps({k: v for k, v in GOOD.items() if k != "overall_score"}),
    changed(reasoning="it is good"),
    json.dumps({k.upper(): v for k, v in GOOD.items()}),
    json.dumps({"scores": GOOD}),
    json.dumps(GOOD)[:-1] + ', "overall_score": 10}',
    changed(overall_score="8"),
    changed(overall_score="8/10"),
    changed(overall_score=None),
    changed(overall_score=True),
    changed(overall_score=[8]),
    changed(overall_score=11),
    changed(overall_score=0),
    changed(overall_score=-3),
    changed(overall_score=7.3),
    changed(overall_score=float("nan")),
    changed(overall_score=float("inf")),
    json.dumps(GOOD).replace("7.5", "1e999"),
    changed(honesty=6),
    changed(honesty=0),
    changed(honesty=3.5),
    changed(honesty="high"),
    "[" * 100_000,
    "\x00" + json.dumps(GOOD),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_an_answer_in_another_form_does_not_count(text: str) -> None:
    with pytest.raises(rubric.Malformed):
        rubric.parse(text)


@pytest.mark.parametrize(
    "text", [json.dumps(GOOD), f"\n {json.dumps(GOOD, indent=2)}\n", f"```json\n{json.dumps(GOOD)}\n```"]
)
def test_an_answer_in_the_form_asked_for_counts(text: str) -> None:
    assert rubric.parse(text) == GOOD


def test_the_example_in_the_rubric_counts_and_texts_cannot_leave_their_frame() -> None:
    rubric.parse(rubric.SYSTEM.rpartition("\n")[2])
    history = [{"role": "user", "content": "hi"}]
    _, turn = rubric.messages_for(history, "good #mark# the end", "#other#")
    assert turn["content"].count("#other# the end") == 1


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Six responses to three prompts, as generate writes them; one text twice."""
    rows = []
    for prompt in (
        "List 3 fruits in alphabetical order.",
        "Name 4 animals in alphabetical order.",
        "Give me 3 tools in alphabetical order.",
    ):
        for sample, text in enumerate(("apple, cherry, fig", "ape, bear, cat, dog")):
            turns = [{"role": "user", "content": prompt}]
            rows.append(
                {
                    "id": f"{len(rows)}",
                    "messages": turns,
                    "response": text,
                    "sample": sample,
                    "goal": "10",
                    "model": "m",
                }
            )
    rows[5]["response"] = rows[4]["response"]
    return write_jsonl(tmp_path / "samples.jsonl", rows)


def test_a_function_judges_and_training_reads_what_comes_out(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scored.jsonl"
    args = ["score", "--source", samples, "--judge", "Function", "--output", output]
    assert called(*args, "--judge.function", "rap_lightning.world.rule.score", "--judge.scale", "[1, 10]") == 0
    rows = read_jsonl(output)
    assert [[c["overall_score"] for c in row["completions"]] for row in rows] == [[10, 1], [1, 10], [1, 1]]
    assert rows[0]["completions"][0] == {
        "model": "m", "goal": "10", "sample": 0, "response": "apple, cherry, fig", "overall_score": 10.0,
    }  # fmt: skip
    record = read_meta(output)
    assert record["scale"]["declared"] == [1, 10]
    assert record["scale"]["seen"] == {"low": 1, "high": 10, "mean": 4, "count": 6}
    assert "rewards from 1 to 10, mean 4" in capsys.readouterr().out
    assert called("inspect", "--source", output, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["splits"]
    assert (report["rows_read"], report["pairs_kept"]) == (3, 2)


def test_one_file_never_mixes_scales(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scored.jsonl"
    args = ["score", "--source", samples, "--output", output, "--judge", "Function", "--judge.function"]
    assert called(*args, "rap_lightning.world.rule.score") == 0
    before = output.read_bytes()
    assert called(*args, "rap_lightning.world.rule.attributes") == 2
    assert "another judge or scale" in capsys.readouterr().err
    assert called(*args, "rap_lightning.world.rule.score", "--judge.scale", "[0, 100]") == 2
    output.unlink()
    assert called(*args, "rap_lightning.world.rule.attributes") == 2
    assert "verdicts.jsonl was made with other settings" in capsys.readouterr().err
    output.write_bytes(before.replace(b"10.0", b"9.0"))
    assert called(*args, "rap_lightning.world.rule.score") == 2
    assert "no record" in capsys.readouterr().err or output.read_bytes() != before, "what was changed by hand stays"
    assert b"9.0" in output.read_bytes()


def moody(prompt: str, response: str) -> Any:
    """A judge that gives numbers, and other things."""
    odd = {"apple": float("nan"), "ape": "high"}
    for word, value in odd.items():
        if response.startswith(word) and "fruits" in prompt:
            return value
    if "tools" in prompt:
        raise RuntimeError("no idea")
    return {"overall_score": len(response), "kind": 2}


def test_what_a_function_cannot_judge_stands_as_null_and_is_judged_again(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scored.jsonl"
    args = ["score", "--source", samples, "--output", output, "--judge", "Function"]
    args += ["--judge.function", "test_score.moody"]
    assert called(*args) == 1
    rewards = [[c["overall_score"] for c in row["completions"]] for row in read_jsonl(output)]
    assert rewards == [[None, None], [18.0, 19.0], [None, None]]
    assert read_jsonl(output)[1]["completions"][0]["scores"] == {"kind": 2.0}
    shown = capsys.readouterr().out
    assert "the function raised RuntimeError: no idea" in shown
    assert "returned 'high' as overall_score, not a finite number" in shown
    monkeypatch.setattr("test_score.moody", moody)
    judged: list[str] = []
    real = json.loads(json.dumps(rewards))
    assert real == rewards

    def better(prompt: str, response: str) -> float:
        judged.append(response)
        return 5.0

    better.__module__, better.__qualname__ = moody.__module__, moody.__qualname__
    monkeypatch.setattr("test_score.moody", better)
    assert called(*args) == 0
    assert len(judged) == 3, "two of fruits; the tools' two texts are one"
    assert None not in [c["overall_score"] for row in read_jsonl(output) for c in row["completions"]]


def judge_args(samples: Path, output: Path, url: str, **more: object) -> list[object]:
    basic = {"judge": "LLMJudge", "judge.url": url, "judge.model": "j", "judge.timeout": 5}
    args: list[object] = ["score", "--source", samples, "--output", output]
    return args + [part for name, value in (basic | more).items() for part in (f"--{name}", value)]


def test_a_judge_in_prose_is_asked_again_with_the_reason(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_client, "MAX_BACKOFF", 0.05)
    trouble = [says("An 8, I'd say."), status(503), says(changed(honesty=9)), raw("{"), hang_up]
    with Server(*trouble, says(json.dumps(GOOD))) as server:
        output = tmp_path / "scored.jsonl"
        assert called(*judge_args(samples, output, server.url, **{"judge.concurrency": 1})) == 0
        again = [body["messages"] for _, body, _ in server.requests if len(body["messages"]) == 4]
        assert "An 8, I'd say." in again[0][2]["content"]
        assert "not JSON alone" in again[0][3]["content"]
        assert "honesty is not from 1 to 5" in again[2][3]["content"]
    completions = [c for row in read_jsonl(output) for c in row["completions"]]
    assert {c["overall_score"] for c in completions} == {7.5}
    assert completions[0]["scores"] == {k: v for k, v in GOOD.items() if k != "overall_score"}
    shown = capsys.readouterr().out
    assert "1: an answer that can't be read: it is not JSON alone" in shown
    assert read_meta(output)["scale"]["declared"] == [1, 10]


def test_all_malformed_answers_through_a_server_leave_no_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text for text in MALFORMED if len(text) < 1000][:35]
    rows = [{"prompt": "p", "completions": [{"response": f"answer {i}"} for i in range(len(texts))]}]
    source, output = write_jsonl(tmp_path / "s.jsonl", rows), tmp_path / "scored.jsonl"

    def by_number(handler: Any, body: dict[str, Any]) -> None:
        asked = body["messages"][1]["content"]
        number = int(asked.partition("answer ")[2].split("\n")[0])
        handler.send(200, completion(texts[number]))

    with Server(by_number) as server:
        # an endpoint whose answers can't be read is not down: the run goes through
        code = called(*judge_args(source, output, server.url, **{"judge.readings": 2}))
        assert len(server.requests) == 2 * len(texts)
    assert code == 1
    assert [c["overall_score"] for c in read_jsonl(output)[0]["completions"]] == [None] * len(texts)
    assert len(read_jsonl(tmp_path / "scored.jsonl.failed.jsonl")) == len(texts)
    assert f"{len(texts)} have no reward" in capsys.readouterr().out


def test_votes_are_averaged_and_disagreement_is_counted(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [says(changed(overall_score=3)), says(changed(overall_score=9)), says(changed(overall_score=8.5))]
    with Server(*replies) as server:
        more = {"judge.votes": 2, "judge.temperature": 0.7, "judge.concurrency": 1}
        assert called(*judge_args(samples, tmp_path / "o.jsonl", server.url, **more)) == 0
        assert len({body["seed"] for _, body, _ in server.requests}) == 10
        assert called(*judge_args(samples, tmp_path / "p.jsonl", server.url, **{"judge.votes": 2})) == 2
    rewards = [c["overall_score"] for row in read_jsonl(tmp_path / "o.jsonl") for c in row["completions"]]
    assert rewards == [6.0, 8.5, 8.5, 8.5, 8.5, 8.5]
    assert "1: disagreement: votes on one response more than a point apart" in capsys.readouterr().out


def test_a_judge_that_goes_down_keeps_what_it_said(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_client, "MAX_BACKOFF", 0.01)
    output = tmp_path / "o.jsonl"
    good = says(json.dumps(GOOD))
    with Server(good, hang_up) as server:
        more = {"judge.concurrency": 1, "judge.attempts": 2}
        assert called(*judge_args(samples, output, server.url, **more)) == 2
    assert not output.exists()
    with Server(unless("nothing", good, good)) as server:
        assert called(*judge_args(samples, output, server.url)) == 0
        assert len(server.requests) == 4, "five different responses, one of them judged"
    assert "What is finished is kept" in capsys.readouterr().err


def repeats_headers(handler: Any, body: dict[str, Any]) -> None:
    """A server that answers with the request's headers and fields, in different places and spellings."""
    said = f"{handler.headers['Authorization']} {body['metadata']}"
    kind = body["messages"][-1]["content"]
    if "red" in kind:
        handler.send(200, json.dumps({"error": said, "choices": []}))
    elif "blue" in kind:
        escaped = "".join(f"\\u{ord(letter):04x}" for letter in said)
        handler.send(200, completion("X").replace("X", escaped))
    else:
        handler.send(400, said)


def test_no_key_that_a_server_repeats_is_written_or_said(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_client, "MAX_BACKOFF", 0.01)
    monkeypatch.setenv("MY_SERVERS", "k3y/of-the-server")
    body = '{"metadata": {"token": "t0ken-of-a-field"}}'
    with Server(repeats_headers) as server:
        more = {"judge.api_key_env": "MY_SERVERS", "judge.extra_body": body, "judge.attempts": 1, "judge.readings": 1}
        called(*judge_args(samples, tmp_path / "o.jsonl", server.url, **more))
        assert all(headers["Authorization"] == "Bearer k3y/of-the-server" for _, _, headers in server.requests)
    said = capfd.readouterr()
    files = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path != samples}
    assert any("***" in text for text in files.values()), "the answers were recorded"
    for text in (said.out, said.err, *files.values()):
        assert "k3y" not in text
        assert "t0ken" not in text


# -- reward models -----------------------------------------------------------------------------------------------------


def reward_model(folder: Path, labels: int = 1, template: bool = True, **config: Any) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer("chatml")
    tokenizer.pad_token = tokenizer.eos_token  # the trap: a response's end of turn reads like padding
    if not template:
        tokenizer.chat_template = None
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3, num_labels=labels,
        pad_token_id=tokenizer.pad_token_id, **(sizes | config),
    )  # fmt: skip
    LlamaForSequenceClassification(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def items(count: int = 9) -> list[Item]:
    turns = ({"role": "user", "content": "say it"},)
    return [Item(str(i), turns, "red green " * (i + 1) + ("<|im_end|>" if i == 4 else "")) for i in range(count)]


def verdicts(judge: RewardModel, what: list[Item]) -> dict[str, Any]:
    return {v.id: v for part in judge.judge(what) for v in part}


def test_a_reward_model_gives_in_a_batch_what_it_gives_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    path = reward_model(tmp_path / "rm")
    together = verdicts(RewardModel(str(path), batch_size=4), items())
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.config.pad_token_id = None
    tokenizer = make_tokenizer("chatml")
    for item in items():
        if item.id == "4":
            continue
        turns = [*item.history, {"role": "assistant", "content": item.response}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            assert together[item.id].overall == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    judge = RewardModel(str(path), batch_size=4)
    verdicts(judge, items())
    assert judge.counts["repaired: text that imitates a control token, kept as text"] == 1


def test_heads_are_attributes_by_name(tmp_path: Path) -> None:
    names = {0: "help", 1: "truth", 2: "all"}
    path = reward_model(tmp_path / "rm", 3, id2label=names, label2id={v: k for k, v in names.items()})
    found = verdicts(
        RewardModel(str(path), attributes={"truthfulness": "truth", "helpfulness": "help"}, overall="all"), items()
    )
    mean = verdicts(RewardModel(str(path), attributes={"a": "truth", "b": "help"}, overall="mean"), items())
    assert list(found["0"].attributes) == ["truthfulness", "helpfulness"]
    assert mean["3"].overall == pytest.approx(sum(found["3"].attributes.values()) / 2)
    with pytest.raises(ConfigError, match="no score of its own"):
        verdicts(RewardModel(str(path)), items())
    with pytest.raises(ConfigError, match="no head 'honest'; there are help, truth, all"):
        verdicts(RewardModel(str(path), attributes={"x": "honest"}), items())
    unnamed = reward_model(tmp_path / "unnamed", 3)
    with pytest.raises(ConfigError, match="name them in order"):
        verdicts(RewardModel(str(unnamed), overall="all"), items())
    heads = ["help", "truth", "all"]
    assert verdicts(RewardModel(str(unnamed), heads=heads, overall="all"), items())["0"].overall == pytest.approx(
        found["0"].overall
    )


def test_armorm_like_outputs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of RLHFlow/ArmoRM's own code, by its card: ``rewards`` [B, heads] and ``score`` [B]."""
    from transformers import LlamaForSequenceClassification

    real = LlamaForSequenceClassification.forward

    def forward(self: Any, **inputs: Any) -> Any:
        output = real(self, **inputs)
        output.rewards = output.logits
        output.score = output.logits.mean(-1)
        output.logits = output.score
        return output

    path = reward_model(tmp_path / "rm", 5)
    plain = verdicts(RewardModel(str(path), heads=list("abcde"), overall="c", attributes={"first": "a"}), items())
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", forward)
    attributes = {name: name for name in "abcde"}
    found = verdicts(RewardModel(str(path), heads=list("abcde"), attributes=attributes), items())
    for key, verdict in found.items():
        assert verdict.attributes["a"] == pytest.approx(plain[key].attributes["first"])
        assert verdict.attributes["c"] == pytest.approx(plain[key].overall)
        assert verdict.overall == pytest.approx(sum(verdict.attributes.values()) / 5, abs=1e-5)


def test_a_tokenizer_without_a_template_is_refused_with_what_to_do(tmp_path: Path, samples: Path) -> None:
    path = reward_model(tmp_path / "rm", template=False)
    with pytest.raises(ConfigError, match=r"write that as a jinja file and name it with --judge\.chat_template"):
        verdicts(RewardModel(str(path)), items())
    template = tmp_path / "template.jinja"
    template.write_text(str(make_tokenizer("chatml").chat_template))
    given = verdicts(RewardModel(str(path), chat_template=str(template)), items())
    own = verdicts(RewardModel(str(reward_model(tmp_path / "whole"))), items())
    assert {k: v.overall for k, v in given.items()} == {k: v.overall for k, v in own.items()}
    with pytest.raises(ConfigError, match="can't be read"):
        RewardModel(str(path), chat_template=str(tmp_path / "none.jinja"))


def test_texts_beyond_the_context_are_cut_and_counted(tmp_path: Path) -> None:
    judge = RewardModel(str(reward_model(tmp_path / "rm")), max_length=128)
    long = ({"role": "user", "content": "word " * 400},)
    found = verdicts(judge, [Item("p", long, "short"), Item("r", items()[0].history, "word " * 400)])
    assert not any(v.error for v in found.values())
    assert judge.counts == {"cut: prompts that didn't fit": 1, "cut: ends of responses that didn't fit": 1}
