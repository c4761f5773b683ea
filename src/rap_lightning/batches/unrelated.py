"""Each prompt of a batch with the responses of another pair, for losses that require "unrelated"."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rap_lightning.batches.types import RESPONSES, Batch


def unrelated(batch: Batch) -> Batch:
    """A padded batch in which each pair's prompt is followed by another pair's responses.

    The other pair is the nearest before it (the last comes before the first) that was made from another scored pair;
    where the batch has none, the pair before.

    Responses are cut so that no sequence is longer than the batch's longest: the model may have no more positions.

    It reads any layout: a token's ancestor at position p is the last token before it with that position, because
    positions count along the path and siblings are consecutive.
    """
    count = len(batch.lengths)
    begins = [int((batch.segment == s).nonzero()[0]) for s in range(count)]
    prompts = [_path(batch, int(batch.predict_from[begin])) for begin in begins]
    responses = [batch.target[batch.segment == s] for s in range(count)]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    donors = [_donor(batch.pair_ids, pair) for pair in range(count // RESPONSES)]
    responses = [responses[RESPONSES * donor + side] for donor in donors for side in range(RESPONSES)]
    responses = [r[: max(1, longest - len(p))] for p, r in zip(prompts, responses, strict=True)]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = batch.input_ids.new_zeros(count, width)
    mask = torch.zeros_like(input_ids)
    predict_from = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = torch.cat((prompt, response))
        input_ids[row, : len(whole)] = whole
        mask[row, : len(whole)] = 1
        predict_from.append(torch.arange(len(response), device=mask.device) + row * width + len(prompt) - 1)
    lengths = torch.tensor([len(r) for r in responses], device=mask.device)
    strength = batch.strength
    if strength is not None:  # that of the prompt's last token, for the whole row
        strength = strength.flatten()[batch.predict_from[begins], None].expand(count, width)
    return dataclasses.replace(
        batch,
        forest=None,
        digests=(),
        input_ids=input_ids,
        position_ids=torch.arange(width, device=mask.device).expand(count, width).contiguous(),
        attention_mask=mask,
        predict_from=torch.cat(predict_from),
        target=torch.cat(responses),
        segment=torch.repeat_interleave(torch.arange(count, device=mask.device), lengths),
        lengths=lengths,
        strength=strength,
    )


def _donor(pair_ids: tuple[str, ...], pair: int) -> int:
    count = len(pair_ids)
    others = ((pair - back) % count for back in range(1, count))
    return next((other for other in others if pair_ids[other] != pair_ids[pair]), (pair - 1) % count)


def _path(batch: Batch, end: int) -> Tensor:
    """Token ids from the root of a sequence to flat index ``end``."""
    row, column = divmod(end, batch.input_ids.shape[1])
    positions, ids = batch.position_ids[row, : column + 1], batch.input_ids[row, : column + 1]
    depth = int(positions[-1]) + 1
    index = torch.arange(len(positions), device=positions.device)
    # the last index at each position; deeper tokens of earlier siblings fall outside
    last = index.new_zeros(int(positions.max()) + 1).scatter_reduce(0, positions, index, "amax", include_self=False)
    return ids[last[:depth]]
