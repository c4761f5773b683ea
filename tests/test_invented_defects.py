"""Small files with one defect each: a counted row or one message, and never an exception of a library."""

import bz2
import gzip
import io
import json
import re
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rap_lightning.errors import UserError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source, splits_of

Row = dict[str, Any]


def rows() -> list[Row]:
    """Four good rows; defects are put into the third."""
    return [
        {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "score_chosen": 8.0,
         "score_rejected": 3.0}
        for n in range(4)
    ]  # fmt: skip


def talk(*turns: tuple[str, Any], **more: Any) -> list[Row]:
    return [{"role": role, "content": content, **more} for role, content in turns]


def third(**changes: Any) -> bytes:
    """JSON lines with values of the third row exchanged."""
    made = rows()
    made[2] |= changes
    return lines(made)


def every(**changes: Any) -> bytes:
    return lines([row | changes for row in rows()])


def lines(made: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def raw(third_line: bytes) -> bytes:
    made = lines(rows()).splitlines(keepends=True)
    return b"".join([*made[:2], third_line + b"\n", made[3]])


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def with_column(name: str, values: pa.Array) -> bytes:
    table = pa.Table.from_pylist(rows())
    return parquet(table.set_column(table.column_names.index(name), name, values))


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return sink.getvalue()


def conversations(chosen: Any, rejected: Any) -> bytes:
    """Every row as conversations, the third with these."""
    made = [
        row | {side: talk(("user", row["prompt"]), ("assistant", row[side])) for side in ("chosen", "rejected")}
        for row in rows()
    ]
    made[2] |= {"chosen": chosen, "rejected": rejected}
    return lines(made)


THIRD = lines(rows()).splitlines()[2]
USER = ("user", "question 2")
GOOD, BAD = talk(USER, ("assistant", "good 2")), talk(USER, ("assistant", "bad 2"))
GONE, ROW = "one row dropped", "one row dropped or refused"
DEFECTS: dict[str, tuple[str, bytes, str]] = {
    # numbers
    "score is true": ("a.jsonl", third(score_chosen=True), ROW),
    "score is a list of one": ("a.jsonl", third(score_chosen=[8.0]), ROW),
    "score is a date": ("a.jsonl", third(score_chosen="2024-08-08"), ROW),
    "score has a unit": ("a.jsonl", third(score_chosen="8 points"), ROW),
    "score is a percentage": ("a.jsonl", third(score_chosen="80%"), ROW),
    "score is hexadecimal": ("a.jsonl", third(score_chosen="0x8"), ROW),
    "score has an underscore": ("a.jsonl", third(score_chosen="1_0"), ROW),
    "score is in Arabic digits": ("a.jsonl", third(score_chosen="٨"), ROW),
    "score is a fraction": ("a.jsonl", third(score_chosen="8/10"), ROW),
    "score is 1e400": ("a.jsonl", raw(THIRD.replace(b"8.0", b"1e400")), GONE),
    "score is a number of 5000 digits": ("a.jsonl", raw(THIRD.replace(b"8.0", b"9" * 5000)), ROW),
    "scores are exchanged in one row": ("a.jsonl", third(score_chosen=3.0, score_rejected=8.0), "a note or none"),
    "one score is None as text": ("a.jsonl", third(score_rejected="None"), ROW),
    "both scores are null": ("a.jsonl", third(score_chosen=None, score_rejected=None), GONE),
    "score is a decimal of Parquet": (
        "a.parquet",
        with_column("score_chosen", pa.array([Decimal(n) for n in (8, 7, 6, 5)], pa.decimal128(5, 1))),
        "none",
    ),
    "score is a timestamp of Parquet": (
        "a.parquet",
        with_column("score_chosen", pa.array([1, 2, 3, 4], pa.timestamp("s"))),
        "refused",
    ),
    "score is an Arrow dictionary": (
        "a.parquet",
        with_column("score_chosen", pa.array(["8", "7", "6", "5"]).dictionary_encode()),
        "none or refused",
    ),
    "score is float16": (
        "a.parquet",
        with_column("score_chosen", pa.array([8.0, 7.0, 6.0, 5.0], pa.float32()).cast(pa.float16())),
        "none",
    ),
    # texts
    "response is a number": ("a.jsonl", third(chosen=7), ROW),
    "response is a dict of text": ("a.jsonl", third(chosen={"text": "good"}), ROW),
    "response is bytes in Parquet": ("a.parquet", with_column("chosen", pa.array([b"a", b"\xff"] * 2)), "refused"),
    "response is a list of bytes": (
        "a.parquet",
        with_column("chosen", pa.array([[b"a"]] * 4)),
        "refused",
    ),
    "responses are only punctuation marks of zero width": ("a.jsonl", third(chosen="\u2060\ufeff"), GONE),
    "response is one noncharacter": ("a.jsonl", third(chosen="\ufffe"), "none"),
    "prompt is a nested list": ("a.jsonl", third(prompt=[[["question"]]]), ROW),
    "prompt is false": ("a.jsonl", third(prompt=False), GONE),
    "prompt and response are the same": ("a.jsonl", third(chosen="question 2"), "none"),
    "large strings of Arrow": (
        "a.parquet",
        with_column("chosen", pa.array([f"good {n}" for n in range(4)], pa.large_string())),
        "none",
    ),
    # conversations
    "a turn is null": ("a.jsonl", conversations([*GOOD[:1], None, *GOOD[1:]], BAD), GONE),
    "a turn is a text": ("a.jsonl", conversations(["question 2", "good 2"], BAD), ROW),
    "a turn is a list": ("a.jsonl", conversations([["user", "question 2"], ["assistant", "good 2"]], BAD), ROW),
    "roles have blanks": ("a.jsonl", conversations(talk(("user ", "question 2"), ("assistant", "x")), BAD), GONE),
    "content is a list of nulls": ("a.jsonl", conversations(talk(USER, ("assistant", [None])), BAD), GONE),
    "content is an image": (
        "a.jsonl",
        conversations(talk(USER, ("assistant", [{"type": "image", "url": "x.png"}])), BAD),
        GONE,
    ),
    "the last turn is the user's": ("a.jsonl", conversations(talk(USER), BAD), GONE),
    "two assistant turns at the end": ("a.jsonl", conversations([*GOOD, *talk(("assistant", "more"))], BAD), GONE),
    "a system turn only": ("a.jsonl", conversations(talk(("system", "be kind")), talk(("system", "be kind"))), GONE),
    "the questions differ": ("a.jsonl", conversations(talk(("user", "other"), ("assistant", "good")), BAD), GONE),
    "a developer's role": ("a.jsonl", conversations(talk(("developer", "x"), USER, ("assistant", "y")), BAD), GONE),
    "messages in a text of Python": ("a.jsonl", third(chosen="[{'role': 'assistant', 'content': 'x'}]"), "none"),
    # files
    "a zip of JSON lines": ("a.zip", zipped(lines(rows())), "refused"),
    "a zip named .jsonl": ("a.jsonl", zipped(lines(rows())), "refused"),
    "gzip named .jsonl": ("a.jsonl", gzip.compress(lines(rows())), "refused"),
    "JSON lines named .gz": ("a.jsonl.gz", lines(rows()), "refused"),
    "bzip2 that is cut off": ("a.jsonl.bz2", bz2.compress(lines(rows()) * 50)[:-9], "refused"),
    "JSON named .parquet": ("a.parquet", lines(rows()), "refused"),
    "a page of HTML": ("a.jsonl", b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n", "refused"),
    "a pointer of git LFS": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "refused",
    ),
    "JSON of one text": ("a.json", b'"rows"', "refused"),
    "JSON of one number": ("a.json", b"7", "refused"),
    "JSON with a field of rows": ("a.json", json.dumps({"data": rows()}).encode(), "refused or read"),
    "JSON of columns": ("a.json", b'{"prompt": ["a", "b"], "chosen": ["c", "d"]}', "refused or read"),
    "a key twice in an array": ("a.json", b'[{"prompt": 1, "prompt": 2}]', "refused"),
    "concatenated JSON without line ends": ("a.jsonl", lines(rows()).replace(b"\n", b""), "refused"),
    "single quotes": ("a.jsonl", raw(str(rows()[2]).encode()), ROW),
    "NaN as a row": ("a.jsonl", raw(b"NaN"), ROW),
    "a NUL byte between rows": ("a.jsonl", raw(b"\x00"), ROW),
    "a byte-order mark in the middle": ("a.jsonl", raw(b"\xef\xbb\xbf" + THIRD), ROW),
    "a key twice": ("a.jsonl", raw(THIRD[:-1] + b', "prompt": "other"}'), GONE),
    "a row of columns in capitals": ("a.jsonl", raw(re.sub(rb'"(\w+)":', lambda m: m[0].upper(), THIRD)), GONE),
    "Parquet without rows": ("a.parquet", parquet(pa.Table.from_pylist(rows()).slice(0, 0)), "refused"),
    "Parquet without columns": ("a.parquet", parquet(pa.table({})), "refused"),
    "Parquet with a column twice": (
        "a.parquet",
        parquet(pa.Table.from_pylist(rows()).append_column("chosen", pa.array(["other"] * 4))),
        "refused",
    ),
    "a header alone": ("a.csv", b"prompt,chosen,rejected,score_chosen,score_rejected\n", "refused"),
    "CSV with a missing cell": (
        "a.csv",
        b"prompt,chosen,rejected,score_chosen,score_rejected\nq0,g0,b0,8,3\nq1,g1,b1,8,3\nq2,g2,b2,8\nq3,g3,b3,8,3\n",
        "one row dropped or refused",
    ),
    "CSV with a cell too many": (
        "a.csv",
        b"prompt,chosen,rejected,score_chosen,score_rejected\nq0,g0,b0,8,3\nq1,g1,b1,8,3\nq2,g2,b2,8,3,9\nq3,g3,b3,8,3\n",
        "one row dropped or refused",
    ),
    "CSV with semicolons": (
        "a.csv",
        b"prompt;chosen;rejected;score_chosen;score_rejected\nq0;g0;b0;8;3\n",
        "refused",
    ),
}  # fmt: skip


def found(path: Path) -> tuple[str, list[Pair], list[str]]:
    """What becomes of a file: a word for it, the pairs, and what is said."""
    report = DataReport(str(path), "train")
    rules = Rules(OverallGoal(), Relabelling("both"), tool_turns=True)
    try:
        splits_of(Source(str(path)))
        pairs = list(read_pairs(Source(str(path)), "train", rules, report, progress=False))
    except UserError as error:
        return "refused", [], str(error).splitlines()
    said = [line for line in list(report.lines())[1:] if "not read" not in line]
    gone = report.read - report.kept
    return "one row dropped" if gone == 1 and report.dropped else "read" if gone == 0 else f"{gone} gone", pairs, said


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_a_counted_row_or_one_message(defect: str, tmp_path: Path) -> None:
    name, content, expected = DEFECTS[defect]
    path = tmp_path / "rows" / name
    path.parent.mkdir()
    path.write_bytes(content)
    source = path.parent if path.suffix == ".csv" else path  # CSV is read in folders
    where = source.name
    word, pairs, said = found(source)
    allowed = expected.replace("a note or none", "read").replace("none", "read").split(" or ")
    assert word in allowed, said
    if word == "refused":
        assert len([line for line in said if not line.startswith("  ")]) <= 3
        assert where in " ".join(said)
        assert expected != ROW or "line 3" in " ".join(said) or path.suffix == ".csv"
    elif word == GONE:
        assert len(pairs) == 3
        assert len(said) == 1
        assert re.search(rf"{where}( \(train\))? (line|row) 3", said[0])
    else:
        assert len(pairs) == 4
