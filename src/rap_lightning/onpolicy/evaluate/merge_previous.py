"""What an earlier evaluation in the same folder measured, and stands: a second one with other parts adds to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.evaluate.evaluation_data import Evaluated, training_print
from rap_lightning.onpolicy.evaluate.evaluation_plan import OF_LIKELIHOODS, OF_SAMPLES, PARTS, Part, Plan
from rap_lightning.onpolicy.jsonl_ledger import digest_of
from rap_lightning.preferences.pairs import shown

ABOUT_SAMPLES = (
    "judge", "scale", "goals", "temperature", "top_p", "max_new_tokens", "guidance", "samples_per_prompt", "samples",
    "note", "trouble", "without_goal",
)  # fmt: skip
"""Keys of the document that tell of samples, beside the parts."""
GOES_ON = {"split", "prompts", "data", "goals", "samples", "greedy"}
"""Settings that may change within a folder: what is done already is of use all the same."""
OF_GROUP: dict[str, tuple[Part, ...]] = {
    "training": ("extrapolation",), "samples": OF_SAMPLES, "log-probabilities": OF_LIKELIHOODS
}  # fmt: skip
"""The parts that depend on a group of settings; the group ``all`` is of every part."""
Settings = dict[str, dict[str, Any]]
"""What figures depend on: of all parts, of what is compared with training, and of those of samples and of
log-probabilities where they are measured."""


def settings_of(plan: Plan, evaluated: Evaluated) -> Settings:
    """What the figures of this evaluation depend on, in plain values."""
    settings: Settings = {
        "all": {
            "model": plan.model.identity(),
            "goals read": None if plan.template is None else plan.template.record(),
            "split": evaluated.split,
            "prompts": len(evaluated.prompt_ids),
            "seed": plan.seed,
            "data": digest_of([[pair.id, pair.rewards, pair.attributes] for pair in evaluated.pairs]),
        },
        "training": {"training data": training_print(plan.sources)},
    }
    if set(plan.parts) & set(OF_SAMPLES):
        assert plan.judge is not None, "parts of samples have a judge"
        settings["samples"] = {
            "judge": [type(plan.judge).__name__, digest_of(plan.judge.settings())],
            "engine": [type(plan.engine).__name__, plan.engine.settings()],
            "goals": plan.goals,
            "sampling": asdict(plan.sampling),
            "samples": plan.samples,
            "greedy": plan.greedy,
            "max_prompt_length": plan.max_prompt_length,
        }
    if set(plan.parts) & set(OF_LIKELIHOODS):
        settings["log-probabilities"] = {"dtype": plan.dtype, "max_length": plan.max_length}
    plain: Settings = json.loads(json.dumps(settings))
    return plain


class Earlier:
    """The parts of a file that this evaluation does not measure.

    Args:
        path: evaluation.json, there or not.
        parts: measured now.
        settings: of this evaluation.

    Raises:
        ConfigError: parts that would stand are of other settings, or nothing says of which.
    """

    def __init__(self, path: Path, parts: list[Part], settings: Settings) -> None:
        self.parts, self.settings = list(parts), settings
        self.document = _read(path)
        self.stands = [part for part in PARTS if part in self.document and part not in parts]
        self.runs = []
        for run in self.document.get("runs", []):
            if left := [part for part in run["parts"] if part in self.stands]:
                self.runs.append({**run, "parts": left})
        self._refuse_others(path)
        if self.stands:
            print(f"kept from before: {', '.join(self.stands)}", flush=True)

    def with_what_stands(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document of this evaluation with the parts that stand, and what tells of them."""
        old, whole = self.document, dict(document)
        whole |= {part: old[part] for part in self.stands}
        if set(self.stands) & set(OF_SAMPLES):
            if not set(self.parts) & set(OF_SAMPLES):
                whole |= {key: old[key] for key in ABOUT_SAMPLES if key in old}
            elif "without_goal" in old:
                apart = {part: old["without_goal"][part] for part in self.stands if part in old["without_goal"]}
                whole["without_goal"] = apart | document.get("without_goal", {})
        if set(self.stands) & set(OF_LIKELIHOODS) and "encoding" in old:
            whole.setdefault("encoding", old["encoding"])
        if "unlearning" in self.stands:
            whole["base"] = old["base"]
        reasons = old.get("left_out", {}) | document["left_out"]
        whole["left_out"] = {part: why for part, why in reasons.items() if part not in whole}
        own = {
            "parts": self.parts, "seconds": document["seconds"], "package": __version__, "settings": self.settings
        }  # fmt: skip
        whole["runs"] = [*self.runs, own]
        return whole

    def _refuse_others(self, path: Path) -> None:
        known = {part for run in self.runs for part in run["parts"]}
        changed = [] if known >= set(self.stands) else ["the file does not say how they were measured"]
        names = set[str]()
        for run in self.runs:
            for group, now in self.settings.items():
                if group in OF_GROUP and not set(run["parts"]) & set(OF_GROUP[group]):
                    continue  # of what that run measured in this way nothing stands
                there = run["settings"].get(group, now)
                differ = [name for name in {**there, **now} if there.get(name) != now.get(name)]
                names |= set(differ)
                changed += [
                    f"{name}: {shown(there.get(name), 100)} there, {shown(now.get(name), 100)} now" for name in differ
                ]
        if changed:
            every = ",".join(part for part in PARTS if part in {*self.stands, *self.parts})
            whole = f" Or measure all of it in this way: --parts '[{every}]'" if names <= GOES_ON else ""
            raise ConfigError(
                f"{path} holds {', '.join(self.stands)} of another evaluation, and one file never mixes two: "
                f"{'; '.join(dict.fromkeys(changed))}. Name another --output, or remove {path.parent}.{whole}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Remove it, or name another --output.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no evaluation. Remove it, or name another --output.")
    return found
