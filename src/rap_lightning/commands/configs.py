"""``rap-lightning configs``: list or copy the configs that are shipped with the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rap_lightning.cli.config_files import configs_named
from rap_lightning.errors import ConfigError

FOLDER = Path(__file__).resolve().parent.parent / "configs"
"""A link to configs/ in a checkout, a copy in a wheel."""


def configs(output: str | None = None) -> None:
    """List the shipped configs, or copy them to a folder.

    The documentation refers to them as configs/quickstart.yaml and so on.

    Example: rap-lightning configs --output configs
             rap-lightning fit --config configs/quickstart.yaml

    Args:
        output: folder to write them to, created if needed. Existing files with other content are never overwritten.
            By default the configs are listed.
    """
    names = shipped()
    if output is None:
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {summary((FOLDER / name).read_text(encoding='utf-8'))}")
        print("\nrap-lightning configs --output configs  copies them to configs/.")
        return
    folder = Path(output)
    changed = [name for name in names if _differs(folder / name, (FOLDER / name).read_bytes())]
    if changed:
        raise ConfigError(
            f"--output {output}: {folder / changed[0]} exists with other content than the shipped config"
            + (f", and so do {len(changed) - 1} others" if len(changed) > 1 else "")
            + "; nothing was overwritten. Name another folder, or move your files."
        )
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((FOLDER / name).read_bytes())
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written to: {error.strerror}. Name a folder.") from error
    print(f"wrote {len(names)} configs to {folder}/: rap-lightning fit --config {folder / 'quickstart.yaml'}")


def shipped() -> list[str]:
    """Paths of the shipped configs under configs/: complete configs first, then the overlays in its folders."""
    names = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def summary(config: str) -> str:
    """The first sentence of a config's description, which follows the command in its first line.

    >>> summary("# rap-lightning fit\\n#\\n# An overlay: SimPO.\\n# No reference is loaded.\\n\\nmodel:")
    'An overlay: SimPO.'
    """
    lines = []
    for line in config.splitlines()[2:]:
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    return re.split(r"(?<=\.)(?<! al\.)\s", " ".join(lines), maxsplit=1)[0]


def refuse_absent(args: Sequence[str]) -> None:
    """Raise ConfigError where a command line names a shipped config that does not exist here; say how to copy it."""
    for path in configs_named(args):
        if path.endswith(".yaml") and path.removeprefix("configs/") in shipped() and not Path(path).exists():
            raise ConfigError(
                f"--config {path}: no such file in {Path.cwd()}. It is shipped with rap-lightning: "
                f"'rap-lightning configs --output configs' copies all of them to configs/."
            )


def _differs(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() != content
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"--output: {path} can't be read: {error.strerror}. Name another folder.") from error
