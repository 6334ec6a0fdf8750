"""A run small enough to be trained several times: the embedded data at a small size, a model of width 16."""

import copy

import pytest

from configs import digits as digits_config
from data_pipelines import digits

COUNTS = {"pairs": 40, "interleaved": 20, "conversations": 40, "numbers": 40, "warmup": 40, "heldout": 20}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "digits"
    digits.build(folder, seed=0, counts=COUNTS)
    return folder


@pytest.fixture(scope="session")
def small_values(data_folder):
    """The demo's settings on the small data, with a small model and AdamW, as a plain nested dict."""
    config = digits_config.get_config()
    values = config.to_dict()
    values["processor"] = str(data_folder / "processor")
    values["steps"], values["log_every"], values["checkpoint_every"] = 8, 2, 4
    for stage in values["data"]["stages"].values():
        for name, source in stage["sources"].items():
            source["paths"] = (str(data_folder / f"{name}.parquet"),)
            source["image_root"] = source["image_root"] and str(data_folder)
    values["data"]["stages"]["stage1"]["documents"] = 30
    values["data"]["shape"]["rows"] = 4
    values["data"]["virtual_shards"], values["data"]["lookahead"] = 2, 8
    for section in values["model"].values():
        section["hidden_size"] = 16
    values["model"]["perceiver_config"]["resampler_depth"] = 1
    values["optimizer"]["name"] = "adamw"
    values["optimizer"]["warmup_steps"] = 2
    return values


@pytest.fixture
def values(small_values):
    return copy.deepcopy(small_values)
