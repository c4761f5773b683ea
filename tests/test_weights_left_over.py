"""Weights that quantisers add, experts that are missing, and what transformers prints of either."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from conftest import make_model, make_tokenizer
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.pretrained import _zero_biases


def change(folder: Path, drop: str = "", **more: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    state = {name: value for name, value in load_file(file).items() if name != drop}
    save_file(state | more, file, {"format": "pt"})


def test_zero_biases_of_a_quantised_model_are_no_weights_and_others_are(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    zero, trained = "model.layers.0.mlp.up_proj.bias", "model.layers.1.mlp.up_proj.bias"
    change(folder, **{zero: torch.zeros(64), trained: torch.ones(64)})
    assert _zero_biases(SimpleNamespace(hf_quantizer=object()), str(folder), None) == {zero}
    with pytest.raises(ConfigError, match=r"2 unexpected \(model\.layers\.0\.mlp\.up_proj\.bias"):
        PolicyConfig(str(folder)).load_model(torch.float32)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **sizes
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if ".experts.2." in name]
    assert names
    change(tmp_path, drop=names[0])
    with pytest.raises(ConfigError) as error:
        PolicyConfig(str(tmp_path)).load_model(torch.float32)
    assert names[0] in str(error.value)


def test_transformers_prints_no_table_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model")
    change(folder, drop="model.norm.weight")
    capfd.readouterr()
    with pytest.raises(ConfigError, match=r"1 missing \(model\.norm\.weight\)"):
        PolicyConfig(str(folder)).load_model(torch.float32)
    said = capfd.readouterr()
    assert "LOAD REPORT" not in said.err + said.out
    assert "MISSING" not in said.err + said.out
