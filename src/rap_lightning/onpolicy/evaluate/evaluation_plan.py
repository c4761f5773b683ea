"""What an evaluation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.asked_goals import Asked, guided
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.evaluate import evaluation_data as data
from rap_lightning.onpolicy.evaluate.reading import Reading
from rap_lightning.onpolicy.evaluate.sampled import Goal
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.sources import Source

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation

Part = Literal["controllability", "unlearning", "extrapolation", "discrimination", "length"]
PARTS: tuple[Part, ...] = ("controllability", "unlearning", "extrapolation", "discrimination", "length")
OF_SAMPLES: tuple[Part, ...] = ("controllability", "extrapolation", "length")
OF_LIKELIHOODS: tuple[Part, ...] = ("unlearning", "discrimination")


@dataclass
class Plan:
    """Everything that an evaluation is made of; the options of the command, which says what each means."""

    model: Model
    base: Model | None
    template: GoalTemplate | None
    sources: list[Source]
    output: Path
    parts: list[Part]
    explicit: bool
    left_out: dict[str, str]
    judge: Judge | None
    engine: Engine
    goals: list[Goal]
    sampling: Generation
    samples: int
    greedy: bool
    bins: int
    scale_points: int
    max_length: int | None
    max_prompt_length: int | None
    dtype: str
    token_budget: int
    split: str | None
    limit: int
    reading: Reading
    num_proc: int | None
    seed: int
    rules: Any = field(init=False)

    def __post_init__(self) -> None:
        self.rules = data.make_rules(self.template, self.reading, self.sources)

    def asked(self) -> list[Asked]:
        """How each of the goals is asked for."""
        found = []
        for goal in self.goals:
            if goal is None or self.template is None:
                found.append(Asked(None, None))
            else:
                text, printed = self.template.text_at(goal), self.template.scale.printed(goal)
                found.append(Asked(text, printed, self.template.placement))
        if len({one.text for one in found}) < len(found):
            raise ConfigError(f"--goals {self.goals}: two of them read the same in the prompt.")
        return guided(found, self.sampling, None, self.template)

    def range(self, evaluated: data.Evaluated) -> tuple[float, float]:
        """The judge's scale where one is known, else that of the data."""
        scale = self.judge.scale if self.judge is not None else None
        return data.plain_scale(self.rules, evaluated, scale)
