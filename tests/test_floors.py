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


def floor_of(module: str) -> int:
    """The floor of ``models.policy``: that of its longest prefix in the picture."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        found = [i for i, names in enumerate(FLOORS) if ".".join(parts[:length]) in names]
        if found:
            (floor,) = found
            return floor
    raise AssertionError(f"{module} is not in the picture")


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's own name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rap_lightning."):
            module = (node.module or "").removeprefix("rap_lightning.")
            folder = SOURCE / module.replace(".", "/")
            names |= {f"{module}.{a.name}" if (folder / f"{a.name}.py").is_file() else module for a in node.names}
    return names


def test_no_module_imports_from_a_floor_above() -> None:
    seen = 0
    for path in SOURCE.rglob("*.py"):
        home = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
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
    shown = [name for floor in FLOORS for name in floor if "." not in name]
    assert sorted(shown) == sorted(rooms)
