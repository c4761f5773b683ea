"""Rewards from a judge in the place of the data's: the implicit reward by hand, the same pairs as scored data give."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from conftest import build, called, make_model, make_trainer, read_jsonl, scored_rows, write_jsonl
from rap_lightning.callbacks import ExportHF, LikelihoodProbe
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import DPO
from rap_lightning.onpolicy.judges import Function, ImplicitReward, Likelihood
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal
from rap_lightning.preferences.judge import Item, Judge, Verdict
from rap_lightning.preferences.scales import LinearScale, QuantileScale
from test_fit import fit

HISTORIES = [
    ({"role": "user", "content": "3: red apple"},),
    ({"role": "system", "content": "Answer in one"}, {"role": "user", "content": "name a far plum"}),
    (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "pear"},
        {"role": "user", "content": "and two"},
    ),
]
TEXTS = ("blue yes", "walks and sings no <|im_end|>")
ITEMS = [
    Item(f"{number:016x}", history, text)
    for number, (history, text) in enumerate((history, text) for history in HISTORIES for text in TEXTS)
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain DPO, full and as an adapter: exported folders and checkpoints."""
    found = {}
    for name, lora in (("full", False), ("lora", True)):
        folder = tmp_path_factory.mktemp(name)
        adam = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
        module, data = build(tiny, pairs_folder, lora=lora, goal=None, optimizer=adam, loss=DPO(0.5))
        trainer = make_trainer(folder, max_steps=5, callbacks=[ExportHF()])
        trainer.fit(module, data)
        trainer.save_checkpoint(folder / "last.ckpt")
        found |= {name: next(folder.rglob("hf")), f"{name}.ckpt": folder / "last.ckpt"}
    return found


def by_hand(folder: Path, item: Item) -> tuple[float, int]:
    """Log-probability of a response with its end of turn, in nats, and its tokens; as text, with no template code."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else folder
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval() if adapter.is_file() else model.eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = list(item.history)
    if turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    prompt = tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    said = tokenizer(item.response + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + said])
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(-1, ids[0, 1:, None])[:, 0]
    return float(logps[len(prompt) - 1 :].sum()), len(said)


def verdicts(judge: Judge, items: Sequence[Item] = ITEMS) -> dict[str, Verdict]:
    return {verdict.id: verdict for part in judge.judge(items) for verdict in part}


@pytest.mark.parametrize("kind", ["full", "lora", "full.ckpt", "lora.ckpt"])
def test_the_implicit_reward_is_beta_times_the_log_ratio(kind: str, tiny: Path, runs: dict[str, Path]) -> None:
    judge = ImplicitReward(str(runs[kind]), str(tiny) if kind == "full" else None, beta=0.3, batch_size=4)
    found = verdicts(judge)
    assert len(found) == len(ITEMS)
    sizes = []
    for item in ITEMS[::2]:
        (own, tokens), (other, _) = by_hand(runs[kind.removesuffix(".ckpt")], item), by_hand(tiny, item)
        verdict = found[item.id]
        assert not verdict.error
        assert verdict.notes["tokens"] == tokens
        assert verdict.overall == pytest.approx(0.3 * (own - other), abs=1e-4)
        sizes.append(abs(verdict.overall))
    assert max(sizes) > 0.05, "or there would be nothing to see"
    assert all(not found[item.id].error for item in ITEMS[1::2])
    assert any("control token" in what for what in judge.counts), "what was repaired is counted"


def test_likelihood_is_the_mean_log_probability_per_token(tiny: Path) -> None:
    found = verdicts(Likelihood(str(tiny), batch_size=2))
    for item in ITEMS[::2]:
        nats, tokens = by_hand(tiny, item)
        assert found[item.id].overall == pytest.approx(nats / tokens, abs=1e-5)


def unscored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("score_")} for row in rows]


def harmless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layout of Anthropic's hh-rlhf: whole conversations as text, no scores."""

    def spoken(turns: list[dict[str, str]]) -> str:
        names = {"user": "Human", "assistant": "Assistant"}
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns if turn["role"] in names)

    return [{side: spoken(row[side]) for side in ("chosen", "rejected")} for row in rows]


