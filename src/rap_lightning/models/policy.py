"""The policy: loading a Hugging Face causal LM, adapters on it, and its response log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch, Forest
from rap_lightning.errors import ConfigError
from rap_lightning.models import adapters, alterations
from rap_lightning.models.activation_offload import activations_on_host
from rap_lightning.models.attention import attention_as_now, declared_windows, forest_attention
from rap_lightning.models.logps import Head, sum_by_segment
from rap_lightning.preferences.chat_template import restore_own_template
from rap_lightning.preferences.sources import refuse_no_model

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
        activation_offloading: keep activations in pinned host memory between forward and backward pass; for GPUs that
            are short of memory, slower unless the bus is fast. Needs a GPU.
        compile: compile the decoder layers with torch.compile, once for all lengths. Pays after some steps: the first
            ones wait for the compiler.
        dropout: keep the dropout that the model's config asks for. Off by default: it makes policy and reference
            disagree.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
        lora: train a low-rank adapter instead of all weights, e.g. ``{r: 16}``.
        adapter: go on training this LoRA adapter, a peft folder or Hub id (safetensors only), made for ``path``. Its
            rank and modules are its own, so there is no ``lora`` beside it. The reference is by default the adapter
            as it was loaded.
        adapter_revision: branch, tag or commit of ``adapter`` on the Hub.
        quantize: hold the base model's weights in 4 bits (QLoRA, with bitsandbytes), of the type nf4 or fp4; needs an
            adapter to train. They are multiplied in ``dtype``: set that to bfloat16 on a GPU.
        freeze: regular expressions; a trained parameter whose name one of them is found in stays as it is, e.g.
            ``['embed_tokens', 'layers\\.[0-5]\\.']``.
        rope: scale rotary positions for longer texts than the model was trained on, e.g. ``{rope_type: yarn, factor:
            4.0}``; the keys are those of rope_parameters in transformers. A reference that is where the policy began is
            scaled alike; one that is another model (``reference.path``) is as its own config has it.
        resize_embeddings: add rows for tokens that the tokenizer has and the model hasn't, each the mean of the
            others. Only on request: without it such a tokenizer is refused.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool | None = None
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

    def __post_init__(self) -> None:
        if self.activation_offloading and not torch.cuda.is_available():
            raise ConfigError(
                "--model.policy.activation_offloading has no effect without a GPU, whose memory it would spare. "
                "Leave it out, or use --model.policy.gradient_checkpointing true."
            )
        alterations.check_patterns(self.freeze)
        if self.rope is not None:
            alterations.check_rope(self.rope)
        if self.quantize is not None:
            alterations.check_four_bit()
        if self.lora is not None and self.adapter is not None:
            raise ConfigError(
                f"--model.policy.lora has no effect beside --model.policy.adapter {self.adapter}: rank, alpha and "
                "modules are those of the adapter. Remove one of the two."
            )
        if self.adapter_revision is not None and self.adapter is None:
            raise ConfigError(
                "--model.policy.adapter_revision has no effect without --model.policy.adapter; remove it."
            )
        if self.resize_embeddings and (self.adapts or self.quantize):
            raise ConfigError(
                "--model.policy.resize_embeddings needs all weights to be trained: with an adapter the new rows would "
                "stay as they are. Train without lora, adapter and quantize, or leave it out."
            )

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, new or continued, instead of the model's own weights."""
        return self.lora is not None or self.adapter is not None

    def check_trainable(self) -> None:
        """Raise ConfigError where nothing could be trained."""
        if self.quantize is not None and not self.adapts:
            raise ConfigError(
                f"--model.policy.quantize {self.quantize}: 4-bit weights can't be trained. Set --model.policy.lora.r "
                "(QLoRA), or leave quantize out."
            )

    def load_tokenizer(self) -> Any:
        """The tokenizer of ``path``.

        Raises:
            ConfigError: it can't be loaded.
        """
        from transformers import AutoTokenizer

        return restore_own_template(_load("tokenizer", self.path, AutoTokenizer, self._source()))

    def load_model(self, dtype: torch.dtype) -> Any:
        """The bare causal LM in ``dtype``, dropout off unless asked for.

        Raises:
            ConfigError: it can't be loaded.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        if adapters.is_adapter(self.path):
            raise ConfigError(
                f"--model.policy.path {self.path} is an adapter. Give the model it was made for as "
                f"--model.policy.path, and --model.policy.adapter {self.path}."
            )
        source = self._source()
        config = _load("model config", self.path, AutoConfig, source)
        if self.rope is not None:
            alterations.scale_rope(config, self.rope, self.path)
        if not self.dropout:
            silence_dropout(config)
        options = source | {"config": config, "dtype": dtype, "use_safetensors": True}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantize is not None:
            options["quantization_config"] = alterations.four_bit(self.quantize, dtype)
        try:
            model = _load("model", self.path, AutoModelForCausalLM, options)
        except ConfigError as error:
            if self.attn_implementation and re.search("attn|attention", str(error), re.IGNORECASE):
                raise ConfigError(
                    f"--model.policy.attn_implementation {self.attn_implementation}: this model or this machine has no "
                    f"such attention: {str(error.__cause__).splitlines()[0]} Leave it out for transformers' own choice."
                ) from error
            raise
        if not self.dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        tokens = len(self.load_tokenizer())
        if self.resize_embeddings:
            alterations.resize_embeddings(model, tokens, self.path)
        else:
            alterations.refuse_too_few_embeddings(model, tokens, self.path)
        return model

    def load_initial(self, dtype: torch.dtype) -> Any:
        """The causal LM that training starts from: with the adapter that it continues, if any.

        Raises:
            ConfigError: it can't be loaded.
        """
        model = self.load_model(dtype)
        if self.adapter is None:
            return model
        return adapters.attach(model, self.adapter, self.adapter_revision, self.path, dropout=self.dropout)

    def build(self, dtype: torch.dtype, model: Any = None) -> Policy:
        """The policy to train: adapters attached, checkpointing set, in training mode.

        ``model`` is what ``load_initial`` gives, where it is there already.
        """
        model = self.load_initial(dtype) if model is None else model
        size = model.num_parameters()
        checkpoint = size >= CHECKPOINTING_FROM if self.gradient_checkpointing is None else self.gradient_checkpointing
        if checkpoint:
            causal_lm = model.get_base_model() if self.adapter is not None else model
            config = causal_lm.config.get_text_config()
            # layers computed again in the backward pass must find the attention that their forward pass had
            contexts = lambda: (nullcontext(), attention_as_now(config))  # noqa: E731
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        if self.lora is not None:
            model = _with_adapter(model, self.lora)
        if self.freeze:
            alterations.freeze(model, self.freeze)
        policy = Policy(model, offload=self.activation_offloading)
        policy.checkpoints = checkpoint
        if self.compile:
            compile_layers(policy)
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

    def __init__(self, model: Any, *, offload: bool = False) -> None:
        super().__init__()
        self.model, self.offload = model, offload
        self.shares = True  # until check_sharing finds otherwise
        self.checkpoints = False  # whether activations are computed again in the backward pass
        self.computes_on: torch.device | None = None  # where sharded weights can live elsewhere

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, beneath an adapter if there is one."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether a peft adapter is attached."""
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.computes_on or next(self.parameters()).device

    def gathered(self, function: Callable[[], Tensor]) -> Tensor:
        """What ``function`` gives while the weights outside of the layers are whole, where they are sharded."""
        return self(None, inside=function)  # type: ignore[no-any-return]

    def forward(
        self, batch: Batch | None, *, collisions: bool = False, inside: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Log-probability of each response token, [M] float32 nats; with ``collisions``, [2, M]: log Σ_v p(v)² below.

        The second row has no gradient, and costs the head's forward pass once more. ``inside`` is called instead, for
        :meth:`gathered`.
        """
        if inside is not None:
            return inside()
        assert batch is not None, "a batch, or something to call"
        with activations_on_host() if self.offload and torch.is_grad_enabled() else nullcontext():
            hidden = self._all_hidden(batch)
        hidden, head = hidden.flatten(0, 1)[batch.predict_from], Head.of(self.causal_lm)
        token_logps = head.token_logps(hidden, batch.target)
        return torch.stack((token_logps, head.log_collisions(hidden.detach()))) if collisions else token_logps

    def _all_hidden(self, batch: Batch) -> Tensor:
        """[R, T, D], by whichever road the batch's layout and the model allow."""
        if batch.forest is None:
            # no attention mask: padding stands on the right, where causality hides it, and without a mask attention
            # takes its fastest path
            return self._hidden(batch.input_ids, batch.position_ids)
        if self.shares:
            with forest_attention(self.causal_lm.config.get_text_config()):
                return self._hidden(batch.input_ids, batch.position_ids, forest=batch.forest)
        return self._path_by_path(batch, batch.forest)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Tensor:
        """[R, T, D]."""
        body = self.causal_lm.base_model
        output: Tensor = body(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **options
        ).last_hidden_state
        return output

    def _path_by_path(self, batch: Batch, forest: Forest) -> Tensor:
        """[1, T, D]: each path through the model on its own; what paths share is computed for each of them."""
        hidden: Tensor | None = None
        paths = list(forest.paths)
        if self.computes_on is not None:  # ranks meet in every layer, so each must go through them as often
            paths += paths[-1:] * (most_on_any_rank(len(paths), self.device) - len(paths))
        for path in paths:
            places = torch.cat([torch.arange(*span, device=batch.input_ids.device) for span in path])
            one = self._hidden(batch.input_ids[:, places], batch.position_ids[:, places])
            if hidden is None:
                hidden = one.new_zeros(1, batch.input_ids.shape[1], one.shape[-1])
            hidden = hidden.index_copy(1, places, one)
        assert hidden is not None, "a batch has at least one response"
        return hidden

    def logps(self, batch: Batch) -> Tensor:
        """Log-probability of each response, [2B] float32 nats."""
        return sum_by_segment(self(batch), batch.segment, len(batch.lengths))


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The blocks that the model repeats, as its own code names them for sharding."""
    names = set(policy.causal_lm._no_split_modules or [])
    return [module for module in policy.modules() if type(module).__name__ in names]


def compile_layers(policy: Policy) -> None:
    """Compile every decoder layer; they run the same code, so the compiler works once.

    Lengths are symbols in what is compiled, so that no batch compiles anew. Attention over a forest stays outside. Of a
    layer that is computed again in the backward pass its parts are compiled, each on its own: the compiler does not
    take the context in which that happens.

    Raises:
        ConfigError: the model names no layers.
    """
    layers = decoder_layers(policy)
    if not layers:
        raise ConfigError(
            f"--model.policy.compile: {type(policy.causal_lm).__name__} doesn't say which of its modules are layers. "
            "Leave it out."
        )
    for layer in layers:
        again = getattr(layer, "gradient_checkpointing", False)
        for part in layer.children() if again else [layer]:
            part.compile(dynamic=True)


def most_on_any_rank(count: int, device: torch.device) -> int:
    """The largest ``count`` of all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


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
    device = policy.device
    ids = torch.arange(8, device=device)[None] % policy.causal_lm.config.get_text_config().vocab_size
    places = torch.arange(7, device=device)
    batch = Batch(
        input_ids=ids, position_ids=torch.arange(8, device=device)[None], attention_mask=torch.ones_like(ids),
        forest=None, predict_from=places, target=ids[0, 1:], segment=places * 0, lengths=places[:1],
        rewards=places[:0], origin=places[:0], weights=places[:0], step_pairs=0, loss_weights=places[:0],
        step_weight=0.0, digests=(), pair_ids=(), goals=(),
    )  # fmt: skip
    with torch.no_grad(), evaluating(policy):
        ours = policy(batch)
        logits = policy.gathered(lambda: policy.causal_lm(input_ids=ids, use_cache=False).logits)[0, :-1]
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


def check_sharing(policy: Policy) -> str | None:
    """Whether the model gives short sequences the same log-probabilities laid out as a forest as one at a time.

    Sets ``policy.shares``. Returns why not, or ``None`` where it does.
    """
    config = policy.causal_lm.config.get_text_config()
    device = policy.device
    declared = declared_windows(config)
    long = max([w for w in declared if w <= 512], default=0)  # past a window, if that takes no time
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (4, long + 40), generator=generator).tolist()
    examples = [
        Example("", 0, None, (0.0, 0.0), ids[0][: long + 24], ids[1][:9], ids[2][:7]),
        Example("", 0, None, (0.0, 0.0), ids[0][: long + 20] + ids[1][:6], ids[2][:5], ids[3][:11]),
        Example("", 0, None, (0.0, 0.0), ids[3][:20], ids[0][:5], ids[1][:8]),
    ]
    plan = BatchPlan((0, 1, 2), (1.0,) * 3, 3, ((0, 1, 2),))
    batch = lay_out(LAYOUTS["tree"], examples, plan, pad_id=0).to(device)
    assert batch.forest is not None, "a tree"
    windows: set[int] = set()
    exact = False

    def shared() -> Tensor:
        nonlocal exact
        assert batch.forest is not None, "a tree"
        with forest_attention(config, windows):
            hidden = policy._hidden(batch.input_ids, batch.position_ids, forest=batch.forest)
        exact = hidden.dtype == torch.float32
        return Head.of(policy.causal_lm).token_logps(hidden.flatten(0, 1)[batch.predict_from], batch.target)

    with torch.no_grad(), evaluating(policy):
        policy.shares = False
        apart = policy(batch)
        try:
            together = policy.gathered(shared)
        except Exception as error:  # whatever the model's own code makes of an attention it doesn't know
            return f"its attention can't be replaced ({type(error).__name__})"
    difference = float((together - apart).abs().max())
    bound = 1e-3 if exact else 0.25  # bf16 rounds logits to 2^-8 of their size
    policy.shares = difference <= bound and declared <= windows
    if policy.shares:
        return None
    if difference <= bound:
        return f"it attends within {max(declared - windows):,} tokens in a way of its own"
    return f"sequences side by side change each other's log-probabilities, by up to {difference:.2g} nats"


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
    refuse_no_model("--model.policy.path", path)
    try:
        return factory.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "the folder exists, but" if Path(path).is_dir() else "not a folder here, and"
        raise ConfigError(
            f"--model.policy.path {path}: {where} no {what} could be loaded from it: {reason} "
            "Expected a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a Hub id."
        ) from error
