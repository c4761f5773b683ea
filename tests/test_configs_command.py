"""The configs that come with the package, listed and written."""

from pathlib import Path

import pytest

from conftest import ROOT, called
from rap_lightning.commands.configs import refuse_absent

CONFIGS = [path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")]


def test_the_list_names_each_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("configs") == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert sorted(name for name, _ in lines) == sorted(CONFIGS)
    assert [name for name, sentence in lines if not sentence.endswith(".")] == []
    assert dict(lines)["loss/mpo.yaml"].startswith("An overlay: MPO (Wang et al. 2024), a mixture")


def test_written_twice_they_stay_and_what_was_changed_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "configs"
    assert called("configs", "--output", folder) == 0
    assert called("configs", "--output", folder) == 0
    assert f"wrote {len(CONFIGS)} configs" in capsys.readouterr().out
    mine = folder / "quickstart.yaml"
    mine.write_text("mine\n")
    (folder / "plain-dpo.yaml").unlink()
    assert called("configs", "--output", folder) == 2
    assert "quickstart.yaml exists with other content than the shipped" in capsys.readouterr().err
    assert mine.read_text() == "mine\n"
    assert not (folder / "plain-dpo.yaml").exists(), "refused before anything is written"


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert called("configs", "--output", tmp_path / "file") == 2
    assert "Name" in capsys.readouterr().err


@pytest.mark.parametrize("named", [["--config=configs/rounds/world.yaml"], ["-c", "quickstart.yaml"]])
def test_a_shipped_config_that_is_not_here_says_how_to_get_it(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called("rounds", *named) == 2
    assert "'rap-lightning configs --output configs' copies all of them" in capsys.readouterr().err
    (tmp_path / "quickstart.yaml").write_text("")
    refuse_absent(["fit", "-c", "quickstart.yaml", "--config", "mine.yaml", "-c"])  # one's own are the parser's to read
