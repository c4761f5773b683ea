"""The names that users import: documented, argument by argument, with examples that are true."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import rap_lightning
from conftest import ROOT

NEED_A_MODEL = {
    "AdapterAsLoaded", "AdaptersOff", "Frozen", "GoalGuidance", "NoReference", "PreferenceDataModule",
    "PreferenceModule", "Stored", "Synchronised",
}  # fmt: skip
"""Shown by configs in README and docs, which tests run: an example of one line would be none."""
ALL_SAID_BY_ARGS = {"Source"}


SOURCE = ROOT / "src"
WITH_EXAMPLES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_are_true(path: Path) -> None:
    found = doctest.testmod(import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts)))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", sorted(set(rap_lightning.__all__) - NEED_A_MODEL - ALL_SAID_BY_ARGS))
def test_every_public_name_has_an_example(name: str) -> None:
    public = getattr(rap_lightning, name)
    assert any(test.examples for test in doctest.DocTestFinder(recurse=False).find(public, name))


@pytest.mark.parametrize("name", sorted(rap_lightning.__all__))
def test_every_argument_is_explained(name: str) -> None:
    public = getattr(rap_lightning, name)
    explained = "\n".join(inspect.getdoc(one) or "" for one in (public, *getattr(public, "__mro__", ())))
    for argument in inspect.signature(public).parameters:
        assert f"\n    {argument}: " in explained or f"``{argument}``" in explained, f"{name}: {argument}"


def test_all_lists_what_there_is() -> None:
    assert sorted(rap_lightning.__all__) == sorted(rap_lightning._HOMES)
