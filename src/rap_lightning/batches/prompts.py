"""Prompts to generate from: which conversations, at which goal, as token ids.

:func:`distinct_histories` reads the conversations; :class:`PromptEncoder` writes the goal and encodes them;
:func:`left_pad` makes the batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rap_lightning.batches.encode import Conversation, EncodedConversation, Encoder
from rap_lightning.batches.types import PromptBatch
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate, StatedGoal
from rap_lightning.preferences.pair_cache import stored_pairs
from rap_lightning.preferences.pairs import BadRow, Message, carrying, messages_and_tools
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source

GOAL_OPTION = "--data.predict.goal"
LowGoal = float | Literal["none"] | None
"""The goal that guidance pushes away from, as :meth:`rap_lightning.preferences.goals.GoalTemplate.low` takes it."""


@dataclass
class PredictPrompts:
    """What ``predict`` generates for.

    Args:
        source: a file, folder or Hub id in any format that is read for training; by default the validation split. Each
            distinct conversation is one prompt.
        goal: the number to ask for, on the scale that goals state; by default the best of the goal
            template, and none where training pairs state none (relabel none).
        limit: at most this many prompts.
    """

    source: str | None = None
    goal: float | None = None
    limit: int | None = None

    def check(self, template: GoalTemplate | None) -> None:
        """Raise ConfigError where the goal is not one of the template."""
        if self.goal is None:
            return
        if template is None:
            raise ConfigError("--data.predict.goal has no effect with --data.goal null; remove one of the two.")
        if not template.needs_fit:  # else the data module asks once its numbers are fitted
            template.refuse_outside(self.goal, GOAL_OPTION)


@dataclass(frozen=True)
class Prompt:
    """One prompt of ``predict``: token ids and strength at the goal and, with guidance, at the low goal."""

    ids: list[int]
    record: dict[str, Any]
    low_ids: list[int] | None = None
    strength: float | None = None
    low_strength: float | None = None


class PromptEncoder:
    """Encodes conversations at goals, cut to the encoder's ``max_prompt_length`` as in training."""

    def __init__(self, encoder: Encoder, tell: Callable[[str], None]) -> None:
        self.encoder, self.tell = encoder, tell

    def prompts(
        self, histories: Sequence[Sequence[Message]], goal: float | None, guidance: float = 0.0, against: LowGoal = None
    ) -> list[Prompt]:
        """Conversations at a goal, and with guidance at the low goal as well."""
        template = self.encoder.goal
        record: dict[str, Any] = {"goal": None if template is None or goal is None else template.printed(goal)}
        asked, against_goal = self.stated(goal), StatedGoal()
        prompts = self.encode(histories, asked.text)
        low: list[list[int] | None] = [None] * len(prompts)
        if guidance:
            against_goal, low_printed = self.low_goal(against)
            low = [*self.encode(histories, against_goal.text)]
            record |= {"guidance": guidance, "against": low_printed}
        return [
            Prompt(ids, messages_and_tools(history) | record, low_ids, asked.strength, against_goal.strength)
            for history, ids, low_ids in zip(histories, prompts, low, strict=True)
        ]

    def encode(self, histories: Sequence[Sequence[Message]], text: str | None) -> list[list[int]]:
        """Token ids of conversations with a goal's text, ``None`` for none."""
        found: list[EncodedConversation] = []
        for one in self.encoder.encode([Conversation(history, (text,)) for history in histories]):
            if isinstance(one, BadRow):
                raise one
            found.append(one)
        if cut := sum(one.cut_prompts[0] > 0 for one in found):
            longest = self.encoder.max_prompt_length
            self.tell(f"{cut:,} of {len(found):,} prompts cut to {longest} tokens, goal kept")
        return [one.prompt_ids[0] for one in found]

    def stated(self, goal: float | None) -> StatedGoal:
        """How the policy is asked for a goal, with the best attributes; None is no goal."""
        template = self.encoder.goal
        if template is None:
            return StatedGoal()
        return template.unstated if goal is None else template.state(goal, template.best_attributes)

    def low_goal(self, against: LowGoal) -> tuple[StatedGoal, str]:
        """The goal that guidance pushes away from, and how it is printed."""
        if self.encoder.goal is None:
            raise ConfigError(
                "--model.generation.guidance needs goals to push away from, and there are none with --data.goal null."
            )
        return self.encoder.goal.low(against)

    def check_guidance(self, goal: float | None, against: LowGoal) -> None:
        """Raise ConfigError where guidance would push away from the goal that is asked for."""
        low, printed = self.low_goal(against)
        if goal is not None and low == self.stated(goal):
            raise ConfigError(
                f"--model.generation.guidance has no effect: the goal that it pushes away from, {printed}, is the "
                "one that is asked for. Ask for a higher one (--data.predict.goal), or remove it."
            )


def collate_prompts(prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
    """A batch of prompts, padded on the left."""
    strengths = [prompt.strength for prompt in prompts]
    batch = left_pad([prompt.ids for prompt in prompts], pad_id, [prompt.record for prompt in prompts], strengths)
    low = [prompt.low_ids for prompt in prompts if prompt.low_ids is not None]
    if not low:
        return batch
    return replace(batch, against=left_pad(low, pad_id, [{}] * len(low), [prompt.low_strength for prompt in prompts]))


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, records: Sequence[dict[str, Any]],
    strengths: Sequence[float | None] = (),
) -> PromptBatch:  # fmt: skip
    """Token ids padded on the left, so that every prompt ends at the last column, with the adapter's strengths."""
    width = max(map(len, prompts))
    rows = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    known = [one for one in strengths if one is not None]
    with torch.device("cpu"):  # on the host, whatever the default device
        strength = torch.tensor(known)[:, None] if known else None
        return PromptBatch(torch.tensor(rows), torch.tensor(masks), tuple(records), strength=strength)


def distinct_histories(
    sources: Sequence[Source], split: str, rules: Rules, num_proc: int | None, tell: Callable[[str], None]
) -> list[list[Message]]:
    """The distinct conversations of a split, in order, without responses.

    Goals, relabelling, filters, selection and weights of the rules are not applied. Rows that can't be used are left
    out, and ``tell`` gets their counts.
    """
    plain = replace(
        rules, goal=None, relabelling=Relabelling("none"), ties="drop", outside_scale="error",
        filters=Filters(), selection=None, tool_turns=False, weight_column=None,
    )  # fmt: skip
    seen: dict[tuple[str, str | None], None] = {}
    for source in sources:
        table, report = stored_pairs(source, split, plain, num_proc=num_proc)
        if report.dropped:
            tell("\n".join(report.lines()))
        for row in table.select_columns(["history", "tools"]):
            seen.setdefault((row["history"], row["tools"]), None)
    return [carrying(json.loads(history), tools) for history, tools in seen]
