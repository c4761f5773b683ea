"""ExportOptions: what an exported folder asks for, holds and refuses, and that a run's folder says how to repeat it."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from html import unescape
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from cli_process import RankPair
from conftest import build, call, flip_bit, make_model, make_tokenizer, make_trainer
from rap_lightning.atomic_write import atomic_folder
from rap_lightning.batches.encode import Encoder
from rap_lightning.commands.export import export
from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.integrity import INDEX_CHECKSUM
from rap_lightning.models.checkpoint.saved_policy import config_of
from rap_lightning.models.goal_chat_template import with_goals_in_template
from rap_lightning.models.hf_export import ExportOptions, full_state, merge, read_tensors
from rap_lightning.models.hf_export import export as export_policy
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.preferences.chat_template import BEGIN, unbaked
from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal
from rap_lightning.preferences.scales import RewardScale
from test_ranks import FSDP2, arguments

HISTORIES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": " red or green?\n"}],
    [{"role": "system", "content": "Sing."}, {"role": "user", "content": "red"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "red"}],
    [
        {"role": "system", "content": "One word {{ goal }} {% if x %}."}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"}, {"role": "user", "content": 'it\'s "d"\\n'},
    ],
]  # fmt: skip
GOALS: dict[str, GoalTemplate] = {
    "overall": OverallGoal(),
    "user turn": OverallGoal(placement="user"),
    "other scale": OverallGoal(RewardScale(-1, 1, decimals=2)),
    "attributes": AttributeGoal(["helpfulness", "honest_y"]),
    "attributes alone": AttributeGoal(["helpfulness"], overall=False),
}


class Praise(GoalTemplate):
    """A goal in words, as a user may write one."""

    def text(self, goal: float, attributes: Any = ()) -> str:
        return f'Say it {"very" if goal > 5 else "hardly"} well, "please" {{ once }}.'


class Biased(OverallGoal):
    """Inherits a wording that isn't its own."""

    def text(self, goal: float, attributes: Any = ()) -> str:
        return super().text(goal) if goal < 9 else "Be perfect."


def reloaded(tokenizer: Any, goal: GoalTemplate, folder: Path) -> Any:
    """The tokenizer as others get it: from files."""
    from transformers import AutoTokenizer

    with_goals_in_template(tokenizer, goal.record()).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, history: Any, **options: Any) -> list[int]:
    made = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True, **options)
    return list(made["input_ids"])


@pytest.mark.parametrize("kind", list(GOALS))
def test_the_exported_template_writes_the_ids_of_training(family: str, kind: str, tmp_path: Path) -> None:
    goal, own = GOALS[kind], make_tokenizer(family)
    baked, encoder = reloaded(own, goal, tmp_path), Encoder(own, goal, 4096)
    low, high, best = goal.scale.low, goal.scale.high, goal.best_attributes
    asked: list[tuple[str | None, dict[str, Any]]] = [
        (goal.write(goal.best, best), {}), (None, {"goal": False}), (None, {"goal": None}),
    ]  # fmt: skip
    if getattr(goal, "overall", True):
        numbers = [low, high, (low + high) / 2, round(low + 0.37 * (high - low), 3)]
        asked += [(goal.write(n, best), {"goal": n}) for n in numbers]
        asked.append((goal.write(int(high), best), {"goal": {"overall": int(high)}}))
    if best:
        asked.append((goal.write(goal.best, [7.46, *best[1:]]), {"goal": {"helpfulness": 7.46}}))
    seen = set()
    for history in HISTORIES:
        for text, options in asked:
            expected = encoder.prompt_ids(history, text)
            assert ids(baked, history, **options) == expected, (history, options)
            seen.add(tuple(expected))
    assert len(seen) >= len({text for text, _ in asked}) * 3, "goals and histories must make different prompts"


@pytest.mark.parametrize(
    "goal", [11, 0.5, "7", "10<|im_end|>", True, [3], float("nan"), {"x": 3}, {"overall": "9"}, {"overall": 11}]
)
def test_a_goal_off_the_scale_or_of_another_kind_or_name_is_refused(goal: Any, tmp_path: Path) -> None:
    from jinja2 import TemplateError

    for number, template in enumerate((OverallGoal(), AttributeGoal(["helpfulness", "honest_y"]))):
        baked = reloaded(make_tokenizer("chatml"), template, tmp_path / str(number))
        with pytest.raises(TemplateError, match=r"^goal"):
            ids(baked, HISTORIES[1], goal=goal)


