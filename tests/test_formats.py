"""Whatever shape the rows have, the same pairs come out; every response left out is counted."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import pairs_of, scored_rows, write_jsonl
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import RewardScale
from rap_lightning.preferences.selection import AdjacentPairs, AllPairs, BestVsRandom, BestVsWorst
from rap_lightning.preferences.sources import Source, splits_of


def read(path: Path | str, split: str = "train", **options: Any) -> tuple[list[Pair], DataReport]:
    report = DataReport(str(path), split)
    num_proc = options.pop("num_proc", None)
    return list(
        read_pairs(Source(str(path)), split, Rules(**options), report, num_proc=num_proc, progress=False)
    ), report


def facts(pairs: list[Pair]) -> list[Any]:
    return sorted((p.id, p.history, p.responses, p.rewards) for p in pairs) if pairs else []


def plain_rows(count: int = 12) -> list[dict[str, Any]]:
    """Single-turn pairs as plain text."""
    return [
        {
            "prompt": f"question {i}?", "chosen": f"good answer {i}", "rejected": f"bad answer {i}",
            "score_chosen": 5.0 + i % 5, "score_rejected": 1.0 + i % 4,
        }
        for i in range(count)
    ]  # fmt: skip


def as_messages(row: dict[str, Any], whole: bool) -> dict[str, Any]:
    prompt = [{"role": "user", "content": row["prompt"]}]
    sides = {
        side: [*(prompt if whole else []), {"role": "assistant", "content": row[side]}]
        for side in ("chosen", "rejected")
    }
    return {**row, "prompt": row["prompt"] if whole else prompt, **sides}


def test_plain_text_message_lists_and_sharegpt_are_the_same_pairs() -> None:
    plain = plain_rows()
    expected = facts(pairs_of(plain)[0])
    assert len(expected) == 12
    implicit = [{k: v for k, v in as_messages(row, True).items() if k != "prompt"} for row in plain]
    sharegpt = [
        {
            "conversations": [{"from": "human", "value": row["prompt"]}],
            "chosen": {"from": "gpt", "value": row["chosen"]}, "rejected": {"from": "gpt", "value": row["rejected"]},
            "score_chosen": row["score_chosen"], "score_rejected": row["score_rejected"],
        }
        for row in plain
    ]  # fmt: skip
    for rows in ([as_messages(r, True) for r in plain], [as_messages(r, False) for r in plain], implicit, sharegpt):
        assert facts(pairs_of(rows)[0]) == expected


def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = scored_rows(40)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(text))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(text, codec="zstd", asbytes=True))
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_bytes(text)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(str(tmp_path / "saved"))  # datasets 4.0 with an old fsspec takes no Path
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", rows[:15])
    write_jsonl(folder / "train-1.jsonl", rows[15:])
    expected = facts(read(tmp_path / "a.jsonl")[0])
    assert len(expected) == 40
    others = ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "array.json", "lines.json", "a.parquet"]
    for path in [*(tmp_path / name for name in others), arrow, tmp_path / "saved", folder]:
        assert facts(read(path)[0]) == expected, path
    assert splits_of(Source(str(folder))) == ["train"]


def test_places_name_the_file_and_the_line(tmp_path: Path) -> None:
    rows = scored_rows(6)
    rows[4]["chosen"][-1]["content"] = ""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", rows[:3])
    write_jsonl(folder / "train-1.jsonl", rows[3:])
    _, report = read(folder)
    (tally,) = report.dropped.values()
    assert tally.first.startswith("train-1.jsonl line 2, column chosen[1].content")


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_cut_off_file_is_refused(cut: float, tmp_path: Path) -> None:
    rows = scored_rows(300)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    import pyarrow as pa

    packed = {
        "a.jsonl.zst": pa.compress(text, codec="zstd", asbytes=True),
        "a.jsonl.gz": gzip.compress(text),
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    packed["a.jsonl"] = text
    for name, whole in packed.items():
        (tmp_path / name).write_bytes(whole[: int(len(whole) * cut)])
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def completions(scores: list[float], **extra: Any) -> dict[str, Any]:
    listed = [{"response": f"answer {i} at {score}", "overall_score": score} for i, score in enumerate(scores)]
    return {"prompt": f"question {scores}", "completions": listed, **extra}


def test_selections_pair_as_they_say() -> None:
    row = completions([3.0, 9.0, 9.0, 5.0, 1.0])

    def rewards(selection: Any) -> list[tuple[float, float]]:
        return [pair.rewards for pair in pairs_of([row], selection=selection)[0]]

    assert rewards(BestVsWorst()) == [(9.0, 1.0)]
    assert rewards(AdjacentPairs()) == [(9.0, 5.0), (5.0, 3.0), (3.0, 1.0)]
    everything = rewards(AllPairs())
    assert len(everything) == 9, "ten pairs, but the two nines are never paired with each other"
    assert all(win > lose for win, lose in everything)
    assert len(rewards(AllPairs(max_pairs=4))) == 4
    ((win, lose),) = rewards(BestVsRandom())
    assert win == 9.0
    assert lose < 9.0


def test_best_against_random_draws_all_of_the_others_and_depends_on_the_content_alone() -> None:
    rows = [completions([10.0, 2.0, 4.0, 6.0], id=i) | {"prompt": f"question {i}"} for i in range(200)]
    pairs, _ = pairs_of(rows)
    drawn = [pair.rewards[1] for pair in pairs]
    assert all(40 < drawn.count(score) < 95 for score in (2.0, 4.0, 6.0))
    turned = [row | {"completions": row["completions"][::-1]} for row in rows[::-1]]
    assert facts(pairs_of(turned)[0]) == facts(pairs)
    other, _ = pairs_of(rows, selection=BestVsRandom(seed=1))
    assert facts(other) != facts(pairs)


def test_lists_of_responses_and_scores_are_completions() -> None:
    row = completions([2.0, 8.0])
    lists = {"prompt": row["prompt"], "responses": [c["response"] for c in row["completions"]], "scores": [2.0, 8.0]}
    assert facts(pairs_of([lists])[0]) == facts(pairs_of([row])[0])
    _, report = pairs_of([lists, lists | {"scores": [2.0]}])
    assert "two lists of different lengths" in report.dropped


def test_responses_that_cannot_be_used_are_left_out_one_by_one() -> None:
    row = completions([2.0, 8.0, 5.0, float("nan"), 11.0])
    row["completions"][0]["response"] = "\u200b"
    pairs, report = pairs_of([row], outside_scale="drop")
    assert [pair.rewards for pair in pairs] == [(8.0, 5.0)]
    assert sum(tally.count for tally in report.left_out.values()) == 3
    assert {tally.first.split(", ")[1] for tally in report.left_out.values()} == {
        "column completions[0].response", "column completions[3].overall_score", "column completions[4]",
    }  # fmt: skip


def test_ultrafeedback_leaves_out_na_ratings_and_contradictions() -> None:
    def rated(score: float, *ratings: Any) -> dict[str, Any]:
        names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        annotations = {name: {"Rating": rating} for name, rating in zip(names, ratings, strict=True)}
        return {"response": f"{score} {ratings}", "overall_score": score, "annotations": annotations}

    good = [rated(8.0, "4", "5", "4", "5"), rated(3.0, "2", 2, "1", "2")]
    bad = [rated(9.0, "4", "N/A", "4", "5"), rated(10.0, "1", "1", "1", "1")]
    goal = AttributeGoal(["honesty", "helpfulness"], attribute_scale=RewardScale(1, 5))
    pairs, report = pairs_of([{"instruction": "say", "completions": [*bad, *good]}], goal=goal)
    assert [pair.rewards for pair in pairs] == [(8.0, 3.0)]
    assert pairs[0].attributes == ((5.0, 4.0), (2.0, 2.0)), "in the goal's order, not the row's"
    assert sum(tally.count for tally in report.left_out.values()) == 2
    assert goal.text(*goal.goal_of(8.0, (5.0, 4.0))).endswith("Honesty: 5.\nHelpfulness: 4.\nOverall score: 8.")


def test_helpsteer_rows_meet_by_prompt_across_the_edges_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rap_lightning.preferences import readers

    rows = [
        {
            "prompt": f"question {i // 2}", "response": f"answer {i}", "helpfulness": i % 2 * 3, "correctness": 1,
            "coherence": 4, "complexity": 2, "verbosity": i % 2,
        }
        for i in range(40)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "steer.jsonl", rows)
    goal = OverallGoal(RewardScale(0, 4))
    expected, report = read(path, goal=goal)
    assert len(expected) == 20
    assert (report.read, report.kept) == (40, 40)
    assert expected[3].responses == ("answer 7", "answer 6")
    monkeypatch.setattr(readers, "ROWS", 7)
    assert facts(read(path, goal=goal)[0]) == facts(expected)


def test_rows_in_groups_are_read_by_several_processes_and_a_bad_row_splits_no_group(tmp_path: Path) -> None:
    steer = {"correctness": 1, "coherence": 4, "complexity": 2, "verbosity": 1}
    rows: list[Any] = [
        {"prompt": f"question {i // 2}", "response": f"answer {i}", "helpfulness": i % 2 * 3} | steer for i in range(8)
    ]
    rows.insert(1, None)
    path = write_jsonl(tmp_path / "steer.jsonl", rows)
    one, report = read(path, goal=OverallGoal(RewardScale(0, 4)))
    two, same = read(path, goal=OverallGoal(RewardScale(0, 4)), num_proc=2)
    assert [pair.responses for pair in one] == [(f"answer {i + 1}", f"answer {i}") for i in range(0, 8, 2)]
    assert (one, report) == (two, same)
    assert report.dropped["null instead of an object"].first == "steer.jsonl line 2"


def test_ranked_answers_and_spoken_prompts() -> None:
    row = {
        "prompt": "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: who?\n\nAssistant: ",
        "answers": [{"answer": "second", "rank": 2}, {"answer": "third", "rank": 3}, {"answer": "first", "rank": 1}],
    }
    pairs, _ = pairs_of([row], selection=BestVsWorst(), goal=OverallGoal(RewardScale(1, 3)))
    assert pairs[0].responses == ("first", "third")
    assert pairs[0].rewards == (3.0, 1.0)
    assert [turn["role"] for turn in pairs[0].history] == ["user", "assistant", "user"]
    assert pairs[0].history[-1]["content"] == "who?"


def test_an_adapter_is_one_function_named_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows.py").write_text(
        "def adapt(row):\n"
        "    if row['skip']:\n        return None\n"
        "    return {'prompt': row['q'], 'prompt_id': len(row['q']), 'responses': row['a'], 'scores': row['s']}\n"
        "def wrong(row):\n    return row['nothing']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"q": f"q{i}", "a": ["yes", "no"], "s": [2.0, 9.0], "skip": i == 2} for i in range(4)]
    pairs, report = pairs_of(rows, format="my_rows.adapt")
    assert [pair.responses for pair in pairs] == [("no", "yes")] * 3
    assert report.dropped["left out by your adapter"].count == 1
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(Exception, match="your adapter raised KeyError"):
        read(path, format="my_rows.wrong")
    with pytest.raises(ConfigError, match=r"my_rows\.missing can't be imported"):
        read(path, format="my_rows.missing")


def test_columns_are_renamed_and_near_names_are_hinted_at() -> None:
    rows = [{**row, "chosen_score": row["score_chosen"]} for row in plain_rows()]
    for row in rows:
        del row["score_chosen"]
    with pytest.raises(DataError, match=r"Did you mean chosen_score -> score_chosen\?"):
        pairs_of(rows)
    renamed, _ = pairs_of(rows, columns={"chosen_score": "score_chosen"})
    assert facts(renamed) == facts(pairs_of(plain_rows())[0])


def test_unscored_pairs_are_plain_pairs_only() -> None:
    rows = [{k: v for k, v in row.items() if "score" not in k} for row in plain_rows()]
    with pytest.raises(DataError, match="goal null"):
        pairs_of(rows)
    pairs, _ = pairs_of(rows, goal=None, relabelling=Relabelling("none"))
    assert [pair.responses for pair in pairs] == [(row["chosen"], row["rejected"]) for row in rows]


def test_filters_count_what_they_remove(tmp_path: Path) -> None:
    rows = plain_rows(10)
    rows[0] |= {"score_chosen": 5.0, "score_rejected": 4.5}
    rows[1]["chosen"] = "long " * 50
    (tmp_path / "bench.txt").write_text("QUESTION 2\n\nanother\n")
    filters = Filters(min_gap=1.0, max_length_ratio=5.0, exclude=str(tmp_path / "bench.txt"))
    pairs, report = pairs_of(rows, filters=filters)
    assert len(pairs) == 7
    assert {tally.first.split(",")[0] for tally in report.dropped.values()} == {
        "rows row 1", "rows row 2", "rows row 3",
    }  # fmt: skip
    row = completions([1.0, 5.0, 9.0])
    row["completions"][1]["response"] = "the quick brown fox jumps"
    row["completions"][2]["response"] = "The quick brown fox jumps!"
    pairs, report = pairs_of([row], filters=Filters(near_duplicates=0.9), selection=AllPairs())
    assert [pair.rewards for pair in pairs] == [(5.0, 1.0)]
    pairs, report = pairs_of([completions([1.0, 5.0, 9.0])], filters=Filters(max_reward=8.0), selection=AllPairs())
    assert [pair.rewards for pair in pairs] == [(5.0, 1.0)]
    assert sum(tally.count for tally in report.left_out.values()) == 1


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    rows = plain_rows()
    with pytest.raises(ConfigError, match="selection has no effect"):
        pairs_of(rows, selection=BestVsWorst())
    with pytest.raises(ConfigError, match="near_duplicates has no effect"):
        pairs_of(rows, filters=Filters(near_duplicates=0.5))
    with pytest.raises(ConfigError, match="ties chosen has no effect"):
        Rules(relabelling=Relabelling("rejected"), ties="chosen")
    with pytest.raises(ConfigError, match="no effect without a goal"):
        Rules(goal=None, relabelling=Relabelling("none"), ties="chosen")
    with pytest.raises(ConfigError, match="needs a goal"):
        Rules(goal=None)
    with pytest.raises(ConfigError, match="keep_original has no effect"):
        Relabelling("none", keep_original=True)
    with pytest.raises(DataError, match="no such file"):
        Filters(exclude=str(tmp_path / "nowhere.txt"))


def test_a_pair_that_contradicts_an_earlier_one_is_dropped_and_repeats_are_a_choice(tmp_path: Path) -> None:
    rows = plain_rows(8)
    swapped = rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, swapped, rows[4]])
    pairs, report = read(path)
    assert len(pairs) == 9
    (reason,) = report.dropped
    assert "the other way round" in reason
    assert report.dropped[reason].first.startswith("rows.jsonl line 9")
    assert report.noted["a pair that was read before"].count == 1
    pairs, report = read(path, filters=Filters(repeats="drop"))
    assert len(pairs) == 8
    assert report.kept == 8


def test_tool_calls_are_kept_where_the_template_writes_them() -> None:
    from conftest import encode, make_tokenizer

    call = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "quick"}}}
    history = [
        {"role": "user", "content": "A synonym of quick?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rapid"},
    ]
    row = {
        "chosen": [*history, {"role": "assistant", "content": "Rapid."}],
        "rejected": [*history, {"role": "assistant", "content": "Slow."}],
        "tools": json.dumps([{"type": "function", "function": {"name": "lookup", "parameters": {}}}]),
        "score_chosen": 9.0, "score_rejected": 2.0,
    }  # fmt: skip
    assert "chat template" in next(iter(pairs_of([row])[1].dropped)), "without a template they can't be used"
    silent = make_tokenizer("chatml")
    with pytest.raises(DataError, match="tool calls that the chat template does not write"):
        encode(silent, [row])
    speaking = make_tokenizer("chatml")
    speaking.chat_template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        + speaking.chat_template.replace(
            "{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        )
    )
    pairs, _, encoder = encode(speaking, [row])
    text = encoder.tokenizer.decode(pairs.example(1).prompt_ids)
    assert all(part in text for part in ("lookup", "quick", "rapid", "Overall score: 2."))
    assert encoder.tokenizer.decode(pairs.example(1).chosen_ids).startswith("Slow.")


def test_conversations_as_text_and_bare_answers_beside_a_prompt() -> None:
    rows = plain_rows(6)
    expected = facts(pairs_of(rows)[0])
    spoken = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        | {"score_chosen": row["score_chosen"], "score_rejected": row["score_rejected"]}
        for row in rows
    ]
    assert facts(pairs_of(spoken)[0]) == expected
    bare = [row | {s: [{"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")} for row in rows]
    assert facts(pairs_of(bare)[0]) == expected
    numbered = [row | {"prompt_id": i} for i, row in enumerate(rows)]
    assert facts(pairs_of(numbered)[0]) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": "éééééééééééé"} {}', "more than one JSON value"),
        ("[1, 2]", "an array instead of an object"),
        ('{"chosen": NaN', "not JSON"),
    ],
)
def test_odd_lines_end_in_words(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(scored_rows(1)[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2") as caught:
        read(path)
    assert said in str(caught.value)


def test_a_score_of_400_digits_and_a_bom_before_an_array(tmp_path: Path) -> None:
    rows = plain_rows(3)
    text = json.dumps(rows).replace('"score_chosen": 5.0', '"score_chosen": 5' + "0" * 400)
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pairs, report = read(tmp_path / "rows.json")
    assert len(pairs) == 2
    assert report.dropped["not a finite number"].count == 1


def test_columns_that_are_not_there_cannot_be_renamed() -> None:
    with pytest.raises(ConfigError, match="no column 'typo'"):
        pairs_of(plain_rows(), columns={"typo": "score_chosen"})
    with pytest.raises(ConfigError, match="'score_chosen' already"):
        pairs_of([row | {"other": 1.0} for row in plain_rows()], columns={"other": "score_chosen"})


def test_bad_rows_as_an_error_covers_what_shows_across_rows_and_in_encoding(tmp_path: Path) -> None:
    from conftest import encode, make_tokenizer

    rows = plain_rows(8)
    swapped = rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    with pytest.raises(DataError, match=r"line 9.*the other way round"):
        read(write_jsonl(tmp_path / "rows.jsonl", [*rows, swapped]), bad_rows="error")
    odd = [*rows, rows[0] | {"prompt": "a", "chosen": "noncharacter \ufdd0"}]
    assert len(encode(make_tokenizer("chatml"), odd)[0]) == 16
    with pytest.raises(DataError, match="can't be encoded"):
        encode(make_tokenizer("chatml"), odd, bad_rows="error")


def test_what_is_kept_on_disk_is_made_anew_when_code_or_lists_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib
    import sys

    from rap_lightning.preferences.pair_cache import stored_pairs

    source = Source(str(write_jsonl(tmp_path / "rows.jsonl", plain_rows(10))))
    bench = tmp_path / "bench.txt"
    bench.write_text("question 1?\n")
    rules = Rules(filters=Filters(exclude=str(bench)))

    def kept(made: Rules) -> int:
        from rap_lightning.preferences import filters

        filters.excluded.cache_clear()
        return len(stored_pairs(source, "train", made, cache=tmp_path / "cache")[0])

    assert (kept(rules), kept(rules)) == (9, 9)
    bench.write_text("question 1?\nquestion 2?\n")
    assert kept(rules) == 8, "decontamination must not be answered from before"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for number, expected in ((1, 10), (2, 9)):
        (tmp_path / "later_rows.py").write_text(
            f"def adapt(row):\n    return None if {number} == 2 and row['prompt'] == 'question 3?' else row\n"
        )
        sys.modules.pop("later_rows", None)
        importlib.invalidate_caches()
        assert kept(Rules(format="later_rows.adapt")) == expected


def test_a_goals_key_knows_its_attributes_scale() -> None:
    from rap_lightning.preferences.scales import LinearScale

    keys = {
        AttributeGoal(["a"], attribute_scale=LinearScale(judge_low=0, judge_high=high)).describe() for high in (4, 100)
    }
    assert len(keys) == 2


def test_work_that_is_no_longer_wanted_ends(tmp_path: Path) -> None:
    """The window of a pool of processes must not be waited for when nobody takes results."""
    import subprocess
    import sys

    code = (
        "import time\nfrom rap_lightning.preferences.process_pool import map_in_order\n"
        "if __name__ == '__main__':\n"
        "    g = map_in_order(abs, iter(range(1000)), 2); next(g); time.sleep(0.3); g.close(); print('ended')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


def test_a_hub_data_set_is_asked_for_by_its_revision_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is at hand: the datasets library is asked with what the source says, and its answer read."""
    asked: list[Any] = []
    table = datasets.Dataset.from_list(scored_rows(9))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: asked.append((a, k)) or ["train_prefs"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
    source = Source("org/pairs", split="train_prefs", revision="v1", config="clean")
    report = DataReport("org/pairs", "train")
    assert len(list(read_pairs(source, "train", Rules(), report, progress=False))) == 9
    assert ((("org/pairs", "clean"), {"revision": "v1"})) in asked
    expected = {"split": "train_prefs", "streaming": False, "revision": "v1", "name": "clean"}
    assert (("org/pairs",), expected) in asked
    with pytest.raises(ConfigError, match="config has no effect on local files"):
        Source(".", config="clean")
