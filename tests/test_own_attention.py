"""``attn_implementation``: the model's own attention, honoured where it is used and refused where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from transformers import modeling_flash_attention_utils as flash

from conftest import called
from rap_lightning.distributed.sharded_load import blank_model
from rap_lightning.errors import ConfigError
from rap_lightning.models.attention import packs_itself
from rap_lightning.models.model_checks import check_sharing
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.training.checks import check_attention, check_flash
from test_layouts import assert_same_gradients, batch_of, conversations, loss_and_gradients, naive, policy_of


@pytest.mark.parametrize(
    ("asked", "layout", "allowed"),
    [
        (None, "tree", True), (None, "packed", True), ("eager", "padded", True), ("flash_attention_2", "padded", True),
        ("flash_attention_2", "packed", True), ("flash_attention_3", "packed", True),
        ("kernels-community/flash-attn2", "packed", True), ("sdpa", "packed", False), ("eager", "tree", False),
        ("flash_attention_2", "tree", False), ("flex_attention", "packed", False),
    ],
)  # fmt: skip
def test_an_attention_that_the_layout_replaces_is_refused(asked: str | None, layout: str, allowed: bool) -> None:
    config = PolicyConfig("any", attn_implementation=asked)
    if allowed:
        check_attention(config, layout)
        return
    with pytest.raises(ConfigError, match=f"attn_implementation {asked} has no effect with --data.layout {layout}"):
        check_attention(config, layout)


def test_fit_refuses_it_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.policy.path", str(tmp_path / "none"), "--data.source", str(tmp_path / "nothing")]
    assert called("fit", *options, "--model.policy.attn_implementation", "eager") == 2
    assert "attn_implementation eager has no effect with --data.layout tree" in capsys.readouterr().err


def test_flash_attention_is_refused_on_a_cpu_and_in_float32() -> None:
    config, cuda = PolicyConfig("any", attn_implementation="flash_attention_2"), torch.device("cuda")
    mixed = MixedPrecision("bf16-mixed", "cuda")
    with pytest.raises(ConfigError, match="flash_attention_2 needs a GPU, and the run is on a CPU"):
        check_flash(config, torch.device("cpu"), mixed)
    with pytest.raises(ConfigError, match="computes in half precision, and --trainer"):
        check_flash(config, cuda, Precision())
    check_flash(config, cuda, mixed)
    check_flash(PolicyConfig("any", attn_implementation="flash_attention_2", dtype="bfloat16"), cuda, Precision())
    check_flash(PolicyConfig("any", attn_implementation="sdpa"), torch.device("cpu"), Precision())


@pytest.mark.parametrize("attention", ["flash_attention_2", "nothing_like_it"])
def test_a_sharded_load_names_an_attention_that_the_machine_lacks(attention: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=rf"attn_implementation {attention}: this model or this machine has no such"):
        blank_model(PolicyConfig(str(tiny), attn_implementation=attention), torch.float32)


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What flash-attn 2 computes, by its formula: sequences one after the other, a window of left keys."""
    assert cu_seqlens_q.dtype == torch.int32
    assert causal
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    outs = []
    for start, stop in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        group = q.shape[1] // k.shape[1]
        key, value = (x[start:stop].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("thd,uhd->htu", q[start:stop], key) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        index = torch.arange(stop - start)
        hidden = index > index[:, None]
        if window_size[0] >= 0:
            hidden |= index[:, None] - index > window_size[0]
        outs.append(torch.einsum("htu,uhd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    return torch.cat(outs)


def flash_attn_func(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
    lengths = torch.tensor([0, q.shape[1]], dtype=torch.int32)
    out = flash_attn_varlen_func(q[0], k[0], v[0], lengths, lengths, q.shape[1], q.shape[1], **options)
    return out[None]


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own code around flash-attn, with that package's two functions replaced."""
    for name, value in {
        "_loaded_implementation": "flash_attention_2", "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
    }.items():  # fmt: skip
        monkeypatch.setattr(flash, name, value)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2"])
def test_packed_sequences_reach_the_models_flash_attention_by_their_lengths(
    architecture: str, checkpointing: bool, flash_attn: None, true_float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(architecture, torch.float64, checkpointing=checkpointing)
    examples = conversations(goals_of_one=False)
    policy.causal_lm.set_attn_implementation("eager")
    loss, gradients = loss_and_gradients(policy, naive(policy.model, examples))
    config = policy.causal_lm.config
    monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2")
    assert check_sharing(policy) is None
    assert policy.attention[0] == "flash_attention_2 for packed"
    # neither looks for restarts of position ids, which waits for the device
    monkeypatch.setattr(flash, "_is_packed_sequence", lambda *args: pytest.fail("positions were searched"))
    batch, tree = batch_of("packed", examples), batch_of("tree", examples)
    assert batch.forest is not None
    assert tree.forest is not None
    assert packs_itself(config, batch.forest)
    assert not packs_itself(config, tree.forest)
    for one in (batch, tree):
        ours, grads = loss_and_gradients(policy, policy.logps(one))
        assert abs(float(ours - loss)) <= 1e-10 * abs(float(loss))
        assert_same_gradients(grads, gradients, 1e-10)


def test_a_flash_attention_that_mixes_packed_sequences_is_refused(
    flash_attn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("Llama", torch.float32)
    monkeypatch.setattr(policy.causal_lm.config, "_attn_implementation", "flash_attention_2")

    def as_one(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> torch.Tensor:
        lengths = torch.tensor([0, len(q)], dtype=torch.int32)
        options |= {"max_seqlen_q": len(q), "max_seqlen_k": len(q)}
        return flash_attn_varlen_func(q, k, v, lengths, lengths, **options)

    monkeypatch.setattr(flash, "_flash_varlen_fn", as_one)
    with pytest.raises(ConfigError, match="flash_attention_2: packed sequences change each other's log-probabilities"):
        check_sharing(policy)
