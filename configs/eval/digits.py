"""Questions about handwritten digits that no training document shows.

python -m idefics_jax.evaluate --checkpoint work/digits --config configs/eval/digits.py
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = {
        "name": "heldout",
        "kind": "cauldron",
        "paths": ("work/digits-data/heldout.parquet",),
    }
    config.metric = "exact_match"
    config.rows = 60
    config.max_new_tokens = 16
    config.limit = placeholder(int)  # all of them
    config.dtype = "float32"
    config.seed = 0
    return config
