"""MT-Bench (Zheng et al. 2023, https://arxiv.org/abs/2306.05685)."""

from __future__ import annotations

import time
from typing import Any

from rap_lightning.onpolicy.jsonl_ledger import digest_of, write_lines
from rap_lightning.onpolicy.response_generator import ResponseGenerator
from rap_lightning.onpolicy.suites.base import Suite, SuiteRun, read_questions, user
from rap_lightning.preferences.pairs import Message

HUB = ("lmsys/mt-bench", "data/mt_bench/question.jsonl", "space")
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""FastChat's, by category; 0.7 for others."""


class MTBench(Suite):
    """MT-Bench: writes FastChat's answer file, two turns each; the second follows the model's own first answer.

    Temperatures are FastChat's, by category; --temperature has no effect.

    Args:
        questions: FastChat's question.jsonl; by default from the Hub.
    """

    def __init__(self, questions: str | None = None) -> None:
        self.questions = questions

    def run(self, run: SuiteRun) -> int:
        """Answer both turns, write."""
        questions = read_questions(self.questions, HUB, ("question_id", "category", "turns"), run.limit)
        histories: list[list[Message]] = [[] for _ in questions]
        with run.generator() as generator:
            for turn in range(max(len(question["turns"]) for question in questions)):
                self._answer_turn(run, generator, questions, histories, turn)
        rows = []
        for question, history in zip(questions, histories, strict=True):
            turns = [message["content"] for message in history if message["role"] == "assistant"]
            rows.append({
                "question_id": question["question_id"], "answer_id": digest_of(question["question_id"], turns)[:22],
                "model_id": run.name, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(),
            })  # fmt: skip
        rows.sort(key=lambda row: row["question_id"])
        output = run.output / "mt_bench" / "model_answer" / f"{run.name}.jsonl"
        write_lines(output, rows)
        print(f"wrote {output}")
        print("To judge, copy it to FastChat's fastchat/llm_judge/data/mt_bench/model_answer, and there:")
        print(f"  python gen_judgment.py --model-list {run.name}")
        return 0

    def _answer_turn(
        self, run: SuiteRun, generator: ResponseGenerator, questions: list[dict[str, Any]],
        histories: list[list[Message]], turn: int,
    ) -> None:  # fmt: skip
        """Append a turn and its answer to the histories of all questions that have it."""
        by_temperature: dict[float, list[list[Message]]] = {}
        for question, history in zip(questions, histories, strict=True):
            if turn < len(question["turns"]):
                history.append(user(question["turns"][turn]))
                by_temperature.setdefault(TEMPERATURES.get(question["category"], 0.7), []).append(history)
        for temperature, group in sorted(by_temperature.items()):
            name = f"mt_bench-turn-{turn + 1}-temperature-{temperature:g}"
            answers = run.answers(generator, [list(history) for history in group], name, temperature)
            for history, answer in zip(group, answers, strict=True):
                history.append({"role": "assistant", "content": answer})
