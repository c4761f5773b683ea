"""AlpacaEval 2 (Dubois et al. 2024, https://arxiv.org/abs/2404.04475)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.jsonl_ledger import write_json
from rap_lightning.onpolicy.suites.base import Suite, SuiteRun, read_questions, user

HUB = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
KEYS = ("OPENAI_API_KEY", "OPENAI_CLIENT_CONFIG_PATH")


class AlpacaEval(Suite):
    """AlpacaEval 2: writes ``model_outputs.json``, and has alpaca_eval judge it if possible.

    Args:
        questions: JSON with ``instruction`` (and ``dataset``); by default the 805 of the Hub.
        judge: auto runs alpaca_eval, which costs money, if it is installed and a key is set; never doesn't run it;
            always fails if it can't run.
        annotators: alpaca_eval's judge.
    """

    def __init__(
        self,
        questions: str | None = None,
        judge: Literal["auto", "never", "always"] = "auto",
        annotators: str = "weighted_alpaca_eval_gpt4_turbo",
    ) -> None:
        self.questions, self.judge, self.annotators = questions, judge, annotators

    def run(self, run: SuiteRun) -> int:
        """Answer, write, judge."""
        installed = importlib.util.find_spec("alpaca_eval") is not None
        key = any(os.environ.get(name) for name in KEYS)
        if self.judge == "always" and not (installed and key):
            raise ConfigError("--suite.judge always: pip install alpaca_eval, and set OPENAI_API_KEY.")
        questions = read_questions(self.questions, HUB, ("instruction",), run.limit)
        with run.generator() as generator:
            answers = run.answers(generator, [[user(one["instruction"])] for one in questions], "alpaca_eval")
        rows = [
            {
                "dataset": question.get("dataset", "alpaca_eval"), "instruction": question["instruction"],
                "output": answer, "generator": run.name, "datasplit": "eval",
            }
            for question, answer in zip(questions, answers, strict=True)
        ]  # fmt: skip
        output = run.output / "alpaca_eval" / run.name / "model_outputs.json"
        write_json(output, rows)
        print(f"wrote {output}")
        options = [
            "--model_outputs", str(output), "--annotators_config", self.annotators, "--output_path", str(output.parent)
        ]  # fmt: skip
        if self.judge == "never" or not (installed and key):
            missing = "no key is set" if installed else "alpaca_eval isn't installed"
            why = "as requested" if self.judge == "never" else missing
            print(f"not judged ({why}). To judge: alpaca_eval {' '.join(options)}")
            return 0
        print(f"judging: alpaca_eval {' '.join(options)}", flush=True)
        return subprocess.run([sys.executable, "-m", "alpaca_eval.main", *options]).returncode
