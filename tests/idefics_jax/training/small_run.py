"""The settings of a run that trains in seconds: the demo's on little data, with a model of width 16 and AdamW."""

from pathlib import Path
from typing import Any

from configs import digits as digits_config
from data_pipelines import digits

COUNTS = {"pairs": 40, "interleaved": 20, "conversations": 40, "numbers": 40, "warmup": 40, "heldout": 20}


def build_data(folder: Path) -> None:
    digits.build(folder, seed=0, counts=COUNTS)


def settings(data: Path) -> dict[str, Any]:
    """Returns the settings of a run on the data in a folder, as a plain nested dict."""
    values = digits_config.get_config().to_dict()
    values["processor"] = str(data / "processor")
    values["steps"], values["log_every"], values["checkpoint_every"] = 8, 2, 4
    for stage in values["data"]["stages"].values():
        for name, source in stage["sources"].items():
            source["paths"] = (str(data / f"{name}.parquet"),)
            source["image_root"] = source["image_root"] and str(data)
    values["data"]["stages"]["stage1"]["documents"] = 30
    values["data"]["shape"]["rows"] = 4
    values["data"]["virtual_shards"], values["data"]["lookahead"] = 2, 8
    for section in values["model"].values():
        section["hidden_size"] = 16
    values["model"]["perceiver_config"]["resampler_depth"] = 1
    values["optimizer"]["name"] = "adamw"
    values["optimizer"]["warmup_steps"] = 2
    return values


def config_file(values: dict[str, Any], folder: Path) -> Path:
    """Writes settings as a config file."""
    path = folder / "small.py"
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    return path
