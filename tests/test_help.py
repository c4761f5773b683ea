"""Every command's help, read as a newcomer: what it does, an example that works, each option with its words."""

import re
import shlex
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import called
from rap_lightning.cli.main import HELP
from rap_lightning.commands import COMMANDS, TRAINER_COMMANDS
from rap_lightning.commands.completion import parsers_of

OWN = [name for name in COMMANDS if name not in TRAINER_COMMANDS]


@pytest.fixture(scope="module")
def parsers() -> dict[str, list[Any]]:
    made = {name: list(parsers_of(name)) for name in COMMANDS}
    made["plan"] = made["plan"][:1]  # the rest is fit's
    return made


def actions(parser: Any) -> Iterator[Any]:
    yield from (action for action in parser._actions if action.help != "==SUPPRESS==")


def test_the_first_page_names_every_command_and_an_example_of_each() -> None:
    for name in COMMANDS:
        assert re.search(rf"^  {name}\b", HELP, re.MULTILINE), name
        assert name in ("validate", "test") or f"rap-lightning {name}" in HELP
    assert max(map(len, HELP.splitlines())) <= 115


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_with_an_example_that_parses(name: str, parsers: dict[str, list[Any]]) -> None:
    for parser in parsers[name]:
        description = parser.description
        first = description.strip().split("\n\n")[0]
        assert first.rstrip()[-1] in ".:" or "..." in first, f"{name}: {first!r} is no sentence"
        assert "Example: rap-lightning " in description or name == "completion", name
        known = {option for one in parsers[name] for option in one._option_string_actions}
        known |= (
            {option for one in parsers["fit"] for option in one._option_string_actions} if name == "plan" else set()
        )
        example = description.split("Example:")[1].split("\n\n")[0]
        flags = re.findall(r"(--[\w.]+)", example)
        for flag in flags:
            assert flag in known or flag.rpartition(".")[0] in known, f"{name}: {flag} of the example is no option"
        if name not in ("report", "completion"):
            needed = [action.option_strings[0] for action in actions(parser) if action.required]
            commands = [line for line in example.splitlines() if "rap-lightning" in line]
            assert "--config" in flags or set(needed) <= set(flags), f"{name}: the example lacks what is needed"
            assert all(shlex.split(line) for line in commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_ours_is_explained(name: str, parsers: dict[str, list[Any]]) -> None:
    for parser in parsers[name]:
        for action in actions(parser):
            if not action.option_strings[:1] or action.dest.endswith(".help"):
                continue
            assert (action.help or "").strip(), f"{name}: {action.option_strings[0]} has no help"


@pytest.mark.parametrize("name", OWN)
def test_usage_is_what_is_needed_and_no_more(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(name, "--help") == 0
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert usage.startswith(f"usage: rap-lightning {name}")
    assert len(usage.splitlines()) <= 4


def test_fits_help_begins_with_what_to_type_and_ends_with_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("fit", "--help") == 0
    shown = capsys.readouterr().out
    head = shown.split("\n\noptions:")[0]
    assert len(head.splitlines()) < 30, "on one screen"
    for part in (
        "usage: rap-lightning fit --config",
        "Example: ",
        "--print_config",
        "--model.loss.help NAME",
        "Ctrl-C",
    ):
        assert part in head
    titles = re.findall(r"^(\w[\w.]*): .*:$", shown, re.MULTILINE)
    assert titles[0] == "model"
    assert titles[-1] == "trainer", "what is ours comes before Lightning's"
    assert "<class '" not in shown
    assert "newest undamaged one" in " ".join(shown.split()), "not Lightning's words, which are of another last"


def test_an_option_means_the_same_in_every_command(parsers: dict[str, list[Any]]) -> None:
    """One type for an option's name, whether or not it may be left out; or a reason why not."""
    found: dict[str, dict[str, set[str]]] = {}
    for name in OWN:
        for parser in parsers[name]:
            for action in actions(parser):
                if action.dest in ("help", "config", "print_config") or action.dest.endswith(".help"):
                    continue
                kind = action.type if hasattr(action, "type") and action.type else getattr(action, "_typehint", str)
                union = typing.get_origin(kind) is not typing.Literal
                parts = [part for part in typing.get_args(kind) if part is not type(None)] if union else []
                parts = parts or [kind]
                text = " | ".join(sorted(getattr(part, "__name__", str(part)) for part in parts))
                found.setdefault(action.dest, {}).setdefault(text, set()).add(name)
    several = {dest: kinds for dest, kinds in found.items() if len(kinds) > 1}
    assert set(several) == set(SEVERAL), {dest: several[dest] for dest in set(several) ^ set(SEVERAL)}


SEVERAL = {
    "goal": "where data are relabelled, how goals read (data.goal of fit); where a model answers, the goal itself "
    "(data.predict.goal)",
    "parts": "of the evaluation; of the prompts, in rounds",
    "source": "score reads one file of what was generated",
}


@pytest.mark.parametrize("name", OWN)
def test_help_is_readable_on_a_narrow_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert called(name, "--help") == 0
    shown = capsys.readouterr().out
    copied = "rap-lightning"  # a command is copied whole
    long = [line for line in shown.splitlines() if len(line) > 60 and copied not in line and " " in line.strip()]
    assert not long, long
