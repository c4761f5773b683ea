"""Finished rows survive whatever ends the process."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.jsonl_ledger import Ledger, meta_path, parts_of, read_rows, shard_path

ROWS = [{"id": f"r{i}", "text": "blå " * i + "\n\u2028"} for i in range(4)]


def filled(path: Path, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> None:
    with Ledger(path, settings) as ledger:
        ledger.append(rows)


def test_a_file_cut_off_at_any_byte_loses_only_the_line_that_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    filled(path)
    whole = path.read_bytes()
    ends = [0] + [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Ledger(path, {}) as ledger:
            kept = sum(end <= size for end in ends[1:]) + ((size + 1) in ends[1:])  # all but the newline is there
            assert ledger.done == {f"r{i}" for i in range(kept)}, size
            ledger.append([row for row in ROWS if row["id"] not in ledger.done])
        assert list(read_rows([path])) == ROWS, size
    assert "the last line was cut off" in capsys.readouterr().out


def test_other_settings_do_not_go_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    filled(path, temperature=1.0, model={"path": "a"})
    with (
        pytest.raises(ConfigError, match=r"temperature: 1\.0 there, 0\.5 now"),
        Ledger(path, {"temperature": 0.5, "model": {"path": "a"}}),
    ):
        pass
    assert list(read_rows([path])) == ROWS
    meta_path(path).unlink()
    with pytest.raises(ConfigError, match="no record beside it"), Ledger(path, {}):
        pass


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from rap_lightning.onpolicy.jsonl_ledger import Ledger\n"
        "with Ledger(Path(sys.argv[1]), {}): pass"
    )
    with Ledger(path, {}):
        run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "is being written by another process" in run.stderr
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def test_shards_of_any_number_know_what_the_others_have_done(tmp_path: Path) -> None:
    base = tmp_path / "rows [1].jsonl"
    for shard, row in enumerate(ROWS[:2]):
        with Ledger(base, {"a": 1}, shard=shard, shards=2) as ledger:
            ledger.append([row])
    torn = shard_path(base, 1, 2)
    with torn.open("ab") as file:
        file.write(b'{"id": "half')  # the other process is writing it
    with Ledger(base, {"a": 1}, shard=2, shards=3) as ledger:
        assert ledger.done == {"r0", "r1"}
        ledger.append([ROWS[2]])
    assert [part.name for part in parts_of(base)] == [
        "rows [1]-00000-of-00002.jsonl", "rows [1]-00001-of-00002.jsonl", "rows [1]-00002-of-00003.jsonl"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a: 1 there, 2 now"), Ledger(base, {"a": 2}):
        pass


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    filled(path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:-4], *lines[2:]]))
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: not JSON"), Ledger(path, {}):
        pass
    path.write_text("\n".join([lines[0], lines[0], ""]))
    with pytest.raises(DataError, match="the row r0 twice"), Ledger(path, {}):
        pass
    path.write_text(json.dumps({"no": "id"}) + "\n")
    with pytest.raises(DataError, match="without an id"), Ledger(path, {}):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        target = tmp_path / "file" / "rows.jsonl"
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="can't be written"), Ledger(target, {}):
        pass


def _open_together(path: Path, settings: list[dict[str, Any]], shards: int) -> list[str]:
    """What becomes of shards that begin at the same moment: "" where one could, else its error."""
    barrier, found = threading.Barrier(shards), [""] * shards
    done = threading.Barrier(shards)

    def begin(shard: int) -> None:
        ledger = Ledger(path, settings[shard], shard=shard, shards=shards)
        barrier.wait()
        try:
            with ledger:
                done.wait(10)
        except ConfigError as error:
            found[shard] = str(error)
            done.abort()
        except threading.BrokenBarrierError:
            pass

    threads = [threading.Thread(target=begin, args=(shard,)) for shard in range(shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_shards_that_begin_at_the_same_moment_do_not_refuse_each_other(tmp_path: Path) -> None:
    for attempt in range(60):
        assert _open_together(tmp_path / f"{attempt}.jsonl", [{"t": 1}] * 3, 3) == [""] * 3


def test_of_shards_that_begin_at_once_with_other_settings_one_is_refused_and_leaves_no_record(tmp_path: Path) -> None:
    for attempt in range(60):
        path = tmp_path / f"{attempt}.jsonl"
        found = _open_together(path, [{"t": 1}, {"t": 2}], 2)
        assert any("was made with other settings" in text for text in found), attempt
        for shard, text in enumerate(found):
            assert meta_path(shard_path(path, shard, 2)).is_file() is not bool(text)
