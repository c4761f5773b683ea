"""Knowing weights again: that a checkpoint's adapter is put on the base model it was trained over."""

from __future__ import annotations

import hashlib

import torch

from rap_lightning.models.adapters import of_adapter
from rap_lightning.models.policy import Policy

SAMPLE = 64
"""Numbers of each tensor that are looked at."""


@torch.no_grad()
def base_digest(policy: Policy) -> str:
    """Digest of names, shapes and a spread sample of the base model's weights; cheap for any size of model.

    Three parts: the dtypes, the exact numbers, and the numbers as bfloat16 has them, by which the same model in another
    dtype is known. Compare with :func:`same_base`.
    """
    dtypes, exact, rounded = set(), hashlib.sha256(), hashlib.sha256()
    for name, p in policy.named_parameters():
        if not (p.requires_grad or of_adapter(name)):
            values = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten()  # sharded: all ranks call
            sample = values[:: max(1, len(values) // SAMPLE)][:SAMPLE].cpu().contiguous()
            dtypes.add(str(p.dtype))
            for digest, numbers in (
                (exact, sample),
                (rounded, sample.to(torch.bfloat16) if sample.is_floating_point() else sample),
            ):
                digest.update(f"{name}{tuple(p.shape)}".encode())
                digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return ":".join((",".join(sorted(dtypes)), exact.hexdigest(), rounded.hexdigest()))


def same_base(one: str, other: str) -> bool:
    """Whether two digests are of the same weights, as far as their dtypes let it be known."""
    (dtypes, *first), (other_dtypes, *second) = one.split(":"), other.split(":")
    return first == second if dtypes == other_dtypes else first[1:] == second[1:]


@torch.no_grad()
def not_finite(policy: Policy) -> list[str]:
    """The trained parameters that are not finite, with how many of their numbers are not; [] where all is well."""
    trained = [(name, p.detach()) for name, p in policy.named_parameters() if p.requires_grad]
    found = []
    for name, p in trained:
        local = p.to_local() if hasattr(p, "to_local") else p  # sharded: this rank's part
        if not local.isfinite().all():
            found.append(f"{name} ({int((~local.isfinite()).sum()):,} of {local.numel():,} values)")
    return found
