"""Which model is trained and how it is loaded: options, checks between them, and :meth:`PolicyConfig.build`.

Loading goes from :meth:`PolicyConfig.load_model` (a bare causal LM) over ``load_initial`` (with the adapter that
training continues) to ``build`` (with a new adapter, frozen parameters, gradient checkpointing and compilation).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rap_lightning.errors import ConfigError, first_line, join_some
from rap_lightning.models import adapters, alterations
from rap_lightning.models.attention import attention_as_now
from rap_lightning.models.policy import Policy, compile_layers, decoder_layers
from rap_lightning.models.pretrained import OtherWeights, check_config_names, load_pretrained, load_weights
from rap_lightning.models.router_loss import check_router_loss
from rap_lightning.models.token_strength import strength_as_now
from rap_lightning.preferences.chat_template import read_tokenizer, restore_own_template

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
        if not self.alpha > 0:  # 0 would train nothing
            raise ConfigError(f"lora.alpha must be above 0, found {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be from 0 to below 1, found {self.dropout}")


@dataclass
class PolicyConfig:
    """Which model is trained, and how it is loaded.

    Args:
        path: a Hugging Face folder or Hub id of a causal LM with a chat template.
        revision: branch, tag or commit on the Hub.
        dtype: of the loaded weights; by default float32, or bfloat16 with ``--trainer.precision bf16-true``. On a GPU
            with ``bf16-mixed``, weights that are never trained and computed with in bfloat16 anyway (an adapter's base
            model; a live reference beside it, or under FSDP2) are bfloat16 by default.
        attn_implementation: the model's own attention, which computes ``--data.layout padded`` ("sdpa", "eager", ...)
            and, where it is flash attention ("flash_attention_2", "flash_attention_3"), ``packed``; transformers' own
            choice by default. ``tree`` has attention of its own.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; by default for
            models of a billion parameters and more. A number n does so in every n-th layer only: 2 keeps half of the
            activations and computes half of them again.
        activation_offloading: keep activations in pinned host memory between forward and backward pass; for GPUs that
            are short of memory, slower unless the bus is fast. Needs a GPU.
        compile: compile the decoder layers with torch.compile, once for all lengths. It pays only after some steps:
            the first ones wait for the compiler.
        dropout: keep the dropout of the model's config. Off by default: it makes policy and reference disagree.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
        lora: train a low-rank adapter instead of all weights, e.g. ``{r: 16}``.
        adapter: continue training this LoRA adapter, a peft folder or Hub id (safetensors only), made for ``path``. It
            has its own rank and modules, so ``lora`` can't be set too. The reference is by default the adapter as it
            was loaded.
        adapter_revision: branch, tag or commit of ``adapter`` on the Hub.
        quantize: hold the base model's weights in 4 bits (QLoRA, with bitsandbytes), of the type nf4 or fp4; needs an
            adapter to train. They are multiplied in ``dtype``: set that to bfloat16 on a GPU.
        freeze: regular expressions; a parameter is not trained if its name contains a match, e.g. ``['embed_tokens',
            'layers\\.[0-5]\\.']``.
        rope: scale rotary positions for longer texts than the model was trained on, e.g. ``{rope_type: yarn, factor:
            4.0}``; the keys are those of rope_parameters in transformers. A reference that is the initial policy is
            scaled alike; another model (``reference.path``) is used as its own config says.
        resize_embeddings: add rows for tokens that the tokenizer has and the model lacks, each the mean of the others.
            Only on request: without it such a tokenizer is refused.
        router_aux_loss: of a mixture of experts, weight of its load-balancing loss in the loss of a step; by default it
            is not computed. The loss is that of each forward pass, as in transformers; shared prefixes count once for
            each response. Logged as loss/router_aux, without the weight.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool | int | None = None
    activation_offloading: bool = False
    compile: bool = False
    dropout: bool = False
    trust_remote_code: bool = False
    lora: Lora | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    quantize: Literal["nf4", "fp4"] | None = None
    freeze: list[str] = field(default_factory=list)
    rope: dict[str, Any] | None = None
    resize_embeddings: bool = False
    router_aux_loss: float | None = None

    def __post_init__(self) -> None:
        if self.activation_offloading and not torch.cuda.is_available():
            raise ConfigError(
                "--model.policy.activation_offloading has no effect without a GPU, whose memory it would save. "
                "Leave it out, or use --model.policy.gradient_checkpointing true."
            )
        if self.gradient_checkpointing is not None and self.gradient_checkpointing < 0:
            raise ConfigError(
                "--model.policy.gradient_checkpointing is true, false, or n for every n-th layer; found "
                f"{self.gradient_checkpointing}"
            )
        alterations.check_patterns(self.freeze)
        if self.rope is not None:
            alterations.check_rope(self.rope)
        if self.quantize is not None:
            alterations.check_four_bit()
        if self.lora is not None and self.adapter is not None:
            raise ConfigError(
                f"--model.policy.lora has no effect with --model.policy.adapter {self.adapter}, which has its own "
                "rank, alpha and modules. Remove one of the two."
            )
        if self.adapter_revision is not None and self.adapter is None:
            raise ConfigError(
                "--model.policy.adapter_revision has no effect without --model.policy.adapter; remove it."
            )
        if self.resize_embeddings and (self.adapts or self.quantize):
            raise ConfigError(
                "--model.policy.resize_embeddings needs all weights to be trained: with an adapter the new rows would "
                "never change. Train without lora, adapter and quantize, or leave it out."
            )

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, new or continued, instead of the model's own weights."""
        return self.lora is not None or self.adapter is not None

    def check_trainable(self) -> None:
        """Raise ConfigError where there is nothing to train."""
        if self.quantize is not None and not self.adapts:
            raise ConfigError(
                f"--model.policy.quantize {self.quantize}: 4-bit weights can't be trained. Set --model.policy.lora.r "
                "(QLoRA), or leave quantize out."
            )

    def hub_options(self) -> dict[str, Any]:
        """Return what every ``from_pretrained`` of ``path`` is given."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the adapter that is continued, where it has one, or else that of ``path``.

        Raises:
            ConfigError: it can't be loaded.
        """
        folder = None if self.adapter is None else adapters.adapter_folder(self.adapter, self.adapter_revision)
        own = folder is not None and adapters.has_tokenizer(folder)
        load, base = read_tokenizer, self.hub_options()
        options = {"trust_remote_code": self.trust_remote_code} if own else base
        tokenizer: PreTrainedTokenizerBase = load_pretrained(
            "tokenizer", str(folder) if own else self.path, load, options
        )
        if folder is not None and not own:
            tokenizer.chat_template = adapters.own_template(folder) or tokenizer.chat_template
        elif own and tokenizer.chat_template is None:
            tokenizer.chat_template = load_pretrained("tokenizer", self.path, load, base).chat_template
        restored: PreTrainedTokenizerBase = restore_own_template(tokenizer)
        return restored

    def adapter_with_tokenizer(self) -> Path | None:
        """Return the folder of the adapter that is continued, where it holds a tokenizer or a chat template."""
        if self.adapter is None:
            return None
        folder = adapters.adapter_folder(self.adapter, self.adapter_revision)
        return folder if adapters.has_tokenizer(folder) or adapters.own_template(folder) else None

    def load_config(self) -> PretrainedConfig:
        """Load the model's config, with dropout off unless asked for.

        Raises:
            ConfigError: it can't be loaded.
        """
        from transformers import AutoConfig

        config: PretrainedConfig = load_pretrained(
            "model config", self.path, AutoConfig.from_pretrained, self.hub_options()
        )
        if defaults := check_config_names(self.path, config):
            warnings.warn(
                f"{self.path}/config.json names no {join_some([one.split()[0] for one in defaults])}: the default of "
                f"{type(config).__name__} is used ({join_some(defaults)})",
                stacklevel=2,
            )
        if not self.dropout:
            silence_dropout(config)
        return config

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Load the bare causal LM in ``dtype``, with dropout off unless asked for.

        Raises:
            ConfigError: it can't be loaded.
        """
        from transformers import AutoModelForCausalLM

        if adapters.is_adapter(self.path):
            raise ConfigError(
                f"--model.policy.path {self.path} is an adapter. Give the model it was made for as "
                f"--model.policy.path, and --model.policy.adapter {self.path}."
            )
        config = self.load_config()
        if self.rope is not None:
            alterations.scale_rope(config, self.rope, self.path)
        options = self.hub_options() | {"config": config, "dtype": dtype}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantize is not None:
            options["quantization_config"] = alterations.four_bit(self.quantize, dtype)
        load = partial(load_weights, AutoModelForCausalLM, "--model.policy.path", None)
        try:
            model: PreTrainedModel = load_pretrained("model", self.path, load, options)
        except OtherWeights:
            raise
        except ConfigError as error:
            if self.attn_implementation and re.search("attn|attention", str(error), re.IGNORECASE):
                raise self.no_such_attention(error.__cause__) from error
            raise
        if not self.dropout:
            silence_dropout_layers(model)
        tokens = len(self.load_tokenizer())
        if self.adapter is not None:
            rows = adapters.embedding_rows(adapters.adapter_folder(self.adapter, self.adapter_revision))
            if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(rows, mean_resizing=False)  # `attach` fills them from the adapter
        if self.resize_embeddings:
            alterations.resize_embeddings(model, tokens, self.path)
        else:
            alterations.refuse_too_few_embeddings(model, tokens, self.path, self.adapter)
        return model

    def no_such_attention(self, error: BaseException | None) -> ConfigError:
        """Return the error to raise where transformers refuses ``attn_implementation``."""
        reason = first_line(error)
        return ConfigError(
            f"--model.policy.attn_implementation {self.attn_implementation}: this model or this machine has no "
            f"such attention: {reason} Leave it out for transformers' own choice."
        )

    def load_initial(self, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
        """Load the causal LM that training starts from: with the adapter that it continues, if any.

        Raises:
            ConfigError: it can't be loaded.
        """
        model = self.load_model(dtype)
        if self.adapter is None:
            return model
        return adapters.attach(model, self.adapter, self.adapter_revision, self.path, dropout=self.dropout)

    def build(self, dtype: torch.dtype, model: PreTrainedModel | PeftModel | None = None) -> Policy:
        """Return the policy to train, in training mode; ``model`` is what ``load_initial`` returned, if called."""
        model = self.load_initial(dtype) if model is None else model
        every = self.gradient_checkpointing
        if every is None:
            every = model.num_parameters() >= CHECKPOINTING_FROM
        if every:
            _checkpoint_activations(model.get_base_model() if self.adapter is not None else model, int(every))
        if self.lora is not None:
            model = _with_new_adapter(model, self.lora)
        if self.freeze:
            alterations.freeze(model, self.freeze)
        policy = Policy(model, offload=self.activation_offloading)
        policy.checkpoints = bool(every)
        if self.router_aux_loss is not None:
            check_router_loss(policy.causal_lm.config, self.router_aux_loss, compiles=self.compile)
            policy.balances = True
        if self.compile:
            compile_layers(policy)
        policy.train()
        return policy

    def resolve_dtype(self) -> torch.dtype:
        """Return ``dtype``, or the default one of the precision plugin that is active in ``configure_model``."""
        return DTYPES[self.dtype] if self.dtype else torch.get_default_dtype()

    def loading_dtypes(
        self, default: torch.dtype, *, mixed: bool, gather: torch.dtype | None
    ) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes in which the policy and a live reference are loaded.

        Weights that no optimizer updates need no float32 copy if the policy computes with the same weights in bfloat16:
        then policy and reference agree to the last bit as before. A policy that is trained in full and not sharded
        computes with some float32 weights (embeddings, norms), and so must its reference.

        Args:
            default: what :meth:`resolve_dtype` returns.
            mixed: whether the run is bf16-mixed on an accelerator.
            gather: dtype in which a sharding strategy gathers weights, if it changes it.
        """
        if self.dtype is not None or not mixed:
            return default, default
        # peft keeps the adapter itself in float32. DoRA divides by norms of the base's weights: in bfloat16 they would
        # be rounded, and the policy would not start as its reference.
        if self.adapts and not (self.lora is not None and self.lora.use_dora):
            return torch.bfloat16, torch.bfloat16
        return default, gather or default


