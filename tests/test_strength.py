"""A goal as the strength of the adapter: W + s BA, another s for every sequence of a batch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import processes
import rank_worker
from cli_process import fit_on_ranks
from conftest import build, called, encode, make_trainer, read_jsonl, run_command, scored_rows, sgd, write_jsonl
from processes import alone, differences
from rap_lightning.batches.at_goals import AtGoals
from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS
from rap_lightning.batches.types import Batch, PairLogps, PairRewards
from rap_lightning.batches.unrelated import unrelated
from rap_lightning.callbacks import GoalSamples, LikelihoodProbe
from rap_lightning.errors import ConfigError
from rap_lightning.losses import DPO
from rap_lightning.models.generation import Generation, generate
from rap_lightning.models.model_checks import check_sharing
from rap_lightning.models.policy import Policy, compile_layers
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.models.token_strength import at_strength, check_reach
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal, StatedGoal
from rap_lightning.preferences.relabelling import is_tie
from rap_lightning.preferences.scales import QuantileScale, RewardScale
from test_adapters import by_plain_peft, make_adapter
from test_fit import assert_same, logged, weights
from test_layouts import batch_of, conversations, naive, policy_of
from test_resume import fit as fit_adam
from test_resume import stopped

LORA = Lora(r=4)
STRENGTHS = (1.0, -0.5, 0.0, 1.5)


def at(examples: list[Example], strengths: tuple[float, ...] = STRENGTHS) -> list[Example]:
    return [replace(one, strength=s) for one, s in zip(examples, strengths, strict=False)]


def both_goals() -> list[Example]:
    """Both halves of a pair: the same prompt and responses, exchanged, at two strengths."""
    first, *_ = conversations(goals_of_one=True)
    second = replace(first, chosen_ids=first.rejected_ids, rejected_ids=first.chosen_ids)
    return at([first, second], (1.0, -0.5))


@torch.no_grad()
def merged_alone(policy: Policy, examples: list[Example]) -> Tensor:
    """[2B]: each sequence alone through plain weights W + s BA, that were added up by peft."""
    from copy import deepcopy

    found = []
    for example in examples:
        model = deepcopy(policy.model)
        assert example.strength is not None
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(example.strength)
        found.append(naive(model.merge_and_unload(), [example]))
    return torch.cat(found)


# -- strengths in a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Llama, one at a time", "Gemma2"])
def test_each_sequence_of_a_batch_has_its_own_strength(layout: str, architecture: str) -> None:
    name, _, apart_only = architecture.partition(", ")
    policy = policy_of(name, torch.float64, lora=True).eval()
    assert check_sharing(policy) is None
    policy = Policy(policy.model)  # as commands wrap a model again
    policy.shares = not apart_only
    exact = 1e-4 if name == "Gemma2" else 1e-10  # its norms compute in float32, whatever the model's dtype
    for examples in (at(conversations(goals_of_one=False)), both_goals()):
        with torch.no_grad():
            found = policy.logps(batch_of(layout, examples))
            apart = torch.cat([policy.logps(batch_of("padded", [one])) for one in examples])
        torch.testing.assert_close(found, apart, atol=exact, rtol=exact)
        torch.testing.assert_close(found, merged_alone(policy, examples), atol=exact, rtol=exact)
    with torch.no_grad(), policy.model.disable_adapter():
        base = policy.logps(batch_of(layout, at(examples, (1.0, 1.0))))
    off = at(examples, (0.0, 0.0))
    torch.testing.assert_close(policy.logps(batch_of(layout, off)), base, atol=exact, rtol=exact)
    assert (found - base).abs().min() > 1e-3, "the adapter has an effect"


def test_sequences_of_one_strength_share_their_prompt_and_others_do_not() -> None:
    pair = both_goals()
    prompt, responses = len(pair[0].prompt_ids), len(pair[0].chosen_ids) + len(pair[0].rejected_ids)
    apart = batch_of("tree", pair)
    assert apart.input_ids.shape[1] == 2 * (prompt + responses)
    assert apart.forest is not None
    assert len(apart.forest.roots) == 2
    together = batch_of("tree", at(pair, (0.5, 0.5)))
    assert together.input_ids.shape[1] == prompt + responses, "the same responses at the same strength are one"
    assert apart.strength is not None
    for start, end in apart.forest.roots:
        assert len(set(apart.strength[0, start:end].tolist())) == 1


def gradients(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    policy.zero_grad()
    logps = policy.logps(batch)
    loss = (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return logps.detach(), found


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_activations_are_computed_again_at_the_strengths_of_their_batch(layout: str) -> None:
    """Two batches go forward before either goes backward, as losses over several passes may do."""
    plain = policy_of("Llama", torch.float64, lora=True)
    again = policy_of("Llama", torch.float64, lora=True, checkpointing=True)
    one = batch_of(layout, at(conversations(goals_of_one=False)))
    _, expected = gradients(plain, one)
    logps = again.logps(one)
    other = again.logps(batch_of(layout, both_goals()))
    (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum().backward()  # type: ignore[no-untyped-call]
    del other
    found = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-10, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_see_each_batchs_strengths(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiler, backend="aot_eager"))
    torch._dynamo.reset()
    plain = policy_of("Llama", torch.float32, lora=True)
    compiled = policy_of("Llama", torch.float32, lora=True, checkpointing=checkpointing)
    compile_layers(compiled)
    batches = [
        batch_of("tree", conversations(goals_of_one=False)),  # the adapter as it is, as the check of the head has it
        batch_of("tree", at(conversations(goals_of_one=False))),
        batch_of("tree", both_goals()),
    ]
    for number, batch in enumerate(batches):
        logps, grads = gradients(plain, batch)
        ours, found = gradients(compiled, batch)
        if number == 1:
            compiled_once = dict(torch._dynamo.utils.counters["frames"])
        torch.testing.assert_close(ours, logps, atol=1e-4, rtol=1e-4)
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, atol=1e-3, rtol=1e-3)
    assert dict(torch._dynamo.utils.counters["frames"]) == compiled_once, "not anew for other lengths and strengths"


def test_responses_of_other_pairs_are_read_at_the_prompts_strength() -> None:
    policy = policy_of("Llama", torch.float64, lora=True).eval()
    examples = at(conversations(goals_of_one=False))
    for layout in LAYOUTS:
        other = unrelated(batch_of(layout, examples))
        expected = []
        for number, one in enumerate(examples):
            donor, (first, second) = examples[(number - 1) % len(examples)], other.lengths[2 * number :][:2].tolist()
            read = replace(one, chosen_ids=donor.chosen_ids[:first], rejected_ids=donor.rejected_ids[:second])
            expected.append(policy.logps(batch_of("padded", [read])))
        torch.testing.assert_close(policy.logps(other), torch.cat(expected), atol=1e-10, rtol=1e-10)


def test_flattened_layers_of_a_mixture_are_reached_and_its_experts_refused() -> None:
    """Shared experts see the tokens of all rows one after the other; routed ones never call lora_A at all."""
    from peft import LoraConfig, get_peft_model

    def mixture(targets: Any) -> Policy:
        torch.manual_seed(0)
        config = transformers.Qwen2MoeConfig(
            hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97, num_experts=4,
            num_experts_per_tok=2, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return Policy(adapted).eval()

    policy = mixture(["q_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"])
    check_reach(policy.model)
    examples = at(conversations(goals_of_one=False))
    for layout in ("padded", "packed"):
        found = policy.logps(batch_of(layout, examples))
        torch.testing.assert_close(found, merged_alone(policy, examples), atol=1e-4, rtol=1e-4)
    everything = policy_of("Qwen3Moe", torch.float32, lora=True).model  # every linear layer, and the experts
    with pytest.raises(ConfigError, match="experts"):
        check_reach(everything)


# -- the law that makes it train ---------------------------------------------------------------------------------------


def test_the_halves_of_a_pair_add_up_to_the_difference_of_their_strengths() -> None:
    """At B = 0 the gradient of both halves is -β/2 (s_w - s_l) ∇m, m the margin at strength 1; near it, to first order.

    By text the two strengths would be one, and the halves would cancel.
    """
    beta, (high, low) = 0.3, (0.8, -0.4)
    policy = policy_of("GPT2", torch.float64, lora=True)  # Llama's norms round to float32
    first, second = both_goals()
    halves = batch_of("tree", at([first, second], (high, low)))
    halves = replace(halves, strength=halves.strength.double() if halves.strength is not None else None)
    factors = {n: p for n, p in policy.named_parameters() if "lora_B" in n}
    away = {name: torch.randn_like(p) for name, p in factors.items()}

    def error(size: float) -> float:
        """Norm of the halves' gradient minus the law's, as a share of the law's; B is ``size`` times something."""
        with torch.no_grad():
            for name, p in factors.items():
                p.copy_(size * away[name])
        reference = AdaptersOff().logps(policy, halves)
        pairs = [PairLogps.from_segments(logps, halves.lengths) for logps in (policy.logps(halves), reference)]
        rewards = PairRewards(torch.ones(2), torch.zeros(2))
        loss = DPO(beta).per_pair(pairs[0], pairs[1], rewards).sum()
        found = torch.autograd.grad(loss, list(factors.values()))
        with torch.no_grad():
            for p in factors.values():
                p.zero_()
        chosen, rejected = policy.logps(batch_of("tree", [replace(first, strength=1.0)]))
        margin = torch.autograd.grad(chosen - rejected, list(factors.values()))
        law = [-beta / 2 * (float(halves_strength(high)) - float(halves_strength(low))) * one for one in margin]
        missed = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, law, strict=True)))
        return missed / math.sqrt(sum(float(one.square().sum()) for one in law))

    assert error(0.0) < 1e-12
    small, half = error(1e-4), error(5e-5)
    assert 0 < small < 0.05
    assert small / half == pytest.approx(2, rel=0.05), "what is left is of first order in B"


