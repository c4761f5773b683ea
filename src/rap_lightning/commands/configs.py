"""``rap-lightning configs``: the configs that come with the package, to look at, to copy and to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rap_lightning.cli.error_messages import configs_named
from rap_lightning.errors import ConfigError

FOLDER = Path(__file__).resolve().parent.parent / "configs"
"""In a checkout a link to its configs/, in a wheel their copies."""


def run(args: list[str]) -> int:
    """Parse, and list or copy."""
    from rap_lightning.commands.options import run as run_function

    run_function(configs, args, "configs")
    return 0


def configs(output: str | None = None) -> None:
    """List the configs that come with rap-lightning, or write them where you can use and change them.

    What the documentation calls configs/quickstart.yaml is then there.

    Example: rap-lightning configs --output configs
             rap-lightning fit --config configs/quickstart.yaml

    Args:
        output: a folder to write them to, made where there is none. A file that is there already with other content
            is never overwritten. By default they are listed.
    """
    names = shipped()
    if output is None:
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {summary((FOLDER / name).read_text(encoding='utf-8'))}")
        print("\nrap-lightning configs --output configs  writes them to configs/, to be used and changed.")
        return
    folder = Path(output)
    changed = [name for name in names if _differs(folder / name, (FOLDER / name).read_bytes())]
    if changed:
        raise ConfigError(
            f"--output {output}: {folder / changed[0]} is not the file that comes with rap-lightning"
            + (f", nor are {len(changed) - 1} others" if len(changed) > 1 else "")
            + ", and nothing is overwritten. Name another folder, or move yours away."
        )
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((FOLDER / name).read_bytes())
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be written to: {error.strerror}. Name a folder.") from error
    print(f"wrote {len(names)} configs to {folder}/: rap-lightning fit --config {folder / 'quickstart.yaml'}")


def shipped() -> list[str]:
    """The shipped configs, by their paths under configs/: those that stand alone first, then the folders'."""
    names = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def summary(config: str) -> str:
    """The first sentence of what a config says of itself, below the command it opens with.

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
    """Say how to get a shipped config that a command line names as the documentation does, where it isn't there.

    Raises:
        ConfigError: one is named and absent.
    """
    for path in configs_named(args):
        if path.endswith(".yaml") and path.removeprefix("configs/") in shipped() and not Path(path).exists():
            raise ConfigError(
                f"--config {path}: no such file in {Path.cwd()}. It comes with rap-lightning: "
                f"'rap-lightning configs --output configs' writes it and the others to configs/."
            )


def _differs(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() != content
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"--output: {path} can't be read: {error.strerror}. Name another folder.") from error
