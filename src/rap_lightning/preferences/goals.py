"""Goal templates: how the reward that is asked for is written into the prompt.

:class:`GoalTemplate` is the base class, :class:`OverallGoal` the paper's text, and :class:`AttributeGoal` states
several scores. The scale of a template (:mod:`rap_lightning.preferences.scales`) maps rewards to the numbers that goals
state.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeGuard

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goal_spec import Number, Wording
from rap_lightning.preferences.hashing import describe_object, hash_code
from rap_lightning.preferences.scales import RewardScale

Placement = Literal["auto", "system", "user"]


@dataclass(frozen=True)
class StatedGoal:
    """How a policy is asked for a goal: by text in the prompt, by the strength of its adapter, or by both.

    Attributes:
        text: written into the prompt; None writes nothing.
        strength: factor on the policy's LoRA adapter; None leaves the adapter as it is.
    """

    text: str | None = None
    strength: float | None = None

    @property
    def key(self) -> str | None:
        """A text that differs from that of every other goal; None for the plain prompt and the adapter as it is."""
        if self.strength is None:
            return self.text
        lines = [] if self.text is None else [self.text]
        return "\n".join([*lines, f"adapter strength {self.strength:.17g}"])


class GoalTemplate(ABC):
    """How a goal is written. Subclass it and pass the class by import path: ``--data.goal my_pkg.MyGoal``.

    Args:
        scale: the judge's scale, and the numbers that goals state.
        placement: ``system`` writes the goal as the system message, ``user`` before the first user turn, and ``auto``
            uses ``system`` if the chat template renders a system message.

    >>> class Stars(GoalTemplate):
    ...     def text(self, goal):
    ...         return f"Write an answer that readers rate {self.scale.printed(goal)} of 5 stars."
    >>> template = Stars(RewardScale(1, 5))
    >>> template.text(template.best)
    'Write an answer that readers rate 5 of 5 stars.'
    """

    attributes: tuple[str, ...] = ()
    """Names of further rewards that each response must have, in the order in which :meth:`text` receives them."""

    def __init__(self, scale: RewardScale = RewardScale(), placement: Placement = "auto") -> None:  # noqa: B008
        self.scale, self.placement = scale, placement

    @abstractmethod
    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        """Return the text that asks for ``goal``, a number on the scale that goals state.

        ``attributes`` are passed if the class names some; other classes define ``text(self, goal)``.
        """

    def write(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return self.text(goal, attributes) if self.attributes else self.text(goal)

    def state(self, goal: float, attributes: Sequence[float] = ()) -> StatedGoal:
        """Return how a policy is asked for a goal.

        Raises:
            ConfigError: the template writes nothing.
        """
        text = self.write(goal, attributes)
        if not isinstance(text, str):
            raise ConfigError(
                f"{type(self).__name__}.text must return a string, and returned {text!r} for the goal "
                f"{self.printed(goal, attributes)}."
            )
        if not text.strip():
            raise ConfigError(
                f"{type(self).__name__} writes nothing for the goal {self.printed(goal, attributes)}, so the policy "
                "can't know what it is asked for. Return a text; a goal without one is AdapterStrength."
            )
        return StatedGoal(text)

    def check_differ(self) -> None:
        """Raise ConfigError where goals from the lowest to the highest of the scale are all stated alike."""
        stated = {self.state_at(goal) for goal in self.scale.grid(7)}
        if len(stated) == 1:
            raise ConfigError(
                f"{type(self).__name__} states every goal alike, {stated.pop().key!r}, so the policy can't know which "
                "one it is asked for. Print the number in its text, with enough decimals (scale.decimals)."
            )

    @property
    def unstated(self) -> StatedGoal:
        """How a policy is asked for a response without a goal."""
        return StatedGoal()

    def refuse_outside(self, goal: float, option: str, instead: str = ",") -> str | None:
        """Return a note for a goal outside the scale that can be asked for, and None for one on the scale.

        Raises:
            ConfigError: it can't be asked for.
        """
        low, high = self.scale.low, self.scale.high
        if not low <= goal <= high:
            raise ConfigError(f"{option} must be on the scale from {low:g} to {high:g}{instead} found {goal:g}")
        return None

    def goal_of(self, reward: float, attributes: Sequence[float] = ()) -> tuple[float, tuple[float, ...]]:
        """Return the goal, with its attributes, under which a response with these rewards is the right answer."""
        return self.scale.goal(reward), tuple(attributes)

    def own_goals(self, rewards: Sequence[float], attributes: Sequence[Sequence[float]]) -> list[StatedGoal]:
        return [self.state(*self.goal_of(r, a)) for r, a in zip(rewards, attributes, strict=True)]

    def state_at(self, goal: float) -> StatedGoal:
        """Return the goal with attributes as high on their own scale as ``goal`` is on the overall one."""
        return self.state(*self.with_attributes(goal))

    def with_attributes(self, goal: float) -> tuple[float, tuple[float, ...]]:
        """Return a goal with attributes as high on their own scale as it is on the overall one."""
        share = (goal - self.scale.low) / (self.scale.high - self.scale.low)
        return goal, self.attributes_at(share)

    def attributes_at(self, share: float) -> tuple[float, ...]:
        """Return attributes at a share of their range: 0 is the lowest, 1 the highest."""
        return (self.scale.low + share * (self.scale.high - self.scale.low),) * len(self.attributes)

    @property
    def best(self) -> float:
        """The goal to ask for at inference: the highest that training can state."""
        return self.scale.best

    @property
    def best_attributes(self) -> tuple[float, ...]:
        return ()

    @property
    def state_best(self) -> StatedGoal:
        """The best goal, with the best attributes."""
        return self.state(self.best, self.best_attributes)

    @property
    def needs_fit(self) -> bool:
        """Whether the training split must supply some of its numbers."""
        return self.scale.needs_fit

    def fit(self, rewards: Sequence[float]) -> None:
        """Set the open numbers from the rewards of the training split, in the judge's units."""
        self.scale.fit(rewards)

    def fitted(self) -> str:
        """Return the fitted numbers, for a log."""
        return str(self.scale)

    def with_scale(self, scale: RewardScale) -> Self:
        """Return a copy with another scale."""
        other = copy.copy(self)
        other.scale = scale
        return other

    def low(self, option: float | Literal["none"] | None = None) -> tuple[StatedGoal, str]:
        """Return the goal from which guidance pushes away, and how it is printed.

        Args:
            option: a number on the scale that goals state, with the best attributes; ``none`` for no goal; None for
                the scale's lowest number, with the lowest attributes.

        Raises:
            ConfigError: the number is outside the scale.
        """
        if option == "none":
            return self.unstated, "none"
        if option is None:
            lowest = self.scale.low, self.attributes_at(0)
            return self.state(*lowest), self.printed(*lowest)
        self.refuse_outside(option, "guidance: against", ", or none;")
        return self.state(option, self.best_attributes), self.printed(option, self.best_attributes)

    def printed(self, goal: float, attributes: Sequence[float] = ()) -> str:
        """Return the goal in short, for logs and tables."""
        return self.scale.printed(goal)

    def describe(self) -> str:
        """Return code, arguments and texts over the whole scale, for cache keys."""
        step = (self.scale.high - self.scale.low) / 200
        goals = [self.scale.low + step * i for i in range(201)]
        texts = [self.write(goal, [goal] * len(self.attributes)) for goal in goals]
        return f"{describe_object(self)} {hash_code(type(self.scale))} {texts}"

    def wording(self) -> Wording | None:
        """Return the text as words around numbers; None, the default, if it can't be written like that.

        Exported chat templates write goals from it; without it they only contain the best goal's text.
        """
        return None

    def checked_wording(self) -> Wording | None:
        """Return :meth:`wording` if it gives the same text as :meth:`text` over the whole scale, else None."""
        wording = self.wording()
        if wording is None:
            return None
        for values in wording.grid():
            pairs = zip(self.attributes, self.best_attributes, strict=True)
            attributes = [values.get(name, best) for name, best in pairs]
            goal = values.get(wording.alone or "", self.best)
            if wording.text(values) != self.write(goal, attributes):
                return None  # a subclass overrides text alone
        best = wording.text({}) == self.write(self.best, self.best_attributes)
        return wording if best else None

    def record(self) -> dict[str, Any]:
        """Return what is needed to ask a trained policy for its best: saved with the run and with exported models."""
        wording = self.checked_wording()
        return {
            "template": f"{type(self).__module__}.{type(self).__qualname__}",
            "scale": {"class": type(self.scale).__name__, **self.scale.numbers()},
            "placement": self.placement,
            "attributes": list(self.attributes),
            "best": self.write(self.best, self.best_attributes),
            "wording": None if wording is None else wording.record(),
        }


