"""What is not finite never reaches the weights; memory and drift are explained in words."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from conftest import build, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.callbacks import Checkpoints, Guard, SteeringTable, Watchdog
from rap_lightning.errors import ConfigError, NotFinite, OutOfMemory
from rap_lightning.losses import BCO, DPO, Hinge, Mixture
from rap_lightning.models import attention
from rap_lightning.models.generation import Generation
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.training.schedules import ConstantWithWarmup
from rap_lightning.training.step_logger import LoggedStep
from test_fit import assert_same, logged, weights

BAD = 3  # the step at which something breaks


class Poisoned(DPO):
    """NaN for the first pair of the step ``BAD`` (batches of two to a step)."""

    def __init__(self, batches: tuple[int, ...], value: float = math.nan) -> None:
        super().__init__(0.5)
        self.seen, self.batches, self.value = 0, batches, value

    def forward(self, policy: Any, reference: Any) -> torch.Tensor:
        losses = super().forward(policy, reference)
        if self.training:
            self.seen += 1
            if self.seen in self.batches:
                return torch.cat((losses[:1] * self.value, losses[1:]))
        return losses


class BadGradient(pl.Callback):
    """An infinite gradient of finite losses."""

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if trainer.global_step + 1 == BAD:
            module.policy.causal_lm.lm_head.weight.grad[3, 3] = math.inf


def fit(run: Path, model: Path, data: Path, *callbacks: Any, trainer: Any = None, **options: Any) -> Any:
    module, source = build(
        model,
        data,
        **({"optimizer": sgd, "schedule": ConstantWithWarmup(), "loss": DPO(0.5), "batch_size": 2} | options),
    )
    settings = {"max_steps": 6, "accumulate_grad_batches": 2, "callbacks": list(callbacks)} | (trainer or {})
    make_trainer(run, **settings).fit(module, source)
    return module


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_pair(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    saver = Checkpoints(tmp_path / "saved", save_on_exception=True)
    with pytest.raises(NotFinite) as stop:
        fit(
            tmp_path / "run", tiny, pairs_folder, Guard(), saver, loss=Poisoned((2 * BAD,)),
            trainer={"enable_checkpointing": True},
        )  # fmt: skip
    text = str(stop.value)
    assert f"step {BAD}: the loss is not finite for pair " in text
    assert re.search(
        r"\(goal [\d.]+; chosen and rejected: \d+ and \d+ tokens, log-probabilities of the policy -[\d.]+ and -[\d.]+, "
        r"reference -[\d.]+ and -[\d.]+ nats, rewards [\d.]+ and [\d.]+; loss nan\)", text,
    ), text  # fmt: skip
    good = fit(tmp_path / "good", tiny, pairs_folder, trainer={"max_steps": BAD - 1})
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    state = torch.load(saved, weights_only=True)
    assert state["global_step"] == BAD - 1
    assert_same({n: state["state_dict"][f"policy.{n}"] for n in weights(good)}, weights(good))


@pytest.mark.parametrize("breaks", ["loss", "gradient"])
def test_a_skipped_step_is_as_if_it_had_not_been(breaks: str, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """Against a run that is told not to take that step by its optimizer: another road to the same weights."""

    class Leaves(torch.optim.AdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            self.calls += 1
            return None if self.calls == BAD else super().step()

    adam = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    guard = Guard("skip")
    callbacks = (guard,) if breaks == "loss" else (BadGradient(), guard)
    loss = Poisoned((2 * BAD - 1, 2 * BAD)) if breaks == "loss" else DPO(0.5)
    with pytest.warns(UserWarning, match=rf"skipped \(1 so far\): step {BAD}"):
        skipped = fit(tmp_path / "skipped", tiny, pairs_folder, *callbacks, loss=loss, optimizer=adam)
    left = fit(tmp_path / "left", tiny, pairs_folder, optimizer=lambda params: Leaves(params, lr=1e-2))
    assert_same(weights(skipped), weights(left))
    assert guard.skipped == 1
    rows = logged(tmp_path / "skipped")
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert [row["guard/skipped_steps"] for row in rows if "guard/skipped_steps" in row] == [1.0]
    assert BAD not in [row["step"] for row in rows if "loss" in row]


def test_a_skipped_step_has_no_gradient_norm_to_log(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="skipped"):
        fit(tmp_path, tiny, pairs_folder, BadGradient(), Guard("skip"), trainer={"log_every_n_steps": BAD})
    norms = {row["step"]: row["grad_norm"] for row in logged(tmp_path) if "grad_norm" in row}
    assert math.isnan(norms[BAD])
    assert norms[2 * BAD] > 0


def test_a_skipped_step_leaves_nothing_in_a_losss_moving_average(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    loss = Mixture([BCO(0.5), DPO(0.5)])
    with pytest.warns(UserWarning, match="skipped"):
        module = fit(tmp_path, tiny, pairs_folder, BadGradient(), Guard("skip"), loss=loss)
    (bco,) = [part for part in module.loss.parts if isinstance(part, BCO)]
    assert float(bco.totals[1]) == 2 * 4 * 5, "two rewards of each of four pairs in five of six steps"


def test_the_decision_does_not_depend_on_how_a_step_is_cut(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    class ByPair(DPO):
        """NaN wherever chosen is a certain response."""

        def forward(self, policy: Any, reference: Any) -> torch.Tensor:
            losses = super().forward(policy, reference)
            return torch.where(policy.chosen_lengths == longest, math.nan, losses) if self.training else losses

    longest, runs = 13, []
    for batch_size, accumulate in ((12, 1), (3, 4), (1, 12)):
        guard = Guard("skip")
        with pytest.warns(UserWarning, match="skipped"):
            module = fit(
                tmp_path / f"{batch_size}", tiny, pairs_folder, guard, loss=ByPair(0.5), batch_size=batch_size,
                trainer={"accumulate_grad_batches": accumulate, "max_steps": 8, "max_epochs": 2},
            )  # fmt: skip
        runs.append((guard.skipped, weights(module)))
    assert 0 < runs[0][0] < 8
    assert len({skipped for skipped, _ in runs}) == 1
    for _, found in runs[1:]:
        assert_same(runs[0][1], found, 2e-5)


def test_a_weight_that_is_no_number_stops_the_run_even_where_steps_are_skipped(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == BAD:
                with torch.no_grad():
                    module.policy.causal_lm.model.layers[1].mlp.up_proj.weight[2, 7] = math.nan

    saver = Checkpoints(tmp_path / "saved", save_on_exception=True, every_n_train_steps=1)
    with pytest.raises(NotFinite, match=r"up_proj.weight \(1 of 2,048 values\).*resume from the checkpoint before"):
        fit(tmp_path / "run", tiny, pairs_folder, Guard("skip"), Break(), saver, trainer={"enable_checkpointing": True})
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == BAD


def test_skipping_has_a_limit(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"2 steps in a row have been skipped, the --guard\.limit"):
        fit(tmp_path, tiny, pairs_folder, Guard("skip", 2), loss=Poisoned(tuple(range(3, 99)), math.inf))
    with pytest.raises(ConfigError, match="limit has no effect without"):
        Guard(limit=3)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "forward pass"),
        (RuntimeError("[alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), "backward pass"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "optimizer's update"),
    ],
)  # fmt: skip
def test_out_of_memory_says_which_batch_how_many_tokens_and_what_to_change(
    error: Exception, place: str, tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised where torch raises it: within a layer's forward or backward pass, or the optimizer."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise error

    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            raise error

    class Fill(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            layer = module.policy.causal_lm.model.layers[0]
            if batch_idx == 3 and place == "forward pass":
                layer.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
            if batch_idx == 3 and place == "backward pass":
                layer.mlp.register_forward_hook(lambda module, args, output: Fails.apply(output))

    optimizer = (lambda params: Greedy(params, lr=0.1)) if place == "optimizer's update" else sgd
    saver = Checkpoints(tmp_path / "saved", save_on_exception=True)
    with pytest.raises(OutOfMemory) as stop:
        fit(
            tmp_path / "run", tiny, pairs_folder, Fill(), saver, optimizer=optimizer,
            trainer={"enable_checkpointing": True},
        )  # fmt: skip
    text = str(stop.value)
    step = 1 if place == "optimizer's update" else 2
    assert re.match(
        rf"out of memory in the {place} of step {step}: 2 pairs \([^)]+\) in one forward pass of [\d,]+ tokens, \d+ of "
        r"them of responses; the longest sequence has \d+\.", text,
    ), text  # fmt: skip
    for advice in ("--data.token_budget", "gradient_checkpointing true", "--model.reference Stored", "lora.r 16"):
        assert advice in text
    assert str(error) in text
    assert len(list((tmp_path / "saved").glob("*.ckpt"))) == (0 if place == "optimizer's update" else 1)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("load", r"while loading and checking policy and reference\. To use less memory: --model\.reference Stored"),
        ("check of attention", r"while loading and checking policy and reference\. To use less memory: "),
        ("reference", r"in the reference's forward pass before training: 2 pairs \([^)]+\) in one forward pass of \d+"),
        ("sanity check", r"in the validation: 2 pairs \([^)]+\) in one forward pass of \d+"),
    ],
)  # fmt: skip
def test_out_of_memory_before_the_first_step_is_explained_too(
    place: str, expected: str, tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    class AfterLoading(pl.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            if place in ("reference", "sanity check"):
                monkeypatch.setattr(Policy, "forward", fails)

    if place == "load":
        monkeypatch.setattr(PolicyConfig, "load_model", fails)
    elif place == "check of attention":
        monkeypatch.setitem(attention.PATHS, "blockwise", fails)  # type: ignore[arg-type]
    reference = Stored(folder=str(tmp_path / "store")) if place == "reference" else Frozen()
    with pytest.raises(OutOfMemory) as stop:
        fit(
            tmp_path / "run", tiny, pairs_folder, AfterLoading(), reference=reference,
            trainer={"num_sanity_val_steps": 1},
        )  # fmt: skip
    text = str(stop.value)
    assert re.match(f"out of memory {expected}", text), text
    assert str(error) in text
    assert "gradient_checkpointing" not in text, "no backward pass was to come"
    assert len(text.splitlines()) == 1


def test_out_of_memory_while_generating_is_explained(
    tiny: Path, pairs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    module, _ = build(tiny, pairs_folder)
    module.policy = Policy(torch.nn.Linear(1, 1))
    monkeypatch.setattr("rap_lightning.module.generate", fails)
    with pytest.raises(OutOfMemory, match=r"while generating responses to 2 prompts.*a smaller --data\.batch_size"):
        module.predict_step(SimpleNamespace(records=[{}, {}]), 0)


def test_advice_names_only_what_is_not_done_already(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.models.policy_config import Lora

    class Fill(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            error = torch.OutOfMemoryError("CUDA out of memory.")
            module.policy.causal_lm.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))

    policy = PolicyConfig(str(tiny), lora=Lora(r=4), gradient_checkpointing=True)
    with pytest.raises(OutOfMemory) as stop:
        fit(tmp_path, tiny, pairs_folder, Fill(), policy=policy, token_budget=500)
    for advice in ("token_budget N", "gradient_checkpointing", "Stored", "lora.r"):
        assert advice not in str(stop.value)
    assert "max_length" in str(stop.value)


def test_another_runtime_error_stays_what_it_is(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            module.policy.causal_lm.model.layers[0].register_forward_pre_hook(
                lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match"))
            )

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(tmp_path, tiny, pairs_folder, Fails())


def said_by(caught: Any) -> list[str]:
    return [str(one.message) for one in caught if "watchdog" in str(one.message)]


def test_the_watchdog_says_once_that_chosen_responses_collapse_and_margins_explode(
    tiny: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A step far too large, on few pairs: the real thing, which does both."""
    data = write_jsonl(tmp_path / "few.jsonl", scored_rows(4))
    big = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    fit(
        tmp_path / "run", tiny, data, Watchdog(), optimizer=big, loss=Hinge(0.5), batch_size=8,
        trainer={"max_steps": 60, "max_epochs": 60, "accumulate_grad_batches": 1},
    )  # fmt: skip
    del recwarn.list[:]
    fit(
        tmp_path / "run2", tiny, data, Watchdog(), optimizer=big, loss=DPO(3.0), batch_size=8,
        trainer={"max_steps": 60, "max_epochs": 60, "accumulate_grad_batches": 1},
    )  # fmt: skip
    said = said_by(recwarn)
    last = logged(tmp_path / "run2")[-1]
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 10
    assert sum("every pair is told apart" in text for text in said) == 1
    assert len(said) == len(set(said)) <= 2


