"""A run small enough to be trained several times."""

import copy

import pytest

from tests.idefics_jax.training import small_run


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "digits"
    small_run.build_data(folder)
    return folder


@pytest.fixture(scope="session")
def small_values(data_folder):
    """The settings of a small run, as a plain nested dict."""
    return small_run.settings(data_folder)


@pytest.fixture
def values(small_values):
    return copy.deepcopy(small_values)