@pytest.mark.parametrize("goal", [Praise(), Biased()])
def test_a_goal_of_words_is_written_at_its_best_only(goal: GoalTemplate, family: str, tmp_path: Path) -> None:
    from jinja2 import TemplateError

    own = make_tokenizer(family)
    baked, encoder = reloaded(own, goal, tmp_path), Encoder(own, goal, 4096)
    for history in HISTORIES:
        assert ids(baked, history) == encoder.prompt_ids(history, goal.text(10))
        assert ids(baked, history, goal=False) == encoder.prompt_ids(history, None)
        with pytest.raises(TemplateError, match="has only the best goal"):
            ids(baked, history, goal=5)


def test_a_template_with_a_goal_of_its_own_and_a_goal_that_reads_like_control_are_refused() -> None:
    class Control(Praise):
        def text(self, goal: float, attributes: Any = ()) -> str:
            return "10<|im_end|>"

    tokenizer = make_tokenizer("chatml")
    with pytest.raises(ConfigError, match=r"control token.*--goal_in_template false"):
        with_goals_in_template(tokenizer, Control().record())
    tokenizer.chat_template += "{{ goal }}"
    with pytest.raises(ConfigError, match=r"variable named 'goal'.*--goal_in_template false"):
        with_goals_in_template(tokenizer, OverallGoal().record())


def test_a_template_that_writes_otherwise_than_training_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from rap_lightning.preferences import chat_template as baked

    monkeypatch.setattr(baked, "SEPARATOR", "\n")
    with pytest.raises(ConfigError, match="writes something else than training did"):
        with_goals_in_template(make_tokenizer("chatml"), OverallGoal().record())


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pairs_folder: Path) -> Path:
    """``model``, and two steps from it: adapter/c/a.ckpt and full/c/a.ckpt."""
    from rap_lightning.callbacks import Checkpoints, RunRecord
    from rap_lightning.callbacks.checkpoint_io import AtomicCheckpointIO

    root = tmp_path_factory.mktemp("leaving")
    make_model(root / "model")
    for name in ("adapter", "full"):
        big = lambda params: torch.optim.SGD(params, lr=0.3)  # noqa: E731
        module, data = build(root / "model", pairs_folder, lora=name == "adapter", optimizer=big)
        saver = Checkpoints(str(root / name / "c"), filename="a")
        options = {"max_steps": 3, "val_check_interval": 3, "enable_checkpointing": True}
        callbacks, plugins = [RunRecord(), saver], [AtomicCheckpointIO()]
        make_trainer(root / "runs" / name, callbacks=callbacks, plugins=plugins, **options).fit(module, data)
        torch.save(logits(module.policy.model), root / name / "logits.pt")
    return root


@torch.no_grad()
def logits(model: Any) -> Tensor:
    made: Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return made


def ckpt(runs: Path, name: str) -> str:
    return str(runs / name / "c" / "a.ckpt")