def _checkpoint_activations(causal_lm: PreTrainedModel, every: int) -> None:
    """Compute the activations of every n-th layer again in the backward pass.

    Raises:
        ConfigError: the model's code has no switch for each layer.
    """
    config = causal_lm.config.get_text_config()

    # The forward pass runs within `forest_attention` and at the batch's strengths, and the recomputation long after
    # those blocks have ended: it must find the attention and the strengths that its forward pass had.
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _both(attention_as_now(config), strength_as_now())

    newer = "activation_checkpointing_enable"  # from transformers 5.24 on, where the other name warns
    enable = getattr(causal_lm, newer if hasattr(causal_lm, newer) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False, "context_fn": contexts})
    if every == 1:
        return
    layers = decoder_layers(causal_lm)
    if not layers or not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise ConfigError(
            f"--model.policy.gradient_checkpointing {every}: {type(causal_lm).__name__} checkpoints all of its layers "
            "or none. Use true."
        )
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0  # type: ignore[assignment]


@contextmanager
def _both(one: AbstractContextManager[None], other: AbstractContextManager[None]) -> Iterator[None]:
    with one, other:
        yield


def silence_dropout(config: Any) -> None:
    """Set every dropout probability of a model config, and of the configs inside it, to 0."""
    for name, value in list(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            silence_dropout(value)


def silence_dropout_layers(model: nn.Module) -> None:
    """Set the probability of every dropout layer to 0: some models don't read it from their config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _with_new_adapter(model: PreTrainedModel | PeftModel, lora: Lora) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=lora.target_modules, use_dora=lora.use_dora, use_rslora=lora.use_rslora,
    )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error
