"""Whatever the data: the swap, where pairs come from, ties, the exact prefix, the goal that survives, one result by any
road."""

import json
import math
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import FAMILIES, encode, make_tokenizer, pairs_of, write_jsonl
from rap_lightning.batches.dataset import PairEncoder
from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.stream import StepShape, StreamedPairs
from rap_lightning.errors import DataError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.relabelling import ORIGINS, RelabelledView, Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale
from rap_lightning.preferences.sources import Source

TOKENIZERS = {family: make_tokenizer(family) for family in FAMILIES}
GOAL = OverallGoal()

# texts with blanks, control tokens of all families, other scripts, template syntax and goals in them
PIECES = [
    "apple", "Overall score: 10.", "<|im_end|>", "<|eot_id|>", "<bos>", "{{ x }}", "{% if %}", "日本語", "é", "e\u0301",
    "\n", "\n\n", " ", "\t", "🙂", "<|im_start|>system\nscore 10", "assistant", "0", "</think>", "[INST]", "\u2028",
]  # fmt: skip
text = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(lambda t: t.strip() != "")
half_points = st.integers(2, 20).map(lambda n: n / 2)
fine_points = st.floats(1, 10).map(lambda x: round(x, 2))


@st.composite
def rows(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> list[dict[str, Any]]:
    made = []
    for i in range(draw(st.integers(min_size, max_size))):
        turns = [{"role": "user", "content": f"{i} " + draw(text)}]
        if draw(st.booleans()):
            turns.insert(0, {"role": "system", "content": draw(text)})
        if draw(st.booleans()):
            turns += [{"role": "assistant", "content": draw(text)}, {"role": "user", "content": draw(text)}]
        score = draw(st.sampled_from([half_points, fine_points]))
        made.append(
            {
                "chosen": [*turns, {"role": "assistant", "content": draw(text)}],
                "rejected": [*turns, {"role": "assistant", "content": draw(text)}],
                "score_chosen": draw(score), "score_rejected": draw(score),
            }
        )  # fmt: skip
    return made


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(rows())
def test_relabelling_swaps_and_every_half_can_be_traced(data: list[dict[str, Any]]) -> None:
    before = json.dumps(data)
    pairs, report = pairs_of(data)
    view = RelabelledView(pairs, GOAL)
    assert len(view) == 2 * len(pairs)
    assert report.read == len(data) == len(pairs) + sum(tally.count for tally in report.dropped.values())
    by_place = {f"rows row {i}": row for i, row in enumerate(data, 1)}
    for i, pair in enumerate(pairs):
        row, (high, low) = by_place[pair.place], (view[2 * i], view[2 * i + 1])
        scored = [(row["score_chosen"], row["chosen"]), (row["score_rejected"], row["rejected"])]
        (top, win), (bottom, lose) = sorted(scored, key=lambda pair: -pair[0])
        assert (high.rewards, low.rewards) == ((top, bottom), (bottom, top))
        assert (high.chosen, high.rejected) == (win[-1]["content"], lose[-1]["content"])
        assert (low.chosen, low.rejected) == (high.rejected, high.chosen)
        assert (high.goal, low.goal) == (GOAL.scale.printed(top), GOAL.scale.printed(bottom))
        assert high.goal != low.goal, "goals that print the same must never make two halves"
    assert json.dumps(data) == before


@relaxed
@given(rows(), st.sampled_from(["both", "chosen", "rejected", "none", "half"]), st.booleans())
def test_modes_make_what_they_say(data: list[dict[str, Any]], mode: Any, keep: bool) -> None:
    if mode == "none" and keep:
        return
    made = Relabelling(mode, keep_original=keep)
    pairs, _ = pairs_of(data, relabelling=made)
    full, _ = pairs_of(data)
    if mode == "half":
        assert {p.id for p in pairs} == {p.id for p in full if made.takes(p.history)}
    else:
        assert [p.id for p in pairs] == [p.id for p in full]
    wanted = {
        "both": {"chosen-goal", "rejected-goal"}, "half": {"chosen-goal", "rejected-goal"},
        "chosen": {"chosen-goal"}, "rejected": {"rejected-goal"}, "none": {"unconditioned"},
    }[mode] | ({"unconditioned"} if keep else set())  # fmt: skip
    found = Counter(half.origin for half in RelabelledView(pairs, GOAL, made))
    assert found == {origin: len(pairs) for origin in wanted if pairs}
    for half in RelabelledView(pairs, GOAL, made):
        assert (half.goal_text is None) == (half.origin == "unconditioned")


def test_half_takes_about_half_and_the_same_half_every_time() -> None:
    histories = [[{"role": "user", "content": f"question {i}"}] for i in range(2000)]
    taken = [Relabelling("half").takes(history) for history in histories]
    assert 900 < sum(taken) < 1100
    assert taken == [Relabelling("half").takes(history) for history in histories]
    assert taken != [Relabelling("half", seed=1).takes(history) for history in histories]


@relaxed
@given(rows())
def test_ties_keep_their_chosen_half_only_where_that_is_asked(data: list[dict[str, Any]]) -> None:
    dropped, report = pairs_of(data)
    ties = sum(tally.count for reason, tally in report.dropped.items() if reason.startswith("tie"))
    kept, _ = pairs_of(data, ties="chosen")
    assert len(kept) == len(dropped) + ties
    ordered = sorted(kept, key=lambda pair: pair.tie)
    view = RelabelledView(ordered, GOAL, Relabelling(keep_original=True))
    assert len(view) == 3 * len(dropped) + 2 * ties
    goals: dict[str, list[str | None]] = {}
    for half in view:
        goals.setdefault(half.pair_id, []).append(half.goal)
    assert all(len(set(named)) == len(named) for named in goals.values())


@relaxed
@given(st.sampled_from(list(FAMILIES)), rows(), st.integers(110, 400))
def test_the_prompt_is_an_exact_prefix_and_the_goal_survives(
    family: str, data: list[dict[str, Any]], max_length: int
) -> None:
    tokenizer = TOKENIZERS[family]
    pairs, _ = pairs_of(data)
    encoder = Encoder(tokenizer, GOAL, max_length)
    encoded = PairEncoder(encoder, Relabelling())(pairs)
    control = set(encoder.special.values())
    whole_rows = PairEncoder(Encoder(tokenizer, GOAL, 10**6), Relabelling())(pairs)
    for pair, row, whole_row in zip(pairs, encoded, whole_rows, strict=True):
        if row["dropped"]:
            continue
        for half, prompt in enumerate(row["prompt_ids"]):
            said = tokenizer.decode(prompt)
            assert GOAL.text(pair.rewards[half]) in said, "the goal must survive truncation"
            assert len(prompt) < max_length
            if tokenizer.bos_token_id is not None:
                assert prompt.count(tokenizer.bos_token_id) == 1
            if row["cut_prompt"] or any(encoder.imitates(t["content"]) for t in pair.history):
                continue
            for answer, ids in zip(pair.responses, row["response_ids"], strict=True):
                if encoder.imitates(answer):
                    continue
                goal_text = GOAL.text(pair.rewards[half])
                turns = encoder.render_prompt(pair.history, goal_text).messages
                whole = tokenizer.apply_chat_template(
                    [*turns, {"role": "assistant", "content": answer}], tokenize=True, return_dict=False
                )
                if not row["repaired"]:
                    assert prompt + ids == whole
        for ids, uncut in zip(row["response_ids"], whole_row["response_ids"], strict=True):
            assert sum(token in control for token in uncut) == 1, "text must never become a control token"
            assert ids == uncut[: len(ids)]


def training_pairs(encoded: Any) -> Counter[Any]:
    examples = (encoded.example(i) for i in range(len(encoded)))
    return Counter((e.pair_id, e.origin, tuple(e.prompt_ids), tuple(e.chosen_ids)) for e in examples)


def streamed(path: Path, tokenizer: Any, relabelling: Relabelling, **options: Any) -> list[Any]:
    from torch.utils.data import DataLoader

    rules = Rules(GOAL, relabelling, tool_turns=True)
    encoder = PairEncoder(Encoder(tokenizer, GOAL, 512), relabelling)
    workers, start = options.pop("workers", 0), options.pop("start", 0)
    shape = StepShape(**({"batch_size": 3, "accumulate": 2} | options))
    stream = StreamedPairs([Source(str(path))], "train", rules, encoder, shape, buffer=16, seed=5)
    stream.start = start
    return list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda item: item))


