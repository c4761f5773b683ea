"""Examples to a Batch. A layout decides how tokens are laid out for the model; nothing above can tell which it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.forest import Ids, plant
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.batches.types import Batch, Forest


@dataclass(frozen=True)
class Laid:
    """Where tokens stand: the model's input, and the place of each token of each of the 2B sequences in it.

    Attributes:
        input_ids, position_ids, attention_mask: [R, T] int64.
        forest: what sees what, or ``None`` where rows are sequences.
        places: for each sequence, [its tokens] int64, indices into the flattened [R * T] input.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    forest: Forest | None
    places: list[Tensor]


@dataclass(frozen=True)
class Layout:
    """A way to lay sequences out, and how many tokens the model then has to process.

    Attributes:
        lay: (sequences as id arrays, pad id) -> Laid.
        tokens: an upper bound on the tokens of pairs in one forward pass, padding included.
    """

    lay: Callable[[Sequence[Ids], int], Laid]
    tokens: Callable[[Sequence[PairSize]], int]


def _padded(sequences: Sequence[Ids], pad_id: int) -> Laid:
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
        attention_mask[row, : len(ids)] = 1
    position_ids = torch.arange(width).expand(len(sequences), width).contiguous()
    places = [torch.arange(row * width, row * width + len(ids)) for row, ids in enumerate(sequences)]
    return Laid(input_ids, position_ids, attention_mask, None, places)


def _packed(sequences: Sequence[Ids], pad_id: int) -> Laid:
    return _in_one_row(sequences, shared=False)


def _tree(sequences: Sequence[Ids], pad_id: int) -> Laid:
    return _in_one_row(sequences, shared=True)


def _in_one_row(sequences: Sequence[Ids], *, shared: bool) -> Laid:
    planted = plant(sequences, shared=shared)
    input_ids = torch.from_numpy(planted.ids)[None]
    return Laid(
        input_ids,
        torch.from_numpy(planted.positions)[None],
        torch.ones_like(input_ids),
        planted.forest,
        [torch.from_numpy(places) for places in planted.places],
    )


LAYOUTS: dict[str, Layout] = {
    "padded": Layout(_padded, lambda pairs: 2 * len(pairs) * max(p.prompt + max(p.chosen, p.rejected) for p in pairs)),
    "packed": Layout(_packed, lambda pairs: sum(2 * p.prompt + p.chosen + p.rejected for p in pairs)),
    "tree": Layout(_tree, lambda pairs: sum(p.prompt + p.chosen + p.rejected for p in pairs)),
}
"""padded: a row per response. packed: one row of all responses, each after its prompt. tree: one row in which
responses share what they begin with."""


def lay_out(layout: Layout, examples: Sequence[Example], plan: BatchPlan, pad_id: int) -> Batch:
    """The examples of one forward pass as a Batch; ``plan.weights`` are theirs."""
    prompts = [len(e.prompt_ids) for e in examples for _ in range(2)]
    sequences = [
        np.asarray([*e.prompt_ids, *response], dtype=np.int64)
        for e in examples
        for response in (e.chosen_ids, e.rejected_ids)
    ]
    return Batch(
        **_laid_out(layout, sequences, prompts, pad_id),
        rewards=torch.tensor([e.rewards for e in examples], dtype=torch.float32),
        origin=torch.tensor([e.origin for e in examples]),
        weights=torch.tensor(plan.weights, dtype=torch.float32),
        step_pairs=plan.step_pairs,
        loss_weights=torch.tensor(plan.loss_weights, dtype=torch.float32),
        step_weight=plan.step_weight,
        digests=tuple(_digest(ids, prompt) for ids, prompt in zip(sequences, prompts, strict=True)),
        pair_ids=tuple(e.pair_id for e in examples),
        goals=tuple(e.goal for e in examples),
    )


def lay_out_responses(responses: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Batch:
    """Single responses, (prompt ids, response ids) each, for their log-probabilities alone, padded.

    Segment i is response i, and ``lengths`` [n] are theirs; there are no pairs, so what belongs to pairs is empty.
    """
    sequences = [np.asarray([*prompt, *response], dtype=np.int64) for prompt, response in responses]
    prompts = [len(prompt) for prompt, _ in responses]
    nothing = torch.zeros(0)
    return Batch(
        **_laid_out(LAYOUTS["padded"], sequences, prompts, pad_id),
        rewards=nothing, origin=nothing, weights=nothing, step_pairs=0, loss_weights=nothing, step_weight=0.0,
        digests=(), pair_ids=(), goals=(),
    )  # fmt: skip


def _laid_out(layout: Layout, sequences: Sequence[Ids], prompts: Sequence[int], pad_id: int) -> dict[str, Any]:
    """What a Batch says of responses: sequence s is segment s, and its first ``prompts[s]`` tokens are the prompt's."""
    laid = layout.lay(sequences, pad_id)
    cut = list(zip(sequences, prompts, laid.places, strict=True))
    return {
        "input_ids": laid.input_ids,
        "position_ids": laid.position_ids,
        "attention_mask": laid.attention_mask,
        "forest": laid.forest,
        # the prompt's last token predicts the response's first
        "predict_from": torch.cat([places[prompt - 1 : -1] for _, prompt, places in cut]),
        "target": torch.cat([torch.from_numpy(ids[prompt:]) for ids, prompt, _ in cut]),
        "segment": torch.cat([torch.full((len(ids) - prompt,), s) for s, (ids, prompt, _) in enumerate(cut)]),
        "lengths": torch.tensor([len(ids) - prompt for ids, prompt, _ in cut]),
    }


def _digest(ids: Any, prompt: int) -> bytes:
    return hashlib.sha256(b"%d:" % prompt + ids.tobytes()).digest()[:16]


class Collate:
    """What the DataLoader calls with what :class:`EncodedPairs` gives: a batch becomes its forward passes."""

    def __init__(self, layout: str, pad_id: int) -> None:
        assert layout in LAYOUTS
        self.name, self.pad_id = layout, pad_id  # by name, so that it can be sent to workers that are not forked

    def __call__(self, planned: tuple[BatchPlan, list[Example]]) -> tuple[Batch, ...]:
        """Lay out one planned batch."""
        plan, examples = planned
        layout = LAYOUTS[self.name]
        return tuple(lay_out(layout, [examples[i] for i in part], plan.part(part), self.pad_id) for part in plan.parts)
