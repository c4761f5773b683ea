"""Thinking models: what becomes of thoughts, and which prompts training, generation and export see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import called, make_tokenizer, pairs_of, run_command, write_jsonl
from rap_lightning.batches.chat_renderer import AS_GENERATED, CLOSED, FORGOTTEN
from rap_lightning.batches.control_tokens import LOOKALIKE
from rap_lightning.batches.encode import Conversation, EncodedConversation, Encoder
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.preferences.pairs import BadRow
from rap_lightning.preferences.template_options import TemplateOptions, defaults_of, split_defaults
from thinking_models import THINKING, thinking_model, thinking_tokenizer

QUESTION = {"role": "user", "content": "2 + 2?"}
BLOCK = "<think>\ntwo twice\n</think>\n\n4"
EMPTY = "<think>\n\n</think>\n\n4"


def texts(tokenizer: Any, response: str, history: Any = (QUESTION,)) -> tuple[str, str, EncodedConversation]:
    """The prompt and the response as text of their ids, and what was found."""
    found = Encoder(tokenizer, None, 512).encode_one(Conversation(history, responses=(response,)))
    (prompt,), (answer,) = found.prompt_ids, found.response_ids
    return tokenizer.decode(prompt), tokenizer.decode(answer), found


@pytest.mark.parametrize(
    ("family", "response", "prompt", "answer"),
    [
        ("hybrid", BLOCK, "<|im_start|>assistant\n", f"{BLOCK}<|im_end|>\n"),
        ("hybrid", "4", "<|im_start|>assistant\n", f"{EMPTY}<|im_end|>\n"),
        ("prefilled", BLOCK, "<|im_start|>assistant\n<think>\n", "two twice\n</think>\n\n4<|im_end|>\n"),
        ("prefilled", "two twice\n</think>\n\n4", "assistant\n<think>\n", "two twice\n</think>\n\n4<|im_end|>\n"),
        ("prefilled", "4", "<|im_start|>assistant\n<think>\n", "\n</think>\n\n4<|im_end|>\n"),
        ("cutting", BLOCK, "<|User|>2 + 2?<|Assistant|><think>\n", "two twice\n</think>\n\n4<|end|>"),
        ("cutting", "4", "<|User|>2 + 2?<|Assistant|><think>\n", "\n</think>\n\n4<|end|>"),
    ],
)
def test_a_response_follows_its_prompt_as_generation_would_write_it(
    family: str, response: str, prompt: str, answer: str
) -> None:
    tokenizer = thinking_tokenizer(family)
    start, end, found = texts(tokenizer, response)
    assert start.endswith(prompt)
    assert start == tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert end == answer
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    ids = found.prompt_ids[0] + found.response_ids[0]
    assert [i for i in ids if i in tags] == tags, "the tags are the template's own tokens"
    assert found.repaired == ([AS_GENERATED] if family == "cutting" else [])


@pytest.mark.parametrize("family", list(THINKING))
def test_other_control_tokens_in_thoughts_stay_text(family: str) -> None:
    tokenizer = thinking_tokenizer(family)
    end = tokenizer.eos_token
    _, answer, found = texts(tokenizer, f"<think>\nnot {end} yet\n</think>\n\n4 {end} 5")
    assert found.response_ids[0].count(tokenizer.eos_token_id) == 1
    assert LOOKALIKE in found.repaired
    assert f"not {end} yet" in answer


def test_thoughts_of_earlier_turns_are_left_out_where_the_template_does_so_and_counted() -> None:
    history = [QUESTION, {"role": "assistant", "content": BLOCK}, {"role": "user", "content": "sure?"}]
    for family in THINKING:
        prompt, _, found = texts(thinking_tokenizer(family), "yes", history)
        assert "two twice" not in prompt
        assert "4" in prompt.replace("2 + 2?", "")
        assert FORGOTTEN in found.repaired
    prompt, _, found = texts(make_tokenizer("chatml"), "yes", history)
    assert BLOCK in prompt
    assert found.repaired == []


def test_a_long_history_with_thoughts_can_be_cut() -> None:
    history = [
        {"role": "user", "content": "plum " * 300},
        {"role": "assistant", "content": f"<think>\nhm\n</think>\n\n{'pear ' * 50}"},
        QUESTION,
    ]
    for family in THINKING:
        found = Encoder(thinking_tokenizer(family), None, 200, 60).encode_one(Conversation(history, responses=("4",)))
        assert found.cut_prompts[0] > 0
        assert thinking_tokenizer(family).decode(found.prompt_ids[0]).count("2 + 2?") == 1


def rows(responses: tuple[str, str], count: int = 6) -> list[dict[str, Any]]:
    """Scored pairs of one question each, with the same two responses after a number."""
    made = []
    for number in range(count):
        question = {"role": "user", "content": f"{number}: what?"}
        sides = [[question, {"role": "assistant", "content": text}] for text in responses]
        made.append({"chosen": sides[0], "rejected": sides[1], "score_chosen": 8, "score_rejected": 3})
    return made


WITH_THOUGHTS = ("<think>\nred\n</think>\n\nyes", "<think>\nblue\n</think>\n\nno")


@pytest.mark.parametrize("thinking", ["keep", "strip", "empty"])
def test_thinking_says_what_becomes_of_thoughts(thinking: Any) -> None:
    expected = {"keep": WITH_THOUGHTS, "strip": ("yes", "no")}
    expected["empty"] = ("<think>\n\n</think>\n\nyes", "<think>\n\n</think>\n\nno")
    pairs, report = pairs_of(rows(WITH_THOUGHTS), thinking=thinking)
    assert {pair.responses for pair in pairs} == {expected[thinking]}
    assert sum(tally.count for tally in report.noted.values()) == (0 if thinking == "keep" else 6)


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        (("<think>\na\n</think>\n\nyes", "<think>\nb\n</think>\n\nyes"), "the same answer as another response"),
        (("<think>\na\n</think>\n\n", "no"), "a response of thoughts alone"),
        (("<think>\na and on and on", "no"), "thoughts that never end"),
    ],
)
def test_without_thoughts_a_response_must_remain(responses: tuple[str, str], reason: str) -> None:
    pairs, report = pairs_of(rows(responses), thinking="strip")
    assert pairs == []
    assert [(reason in why, tally.count) for why, tally in report.dropped.items()] == [(True, 6)]


def test_rows_without_thoughts_are_not_counted_as_changed() -> None:
    texts = ("<think>\nwithout an end", "yes", "no")
    completions = [{"text": text, "score": score} for text, score in zip(texts, (9, 8, 3), strict=True)]
    _, report = pairs_of([{"prompt": "2 + 2?", "completions": completions}], thinking="strip")
    assert (report.pairs, report.noted, sum(one.count for one in report.left_out.values())) == (1, {}, 1)


def test_reasoning_content_is_read_and_written_as_the_template_writes_it() -> None:
    (row,) = rows(("yes", "no"), 1)
    row["chosen"][1] |= {"reasoning_content": "red", "weight": 1}
    row["rejected"][1]["reasoning_content"] = "blue\n"
    (pair,), report = pairs_of([row])
    assert pair.responses == WITH_THOUGHTS
    assert report.unread == {"chosen[].weight"}
    for family in THINKING:
        _, answer, _ = texts(thinking_tokenizer(family), pair.responses[0])
        assert "red\n</think>\n\nyes" in answer


def test_a_closed_thinking_block_takes_no_thoughts() -> None:
    for family in ("hybrid", "prefilled"):
        tokenizer = TemplateOptions(None, {"enable_thinking": False}).applied(thinking_tokenizer(family))
        prompt, answer, _ = texts(tokenizer, "4")
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answer == "4<|im_end|>\n"
        assert texts(tokenizer, EMPTY)[1] == "4<|im_end|>\n"
        with pytest.raises(BadRow) as problem:
            texts(tokenizer, BLOCK)
        assert problem.value.reason == CLOSED


def test_switches_are_defaults_of_the_template_that_a_caller_can_override() -> None:
    tokenizer = thinking_tokenizer("hybrid")
    own = tokenizer.chat_template

    def prompt(**options: Any) -> str:
        return str(tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True, **options))

    thinks = prompt()
    before = Encoder(tokenizer, None, 64).key()
    TemplateOptions(None, {"enable_thinking": False}).applied(tokenizer)
    assert prompt() == thinks + "<think>\n\n</think>\n\n"
    assert prompt(enable_thinking=True) == thinks
    assert Encoder(tokenizer, None, 64).key() != before
    TemplateOptions().applied(tokenizer)
    assert defaults_of(tokenizer.chat_template) == {"enable_thinking": False}
    TemplateOptions(None, {"enable_thinking": True}).applied(tokenizer)
    assert prompt() == thinks
    assert split_defaults(tokenizer.chat_template) == ({"enable_thinking": True}, own)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"enable_thoughts": False}, "no effect.*reads.*enable_thinking"), ({"messages": []}, "can't be set")],
)
def test_a_switch_without_effect_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TemplateOptions(None, kwargs).applied(thinking_tokenizer("hybrid"))


def test_empty_thoughts_need_a_template_with_thinking() -> None:
    with pytest.raises(ConfigError, match="thinking empty"):
        Encoder(make_tokenizer("chatml"), None, 64).check_thinking("empty")
    Encoder(thinking_tokenizer("cutting"), None, 64).check_thinking("empty")


# -- through the commands ---------------------------------------------------------------------------------------------

SWITCH = ("chat_template_kwargs", "{enable_thinking: false}")


@pytest.fixture
def prompts_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that any command encodes, as text."""
    seen: list[str] = []
    encode = Encoder.encode

    def recorded(self: Encoder, conversations: Any) -> Any:
        found = encode(self, conversations)
        good = [one for one in found if not isinstance(one, BadRow)]
        seen.extend(self.tokenizer.decode(ids) for one in good for ids in one.prompt_ids)
        return found

    monkeypatch.setattr(Encoder, "encode", recorded)
    return seen