def flat(batches: list[Any]) -> Counter[Any]:
    return Counter(
        (e.pair_id, e.origin, tuple(e.prompt_ids), tuple(e.chosen_ids))
        for plan, examples in batches
        for e, weight in zip(examples, plan.weights, strict=True)
        if weight
    )


def many_rows(count: int = 60) -> list[dict[str, Any]]:
    from conftest import scored_rows

    made = scored_rows(count)
    made[7]["score_rejected"] = made[7]["score_chosen"]
    made[9]["chosen"][-1]["content"] = ""
    return made


def test_view_written_and_streamed_are_the_same_training_pairs(tmp_path: Path) -> None:
    from datasets import load_dataset

    from rap_lightning.commands.relabel import relabel

    data, tokenizer = many_rows(), TOKENIZERS["chatml"]
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    relabelling = Relabelling(keep_original=True)
    viewed, _, _ = encode(tokenizer, data, relabelling=relabelling)
    assert len(viewed) == 3 * 58
    expected = training_pairs(viewed)
    assert flat(streamed(path, tokenizer, relabelling)) == expected
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    relabel(str(path), str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer"), keep_original=True)
    written = load_dataset(str(tmp_path / "out"), split="train")
    found: Counter[Any] = Counter()
    for row in written:
        ask = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **ask)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], **ask)
        origin = ORIGINS.index(row["origin"])
        found[(row["pair_id"], origin, tuple(prompt), tuple(whole[len(prompt) :]))] += 1
    assert found == expected


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_the_stream(workers: int, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_rows())
    alone = streamed(path, TOKENIZERS["chatml"], Relabelling())
    assert streamed(path, TOKENIZERS["chatml"], Relabelling(), workers=workers) == alone
    assert len({plan.step_pairs for plan, _ in alone}) == 2, "the last step is shorter, and says so"


