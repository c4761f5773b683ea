"""MT-Bench (Zheng et al. 2023, https://arxiv.org/abs/2306.05685)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rap_lightning.errors import DataError
from rap_lightning.onpolicy.jsonl_ledger import digest_of, write_lines
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.onpolicy.suites.base import Suite, Work, from_hub, read_questions, user
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

    def run(self, work: Work) -> int:
        """Answer both turns, write."""
        path = Path(self.questions) if self.questions else from_hub(*HUB)
        questions = read_questions(path, ("question_id", "category", "turns"), work.limit)
        histories: list[list[Message]] = [[] for _ in questions]
        given: list[list[str]] = [[] for _ in questions]
        deepest = max(len(question["turns"]) for question in questions)
        with work.generator() as generator:
            for turn in range(deepest):
                self._turn(work, generator, questions, histories, given, turn)
        rows = []
        for question, turns in zip(questions, given, strict=True):
            choice = {"index": 0, "turns": turns}
            rows.append(
                {
                    "question_id": question["question_id"], "answer_id": digest_of(question["question_id"], turns)[:22],
                    "model_id": work.name, "choices": [choice], "tstamp": time.time(),
                }
            )  # fmt: skip
        rows.sort(key=lambda row: row["question_id"])
        output = work.output / "mt_bench" / "model_answer" / f"{work.name}.jsonl"
        write_lines(output, rows)
        print(f"wrote {output}")
        print("To judge, copy it to FastChat's fastchat/llm_judge/data/mt_bench/model_answer, and there:")
        print(f"  python gen_judgment.py --model-list {work.name}")
        return 0

    def _turn(
        self, work: Work, generator: Any, questions: list[dict[str, Any]], histories: list[list[Message]],
        given: list[list[str]], turn: int,
    ) -> None:  # fmt: skip
        by_temperature: dict[float, list[int]] = {}
        for place, question in enumerate(questions):
            if turn < len(question["turns"]):
                histories[place].append(user(question["turns"][turn]))
                by_temperature.setdefault(TEMPERATURES.get(question["category"], 0.7), []).append(place)
        for temperature, places in sorted(by_temperature.items()):
            asked = [histories[place] for place in places]
            name = f"mt_bench-turn-{turn + 1}-temperature-{temperature:g}"
            answers = work.answers(generator, [list(history) for history in asked], name, temperature)
            for place in places:
                found = answers.get(prompt_id_of(histories[place]))
                if found is None:
                    raise DataError(f"question {questions[place]['question_id']}: no answer to turn {turn + 1}")
                text = found["response"].strip()
                given[place].append(text)
                histories[place].append({"role": "assistant", "content": text})
