"""Sources behind a URL: the same pairs as of local files, copied once, and again when they change."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from conftest import called, run_command, scored_rows, write_jsonl
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences import remote
from rap_lightning.preferences.sources import Source, fingerprint, splits_of
from test_formats import facts, read


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty file system in memory, and an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    remote._copied.cache_clear()
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()
    remote._copied.cache_clear()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_file_and_a_folder_are_the_pairs_of_their_local_copies(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = scored_rows(5, seed=seed)
        write_jsonl(tmp_path / "local" / f"{split}.jsonl", rows)
        bucket.pipe(f"/data/pairs/{split}.jsonl", jsonl(rows))
    url = "memory://data/pairs"
    assert sorted(splits_of(Source(url))) == ["test", "train"]
    for split in ("train", "test"):
        assert facts(read(url, split)[0]) == facts(read(tmp_path / "local", split)[0])
    pairs, report = read(f"{url}/test.jsonl")
    assert facts(pairs) == facts(read(tmp_path / "local", "test")[0])
    assert report.source == f"{url}/test.jsonl"
    assert pairs[0].place == "test.jsonl line 1"


def test_a_file_is_copied_once_and_again_when_it_changes(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = remote._copy
    monkeypatch.setattr(remote, "_copy", lambda *args: (copies.append(args[1]), copy(*args)))
    url = "memory://data/a.jsonl"
    bucket.pipe("/data/a.jsonl", jsonl(scored_rows(3)))
    before = fingerprint(Source(url), "train")
    remote._copied.cache_clear()  # as another process
    assert fingerprint(Source(url), "train") == before
    assert len(copies) == 1
    bucket.pipe("/data/a.jsonl", jsonl(scored_rows(3, seed=1)))  # of the same size or not: what the server says decides
    remote._copied.cache_clear()
    assert fingerprint(Source(url), "train") != before
    assert len(copies) == 2


def test_a_damaged_file_is_not_called_absent(bucket: Any) -> None:
    bucket.pipe("/data/train.csv", b"prompt,chosen,rejected\n\xff,a,b\n")
    with pytest.raises(DataError, match=r"memory://data can't be read: .*codec can't decode"):
        read("memory://data")


def test_a_copy_that_fails_leaves_nothing(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe("/data/train.jsonl", jsonl(scored_rows(3)))

    def cut(*_: Any) -> None:
        raise ConnectionResetError("cut")

    monkeypatch.setattr(type(bucket), "get_file", cut)
    with pytest.raises(DataError, match=r"memory://data can't be read: ConnectionResetError: 'cut'.*environment"):
        splits_of(Source("memory://data"))
    assert [path.name for path in (tmp_path / "cache" / "rap_lightning" / "remote").iterdir() if path.is_dir()] == []


def test_what_is_not_there_and_who_can_not_read_it_are_named(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="memory://data/none: no such file or folder"):
        read("memory://data/none")
    bucket.pipe("/data/a.txt", b"text")
    with pytest.raises(DataError, match="expected a file ending in"):
        read("memory://data/a.txt")
    with pytest.raises(ConfigError, match="Protocol not known"):
        read("nowhere://data/a.jsonl")

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        with pytest.raises(ConfigError, match=f"{scheme}:// needs {package}.*pip install {package}"):
            read(f"{scheme}://data/a.jsonl")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("s3://b/a.jsonl", {"key": "AKIA", "secret": "x"}, "storage_options key, secret would be written"),
        ("s3://b/a.jsonl", {"client_kwargs": {"aws_secret_access_key": "x"}}, "client_kwargs.aws_secret_access_key"),
        ("gs://b/a.jsonl", {"token": "x"}, "storage_options token"),
        ("s3://key:secret@b/a.jsonl", None, r"s3://\*\*\*: a key in a URL"),
        ("https://host/a.jsonl?X-Amz-Signature=12", None, "https:// is not read; download the file"),
        ("file:///tmp/a.jsonl", None, "give the path alone"),
        ("org/name", {"anon": True}, "no effect without a URL"),
    ],
)
def test_keys_and_other_schemes_are_refused(path: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Source(path, storage_options=options)
    assert "AKIA" not in str(caught.value)


def test_options_reach_the_file_system(monkeypatch: pytest.MonkeyPatch, bucket: Any) -> None:
    given = []
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda path, **more: (given.append(more), (bucket, "/data"))[1])
    bucket.pipe("/data/train.jsonl", jsonl(scored_rows(3)))
    assert splits_of(Source("s3://data", storage_options={"endpoint_url": "http://localhost:1"})) == ["train"]
    assert given == [{"endpoint_url": "http://localhost:1"}]


def test_commands_read_them(bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.pipe("/data/train.jsonl", jsonl(scored_rows(4)))
    run_command("relabel", "--source", "memory://data", "--output", tmp_path / "out")
    assert "train: 4 rows read" in (tmp_path / "out" / "README.md").read_text()
    assert called("inspect", "--source", "memory://data/other") == 1
    assert "no such file or folder" in capsys.readouterr().err
