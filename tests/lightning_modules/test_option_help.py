"""Every option that the project itself defines says what it is when asked: `fit --help`, `fit --model.help UniAD`."""

import pytest
from jsonargparse import ArgumentParser

from datamodules import UnifiedDataModule
from lightning_modules.running.methods import import_methods
from lightning_modules.running.serving import CacheConfig
from lightning_modules.running.settings import RunConfig

OWN = {"run": RunConfig, "cache": CacheConfig, "data": UnifiedDataModule}
METHODS = import_methods()
EMPTY = ("", "_EMPTY_HELP_")
"""What stands where an option has no text; the second in jsonargparse before 4.47."""


def silent_options(kind):
    """Options of a class, those it hands on included, without a text of their own."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it")
    return [
        action.dest.removeprefix("it.")
        for action in parser._actions
        if action.dest.startswith("it.") and not action.dest.endswith(".help") and (action.help or "").strip() in EMPTY
    ]


@pytest.mark.parametrize("name", OWN)
def test_options_of_run_cache_and_data(name):
    assert silent_options(OWN[name]) == []


@pytest.mark.parametrize("method", sorted(METHODS))
def test_options_of_a_method(method):
    assert silent_options(METHODS[method]) == []
    assert METHODS[method].__doc__, "what it is and where it is from"
