"""Imports only go down: text, tensors, losses and models, Lightning, commands."""

import ast
from pathlib import Path

from conftest import ROOT

SOURCE = ROOT / "src" / "rap_lightning"


def floors() -> list[set[str]]:
    """The picture in CONTRIBUTING.md, lowest line first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("<!-- the house -->\n```text\n")[1].split("\n```")[0]
    return [set(line.split("  ")[0].split(", ")) for line in reversed(picture.splitlines())]


FLOORS = floors()


def floor_of(name: str) -> int:
    (floor,) = [i for i, names in enumerate(FLOORS) if name in names]
    return floor


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rap_lightning."):
            names.add((node.module or "").split(".")[1])
    return names


def test_no_module_imports_from_a_floor_above() -> None:
    seen = 0
    for path in SOURCE.rglob("*.py"):
        home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        for name in imports(path):
            seen += 1
            assert floor_of(name) <= floor_of(home), f"{path.name} imports {name}, which stands above it"
    assert seen > 30


def test_lower_floors_know_no_lightning() -> None:
    for folder in ("preferences", "batches", "losses", "models"):
        for path in (SOURCE / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import lightning" not in text, path
            assert "from lightning" not in text, path


def test_the_picture_of_the_house_shows_every_room_once() -> None:
    rooms = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if not path.name.startswith(("_", "py.typed"))}
    shown = [name for floor in FLOORS for name in floor]
    assert sorted(shown) == sorted(rooms)
