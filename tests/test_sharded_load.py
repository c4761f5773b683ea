"""Models that are built without weights, sharded and filled: the same tensors as those of a whole load."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

from conftest import make_tokenizer
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.distributed.sharded_load import blank_model, load_sharded
from rap_lightning.errors import ConfigError
from rap_lightning.models.model_checks import check_head, check_sharing
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import Lora, PolicyConfig

SIZES = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},  # two rotary tables, scaled embeddings
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "mistral": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},  # Conv1D, weights in another order
}


def save(folder: Path, kind: str, **more: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    options = MODELS.get(kind, {}) | more
    sizes = {"vocab_size": 600} if kind == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder, max_shard_size="20KB")  # several files
    make_tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def sharding(tmp_path: Path) -> Any:
    """A mesh of this process alone: what is tested with more ranks is tested in test_ranks.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def tensors(policy: Policy) -> dict[str, torch.Tensor]:
    named = {**dict(policy.named_parameters(remove_duplicate=False)), **dict(policy.named_buffers())}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for n, t in named.items()}


def assert_same_tensors(policy: Any, whole: Any) -> None:
    ours, theirs = tensors(policy), tensors(whole)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def assert_refused_alike(folder: Path, sharding: Any, message: str) -> None:
    """A sharded load has the error of a whole one."""
    config = PolicyConfig(str(folder))
    with pytest.raises(ConfigError, match=message) as sharded:
        load_sharded(config, torch.float32, sharding, trained=True)
    with pytest.raises(ConfigError) as whole:
        config.load_initial(torch.float32)
    assert str(sharded.value) == str(whole.value)


@pytest.mark.parametrize("kind", list(MODELS))
def test_weights_and_computed_buffers_equal_those_of_a_whole_load(kind: str, sharding: Any, tmp_path: Path) -> None:
    config = PolicyConfig(str(save(tmp_path / "model", kind)))
    policy, why = load_sharded(config, torch.float32, sharding, trained=True)
    assert why == ""
    whole = config.build(torch.float32)
    assert_same_tensors(policy, whole)
    assert policy.causal_lm.generation_config == whole.causal_lm.generation_config
    assert policy.training
    assert check_head(policy) < 1e-4
    assert check_sharing(policy) == check_sharing(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_starts_from_the_same_numbers(dtype: torch.dtype, sharding: Any, tmp_path: Path) -> None:
    config = PolicyConfig(str(save(tmp_path / "model", "llama")), lora=Lora(r=3))
    torch.manual_seed(7)
    policy, why = load_sharded(config, dtype, sharding, trained=True)
    after = torch.rand(1)
    torch.manual_seed(7)
    whole = config.build(dtype)
    assert why == ""
    assert torch.equal(after, torch.rand(1)), "the generator stands where it would stand"
    assert_same_tensors(policy, whole)
    assert sum("lora_A" in name for name in tensors(whole)) == 14
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in whole.named_parameters() if p.requires_grad}


def test_no_weight_has_memory_before_it_is_sharded(tmp_path: Path) -> None:
    model, why = blank_model(PolicyConfig(str(save(tmp_path / "model", "gemma3_text"))), torch.float32)
    assert why == ""
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for _, b in model.named_non_persistent_buffers())


def test_files_that_name_weights_otherwise_are_loaded_whole_and_it_is_said(sharding: Any, tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = PolicyConfig(str(save(tmp_path / "model", "qwen3_moe", **sizes)))
    policy, why = load_sharded(config, torch.float32, sharding, trained=True)
    assert "use other weight names" in why
    ours, theirs = tensors(policy), tensors(config.build(torch.float32))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    dora = dataclasses.replace(config, path=str(save(tmp_path / "dense", "llama")), lora=Lora(r=2, use_dora=True))
    assert "DoRA" in load_sharded(dora, torch.float32, sharding, trained=True)[1]


def test_files_of_another_shape_are_refused(sharding: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 700}))
    with pytest.raises(ConfigError, match=r"shape \(600, 32\) in the model's files, and \(700, 32\) in its config"):
        load_sharded(PolicyConfig(str(folder)), torch.float32, sharding, trained=False)


@pytest.mark.parametrize("name", ["v_head.weight", "model.norm.weight"])
def test_weights_other_than_the_models_are_refused_before_sharding(name: str, sharding: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    file = max(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if name in content["weight_map"]:
        file = folder / content["weight_map"].pop(name)
        kept = {key: value for key, value in load_file(file).items() if key != name}
    else:
        content["weight_map"][name] = file.name
        kept = load_file(file) | {name: torch.ones(2)}
    save_file(kept, file, {"format": "pt"})
    index.write_text(json.dumps(content))
    for trained in (True, False):
        with pytest.raises(ConfigError, match=rf"{folder}: its files .*1 (missing|unexpected) \({re.escape(name)}\)"):
            load_sharded(PolicyConfig(str(folder)), torch.float32, sharding, trained=trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to(torch.int32), r"1 weights are stored as I32 .*\(model\.norm\.weight\)"),
        (lambda weight: weight.index_fill(0, torch.tensor([5]), torch.nan), r"not a number \(model\.norm\.weight\)"),
    ],
    ids=["integers", "nan"],
)
def test_damaged_weights_are_refused_as_by_a_whole_load(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, sharding: Any, tmp_path: Path
) -> None:
    folder, name = save(tmp_path / "model", "llama"), "model.norm.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    state = load_file(file)
    save_file(state | {name: change(state[name])}, file, {"format": "pt"})
    assert_refused_alike(folder, sharding, message)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(sharding: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([f"<added {number}>" for number in range(600)])
    tokenizer.save_pretrained(folder)
    assert_refused_alike(folder, sharding, "tokens and the model 600 embeddings")


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.0.attn.bias")]
)
def test_stored_buffers_that_are_computed_do_not_cost_a_whole_load(
    kind: str, name: str, sharding: Any, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", kind)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = folder / next(iter(content["weight_map"].values()))
    content["weight_map"][name] = file.name
    save_file(load_file(file) | {name: torch.ones(4)}, file, {"format": "pt"})
    index.write_text(json.dumps(content))
    assert load_sharded(PolicyConfig(str(folder)), torch.float32, sharding, trained=False)[1] == ""


def test_an_invalid_generation_config_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3}')
    with pytest.raises(ConfigError, match=f"{folder}: its generation_config.json is invalid: .*num_return_sequences"):
        blank_model(PolicyConfig(str(folder)), torch.float32)
