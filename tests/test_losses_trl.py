"""Parity with TRL 1.16, through its trainers: same models, same token ids, same loss and gradients.

Where TRL is at fault, or means something else by a name, the test asserts the difference and says why.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import scored_rows
from rap_lightning.batches.dataset import Example
from rap_lightning.batches.encode import Conversation, Encoder
from rap_lightning.batches.layouts import Collate
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch
from rap_lightning.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    LDDPO,
    NCA,
    ORPO,
    SFT,
    WPO,
    AlphaDPO,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    ForwardKLDPO,
    Hinge,
    JensenShannonDPO,
    LengthNormalisedDPO,
    Mixture,
    RobustDPO,
    SimPO,
    SPPOHard,
)
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.goals import OverallGoal

trl = pytest.importorskip("trl", reason="TRL isn't installed (it is part of the dev extra): no parity with it shown")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"TRL {trl.__version__} is installed; what is said here is said of 1.16", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = 4


@pytest.fixture(scope="module")
def examples(tiny: Path) -> list[Example]:
    """Goal-conditioned pairs as token ids, from rows of unequal lengths; no two of one original (see DESIGN)."""
    encoder = Encoder(PolicyConfig(str(tiny)).load_tokenizer(), OverallGoal(), 256)
    made = []
    for number, row in enumerate(scored_rows(PAIRS)):
        history, chosen, rejected = row["chosen"][:-1], row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        goal = OverallGoal().text(row["score_chosen"])
        found = encoder.encode_one(Conversation(history, (goal,), (chosen, rejected)))
        rewards = (row["score_chosen"], row["score_rejected"])
        made.append(Example(str(number), 0, None, rewards, found.prompt_ids[0], *found.response_ids))
    assert len({len(e.chosen_ids) for e in made}) > 1, (
        "lengths must differ, or means over tokens could not be told apart"
    )
    return made


@pytest.fixture(scope="module")
def models(tiny: Path) -> tuple[Any, Any]:
    """A policy that has moved away from its reference, and the reference."""
    policy, reference = (PolicyConfig(str(tiny)).load_model(torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)
    return policy, reference


def batch_of(examples: list[Example]) -> Batch:
    places = tuple(range(len(examples)))
    (batch,) = Collate("padded", 0)((BatchPlan(places, (1.0,) * len(examples), len(examples), (places,)), examples))
    return batch


def grads(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, found, strict=True)}


def ours(loss: Any, models: tuple[Any, Any], examples: list[Example], tiny: Path) -> tuple[float, dict[str, Tensor]]:
    """Mean over the pairs and its gradients, by the module's own step."""
    module = PreferenceModule(
        PolicyConfig(str(tiny)), loss=loss, reference=Frozen() if "reference" in loss.requires else None
    )
    module.policy = Policy(models[0])
    if isinstance(module.reference, Frozen):
        module.reference._model = Policy(models[1])
    loss.eval()
    value = module.pair_step(batch_of(examples), "val").mean()
    return float(value), grads(models[0], value)


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": 256, "per_device_train_batch_size": PAIRS,
    }  # fmt: skip


def text_rows(columns: list[str]) -> Any:
    """What a trainer must be given before it can be asked for the loss of other tokens."""
    import datasets

    row = {"prompt": "red", "chosen": "green", "rejected": "blue", "completion": "green", "label": True}
    return datasets.Dataset.from_list([{name: row[name] for name in columns}] * 4)


def dpo_trainer(models: tuple[Any, Any], tiny: Path, folder: Path, options: dict[str, Any]) -> Any:
    from copy import deepcopy

    policy, reference = deepcopy(models)
    return trl.DPOTrainer(
        policy, reference, args=trl.DPOConfig(**(common(folder) | options)),
        train_dataset=text_rows(["prompt", "chosen", "rejected"]),
        processing_class=PolicyConfig(str(tiny)).load_tokenizer(),
    )  # fmt: skip


