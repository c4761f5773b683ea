"""Imports only go down: text, tensors, losses and models, Lightning, commands."""

import ast
from pathlib import Path

from conftest import ROOT

SOURCE = ROOT / "src" / "rap_lightning"


def layers() -> list[set[str]]:
    """Return the modules of each line of the picture in CONTRIBUTING.md, the lowest first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("<!-- layers -->\n```text\n")[1].split("\n```")[0]
    return [set(line.split("  ")[0].split(", ")) for line in reversed(picture.splitlines())]


LAYERS = layers()


def layer_of(module: str) -> int:
    """Return the layer of ``models.policy``: that of its longest prefix in the picture."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        found = [i for i, names in enumerate(LAYERS) if ".".join(parts[:length]) in names]
        if found:
            (layer,) = found
            return layer
    raise AssertionError(f"{module} is not in the picture")


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rap_lightning."):
            module = (node.module or "").removeprefix("rap_lightning.")
            folder = SOURCE / module.replace(".", "/")
            names |= {f"{module}.{a.name}" if (folder / f"{a.name}.py").is_file() else module for a in node.names}
    return names


def test_no_module_imports_from_a_higher_layer() -> None:
    seen = 0
    for path in SOURCE.rglob("*.py"):
        home = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if home == "__init__":
            continue
        for name in imports(path):
            seen += 1
            assert layer_of(name) <= layer_of(home), f"{path.name} imports {name}, which is in a higher layer"
    assert seen > 30


def test_lower_layers_do_not_import_lightning() -> None:
    for folder in ("preferences", "batches", "losses", "models"):
        for path in (SOURCE / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import lightning" not in text, path
            assert "from lightning" not in text, path


def test_the_picture_has_every_module_once() -> None:
    modules = {
        path.name.removesuffix(".py") for path in SOURCE.iterdir() if not path.name.startswith(("_", "py.typed"))
    }
    shown = [name for layer in LAYERS for name in layer if "." not in name]
    assert sorted(shown) == sorted(modules)