def test_the_watchdog_is_silent_on_a_quiet_run_and_its_memory_outlives_the_process(
    tiny: Path, pairs_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    dog = Watchdog()
    module = fit(tmp_path, tiny, pairs_folder, dog)
    assert not said_by(recwarn)
    values = module.step_logger.last.values

    def look(dog: Watchdog, step: int, **changes: float) -> None:
        dog.on_step_logged(module.trainer, LoggedStep(step, values | changes))

    collapsed = {"logps/chosen": values["logps/chosen"] - 2 * values["lengths/chosen"]}
    look(dog, 7, **collapsed)
    look(dog, 8, **collapsed)
    again = Watchdog()
    again.load_state_dict(dog.state_dict())
    assert not said_by(recwarn), "two windows are not yet a sign"
    look(again, 9, **collapsed)
    look(again, 10, **collapsed)
    (text,) = said_by(recwarn)
    assert re.search(r"step 9: chosen responses have become [12]\.\d+ nats per token less likely", text)


def test_the_watchdog_sees_samples_change_their_length(
    tiny: Path, pairs_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    judge = lambda prompt, response: 1.0  # noqa: E731
    table = SteeringTable(judge, goals=(1, 10), samples=4)
    for ratio in (1.01, 1e6):
        dog = Watchdog(length_ratio=ratio)

        class Shorter(pl.Callback):
            def on_train_end(self, trainer: Any, module: Any) -> None:
                module.generation = Generation(max_new_tokens=2)

        fit(
            tmp_path / str(ratio), tiny, pairs_folder, table, dog, Shorter(), reference=Frozen(),
            generation=Generation(max_new_tokens=20),
        )  # fmt: skip
    said = said_by(recwarn)
    assert len(said) == 1
    assert re.search(r"step 6: samples have \d\.\d tokens on average, and had \d+\.\d at the start", said[0])
