"""A second evaluation in the same folder: parts measured before stay, if they were measured with the same settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.evaluate.evaluation_data import EvaluatedData, training_fingerprint
from rap_lightning.onpolicy.evaluate.evaluation_plan import FROM_LOGPS, FROM_SAMPLES, PARTS, EvaluationPlan, Part
from rap_lightning.onpolicy.jsonl_ledger import digest_of, plain_values
from rap_lightning.preferences.pairs import shown

ABOUT_SAMPLES = (
    "judge", "scale", "goals", "temperature", "top_p", "max_new_tokens", "guidance", "samples_per_prompt", "samples",
    "note", "trouble", "without_goal",
)  # fmt: skip
"""Keys of the document that describe samples, beside the parts."""
REUSABLE = {"split", "prompts", "data", "goals", "samples", "greedy"}
"""Settings that may change within a folder: finished samples and log-probabilities are used again."""
PARTS_OF_GROUP: dict[str, tuple[Part, ...]] = {
    "all": PARTS, "training": ("extrapolation",), "samples": FROM_SAMPLES, "log-probabilities": FROM_LOGPS
}  # fmt: skip
"""The parts that depend on a group of settings."""
Settings = dict[str, dict[str, Any]]
"""Settings by group; a group that isn't measured is absent."""


def settings_of(plan: EvaluationPlan, evaluated: EvaluatedData) -> Settings:
    """Return what the figures of this evaluation depend on, in plain values."""
    settings: Settings = {
        "all": {
            "model": plan.model.identity(),
            "goals read": None if plan.template is None else plan.template.record(),
            "split": evaluated.split,
            "prompts": len(evaluated.histories),
            "seed": plan.seed,
            "data": digest_of([[pair.id, pair.rewards, pair.attributes] for pair in evaluated.pairs]),
        },
        "training": {"training data": training_fingerprint(plan.sources)},
    }
    if plan.measures(FROM_SAMPLES):
        assert plan.judge is not None, "parts from samples have a judge"
        settings["samples"] = {
            "judge": [type(plan.judge).__name__, digest_of(plan.judge.settings())],
            "engine": [type(plan.engine).__name__, plan.engine.settings()],
            "goals": plan.goals,
            "sampling": asdict(plan.sampling),
            "samples": plan.samples,
            "greedy": plan.greedy,
            "max_prompt_length": plan.max_prompt_length,
        }
    if plan.measures(FROM_LOGPS):
        settings["log-probabilities"] = {"dtype": plan.dtype, "max_length": plan.max_length}
    plain: Settings = plain_values(settings)
    return plain


class PreviousEvaluation:
    """The parts of an evaluation.json (which may not exist) that the present evaluation doesn't measure."""

    def __init__(self, path: Path, parts: list[Part], settings: Settings) -> None:
        self.parts, self.settings = list(parts), settings
        self.document = _read(path)
        self.kept = [part for part in PARTS if part in self.document and part not in parts]
        runs = [{**r, "parts": [p for p in r["parts"] if p in self.kept]} for r in self.document.get("runs", [])]
        self.runs = [run for run in runs if run["parts"]]
        self._refuse_other_settings(path)
        if self.kept:
            print(f"kept from before: {', '.join(self.kept)}", flush=True)

    def merged_into(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document of this evaluation with the kept parts, and the keys that describe them."""
        old, kept = self.document, set(self.kept)
        merged = document | {part: old[part] for part in self.kept}
        if kept & set(FROM_SAMPLES):
            if not set(self.parts) & set(FROM_SAMPLES):
                merged |= {key: old[key] for key in ABOUT_SAMPLES if key in old}
            elif "without_goal" in old:
                apart = {part: figures for part, figures in old["without_goal"].items() if part in kept}
                merged["without_goal"] = apart | document.get("without_goal", {})
        if kept & set(FROM_LOGPS) and "encoding" in old:
            merged.setdefault("encoding", old["encoding"])
        if "unlearning" in kept:
            merged["base"] = old["base"]
        reasons = old.get("left_out", {}) | document["left_out"]
        merged["left_out"] = {part: why for part, why in reasons.items() if part not in merged}
        own = {
            "parts": self.parts, "seconds": document["seconds"], "package": __version__, "settings": self.settings
        }  # fmt: skip
        merged["runs"] = [*self.runs, own]
        return merged

    def _refuse_other_settings(self, path: Path) -> None:
        recorded = {part for run in self.runs for part in run["parts"]}
        changed = [] if recorded >= set(self.kept) else ["the file does not say how they were measured"]
        names = set[str]()
        for run in self.runs:
            for group, now in self.settings.items():
                before = run["settings"].get(group, now)
                if not set(run["parts"]) & set(PARTS_OF_GROUP[group]):
                    continue  # nothing that depends on this group is kept of that run
                for name in {**before, **now}:
                    if before.get(name) != now.get(name):
                        names.add(name)
                        there, here = shown(before.get(name), 100), shown(now.get(name), 100)
                        changed.append(f"{name}: {there} there, {here} now")
        if changed:
            every = ",".join(part for part in PARTS if part in {*self.kept, *self.parts})
            again = f" Or measure all of it in this way: --parts '[{every}]'" if names <= REUSABLE else ""
            raise ConfigError(
                f"{path} holds {', '.join(self.kept)} of another evaluation, and one file never mixes two: "
                f"{'; '.join(dict.fromkeys(changed))}. Name another --output, or remove {path.parent}.{again}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Remove it, or name another --output.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not an evaluation. Remove it, or name another --output.")
    return found