def is_trained(record: Mapping[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Return whether a model with this record was trained on goals, and not on plain pairs (relabel none).

    The record of a model trained on plain pairs still has the goal text, so that it can be asked for one as a baseline.
    """
    return record is not None and bool(record.get("trained", True))


def is_written(record: Mapping[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Return whether a model with this record was trained on goals that are text in the prompt."""
    return is_trained(record) and record["best"] is not None


class OverallGoal(GoalTemplate):
    """The goal text of the paper (Zhang et al., ICML 2025, arXiv 2410.08067): one overall score.

    >>> print(OverallGoal().text(7.5))
    You are an assistant that generates responses for the instruction while implicitly achieving the following \
target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):
    Overall score: 7.5.
    """

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return f"{_lead(self.scale)}\nOverall score: {self.scale.printed(goal)}."

    def wording(self) -> Wording:
        return Wording((f"{_lead(self.scale)}\nOverall score: ", "."), (_number(OVERALL, self.scale),), OVERALL)


class AttributeGoal(GoalTemplate):
    """Several scores in a fixed order, as in the paper's runs on five attributes of ArmoRM.

    Pairs are still relabelled by the overall reward, which decides the winner.

    Args:
        attributes: names of the attributes in the data, in the order in which they are stated.
        scale: of the overall reward.
        attribute_scale: of the attributes' rewards; null uses the overall one's.
        overall: also state the overall score, last.
        placement: as for every goal.

    >>> print(AttributeGoal(["helpfulness", "instruction_following"]).text(7, [8, 6.5]))
    You are an assistant that generates responses for the instruction while implicitly achieving the following \
target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):
    Helpfulness: 8.
    Instruction following: 6.5.
    Overall score: 7.
    """

    def __init__(
        self,
        attributes: list[str],
        scale: RewardScale = RewardScale(),  # noqa: B008
        attribute_scale: RewardScale | None = None,
        overall: bool = True,
        placement: Placement = "auto",
    ) -> None:
        super().__init__(scale, placement)
        if not attributes or len(set(attributes)) != len(attributes):
            raise ConfigError(f"AttributeGoal: attributes must be different names, at least one, found {attributes}")
        if attribute_scale is not None and attribute_scale.needs_fit:
            raise ConfigError("AttributeGoal: attribute_scale must be declared in full; only the overall one is fitted")
        if attribute_scale is None and type(scale) is not RewardScale:
            raise ConfigError(
                f"AttributeGoal: {type(scale).__name__} maps the overall reward. Give the range of the attributes "
                "with attribute_scale."
            )
        self.attributes = tuple(attributes)
        self.attribute_scale, self.overall = attribute_scale or scale, overall

    def goal_of(self, reward: float, attributes: Sequence[float] = ()) -> tuple[float, tuple[float, ...]]:
        return self.scale.goal(reward), tuple(self.attribute_scale.goal(value) for value in attributes)

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        scale = self.attribute_scale
        lines = [
            f"{name.replace('_', ' ').capitalize()}: {scale.printed(value)}."
            for name, value in zip(self.attributes, attributes, strict=True)
        ]
        if self.overall:
            lines.append(f"Overall score: {self.scale.printed(goal)}.")
        return "\n".join([_lead(scale), *lines])

    def wording(self) -> Wording | None:
        names = [*self.attributes, *([OVERALL] if self.overall else [])]
        if len(set(names)) != len(names):
            return None  # an attribute is named like the overall score
        labels = [name.replace("_", " ").capitalize() for name in self.attributes]
        labels += ["Overall score"] if self.overall else []
        parts = [f"{_lead(self.attribute_scale)}\n{labels[0]}: ", *(f".\n{label}: " for label in labels[1:]), "."]
        numbers = [_number(n, self.scale if n == OVERALL else self.attribute_scale) for n in names]
        return Wording(tuple(parts), tuple(numbers), OVERALL if self.overall else None)

    def attributes_at(self, share: float) -> tuple[float, ...]:
        scale = self.attribute_scale
        return (scale.low + share * (scale.high - scale.low),) * len(self.attributes)

    @property
    def best_attributes(self) -> tuple[float, ...]:
        return (self.attribute_scale.best,) * len(self.attributes)

    def record(self) -> dict[str, Any]:
        scale = {"class": type(self.attribute_scale).__name__, **self.attribute_scale.numbers()}
        return super().record() | {"attribute_scale": scale, "overall": self.overall}

    def printed(self, goal: float, attributes: Sequence[float] = ()) -> str:
        numbers = [self.attribute_scale.printed(value) for value in attributes]
        return " ".join([*numbers, self.scale.printed(goal)] if self.overall else numbers)


OVERALL = "overall"
"""The key of the overall score in a mapping of numbers."""


def _number(name: str, scale: RewardScale) -> Number:
    return Number(name, scale.low, scale.high, scale.decimals, scale.best)


def _lead(scale: RewardScale) -> str:
    low, high = scale.printed(scale.low), scale.printed(scale.high)
    return (
        "You are an assistant that generates responses for the instruction while implicitly achieving the "
        f"following target scores (on a scale of {low}-{high}, where {low} is lowest and {high} is highest):"
    )
