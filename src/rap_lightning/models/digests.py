"""Digests by which weights are recognised: a checkpoint's base model, and what stored log-probabilities belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rap_lightning.errors import DataError
from rap_lightning.models.policy import Policy, of_adapter

CHUNK = 1 << 24
"""Numbers that :func:`base_digest` converts at a time."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers of as many bytes."""


def weights_digest(path: str, revision: str | None) -> str:
    """Return a digest of every file of a model that changes its numbers: weights, config, adapters.

    A model of the Hub must have been downloaded already.

    Raises:
        DataError: there are no weights in the safetensors format.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*config.json"]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=True))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{path} has no *.safetensors, by which stored log-probabilities recognise their model.")
    configs = (folder / name for name in ("config.json", "adapter_config.json"))
    digest = hashlib.sha256()
    for file in sorted([*weights, *(path for path in configs if path.is_file())]):
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


@torch.no_grad()
def base_digest(policy: Policy) -> str:
    """Return a digest of the names, shapes and all numbers of the weights that the policy was loaded with.

    Of an adapter's policy these are the base model's, at any time; without an adapter it must be called before the
    first step. It has three parts: the dtypes, the exact numbers, and the numbers rounded to bfloat16, by which the
    same model in another dtype is recognised. Compare with :func:`same_base`. All ranks must call it where weights are
    sharded.
    """
    dtypes, exact, rounded = set(), hashlib.sha256(), hashlib.sha256()
    for name, p in policy.named_parameters():
        if policy.has_adapter and (p.requires_grad or of_adapter(name)):
            continue
        values = (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        dtypes.add(str(p.dtype))
        in_bf16 = values.to(torch.bfloat16) if values.is_floating_point() else values
        for digest, numbers in ((exact, values), (rounded, in_bf16)):
            digest.update(f"{name}{tuple(p.shape)}{_checksum(numbers)}".encode())
    return ":".join((",".join(sorted(dtypes)), exact.hexdigest(), rounded.hexdigest()))


def _checksum(values: Tensor) -> int:
    """Return a 64-bit sum of all numbers' bits, each multiplied by an odd number of its place.

    Computed where the tensor is: a cryptographic digest would take a copy to the host and ten times as long there.
    Integers wrap around, so the order of summation doesn't matter. A single change is always found.
    """
    bits = values.contiguous().flatten().view(BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    odd = torch.arange(1, 2 * min(CHUNK, len(bits)) + 1, 2, device=bits.device)
    for first, part in enumerate(bits.split(CHUNK)):
        places = odd[: len(part)] + 2 * first * CHUNK
        total += (part.to(torch.int64) * places).sum()
    return int(total)


def same_base(one: str, other: str) -> bool:
    """Return whether two digests are of the same weights, as far as their dtypes tell."""
    (dtypes, *first), (other_dtypes, *second) = one.split(":"), other.split(":")
    return first == second if dtypes == other_dtypes else first[1:] == second[1:]


@torch.no_grad()
def not_finite(policy: Policy, *, trained: bool = False) -> list[str]:
    """Return the (trained) parameters with infinite or NaN values, and how many; of sharded ones this rank's part."""
    found = []
    for name, p in policy.named_parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        if (p.requires_grad or not trained) and not local.isfinite().all():
            found.append(f"{name} ({int((~local.isfinite()).sum()):,} of {local.numel():,} values)")
    return found