def halves_strength(value: float) -> Tensor:
    return torch.tensor(value)  # in float32, as a batch has it


# -- runs -------------------------------------------------------------------------------------------------------------


def run(folder: Path, model: Path, data: Path, goal: GoalTemplate | None = None, **options: Any) -> Any:
    trainer = {"max_steps": 5} | options.pop("trainer", {})
    policy = options.pop("policy", None) or PolicyConfig(str(model), lora=LORA)
    module, source = build(
        model, data, policy=policy, goal=goal or AdapterStrength(neutral=4.0), loss=DPO(0.5), optimizer=sgd, **options
    )
    make_trainer(folder, **trainer).fit(module, source)
    module.data = source
    return module


@pytest.fixture(scope="module")
def trained(tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, tiny, pairs_folder)


def test_a_run_begins_at_the_base_and_moves_both_ways(trained: tuple[Path, Any]) -> None:
    folder, module = trained
    lines = logged(folder)
    assert abs(lines[0]["loss"] - math.log(2)) < 1e-6
    assert abs(lines[0]["rewards/margins"]) < 1e-6
    batch = next(iter(module.data.val_dataloader()))[0]
    assert batch.strength is not None
    assert set(batch.strength.unique().tolist()) > {0.0} or len(batch.strength.unique()) > 2
    base = module.reference.logps(module.policy, batch)
    moved = module.policy.logps(batch).detach() - base
    back = module.policy.logps(replace(batch, strength=-batch.strength)).detach() - base
    assert moved.abs().max() > 0.05
    cosine = torch.nn.functional.cosine_similarity(moved, back, dim=0)
    assert cosine < -0.2, "at the negative strength responses change the other way"


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "padded"},
        {"layout": "packed"},
        {"token_budget": 200},
        {"batch_size": 2, "trainer": {"max_steps": 5, "accumulate_grad_batches": 2}},
        {"checkpointing": True},
        {"reference": "stored"},
    ],
    ids=["padded", "packed", "budget", "accumulated", "checkpointing", "stored"],
)
def test_every_way_to_the_same_step_gives_the_same_weights(
    options: dict[str, Any], trained: tuple[Path, Any], tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    options = dict(options)
    policy = PolicyConfig(str(tiny), lora=LORA, gradient_checkpointing=options.pop("checkpointing", None))
    if options.pop("reference", None):
        options["reference"] = Stored(folder=str(tmp_path / "store"))
    module = run(tmp_path / "run", tiny, pairs_folder, policy=policy, **options)
    assert_same(weights(trained[1]), weights(module), 2e-5)


def test_an_adapter_of_the_reference_is_taken_as_it_is(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """The goal's strength is that of the policy's adapter."""
    other = make_adapter(tmp_path / "other", tiny)
    module = run(tmp_path / "run", tiny, pairs_folder, reference=Frozen(adapter=str(other)), layout="padded")
    batch = next(iter(module.data.val_dataloader()))[0]
    assert batch.strength is not None
    expected = by_plain_peft(tiny, other, [batch])
    torch.testing.assert_close(module.reference.logps(module.policy, batch), expected, atol=2e-4, rtol=0)


def test_a_reference_is_stored_once_for_all_goals(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module = run(tmp_path / "run", tiny, pairs_folder, reference=Stored(folder=str(tmp_path / "store")))
    batches = [part for batch in module.data.train_dataloader().whole() for part in batch]
    digests = [digest for batch in batches for digest in batch.digests]
    assert len(digests) == 2 * len(set(digests)), "both halves have the same prompt and responses"


def test_a_resumed_run_is_the_uninterrupted_one(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"policy": PolicyConfig(str(tiny), lora=LORA), "goal": AdapterStrength(neutral="mean")}

    whole = fit_adam(tmp_path / "whole", tiny, pairs_folder, **options())
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_before_optimizer_step", 4, **options())
    resumed = fit_adam(tmp_path / "part", tiny, pairs_folder, ckpt=ckpt, **options())
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    with pytest.raises(ConfigError, match="other rewards, goals or weights"):
        fit_adam(tmp_path / "part", tiny, pairs_folder, ckpt=ckpt, **(options() | {"goal": AdapterStrength(neutral=4)}))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_equal_one_with_ddp_and_fsdp2(
    process_server: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = processes.variants(processes.make(tmp_path_factory.mktemp("ranks")))["padded-off"] | {"strength": 5.0}
    assert case["lora"]
    rank_worker.run(alone(case, "one") | {"strength": 5.0}, tmp_path)
    rank_worker.run(alone(case, "by-text"), tmp_path)
    two = [case | {"name": name, "ranks": 2, "strategy": name} for name in ("ddp", "fsdp2")]
    fit_on_ranks(process_server, two, 2, tmp_path)
    for name in ("ddp", "fsdp2"):
        found = differences(tmp_path, "one", name)
        assert max(found.values()) <= 1e-5, (name, found)
    assert max(differences(tmp_path, "one", "by-text").values()) > 1e-3, "the goal is the strength"


# -- the template -----------------------------------------------------------------------------------------------------


def test_strengths_are_linear_to_either_end_and_beyond() -> None:
    goal = AdapterStrength(RewardScale(1, 10), neutral=4.0)
    assert [goal.strength(g) for g in (1, 2.5, 4, 7, 10, 16, -2)] == [-1, -0.5, 0, 0.5, 1, 2, -2]
    assert goal.state_best == StatedGoal(None, 1.0)
    assert goal.unstated == StatedGoal(None, 0.0)
    assert AdapterStrength(neutral="middle").strength(5.5) == 0


def test_the_neutral_goal_is_fitted_to_the_training_split() -> None:
    rewards = [1.0, 2.0, 2.0, 3.0, *(3 + i / 100 for i in range(500)), 8.0, 8.0]
    mean, ranks = AdapterStrength(neutral="mean"), AdapterStrength(neutral="ranks")
    for goal in (mean, ranks):
        assert goal.needs_fit
        goal.fit(rewards)
        assert not goal.needs_fit
    assert mean.neutral == pytest.approx(sum(rewards) / len(rewards))
    assert mean.strength(sum(rewards) / len(rewards)) == pytest.approx(0)
    found = [ranks.strength(g) for g in (1.0, 3.0, 5.49, 8.0, 9.0, 10.0, 14.5)]
    assert found == sorted(found)
    assert found[0] == -1
    assert abs(found[2]) < 0.02, "the median"
    assert found[3:] == pytest.approx([1, 1, 1, 2]), "nothing in the data is better than 8; beyond the scale it goes on"
    by_rank = QuantileScale()
    goal = AdapterStrength(by_rank, neutral="middle")
    goal.fit(rewards)
    assert [goal.strength(by_rank.goal(r)) for r in (1.0, 8.0)] == [-1, 1]


def test_pairs_tie_where_both_goals_have_the_same_strength() -> None:
    goal = AdapterStrength(neutral=4.0)
    assert is_tie(goal, (7.0, 7.0), ((), ()))
    assert not is_tie(goal, (7.04, 7.0), ((), ())), "printed alike, and still two strengths"
    assert is_tie(OverallGoal(), (7.04, 7.0), ((), ()))
    ranks = AdapterStrength(neutral=[1.0, 2.0, 9.0])
    assert is_tie(ranks, (9.8, 9.3), ((), ())), "both above every reward that was ranked"


def test_text_and_strength_go_together(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    both = AdapterStrength(neutral=4.0, prompt=OverallGoal())
    assert both.describe() == AdapterStrength(neutral=4.0, prompt=OverallGoal()).describe(), "caches are found again"
    assert both.state(7.0) == StatedGoal(OverallGoal().text(7.0), 0.5)
    text, alone_, mixed = (
        encode(tokenizer, scored_rows(6), goal=goal)[0] for goal in (OverallGoal(), AdapterStrength(neutral=4.0), both)
    )
    for index in range(len(text)):
        one = mixed.example(index)
        assert one.prompt_ids == text.example(index).prompt_ids
        assert one.strength == alone_.example(index).strength == both.strength(one.rewards[0])
        assert text.example(index).strength is None
    assert alone_.example(0).prompt_ids == alone_.example(1).prompt_ids, "without a text both goals have one prompt"
    with pytest.raises(ConfigError, match="Give one"):
        AdapterStrength(RewardScale(0, 5), prompt=OverallGoal())


class Silent(OverallGoal):
    """Writes nothing for goals below 3."""

    def text(self, goal: float, attributes: Any = ()) -> str:
        return " \n" if goal < 3 else super().text(goal)


def test_what_cannot_have_a_strength_is_refused(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            run(tmp_path, tiny, pairs_folder, **options)
        assert len(str(error.value)) < 400
        return str(error.value)

    def adapter(**options: Any) -> PolicyConfig:
        return PolicyConfig(str(tiny), lora=Lora(**options))

    assert "the policy has none" in said(policy=PolicyConfig(str(tiny)))
    assert "DoRA" in said(policy=adapter(use_dora=True))
    assert "scaling of its own" in said(policy=PolicyConfig(str(tiny), adapter=str(make_adapter(tmp_path / "a", tiny))))
    assert "lora_embedding_A" in said(policy=adapter(target_modules=["embed_tokens", "q_proj"]))
    assert "relabel none has no effect" in said(relabel="none")
    assert "keep_original has no effect" in said(keep_original=True)
    with pytest.raises(ConfigError, match="inside of the scale"):
        AdapterStrength(neutral=10.0)
    assert "Silent writes nothing for the goal" in said(goal=Silent(), policy=PolicyConfig(str(tiny)))
    run(tmp_path / "fine", tiny, pairs_folder, policy=adapter(use_rslora=True), trainer={"max_steps": 1})


def test_keys_of_caches_tell_strengths_apart() -> None:
    goals = [
        AdapterStrength(neutral=4.0),
        AdapterStrength(neutral=5.0),
        AdapterStrength(neutral=4.0, prompt=OverallGoal()),
    ]
    assert len({goal.describe() for goal in goals}) == 3
    assert len({goal.state(g).key for goal in goals for g in (2.0, 3.0)}) == 6


# -- asking for goals, and export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of a run whose best goal has strength 0.5, and the run's module."""
    folder = tmp_path_factory.mktemp("saved")
    goal = AdapterStrength(RewardScale(1, 10), neutral=[1.0, 2.0, *[10.0] * 3])
    assert goal.strength(10.0) == 0.5
    module = run(folder, tiny, pairs_folder, goal=goal)
    with torch.no_grad():  # far from the base, so that strengths show in samples
        for name, p in module.policy.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.15)
    module.trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", module


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def plain_logits(folder: Path, tiny: Path, ids: Tensor) -> Tensor:
    """By peft and transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").is_file():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(folder)), ids)
    return logits(AutoModelForCausalLM.from_pretrained(folder), ids)


def test_exports_are_ordinary_models_at_their_goal(saved: tuple[Path, Any], tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    checkpoint, module = saved
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    common = ["export", "--checkpoint", checkpoint]
    assert called(*common, "--output", tmp_path / "best") == 0
    assert called(*common, "--output", tmp_path / "whole", "--merge", "true") == 0
    assert called(*common, "--output", tmp_path / "each", "--goals", "[1, 2, 10, 14.5]") == 0

    def at_goal(strength: float) -> Tensor:
        with at_strength(torch.full((2, 1), strength)):
            return logits(module.policy.model, ids)

    expected = {"1": -1.0, "2": -0.5, "10": 0.5, "14.5": 1.5}
    for goal, strength in expected.items():
        found = plain_logits(tmp_path / "each" / f"goal-{goal}", tiny, ids)
        torch.testing.assert_close(found, at_goal(strength), atol=1e-4, rtol=1e-4)
        assert not (tmp_path / "each" / f"goal-{goal}" / "goal.json").exists(), "an adapter that needs no goal"
    for folder in ("best", "whole"):
        torch.testing.assert_close(plain_logits(tmp_path / folder, tiny, ids), at_goal(0.5), atol=1e-4, rtol=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)  # as a server holds several adapters
    several = PeftModel.from_pretrained(base, str(tmp_path / "each" / "goal-1"), "goal-1")
    several.load_adapter(str(tmp_path / "each" / "goal-10"), "goal-10")
    for goal in ("1", "10", "1"):
        several.set_adapter(f"goal-{goal}")
        torch.testing.assert_close(logits(several, ids), at_goal(expected[goal]), atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "whole" / "goal.json").exists()
    assert (at_goal(0.5) - at_goal(1.0)).abs().max() > 0.1
    record = json.loads((tmp_path / "best" / "goal.json").read_text())
    assert (record["adapter_at"], record["strength"]) == (0.5, 0.5)
    refused = run_command(*common, "--output", tmp_path / "no", "--goals", "[1]", "--push_to_hub", "a/b")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)


def test_commands_ask_a_checkpoint_and_its_export_for_any_goal(
    saved: tuple[Path, Any], tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """Also beyond the scale; the base model where no goal is asked for."""
    checkpoint, module = saved
    assert called("export", "--checkpoint", checkpoint, "--output", tmp_path / "hf") == 0
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n}: red pear?"} for n in range(3)])

    def samples(model: Path, goal: str) -> tuple[list[str], str]:
        output = tmp_path / f"{model.name}-{goal}.jsonl"
        said = run_command(
            "generate", "--model", model, "--prompts", prompts, "--output", output, "--goal", goal,
            "--temperature", "0", "--max_new_tokens", "8", "--engine", "Transformers", "--engine.dtype", "float32",
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        rows = map(json.loads, output.read_text().splitlines())
        found = {row["messages"][-1]["content"]: row["response"] for row in rows}  # rows are in the order of lengths
        return [found[history[-1]["content"]] for history in histories], said.stderr

    histories = [[{"role": "user", "content": f"{n}: red pear?"}] for n in range(3)]
    greedy = Generation(max_new_tokens=8, temperature=0.0)
    expected = {}
    for goal in (1.0, 10.0, 14.5, None):
        batch = module.data.prompt_batch(histories, goal, greedy)
        expected[goal] = generate(module.policy, module.tokenizer, batch, greedy)
        for model in (checkpoint, tmp_path / "hf"):
            found, said = samples(model, "none" if goal is None else f"{goal:g}")
            assert found == expected[goal], (model, goal)
            assert ("extrapolated to 1.5" in said) == (goal == 14.5)
    assert samples(tmp_path / "hf", "best")[0] == expected[10.0]
    assert len({tuple(texts) for texts in expected.values()}) == 4, "each goal has its own responses"
    with module.policy.model.disable_adapter():
        batch = replace(module.data.prompt_batch(histories, 1.0, greedy), strength=None)
        assert generate(module.policy, module.tokenizer, batch, greedy) == expected[None], "no goal is the base model"


def test_guidance_pushes_away_from_another_strength(saved: tuple[Path, Any]) -> None:
    """Its second stream runs at the low goal's strength: by whole forward passes, without a cache."""
    _, module = saved
    guided = Generation(max_new_tokens=5, temperature=0.0, guidance=0.7)
    batch = module.data.prompt_batch([[{"role": "user", "content": "1: red pear?"}]], 10.0, guided)
    (found,) = generate(module.policy, module.tokenizer, batch, guided)
    ids = batch.input_ids
    for _ in range(5):
        streams = []
        for strength in (0.5, -1.0):
            with at_strength(torch.tensor([[strength]])):
                streams.append(logits(module.policy.model, ids)[:, -1].log_softmax(-1))
        token = (1.7 * streams[0] - 0.7 * streams[1]).argmax(-1)
        ids = torch.cat((ids, token[:, None]), 1)
        if int(token) == module.tokenizer.eos_token_id:
            break
    text = module.tokenizer.decode(ids[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert found == text
    assert batch.against is not None
    assert batch.strength.tolist() == [[0.5]]
    assert batch.against.strength.tolist() == [[-1.0]]


def test_engines_that_cannot_set_a_strength_say_so(saved: tuple[Path, Any], tmp_path: Path) -> None:
    from rap_lightning.onpolicy.engines.hf import Transformers
    from rap_lightning.onpolicy.model_source import ModelSource
    from rap_lightning.onpolicy.requested_goals import resolve
    from rap_lightning.onpolicy.response_generator import ResponseGenerator

    model = ModelSource(str(saved[0]))
    goals = [resolve(1.0, model.record(), None)]
    with pytest.raises(ConfigError, match="export --goals"):
        ResponseGenerator(model, Transformers(continuous=True)).run([], tmp_path / "o.jsonl", goals, Generation(), 1, 0)


def test_strengths_need_an_adapter_that_they_reach(
    tiny: Path, saved: tuple[Path, Any], pairs_folder: Path, tmp_path: Path
) -> None:
    """A model without one would answer alike under every goal; at strength 0 it is what is asked for."""
    from rap_lightning.onpolicy.engines import Transformers
    from rap_lightning.onpolicy.model_source import ModelSource
    from rap_lightning.onpolicy.requested_goals import request_goals
    from rap_lightning.onpolicy.response_generator import ResponseGenerator

    def generated(model: Path, goal: float) -> None:
        goals = request_goals([goal], None, AdapterStrength(neutral=4.0), Generation())
        sampling = Generation(max_new_tokens=2)
        history = [[{"role": "user", "content": "Hello"}]]
        ResponseGenerator(ModelSource(str(model)), Transformers()).run(
            history, tmp_path / f"{model.name}-{goal}.jsonl", goals, sampling, 1, 0
        )  # fmt: skip

    with pytest.raises(ConfigError, match="has no adapter, and these goals are strengths of one"):
        generated(tiny, 10.0)
    generated(tiny, 4.0)
    with pytest.raises(ConfigError, match=r"is trained and has no strength .*without DoRA"):
        generated(make_adapter(tmp_path / "dora", tiny, use_dora=True), 10.0)
    generated(make_adapter(tmp_path / "lora", tiny), 10.0)
    ask = ["evaluate", "--model", tiny, "--source", pairs_folder, "--goal_from", tmp_path, "--output", tmp_path / "e"]
    (tmp_path / "goal.json").write_text(json.dumps(AdapterStrength(neutral=4.0).record()))
    shown = run_command(*ask, "--parts", "[discrimination]")
    assert "goals are the strength of an adapter, and the model has none" in shown.stderr
    with pytest.raises(ConfigError, match="two of them read the same"):  # rows are told apart by the printed goal
        request_goals([1.0, 1.01], None, AdapterStrength(neutral=4.0), Generation())


def test_a_policy_without_an_adapter_is_refused_before_data_are_read(tiny: Path, tmp_path: Path) -> None:
    data = ("--data.source", tmp_path / "nowhere.jsonl", "--data.goal", "AdapterStrength")
    shown = run_command("fit", "--model.policy.path", tiny, *data)
    assert shown.returncode == 2
    assert "the policy has none: set --model.policy.lora.r" in shown.stderr


def test_callbacks_ask_for_goals_by_strength(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """Without a goal the policy stays the base model; a goal beyond the scale is noted and sampled."""
    samples = GoalSamples(goals=[1, 10, 12], prompts=2, every_n_steps=5)
    probe = LikelihoodProbe(pairs=6, bins=1, every_n_steps=5)
    generation = Generation(max_new_tokens=4, temperature=0.0)
    run(tmp_path, tiny, pairs_folder, generation=generation, trainer={"callbacks": [samples, probe]})
    rows = read_jsonl(next(tmp_path.rglob("samples.jsonl")))
    assert {row["goal"] for row in rows} == {1, 10, 12}
    before = {tuple(row["response"] for row in rows if row["step"] == 0 and row["goal"] == g) for g in (1, 10, 12)}
    assert len(before) == 1, "the adapter has no effect yet"
    lines = read_jsonl(next(tmp_path.rglob("likelihood.jsonl")))
    last = {(row["condition"], row["role"]): row["change_nats"] for row in lines if row["step"] == 5}
    assert last["none", "chosen"] == last["none", "rejected"] == 0
    assert abs(last["best", "chosen"]) > 1e-3
    assert abs(last["own", "chosen"]) > 1e-4


def test_an_evaluation_reads_responses_at_the_strengths_of_goals(
    saved: tuple[Path, Any], tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    checkpoint, module = saved
    said = run_command(
        "evaluate", "--model", checkpoint, "--source", pairs_folder, "--split", "test", "--parts",
        "[unlearning, discrimination]", "--output", tmp_path / "e", "--scale_points", "3", "--limit", "4",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = read_jsonl(next(tmp_path.rglob("logps.jsonl")))
    found = [row for row in found if "goal" in row]
    pair = module.data.scored_pairs("test", 9, 0)
    by_id = {one.id: one for one in pair}
    encode = AtGoals(module.data.encoder, [StatedGoal(None, s) for s in (-1.0, 0.5, 0.0)], None)
    checked = 0
    for example in encode.examples([by_id[row["pair_id"]] for row in found[:1]], DataReport("", "")):
        (row,) = [r for r in found if (r["pair_id"], r["goal"]) == (example.pair_id, example.goal)] or [None]
        if row is not None:
            expected = policy_logps(module.policy, example)
            assert row["logps"] == pytest.approx(expected, abs=1e-3)
            checked += 1
    assert checked == 3, "worst, best and none"


def policy_logps(policy: Policy, example: Example) -> list[float]:
    with torch.no_grad():
        return list(policy.logps(batch_of("padded", [example])).tolist())
