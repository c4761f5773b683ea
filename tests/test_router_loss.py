"""The load-balancing loss of a mixture of experts: transformers' own on the padded batch, whatever the layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from conftest import build, make_tokenizer, make_trainer, sgd
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.errors import ConfigError
from rap_lightning.losses import SimPO
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.training.checks import check_router_strategy
from rap_lightning.training.schedules import ConstantWithWarmup
from test_fit import logged
from test_layouts import conversations, policy_of

ROUTED = ["Mixtral", "Qwen3Moe", "GptOss"]


def batch_of(layout: str) -> Any:
    pairs = conversations(goals_of_one=True)
    numbers = tuple(range(len(pairs)))
    return lay_out(LAYOUTS[layout], pairs, BatchPlan(numbers, (1.0,) * len(pairs), len(pairs), (numbers,)), 0)


@pytest.mark.parametrize("architecture", ROUTED)
def test_every_layout_has_transformers_own_loss_and_gradient(architecture: str) -> None:
    policy = policy_of(architecture, torch.float32)
    padded = batch_of("padded")
    theirs = policy.causal_lm(
        input_ids=padded.input_ids, attention_mask=padded.attention_mask, output_router_logits=True
    ).aux_loss
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("gate" in name or "router" in name for name in expected)
    assert batch_of("tree").input_ids.numel() < int(padded.attention_mask.sum()), "prefixes are shared"
    policy.balances = True
    for layout, shares, checkpoints in (
        ("padded", True, False), ("packed", True, False), ("tree", True, False), ("tree", False, False),
        ("tree", True, True),
    ):  # fmt: skip
        if checkpoints:
            policy = policy_of(architecture, torch.float32, checkpointing=True)
            policy.balances = True
        policy.shares = shares
        policy.zero_grad()
        policy(batch_of(layout))
        torch.testing.assert_close(policy.router_loss, theirs, rtol=1e-5, atol=1e-6)
        policy.router_loss.backward()
        for name, p in policy.named_parameters():
            if name in expected:
                torch.testing.assert_close(p.grad, expected[name], rtol=2e-3, atol=2e-6, msg=f"{layout} {name}")


def test_a_batch_without_it_asks_for_no_logits() -> None:
    policy = policy_of("Mixtral", torch.float32)
    policy(batch_of("tree"))
    assert policy.router_loss is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(value: float) -> None:
    policy = policy_of("Mixtral", torch.float32)
    config = PolicyConfig("random", router_aux_loss=value)
    with pytest.raises(ConfigError, match=r"router_aux_loss must be above 0 and finite"):
        config.build(torch.float32, policy.causal_lm)


def test_a_model_without_routers_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="is no mixture of experts"):
        PolicyConfig(str(tiny), router_aux_loss=0.01).build(torch.float32)


def test_a_step_adds_it_to_the_loss_of_pairs_and_logs_it_apart(pairs_folder: Path, tmp_path: Path) -> None:
    """With accumulated batches the gradient of the whole is that of the pairs' loss, and the weight times the rest."""
    config = Qwen3MoeConfig(
        vocab_size=len(make_tokenizer("chatml")), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, head_dim=8, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "model"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    moved = {}
    for weight in (None, 1.0, 2.0):
        module, data = build(
            folder, pairs_folder, loss=SimPO(), optimizer=sgd, schedule=ConstantWithWarmup(), batch_size=10,
            policy=PolicyConfig(str(folder), router_aux_loss=weight),
        )  # fmt: skip
        run = tmp_path / str(weight)
        make_trainer(run, max_steps=1, accumulate_grad_batches=5, gradient_clip_val=None).fit(module, data)
        moved[weight] = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
        row = logged(run)[0]
        assert ("loss/router_aux" in row) == (weight is not None)
        assert weight is None or 1.0 < row["loss/router_aux"] < 4.0
    gates = [name for name in moved[None] if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    for name, plain in moved[None].items():
        one, two = moved[1.0][name] - plain, moved[2.0][name] - plain
        torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-6)
        assert name not in gates or one.abs().max() > 1e-5


def test_the_loss_is_refused_where_weights_are_sharded(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for weight, sharded in ((None, True), (0.01, False)):
        check_router_strategy(PolicyConfig("m", router_aux_loss=weight), trainer, sharded=sharded)
    with pytest.raises(ConfigError, match="router_aux_loss needs whole weights on every device"):
        check_router_strategy(PolicyConfig("m", router_aux_loss=0.01), trainer, sharded=True)