def test_a_resumed_stream_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_rows())
    whole = streamed(path, TOKENIZERS["chatml"], Relabelling())
    for start in (1, 7, len(whole) - 1):
        assert streamed(path, TOKENIZERS["chatml"], Relabelling(), start=start) == whole[start:]
    assert streamed(path, TOKENIZERS["chatml"], Relabelling(), start=4, workers=2) == whole[4:]


def test_ranks_share_a_stream_without_loss_or_repetition(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_rows(53))
    tokenizer = TOKENIZERS["chatml"]
    alone = flat(streamed(path, tokenizer, Relabelling(), batch_size=3, accumulate=2))
    ranks = [streamed(path, tokenizer, Relabelling(), batch_size=1, num_replicas=3, rank=r) for r in range(3)]
    assert sum(map(flat, ranks), Counter()) == alone
    assert len({len(batches) for batches in ranks}) == 1, "every rank runs every batch"


def test_processes_and_the_order_of_rows_do_not_change_the_pairs(tmp_path: Path) -> None:
    data = many_rows(2300)
    data[2100] = data[3]
    path = write_jsonl(tmp_path / "rows.jsonl", data)

    def read(source: Path, num_proc: int | None) -> tuple[list[Any], DataReport]:
        report = DataReport("", "train")
        pairs = read_pairs(Source(str(source)), "train", Rules(), report, num_proc=num_proc, progress=False)
        return list(pairs), report

    (one, report), (four, same) = read(path, None), read(path, 4)
    assert one == four
    assert report == same
    turned = write_jsonl(tmp_path / "turned.jsonl", data[::-1])
    other, _ = read(turned, None)
    assert Counter(p.id for p in other) == Counter(p.id for p in one)
    first, _, _ = encode(TOKENIZERS["chatml"], data[:300])
    second, _, _ = encode(TOKENIZERS["chatml"], data[:300], num_proc=2)
    assert [first.example(i) for i in range(len(first))] == [second.example(i) for i in range(len(second))]


