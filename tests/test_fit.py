"""The system trained for real: step 0, the same maths by other roads, checkpoints, export, prediction."""

import json
import math
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from conftest import build, make_model, make_trainer, read_jsonl, scored_rows, sgd, write_jsonl
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import DPO, Hinge, SimPO
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import NoReference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.module import PreferenceModule
from rap_lightning.training.schedules import ConstantWithWarmup, CosineWithWarmup

CONSTANT = ConstantWithWarmup()


def fit(folder: Path, model: Path, data: Path, *, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"optimizer": sgd, "schedule": CONSTANT, "loss": DPO(0.5)} | options
    module, datamodule = build(model, data, **options)
    runner = make_trainer(folder, **(trainer or {}))
    runner.fit(module, datamodule)
    return module


def logged(folder: Path) -> list[dict[str, float]]:
    import csv

    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def weights(module: PreferenceModule) -> dict[str, torch.Tensor]:
    assert module.policy is not None
    return {n: p.detach().clone() for n, p in module.policy.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.isfinite(a[name]).all()
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [False, True])
def test_step_zero_is_log_two_under_every_reference(
    lora: bool, precision: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    for reference in [Frozen()] + ([AdaptersOff()] if lora else []):
        folder = tmp_path / type(reference).__name__
        fit(
            folder, tiny, pairs_folder, lora=lora, reference=reference, loss=DPO(1.0),
            trainer={"max_steps": 1, "precision": precision},
        )  # fmt: skip
        first = logged(folder)[0]
        assert abs(first["loss"] - math.log(2)) < 1e-6
        assert first["rewards/margins"] == 0.0
        assert first["rewards/accuracies"] == 0.5


def test_a_policy_that_differs_from_its_reference_at_step_zero_is_refused(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    class Changed(PreferenceModule):
        def configure_model(self) -> None:
            super().configure_model()
            assert self.policy is not None
            with torch.no_grad():
                next(self.policy.parameters()).mul_(1.1)

    module, data = build(tiny, pairs_folder)
    module = Changed(module.policy_config)
    with pytest.raises(ConfigError, match="should be equal before the first step"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


def test_another_model_as_reference_is_used(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", num_hidden_layers=1)
    fit(tmp_path / "run", tiny, pairs_folder, reference=Frozen(str(other)), trainer={"max_steps": 1})
    assert abs(logged(tmp_path / "run")[0]["rewards/margins"]) > 0.01


def test_training_raises_chosen_over_rejected_under_both_goals(tiny: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "few.jsonl", scored_rows(4))
    adam = lambda params: torch.optim.AdamW(params, lr=3e-3)  # noqa: E731
    fit(tmp_path, tiny, data, optimizer=adam, loss=DPO(0.1), batch_size=8, trainer={"max_epochs": 60})
    last = logged(tmp_path)[-1]
    # responses change places between the goals, so only a policy that reads the goal gets both right
    assert last["rewards/accuracies/chosen-goal"] == last["rewards/accuracies/rejected-goal"] == 1.0
    assert last["rewards/margins/chosen-goal"] > 0.3
    assert last["rewards/margins/rejected-goal"] > 0.3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_of_a_fused_optimizer_are_clipped(
    precision: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """Lightning refuses to, in mixed precision, where an optimizer could unscale gradients itself."""
    fused = lambda params: torch.optim.SGD(params, lr=1.0, fused=True)  # noqa: E731
    options: dict[str, Any] = {"precision": precision, "gradient_clip_val": 1e-3, "max_steps": 1}
    if precision == "16-mixed":  # by that name Lightning takes bfloat16 on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        options |= {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    after = weights(fit(tmp_path, tiny, pairs_folder, optimizer=fused, trainer=options))
    before = dict(PolicyConfig(str(tiny)).build(torch.float32).named_parameters())
    moved = [(after[name] - before[name].detach()).norm() for name in before]
    assert float(torch.stack(moved).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("lora", "alpha"), [(False, 0.6), (True, 1.0)])
def test_weights_all_in_bfloat16_train_beside_a_copy_of_them(
    lora: bool, alpha: float, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    module, data = build(
        tiny, pairs_folder, lora=lora, optimizer=sgd, schedule=CONSTANT, loss=DPO(1.0),
        reference=Synchronised(every=2, alpha=alpha),
    )  # fmt: skip
    trainer = make_trainer(tmp_path, max_steps=4, precision="bf16-true")
    with pytest.warns(UserWarning, match="Trainable weights are bfloat16"):
        trainer.fit(module, data)
    trained = {n: p for n, p in module.policy.named_parameters() if p.requires_grad}
    copy = module.reference.state_dict()
    assert {p.dtype for p in [*trained.values(), *copy.values()]} == {torch.bfloat16}
    assert all(torch.equal(copy[name], p) for name, p in trained.items()) == (alpha == 1)  # step 4 copies
    first, *_, last = logged(tmp_path)
    assert first["rewards/margins"] == 0.0
    assert math.isfinite(last["loss"])
    assert last["logps/chosen"] != first["logps/chosen"]


def test_another_dtype_than_the_precision_converts_to_is_refused(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    policy = PolicyConfig(str(tiny), dtype="float32")
    with pytest.raises(ConfigError, match=r"dtype float32 has no effect with --trainer\.precision bf16-true"):
        fit(tmp_path, tiny, pairs_folder, policy=policy, trainer={"precision": "bf16-true"})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_accumulation_equals_one_batch_also_in_the_epochs_uneven_last_step(
    batch_size: int, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    # 46 relabelled pairs in steps of 12: the last step has 10
    whole = fit(tmp_path / "a", tiny, pairs_folder, batch_size=12)
    parts = fit(
        tmp_path / "b", tiny, pairs_folder, batch_size=batch_size,
        trainer={"accumulate_grad_batches": 12 // batch_size},
    )  # fmt: skip
    assert_same(weights(whole), weights(parts), 2e-5)
    a, b = ([row for row in logged(tmp_path / run) if "loss" in row] for run in "ab")
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed", "tree"])
def test_layouts_and_forward_passes_within_a_token_budget_train_the_same(
    layout: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "a", tiny, pairs_folder, batch_size=12, layout="padded")
    passes: list[int] = []

    class Counted(PreferenceModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            passes.append(len(batch))
            return super().training_step(batch, batch_idx)

    module, data = build(
        tiny, pairs_folder, batch_size=6, token_budget=400, layout=layout, optimizer=sgd, schedule=CONSTANT,
        loss=DPO(0.5),
    )  # fmt: skip
    parts = Counted(module.policy_config, DPO(0.5), optimizer=sgd, schedule=CONSTANT)
    make_trainer(tmp_path / "b", accumulate_grad_batches=2).fit(parts, data)
    assert max(passes) > 1, "or the test shows nothing"
    assert_same(weights(whole), weights(parts), 5e-5)
    a, b = ([row for row in logged(tmp_path / run) if "loss" in row] for run in "ab")
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_model_that_shares_nothing_says_so_once_and_trains_the_same(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rap_lightning.models import blockwise_attention

    said: list[str] = []
    monkeypatch.setattr("rap_lightning.training.build.rank_zero_info", lambda text: said.append(text))
    together = fit(tmp_path / "together", tiny, pairs_folder, trainer={"max_steps": 3})
    assert not any("one at a time" in text for text in said)
    all_at_once = lambda runs: [(slice(0, runs[-1][1]), slice(0, runs[-1][1]), True)]  # noqa: E731
    monkeypatch.setattr(blockwise_attention, "_parts", all_at_once)
    apart = fit(tmp_path / "apart", tiny, pairs_folder, trainer={"max_steps": 3})
    assert sum("one at a time" in text for text in said) == 1
    assert_same(weights(together), weights(apart), 5e-5)


def test_frozen_and_adapters_off_train_the_same(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    runs = [
        fit(tmp_path / type(r).__name__, tiny, pairs_folder, lora=True, reference=r) for r in (Frozen(), AdaptersOff())
    ]
    assert_same(weights(runs[0]), weights(runs[1]), 1e-6)
    start = PolicyConfig(str(tiny), lora=runs[0].policy_config.lora).build(torch.float32)
    moved = [n for n, p in start.named_parameters() if not torch.equal(p, dict(runs[0].policy.named_parameters())[n])]
    assert moved
    assert all(".lora_" in name for name in moved), "only the adapter is trained"


def test_a_loss_without_reference_loads_none(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, tiny, pairs_folder, loss=SimPO(), trainer={"max_steps": 2})
    assert isinstance(module.reference, NoReference)
    assert logged(tmp_path)[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_combinations_without_effect_are_refused_before_anything_loads() -> None:
    config = PolicyConfig("/nowhere")
    for arguments, message in [
        ({"loss": SimPO(), "reference": Frozen()}, "needs no reference"),
        ({"loss": DPO(), "reference": NoReference()}, "needs a reference"),
        ({"loss": DPO(), "reference": AdaptersOff()}, "needs an adapter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PreferenceModule(config, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="revision has no effect"):
        Frozen(revision="main")


def test_a_loss_of_the_users_own_trains(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    class Shifted(Hinge):
        requires = frozenset({"reference", "rewards"})

        def forward(self, policy: Any, reference: Any, rewards: Any) -> torch.Tensor:  # type: ignore[override]
            seen.append(rewards.chosen - rewards.rejected)
            return super().forward(policy, reference) + 1

    seen: list[torch.Tensor] = []
    fit(tmp_path, tiny, pairs_folder, loss=Shifted(0.1), trainer={"max_steps": 1})
    assert logged(tmp_path)[0]["loss"] == pytest.approx(2.0)
    gaps = torch.cat(seen)
    assert (gaps > 0).any(), "a chosen-goal half gains reward"
    assert (gaps < 0).any(), "a rejected-goal half loses some"


def test_metrics_have_the_names_that_dashboards_know_and_validation_is_relabelled(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    fit(tmp_path, tiny, pairs_folder, trainer={"max_steps": 2, "val_check_interval": 2})
    rows = logged(tmp_path)
    names = {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected",
    }  # fmt: skip
    origins = {f"{name}/{origin}" for name in names for origin in ("chosen-goal", "rejected-goal")}
    assert names | origins | {"lr", "grad_norm", "pairs_per_second", "tokens_per_second"} <= set(rows[0])
    assert {f"val/{name}" for name in names | origins} <= set(rows[-1])
    assert rows[-1]["val/pairs"] == 2 * 9
    assert rows[0]["grad_norm"] > 0


def test_validation_means_do_not_depend_on_the_batch_size(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    results = []
    for batch_size in (1, 4, 18):
        other = make_model(tmp_path / f"other{batch_size}", num_hidden_layers=1)
        module, data = build(tiny, pairs_folder, batch_size=batch_size, reference=Frozen(str(other)))
        make_trainer(tmp_path / str(batch_size)).validate(module, data, verbose=False)
        results.append(logged(tmp_path / str(batch_size))[-1])
    for other in results[1:]:
        for name, value in results[0].items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


class StopAt(Exception):
    pass


class Interrupt(pl.Callback):
    """Raises before or after the batch with this number, counted over the run."""

    def __init__(self, batch: int, where: str) -> None:
        self.left, self.where = batch, where

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0 and self.where == "before":
            raise StopAt

    def on_train_batch_end(self, *_: Any) -> None:
        if self.left <= 0 and self.where == "after":
            raise StopAt


def checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.rglob("*.ckpt") if not p.is_symlink()), key=lambda path: path.stat().st_mtime)


def interruptible(workers: int, lora: bool) -> dict[str, Any]:
    """46 relabelled pairs, 2 a batch, 3 batches a step: 23 batches and 8 steps an epoch."""
    return {
        "lora": lora, "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2), "schedule": CosineWithWarmup(),
        "num_workers": workers, "batch_size": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights and losses by step of the run without an interruption, of a full model or of an adapter."""

    @cache
    def run(lora: bool) -> tuple[dict[str, torch.Tensor], dict[float, float]]:
        folder = tmp_path_factory.mktemp("whole")
        trainer = {"max_epochs": 2, "accumulate_grad_batches": 3}
        module = fit(folder, tiny, pairs_folder, trainer=trainer, **interruptible(0, lora))
        return weights(module), {r["step"]: r["loss"] for r in logged(folder) if "loss" in r}

    return run


@pytest.mark.parametrize(
    ("stop", "where", "workers", "lora"),
    [
        (4, "before", 0, False),  # between batches that belong to one step
        (6, "before", 0, False),
        (6, "after", 0, False),
        (7, "after", 0, True),
        (22, "before", 0, False),  # within the epoch's last, shorter step
        (23, "after", 0, False),  # at the epoch's end
        (24, "before", 0, False),
        (33, "after", 0, True),
        (35, "before", 2, False),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    stop: int, where: str, workers: int, lora: bool, uninterrupted: Any, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    options = interruptible(workers, lora)
    trainer = {"max_epochs": 2, "accumulate_grad_batches": 3}
    saver = ModelCheckpoint(tmp_path / "saved", save_last="link", save_on_exception=True)
    stopping = {"enable_checkpointing": True, "callbacks": [saver, Interrupt(stop, where)]}
    with pytest.raises(StopAt):
        fit(tmp_path / "part", tiny, pairs_folder, trainer=trainer | stopping, **options)
    saved = checkpoints(tmp_path / "saved")[-1]
    content = torch.load(saved, weights_only=True)  # nothing but plain values and tensors
    assert not [name for name in content["state_dict"] if "reference" in name]
    assert all(".lora_" in name for name in content["state_dict"]) is lora, "an adapter's base model is kept out"

    module, data = build(tiny, pairs_folder, **({"loss": DPO(0.5)} | options))
    make_trainer(tmp_path / "rest", **trainer).fit(module, data, ckpt_path=str(saved), weights_only=True)
    final, expected = uninterrupted(lora)
    assert_same(final, weights(module))
    part, rest = ({r["step"]: r["loss"] for r in logged(tmp_path / run) if "loss" in r} for run in ("part", "rest"))
    assert max(expected) == 16
    assert list(rest) == [step for step in expected if step > content["global_step"]], "each step is logged once"
    assert part | rest == expected


def test_a_checkpoint_that_lacks_a_policy_weight_is_refused(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module, data = build(tiny, pairs_folder, lora=True)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["state_dict"].pop(next(iter(content["state_dict"])))
    torch.save(content, tmp_path / "b.ckpt")
    module, data = build(tiny, pairs_folder, lora=True)
    with pytest.raises(ConfigError, match=r"doesn't fit the policy.*Missing key"):
        make_trainer(tmp_path / "again", max_steps=2).fit(module, data, ckpt_path=str(tmp_path / "b.ckpt"))


def first_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.arange(20)[None]).logits
    return logits


def test_the_exported_folder_loads_with_plain_transformers(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rap_lightning.callbacks import ExportHF
    from rap_lightning.preferences.chat_template import unbaked

    module = fit(tmp_path, tiny, pairs_folder, trainer={"max_steps": 2, "callbacks": [ExportHF()]})
    (folder,) = tmp_path.rglob("hf")
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(first_logits(model), first_logits(module.policy.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert unbaked(tokenizer.chat_template) == module.tokenizer.chat_template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], return_tensors="pt", return_dict=True)
    assert model.generate(**text, max_new_tokens=3).shape[1] > text["input_ids"].shape[1]


def test_an_exported_adapter_gives_the_same_logits_kept_and_merged(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from rap_lightning.callbacks import ExportHF

    callbacks = [ExportHF(merge=True)]
    big = lambda params: torch.optim.SGD(params, lr=0.3)  # noqa: E731
    module = fit(
        tmp_path, tiny, pairs_folder, lora=True, optimizer=big, trainer={"max_steps": 6, "callbacks": callbacks}
    )
    trained = first_logits(module.policy.model)
    with module.policy.model.disable_adapter():
        assert (trained - first_logits(module.policy.model)).abs().max() > 1e-2, "the adapter must have done something"
    (kept,), (merged,) = tmp_path.rglob("hf"), tmp_path.rglob("hf-merged")
    assert torch.equal(first_logits(AutoModelForCausalLM.from_pretrained(kept)), trained)
    torch.testing.assert_close(
        first_logits(AutoModelForCausalLM.from_pretrained(merged)), trained, atol=1e-4, rtol=1e-4
    )
    assert not (merged / "adapter_config.json").exists()


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_exports_on_demand_to_what_fit_exported(
    lora: bool, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from rap_lightning.callbacks import ExportHF
    from rap_lightning.commands.export import export

    module, data = build(tiny, pairs_folder, lora=lora, optimizer=sgd)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[ExportHF()])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    (written,), (again,) = ([*f.glob("*.safetensors")] for f in (next(tmp_path.rglob("hf")), tmp_path / "out"))
    assert_same(load_file(written), load_file(again))
    told = [json.loads((file.parent / "goal.json").read_text()) for file in (written, again)]
    assert told == [data.goal.record()] * 2, "a model must leave with the goal it was trained at"
    with pytest.raises(ConfigError, match="not empty"):
        export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    (tmp_path / "broken.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:1000])
    for name, message in [("missing.ckpt", "no such file"), ("broken.ckpt", "can't be read")]:
        with pytest.raises(ConfigError, match=message):
            export(str(tmp_path / name), str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()


def test_predict_writes_a_line_per_prompt_at_the_goal(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.batches.prompts import PredictPrompts
    from rap_lightning.callbacks import WritePredictions
    from rap_lightning.models.generation import Generation

    for goal, printed in ((None, "10"), (3.5, "3.5")):
        module, data = build(
            tiny, pairs_folder, predict=PredictPrompts(goal=goal, limit=5), generation=Generation(max_new_tokens=4)
        )
        trainer = make_trainer(tmp_path / printed, callbacks=[WritePredictions()])
        trainer.predict(module, data)
        (path,) = (tmp_path / printed).rglob("predictions.jsonl")
        lines = read_jsonl(path)
        assert len(lines) == 5
        assert {line["goal"] for line in lines} == {printed}
        assert all(line["messages"][-1]["role"] == "user" and isinstance(line["response"], str) for line in lines)
        assert f"Overall score: {printed}." in data.encoder.tokenizer.decode(data._prompts[0].ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/nowhere/x.jsonl"}, "no such file or folder"),
        ({"val_split": "holdout"}, "splits train, test.*'holdout'"),
        ({"train_split": "training"}, "splits train, test.*'training'"),
    ],
)
def test_wrong_sources_are_named(
    change: dict[str, Any], message: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    module, data = build(tiny, Path(change.pop("source", pairs_folder)), **change)
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path).fit(module, data)
    assert module.policy is None, "the model must not be loaded before the data are known to be good"


def test_missing_score_columns_and_unusable_rows_are_named(tiny: Path, tmp_path: Path) -> None:
    plain = [{k: v for k, v in row.items() if "score" not in k} for row in scored_rows(3)]
    tied = [row | {"score_chosen": 5.0, "score_rejected": 5.0} for row in scored_rows(3)]
    for rows, message in [(plain, "missing score_chosen, score_rejected"), (tied, "no pair is left(.|\n)*3: tie")]:
        module, data = build(tiny, write_jsonl(tmp_path / f"{len(message)}.jsonl", rows))
        with pytest.raises(DataError, match=message):
            make_trainer(tmp_path).fit(module, data)
    (tmp_path / "empty.jsonl").write_text("")
    module, data = build(tiny, tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        make_trainer(tmp_path).fit(module, data)


def test_a_policy_that_is_no_model_is_named(pairs_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, said in (("model", "Expected a Hugging Face folder"), ("nothing", r"no such folder, and not a Hub id")):
        module, data = build(tmp_path / name, pairs_folder)
        with pytest.raises(ConfigError, match=rf"--model\.policy\.path.*{said}"):
            make_trainer(tmp_path).fit(module, data)


def test_schedules_reach_their_peak_after_the_warm_up_and_end_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = CosineWithWarmup(0.09)(optimizer, 100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]), "no step is made with a rate of 0"
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[54] + rates[55] == pytest.approx(2.0, abs=1e-2), "half-way down"
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ConfigError, match="warmup_ratio"):
        CosineWithWarmup(1.5)


def test_adapters_on_a_model_with_a_tied_head_save_and_resume(pairs_folder: Path, tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    module, data = build(tied, pairs_folder, lora=True, optimizer=sgd)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(".lora_" in name for name in content["state_dict"])
    again, data = build(tied, pairs_folder, lora=True, optimizer=sgd)
    make_trainer(tmp_path / "on", max_epochs=2, max_steps=3).fit(
        again, data, ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True
    )
    assert again.global_step == 3


def test_dropout_that_is_asked_for_trains(tmp_path: Path, pairs_folder: Path) -> None:
    model = make_model(tmp_path / "model", attention_dropout=0.5)
    _, data = build(model, pairs_folder)
    config = PolicyConfig(str(model), dropout=True)
    make_trainer(tmp_path, max_steps=2).fit(PreferenceModule(config), data)
    assert logged(tmp_path)[0]["rewards/margins"] != 0.0, "policy with dropout, reference without"


def test_a_reference_with_another_tokenizer_is_refused(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama3")
    with pytest.raises(ConfigError, match="another tokenizer"):
        fit(tmp_path, tiny, pairs_folder, reference=Frozen(str(other)))


def test_every_step_is_logged_in_some_window(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    fit(tmp_path, tiny, pairs_folder, trainer={"log_every_n_steps": 5})  # 12 steps: 1, 2-5, 6-10, 11-12
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 5, 10, 12]


def test_an_epoch_that_would_end_within_a_step_is_refused(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the middle of an optimizer step"):
        fit(
            tmp_path, tiny, pairs_folder, batch_size=2, trainer={"limit_train_batches": 5, "accumulate_grad_batches": 4}
        )


def test_nothing_is_overwritten_by_a_second_export(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.callbacks import ExportHF

    for _ in range(2):
        module, data = build(tiny, pairs_folder)
        options = {"logger": False, "default_root_dir": tmp_path, "callbacks": [ExportHF()]}
        make_trainer(tmp_path, max_steps=1, **options).fit(module, data)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"hf", "hf-2"}


def test_a_checkpoint_never_decides_to_run_a_models_code(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.commands.export import export

    module, data = build(tiny, pairs_folder)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    evil = make_model(tmp_path / "evil")
    config = json.loads((evil / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (evil / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemError")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["rap_lightning"]["policy"] |= {"path": str(evil), "trust_remote_code": True}
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(ConfigError):
        export(str(tmp_path / "b.ckpt"), str(tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


def test_generation_at_temperature_zero_ignores_penalties_that_a_model_ships(tiny: Path) -> None:
    from rap_lightning.batches.prompts import left_pad
    from rap_lightning.models.generation import Generation, generate

    policy = PolicyConfig(str(tiny)).build(torch.float32)
    tokenizer = PolicyConfig(str(tiny)).load_tokenizer()
    batch = left_pad([[5, 6, 7], [8, 9]], 0, [{}, {}])
    plain = generate(policy, tokenizer, batch, Generation(8, temperature=0))
    policy.model.generation_config.repetition_penalty = 5.0
    assert generate(policy, tokenizer, batch, Generation(8, temperature=0)) == plain
    assert policy.model.generation_config.repetition_penalty == 5.0
    assert policy.training


class PressedHalfWay(torch.optim.SGD):
    """Sends Ctrl-C to this process when half of the weights have had their third update."""

    calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.calls += 1
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(params):
            if self.calls == 3 and number == len(params) // 2:
                os.kill(os.getpid(), signal.SIGINT)
            p.sub_(0.1 * p.grad)
        return loss


def test_ctrl_c_within_an_optimizer_step_waits_for_its_end(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.callbacks import WholeSteps

    saver = ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
    options = {"enable_checkpointing": True, "callbacks": [saver, WholeSteps()]}
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path / "part", tiny, pairs_folder, optimizer=PressedHalfWay, trainer=options)
    finally:
        signal.signal(signal.SIGINT, before)
    content = torch.load(checkpoints(tmp_path / "saved")[-1], weights_only=True)
    assert content["global_step"] == 3
    whole = fit(tmp_path / "whole", tiny, pairs_folder, trainer={"max_steps": 3})
    saved = {n.removeprefix("policy."): v for n, v in content["state_dict"].items()}
    assert_same({n: saved[n] for n in weights(whole)}, weights(whole), 1e-6)
