"""A path that exists is that path and nothing else; what is not read of it is named or refused."""

import bz2
import gzip
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import REAL_DATA, make_tokenizer, pairs_of, scored_rows, write_jsonl
from rap_lightning.cli import main as cli
from rap_lightning.errors import DataError
from rap_lightning.onpolicy.prompt_set import read_prompts
from rap_lightning.onpolicy.scoring import read_prompt_groups
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source, files_of, fingerprint, splits_of

KINDS = ("parquet", "json", "csv", "text", "arrow", "webdataset", "imagefolder", "audiofolder", "xml", "pandas")
ODD = (
    "run[12]", "data [v1]", "*", "?", "{a,b}", "**", "[!a]", "[", "a::b", "zip:::x", "~", "~nobody", "-x", "a#b",
    "a%20b", " lead", "ünï", ".hidden", "..x", "train", "test[1]", "a\\b", "new\nline", "$HOME", "data.jsonl",
)  # fmt: skip
"""Names of folders that something between us and the disk could take for more than a name."""


def read(path: Path | str, split: str = "train") -> tuple[list[str], DataReport]:
    """Return the prompts of a source, and the report."""
    report = DataReport(str(path), split)
    pairs = list(read_pairs(Source(str(path)), split, Rules(), report, progress=False))
    return [str(pair.history[-1]["content"]) for pair in pairs], report


def rows_named(name: str, count: int = 2) -> list[dict[str, Any]]:
    return [{**row, "prompt": f"{name} {i}"} for i, row in enumerate(plain(count))]