def test_a_merged_model_is_what_was_trained_and_is_not_baked_twice(
    runs: Path, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on from the exported folder, with another goal, and exported again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    export(ckpt(runs, "adapter"), str(out), merge=True)
    said = re.search(r"differ from adapter on base by (\S+) in float32 \(bound (\S+)\)", capsys.readouterr().err)
    assert said is not None
    trained, bound = torch.load(runs / "adapter" / "logits.pt"), float(said[2])
    assert float(said[1]) <= bound < 1e-4 * float(trained.abs().max())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), trained, atol=bound, rtol=1e-4)
    away = (trained - logits(AutoModelForCausalLM.from_pretrained(runs / "model"))).abs().max()
    assert away > 0.1, "the adapter must have done something"
    assert {f.name for f in out.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "goal.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    modes = {f.stat().st_mode & 0o777 for f in out.iterdir()}
    assert len(modes) == 1, "a server of another user must be able to read all of it, or none"

    module, data = build(out, pairs_folder, goal=OverallGoal(placement="user"))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    assert BEGIN not in data.encoder.tokenizer.chat_template, "training writes goals by itself"
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    export(str(tmp_path / "b.ckpt"), str(tmp_path / "again"))
    own, once, twice = (AutoTokenizer.from_pretrained(f) for f in (runs / "model", out, tmp_path / "again"))
    assert twice.chat_template.count(BEGIN) == 1
    assert unbaked(twice.chat_template) == own.chat_template
    history, encoder = HISTORIES[0], Encoder(own, OverallGoal(placement="user"), 4096)
    assert ids(twice, history) == encoder.prompt_ids(history, OverallGoal().text(10)) != ids(once, history)


def test_predict_asks_with_the_ids_of_the_exported_template(runs: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from rap_lightning.batches.prompts import PredictPrompts
    from rap_lightning.models.generation import Generation

    export(ckpt(runs, "full"), str(tmp_path / "out"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for goal, options in ((None, {}), (3.5, {"goal": 3.5})):
        once = Generation(max_new_tokens=1)
        module, data = build(
            runs / "model", pairs_folder, predict=PredictPrompts(goal=goal), generation=once, max_length=400
        )
        make_trainer(tmp_path).predict(module, data)
        assert len(data._prompts) == 9
        for prompt, row in ((one.ids, one.record) for one in data._prompts):
            assert ids(exported, row["messages"], **options) == list(prompt)


def test_goal_in_template_false_leaves_the_template_and_the_card_tells(runs: Path, tmp_path: Path) -> None:
    export(ckpt(runs, "full"), str(tmp_path / "out"), goal_in_template=False)
    own, written = ((f / "chat_template.jinja").read_bytes() for f in (runs / "model", tmp_path / "out"))
    assert written == own
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The chat template doesn't write goals. Write the goal as the system message" in card
    assert "chat_template_kwargs" not in card


def test_a_wrong_merge_is_noticed_and_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * 1.001)
    with pytest.raises(ConfigError, match="merging changed the model: logits differ by"):
        export(ckpt(runs, "adapter"), str(tmp_path / "out"), merge=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [{"initializer_range": 0.02}, {"initializer_range": 1.0}, {"hidden_size": 128, "num_hidden_layers": 6},
     {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}],
    ids=["small weights", "large weights", "deep", "wide"],
)  # fmt: skip
def test_a_merge_is_held_to_its_models_own_rounding(
    sizes: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right merge passes whatever the model's size; a layer left out and a scale that is 1% off don't."""
    from peft.tuners.lora import Linear

    source = PolicyConfig(str(make_model(tmp_path / "model", **sizes)), lora=Lora(r=4))
    policy = source.build(torch.float32)
    torch.manual_seed(1)
    for name, p in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1 * sizes.get("initializer_range", 0.2))
        elif not p.requires_grad:
            p.data = p.data.to(dtype).float()  # a base model that is stored in it
    state = {name: value.clone() for name, value in policy.model.state_dict().items()}

    def load() -> Any:
        model = source.build(torch.float32).model
        model.load_state_dict(state)
        return model

    tokenizer, right, calls = source.load_tokenizer(), Linear.get_delta_weight, itertools.count()
    first = lambda self, adapter: right(self, adapter) * (next(calls) != 0)  # noqa: E731
    for wrong in (first, lambda self, adapter: right(self, adapter) * 1.01):
        with monkeypatch.context() as patched:
            patched.setattr(Linear, "get_delta_weight", wrong)
            with pytest.raises(ConfigError, match="merging changed the model"):
                merge(load, tokenizer, tmp_path / "out", source)
    said = merge(load, tokenizer, tmp_path / "out", source, ExportOptions(dtype))
    assert ("rounded to bfloat16" in said) is (dtype == torch.bfloat16)


def test_experts_that_transformers_writes_under_other_names_are_exported(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    tokenizer = PolicyConfig(str(tiny)).load_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = PolicyConfig(str(tmp_path / "model"))
    policy = source.build(torch.float32)
    own = {name.removeprefix("model."): value for name, value in policy.state_dict().items()}
    export_policy(policy, policy.state_dict(), tokenizer, tmp_path / "out", source)
    assert set(dict(read_tensors(tmp_path / "out"))) != set(own), "or the test shows nothing"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_a_wrong_write_is_noticed_and_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_utils

    right = modeling_utils.safe_save_file

    def wrong(tensors: dict[str, Tensor], *args: Any, **options: Any) -> None:
        name = sorted(tensors)[0]
        right({**tensors, name: tensors[name] + 0.05}, *args, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", wrong)
    with pytest.raises(ConfigError, match="the written files don't hold"):
        export(ckpt(runs, "full"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="writing it in float32 changed the model"):
        export(ckpt(runs, "adapter"), str(tmp_path / "out"), merge=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "merge"), [("full", False), ("adapter", False), ("adapter", True)])
@pytest.mark.parametrize("where", ["while writing", "Ctrl-C"])
def test_a_full_disk_and_ctrl_c_leave_nothing(
    name: str, merge: bool, where: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft.peft_model
    from transformers import modeling_utils

    def broken(tensors: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        if where == "Ctrl-C":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(modeling_utils, "safe_save_file", broken)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", broken)
    (tmp_path / "out").mkdir()  # an empty folder stays
    error = KeyboardInterrupt if where == "Ctrl-C" else ConfigError
    message = {"while writing": "No space left"}.get(where)
    with pytest.raises(error, match=message):
        export(ckpt(runs, name), str(tmp_path / "out"), merge=merge)
    assert [f.name for f in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "no"), OSError(30, "read-only"), ValueError("another"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
)  # fmt: skip
def test_a_folder_that_fails_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    """What isn't about writing stays what it is."""
    expected = ValueError if isinstance(error, ValueError) else ConfigError
    with pytest.raises(expected), atomic_folder(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "half").write_text("x")
        raise error
    assert not any(tmp_path.iterdir())


def test_what_stands_in_the_way_and_what_has_no_effect_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    adapter, full = ckpt(runs, "adapter"), ckpt(runs, "full")
    for name in ("file", "folder", "link"):
        with pytest.raises(ConfigError, match=f"{name} exists and is not empty"):
            export(full, str(tmp_path / name))
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"can't be written: (Not a directory|File exists)"):
        export(full, str(tmp_path / "file" / "out"))
    for options, message in (
        ({"checkpoint": full, "merge": True}, "--merge has no effect"),
        ({"checkpoint": full, "private": True}, "--private has no effect"),
        ({"checkpoint": full, "max_shard_size": "much"}, "--max_shard_size must be a size"),
        ({"checkpoint": adapter, "max_shard_size": "2GB"}, "--max_shard_size has no effect on an adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(output=out, **options)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_damaged_checkpoint_is_refused(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(Path(ckpt(runs, name)).read_bytes())
    with zipfile.ZipFile(ckpt(runs, name)) as archive:  # a byte between two records would damage nothing
        largest = max((archive.read(one) for one in archive.infolist()), key=len)
    content[content.index(largest) + len(largest) // 2] ^= 1
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.ckpt is refused: .*not what was written"):
        export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    (tmp_path / "b.ckpt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ConfigError, match=r"for example, a pickle"):
        export(str(tmp_path / "b.ckpt"), str(tmp_path / "out"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]
    assert "no checksums" not in capsys.readouterr().err
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(ckpt(runs, name), weights_only=True), tmp_path / "c.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    export(str(tmp_path / "c.ckpt"), str(tmp_path / "out"))
    assert "c.ckpt has no checksums" in capsys.readouterr().err


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_does_not_leave_for_a_base_model_that_has_changed(merge: bool, runs: Path, tmp_path: Path) -> None:
    """Of the same shapes, so that its weights would fit; and of others."""
    shutil.copytree(runs / "model", tmp_path / "kept")
    try:
        for sizes, message in (({}, "trained on another base model"), ({"hidden_size": 64}, "another base|fit")):
            torch.manual_seed(1)
            model = make_model(tmp_path / f"other{len(sizes)}", **sizes)
            if not sizes:
                from transformers import AutoModelForCausalLM

                changed = AutoModelForCausalLM.from_pretrained(model)
                changed.model.layers[0].mlp.up_proj.weight.data += 0.5
                changed.save_pretrained(model)
            shutil.rmtree(runs / "model")
            shutil.copytree(model, runs / "model")
            with pytest.raises(ConfigError, match=message):
                export(ckpt(runs, "adapter"), str(tmp_path / "out"), merge=merge)
            assert not (tmp_path / "out").exists()
            if sizes:
                with pytest.raises(ConfigError, match="doesn't fit the model at"):
                    export(ckpt(runs, "full"), str(tmp_path / "out"))
    finally:
        shutil.rmtree(runs / "model")
        shutil.copytree(tmp_path / "kept", runs / "model")


@pytest.mark.parametrize("reference", ["Frozen", "AdaptersOff"])
def test_frozen_parts_of_an_adapter_stay_frozen_and_leave_with_it(
    reference: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """Half of a new adapter's weights are random: frozen, they are nowhere but in the checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import rap_lightning
    from rap_lightning.models.policy_config import Lora, PolicyConfig

    policy = PolicyConfig(str(tiny), lora=Lora(r=4), freeze=["lora_A"])
    big = lambda params: torch.optim.SGD(params, lr=0.3)  # noqa: E731
    module, data = build(
        tiny, pairs_folder, policy=policy, optimizer=big, reference=getattr(rap_lightning, reference)()
    )
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not any(p.requires_grad for name, p in module.policy.named_parameters() if "lora_A" in name)
    torch.manual_seed(123)
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(module.policy.model))


def test_shards_and_dtypes_are_as_asked(runs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(ckpt(runs, "full"), str(tmp_path / "out"), dtype="bfloat16", max_shard_size="50KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert {t.dtype for f in files for t in load_file(f).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert f"{tmp_path}" not in "".join(f.read_text() for f in (tmp_path / "out").glob("*.json"))


# -- sharded checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["full", pytest.param("adapter", marks=pytest.mark.slow)])
def test_shards_of_two_processes_leave_as_what_fit_gathered(
    kind: str, start_process: Any, world: Path, tmp_path: Path
) -> None:
    options = arguments(world, tmp_path / "run", steps=2, kind=kind)
    kept = [o if options[i - 1] != "--export.enabled" else "true" for i, o in enumerate(options)]
    pair = RankPair(start_process, kept, FSDP2)
    assert pair.end() == [0, 0], pair.said[-2000:]
    folder = next(p for p in (tmp_path / "run").rglob("*.ckpt") if "step=2" in p.name and not p.is_symlink())
    assert len(list(folder.glob("*.distcp"))) == 2
    export(str(folder), str(tmp_path / "out"))
    gathered = next((tmp_path / "run").rglob("hf"))
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (gathered / file).read_bytes()
    assert ids_of(tmp_path / "out") == ids_of(gathered)

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            export(str(folder), str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()

    checksum = folder / INDEX_CHECKSUM
    checksum.rename(tmp_path / "checksum")  # as of a folder that another program wrote
    export(str(folder), str(tmp_path / "unverified"))
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    refused(r"it holds (os|posix)\.system")
    assert not (tmp_path / "ran").exists()
    (folder / ".metadata").write_bytes(whole)
    (tmp_path / "checksum").rename(checksum)
    shard = next(folder.glob("__1_*.distcp"))
    flip_bit(shard)
    refused("distcp is refused: its content is not what was written")
    shard.unlink()
    refused("distcp")


def ids_of(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    return ids(AutoTokenizer.from_pretrained(folder), HISTORIES[0])


# -- card and Hub -----------------------------------------------------------------------------------------------------


def test_the_card_tells_data_method_scale_and_how_to_prompt_and_no_path(runs: Path, tmp_path: Path) -> None:
    export(
        ckpt(runs, "adapter"), str(tmp_path / "my-model"), merge=True, base_model="org/base", license="apache-2.0"
    )  # fmt: skip
    card = (tmp_path / "my-model" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["base_model"] == "org/base"
    assert about["license"] == "apache-2.0"
    assert about["library_name"] == "transformers"
    (train,) = [row for row in body.splitlines() if row.startswith("| train")]
    report = json.loads(next((runs / "runs" / "adapter").rglob("data_report.json")).read_text())
    counts = next(r for r in report if r["split"] == "train")
    told = [int(cell.replace(",", "")) for cell in train.strip("| ").split(" | ")[2:]]
    assert told == [counts["rows_read"], counts["pairs_kept"], counts["relabelled_pairs"]]
    assert told[0] == 23
    for part in (
        "`DPO(beta=", "| reference | AdaptersOff |", "| adapter r | 4 |", "lr=0.3", "| seed | 0 |", "| step | 3 |",
        "low 1, high 10", OverallGoal().text(10), "goal=NUMBER asks for another, from 1 to 10", "abs/2410.08067",
        '"chat_template_kwargs": {"goal": 5.5}', "As last measured.", "| val/loss |",
        f"torch {metadata.version('torch')}",
    ):  # fmt: skip
        assert part in body, part
    assert "/tmp" not in card
    assert str(runs.parent) not in card
    (code, *_) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    code = code.replace('"my-model"', repr(str(tmp_path / "my-model")))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code.replace("max_new_tokens=256", "max_new_tokens=2"), {})  # what the card shows must run
    # a server answers only for the model by the very text that it was started with
    (served,) = re.findall(r"^transformers serve (\S+)$", body, re.MULTILINE)
    assert served == "my-model"
    assert f'"model": "{served}"' in body
    assert 'pip install "transformers[serving]"' in body


class FakeHub:
    """What push calls, kept; ``failure`` is raised by the upload, ``public`` is what the repository is already."""

    calls: list[tuple[str, dict[str, Any]]]
    failure: Exception | None = None
    public = False

    def __init__(self, token: str) -> None:
        FakeHub.calls = [("token", {"token": token})]

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create", options | {"repository": repository}))

    def repo_info(self, repository: str, **options: Any) -> Any:
        return type("Info", (), {"private": not self.public})

    def upload_folder(self, **options: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("upload", options | {"files": {f.name for f in options["folder_path"].iterdir()}}))


SECRET = "hf_verysecretverysecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    import huggingface_hub

    class Hub(FakeHub):
        pass

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return Hub


@pytest.mark.parametrize(("asked", "private"), [(None, True), (True, True), (False, False)])
def test_a_push_is_private_unless_told_and_never_tells_the_token(
    asked: bool | None, private: bool, hub: Any, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(ckpt(runs, "full"), str(tmp_path / "out"), push_to_hub="org/name", private=asked)
    (_, token), (_, created), (_, uploaded) = FakeHub.calls
    assert token["token"] == SECRET
    assert (created["repository"], created["private"], uploaded["repo_id"]) == ("org/name", private, "org/name")
    assert {"model.safetensors", "README.md", "chat_template.jinja"} <= uploaded["files"]
    assert uploaded["commit_message"].endswith("step 3")
    said = capfd.readouterr()
    assert "pushed https://huggingface.co/org/name" in said.out
    assert SECRET not in said.out + said.err
    assert not [f for f in (tmp_path / "out").iterdir() if SECRET.encode() in f.read_bytes()]


def test_a_push_that_fails_keeps_folder_and_secret(
    hub: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.failure = RuntimeError(f"403 for Bearer {SECRET}")
    with pytest.raises(ConfigError, match=r"the Hub didn't take the folder: 403 for Bearer \*\*\*.*hf upload") as error:
        export(ckpt(runs, "full"), str(tmp_path / "out"), push_to_hub="org/name")
    assert error.value.__suppress_context__
    assert (tmp_path / "out" / "model.safetensors").exists()
    hub.failure, hub.public = None, True
    with pytest.raises(ConfigError, match="exists and is public"):
        export(ckpt(runs, "full"), str(tmp_path / "two"), push_to_hub="org/name")
    assert [name for name, _ in FakeHub.calls] == ["token", "create"]
    with pytest.raises(ConfigError, match="--base_model ORG/NAME"):
        export(ckpt(runs, "adapter"), str(tmp_path / "three"), push_to_hub="org/name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "absent"))
    for name, message in (
        ("org/name", "no token. Log in with .hf auth login.*HF_TOKEN"),
        ("name", "ORG/NAME"),
        ("a b/c", "not a name"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(ckpt(runs, "full"), str(tmp_path / "three"), push_to_hub=name)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "two"]
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err


def test_the_token_of_hf_auth_login_counts(
    hub: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(f"{SECRET}\n")
    export(ckpt(runs, "full"), str(tmp_path / "out"), push_to_hub="org/name")
    assert FakeHub.calls[0] == ("token", {"token": SECRET})


EVIL = (
    "</code><script>alert(1)</script>", "a`b``c", "x\n---\nlicense: evil\n---\n# Owned", "[here](javascript:alert(1))",
    "a | b", "```\n<img src=x onerror=alert(1)>\n```", "![](http://evil/x.png)", "*b* & &lt;", "'; touch owned; '",
    '"); import os; ("', "# heading", "{{ 7 * 7 }}", "a: b: c", "\x1b[2J", "$$x$$",
)  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_no_name_writes_markup_metadata_or_code_into_the_card(evil: str) -> None:
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    from rap_lightning.models.model_card import model_card

    split = {
        "split": evil,
        "source": evil,
        "rows_read": 1,
        "pairs_kept": 1,
        "relabelled_pairs": 2,
        "dropped": {evil: 1},
    }
    goal = {
        "template": evil, "scale": {"class": evil, "low": 1, "high": 10}, "best": evil, "attributes": [evil],
        "placement": "system",
    }  # fmt: skip
    facts = {
        "base_model": {"name": evil, "local": False}, "goal": goal, "reference": evil, "versions": {"a": "1"},
        "loss": {"name": evil, "shown": evil, "about": evil}, "hyperparameters": {evil: evil}, "adapter": {evil: evil},
        "metrics": {f"val/{evil}": 1.0}, "data": {"sources": [{"name": evil, "local": False}], "relabel": evil,
        "splits": [split]},
    }  # fmt: skip
    text = model_card(facts, adapter=True, goal_in_template=False, name=evil, title=evil, license=evil)
    card = ModelCard(text)
    about = card.data.to_dict()
    assert set(about) <= {"base_model", "library_name", "pipeline_tag", "tags", "license", "datasets"}
    assert "base_model" not in about
    assert "datasets" not in about
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    for tag in ("<script", "<img", 'href="javascript', "<h1>Owned"):
        assert tag not in html, tag
    headings = re.findall(r"<h\d>(.*?)</h\d>", html)
    assert headings[1:] == ["How to prompt", "Goals", "Data", "Training", "Metrics", "Versions"]
    for block in re.findall(r'<code class="language-python">(.*?)</code>', html, re.DOTALL):
        code = compile(unescape(block), "card", "exec")
        assert "os" not in code.co_names


# -- where a run comes from -------------------------------------------------------------------------------------------


def test_a_runs_folder_says_where_it_comes_from_and_its_line_repeats_it(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "-b", "trunk"], [*me, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *command], check=True)
    (tmp_path / "note").write_text("not committed")
    options = [
        "--model.policy.path", str(tiny), "--model.policy.lora.r", "2", "--data.source", str(pairs_folder),
        "--data.max_length", "160", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01",
        "--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--seed_everything", "7", "--data.seed", "3",
    ]  # fmt: skip
    assert call(monkeypatch, "fit", *options) == 0
    first = tmp_path / "runs" / "version_0"
    run = json.loads((first / "run.json").read_text())
    assert run["packages"]["torch"] == metadata.version("torch")  # without the +cu124 that torch itself adds
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (run["git"]["commit"], run["git"]["branch"], run["git"]["dirty"]) == (head, "trunk", True)
    assert "note" in run["git"]["changed_files"]
    assert (run["seed"], run["data_seed"], run["facts"]["step"]) == (7, 3, 4)
    assert run["command"].startswith("rap-lightning fit --model.policy.path")
    assert run["finished"] >= run["started"]
    assert {"config.yaml", "data_report.json", "goal.json", "metrics.csv"} <= {f.name for f in first.iterdir()}
    card = (first / "hf" / "README.md").read_text()
    assert "\n# version_0\n" in card, "the run's name"
    assert 'AutoModelForCausalLM.from_pretrained("hf")' in card
    assert "With transformers and peft, in the directory of the folder `hf`:" in card
    assert "\ntransformers serve hf\n" in card
    there, line = run["repeat"].split(" && ")
    assert there == f"cd {shlex.quote(str(tmp_path))}"
    monkeypatch.chdir(os.path.relpath(tmp_path, Path.cwd()))
    program, *again = shlex.split(line)
    assert program == "rap-lightning"
    torch.manual_seed(99)
    assert call(monkeypatch, *again) == 0
    one, two = (
        load_file(tmp_path / "runs" / v / "hf" / "adapter_model.safetensors") for v in ("version_0", "version_1")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)


@pytest.mark.parametrize("nodes", [1, 2])
def test_under_torchrun_a_runs_line_names_the_launcher(
    nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what torchrun itself sets, read by a process of it."""
    from rap_lightning.callbacks.run_record import _repeat

    (tmp_path / "config.yaml").write_text("")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    how = ["--standalone"] if nodes == 1 else ["--master_addr", "localhost", "--master_port", str(port)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc_per_node", "1", *how]
    (tmp_path / "show.py").write_text(code)
    ranks = [
        subprocess.Popen(
            [*torchrun, *(["--node_rank", str(rank)] if nodes > 1 else []), "show.py"],
            cwd=tmp_path,
            stdout=-1,
            text=True,
        )
        for rank in range(nodes)
    ]
    seen, *_ = [json.loads(rank.communicate(timeout=200)[0]) for rank in ranks]
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, seen[name])
    line = str(_repeat(tmp_path, tmp_path)).split(" && ")[1]
    start = f"torchrun --nnodes={nodes} --nproc_per_node=1 "
    more = "--standalone"
    if nodes > 1:
        more = f'--node_rank="${{NODE_RANK:?on every node, from 0}}" --master_addr=localhost --master_port={port}'
    assert line == f"{start}{more} --no-python rap-lightning fit --config config.yaml"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert str(_repeat(tmp_path, tmp_path)).endswith(" && rap-lightning fit --config config.yaml")


def test_what_only_training_needed_does_not_stand_in_the_way_on_another_machine() -> None:
    """Offloading is refused without a GPU, which whoever exports or samples need not have."""
    recorded = {"path": "x", "lora": None, "activation_offloading": True, "compile": True, "trust_remote_code": True}
    config = config_of(recorded, Path("last.ckpt"), trust_remote_code=False)
    assert (config.activation_offloading, config.compile, config.trust_remote_code) == (False, False, False)
    with pytest.raises(ConfigError, match=r"last\.ckpt was written by another version"):
        config_of(recorded | {"new": 1}, Path("last.ckpt"), trust_remote_code=False)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_of_a_model_that_no_files_were_loaded_into_are_written_and_read_back(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """There save_pretrained empties the dict of weights that it is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = make_model(tmp_path / "model")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    policy, config = Policy(model), PolicyConfig(str(path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = full_state(policy)
    export_policy(policy, state, config.load_tokenizer(), tmp_path / "out", config, ExportOptions(dtype=dtype))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(value, before[name].to(value.dtype)) for name, value in written.items())
    assert {value.dtype for value in written.values()} == {dtype or torch.float32}
    assert state.keys() == {f"model.{name}" for name in before}, "the caller's dict stays whole"


def test_a_model_trained_on_plain_pairs_is_not_asked_for_a_goal_by_itself(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--model.policy.path", str(tiny), "--data.source", str(pairs_folder), "--data.max_length", "160",
        "--data.relabel", "none", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1",
    ]  # fmt: skip
    assert call(monkeypatch, "fit", *options) == 0
    run = tmp_path / "runs" / "version_0"
    hf = run / "hf"
    assert json.loads((hf / "goal.json").read_text())["trained"] is False
    assert json.loads((run / "goal.json").read_text())["trained"] is False
    assert BEGIN not in (hf / "chat_template.jinja").read_text()
    card = (hf / "README.md").read_text()
    assert "as any chat model" in card
    assert "goal-conditioned" not in card
    generate = ["generate", "--model", str(hf), "--prompts", str(pairs_folder), "--limit", "1", "--max_new_tokens", "2"]
    found = {}
    for name, more in {"own": [], "asked": ["--goal", "best"]}.items():
        assert call(monkeypatch, *generate, "--output", f"{name}.jsonl", *more) == 0
        found[name] = json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0])["goal"]
    assert found == {"own": None, "asked": "10"}
    predict = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert call(monkeypatch, *predict, "--model.generation.max_new_tokens", "2", "--data.predict.limit", "1") == 0
    (written,) = tmp_path.glob("runs/*/predictions.jsonl")
    assert json.loads(written.read_text().splitlines()[0])["goal"] is None
