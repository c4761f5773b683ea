"""Examples to a Batch. A layout decides how tokens are laid out for the model; nothing above can tell which it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch

Layout = Callable[[Sequence[Example], BatchPlan, int], Batch]
"""(examples, plan, pad_id) -> Batch"""


def padded(examples: Sequence[Example], plan: BatchPlan, pad_id: int) -> Batch:
    """Each response in a row of its own after its prompt, padded on the right to the longest: R = 2B."""
    rows = [
        (example.prompt_ids, response)
        for example in examples
        for response in (example.chosen_ids, example.rejected_ids)
    ]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    predict_from, target, segment = [], [], []
    for s, (prompt, response) in enumerate(rows):
        ids = torch.tensor([*prompt, *response], dtype=torch.int64)
        input_ids[s, : len(ids)] = ids
        attention_mask[s, : len(ids)] = 1
        first = s * width + len(prompt) - 1  # the prompt's last token predicts the response's first
        predict_from.append(torch.arange(first, first + len(response)))
        target.append(ids[len(prompt) :])
        segment.append(torch.full((len(response),), s))
    position_ids = torch.arange(width).expand(len(rows), width).contiguous()
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        predict_from=torch.cat(predict_from),
        target=torch.cat(target),
        segment=torch.cat(segment),
        lengths=torch.tensor(list(chain.from_iterable((len(e.chosen_ids), len(e.rejected_ids)) for e in examples))),
        rewards=torch.tensor([e.rewards for e in examples], dtype=torch.float32),
        origin=torch.tensor([e.origin for e in examples]),
        weights=torch.tensor(plan.weights, dtype=torch.float32),
        step_pairs=plan.step_pairs,
        pair_ids=tuple(e.pair_id for e in examples),
        goals=tuple(e.goal for e in examples),
    )


LAYOUTS: dict[str, Layout] = {"padded": padded}


class Collate:
    """What the DataLoader calls with what :class:`EncodedPairs` gives."""

    def __init__(self, layout: str, pad_id: int) -> None:
        self.layout, self.pad_id = LAYOUTS[layout], pad_id

    def __call__(self, planned: tuple[BatchPlan, list[Example]]) -> Batch:
        """Lay out one planned batch."""
        plan, examples = planned
        return self.layout(examples, plan, self.pad_id)
