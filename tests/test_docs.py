"""Doctests of the package."""

import doctest
import importlib
import pkgutil

import pytest

import distill
from distill import losses

MODULES = ["distill", *(module.name for module in pkgutil.walk_packages(distill.__path__, "distill."))]
SHOWN = ("distill.losses.divergences", "distill.losses.labels", "distill.losses.reduce", "distill.models.model")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_correct(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0  # doctest prints expected and actual output
    assert outcome.attempted or name not in SHOWN


@pytest.mark.parametrize("name", losses.__all__)
def test_every_public_loss_has_an_example(name):
    assert doctest.DocTestFinder().find(getattr(losses, name), name)[0].examples