@pytest.mark.parametrize(
    "family", ["hybrid", *(pytest.param(f, marks=pytest.mark.slow) for f in THINKING if f != "hybrid")]
)
def test_one_prompt_in_inspect_fit_generate_evaluate_predict_and_export(
    family: str, tmp_path: Path, prompts_seen: list[str]
) -> None:
    from transformers import AutoTokenizer

    goal = OverallGoal()
    model = thinking_model(tmp_path / "model", family)
    data = write_jsonl(tmp_path / "rows.jsonl", rows(WITH_THOUGHTS, 4))
    switch, thinking = (() if family == "cutting" else SWITCH), "keep" if family == "cutting" else "strip"
    told = [f"--{switch[0]}", switch[1]] if switch else []
    closed = "<think>\n\n</think>\n\n" if switch else "<think>\n"

    def expected(text: str | None) -> str:
        if family == "cutting":
            return f"<|begin|>{text or ''}<|User|>0: what?<|Assistant|>{closed}"
        system = f"<|im_start|>system\n{text}<|im_end|>\n" if text else ""
        return f"{system}<|im_start|>user\n0: what?<|im_end|>\n<|im_start|>assistant\n{closed}"

    def seen() -> set[str]:
        found = {prompt for prompt in prompts_seen if "0: what?" in prompt}
        prompts_seen.clear()
        return found

    trained = {expected(goal.text(8)), expected(goal.text(3))}
    shown = run_command("inspect", "--source", data, "--tokenizer", model, "--thinking", thinking, *told)
    assert seen() == trained
    marked = "⟦<think>⟧\n\n⟦</think>⟧\n" if switch else "⟦<think>⟧\n"
    assert marked.replace("\n", "\n   ") in shown.stdout
    assert ("   | yes⟦<|im_end|>⟧" if switch else "   | red\n   | ⟦</think>⟧\n   | \n   | yes⟦<|end|>⟧") in shown.stdout

    run = ["--model.policy.path", model, "--data.source", data, "--trainer.accelerator", "cpu", "--data.batch_size", 2]
    run += ["--data.max_length", 400, "--data.thinking", thinking, "--trainer.default_root_dir", tmp_path / "run"]
    run += [f"--data.{switch[0]}", switch[1]] if switch else []
    assert called("fit", *run, "--trainer.max_steps", 1) == 0
    assert seen() >= trained
    folder = tmp_path / "run" / "version_0"
    checkpoint = folder / "checkpoints" / "last.ckpt"

    best = expected(goal.text(goal.best))
    sampling = ("--max_new_tokens", 2, "--temperature", 0)
    for number, path in enumerate((folder / "hf", checkpoint)):
        output = tmp_path / f"{number}.jsonl"
        assert called("generate", "--prompts", data, "--model", path, "--output", output, *sampling) == 0
        assert seen() == {best}
    if switch:
        output = tmp_path / "base.jsonl"
        again = ("--goal", "none", *sampling, *told)
        assert called("generate", "--prompts", data, "--model", model, "--output", output, *again) == 0
        assert seen() == {expected(None)}
    evaluated = ("evaluate", "--model", folder / "hf", "--source", data, "--parts", "[discrimination]")
    assert called(*evaluated, "--scale_points", 2, "--output", tmp_path / "evaluation") == 0
    assert seen() >= {best}
    predicted = ("--ckpt_path", checkpoint, "--model.generation.max_new_tokens", 2, "--data.predict.source", data)
    assert called("predict", *run, *predicted) == 0
    assert seen() == {best}

    assert called("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported") == 0
    for path in (folder / "hf", tmp_path / "exported"):
        own = AutoTokenizer.from_pretrained(path)
        chat = [{"role": "user", "content": "0: what?"}]
        assert own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == best
        plain = own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, goal=False)
        assert plain == expected(None)
