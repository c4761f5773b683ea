"""How rows of the data are read: as options say, and otherwise as the model's run read its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rap_lightning.onpolicy.evaluate.base_model_record import config_of_run, run_of, started_in
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import shown


@dataclass(frozen=True)
class Reading:
    """Options of :class:`~rap_lightning.preferences.rules.Rules` that say how rows are read.

    Args:
        format: of the rows.
        columns: new names for columns, {theirs: ours}.
        outside_scale: scores outside the goal's scale.
        bad_rows: rows that can't be used.
    """

    format: str = "auto"
    columns: dict[str, str] | None = None
    outside_scale: Literal["error", "drop", "clip"] = "error"
    bad_rows: Literal["drop", "error"] = "drop"


def reading_of(model: Model, given: dict[str, Any], template: GoalTemplate | None) -> tuple[Reading, str | None]:
    """How rows are read, and a line that says what of it is the run's.

    Args:
        model: RUN/hf or RUN/checkpoints/x.ckpt, whose config.yaml says how the run read its data; any other model says
            nothing.
        given: options that were given, by name; they win over the run's.
        template: of goals; the run's outside_scale is left alone where no reward can lie outside its scale.
    """
    run = run_of(model)
    found: dict[str, Any] = {}
    if run is not None:
        plain = asdict(Reading())
        section = config_of_run(run).get("data")
        section = section if isinstance(section, dict) else {}
        options = section.get("init_args") or section
        found = {
            field.name: value
            for field in fields(Reading)
            if field.name not in given and (value := options.get(field.name, plain[field.name])) != plain[field.name]
        }
    if template is None or template.scale.judge_range[0] == float("-inf"):
        found.pop("outside_scale", None)
    if not found:
        return Reading(**given), None
    listed = ", ".join(
        f"{name} {value if isinstance(value, str) else shown(value, 200)}" for name, value in found.items()
    )
    line = f"data are read as the run read its own ({run}/config.yaml): {listed}. An option given here wins."
    if "." in found.get("format", "") and run is not None and started_in(run).resolve() != Path.cwd():
        line += f" {found['format']} is looked for here; the run was started in {started_in(run)}."
    return Reading(**{**found, **given}), line
