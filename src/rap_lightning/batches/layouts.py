"""Training pairs to a :class:`Batch`, in one of three layouts.

:func:`lay_out` makes the batch. A layout turns token sequences into the model's input (:class:`PackedInputs`); the
index tensors that the loss side reads are then the same for every layout, so that nothing above can tell which it was.
``packed`` and ``tree`` put all sequences into one row, by :func:`build_prefix_tree`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.batches.types import RESPONSES, Batch, Forest

Ids: TypeAlias = npt.NDArray[np.int64]
Strengths: TypeAlias = Sequence[float | None]
"""The factor on the policy's adapter for each sequence; None leaves the adapter as it is, for all or none of them."""

WORTH_SHARING = 16
"""Tokens. A sequence that would share fewer than these beyond an earlier branch starts at that branch: another branch
costs kernel calls in every layer, and saves next to nothing."""


@dataclass(frozen=True)
class PackedInputs:
    """The model's input, and the position in it of each token of each sequence.

    Attributes:
        input_ids, position_ids, attention_mask: [R, T] int64.
        forest: which token attends to which, or ``None`` where each row is one sequence.
        places: for each sequence, [its tokens] int64, indices into the flattened [R * T] input.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    forest: Forest | None
    places: list[Tensor]


@dataclass(frozen=True)
class Layout:
    """A layout, and how many tokens the model then processes.

    Attributes:
        pack: (sequences as id arrays, strength of each, pad id) -> PackedInputs.
        tokens: an upper bound on the tokens of pairs in one forward pass, padding included.
    """

    pack: Callable[[Sequence[Ids], Strengths, int], PackedInputs]
    tokens: Callable[[Sequence[PairSize]], int]


def _padded(sequences: Sequence[Ids], _: Strengths, pad_id: int) -> PackedInputs:
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
        attention_mask[row, : len(ids)] = 1
    position_ids = torch.arange(width).expand(len(sequences), width).contiguous()
    places = [torch.arange(row * width, row * width + len(ids)) for row, ids in enumerate(sequences)]
    return PackedInputs(input_ids, position_ids, attention_mask, None, places)


LAYOUTS: dict[str, Layout] = {
    "padded": Layout(_padded, lambda pairs: 2 * len(pairs) * max(p.prompt + max(p.chosen, p.rejected) for p in pairs)),
    "packed": Layout(
        lambda ids, *_: build_prefix_tree(ids, shared=False),
        lambda pairs: sum(2 * p.prompt + p.chosen + p.rejected for p in pairs),
    ),
    "tree": Layout(
        lambda ids, strengths, _: build_prefix_tree(ids, shared=True, strengths=strengths),
        lambda pairs: sum(p.prompt + p.chosen + p.rejected for p in pairs),
    ),
}
"""padded: a row per response. packed: one row of all responses, each after its prompt. tree: one row in which
responses share their common prefixes."""


# -- a batch ----------------------------------------------------------------------------------------------------------


def lay_out(layout: Layout, examples: Sequence[Example], plan: BatchPlan, pad_id: int) -> Batch:
    """The examples of one forward pass as a Batch; ``plan.weights`` are theirs."""
    prompts = [len(e.prompt_ids) for e in examples for _ in range(RESPONSES)]
    sequences = [
        np.asarray([*e.prompt_ids, *response], dtype=np.int64)
        for e in examples
        for response in (e.chosen_ids, e.rejected_ids)  # the order of segments: see Batch
    ]
    strengths = [e.strength for e in examples for _ in range(RESPONSES)]
    # Batches are made on the host, also where new tensors are on a GPU: in configure_model, which Lightning calls so,
    # and after torch.set_default_device.
    with torch.device("cpu"):
        return Batch(
            **_indexed(layout, sequences, prompts, strengths, pad_id),
            rewards=torch.tensor([e.rewards for e in examples], dtype=torch.float32),
            goal_rewards=torch.tensor([e.goal_reward for e in examples], dtype=torch.float32),
            origin=torch.tensor([e.origin for e in examples]),
            weights=torch.tensor(plan.weights, dtype=torch.float32),
            fillers=sum(weight == 0 for weight in plan.weights),
            step_pairs=plan.step_pairs,
            loss_weights=torch.tensor(plan.loss_weights, dtype=torch.float32),
            step_weight=plan.step_weight,
            digests=tuple(_digest(ids, prompt) for ids, prompt in zip(sequences, prompts, strict=True)),
            pair_ids=tuple(e.pair_id for e in examples),
            goals=tuple(e.goal for e in examples),
        )


def lay_out_responses(responses: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Batch:
    """Single responses, (prompt ids, response ids) each, padded, to compute their log-probabilities.

    Segment i is response i, and ``lengths`` is [n]. There are no pairs, so the fields of pairs are empty.
    """
    sequences = [np.asarray([*prompt, *response], dtype=np.int64) for prompt, response in responses]
    prompts = [len(prompt) for prompt, _ in responses]
    with torch.device("cpu"):
        nothing = torch.zeros(0)
        return Batch(
            **_indexed(LAYOUTS["padded"], sequences, prompts, [None] * len(sequences), pad_id),
            rewards=nothing, goal_rewards=nothing, origin=nothing, weights=nothing, fillers=0, step_pairs=0,
            loss_weights=nothing, step_weight=0.0, digests=(), pair_ids=(), goals=(),
        )  # fmt: skip


def _indexed(
    layout: Layout, sequences: Sequence[Ids], prompts: Sequence[int], strengths: Strengths, pad_id: int
) -> dict[str, Any]:
    """The fields of a Batch that belong to responses.

    Sequence s becomes segment s, and its first ``prompts[s]`` tokens are the prompt.
    """
    packed = layout.pack(sequences, strengths, pad_id)
    cut = list(zip(sequences, prompts, packed.places, strict=True))
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": packed.attention_mask,
        "forest": packed.forest,
        # the prompt's last token predicts the response's first
        "predict_from": torch.cat([places[prompt - 1 : -1] for _, prompt, places in cut]),
        "target": torch.cat([torch.from_numpy(ids[prompt:]) for ids, prompt, _ in cut]),
        "segment": torch.cat([torch.full((len(ids) - prompt,), s) for s, (ids, prompt, _) in enumerate(cut)]),
        "lengths": torch.tensor([len(ids) - prompt for ids, prompt, _ in cut]),
        "strength": _by_token(packed, strengths),
    }


def _by_token(packed: PackedInputs, strengths: Strengths) -> Tensor | None:
    """The strength of each token's sequence, [R, T]; 0 for padding."""
    known = [one for one in strengths if one is not None]
    if not known:
        return None
    assert len(known) == len(strengths), "a goal template gives every goal a strength, or none"
    found = torch.zeros(packed.input_ids.numel())
    for places, one in zip(packed.places, known, strict=True):
        found[places] = one
    return found.view(packed.input_ids.shape)


