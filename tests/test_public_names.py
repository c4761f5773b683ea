"""The names that users import: documented, argument by argument, with examples that are true."""

import doctest
import inspect
from importlib import import_module

import pytest

import rap_lightning

NEED_A_MODEL = {
    "AdapterAsLoaded", "AdaptersOff", "Frozen", "GoalGuidance", "NoReference", "PreferenceDataModule",
    "PreferenceModule", "Stored", "Synchronised",
}  # fmt: skip
"""Shown by configs in README and docs, which tests run: an example of one line would be none."""
ALL_SAID_BY_ARGS = {"Source"}


@pytest.mark.parametrize("home", sorted(set(rap_lightning._HOMES.values())))
def test_examples_in_docstrings_are_true(home: str) -> None:
    module = import_module(f"rap_lightning.{home}")
    homes = {
        module,
        *(inspect.getmodule(getattr(rap_lightning, n)) for n, h in rap_lightning._HOMES.items() if h == home),
    }
    for one in homes:
        assert doctest.testmod(one).failed == 0


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
