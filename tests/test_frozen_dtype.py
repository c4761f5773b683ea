"""Weights that are not trained, in bfloat16 on an accelerator: the same numbers as before; and checkpointed layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from conftest import make_model
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.distributed.sharded_load import load_sharded
from rap_lightning.errors import ConfigError
from rap_lightning.models import policy_config
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.planning.trace import batch_of
from rap_lightning.training import build
from test_adapters import fit, make_adapter

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("options", "device", "precision", "gather", "expected"),
    [
        ({"lora": Lora(r=2)}, "cuda", "bf16-mixed", None, (BF16, BF16)),
        ({"adapter": "a"}, "cuda", "bf16-mixed", BF16, (BF16, BF16)),
        ({"lora": Lora(r=2), "dtype": "float32"}, "cuda", "bf16-mixed", None, (F32, F32)),
        ({"lora": Lora(r=2)}, "cuda", "32-true", None, (F32, F32)),
        ({"lora": Lora(r=2, use_dora=True)}, "cuda", "bf16-mixed", None, (F32, F32)),
        ({"lora": Lora(r=2)}, "cpu", "bf16-mixed", None, (F32, F32)),
        ({}, "cuda", "bf16-mixed", BF16, (F32, BF16)),
        ({}, "cuda", "bf16-mixed", F32, (F32, F32)),
        ({}, "cuda", "bf16-mixed", None, (F32, F32)),  # the policy's norms and embeddings are float32
        ({"dtype": "float32"}, "cuda", "bf16-mixed", BF16, (F32, F32)),
        ({}, "cpu", "bf16-mixed", BF16, (F32, F32)),
    ],
    ids=str,
)
def test_untrained_weights_are_bfloat16_where_the_policy_computes_so(
    options: dict[str, Any], device: str, precision: str, gather: torch.dtype | None, expected: Any
) -> None:
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)),
        precision_plugin=SimpleNamespace(precision=precision),
    )
    sharding: Any = None if gather is None else SimpleNamespace(gather=gather)
    assert build.weight_dtypes(PolicyConfig("model", **options), trainer, sharding) == expected


@pytest.mark.parametrize("kind", ["plain", "rslora", "continued"])
def test_adapters_stay_float32_on_a_bfloat16_base_and_start_as_the_reference(
    kind: str, tiny: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"lora": Lora(r=2, use_rslora=kind == "rslora")}
    if kind == "continued":
        options = {"adapter": str(make_adapter(tmp_path / "a", tiny))}
    config = PolicyConfig(str(tiny), **options)
    policy, frozen = config.build(BF16), Frozen()
    frozen.load(config, BF16)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {F32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {BF16}
    batch = batch_of("tree", 2, 20, 12)
    with torch.autocast("cpu", BF16, cache_enabled=False):
        ours = policy.logps(batch)
        references = [frozen] if kind == "continued" else [frozen, AdaptersOff()]
        for reference in references:
            assert torch.equal(ours, reference.logps(policy, batch))
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in policy.parameters() if p.requires_grad)


def test_a_bfloat16_reference_equals_a_policy_gathered_in_bfloat16(tiny: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        sharding = Sharding(init_device_mesh("cpu", (1,)), BF16)
        config, frozen = PolicyConfig(str(tiny)), Frozen()
        policy, _ = load_sharded(config, F32, sharding, trained=True)
        frozen.shard(sharding)
        frozen.load(config, BF16)
        assert {p.dtype for p in policy.parameters()} == {F32}
        assert {p.dtype for p in frozen.model.parameters()} == {BF16}
        batch = batch_of("tree", 2, 20, 12)
        with torch.autocast("cpu", BF16, cache_enabled=False):
            assert torch.equal(policy.logps(batch), frozen.logps(policy, batch))
        del policy, frozen
    finally:
        dist.destroy_process_group()


def test_a_lora_run_on_a_gpu_says_so_and_begins_at_the_reference(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is a CPU's, its choice of dtypes a GPU's."""
    rule = PolicyConfig.loading_dtypes
    monkeypatch.setattr(
        PolicyConfig, "loading_dtypes", lambda self, d, *, mixed, gather: rule(self, d, mixed=True, gather=gather)
    )
    with caplog.at_level("INFO"):
        module = fit(
            tmp_path,
            pairs_folder,
            PolicyConfig(str(tiny), lora=Lora(r=4)),
            Frozen(),
            precision="bf16-mixed",
            max_steps=2,
        )
    assert "--model.policy.dtype float32 keeps them in float32" in caplog.text
    assert "differ by at most 0" in caplog.text
    assert {p.dtype for p in module.reference.model.parameters()} == {BF16}
    adapted = [p for n, p in module.policy.named_parameters() if "lora_B" in n]
    assert all(p.dtype == F32 for p in adapted)
    assert any(p.abs().max() > 0 for p in adapted)


# -- checkpointed layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "expected"), [(True, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (False, [])]
)
def test_every_nth_layer_is_computed_again_with_the_same_gradients(
    every: bool | int, expected: list[int], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=4)
    batch = batch_of("tree", 1, 20, 12)
    policy, plain = (PolicyConfig(str(model), gradient_checkpointing=e).build(torch.float64) for e in (every, False))
    layers = policy_config.decoder_layers(policy)
    calls: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))  # type: ignore[union-attr]
    loss = policy.logps(batch).sum()
    assert calls == [0, 1, 2, 3]
    grads = torch.autograd.grad(loss, list(policy.parameters()))
    assert sorted(calls[4:]) == expected
    for ours, theirs in zip(
        grads, torch.autograd.grad(plain.logps(batch).sum(), list(plain.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_layers_that_cannot_be_chosen_and_negative_numbers_are_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="found -2"):
        PolicyConfig(str(tiny), gradient_checkpointing=-2)
    monkeypatch.setattr(policy_config, "decoder_layers", lambda model: [nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match="all of its layers or none"):
        PolicyConfig(str(tiny), gradient_checkpointing=2).build(F32)
