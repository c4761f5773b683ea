"""The policy: loading a Hugging Face causal LM, adapters on it, and its response log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError
from rap_lightning.models.logps import Head, sum_by_segment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECKPOINTING_FROM = 1_000_000_000  # parameters


@dataclass
class Lora:
    """A low-rank adapter (peft). Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: module names or a pattern; "all-linear" is every linear layer but the output layer.
        use_dora: decompose weights into magnitude and direction (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
        use_rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora.r must be at least 1, found {self.r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be from 0 to below 1, found {self.dropout}")


@dataclass
class PolicyConfig:
    """Which model is trained, and how it is loaded.

    Args:
        path: a Hugging Face folder or Hub id of a causal LM with a chat template.
        revision: branch, tag or commit on the Hub.
        dtype: of the loaded weights; by default float32, or bfloat16 with ``--trainer.precision bf16-true``.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; transformers' own choice by default.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; by default for
            models of a billion parameters and more.
        dropout: keep the dropout that the model's config asks for. Off by default: it makes policy and reference
            disagree.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
        lora: train a low-rank adapter instead of all weights, e.g. ``{r: 16}``.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool | None = None
    dropout: bool = False
    trust_remote_code: bool = False
    lora: Lora | None = None

    def load_tokenizer(self) -> Any:
        """The tokenizer of ``path``.

        Raises:
            ConfigError: it can't be loaded.
        """
        from transformers import AutoTokenizer

        return _load("tokenizer", self.path, AutoTokenizer, self._source())

    def load_model(self, dtype: torch.dtype) -> Any:
        """The bare causal LM in ``dtype``, dropout off unless asked for.

        Raises:
            ConfigError: it can't be loaded.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        source = self._source()
        config = _load("model config", self.path, AutoConfig, source)
        if not self.dropout:
            silence_dropout(config)
        options = source | {"config": config, "dtype": dtype, "use_safetensors": True}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        model = _load("model", self.path, AutoModelForCausalLM, options)
        if not self.dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        return model

    def build(self, dtype: torch.dtype) -> Policy:
        """The policy to train: adapters attached, checkpointing set, in training mode."""
        model = self.load_model(dtype)
        size = sum(p.numel() for p in model.parameters())
        checkpoint = size >= CHECKPOINTING_FROM if self.gradient_checkpointing is None else self.gradient_checkpointing
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            model = _with_adapter(model, self.lora)
        policy = Policy(model)
        policy.train()
        return policy

    def resolve_dtype(self) -> torch.dtype:
        """``dtype``, or the default one of the precision plugin that is active in ``configure_model``."""
        return DTYPES[self.dtype] if self.dtype else torch.get_default_dtype()

    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class Policy(nn.Module):
    """A causal LM as a function from a batch to response log-probabilities.

    The head runs inside ``forward``, so that sharding strategies gather its weight as they do for any module.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, beneath an adapter if there is one."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether a peft adapter is attached."""
        return hasattr(self.model, "peft_config")

    def forward(self, batch: Batch, *, collisions: bool = False) -> Tensor:
        """Log-probability of each response token, [M] float32 nats; with ``collisions``, [2, M]: log Σ_v p(v)² below.

        The second row has no gradient, and costs the head's forward pass once more.
        """
        lm = self.causal_lm
        # no attention mask: padding stands on the right, where causality hides it, and without a mask attention takes
        # its fastest path
        output = lm.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predict_from]
        head = Head.of(lm)
        token_logps = head.token_logps(hidden, batch.target)
        return torch.stack((token_logps, head.log_collisions(hidden.detach()))) if collisions else token_logps

    def logps(self, batch: Batch) -> Tensor:
        """Log-probability of each response, [2B] float32 nats."""
        return sum_by_segment(self(batch), batch.segment, len(batch.lengths))


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """Evaluation mode, without dropout, for the length of a block."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


def check_head(policy: Policy) -> float:
    """Largest difference in nats between our log-probabilities and those of the model's own logits.

    Eight tokens are enough to find a head that does more than ours knows of.

    Raises:
        ConfigError: the two differ by more than rounding.
    """
    device = next(policy.parameters()).device
    ids = torch.arange(8, device=device)[None] % policy.causal_lm.config.get_text_config().vocab_size
    places = torch.arange(7, device=device)
    batch = Batch(
        input_ids=ids, position_ids=torch.arange(8, device=device)[None], attention_mask=torch.ones_like(ids),
        predict_from=places, target=ids[0, 1:], segment=places * 0, lengths=places[:1], rewards=places[:0],
        origin=places[:0], weights=places[:0], step_pairs=0, pair_ids=(), goals=(),
    )  # fmt: skip
    with torch.no_grad(), evaluating(policy):
        ours = policy(batch)
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1]
        theirs = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    difference = float((ours - theirs).abs().max())
    bound = 1e-3 if ours.dtype == logits.dtype else 0.25  # bf16 logits are rounded to 2^-8 of their size
    if not difference <= bound:
        raise ConfigError(
            f"{type(policy.causal_lm).__name__}: response log-probabilities differ by {difference:.3g} nats from those "
            "of the model's own logits, so its output layer does something that is not known here. "
            "Please report the model."
        )
    return difference


def silence_dropout(config: Any) -> None:
    """Set every dropout probability of a model config, and of the configs inside it, to 0."""
    for name, value in list(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            silence_dropout(value)


def _with_adapter(model: Any, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=lora.target_modules, use_dora=lora.use_dora, use_rslora=lora.use_rslora,
    )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error


def _load(what: str, path: str, factory: Any, options: dict[str, Any]) -> Any:
    try:
        return factory.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "the folder exists, but" if Path(path).is_dir() else "not a folder here, and"
        raise ConfigError(
            f"--model.policy.path {path}: {where} no {what} could be loaded from it: {reason} "
            "Expected a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a Hub id."
        ) from error
