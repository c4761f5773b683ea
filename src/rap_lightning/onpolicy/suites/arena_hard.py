"""Arena-Hard-Auto (Li et al. 2024, https://arxiv.org/abs/2406.11939), both formats of its question files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Literal

from rap_lightning.errors import DataError
from rap_lightning.onpolicy.jsonl_ledger import Row, digest_of, write_lines
from rap_lightning.onpolicy.suites.base import Suite, SuiteRun, read_questions, user

REPO = "lmarena-ai/arena-hard-auto"


class ArenaHard(Suite):
    """Arena-Hard-Auto: writes its answer file, with the lengths and markdown counts that style control reads.

    Args:
        version: version of the questions on the Hub: v0.1 (the paper's) or v2.0.
        questions: a question.jsonl of either version instead.
    """

    def __init__(self, version: Literal["v0.1", "v2.0"] = "v0.1", questions: str | None = None) -> None:
        self.version, self.questions = version, questions

    def run(self, run: SuiteRun) -> int:
        """Answer, write."""
        hub = (REPO, f"data/arena-hard-{self.version}/question.jsonl")
        questions = read_questions(self.questions, hub, (), run.limit)
        texts = [_text(question, number) for number, question in enumerate(questions, 1)]
        with run.generator() as generator:
            answers = run.answers(generator, [[user(text)] for text in texts], "arena_hard")
        version = "v2.0" if "uid" in questions[0] else "v0.1"
        count = _token_counter("gpt-4o" if version == "v2.0" else "gpt-3.5-turbo", run)
        rows = []
        for question, text, answer in zip(questions, texts, answers, strict=True):
            make = _row_v2 if "uid" in question else _row_v01
            rows.append(make(question, text, answer, {"token_len": count(answer), **markdown_counts(answer)}, run.name))
        output = run.output / f"arena-hard-{version}" / "model_answer" / f"{run.name}.jsonl"
        write_lines(output, rows)
        print(f"wrote {output}")
        print(f"To judge, copy it to arena-hard-auto's data/arena-hard-{version}/model_answer, name the model in the")
        print("judge's config there, and: python gen_judgment.py")
        return 0


def _text(question: Row, number: int) -> str:
    """Return the only user turn, in either format: ``prompt``, or ``turns`` of texts or of objects with ``content``."""
    if isinstance(question.get("prompt"), str) and "uid" in question:
        return str(question["prompt"])
    turns = question.get("turns")
    if "question_id" in question and isinstance(turns, list) and len(turns) == 1:
        text = turns[0].get("content") if isinstance(turns[0], dict) else turns[0]
        if isinstance(text, str):
            return text
    raise DataError(f"question {number}: expected uid and prompt (v2.0), or question_id and one turn (v0.1).")


def _row_v2(question: Row, text: str, answer: str, facts: Row, model: str) -> Row:
    messages = [user(text), {"role": "assistant", "content": {"answer": answer}}]
    return {
        "uid": question["uid"], "ans_id": digest_of(question["uid"], answer)[:22], "model": model,
        "messages": messages, "tstamp": time.time(), "metadata": facts,
    }  # fmt: skip


def _row_v01(question: Row, text: str, answer: str, facts: Row, model: str) -> Row:
    turn = {"content": answer, "token_len": facts["token_len"]}
    return {
        "question_id": question["question_id"], "answer_id": digest_of(question["question_id"], answer)[:22],
        "model_id": model, "choices": [{"index": 0, "turns": [turn]}], "tstamp": time.time(), "conv_metadata": facts,
    }  # fmt: skip


def markdown_counts(answer: str) -> dict[str, Any]:
    """Count headers, list entries and bold passages outside code blocks, under the names that style control reads."""
    text = re.sub(r"```([^`]*)```", "", answer)
    headers = {f"h{level}": len(re.findall(rf"^#{{{level}}}\s", text, re.MULTILINE)) for level in range(1, 7)}
    lists = {
        "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
        "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
    }
    bold = {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}
    return {"header_count": headers, "list_count": lists, "bold_count": bold}


def _token_counter(model: str, run: SuiteRun) -> Callable[[str], int]:
    """Return a counter of tokens: tiktoken's as in Arena-Hard, otherwise the model's own tokenizer, otherwise words."""
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model(model)
        return lambda text: len(encoding.encode(text, disallowed_special=()))
    except Exception as error:  # not installed, or its tables can't be downloaded
        missing = f"tiktoken for {model} is missing ({type(error).__name__})"
    if run.model.place.exists():
        print(f"{missing}: the model's own tokenizer counts token_len, which style control compares")
        tokenizer = run.model.tokenizer()
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    print(f"{missing}: token_len counts words; style control compares it")
    return lambda text: len(text.split())
