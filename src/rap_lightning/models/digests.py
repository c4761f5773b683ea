"""Knowing weights again: that a checkpoint's adapter is put on the base model it was trained over."""

from __future__ import annotations

import hashlib

import torch

from rap_lightning.models.policy import Policy

SAMPLE = 64
"""Numbers of each tensor that are looked at."""


@torch.no_grad()
def base_digest(policy: Policy) -> str:
    """Digest of names, shapes and a spread sample of the weights that are not trained; cheap for any size of model.

    Other weights of the same shape give another digest, as does the same model in another dtype.
    """
    digest = hashlib.sha256()
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            values = p.detach().flatten()
            sample = values[:: max(1, len(values) // SAMPLE)][:SAMPLE].cpu().contiguous()
            digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
