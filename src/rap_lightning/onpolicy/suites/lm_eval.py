"""lm-evaluation-harness (Gao et al., https://doi.org/10.5281/zenodo.12608602) with the goal in the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.jsonl_ledger import write_atomically, write_json
from rap_lightning.onpolicy.model_source import default_device, weights_dtype
from rap_lightning.onpolicy.suites.base import Suite, SuiteRun
from rap_lightning.preferences.rendering import resolve_placement, shows_system, with_goal

PAPER = ["gsm8k", "leaderboard_gpqa", "leaderboard_musr", "truthfulqa_mc2", "leaderboard_bbh", "arc_challenge"]


class LMEval(Suite):
    """Academic benchmarks through lm-evaluation-harness: GSM8K, GPQA, MuSR, TruthfulQA, BBH and ARC by default.

    The goal is the system instruction, or precedes the first user turn if the chat template has no system role, as in
    training. The first rendered prompt of each task is written to a file, and checked for the goal.

    Args:
        tasks: names of lm-evaluation-harness, or of YAML files in ``include``.
        include: folder of further tasks.
        num_fewshot: examples before each question; by default the task's own.
        batch_size: sequences in a batch.
        dtype: dtype of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
    """

    samples = False

    def __init__(
        self,
        tasks: list[str] | None = None,
        include: str | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        dtype: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"--suite.batch_size must be at least 1, found {batch_size}")
        self.tasks = tasks if tasks is not None else PAPER
        self.include, self.num_fewshot, self.batch_size, self.dtype = include, num_fewshot, batch_size, dtype

    def run(self, run: SuiteRun) -> int:
        """Evaluate, and write results, samples and prompts."""
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(f"--suite LMEval: lm_eval can't be imported ({error}). pip install lm_eval") from error
        if self.include is not None and not Path(self.include).is_dir():
            raise ConfigError(f"--suite.include {self.include}: no such folder")
        manager = TaskManager(include_path=self.include)
        known = {*manager.all_tasks}
        if unknown := [name for name in self.tasks if name not in known]:
            raise ConfigError(f"--suite.tasks: lm-evaluation-harness knows no task {unknown[0]!r}.")
        if run.goal.stated.strength not in (None, 1.0):
            raise ConfigError(
                "lm-evaluation-harness runs an adapter at the strength of its weights, and the goal has another. Write "
                "an adapter for it: rap-lightning export --goals"
            )
        tokenizer = run.model.tokenizer()
        placement = resolve_placement(tokenizer, run.goal.placement)
        as_system = placement == "system" and shows_system(tokenizer)
        language_model = self._language_model(run, tokenizer, None if as_system else run.goal.text)
        found = lm_eval.simple_evaluate(
            model=language_model, tasks=list(self.tasks), num_fewshot=self.num_fewshot, limit=run.limit,
            log_samples=True, system_instruction=run.goal.text if as_system else None, apply_chat_template=True,
            task_manager=manager, random_seed=run.seed, numpy_random_seed=run.seed, torch_random_seed=run.seed,
            fewshot_random_seed=run.seed,
        )  # fmt: skip
        if found is None:  # on ranks above the first
            return 0
        samples = found.pop("samples")
        prompts = {task: _first_prompt(rows) for task, rows in samples.items()}
        self._check(prompts, run.goal.text)
        folder = run.output / "lm_eval" / run.name
        shown = [f"== {task}\n{prompt}\n" for task, prompt in prompts.items()]
        write_atomically(folder / "prompts.txt", "\n".join(shown))
        write_json(folder / "samples.json", _plain(samples))
        kept = {key: found[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in found}
        write_json(folder / "results.json", _plain({"model": run.name, "goal": run.goal.stated.key, **kept}))
        for task, numbers in found["results"].items():
            values = {name: v for name, v in numbers.items() if isinstance(v, float) and "stderr" not in name}
            print(
                f"{task}: " + ", ".join(f"{name.removesuffix(',none')} {value:.4f}" for name, value in values.items())
            )
        print(f"wrote {folder} (results, samples, and the first prompt of each task)")
        return 0

    def _language_model(self, run: SuiteRun, tokenizer: Any, goal: str | None) -> Any:
        from lm_eval.models.huggingface import HFLM

        class BeforeUser(HFLM):
            """Writes the goal before the first user turn, for templates without a system role."""

            def apply_chat_template(
                self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
            ) -> str:
                turns = with_goal(chat_history, goal, "user", system_shown=shows_system(tokenizer))
                return str(super().apply_chat_template(turns, add_generation_prompt))

        device = default_device()
        model = run.model.load(weights_dtype(self.dtype, device), device)
        kind = HFLM if goal is None else BeforeUser
        return kind(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size, backend="causal")

    def _check(self, prompts: dict[str, str], goal: str | None) -> None:
        for task, prompt in prompts.items():
            if goal is not None and prompt.count(goal.strip()) != 1:
                raise ConfigError(
                    f"task {task}: the rendered prompt holds the goal {prompt.count(goal.strip())} times instead of "
                    f"once, so its results are not those of the goal. The prompt: {prompt[:300]!r}"
                )


def _first_prompt(rows: Sequence[dict[str, Any]]) -> str:
    """Return the model's input for the first sample."""
    arguments = rows[0]["arguments"]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
        first = arguments[0]
        return str(first["arg_0"] if isinstance(first, dict) else first)
    return str(arguments[0][0])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))
