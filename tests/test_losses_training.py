"""Losses within the system: what they ask for arrives, state is exact on resume, a reference follows the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cli_process import free_port
from conftest import build, encode, make_trainer, scored_rows, sgd, write_jsonl
from loss_cases import LOSSES, make, random_logps, taken
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.unrelated import unrelated
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import AOT, BCO, DPO, KTO, LDDPO, SFT, WPO, MarginDPO, Mixture
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.training.schedules import ConstantWithWarmup
from test_fit import assert_same, logged, weights


def fit(folder: Path, model: Path, data: Path, *, ckpt: Path | None = None, trainer: Any = None, **options: Any) -> Any:
    options = {"optimizer": sgd, "schedule": ConstantWithWarmup()} | options
    module, datamodule = build(model, data, **options)
    runner = make_trainer(folder, **({"max_steps": 4} | (trainer or {})))
    runner.fit(module, datamodule, ckpt_path=None if ckpt is None else str(ckpt), weights_only=True)
    return module


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_trains_and_validates(kind: Any, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    loss = make(kind).train()
    module = fit(
        tmp_path, tiny, pairs_folder, loss=loss, lora=True,
        trainer={"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2},
    )  # fmt: skip
    rows = logged(tmp_path)
    assert all(torch.isfinite(p).all() for p in module.policy.parameters())
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert torch.tensor(rows[0][name]).isfinite()
    assert rows[0]["grad_norm"] > 0
    if "reference" in loss.requires:
        assert rows[0]["rewards/margins"] == 0.0, "law 5"
    assert "val/loss" in rows[-1]


# -- what a loss asks for ---------------------------------------------------------------------------------------------


def test_tokens_and_their_collisions_reach_the_loss(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Spy(WPO):
        def forward(self, policy: Any, reference: Any, rewards: Any = None) -> torch.Tensor:
            seen.append((policy, reference))
            return super().forward(policy, reference, rewards)

    module = fit(tmp_path, tiny, pairs_folder, loss=Spy(LDDPO()), batch_size=3, trainer={"max_steps": 1})
    policy, reference = seen[1]  # the first are synthetic inputs
    for logps in (policy, reference):
        sums = torch.zeros(6).index_add(0, logps.tokens.segment, logps.tokens.logps)
        torch.testing.assert_close(sums[0::2], logps.chosen)
        torch.testing.assert_close(sums[1::2], logps.rejected)
        for s, length in enumerate(torch.stack((logps.chosen_lengths, logps.rejected_lengths), 1).flatten()):
            assert logps.tokens.position[logps.tokens.segment == s].tolist() == list(range(length))
    assert reference.tokens.log_collisions is None, "only the policy's are asked for"
    assert (policy.tokens.log_collisions < 0).all()
    assert "tokens" in module.loss.requires


@pytest.mark.parametrize("layout", ["padded", "packed", "tree"])
def test_unrelated_responses_are_those_of_the_pair_before(layout: str, tiny: Path) -> None:
    policy = PolicyConfig(str(tiny)).build(torch.float32)
    pairs, _, _ = encode(PolicyConfig(str(tiny)).load_tokenizer(), scored_rows(6), max_length=160)
    examples = [pairs.example(i) for i in (0, 3, 8)]
    plan = BatchPlan((0, 1, 2), (1.0,) * 3, 3, ((0, 1, 2),))
    batch = lay_out(LAYOUTS[layout], examples, plan, pad_id=0)
    other = unrelated(batch)
    assert other.lengths.tolist() == batch.lengths.roll(2).tolist()
    with torch.no_grad():
        found = policy.logps(other)
        for i, example in enumerate(examples):
            for side, response in enumerate((examples[i - 1].chosen_ids, examples[i - 1].rejected_ids)):
                ids = torch.tensor([*example.prompt_ids, *response])[None]
                logps = policy.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
                expected = float(logps[len(example.prompt_ids) - 1 :].sum())
                assert float(found[2 * i + side]) == pytest.approx(expected, rel=1e-4)


def test_prompts_are_found_in_rows_where_responses_share_them() -> None:
    """A row of a tree: two prompts, each followed by its two responses, depth first."""
    from conftest import make_model  # noqa: F401 (the layout needs no model)
    from rap_lightning.batches.types import Batch

    rows = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [10, 11, 12])]
    ids: list[int] = []
    positions: list[int] = []
    predict_from: list[int] = []
    target: list[int] = []
    segment: list[int] = []
    for number, (prompt, *responses) in enumerate(rows):
        root = len(ids)
        ids += prompt
        positions += range(len(prompt))
        for which, response in enumerate(responses):
            predict_from += [root + len(prompt) - 1, *range(len(ids), len(ids) + len(response) - 1)]
            target += response
            segment += [2 * number + which] * len(response)
            positions += range(len(prompt), len(prompt) + len(response))
            ids += response
    t = torch.tensor
    batch = Batch(
        input_ids=t([ids]), position_ids=t([positions]), attention_mask=torch.ones(1, len(ids)), forest=None,
        predict_from=t(predict_from), target=t(target), segment=t(segment), lengths=t([2, 1, 1, 3]),
        rewards=torch.zeros(2, 2), goal_rewards=torch.zeros(2), origin=t([0, 0]), weights=torch.ones(2),
        fillers=0, step_pairs=2, loss_weights=torch.ones(2), step_weight=2.0, digests=(),
        pair_ids=("a", "b"), goals=(None, None),
    )  # fmt: skip
    other = unrelated(batch)
    found = [row[: int(mask.sum())].tolist() for row, mask in zip(other.input_ids, other.attention_mask, strict=True)]
    assert found == [[1, 2, 3, 9], [1, 2, 3, 10, 11], [7, 8, 4, 5], [7, 8, 6]], "one is cut at 5, the longest's length"
    assert other.input_ids.flatten()[other.predict_from + 1].tolist() == other.target.tolist()


def test_goals_reach_a_reward_aware_loss(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    gaps: list[torch.Tensor] = []

    class Spy(MarginDPO):
        def gap(self, rewards: Any) -> torch.Tensor:
            gaps.append((super().gap(rewards), rewards.chosen - rewards.rejected))
            return gaps[-1][0]

    fit(tmp_path / "a", tiny, pairs_folder, loss=Spy(), batch_size=46, trainer={"max_steps": 1})
    under_goal, judged = gaps[1]  # the first are synthetic inputs
    assert (under_goal > 0).all()
    assert (judged < 0).sum() == 23, "half of the pairs have the lower reward as their goal"
    gaps.clear()
    fit(tmp_path / "b", tiny, pairs_folder, loss=Spy(), goal=None, batch_size=23, trainer={"max_steps": 1})
    assert torch.equal(*gaps[1])


def test_a_mixtures_terms_are_logged_by_name_and_origin(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    loss = Mixture([DPO(0.5), BCO(0.5), SFT()], [0.8, 0.2, 1.0])
    fit(tmp_path, tiny, pairs_folder, loss=loss, trainer={"max_steps": 2, "val_check_interval": 2})
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert rows[0]["loss/DPO"] == pytest.approx(0.693147, abs=1e-6)
    for row in rows:
        whole = 0.8 * row["loss/DPO"] + 0.2 * row["loss/BCO"] + row["loss/SFT"]
        assert row["loss"] == pytest.approx(whole, rel=1e-5)
        assert {"loss/SFT/chosen-goal", "loss/SFT/rejected-goal"} <= row.keys()
    assert "val/loss/BCO" in logged(tmp_path)[-1]


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_loss_with_state_does_not_see_how_a_step_was_split(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", tiny, pairs_folder, loss=BCO(0.5), batch_size=12)
    parts = fit(
        tmp_path / "b", tiny, pairs_folder, loss=BCO(0.5), batch_size=3,
        trainer={"max_steps": 4, "accumulate_grad_batches": 4},
    )  # fmt: skip
    assert_same(weights(whole), weights(parts), 2e-5)
    assert whole.loss.totals[1] == parts.loss.totals[1] == 2 * 46
    assert whole.loss.delta.abs() > 1e-4
    assert float(whole.loss.delta) == pytest.approx(float(parts.loss.delta), rel=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_what_changes_during_a_run_resumes_bit_for_bit(
    lora: bool, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """Stopped between two updates of the reference, with a running mean that has seen some steps."""

    saver = ModelCheckpoint(tmp_path, filename="four", every_n_train_steps=4, save_top_k=-1)
    saving = {"callbacks": [saver], "enable_checkpointing": True}

    def run(folder: str, ckpt: Path | None = None, **trainer: Any) -> Any:
        reference = Synchronised(every=3, alpha=1.0 if lora else 0.6)
        return fit(
            tmp_path / folder, tiny, pairs_folder, lora=lora, loss=Mixture([BCO(0.5), DPO(0.5)]), reference=reference,
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), trainer={"max_steps": 7} | trainer, ckpt=ckpt,
        )  # fmt: skip

    whole = run("whole", **saving)
    content = torch.load(tmp_path / "four.ckpt", weights_only=True)
    kept = content["rap_lightning"]["reference"]
    assert kept
    assert all(".lora_" in name for name in kept) is lora
    rest = run("rest", tmp_path / "four.ckpt")
    assert_same(weights(whole), weights(rest))
    assert torch.equal(whole.loss.parts[0].totals, rest.loss.parts[0].totals)
    expected = {row["step"]: row["loss"] for row in logged(tmp_path / "whole")}
    assert {row["step"]: row["loss"] for row in logged(tmp_path / "rest")} == {s: expected[s] for s in (5, 6, 7)}


def test_the_reference_mixes_every_so_many_steps(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """TR-DPO's update, by its equation from the policy of each step."""
    history: list[dict[str, torch.Tensor]] = []
    references: list[dict[str, torch.Tensor]] = []

    class Recorded(Synchronised):
        def follow(self, policy: Policy, step: int) -> None:
            super().follow(policy, step)
            history.append({n: p.detach().clone() for n, p in policy.named_parameters()})
            references.append({n: w.clone() for n, w in self._weights.items()})

    module = fit(tmp_path, tiny, pairs_folder, loss=DPO(0.5), reference=Recorded(every=2, alpha=0.25))
    start, wanted = history[0], dict(history[0])
    for step, (policy, reference) in enumerate(zip(history, references, strict=True)):
        if step and step % 2 == 0:
            wanted = {n: 0.25 * policy[n] + 0.75 * wanted[n] for n in policy}
        assert_same(reference, wanted, 1e-7)
    assert len(history) == 5
    assert any(not torch.equal(references[-1][n], start[n]) for n in start)
    assert all(p.grad is not None for p in module.policy.parameters()), "the policy's own weights were trained"


