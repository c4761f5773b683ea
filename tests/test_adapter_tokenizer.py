"""A continued adapter's own tokenizer, chat template, embeddings and whole modules (modules_to_save)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_tokenizer, scored_rows, write_jsonl
from rap_lightning.errors import ConfigError
from rap_lightning.models.hf_export import export, full_state, merge
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.onpolicy.model_source import ModelSource
from test_adapters import by_plain_peft, fit, make_adapter
from test_fit import logged

TEMPLATE = "{% for m in messages %}<|im_start|>[{{ m['role'] }}]\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>[assistant]\n{% endif %}"
)


def exported(module: Any, folder: Path) -> Path:
    export(module.policy, full_state(module.policy), module.tokenizer, folder, module.policy_config)
    return folder


def peft_adapter(folder: Path, base: Path, tokens: int = 0, **lora: Any) -> Path:
    """An adapter by peft alone; with ``tokens`` its base had embeddings added, which it then brings."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    if tokens:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + tokens, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **lora))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad or "embed" in name:
                p.add_(0.05 * torch.randn_like(p))
    adapted.save_pretrained(folder)
    return folder


def test_the_chat_template_beside_an_adapter_is_used_and_exported(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    whole, alone = make_adapter(tmp_path / "whole", tiny), make_adapter(tmp_path / "alone", tiny)
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(whole)
    (alone / "chat_template.jinja").write_text(TEMPLATE)
    for number, folder in enumerate((whole, alone)):
        module = fit(tmp_path / str(number), pairs_folder, PolicyConfig(str(tiny), adapter=str(folder)), max_steps=1)
        assert module.tokenizer.chat_template == TEMPLATE
        prompt = module.tokenizer.decode(module.batches[0].input_ids[0])
        assert "<|im_start|>[user]\n" in prompt
        assert "<|im_start|>user" not in prompt
        again = ModelSource(str(exported(module, tmp_path / f"hf{number}"))).tokenizer()
        assert again.chat_template == TEMPLATE
    plain = make_adapter(tmp_path / "plain", tiny)
    (plain / "tokenizer_config.json").write_text((tiny / "tokenizer_config.json").read_text())
    shutil.copy(tiny / "tokenizer.json", plain)
    own = PolicyConfig(str(tiny)).load_tokenizer().chat_template
    assert PolicyConfig(str(tiny), adapter=str(plain)).load_tokenizer().chat_template == own


def test_tokens_added_by_an_adapter_have_its_embeddings(tiny: Path, tmp_path: Path) -> None:
    pairs_folder = tmp_path / "pairs"
    pairs_folder.mkdir()
    for name, count in (("train", 8), ("test", 4)):
        rows = json.loads(json.dumps(scored_rows(count)).replace(" yes", " plumplum"))
        write_jsonl(pairs_folder / f"{name}.jsonl", rows)
    folder = peft_adapter(tmp_path / "a", tiny, tokens=2)
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens(["plumplum", "pearpear"])
    tokenizer.save_pretrained(folder)
    module = fit(tmp_path / "run", pairs_folder, PolicyConfig(str(tiny), adapter=str(folder)))
    assert abs(logged(tmp_path / "run")[0]["loss"] - math.log(2)) < 1e-6
    assert any(int(batch.input_ids.max()) >= len(tokenizer) - 2 for batch in module.batches), "an added token is used"
    output = exported(module, tmp_path / "hf")
    found = torch.cat([module.policy.logps(batch).detach() for batch in module.batches])

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        net = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return PeftModel.from_pretrained(net, str(output))

    merge(load, module.tokenizer, tmp_path / "merged", module.policy_config)
    torch.testing.assert_close(by_plain_peft(tmp_path / "merged", None, module.batches), found, atol=2e-4, rtol=0)
    again = PolicyConfig(str(tiny), adapter=str(output)).build(torch.float32).eval()
    torch.testing.assert_close(torch.cat([again.logps(b).detach() for b in module.batches]), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("module_name", ["lm_head", "embed_tokens"])
def test_whole_modules_of_an_adapter_are_loaded_trained_and_exported(
    module_name: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    folder = peft_adapter(tmp_path / "a", tiny, modules_to_save=[module_name])
    module = fit(tmp_path / "run", pairs_folder, PolicyConfig(str(tiny), adapter=str(folder)))
    assert abs(logged(tmp_path / "run")[0]["loss"] - math.log(2)) < 1e-6
    before = by_plain_peft(tiny, folder, module.batches)
    reference = torch.cat([module.reference.logps(module.policy, batch) for batch in module.batches])
    torch.testing.assert_close(reference, before, atol=2e-4, rtol=0)
    moved = torch.cat([module.policy.logps(batch).detach() for batch in module.batches])
    assert (moved - before).abs().max() > 0.01
    output = exported(module, tmp_path / "hf")
    torch.testing.assert_close(by_plain_peft(tiny, output, module.batches), moved, atol=2e-4, rtol=0)
    names = [name for name, p in module.policy.named_parameters() if p.requires_grad and module_name in name]
    assert len(names) == 1


def test_what_of_an_adapter_would_be_lost_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny)
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens(["plumplum", "pearpear"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="brings no embeddings"):
        PolicyConfig(str(tiny), adapter=str(folder)).load_initial(torch.float32)
    from safetensors.torch import load_file, save_file

    file = make_adapter(tmp_path / "b", tiny) / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.model.embed_tokens.weight"] = load_file(tiny / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    save_file(state, file)
    with pytest.raises(ConfigError, match="which its config doesn't name"):
        PolicyConfig(str(tiny), adapter=str(tmp_path / "b")).load_initial(torch.float32)