def theirs(
    models: tuple[Any, Any], examples: list[Example], tiny: Path, folder: Path, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss of DPOTrainer and its gradients."""
    trainer = dpo_trainer(models, tiny, folder, options)
    rows = [
        {"prompt_ids": list(e.prompt_ids), "chosen_ids": list(e.chosen_ids), "rejected_ids": list(e.rejected_ids)}
        for e in examples
    ]
    value = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return float(value), grads(trainer.model, value)


def assert_same(
    one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], factor: float = 1
) -> None:
    assert one[0] == pytest.approx(factor * other[0], rel=1e-5, abs=1e-5)
    scale = math.sqrt(sum(float((factor * g).square().sum()) for g in other[1].values()))
    apart = math.sqrt(sum(float((one[1][name] - factor * g).square().sum()) for name, g in other[1].items()))
    assert scale > 0
    assert apart <= 1e-4 * scale, f"gradients differ by {apart / scale:.1e} of their norm"


EQUAL: list[tuple[Any, dict[str, Any]]] = [
    (DPO(0.3), {"loss_type": ["sigmoid"]}),
    (Hinge(0.3), {"loss_type": ["hinge"]}),
    (IPO(0.3, per_token=True), {"loss_type": ["ipo"]}),
    (EXO(0.3, 1e-3), {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    (NCA(0.3), {"loss_type": ["nca_pair"]}),
    (RobustDPO(0.3, 0.1), {"loss_type": ["robust"], "label_smoothing": 0.1}),
    (SPPOHard(0.3), {"loss_type": ["sppo_hard"]}),
    (AOT(0.3), {"loss_type": ["aot"]}),
    (AOTUnpaired(0.3), {"loss_type": ["aot_unpaired"]}),
    (APOZero(0.3), {"loss_type": ["apo_zero"]}),
    (APODown(0.3), {"loss_type": ["apo_down"]}),
    (DiscoPOP(0.3, tau=0.5), {"loss_type": ["discopop"], "discopop_tau": 0.5}),
    (LengthNormalisedDPO(0.3), {"loss_type": ["sigmoid_norm"]}),
    (LDDPO(0.3, alpha=0.4), {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
    (ForwardKLDPO(0.3), {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"}),
    (JensenShannonDPO(0.3), {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"}),
    (
        AlphaDPO(0.3, alpha=0.5),
        {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    ),
    (WPO(DPO(0.3)), {"loss_type": ["sigmoid"], "use_weighting": True}),
    (WPO(IPO(0.3, per_token=True)), {"loss_type": ["ipo"], "use_weighting": True}),
    (Mixture([DPO(0.3), APOZero(0.3)], [0.8, 0.2]), {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.8, 0.2]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "options"), EQUAL, ids=[f"{type(loss).__name__}-{o['loss_type'][0]}" for loss, o in EQUAL]
)
def test_loss_and_gradients_are_trls(
    loss: Any, options: dict[str, Any], models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    assert_same(ours(loss, models, examples, tiny), theirs(models, examples, tiny, tmp_path, beta=0.3, **options))


def test_trl_ignores_label_smoothing_with_sigmoid(
    models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    """Asked for cDPO, it trains DPO without a word (the paper's recipes for two models ask for 0.3)."""
    given = theirs(models, examples, tiny, tmp_path, beta=0.3, loss_type=["sigmoid"], label_smoothing=0.3)
    assert_same(ours(DPO(0.3), models, examples, tiny), given)
    assert abs(ours(DPO(0.3, 0.3), models, examples, tiny)[0] - given[0]) > 0.01


def test_trl_counts_its_alpha_divergence_from_the_other_end(
    models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    """f-DPO's table 1 has f'(u) = (1 - u^-α) / α; TRL's (u^(α-1) - 1) / (α - 1) is that of 1 - α: equal at ½ only."""
    options = {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    given = theirs(models, examples, tiny, tmp_path, beta=0.3, **options)
    assert_same(ours(AlphaDPO(0.3, alpha=0.7), models, examples, tiny), given)
    assert abs(ours(AlphaDPO(0.3, alpha=0.3), models, examples, tiny)[0] - given[0]) > 1e-3


def test_trls_bco_has_no_reward_shift(models: Any, examples: list[Example], tiny: Path, tmp_path: Path) -> None:
    """The paper's δ, the running mean of rewards, is left out there, so only the first step is the same."""
    given = theirs(models, examples, tiny, tmp_path, beta=0.3, loss_type=["bco_pair"])
    loss = BCO(0.3)
    assert_same(ours(loss, models, examples, tiny), given)
    loss.totals += torch.tensor([-5.0, 10.0])  # δ = -0.5
    assert abs(ours(loss, models, examples, tiny)[0] - given[0]) > 0.01


def test_trls_discopop_is_not_a_number_where_the_policy_prefers_rejected_by_far(
    models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    """It multiplies a modulation of 0 with e^-h, infinite in float32 from h = -89 on."""
    turned = [replace(e, chosen_ids=e.rejected_ids, rejected_ids=e.chosen_ids) for e in examples]
    margins = [ours(Hinge(1.0), models, [e], tiny)[0] for e in (*examples, *turned)]
    worst = (*examples, *turned)[max(range(len(margins)), key=margins.__getitem__)]
    beta = 200 / (max(margins) - 1)
    given = theirs(models, [worst] * 2, tiny, tmp_path, beta=beta, loss_type=["discopop"])
    assert math.isnan(given[0])
    value, gradients = ours(DiscoPOP(beta), models, [worst] * 2, tiny)
    assert value == pytest.approx(200, rel=1e-3), "the logistic part alone"
    assert all(g.isfinite().all() for g in gradients.values())


def test_trl_averages_imitation_over_tokens_of_the_batch(
    models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    """Here every pair counts the same, as in the rest of the loss; in a batch of one there is no difference."""
    for e in examples:
        assert_same(ours(SFT(), models, [e], tiny), theirs(models, [e], tiny, tmp_path, loss_type=["sft"]))
    given = theirs(models, examples, tiny, tmp_path, loss_type=["sft"])[0]
    each, counts = [ours(SFT(), models, [e], tiny)[0] for e in examples], [len(e.chosen_ids) for e in examples]
    by_tokens = sum(v * n for v, n in zip(each, counts, strict=True)) / sum(counts)
    assert given == pytest.approx(by_tokens, rel=1e-5)
    assert ours(SFT(), models, examples, tiny)[0] == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert abs(by_tokens - sum(each) / len(each)) > 1e-4


def test_kto_is_trls_with_the_same_unrelated_responses(
    models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    """Rows ordered as all chosen, then all rejected, its rotation by one gives each prompt the previous pair's.

    Its mean is over responses, ours over pairs: twice its value. Rows in the usual order, chosen beside rejected, would
    give it responses to the same prompt as unrelated ones.
    """
    from copy import deepcopy

    policy, reference = deepcopy(models)
    trainer = trl.KTOTrainer(
        policy, reference, args=trl.KTOConfig(**(common(tmp_path) | {"beta": 0.3, "desirable_weight": 1.2})),
        train_dataset=text_rows(["prompt", "completion", "label"]),
        processing_class=PolicyConfig(str(tiny)).load_tokenizer(),
    )  # fmt: skip
    rows = [
        {"prompt_ids": list(e.prompt_ids), "completion_ids": list(ids), "label": good}
        for good in (True, False)
        for e, ids in ((e, e.chosen_ids if good else e.rejected_ids) for e in examples)
    ]
    for i, row in enumerate(rows):
        row["KL_completion_ids"] = rows[i - 1]["completion_ids"]
    value = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss = KTO(0.3, desirable_weight=1.2)
    assert_same(ours(loss, models, examples, tiny), (float(value), grads(trainer.model, value)), factor=2)
    assert trainer._metrics["eval"]["kl"][-1] > 0, "an estimate clamped to 0 would compare nothing"


def free_trainer(kind: str, models: Any, tiny: Path, folder: Path, **options: Any) -> Any:
    from copy import deepcopy
    from importlib import import_module

    home = import_module(f"trl.experimental.{kind.lower()}")
    return getattr(home, f"{kind}Trainer")(
        model=deepcopy(models[0]), args=getattr(home, f"{kind}Config")(**(common(folder) | options)),
        train_dataset=text_rows(["prompt", "chosen", "rejected"]),
        processing_class=PolicyConfig(str(tiny)).load_tokenizer(),
    )  # fmt: skip


def free_batch(examples: list[Example]) -> dict[str, Tensor]:
    """What CPOTrainer and ORPOTrainer make of a row, of our ids."""
    batch: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        rows = [(list(e.prompt_ids), list(getattr(e, f"{side}_ids"))) for e in examples]
        width = max(len(p) + len(r) for p, r in rows)
        pad = lambda values, filler, width=width: values + [filler] * (width - len(values))  # noqa: E731
        batch[f"{side}_input_ids"] = torch.tensor([pad(p + r, 0) for p, r in rows])
        batch[f"{side}_attention_mask"] = torch.tensor([pad([1] * len(p + r), 0) for p, r in rows])
        batch[f"{side}_labels"] = torch.tensor([pad([-100] * len(p) + r, -100) for p, r in rows])
    return batch


def free_theirs(trainer: Any, examples: list[Example]) -> tuple[float, dict[str, Tensor]]:
    value, _ = trainer.get_batch_loss_metrics(trainer.model, free_batch(examples))
    return float(value), grads(trainer.model, value)


def test_simpo_and_alphapo_are_trls(models: Any, examples: list[Example], tiny: Path, tmp_path: Path) -> None:
    trainer = free_trainer("CPO", models, tiny, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0)
    assert_same(ours(SimPO(2.0, gamma=0.7), models, examples, tiny), free_theirs(trainer, examples))
    options = {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.25, "alpha": 0.25}
    trainer = free_trainer("CPO", models, tiny, tmp_path, **options)
    assert_same(ours(AlphaPO(2.5, 0.25, 0.25), models, examples, tiny), free_theirs(trainer, examples))


def test_cpo_is_trls_but_for_the_mean_of_imitation(
    models: Any, examples: list[Example], tiny: Path, tmp_path: Path
) -> None:
    """As with SFT: over the batch's tokens there, over each response's here."""
    trainer = free_trainer("CPO", models, tiny, tmp_path, loss_type="sigmoid", beta=0.3, cpo_alpha=0.5)
    for e in examples:
        assert_same(ours(CPO(0.3, 0.5), models, [e], tiny), free_theirs(trainer, [e]))
    assert abs(ours(CPO(0.3, 0.5), models, examples, tiny)[0] - free_theirs(trainer, examples)[0]) > 1e-4
    plain = free_trainer("CPO", models, tiny, tmp_path, loss_type="sigmoid", beta=0.3, cpo_alpha=0.0)
    assert_same(ours(CPO(0.3, nll_weight=0), models, examples, tiny), free_theirs(plain, examples))


def test_trls_orpo_imitates_the_prompt_too(models: Any, examples: list[Example], tiny: Path, tmp_path: Path) -> None:
    """The paper's L_SFT is of the response. The odds ratio is the same."""
    trainer = free_trainer("ORPO", models, tiny, tmp_path, beta=0.3)
    for e in examples:
        value, gradients = free_theirs(trainer, [e])
        nll = []
        for start in (1, len(e.prompt_ids)):  # of prompt and response; of the response alone
            ids = torch.tensor([[*e.prompt_ids, *e.chosen_ids]])
            logps = trainer.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            nll.append(-logps[start - 1 :].mean())
        whole, response = (grads(trainer.model, v) for v in nll)
        moved = {name: g - whole[name] + response[name] for name, g in gradients.items()}
        expected = (value - float(nll[0]) + float(nll[1]), moved)
        assert_same(ours(ORPO(0.3), models, [e], tiny), expected)
        assert abs(value - expected[0]) > 1e-3
