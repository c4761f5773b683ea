"""Adapters that are continued, what their reference is, and what can be asked of a model as it is loaded."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, make_model, make_trainer
from rap_lightning.batches.layouts import lay_out_responses
from rap_lightning.errors import ConfigError
from rap_lightning.losses import DPO
from rap_lightning.models.adapters import adapter_digest
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.policy_copy import AdapterAsLoaded
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.module import PreferenceModule
from test_fit import assert_same, logged, weights
from test_resume import fit as fit_adam
from test_resume import stopped
from test_stored import _changed


def make_adapter(folder: Path, model: Path, **options: Any) -> Path:
    """A LoRA adapter that has left its beginning."""
    policy = PolicyConfig(str(model), lora=Lora(r=4, **options)).build(torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    policy.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "a", tiny)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02)


def fit(run: Path, data: Path, config: PolicyConfig, reference: Any = None, **options: Any) -> Any:
    from rap_lightning.training.schedules import ConstantWithWarmup

    module, source = build(
        Path(config.path), data, policy=config, reference=reference, loss=DPO(0.5), optimizer=sgd,
        schedule=ConstantWithWarmup(), layout="padded",
    )  # fmt: skip
    trainer = make_trainer(run, **({"max_steps": 4} | options))
    trainer.fit(module, source)
    module.batches = [part for batch in source.val_dataloader() for part in batch]
    return module


def by_plain_peft(model: Path, adapter: Path | None, batches: list[Any]) -> torch.Tensor:
    """Log-probabilities of responses by transformers and peft alone: whole logits, one row per response."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    net = (PeftModel.from_pretrained(net, str(adapter)) if adapter is not None else net).eval()
    found = []
    with torch.no_grad():
        for batch in batches:
            logps = net(input_ids=batch.input_ids).logits.log_softmax(-1).flatten(0, 1)
            tokens = logps[batch.predict_from].gather(-1, batch.target[:, None])[:, 0]
            found.append(torch.zeros(len(batch.lengths)).index_add(0, batch.segment, tokens))
    return torch.cat(found)


