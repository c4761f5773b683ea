"""Mutated model folders, chat templates and data: one message, counted rows, or the same numbers again."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fuzz_cases
from conftest import make_tokenizer
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.pretrained import OtherWeights, check_config_names
from rap_lightning.preferences import rendering


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz_cases.Base.of_small_models(tmp_path_factory.mktemp("fuzz"), rows=4)


@pytest.mark.parametrize("kind", fuzz_cases.KINDS)
def test_no_mutation_trains_on_something_else_without_a_word(kind: str, base: Any, tmp_path: Path) -> None:
    found = [fuzz_cases.run(kind, number, tmp_path, base) for number in range(5000, 5020)]
    assert [one for one in found if one.wrong] == []
    assert len({one.verdict for one in found}) > 1


def test_the_oracle_sees_text_that_is_lost(base: Any) -> None:
    numbers = base.numbers["chatml"]
    assert base.lost(numbers) == ""
    goal, prompt, chosen, rejected = numbers.texts[0]
    for texts in (
        (goal, prompt.replace(goal, ""), chosen, rejected), (goal, prompt, chosen[3:], rejected),
        (goal, prompt + rejected, chosen, rejected), (goal, prompt, chosen.replace("⟦", ""), rejected),
    ):  # fmt: skip
        assert base.lost(fuzz_cases.Numbers(numbers.examples[:1], [texts], []))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer.json", {"model": -1}), ("tokenizer.json", {"padding": "x"}), ("tokenizer.json", {"added_tokens": 1}),
    ("tokenizer_config.json", {"tokenizer_class": 1e300}), ("tokenizer_config.json", {"bos_token": {}}),
    ("tokenizer_config.json", {"model_max_length": {"a": 1}}),
    ("config.json", {"num_attention_heads": 0}), ("config.json", {"hidden_size": "32"}),
    ("config.json", {"hidden_act": "none such"}), ("config.json", {"rope_parameters": [1]}),
    ("config.json", {"num_hidden_layers": -1}), ("config.json", {"model_type": []}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "values"), DAMAGE)
def test_a_damaged_file_of_a_model_is_one_message(
    file: str, values: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    edit(folder / file, **values)

    def load() -> None:
        PolicyConfig(str(folder)).load_tokenizer()
        PolicyConfig(str(folder)).load_initial(torch.float32)

    with pytest.raises(ConfigError, match=f"--model.policy.path {folder}") as found:
        load()
    assert len(str(found.value).splitlines()) <= 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_stored_as_fractions_are_refused(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: state[name].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OtherWeights, match=rf"1 weights are stored as .*{name}"):
        PolicyConfig(str(folder)).load_initial(torch.float32)


@pytest.mark.parametrize("name", ["rms_norm_epss", "rms_norm_ep", "RMS_norm_eps", "rms_norm_ops"])
def test_a_misspelt_name_in_a_config_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values[name] = values.pop("rms_norm_eps")
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"has {name}, which LlamaConfig doesn't know, and lacks rms_norm_eps"):
        PolicyConfig(str(folder)).load_config()


def test_defaults_that_change_numbers_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PolicyConfig(str(folder)).load_config()
    del values["rms_norm_eps"], values["hidden_act"]
    (folder / "config.json").write_text(json.dumps(values | {"an_extra_name": 1}))
    with pytest.warns(
        UserWarning, match=r"names no hidden_act, rms_norm_eps: .*\(hidden_act silu, rms_norm_eps 1e-06\)"
    ):
        config = PolicyConfig(str(folder)).load_config()
    (folder / "config.json").write_text(json.dumps({"rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu"}))
    assert check_config_names(str(folder), config) == []


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FAULTY = {
    "another order": ("in messages", "in messages | reverse", "in another order, or more than once"),
    "by content": ("in messages", "in messages | sort(attribute='content')", "in another order"),
    "twice": ("in messages", "in messages + messages", "more than once"),
    "a text twice": ("m['content'] }}", "m['content'] }}{{ m['content'] }}", "more than once"),
    "without an end": ("{% for m", LOOP + "{% for m", "has not ended after 1 s"),
    "too much": ("{% for m", "{{ 'x' * 2000000 }}{% for m", "writes 2,000,"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_template_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SHORT_S", 1)
    old, new, message = FAULTY[fault]
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ConfigError, match=message):
        Encoder(tokenizer, None, 64)
