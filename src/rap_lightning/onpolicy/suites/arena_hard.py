"""Arena-Hard-Auto (Li et al. 2024, https://arxiv.org/abs/2406.11939), both of its question files' layouts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rap_lightning.errors import DataError
from rap_lightning.onpolicy.jsonl_ledger import digest_of, write_lines
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.onpolicy.suites.base import Suite, Work, from_hub, read_questions, user

REPO = "lmarena-ai/arena-hard-auto"


class ArenaHard(Suite):
    """Arena-Hard-Auto: writes its answer file, with the lengths and markdown counts that style control reads.

    Args:
        version: of the questions, from the Hub: v0.1 (the paper's) or v2.0.
        questions: a question.jsonl of either version instead.
    """

    def __init__(self, version: Literal["v0.1", "v2.0"] = "v0.1", questions: str | None = None) -> None:
        self.version, self.questions = version, questions

    def run(self, work: Work) -> int:
        """Answer, write."""
        path = (
            Path(self.questions) if self.questions else from_hub(REPO, f"data/arena-hard-{self.version}/question.jsonl")
        )
        questions = read_questions(path, (), work.limit)
        texts = [_text(question, number, path) for number, question in enumerate(questions, 1)]
        with work.generator() as generator:
            answers = work.answers(generator, [[user(text)] for text in texts], "arena_hard")
        count = _counter("gpt-4o" if "uid" in questions[0] else "gpt-3.5-turbo", work)
        rows = []
        for question, text in zip(questions, texts, strict=True):
            answer = answers[prompt_id_of([user(text)])]["response"].strip()
            facts = {"token_len": count(answer), **markdown_counts(answer)}
            rows.append(
                _row_v2(question, text, answer, facts, work)
                if "uid" in question
                else _row_v01(question, answer, facts, work)
            )
        version = "v2.0" if "uid" in questions[0] else "v0.1"
        output = work.output / f"arena-hard-{version}" / "model_answer" / f"{work.name}.jsonl"
        write_lines(output, rows)
        print(f"wrote {output}")
        print(f"To judge, copy it to arena-hard-auto's data/arena-hard-{version}/model_answer, name the model in the")
        print("judge's config there, and: python gen_judgment.py")
        return 0


def _text(question: dict[str, Any], number: int, path: Path) -> str:
    """The one user turn, in either layout: ``prompt``, or ``turns`` of texts or of objects with ``content``."""
    if isinstance(question.get("prompt"), str) and "uid" in question:
        return str(question["prompt"])
    turns = question.get("turns")
    if "question_id" in question and isinstance(turns, list) and len(turns) == 1:
        turn = turns[0]
        text = turn.get("content") if isinstance(turn, dict) else turn
        if isinstance(text, str):
            return text
    raise DataError(f"{path}, question {number}: expected uid and prompt (v2.0), or question_id and one turn (v0.1).")


def _row_v2(question: dict[str, Any], text: str, answer: str, facts: dict[str, Any], work: Work) -> dict[str, Any]:
    messages = [user(text), {"role": "assistant", "content": {"answer": answer}}]
    return {
        "uid": question["uid"], "ans_id": digest_of(question["uid"], answer)[:22], "model": work.name,
        "messages": messages, "tstamp": time.time(), "metadata": facts,
    }  # fmt: skip


def _row_v01(question: dict[str, Any], answer: str, facts: dict[str, Any], work: Work) -> dict[str, Any]:
    turn = {"content": answer, "token_len": facts["token_len"]}
    return {
        "question_id": question["question_id"], "answer_id": digest_of(question["question_id"], answer)[:22],
        "model_id": work.name, "choices": [{"index": 0, "turns": [turn]}], "tstamp": time.time(),
        "conv_metadata": facts,
    }  # fmt: skip


def markdown_counts(answer: str) -> dict[str, Any]:
    """Headers, list entries and bold passages outside code blocks, under the names that style control reads."""
    text = re.sub(r"```([^`]*)```", "", answer)
    headers = {f"h{level}": len(re.findall(rf"^#{{{level}}}\s", text, re.MULTILINE)) for level in range(1, 7)}
    lists = {
        "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
        "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
    }
    bold = {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)), "__": len(re.findall(r"__[^_\n]+__", text))}
    return {"header_count": headers, "list_count": lists, "bold_count": bold}


def _counter(model: str, work: Work) -> Callable[[str], int]:
    """Counts tokens as Arena-Hard does, with tiktoken; with the policy's own tokenizer where that can't be had."""
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model(model)
        return lambda text: len(encoding.encode(text, disallowed_special=()))
    except Exception as error:  # not installed, or its tables can't be downloaded
        name = type(error).__name__
    if work.model.place.exists():
        print(
            f"token_len is counted by the model's own tokenizer, not tiktoken's for {model} ({name}): style "
            "control compares it"
        )
        tokenizer = work.model.tokenizer()
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    print(f"token_len is counted in words, for want of tiktoken ({name}): style control compares it")
    return lambda text: len(text.split())