def references(tmp_path: Path) -> list[Any]:
    return [None, AdapterAsLoaded(), Frozen(), Stored(folder=str(tmp_path / "store"))]


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_the_reference_of_a_continued_adapter_is_that_adapter_as_loaded(
    kind: dict[str, Any], tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a", tiny, **kind)
    config, trained = PolicyConfig(str(tiny), adapter=str(folder)), []
    for number, reference in enumerate(references(tmp_path)):
        module = fit(tmp_path / str(number), pairs_folder, config, reference)
        first = logged(tmp_path / str(number))[0]
        assert abs(first["loss"] - math.log(2)) < 1e-6
        assert abs(first["rewards/margins"]) < 1e-5
        expected = by_plain_peft(tiny, folder, module.batches)
        found = torch.cat([module.reference.logps(module.policy, batch) for batch in module.batches])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
        moved = torch.cat([module.policy.logps(batch).detach() for batch in module.batches])
        assert (moved - expected).abs().max() > 0.05, "the policy must have left it"
        assert (by_plain_peft(tiny, None, module.batches) - expected).abs().max() > 0.1, "nor is it the bare base"
        trained.append(weights(module))
    for other in trained[1:]:
        assert_same(trained[0], other, 2e-6)


def test_no_second_base_model_is_held(tiny: Path, adapter: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, pairs_folder, PolicyConfig(str(tiny), adapter=str(adapter)))
    held = sum(weight.numel() for weight in module.reference._weights.values())
    assert held == sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    assert held < 0.3 * sum(p.numel() for p in module.policy.parameters())


def test_adapters_off_is_the_base_model_without_touching_a_weight(
    tiny: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft's own way visits every weight twice, and ``Module.train`` every module: host time at each forward pass."""
    policy = PolicyConfig(str(tiny), adapter=str(adapter)).build(torch.float32).train()
    resting = policy.causal_lm.base_model.norm.eval()
    responses = lay_out_responses([([1, 2, 3], [4, 5]), ([6], [7, 8, 9])], pad_id=0)
    with torch.no_grad(), policy.eval().model.disable_adapter():
        expected = policy(responses)
    policy.train()
    resting.eval()
    trained = {name: p.requires_grad for name, p in policy.named_parameters()}
    touched: list[str] = []
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda *_: touched.append("requires_grad_"))
    monkeypatch.setattr(torch.nn.Module, "train", lambda *_: touched.append("train"))
    assert torch.equal(AdaptersOff().token_logps(policy, responses), expected)
    assert not touched
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == trained
    assert [module for module in policy.modules() if not module.training] == [resting]
    with torch.no_grad():
        assert not torch.equal(policy(responses), expected), "the adapter is on again"


def test_other_references_of_a_continued_adapter(tiny: Path, adapter: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """The bare base where it is asked for, another adapter, another model: not taken for the initial policy."""
    config = PolicyConfig(str(tiny), adapter=str(adapter))
    other = make_adapter(tmp_path / "other", tiny, use_rslora=True)
    away = make_model(tmp_path / "away", num_hidden_layers=1)
    expected = [
        (AdaptersOff(), (tiny, None)),
        (Frozen(adapter=str(other)), (tiny, other)),
        (Frozen(str(away)), (away, None)),
    ]
    for number, (reference, road) in enumerate(expected):
        module = fit(tmp_path / str(number), pairs_folder, config, reference)
        assert abs(logged(tmp_path / str(number))[0]["rewards/margins"]) > 0.01
        found = torch.cat([module.reference.logps(module.policy, batch) for batch in module.batches])
        torch.testing.assert_close(found, by_plain_peft(*road, module.batches), atol=2e-4, rtol=0)


def test_stored_values_of_one_adapter_are_not_those_of_another(
    tiny: Path, adapter: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", tiny, use_rslora=True)
    for number, config in enumerate(
        [
            PolicyConfig(str(tiny), adapter=str(adapter)),
            PolicyConfig(str(tiny), adapter=str(other)),
            PolicyConfig(str(tiny), lora=Lora(r=4)),
            PolicyConfig(str(tiny), adapter=str(shutil.copytree(adapter, tmp_path / "copy"))),
        ]
    ):
        fit(tmp_path / str(number), pairs_folder, config, Stored(folder=str(tmp_path / "store")), max_steps=1)
    assert len(list((tmp_path / "store").iterdir())) == 3, "a copy of an adapter is that adapter"


def test_a_continued_adapter_resumes_bit_for_bit_and_only_over_what_it_began_with(
    tiny: Path, adapter: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    base = shutil.copytree(tiny, tmp_path / "base")
    config = PolicyConfig(str(base), adapter=str(copied))
    whole = fit_adam(tmp_path / "whole", tiny, pairs_folder, policy=config)
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_train_batch_start", 14, policy=config)
    names = torch.load(ckpt, weights_only=True)["state_dict"]
    assert all(".lora_" in name for name in names), "neither the base nor the reference's copy is saved"
    rest = fit_adam(tmp_path / "rest", tiny, pairs_folder, policy=config, ckpt=ckpt)
    assert_same(weights(whole), weights(rest))
    changed = make_adapter(tmp_path / "changed", tiny, use_rslora=True)
    with pytest.raises(ConfigError, match="from another adapter than"):
        fit_adam(tmp_path / "b", tiny, pairs_folder, policy=replace(config, adapter=str(changed)), ckpt=ckpt)


def test_a_continued_adapter_leaves_as_one_adapter(
    tiny: Path, adapter: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fit and from its checkpoint, whose paths hold from any folder; the reference's copy stays behind."""
    from safetensors.torch import load_file

    from rap_lightning.callbacks import Checkpoints, ExportHF
    from rap_lightning.commands.export import export

    monkeypatch.chdir(adapter.parent)
    saver = Checkpoints(tmp_path / "saved")
    config = PolicyConfig(str(tiny), adapter=adapter.name)
    module = fit(
        tmp_path / "run", pairs_folder, config, callbacks=[ExportHF(), saver], enable_checkpointing=True, max_epochs=1
    )
    (folder,) = (tmp_path / "run").rglob("hf")
    expected = torch.cat([module.policy.logps(batch).detach() for batch in module.batches])
    torch.testing.assert_close(by_plain_peft(tiny, folder, module.batches), expected, atol=2e-4, rtol=0)
    monkeypatch.chdir(tmp_path)
    (ckpt,) = (tmp_path / "saved").glob("*.ckpt")
    export(str(ckpt), str(tmp_path / "out"))
    written = [load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out")]
    assert_same(*written)


def test_a_checkpoint_of_a_new_adapter_goes_on_only_over_its_base(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_train_batch_start", 14, lora=True)
    another = _changed(tiny, tmp_path / "another", weight=True)
    with pytest.raises(ConfigError, match="over another base model than"):
        fit_adam(tmp_path / "rest", another, pairs_folder, lora=True, ckpt=ckpt)


def damaged(adapter: Path, folder: Path, damage: str, tiny: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    file, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "pickle":
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "lacking":
        tensors = load_file(file)
        tensors.pop(sorted(tensors)[3])
        save_file(tensors, file)
    elif damage == "nan":
        tensors = load_file(file)
        next(iter(tensors.values()))[0, 0] = math.nan
        save_file(tensors, file)
    elif damage == "no weights":
        file.unlink()
    else:
        content = json.loads(about.read_text())
        if damage == "kind":
            content = {
                "peft_type": "IA3",
                "task_type": "CAUSAL_LM",
                "target_modules": ["q_proj"],
                "feedforward_modules": [],
            }
        elif damage == "rank":
            content["r"] = 8
        elif damage == "base":
            content["base_model_name_or_path"] = str(_changed(tiny, folder.parent / "base", weight=True))
        elif damage == "modules":
            content["target_modules"] = ["qkv"]
        about.write_text("{" if damage == "json" else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("pickle", r"weights are a pickle \(adapter_model\.bin\)"),
        ("cut", r"can't be read.*cut off"),
        ("lacking", r"doesn't fit.*1 weights missing"),
        ("nan", r"is not finite"),
        ("no weights", r"no adapter_model\.safetensors"),
        ("kind", r"expected a LoRA adapter.*found IA3"),
        ("rank", r"doesn't fit the model"),
        ("base", r"was trained on .*base, whose weights differ"),
        ("modules", r"doesn't fit the model"),
        ("json", r"adapter_config\.json can't be read|can't be read"),
    ],
)
def test_an_adapter_that_is_damaged_or_of_another_model_is_refused(
    damage: str, message: str, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = damaged(adapter, tmp_path / "damaged", damage, tiny)
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(str(tiny), adapter=str(folder)).build(torch.float32)


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.base_layer.weight",
     "lm_head.weight", "model.embed_tokens.weight"],
)  # fmt: skip
def test_an_adapter_that_holds_a_weight_of_the_base_model_is_refused(
    name: str, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    own = PolicyConfig(str(tiny)).build(torch.float32).causal_lm.state_dict()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = own[name.replace(".base_layer", "")] * 2
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        ConfigError, match=rf"holds base_model\.model\.{re.escape(name)}, which its config doesn't name"
    ):
        PolicyConfig(str(tiny), adapter=str(folder)).build(torch.float32)


def test_weights_that_modules_to_save_names_come_with_the_adapter(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    found = PolicyConfig(str(tiny), adapter=str(tmp_path)).build(torch.float32).state_dict()
    (name,) = (name for name in found if "model.norm.modules_to_save" in name)
    own = AutoModelForCausalLM.from_pretrained(tiny).state_dict()["model.norm.weight"]
    torch.testing.assert_close(found[name], own * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens, which isn't supported"),
        ({"use_qalora": True, "qalora_group_size": 4}, "sets use_qalora, which isn't supported"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "sets layer_replication, which isn't supported"),
        ({"init_lora_weights": "pissa"}, "began as pissa.*which changes the base model's weights"),
        ({"init_lora_weights": "olora"}, "began as olora"),
    ],
)
def test_adapters_that_compute_something_else_than_lora_are_refused(
    options: dict[str, Any], message: str, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(str(tiny), adapter=str(folder)).build(torch.float32)


def test_an_adapter_keeps_its_own_scaling(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """Of each layer, by patterns of rank and alpha."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32, "v_proj": 3}}
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "up_proj"], **patterns)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "own")
    module = fit(tmp_path / "run", pairs_folder, PolicyConfig(str(tiny), adapter=str(tmp_path / "own")), max_steps=1)
    assert abs(logged(tmp_path / "run")[0]["loss"] - math.log(2)) < 1e-6
    expected = by_plain_peft(tiny, tmp_path / "own", module.batches)
    found = torch.cat([module.reference.logps(module.policy, batch) for batch in module.batches])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_biases_trained_beside_an_adapter_stay_when_it_is_off(tiny: Path) -> None:
    policy = PolicyConfig(str(tiny), lora=Lora(r=2)).build(torch.float32)
    AdaptersOff().follow(policy, 0)
    policy.causal_lm.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"reference AdaptersOff: .*norm\.weight is trained beside the adapter"):
        AdaptersOff().follow(policy, 0)


def test_options_of_a_policy_that_have_no_effect_or_make_no_sense_are_refused(tiny: Path, adapter: Path) -> None:
    for options, message in [
        ({"adapter": str(adapter), "lora": Lora()}, "lora has no effect with --model.policy.adapter"),
        ({"adapter_revision": "main"}, "adapter_revision has no effect without"),
        ({"lora": Lora(), "resize_embeddings": True}, "new rows would never change"),
        ({"freeze": ["("]}, "not a regular expression"),
        ({"rope": {"factor": 2.0}}, "rope_type must be one of"),
        ({"rope": {"rope_type": "linear", "factor": 0.5}}, "factor must be a number of at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PolicyConfig(str(tiny), **options)
    for options, message in [
        ({"adapter": "/nowhere/adapter"}, "no such folder"),
        ({"adapter": str(adapter), "adapter_revision": "main"}, "is a folder, so adapter_revision main has no effect"),
        ({"freeze": ["lm_haed"]}, r"'lm_haed' matches no parameter"),
        ({"freeze": [""]}, "freezes everything"),
        ({"lora": Lora(), "freeze": ["embed_tokens"]}, "only parameters that are not trained anyway"),
        ({"resize_embeddings": True}, "resize_embeddings has no effect"),
        ({"rope": {"rope_type": "yarn"}}, "factor"),
        ({"rope": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PolicyConfig(str(tiny), **options).build(torch.float32)
    with pytest.raises(ConfigError, match=r"is an adapter\. Give the model"):
        PolicyConfig(str(adapter)).build(torch.float32)
    for alpha in (0, -4):
        with pytest.raises(ConfigError, match=f"lora.alpha must be above 0, found {alpha}"):
            Lora(alpha=alpha)
    config = PolicyConfig(str(tiny))
    for reference, message in [
        (AdapterAsLoaded(), "needs an adapter to continue"),
        (AdaptersOff(), "needs an adapter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PreferenceModule(config, reference=reference)
    with pytest.raises(ConfigError, match="with an adapter alpha must be 1"):
        PreferenceModule(PolicyConfig(str(tiny), adapter=str(adapter)), reference=Synchronised(alpha=0.5))
    assert len(adapter_digest(str(adapter))) == 64


def test_frozen_layers_stay_as_they_are_and_the_others_train(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    config = PolicyConfig(str(tiny), freeze=["embed_tokens", r"layers\.0\."])
    start = {n: p.clone() for n, p in PolicyConfig(str(tiny)).build(torch.float32).named_parameters()}
    trained = weights(fit(tmp_path, pairs_folder, config))
    frozen = {name for name in trained if "embed_tokens" in name or "layers.0." in name}
    assert 0 < len(frozen) < len(trained)
    for name, weight in trained.items():
        assert torch.equal(weight, start[name]) is (name in frozen), name


def test_a_tied_head_is_frozen_by_either_of_its_names(tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    for name in ("lm_head", "embed_tokens"):
        policy = PolicyConfig(str(tied), freeze=[name]).build(torch.float32)
        assert not policy.causal_lm.lm_head.weight.requires_grad


def test_scaled_positions_are_those_of_transformers_and_of_the_reference(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    scaled = shutil.copytree(tiny, tmp_path / "scaled")
    content = json.loads((scaled / "config.json").read_text())
    content["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    (scaled / "config.json").write_text(json.dumps(content))
    config = PolicyConfig(str(tiny), rope={"rope_type": "linear", "factor": 4.0})
    module = fit(tmp_path / "run", pairs_folder, config, Frozen())
    assert logged(tmp_path / "run")[0]["rewards/margins"] == 0.0
    found = torch.cat([module.reference.logps(module.policy, batch) for batch in module.batches])
    torch.testing.assert_close(found, by_plain_peft(scaled, None, module.batches), atol=2e-4, rtol=0)
    assert (by_plain_peft(tiny, None, module.batches) - found).abs().max() > 0.01
    with pytest.raises(ConfigError, match="is scaled like that already"):
        PolicyConfig(str(scaled), rope={"rope_type": "linear", "factor": 4.0}).build(torch.float32)


def test_positions_can_only_be_scaled_where_there_are_some(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from conftest import make_tokenizer

    tokenizer = make_tokenizer("chatml")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no rotary positions"):
        PolicyConfig(str(tmp_path), rope={"rope_type": "linear", "factor": 2.0}).build(torch.float32)


def test_embeddings_are_added_on_request_alone_and_alike_for_the_reference(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    grown = shutil.copytree(tiny, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(grown)
    with pytest.raises(ConfigError, match=r"Set --model\.policy\.resize_embeddings true"):
        PolicyConfig(str(grown)).build(torch.float32)
    config = PolicyConfig(str(grown), resize_embeddings=True)
    module = fit(tmp_path / "run", pairs_folder, config, Frozen())
    assert logged(tmp_path / "run")[0]["rewards/margins"] == 0.0
    table = module.reference.model.causal_lm.get_input_embeddings().weight
    assert len(table) == rows + 2
    torch.testing.assert_close(table[rows], table[:rows].mean(0))
    folders = set()
    for token in ("<third>", "<fourth>"):  # stored log-probabilities are of one number of rows
        tokenizer.add_tokens([token])
        tokenizer.save_pretrained(grown)
        stored = Stored(folder=str(tmp_path / "stored"))
        stored.load(config, torch.float32)
        folders.add(stored._opened(config.build(torch.float32), "32-true").folder)
    assert len(folders) == 2


def test_four_bits_need_bitsandbytes_and_an_adapter(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rap_lightning.models.alterations.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed: pip install bitsandbytes"):
        PolicyConfig(str(tiny), quantize="nf4", lora=Lora())
    monkeypatch.setattr("rap_lightning.models.alterations.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="4-bit weights can't be trained"):
        PreferenceModule(PolicyConfig(str(tiny), quantize="nf4"))


def test_qlora_trains_the_adapter_alone_and_resumes(pairs_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    wide = make_model(tmp_path / "wide", hidden_size=128, intermediate_size=256)  # bitsandbytes works in blocks of 64
    config = PolicyConfig(str(wide), quantize="nf4", lora=Lora(r=4))
    whole = fit_adam(tmp_path / "whole", wide, pairs_folder, policy=config)
    linear = whole.policy.causal_lm.model.layers[0].mlp.up_proj.base_layer
    assert type(linear).__name__ == "Linear4bit"
    assert linear.weight.dtype == torch.uint8
    assert abs(logged(tmp_path / "whole")[0]["loss"] - math.log(2)) < 1e-6
    ckpt = stopped(tmp_path / "part", wide, pairs_folder, "on_train_batch_start", 14, policy=config)
    assert all(".lora_" in name for name in torch.load(ckpt, weights_only=True)["state_dict"])
    rest = fit_adam(tmp_path / "rest", wide, pairs_folder, policy=config, ckpt=ckpt)
    trained = [{n: p for n, p in m.policy.named_parameters() if p.requires_grad} for m in (whole, rest)]
    assert all(".lora_" in name for name in trained[0])
    assert_same(trained[0], trained[1])
