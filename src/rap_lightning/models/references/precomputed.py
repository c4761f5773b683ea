"""Reference log-probabilities that are computed once, before training, and kept on disk.

Read :meth:`Stored.prepare` first: what is missing is computed by a live reference, which is then freed.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from rap_lightning.batches.types import Batch, copies_at_once
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.adapters import adapter_digest
from rap_lightning.models.digests import weights_digest
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.policy import Policy, evaluating, most_on_any_rank
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.private_api import attention_implementation
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.logp_store import LogpStore, default_root
from rap_lightning.progress_bar import progress

Live: TypeAlias = Callable[[Batch], Tensor]
"""From a batch to [M] nats."""
SAMPLE = 2
"""Forward passes of stored log-probabilities that every run computes again, to compare."""
BOUNDS = {True: 1e-4, False: 0.1}
"""Nats: mean difference per token up to which a sample agrees, in float32 and in bfloat16."""


class Stored(Reference):
    """Log-probabilities of the initial policy, or of another model, computed once and kept on disk.

    Before training, the ranks share the work for responses that are not on disk yet; then the model is freed. A run
    that was killed continues from what is on disk. Everything that changes a number is in the key: the model's files,
    its dtype, the trainer's precision, the attention kernel, and every token of a prompt or response. The loss, β, the
    learning rate, the layout and the batch size are not. A sample is computed again on every use, and must agree.

    In bfloat16 log-probabilities depend on how sequences are laid out, by rounding: the first batch shows by how much.

    Args:
        path: a Hugging Face folder or Hub id; by default the policy's own.
        revision: of ``path`` on the Hub.
        adapter: a LoRA adapter on it, as for Frozen; by default the one that the policy continues, if any, and none on
            another ``path``.
        folder: where they are kept; by default in ``~/.cache/rap-lightning`` (or ``XDG_CACHE_HOME``). The nodes of a
            cluster must share it.
    """

    gives_any_response = False

    def __init__(
        self, path: str | None = None, revision: str | None = None, folder: str | None = None,
        adapter: str | None = None,
    ) -> None:  # fmt: skip
        if revision is not None and path is None:
            raise ConfigError("reference Stored: revision has no effect without path; give both, or neither.")
        self.frozen = Frozen(path, revision, adapter)
        self.root = Path(folder) if folder is not None else default_root()
        self._store: LogpStore | None = None
        self._config: PolicyConfig | None = None
        self._dtype = torch.float32
        self._sharding: Sharding | None = None
        self._exact = True

    @property
    def is_initial_policy(self) -> bool:
        """True unless another model or adapter was named."""
        return self.frozen.is_initial_policy

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:
        """Load nothing: ``prepare`` does where something is missing."""
        self._config, self._dtype = policy, dtype

    def digest(self, policy: PolicyConfig, initial: str) -> str:
        """Return that of the model which computes what is missing."""
        return self.frozen.digest(policy, initial)

    def shard(self, sharding: Sharding) -> None:
        """Load the model in parts, where one is needed."""
        self._sharding = sharding

    @torch.no_grad()
    def prepare(
        self, policy: Policy, batches: Iterable[tuple[Batch, ...]], *, total: int, fresh: bool, precision: str
    ) -> None:
        """Compute what is missing of this rank's batches, and compare a sample of what is on disk.

        Raises:
            ConfigError: the folder can't be used, or the sample differs from what the model computes.
        """
        store = self._store = self._opened(policy, precision)
        self._exact = self._dtype == torch.float32 and "bf16" not in precision
        device = policy.device
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        silent = ranks and torch.distributed.get_rank() > 0
        live: Live | None = None
        checked, furthest = 0, 0.0
        with ExitStack() as stack:
            bar = stack.enter_context(
                progress(batches, desc="reference log-probabilities", total=total, unit="batch", disable=silent)
            )
            for number, part in ((number, part) for number, batch in enumerate(bar) for part in batch):
                missing = [digest not in store for digest in part.digests]
                # samples are spread over all data, at the first complete batch after each share of them
                sampled = checked < SAMPLE and checked * total <= number * SAMPLE and not any(missing)
                # ranks that hold parts of one model must run it together
                if not most_on_any_rank(int(any(missing) or sampled), device):
                    continue
                if live is None:
                    live = stack.enter_context(self._live(policy, fresh=fresh))
                values = live(part.to(device)).float().cpu()
                if sampled:
                    stored = self.token_logps(policy, part).cpu()
                    self._compare(stored, values, part)
                    sums = sum_by_segment(stored - values, part.segment.cpu(), len(part.lengths))
                    furthest = max(furthest, float(sums.abs().max()))
                    checked += 1
                for digest, lacking, one in zip(
                    part.digests, missing, values.split(part.lengths.tolist()), strict=True
                ):
                    if lacking:
                        store.add(digest, one.numpy())
                store.flush_if_due()
            store.flush()
        if furthest > 0 and not self._exact and not silent:
            warnings.warn(
                f"reference Stored: of {checked} batches computed again, responses differ from what is stored by up to "
                f"{furthest:.2g} nats. They were computed in another layout or batch size, which bfloat16 rounds in "
                "another way; the policy's margins begin that far from 0. Name another --model.reference.folder to "
                "compute them anew.",
                stacklevel=2,
            )
        if ranks:
            torch.distributed.barrier()
        store.refresh()

    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Read [M] float32 nats from disk.

        Raises:
            DataError: a response was not in the data when the run was prepared.
        """
        assert self._store is not None, "prepare comes first"
        try:
            values = [self._store[digest] for digest in batch.digests]
        except KeyError as error:
            raise DataError(
                f"no log-probabilities are stored for a response of pair {batch.pair_ids[0]}: it was not among the "
                "data when the run began. Use the reference Frozen, or AdaptersOff."
            ) from error
        if not values:
            raise ConfigError("the reference Stored has the data's own responses only: use Frozen, or AdaptersOff.")
        device = batch.target.device  # copied without waiting for the forward pass that is under way there
        return torch.from_numpy(np.concatenate(values)).to(device, non_blocking=copies_at_once(device))

    def _opened(self, policy: Policy, precision: str) -> LogpStore:
        assert self._config is not None, "load comes first"
        source = self.frozen.source(self._config)
        key = {
            "weights": weights_digest(source.path, source.revision),
            "dtype": str(self._dtype),
            "precision": precision,
            "attention": str(attention_implementation(policy.causal_lm.config.get_text_config())),
            "device": policy.device.type,
        }
        if source.adapter is not None:
            key["adapter"] = adapter_digest(source.adapter, source.adapter_revision)
        if source.resize_embeddings:  # every added token takes its share of the probability
            key["embeddings"] = str(policy.causal_lm.get_input_embeddings().weight.shape[0])
        for name in ("rope", "quantize"):
            if (value := getattr(source, name)) is not None:
                key[name] = json.dumps(value, sort_keys=True)
        return LogpStore(self.root, key)

    def _compare(self, stored: Tensor, live: Tensor, batch: Batch) -> None:
        difference = float((stored - live).abs().mean())
        assert self._store is not None, "called while it is prepared"
        if not difference <= BOUNDS[self._exact]:
            raise ConfigError(
                f"the log-probabilities stored in {self._store.folder} differ from those of the reference by "
                f"{difference:.2g} nats per token (pair {batch.pair_ids[0]}). Something outside of their key has "
                "changed: remove the folder, and they are computed again."
            )

    @contextmanager
    def _live(self, policy: Policy, *, fresh: bool) -> Iterator[Live]:
        """Provide the reference itself: the policy if it is still the initial one, else a model that is then freed."""
        assert self._config is not None, "load comes first"
        if self.is_initial_policy and self._config.lora is not None:
            yield lambda batch: AdaptersOff().token_logps(policy, batch)
        elif self.is_initial_policy and fresh:
            with evaluating(policy):
                yield policy
        else:
            frozen = copy(self.frozen)
            if self._sharding is not None:
                frozen.shard(self._sharding)
            frozen.load(self._config, self._dtype)
            frozen.to(policy.device)
            yield lambda batch: frozen.token_logps(policy, batch)
            del frozen
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