def length_score(prompt: str, response: str) -> float:
    """A rule from 1 to 10 that often contradicts the labels."""
    return 1 + (7 * len(response) + len(prompt)) % 19 / 2


@pytest.mark.parametrize("layout", ["pairs", "completions"])
def test_a_judge_in_fit_gives_the_pairs_of_data_that_it_scored_before(layout: str, tiny: Path, tmp_path: Path) -> None:
    rows = scored_rows(40)
    plain, scored = [], []
    for row in rows:
        *history, chosen = row["chosen"]
        prompt = next(turn["content"] for turn in reversed(history) if turn["role"] == "user")
        texts = [chosen["content"], row["rejected"][-1]["content"], "the third"]
        values = [length_score(prompt, text) for text in texts]
        if layout == "pairs":
            bare = {side: row[side] for side in ("chosen", "rejected")}
            plain.append(bare)
            scored.append(bare | {"score_chosen": values[0], "score_rejected": values[1]})
        else:
            bare = [{"response": text} for text in texts]
            plain.append({"prompt": history, "completions": bare})
            both = [one | {"overall_score": v} for one, v in zip(bare, values, strict=True)]
            scored.append({"prompt": history, "completions": both})
    modules = []
    for name, content, judge in (("plain", plain, Function(length_score, [1, 10])), ("scored", scored, None)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", content)
        module, data = build(tiny, tmp_path / name, rewards=judge)
        trainer = make_trainer(tmp_path / f"run-{name}", max_steps=1)
        trainer.fit(module, data)
        modules.append(data)
    ours, theirs = ([vars(d._pairs["train"].example(i)) for i in range(len(d._pairs["train"]))] for d in modules)
    assert len(ours) > 40
    assert ours == theirs
    (mine,), (other,) = (data.reports["train"] for data in modules)
    assert (mine.read, mine.kept, mine.pairs) == (other.read, other.kept, other.pairs)
    if layout == "pairs":
        (reason,), (tally,) = mine.repaired.keys(), mine.repaired.values()
        assert "contradicts the label" in reason
        exchanged = sum(row["score_chosen"] < row["score_rejected"] for row in scored)
        tied = {row["score_chosen"] == row["score_rejected"] for row in scored}
        assert tied <= {True, False}
        assert tally.count == exchanged > 3


def contradicted() -> list[dict[str, Any]]:
    """Rows, a quarter of them with labels that what was learned contradicts."""
    rows = [row for row in scored_rows(30) if row["chosen"][0]["role"] == "user"]
    for row in rows[::4]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def test_unscored_pairs_are_relabelled_by_what_dpo_learned(tiny: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = contradicted()
    write_jsonl(tmp_path / "data" / "train.jsonl", harmless(rows))
    write_jsonl(tmp_path / "data" / "test.jsonl", harmless(rows[:6]))
    judge = ImplicitReward(str(runs["lora"]), beta=0.5)
    module = fit(tmp_path / "run", tiny, tmp_path / "data", rewards=judge, trainer={"max_steps": 2})
    data = module.trainer.datamodule
    assert isinstance(data.goal.scale, QuantileScale), "nats have no range of their own"
    found = verdicts(judge, [
        Item(f"{i:016x}", tuple(row[side][:-1]), row[side][-1]["content"])
        for i, (row, side) in enumerate((row, side) for row in rows for side in ("chosen", "rejected"))
    ])  # fmt: skip
    expected = [(found[f"{2 * i:016x}"].overall, found[f"{2 * i + 1:016x}"].overall) for i in range(len(rows))]
    scale = QuantileScale()
    scale.fit([reward for pair in expected for reward in pair])
    pairs = data._pairs["train"]
    contradicting = 0
    for i, (first, second) in enumerate(expected):
        win, lose = (pairs.example(2 * i + half) for half in (0, 1))
        assert win.rewards == pytest.approx((max(first, second), min(first, second)), abs=1e-5)
        assert lose.rewards == (win.rewards[1], win.rewards[0])
        assert win.goal == scale.printed(scale.goal(win.rewards[0]))
        contradicting += second > first
    assert 0 < contradicting < len(expected)
    (report,) = data.reports["train"]
    assert sum(tally.count for reason, tally in report.repaired.items() if "contradicts" in reason) == contradicting
    record = data.goal.record()
    assert record["scale"]["class"] == "QuantileScale"
    assert record["scale"]["knots"] == pytest.approx(scale.knots, abs=1e-5)


class Counting(Judge):
    """Counts what it is asked; gives up after some, like a killed process."""

    asked: ClassVar[Counter[str]] = Counter()

    def __init__(self, dies_after: int = 10**9, refuses: str = "") -> None:
        super().__init__()
        self.left, self.refuses = dies_after, refuses

    def settings(self) -> dict[str, Any]:
        return {"class": "Counting", "version": 1}

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        for item in items:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            type(self).asked[item.id] += 1
            if self.refuses and self.refuses in item.response:
                yield [Verdict(item.id, error="not in my language")]
            else:
                yield [Verdict(item.id, float(len(item.response)))]


def module_of(folder: Path, tiny: Path, **options: Any) -> Any:
    _, data = build(tiny, folder, **options)
    trainer = make_trainer(folder.parent / "unused")
    trainer.strategy.connect(build(tiny, folder)[0])
    data.trainer = trainer
    return data


def test_what_was_judged_is_not_judged_again_and_a_killed_run_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rap_lightning.models.references import logp_store

    monkeypatch.setattr(logp_store, "FLUSH_SECONDS", -1.0)
    (tmp_path / "data").mkdir()
    rows = unscored(scored_rows(20))
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    Counting.asked.clear()
    with pytest.raises(KeyboardInterrupt):
        module_of(tmp_path / "data", tiny, rewards=Counting(dies_after=15)).setup("fit")
    assert sum(Counting.asked.values()) == 15
    data = module_of(tmp_path / "data", tiny, rewards=Counting())
    data.setup("fit")
    assert len(Counting.asked) == 40
    assert set(Counting.asked.values()) == {1}
    module_of(tmp_path / "data", tiny, rewards=Counting(dies_after=0)).setup("fit")
    # one row more: its two responses alone
    write_jsonl(tmp_path / "data" / "train.jsonl", [*rows, *unscored(scored_rows(1, seed=9))])
    module_of(tmp_path / "data", tiny, rewards=Counting(dies_after=2)).setup("fit")
    assert len(Counting.asked) == 42


def test_responses_without_a_reward_are_dropped_counted_and_asked_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    rows = unscored(scored_rows(20))
    rows[3]["rejected"][-1]["content"] = "klingon no"
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    data = module_of(tmp_path / "data", tiny, rewards=Counting(refuses="klingon"))
    data.setup("fit")
    (report,) = data.reports["train"]
    assert {r: t.count for r, t in report.dropped.items() if "no reward" in r} == {
        "the judge gave the response no reward": 1
    }
    Counting.asked.clear()
    again = module_of(tmp_path / "data", tiny, rewards=Counting())
    again.setup("fit")
    assert sum(Counting.asked.values()) == 1
    assert again.reports["train"][0].kept == report.kept + 1
    strict = module_of(tmp_path / "data", tiny, rewards=Counting(refuses=" "), bad_rows="error")
    strict.setup("fit")  # all are known by now
    (tmp_path / "none").mkdir()
    write_jsonl(tmp_path / "none" / "train.jsonl", unscored(scored_rows(5, seed=7)))
    with pytest.raises(DataError, match="gave no response of split train a reward"):
        module_of(tmp_path / "none", tiny, rewards=Counting(refuses=" ")).setup("fit")


def test_relabel_and_score_take_it_on_the_command_line(
    tiny: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    rows = contradicted()
    source = write_jsonl(tmp_path / "train.jsonl", harmless(rows))
    options = ["--rewards", "ImplicitReward", "--rewards.model", runs["full"], "--rewards.base", tiny]
    assert called("relabel", "--source", source, "--output", tmp_path / "out", *options, "--goal.scale.high", 5) == 0
    shown = capsys.readouterr().out
    assert "the rewards agree with" in shown
    assert "contradicts the label" in shown
    (file,) = (tmp_path / "out").glob("train-*.parquet")
    table = pq.read_table(file).to_pylist()
    assert len(table) > len(rows)
    goals = [float(row["goal"]) for row in table]
    assert max(goals) == 5
    assert min(goals) < 1.5
    assert "QuantileScale" in (tmp_path / "out" / "README.md").read_text()
    samples = [{"messages": list(HISTORIES[0]), "response": text} for text in ("red", "blue yes", "far")]
    for judge in (
        ["ImplicitReward", "--judge.model", str(runs["lora"])], ["Likelihood", "--judge.model", str(tiny)]
    ):  # fmt: skip
        output = tmp_path / f"{judge[0]}.jsonl"
        written = write_jsonl(tmp_path / "s.jsonl", samples)
        assert called("score", "--source", str(written), "--output", str(output), "--judge", *judge) == 0
        (row,) = read_jsonl(output)
        assert len({one["overall_score"] for one in row["completions"]}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"streaming": True}, "Score it beforehand"), ({"goal": AttributeGoal(["helpfulness"])}, "gives one reward")],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceDataModule("x", rewards=Counting(), **options)


def test_scales_that_map_are_left_as_they_are_and_ends_are_kept() -> None:
    linear = OverallGoal(LinearScale(judge_low=-3, judge_high=3))
    assert PreferenceDataModule("x", rewards=Counting(), goal=linear).goal.scale == linear.scale
    goal = OverallGoal()
    found = PreferenceDataModule("x", rewards=Counting(), goal=goal).goal
    assert found.scale == QuantileScale(1, 10, 1)
    assert goal.scale != found.scale, "the caller's goal is not changed"
    assert PreferenceDataModule("x", rewards=Function(length_score, [1, 10])).goal.scale == OverallGoal().scale
    assert PreferenceDataModule("x", rewards=Counting(), goal=None).goal is None


def test_models_that_can_give_no_reward_are_refused_in_words(tiny: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="doesn't say what DPO began with"):
        ImplicitReward(str(runs["full"]))
    with pytest.raises(ConfigError, match="every reward would be 0"):
        verdicts(ImplicitReward(str(tiny), str(tiny)))
    other = make_model(tmp_path / "llama", "llama3")
    with pytest.raises(ConfigError, match="another tokenizer"):
        verdicts(ImplicitReward(str(runs["full"]), str(other)))
    for wrong in ({"beta": 0.0}, {"beta": float("nan")}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="ImplicitReward"):
            ImplicitReward(str(tiny), str(tiny), **wrong)
    with pytest.raises(ConfigError, match="max_length"):
        verdicts(Likelihood(str(tiny), max_length=10_000))


def test_what_is_measured_during_fit_has_the_judges_rewards(tiny: Path, tmp_path: Path) -> None:
    """As the training pairs have: data without scores have no others."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{s: r[s] for s in ("chosen", "rejected")} for r in scored_rows(20)])
    module, data = build(tiny, tmp_path / "data", rewards=Function(length_score, [1, 10]))
    probe = LikelihoodProbe(pairs=20, bins=1, every_n_steps=1)
    make_trainer(tmp_path / "run", max_steps=1, callbacks=[probe]).fit(module, data)
    drawn = data.scored_pairs("train", 20, seed=0)
    assert len(drawn) > 10
    for pair in drawn:
        prompt = next(turn["content"] for turn in reversed(pair.history) if turn["role"] == "user")
        assert pair.rewards == tuple(length_score(prompt, text) for text in pair.responses)