def _digest(ids: Ids, prompt: int) -> bytes:
    return hashlib.sha256(b"%d:" % prompt + ids.tobytes()).digest()[:16]


class Collate:
    """The DataLoader's ``collate_fn`` for :class:`EncodedPairs`: a planned batch becomes its forward passes."""

    def __init__(self, layout: str, pad_id: int) -> None:
        assert layout in LAYOUTS
        self.name, self.pad_id = layout, pad_id  # by name, so that workers that are not forked can unpickle it

    def __call__(self, planned: tuple[BatchPlan, list[Example]]) -> tuple[Batch, ...]:
        plan, examples = planned
        layout = LAYOUTS[self.name]
        return tuple(lay_out(layout, [examples[i] for i in part], plan.part(part), self.pad_id) for part in plan.parts)


# -- sequences in one row ---------------------------------------------------------------------------------------------


def build_prefix_tree(sequences: Sequence[Ids], *, shared: bool, strengths: Strengths | None = None) -> PackedInputs:
    """Lay sequences out in one row, depth first, sharing common prefixes, or each as a tree of its own.

    Sequences of different strength share nothing: the adapter changes the hidden states of the prompt, too.

    ``path`` holds the row's indices of the current sequence, from its root. The next sequence leaves that path at depth
    ``common``: what lies deeper is complete, so its ``end`` is known, and the new tokens are appended to the row.
    """
    # in lexicographic order neighbours share most, and a depth-first traversal visits them one after the other
    apart = [one or 0.0 for one in strengths] if strengths is not None else [0.0] * len(sequences)
    numbers = range(len(sequences))
    order = sorted(numbers, key=lambda i: (apart[i], sequences[i].tolist())) if shared else numbers
    end = np.empty(sum(map(len, sequences)), np.int64)
    ids, positions, places = np.empty_like(end), np.empty_like(end), [end] * len(sequences)
    paths: list[Ids] = []
    branches = [0]  # depths on the current path at which an earlier sequence left it
    path, previous, count, last = end[:0], end[:0], 0, 0.0
    for index in order:
        sequence = sequences[index]
        common = _shared_length(previous, sequence) if shared and apart[index] == last else 0
        while branches[-1] > common:
            branches.pop()
        if common - branches[-1] < WORTH_SHARING and common < len(sequence):
            common = branches[-1]
        end[path[common:]] = count
        if common < len(path):
            paths.append(path)
            branches.append(common)
        new = slice(count, count + len(sequence) - common)
        ids[new], positions[new] = sequence[common:], np.arange(common, len(sequence))
        path = places[index] = np.concatenate([path[:common], np.arange(new.start, new.stop)])
        count, previous, last = new.stop, sequence, apart[index]
    end[path] = count
    paths.append(path)
    ids, positions, end = ids[:count], positions[:count], end[:count]
    starts = [0, *(np.flatnonzero(np.diff(end)) + 1).tolist()]
    runs = tuple((a, b, int(end[a])) for a, b in zip(starts, [*starts[1:], count], strict=True))
    forest = Forest(torch.from_numpy(end), runs, tuple(_spans(path) for path in paths))
    input_ids = torch.from_numpy(ids)[None]
    position_ids = torch.from_numpy(positions)[None]
    return PackedInputs(
        input_ids, position_ids, torch.ones_like(input_ids), forest, list(map(torch.from_numpy, places))
    )


def _shared_length(a: Ids, b: Ids) -> int:
    width = min(len(a), len(b))
    differs = np.flatnonzero(a[:width] != b[:width])
    return int(differs[0]) if len(differs) else width


def _spans(path: Ids) -> tuple[tuple[int, int], ...]:
    jumps = np.flatnonzero(np.diff(path) != 1)
    starts, stops = [0, *(jumps + 1)], [*jumps, len(path) - 1]
    return tuple((int(path[a]), int(path[b]) + 1) for a, b in zip(starts, stops, strict=True))
