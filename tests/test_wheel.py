"""What a user gets: the wheel, built from the sdist without network, its contents, and its use far from a checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(kind: str, source: Path, output: Path) -> Path:
    """Build with the backend that pyproject.toml names, as ``python -m build`` does."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "configs", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    (tree / "src" / "rap_lightning" / "notes.txt").write_text("a stray file\n")
    return build("sdist", tree, folder)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_wheel_holds_the_code_and_the_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2] for name in packed.namelist()} - {""}
        for path in (ROOT / "configs").rglob("*.yaml"):
            assert packed.read(f"rap_lightning/{path.relative_to(ROOT)}") == path.read_bytes()
    code = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    configs = {f"rap_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert found == code | configs | {"rap_lightning/py.typed", "rap_lightning/reporting/page.html.jinja"}
    assert info == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def test_the_sdist_holds_no_tests_and_no_data(sdist: Path) -> None:
    with tarfile.open(sdist) as packed:
        names = [member.name.partition("/")[2] for member in packed.getmembers() if not member.isdir()]
    outside = {name for name in names if not name.startswith("src/")}
    assert outside == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}


def test_the_metadata_say_what_an_installer_and_a_reader_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith("METADATA")]
        told = message_from_bytes(packed.read(name))
        (entry,) = [name for name in packed.namelist() if name.endswith("entry_points.txt")]
        assert "rap-lightning = rap_lightning.cli.main:main" in packed.read(entry).decode()
    assert (told["Name"], told["Version"]) == ("rap-lightning", PACKAGE["version"])
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == PACKAGE["requires-python"]
    assert told["Description-Content-Type"] == "text/markdown"
    needed = [line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == len(PACKAGE["dependencies"])


def test_far_from_a_checkout_the_configs_of_the_readme_are_a_command_away(wheel: Path, tmp_path: Path) -> None:
    site, place = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    place.mkdir()

    def called(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rap_lightning.cli.main", *args],
            cwd=place, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    absent = called("fit", "--config", "configs/quickstart.yaml", "-c=configs/loss/simpo.yaml")
    assert absent.returncode == 2
    assert "configs/quickstart.yaml: no such file" in absent.stderr
    (command,) = re.findall(r"'rap-lightning (.+?)'", absent.stderr)
    written = called(*command.split())
    assert written.returncode == 0, written.stderr
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert (place / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    code = "import rap_lightning; print(rap_lightning.__file__)"
    used = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
        check=True, cwd=place,
    )  # fmt: skip
    assert Path(used.stdout.strip()).is_relative_to(site), "the checkout's package was tested, not the wheel's"


def lower_bounds() -> dict[str, str]:
    """Dependency and its lowest version, as pyproject.toml has them."""
    found = [re.match(r"([\w-]+)[^>]*>=([\d.]+)", line) for line in PACKAGE["dependencies"]]
    return {match[1]: match[2] for match in found if match}


def test_every_dependency_has_a_lower_bound_and_the_table_of_versions_tried_states_it() -> None:
    bounds = lower_bounds()
    assert len(bounds) == len(PACKAGE["dependencies"])
    rows = re.findall(r"^\| (\w+) \| ([\d.]+)", (ROOT / "docs" / "versions.md").read_text(encoding="utf-8"), re.M)
    tried = {name: version for name, version in rows if name in bounds}
    padded = {name: tuple(map(int, (bound + ".0.0").split(".")[:3])) for name, bound in bounds.items()}
    assert {name: tuple(map(int, (version + ".0.0").split(".")[:3])) for name, version in tried.items()} == padded