def plain(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "score_chosen": 8.0, "score_rejected": 2.0}
        for i in range(count)
    ]


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with other data that must never be read."""
    for other in ("run1", "run2", "a", "b", "old"):
        (tmp_path / other).mkdir()
        write_jsonl(tmp_path / other / "train.jsonl", rows_named("other"))
    as_parquet(tmp_path / "old" / "train.parquet", rows_named("other"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [*KINDS, *ODD])
def test_a_folder_is_read_whatever_its_name(name: str, here: Path) -> None:
    folder = here / name
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows_named("mine"))
    write_jsonl(folder / "test-1.jsonl", rows_named("held out"))
    for path in (name, f"{name}/", f"./{name}", str(folder), f"{folder}/."):
        assert splits_of(Source(path)) == ["train", "test"]
        assert read(path)[0] == ["mine 0", "mine 1"]
        assert read(path, "test")[0] == ["held out 0", "held out 1"]
        assert files_of(Source(path), "train") == [(str(folder / "train.jsonl"), "train.jsonl")]
    assert fingerprint(Source(name), "train") == fingerprint(Source(str(folder)), "train")


@pytest.mark.parametrize("name", [*ODD, "parquet", "json"])
def test_a_file_is_read_whatever_its_name(name: str, here: Path) -> None:
    rows = rows_named("mine")
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_jsonl(here / f"{name}.jsonl", rows)
    (here / f"{name}.jsonl.gz").write_bytes(gzip.compress(text))
    (here / f"{name}.jsonl.bz2").write_bytes(bz2.compress(text))
    as_parquet(here / "made.pq", rows)
    (here / "made.pq").rename(here / f"{name}.parquet")
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".parquet"):
        for path in (f"{name}{suffix}", f"./{name}{suffix}", str(here / f"{name}{suffix}")):
            assert read(path)[0] == ["mine 0", "mine 1"], path


@pytest.mark.parametrize("path", [".", "./", "..", "../", "deeper/..", "./.", "../parquet"])
def test_the_current_folder_and_the_one_above_are_read(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "parquet"
    (home / "deeper").mkdir(parents=True)
    write_jsonl(home / "train.jsonl", rows_named("mine"))
    monkeypatch.chdir(home / "deeper" if path.startswith("..") and path != "../parquet" else home)
    assert read(path)[0] == ["mine 0", "mine 1"]


def test_links_and_home_are_followed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(here / "blob", rows_named("mine"))  # as in the Hub's cache: a name with a suffix, a blob without
    (here / "json").mkdir()
    (here / "json" / "train.jsonl").symlink_to(here / "blob")
    (here / "link[1]").symlink_to(here / "json")
    (here / "json" / "again").symlink_to(here / "json")  # a circle
    monkeypatch.setenv("HOME", str(here))
    for path in ("json", "link[1]", "~/json", "~/link[1]", "json/train.jsonl", "~/json/train.jsonl"):
        assert read(path)[0] == ["mine 0", "mine 1"], path
    (here / "~").mkdir()
    shutil.copy(here / "run1" / "train.jsonl", here / "~" / "train.jsonl")
    assert read("~")[0] == ["other 0", "other 1"], "what exists as it is written comes first"


@pytest.mark.parametrize(
    "others",
    [
        ("train-1.parquet",), ("train-1.csv",), ("part.parquet",), ("part.arrow",), ("train/part.parquet",),
        ("linked/train-1.jsonl",), ("TRAIN-1.JSONL",), ("deep/er/train.jsonl.gz", "deep/er/test.parquet"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["pairs", "pairs[1]"])
def test_a_folder_of_mixed_kinds_is_refused(folder: str, others: tuple[str, ...], here: Path) -> None:
    """Either every file is read, or those that would not be are named."""
    (here / folder).mkdir()
    write_jsonl(here / folder / "train-0.jsonl", rows_named("mine"))
    write_jsonl(here / folder / "train-2.jsonl", rows_named("more"))
    for other in others:
        path = here / ("elsewhere" if other.startswith("linked/") else folder) / other
        path.parent.mkdir(parents=True, exist_ok=True)
        as_parquet(path, rows_named("left out")) if path.suffix == ".parquet" else write_jsonl(path, rows_named("left"))
        if other.startswith("linked/"):
            (here / folder / "linked").symlink_to(path.parent)
    with pytest.raises(DataError) as refused:
        read(folder)
    said = str(refused.value)
    if len(others) == 1:
        assert "would be left out" in said
        assert others[0] in said or "train-0.jsonl" in said
    else:  # datasets says it of whole splits
        assert "same data file format for all splits" in said


def test_other_files_of_a_folder_are_named(here: Path) -> None:
    (here / "pairs" / ".cache").mkdir(parents=True)
    for name in ("train.jsonl", "notes.jsonl", ".train-2.jsonl", ".cache/train-3.jsonl", "README.md", "LICENSE"):
        write_jsonl(here / "pairs" / name, rows_named("mine"))
    (here / "pairs" / "log.txt").write_text("a log")
    (here / "pairs" / ".DS_Store").write_text("")
    with pytest.warns(UserWarning, match="so not read: ") as caught:
        assert read("pairs")[0] == ["mine 0", "mine 1"]
    (said,) = [str(one.message) for one in caught]
    assert said.endswith(": .cache/train-3.jsonl, .train-2.jsonl, log.txt, notes.jsonl")
    (here / "full").mkdir()
    write_jsonl(here / "full" / "train.jsonl", rows_named("mine"))
    (here / "full" / "README.md").write_text("a card")
    (here / "full" / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (here / "full" / "model" / name).write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read("full")


def test_a_card_chooses_the_files_of_a_folder(here: Path) -> None:
    for folder in ("carded", "carded [v1]"):
        (here / folder).mkdir()
        write_jsonl(here / folder / "first.jsonl", rows_named("mine"))
        write_jsonl(here / folder / "train-old.jsonl", rows_named("old"))
        card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: first.jsonl\n---\n"
        (here / folder / "README.md").write_text(card)
        with pytest.warns(UserWarning, match="not read: train-old.jsonl"):
            assert read(folder)[0] == ["mine 0", "mine 1"]


def test_a_glob_of_other_kinds_is_refused_not_guessed(here: Path) -> None:
    (here / "run[12]").mkdir()
    (here / "run[12]" / "train.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(DataError, match=r"run\[12\]: only .parquet, .arrow and .json files"):
        read("run[12]")


def test_prompts_and_answers_to_score_are_read_from_such_folders(here: Path) -> None:
    for name in ("json", "run[12]"):
        (here / name).mkdir()
        write_jsonl(here / name / "train.jsonl", [{"prompt": "mine", "response": "an answer"}])
        assert read_prompts(name).histories == [[{"role": "user", "content": "mine"}]]
        (group,) = read_prompt_groups(name, None, Counter())
        assert group.history == [{"role": "user", "content": "mine"}]


def test_a_folder_of_answers_is_that_folder_though_shards_of_its_name_are_beside_it(here: Path) -> None:
    (here / "answers").mkdir()
    write_jsonl(here / "answers" / "train.jsonl", [{"prompt": "mine", "response": "an answer"}])
    for shard in range(2):
        write_jsonl(here / f"answers-0000{shard}-of-00002", [{"prompt": "other", "response": "an answer"}])
    (group,) = read_prompt_groups("answers", None, Counter())
    assert group.history == [{"role": "user", "content": "mine"}]


CASES = REAL_DATA.parent / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the reported cases are not at {CASES}")
@pytest.mark.parametrize(
    ("case", "source", "count"),
    [
        ("folder-named-like-a-kind", "parquet", 3), ("folder-name-is-a-glob", "run[12]", 2),
        ("source-dot/pairs", ".", 8), ("source-dot/pairs", "./", 8), ("system-column", "system", 8),
        ("mixed-kinds-in-a-folder", "pairs", None),
    ],
)  # fmt: skip
def test_reported_cases(case: str, source: str, count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CASES / case)
    if count is None:
        with pytest.raises(DataError, match=r"would be left out: train-1\.jsonl"):
            read(source)
        return
    pairs = list(read_pairs(Source(source), "train", Rules(), DataReport(source, "train"), progress=False))
    assert len(pairs) == count
    assert case != "system-column" or {pair.history[0]["content"] for pair in pairs} == {"Answer as a pirate."}


# -- columns -----------------------------------------------------------------------------------------------------------

EARLIER = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"}]
PIRATE = {"role": "system", "content": "Answer as a pirate."}


def in_format(name: str, **columns: Any) -> list[dict[str, Any]]:
    user, sides = {"role": "user", "content": "q"}, {"chosen": "good", "rejected": "bad"}
    scores = {"score_chosen": 8.0, "score_rejected": 2.0}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    row: dict[str, Any] = {
        "plain": {"prompt": "q", **sides, **scores},
        "prompt as messages": {"prompt": [user], **answers, **scores},
        "conversations": {**{side: [user, *turns] for side, turns in answers.items()}, **scores},
        "completions": {"prompt": "q", "completions": [
            {"response": "good", "overall_score": 8.0}, {"response": "bad", "overall_score": 2.0}]},
        "lists": {"prompt": "q", "responses": ["good", "bad"], "scores": [8.0, 2.0]},
        "ranked": {"prompt": "q", "answers": [{"answer": "good", "rank": 1}, {"answer": "bad", "rank": 2}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}], **scores, **{
            side: {"from": "gpt", "value": text} for side, text in sides.items()}},
        "ultrafeedback": {"instruction": "q", "completions": [
            {"response": "good", "overall_score": 8.0}, {"response": "bad", "overall_score": 2.0}]},
    }.get(name, {})  # fmt: skip
    if name == "helpsteer":
        return [{"prompt": "q", "response": r, "helpfulness": s, **columns} for r, s in (("good", 4.0), ("bad", 1.0))]
    return [{**row, **columns}]


FORMATS = (
    "plain", "prompt as messages", "conversations", "completions", "lists", "ranked", "sharegpt", "ultrafeedback",
    "helpsteer",
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_context_are_in_the_prompt(name: str, tmp_path: Path) -> None:
    user = {"role": "user", "content": "q"}
    for columns, lead in (
        ({"system": PIRATE["content"]}, [PIRATE]),
        ({"system_prompt": PIRATE["content"]}, [PIRATE]),
        ({"system": PIRATE["content"], "system_prompt": PIRATE["content"], "history": None}, [PIRATE]),
        ({"history": EARLIER}, EARLIER),
        ({"history": [["before", "yes"]], "system": PIRATE["content"]}, [PIRATE, *EARLIER]),
        ({"history": [PIRATE, *EARLIER], "system_prompt": ""}, [PIRATE, *EARLIER]),
        ({"history": [], "system": "  \n"}, []),
    ):
        path = write_jsonl(tmp_path / "rows.jsonl", in_format(name, **columns))
        report = DataReport("", "train")
        (pair,) = read_pairs(Source(str(path)), "train", Rules(), report, progress=False)
        assert list(pair.history) == [*lead, user]
        assert report.unread == set()


def test_context_that_the_conversation_has_is_not_repeated() -> None:
    turns = [PIRATE, *EARLIER, {"role": "user", "content": "q"}]
    row = in_format("prompt as messages")[0] | {"prompt": turns, "system": PIRATE["content"], "history": EARLIER}
    (pair,), _ = pairs_of([row])
    assert list(pair.history) == turns


@pytest.mark.parametrize("columns", [
    {"system": "one", "system_prompt": "other"}, {"system": 3}, {"history": "text"}, {"history": [1, 2]},
    {"history": EARLIER[:1]}, {"history": EARLIER[1:]}, {"history": {"a": 1}}, {"system": "one", "history": [PIRATE]},
])  # fmt: skip
def test_context_that_cannot_be_read_is_counted(columns: dict[str, Any]) -> None:
    pairs, report = pairs_of(in_format("plain", **columns))
    assert not pairs
    ((_, tally),) = (report.dropped | report.faults).items()
    assert tally.count == 1
    assert next(iter(columns)) in tally.first or "system" in tally.first


def test_rows_that_differ_in_the_system_column_alone_are_different_prompts(tmp_path: Path) -> None:
    rows = [{**plain(1)[0], "system": system} for system in ("one", "other")]
    report = DataReport("", "train")
    found = list(read_pairs(Source(str(write_jsonl(tmp_path / "a.jsonl", rows))), "train", Rules(), report))
    assert [pair.history[0]["content"] for pair in found] == ["one", "other"]
    path = write_jsonl(tmp_path / "h.jsonl", [r for s in ("one", "other") for r in in_format("helpsteer", system=s)])
    assert len(list(read_pairs(Source(str(path)), "train", Rules(), DataReport("", "train")))) == 2
    histories = read_prompts(str(tmp_path / "a.jsonl")).histories
    assert [history[0] for history in histories] == [{"role": "system", "content": s} for s in ("one", "other")]


@pytest.mark.parametrize("name", FORMATS)
def test_columns_that_are_not_read_are_named_once(name: str) -> None:
    rows = [*in_format(name, source="x", lang="en"), *in_format(name, source="x", **{"odd\x1b": 1})]
    _, report = pairs_of(rows)
    assert report.unread == {"source", "lang", "odd\x1b"}
    lines = [line for line in report.lines() if "not read" in line]
    assert lines == ["  note: columns that are not read: lang, odd\\x1b, source"]
    assert DataReport.from_dict(report.as_dict()).unread == report.unread


def test_inspect_shows_the_system_text_and_names_other_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "json").mkdir()
    rows = [{**row, "system": PIRATE["content"], "lang": "en"} for row in scored_rows(4)]
    write_jsonl(tmp_path / "json" / "train.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    cli.main(["inspect", "--source", "json", "--tokenizer", "tokenizer"])
    said = capsys.readouterr().out
    assert PIRATE["content"] in " ".join(said.split())
    assert said.count("columns that are not read: lang") == 1
