"""AlpacaEval 2 (Dubois et al. 2024, https://arxiv.org/abs/2404.04475)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.jsonl_ledger import write_json
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.onpolicy.suites.base import Suite, Work, from_hub, read_questions, user

HUB = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
KEYS = ("OPENAI_API_KEY", "OPENAI_CLIENT_CONFIG_PATH")


class AlpacaEval(Suite):
    """AlpacaEval 2: writes ``model_outputs.json``, and has alpaca_eval judge it where that is possible.

    Args:
        questions: JSON with ``instruction`` (and ``dataset``); by default the 805 of the Hub.
        judge: auto runs alpaca_eval, if it is installed and a key is set, which costs money; never doesn't; always
            stops where it can't.
        annotators: alpaca_eval's judge.
    """

    def __init__(
        self,
        questions: str | None = None,
        judge: Literal["auto", "never", "always"] = "auto",
        annotators: str = "weighted_alpaca_eval_gpt4_turbo",
    ) -> None:
        self.questions, self.judge, self.annotators = questions, judge, annotators

    def run(self, work: Work) -> int:
        """Answer, write, judge."""
        installed = importlib.util.find_spec("alpaca_eval") is not None
        key = any(os.environ.get(name) for name in KEYS)
        if self.judge == "always" and not (installed and key):
            raise ConfigError("--suite.judge always: pip install alpaca_eval, and set OPENAI_API_KEY.")
        path = Path(self.questions) if self.questions else from_hub(*HUB)
        questions = read_questions(path, ("instruction",), work.limit)
        histories = [[user(question["instruction"])] for question in questions]
        with work.generator() as generator:
            answers = work.answers(generator, histories, "alpaca_eval")
        rows = [
            {
                "dataset": question.get("dataset", "alpaca_eval"), "instruction": question["instruction"],
                "output": answers[prompt_id_of(history)]["response"].strip(), "generator": work.name,
                "datasplit": "eval",
            }
            for question, history in zip(questions, histories, strict=True)
        ]  # fmt: skip
        output = work.output / "alpaca_eval" / work.name / "model_outputs.json"
        write_json(output, rows)
        print(f"wrote {output}")
        command = [
            sys.executable, "-m", "alpaca_eval.main", "--model_outputs", str(output), "--annotators_config",
            self.annotators, "--output_path", str(output.parent),
        ]  # fmt: skip
        if self.judge == "never" or not (installed and key):
            why = (
                "as asked" if self.judge == "never" else "no key is set" if installed else "alpaca_eval isn't installed"
            )
            print(f"not judged ({why}). To judge: alpaca_eval {' '.join(command[3:])}")
            return 0
        print(f"judging: alpaca_eval {' '.join(command[3:])}", flush=True)
        return subprocess.run(command).returncode