@relaxed
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=40).filter(lambda r: max(r) - min(r) > 1e-6))
def test_fitted_scales_keep_the_order_and_stay_within_their_ends(rewards: list[float]) -> None:
    for scale in (LinearScale(decimals=3), QuantileScale(decimals=3)):
        assert scale.needs_fit
        scale.fit(rewards)
        assert not scale.needs_fit
        goals = [scale.goal(reward) for reward in sorted(rewards)]
        assert all(a <= b + 1e-9 for a, b in pairwise(goals))
        assert all(1 <= goal <= 10 for goal in goals)
        assert scale.goal(1e6) == 10
        assert scale.goal(-1e6) == 1
        again = type(scale)(**scale.numbers())
        assert [again.goal(reward) for reward in rewards] == [scale.goal(reward) for reward in rewards]


def test_a_quantile_scale_states_ranks() -> None:
    scale = QuantileScale(knots=[float(i * i) for i in range(11)])
    assert math.isclose(scale.goal(25.0), 5.5)
    assert math.isclose(scale.goal(30.5), 1 + 9 * 0.55)
    crowded = QuantileScale()
    crowded.fit([1.0] * 90 + [2.0] * 10)
    assert 5 < crowded.goal(1.0) < 5.6, "a value that many share stands in the middle of their quantiles"
    assert RewardScale().goal(7.25) == 7.25


def test_a_stream_leaves_out_what_it_cannot_encode_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = many_rows(20)
    data[3]["chosen"][-1]["content"] = "noncharacter \ufdd0"
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    found = flat(streamed(path, TOKENIZERS["chatml"], Relabelling()))
    assert sum(found.values()) == 2 * 17
    assert "noncharacter" in caplog.text
    assert "dropped 1: tie" in caplog.text, "what reading leaves out is said as well"
    data[5]["score_chosen"] = "high"
    write_jsonl(path, data)
    with pytest.raises(DataError, match="line 6"):
        streamed(path, TOKENIZERS["chatml"], Relabelling())


def test_a_stream_counts_what_it_cuts_even_if_it_is_left_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = many_rows(20)
    data[0]["rejected"][-1]["content"] = "plum " * 600
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    rules, encoder = Rules(tool_turns=True), PairEncoder(Encoder(TOKENIZERS["chatml"], GOAL, 512), Relabelling())
    stream = StreamedPairs([Source(str(path))], "train", rules, encoder, StepShape(2), buffer=1, seed=0)
    batches = iter(stream)
    next(batches)
    batches.close()
    assert "truncated 2: end of the rejected response cut" in caplog.text, "under both of its goals"


def test_weights_draw_by_content_and_seed() -> None:
    from rap_lightning.preferences.source_mix import copies, stream_mixed

    with tempfile.TemporaryDirectory() as folder:
        a = write_jsonl(Path(folder) / "a.jsonl", many_rows(200))
        b = write_jsonl(Path(folder) / "b.jsonl", [row | {"score_chosen": 10.0} for row in many_rows(80)])
        sources = [Source(str(a), weight=0.5), Source(str(b), weight=2.25)]
        pairs = list(stream_mixed(sources, "train", Rules(), DataReport("", ""), seed=3))
    by_file = Counter(pair.place.split()[0] for pair in pairs)
    assert 75 < by_file["a.jsonl"] < 125
    assert 2 * 78 < by_file["b.jsonl"] < 2 * 78 + 40
    assert [copies(f"{i}", 0.5, 3) for i in range(50)] == [copies(f"{i}", 0.5, 3) for i in range(50)]
    assert {copies("x", 3.0, seed) for seed in range(20)} == {3}
    assert replace(sources[0], weight=1.0).weight == 1.0
