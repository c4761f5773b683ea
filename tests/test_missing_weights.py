"""Only the weights that a checkpoint holds are trained, compared with and judged by: anything else is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import ROOT, make_tokenizer, run_command
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.pretrained import (
    OtherWeights,
    _missing_four_bit,
    _missing_layers,
    _zero_biases,
    refuse_quantised,
    weight_files,
)
from rap_lightning.onpolicy.judges import RewardModel
from rap_lightning.onpolicy.model_source import ModelSource
from test_score import reward_model

CASES = ROOT.parent / "shared" / "cases"
SIZES = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
State = dict[str, Tensor]


def save(folder: Path, kind: str = "llama", **options: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else SIZES
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | options))).save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[State], State] = lambda state: state, **config: Any) -> Path:
    """Rewrite a model's weights, and set values of its config."""
    state = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(
        {n: value.clone().contiguous() for n, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def without(part: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new, 1): value for name, value in state.items()}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def plus(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.ones(*shape)}


def fit(model: Path, pairs: Path, folder: Path, *more: object) -> Any:
    return run_command(
        "fit", "--model.policy.path", model, "--data.source", pairs, "--trainer.accelerator", "cpu",
        "--trainer.max_steps", 1, "--trainer.default_root_dir", folder / "runs", *more,
    )  # fmt: skip


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one missing": (
        lambda f: edit(f, without("1.mlp.up_proj")),
        r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)",
    ),
    "no head": (lambda f: edit(f, without("lm_head")), r"1 missing \(lm_head\.weight\)"),
    "compiled": (lambda f: edit(f, prefixed("_orig_mod.")), r"21 missing .* 21 unexpected \(_orig_mod\.lm_head"),
    "DataParallel": (lambda f: edit(f, prefixed("module.")), r"21 missing .* 21 unexpected \(module\.lm_head"),
    "wrapped by peft": (lambda f: edit(f, prefixed("base_model.model.")), "21 missing .* 21 unexpected"),
    "fewer layers": (lambda f: edit(f, without("layers.1.")), "9 missing .* and 5 more"),
    "more layers": (lambda f: edit(f, num_hidden_layers=1), r"9 unexpected \(model\.layers\.1"),
    "value head": (
        lambda f: edit(f, plus("v_head.summary.weight", 1, 32)),
        r"1 unexpected \(v_head\.summary\.weight\)",
    ),
    "bias": (lambda f: edit(f, plus("model.layers.0.self_attn.q_proj.bias", 32)), r"1 unexpected \(.*q_proj\.bias\)"),
    "shape": (
        lambda f: edit(f, plus("model.norm.weight", 7)),
        r"1 of another shape \(model\.norm\.weight \[7\] instead",
    ),
    "shapes": (lambda f: edit(f, intermediate_size=64), r"6 of another shape .*\[32, 48\] instead of \[32, 64\]"),
    "kind": (lambda f: edit(f, model_type="qwen3", architectures=["Qwen3ForCausalLM"]), r"4 missing .*k_norm"),
    "nothing": (lambda f: edit(f, lambda state: {}), "21 missing"),
    "expert": (
        lambda f: edit(save(f, "mixtral", **EXPERTS), without("0.block_sparse_moe.experts.2")),
        r"\[3, 32, 48\]",
    ),
    "router": (lambda f: edit(save(f, "mixtral", **EXPERTS), without("0.block_sparse_moe.gate")), "1 missing .*gate"),
    "tied": (lambda f: edit(save(f, tie_word_embeddings=True), without("embed_tokens")), "2 missing .*embed_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_other_than_the_models_are_refused_by_name(case: str, tmp_path: Path) -> None:
    make, expected = REFUSED[case]
    folder = make(save(tmp_path / "model"))
    with pytest.raises(OtherWeights, match=expected) as found:
        PolicyConfig(str(folder), attn_implementation="sdpa").load_initial(torch.float32)
    assert str(found.value).startswith(f"--model.policy.path {folder}")
    with pytest.raises(ConfigError, match=f"--judge.model {folder}.*{expected}"):
        ModelSource(str(folder), option="--judge.model").load(torch.float32, "cpu")


ACCEPTED: dict[str, Callable[[Path], Path]] = {
    "tied head": lambda f: save(f, tie_word_embeddings=True),
    "a tied head is stored too": lambda f: edit(
        save(f, tie_word_embeddings=True), lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    ),
    "tied under the head's name": lambda f: edit(
        save(f, tie_word_embeddings=True), renamed("model.embed_tokens", "lm_head")
    ),
    "rotary frequencies": lambda f: edit(save(f), plus("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
    "masks of old models": lambda f: edit(save(f, "gpt2"), plus("transformer.h.0.attn.bias", 1, 1, 8, 8)),
    "no prefix": lambda f: edit(save(f), lambda state: {n.removeprefix("model."): v for n, v in state.items()}),
    "experts": lambda f: save(f, "mixtral", **EXPERTS),
    "speculative head": lambda f: edit(
        save(f, "qwen3_5_text", layer_types=["full_attention"] * 2, head_dim=8), plus("mtp.norm.weight", 32)
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_computed_tied_or_renamed_is_no_fault(case: str, tmp_path: Path) -> None:
    PolicyConfig(str(ACCEPTED[case](tmp_path / "model"))).load_initial(torch.float32)


@pytest.mark.parametrize("damage", [lambda content: content[:3000], lambda content: b""])
def test_a_truncated_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = save(tmp_path / "model") / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match="no model could be loaded from it: Error while deserializing header"):
        PolicyConfig(str(path.parent)).load_initial(torch.float32)


def test_a_reward_model_whose_head_has_another_name_is_refused(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "rm")
    RewardModel(str(edit(folder, plus("lm_head.weight", 600, 32)))).load()  # of the language model it was made from
    with pytest.raises(
        OtherWeights, match=r"--judge\.model .*1 missing \(score\.weight\); 1 unexpected \(value_head\.weight\)"
    ):
        RewardModel(str(edit(folder, renamed("score.", "value_head.")))).load()


def test_fit_refuses_a_reference_with_missing_weights(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "reference")
    edit(other, without("layers.0.mlp.up_proj"))
    done = fit(tiny, pairs_folder, tmp_path, "--model.reference", "Frozen", "--model.reference.path", other)
    assert done.returncode == 2
    assert f"{other}: its files" in done.stderr
    assert "1 missing (model.layers.0.mlp.up_proj.weight)" in done.stderr
    assert not list((tmp_path / "runs").rglob("metrics.csv"))


@pytest.mark.parametrize(
    "method", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}]
)
def test_quantised_weights_are_not_trained_in_full(
    method: dict[str, Any], tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    folder = edit(shutil.copytree(tiny, tmp_path / "model"), quantization_config=method)
    done = fit(folder, pairs_folder, tmp_path)
    assert done.returncode == 2
    assert f"{folder}: its weights are quantised" in done.stderr
    assert "--model.policy.lora.r" in done.stderr


def test_a_config_that_dequantises_can_be_trained() -> None:
    from transformers import LlamaConfig

    refuse_quantised(LlamaConfig(quantization_config={"quant_method": "fp8", "dequantize": True}), "model")
    with pytest.raises(ConfigError, match="fp8"):
        refuse_quantised(LlamaConfig(quantization_config={"quant_method": "fp8"}), "model")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("odd", [{"temperature": 0.6, "do_sample": False}, {"early_stopping": True}])
def test_generation_values_without_effect_do_not_stop_the_export(
    odd: dict[str, Any], file: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    values = json.loads((folder / file).read_text())
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    (folder / file).write_text(json.dumps(values | odd))
    assert fit(folder, pairs_folder, tmp_path).returncode == 0
    (written,) = (tmp_path / "runs").rglob("hf/generation_config.json")
    assert json.loads(written.read_text()).items() >= odd.items()


@pytest.mark.parametrize(
    ("file", "odd", "reason"),
    [
        ("generation_config.json", {"num_return_sequences": 3}, "num_return_sequences"),
        ("generation_config.json", {"cache_implementation": "none such"}, "cache_implementation"),
    ],
)
def test_configs_that_cannot_be_exported_are_found_before_the_first_step(
    file: str, odd: dict[str, Any], reason: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | odd))
    done = fit(folder, pairs_folder, tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr
    assert str(folder) in done.stderr
    assert "step 1/1" not in done.stdout + done.stderr


BYTES, LAYER = torch.zeros(8, 1, dtype=torch.uint8), "model.layers.1.mlp.up_proj.weight"
STATES = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")


def four_bit(state: State) -> State:
    """Weights of linear layers as bitsandbytes stores them: packed bytes, and what they mean."""
    linear = [name for name in state if "proj" in name]
    return state | dict.fromkeys(linear, BYTES) | {name + part: BYTES for name in linear for part in STATES}


@pytest.mark.parametrize("part", ["", *STATES])
def test_parts_of_four_bit_weights_that_are_missing_are_named(part: str, tmp_path: Path) -> None:
    folder = edit(save(tmp_path), four_bit)
    assert _missing_four_bit(str(folder), None) == []
    edit(folder, lambda state: {name: value for name, value in state.items() if name != LAYER + part})
    assert _missing_four_bit(str(folder), None) == [LAYER + part]
    edit(folder, lambda state: {name: value for name, value in state.items() if not name.endswith(STATES)})
    left = 2 * 7 - (part == "")
    assert len(_missing_four_bit(str(folder), None)) == left * len(STATES), "bytes whose meaning is lost"


def test_a_quantised_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = edit(edit(save(tmp_path), four_bit), without(LAYER))
    assert _missing_four_bit(str(folder), None) == []
    assert _missing_layers(AutoModelForCausalLM, str(folder), {}) == [LAYER]
    edit(folder, renamed("model.", "other."))
    assert _missing_layers(AutoModelForCausalLM, str(folder), {}) == [], "other names altogether"


def test_a_missing_part_of_an_expert_is_named(tmp_path: Path) -> None:
    part = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    folder = edit(save(tmp_path, "mixtral", **EXPERTS), without(part))
    with pytest.raises(ConfigError, match=rf"these are missing: {part}\."):
        PolicyConfig(str(folder)).load_model(torch.float32)


def test_zero_biases_of_a_quantised_model_are_no_weights_and_others_are(tmp_path: Path) -> None:
    zero, trained = "model.layers.0.mlp.up_proj.bias", "model.layers.1.mlp.up_proj.bias"
    folder = edit(save(tmp_path), lambda state: state | {zero: torch.zeros(48), trained: torch.ones(48)})
    assert _zero_biases(SimpleNamespace(hf_quantizer=object()), str(folder), None) == {zero}
    with pytest.raises(ConfigError, match=rf"2 unexpected \({zero}"):
        PolicyConfig(str(folder)).load_model(torch.float32)


def test_transformers_prints_no_table_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = edit(save(tmp_path), without("model.norm"))
    capfd.readouterr()
    with pytest.raises(ConfigError, match=r"1 missing \(model\.norm\.weight\)"):
        PolicyConfig(str(folder)).load_model(torch.float32)
    said = capfd.readouterr()
    assert "LOAD REPORT" not in said.err + said.out
    assert "MISSING" not in said.err + said.out


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases from bug reports are not on this machine")
def test_the_case_from_a_bug_report_is_refused() -> None:
    with pytest.raises(OtherWeights, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        PolicyConfig(str(CASES / "missing-weights" / "onemissing")).load_initial(torch.float32)
    with pytest.raises(ConfigError, match="4-bit bitsandbytes"):
        refuse_quantised(PolicyConfig(str(CASES / "four-bit-checkpoint" / "model")).load_config(), "model")


def test_the_files_that_are_checked_are_those_that_transformers_reads(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")

    def files() -> list[str]:
        model = PolicyConfig(str(folder)).build(torch.float32).causal_lm
        assert model.lm_head.weight.isfinite().all()
        return [file.name for file in weight_files(str(folder), None)]

    assert files() == ["model.safetensors"]
    save_file({"stray": torch.zeros(1, dtype=torch.int8)}, folder / "model-old.safetensors")
    assert files() == ["model.safetensors"], "not every file with a similar name"
    state = load_file(folder / "model.safetensors")
    halves = {"gptq_model-4bit-128g-1.safetensors": list(state)[::2], "other-2.safetensors": list(state)[1::2]}
    for name, half in halves.items():
        save_file({one: state[one].clone() for one in half}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {one: name for name, half in halves.items() for one in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert files() == ["model.safetensors"], "which transformers prefers to an index"
    (folder / "model.safetensors").unlink()
    assert files() == list(halves)
    save_file({one: value.clone() for one, value in state.items()}, folder / "w.safetensors", {"format": "pt"})
    edit_config(folder, transformers_weights="w.safetensors")
    assert files() == ["w.safetensors"]


def test_files_of_a_name_that_nothing_refers_to_are_no_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(ConfigError, match=r"no model could be loaded from it: .*model\.safetensors"):
        PolicyConfig(str(folder)).build(torch.float32)


def edit_config(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_a_reward_model_that_can_not_be_loaded_names_its_option(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match=f"--judge.model {folder}: the folder exists, but no reward model could"):
        RewardModel(str(folder)).load()