def test_before_its_first_update_a_following_reference_is_a_frozen_one(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    for lora, other in ((False, Frozen()), (True, AdaptersOff())):
        runs = [
            fit(tmp_path / f"{lora}{type(r).__name__}", tiny, pairs_folder, lora=lora, loss=DPO(0.5), reference=r)
            for r in (Synchronised(every=100, alpha=1.0), other)
        ]
        assert_same(weights(runs[0]), weights(runs[1]), 1e-6)


def test_after_a_copy_the_next_margins_start_from_zero(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    for lora in (False, True):
        fit(
            tmp_path / str(lora), tiny, pairs_folder, lora=lora, loss=DPO(0.5), reference=Synchronised(2, alpha=1.0),
            optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        )  # fmt: skip
        margins = {int(row["step"]): row["rewards/margins"] for row in logged(tmp_path / str(lora))}
        assert margins[3] == 0.0
        assert abs(margins[2]) > 0
        assert abs(margins[4]) > 0


def on_a_rank(rank: int, port: int, folder: str) -> None:
    """What each of two processes does: BCO and KTO on its half of the pairs; rank 1's last batch is a filler."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    bco, kto = BCO(0.5).train(), KTO(0.5)
    policy, reference = (random_logps(6, seed, lengths=(torch.tensor([3] * 6),) * 2) for seed in (1, 2))
    values = []
    for mine in ([[0, 1], [4, 5]], [[2, 3], [0]])[rank]:
        weight = torch.zeros(1) if mine == [0] else torch.ones(len(mine))
        ours, theirs = (replace(taken(x, mine), weights=weight) for x in (policy, reference))
        bco(ours, theirs)
        values.append((mine, kto(ours, theirs)))
    bco.after_step()
    torch.save((bco.totals, values), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_state_and_batch_statistics_are_of_all_ranks(process_server: Any, tmp_path: Path) -> None:
    port = free_port()
    ranks = [process_server.Process(target=on_a_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
        assert rank.exitcode == 0
    (one, first), (two, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    policy, reference = (random_logps(6, seed, lengths=(torch.tensor([3] * 6),) * 2) for seed in (1, 2))
    bco = BCO(0.5).train()
    bco(policy, reference)
    bco.after_step()
    torch.testing.assert_close(one, bco.totals)
    assert torch.equal(one, two)
    for step, live in enumerate(([0, 1, 2, 3], [4, 5])):
        whole = KTO(0.5)(taken(policy, live), taken(reference, live))
        for mine, values in (first[step], second[step]):
            for pair, value in zip(mine, values, strict=True):
                if pair in live:
                    assert value == pytest.approx(float(whole[live.index(pair)]), rel=1e-9)


# -- bad input --------------------------------------------------------------------------------------------------------


ONE_PAIR = r"at least 2 pairs in a batch.*batch_size 1"


@pytest.mark.parametrize(
    ("loss", "option", "message"),
    [
        pytest.param(KTO(), {"batch_size": 1}, ONE_PAIR, id="KTO"),
        pytest.param(AOT(), {"batch_size": 1}, ONE_PAIR, id="AOT"),
        pytest.param(Mixture([DPO(), KTO()]), {"batch_size": 1}, ONE_PAIR, id="Mixture"),
        pytest.param(AOT(), {"token_budget": 500}, "token_budget splits a batch", id="parts of a batch"),
    ],
)
def test_a_loss_of_whole_batches_is_refused_where_batches_are_of_one_pair_or_taken_apart(
    loss: Any, option: dict[str, int], message: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    module, data = build(tiny, pairs_folder, loss=loss, **option)
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path).fit(module, data)
    assert module.policy is None, "before any model is loaded"


@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_rewards_are_refused_before_the_model_loads(streaming: bool, tiny: Path, tmp_path: Path) -> None:
    unscored = [{k: v for k, v in row.items() if not k.startswith("score")} for row in scored_rows(8)]
    source = write_jsonl(tmp_path / "unscored.jsonl", unscored)
    module, data = build(tiny, source, loss=MarginDPO(), goal=None, streaming=streaming)
    with pytest.raises(ConfigError, match="MarginDPO needs the judge's rewards, and the data have none"):
        make_trainer(tmp_path, max_steps=2).fit(module, data)
    assert module.policy is None
    plain, data = build(tiny, source, goal=None, streaming=streaming)
    make_trainer(tmp_path, max_steps=2).fit(plain, data)  # other losses train on them


def test_a_pair_without_rewards_never_trains_a_loss_that_needs_them(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    module, data = build(tiny, pairs_folder, loss=Mixture([SFT(), MarginDPO()]))
    seen = module.before_transfer
    module.before_transfer = lambda parts: seen(
        tuple(replace(part, rewards=part.rewards * torch.nan) for part in parts)
    )
    with pytest.raises(DataError, match="Mixture needs the judge's rewards"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


def test_stored_log_probabilities_are_refused_where_they_cannot_be_known(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from rap_lightning.models.references.precomputed import Stored

    with pytest.raises(ConfigError, match="needs more than the summed log-probabilities"):
        build(tiny, pairs_folder, loss=KTO(), reference=Stored(folder=str(tmp_path / "store")))
    module, data = build(tiny, pairs_folder, reference=Stored(folder=str(tmp_path / "store")), streaming=True)
    with pytest.raises(ConfigError, match="a stream is read during training"):
        make_trainer(tmp_path, max_steps=2).fit(module, data)
    module, data = build(tiny, pairs_folder, loss=LDDPO(), reference=Stored(folder=str(tmp_path / "store")))
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert module.step_logger.last.values["rewards/margins"] == pytest.approx(0, abs=1e-5), (
        "tokens are kept, not sums alone"
    )


def test_unrelated_responses_come_from_another_scored_pair_and_fit_the_model(tiny: Path) -> None:
    pairs, _, _ = encode(PolicyConfig(str(tiny)).load_tokenizer(), scored_rows(6), max_length=160)
    examples = [pairs.example(i) for i in (0, 1, 4, 5)]  # both halves of two scored pairs, side by side
    examples[0] = replace(examples[0], prompt_ids=list(examples[0].prompt_ids) + [5] * 40)
    plan = BatchPlan((0, 1, 2, 3), (1.0,) * 4, 4, ((0, 1, 2, 3),))
    batch = lay_out(LAYOUTS["tree"], examples, plan, pad_id=0)
    other = unrelated(batch)
    longest = max(len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in examples)
    assert other.input_ids.shape[1] <= longest, "the model may know no more positions"
    for pair, donor in enumerate((3, 3, 1, 1)):
        given = other.target[other.segment == 2 * pair].tolist()
        assert given == list(examples[donor].chosen_ids)[: len(given)]
        assert given


def test_another_number_of_accumulated_batches_than_planned_is_refused(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    module, data = build(tiny, pairs_folder, optimizer=sgd)
    trainer = make_trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 4})])
    with pytest.raises(ConfigError, match="gradients would be scaled wrongly"):
        trainer.fit(module, data)


def test_a_run_with_a_following_reference_does_not_go_on_with_another(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    run = fit(tmp_path / "a", tiny, pairs_folder, reference=Synchronised(), trainer={"max_steps": 1})
    run.trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="Resume with the reference of that run"):
        fit(tmp_path / "b", tiny, pairs_folder, reference=Frozen(), ckpt=tmp_path / "a.ckpt")


def test_a_following_reference_refuses_what_it_cannot_do(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.module import PreferenceModule

    lora = PolicyConfig("/nowhere", lora=Lora(r=4))
    with pytest.raises(ConfigError, match=r"with an adapter alpha must be 1, found 0\.6"):
        PreferenceModule(lora, reference=Synchronised())
    for options, message in (({"every": 0}, "at least 1 step"), ({"alpha": 0.0}, "alpha"), ({"alpha": 1.1}, "alpha")):
        with pytest.raises(ConfigError, match=message):
            Synchronised(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="can't be used with a sharded policy"):
        Synchronised().shard(None)  # type: ignore[arg-type]
    fit(tmp_path / "a", tiny, pairs_folder, trainer={"max_steps": 1}).trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="no state of the reference Synchronised"):
        fit(tmp_path / "b", tiny, pairs_folder, reference=Synchronised(), ckpt=tmp_path / "a.ckpt")


def test_a_reference_that_has_only_sums_is_refused_by_losses_of_tokens() -> None:
    from rap_lightning.module import PreferenceModule

    class Sums(Frozen):
        gives_tokens = False

    for loss in (LDDPO(), WPO(), KTO(), Mixture([DPO(), LDDPO()])):
        with pytest.raises(ConfigError, match="needs more than the summed log-probabilities"):
            PreferenceModule(PolicyConfig("/nowhere"), loss=loss, reference=Sums())
    PreferenceModule(PolicyConfig("/nowhere"), loss=DPO(), reference=Sums())


def test_a_step_that_logs_no_terms_leaves_them_empty(tiny: Path, tmp_path: Path) -> None:
    """A module that overrides pair_losses need not call the loss at all."""
    from rap_lightning.module import PreferenceModule

    class Own(PreferenceModule):
        def pair_losses(self, policy: Any, reference: Any, rewards: Any) -> Any:
            margins = (policy.chosen - policy.rejected) / 10
            return torch.nn.functional.softplus(-margins), (policy.chosen, policy.rejected)

    data = write_jsonl(tmp_path / "few.jsonl", scored_rows(4))
    _, datamodule = build(tiny, data)
    module = Own(PolicyConfig(str(tiny)), loss=Mixture([DPO(), SFT()]), optimizer=sgd)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule)
    assert logged(tmp_path)[0]["loss"] > 0
