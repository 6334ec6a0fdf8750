import json
import struct

import numpy as np
import pytest

from idefics_jax.convert.hf_folder import SINGLE, write_hf_folder
from idefics_jax.convert.inspect import describe
from idefics_jax.convert.orbax import save_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.paths import flatten
from tests.idefics_jax import tiny

TOTAL = sum(np.size(leaf) for leaf in flatten(tiny.raw_params()).values())


@pytest.mark.parametrize("form", ["hf", "model", "workdir"])
def test_table_gives_every_tensor_and_the_total(tmp_path, form):
    if form == "hf":
        write_hf_folder(
            tmp_path / "x", tiny.raw_params(), tiny.CONFIG, None, generation_config=None, shard_bytes=10_000
        )
        row = ["model.text_model.layers.1.mlp.up_proj.weight", "(24, 16)", "float32", "384"]
    else:
        save_model(tmp_path / ("x" if form == "model" else "x/model"), tiny.raw_params(), tiny.CONFIG, None)
        row = ["text_model/layers/mlp/up_proj/kernel", "(2, 16, 24)", "float32", "768"]
    table = describe(tmp_path / "x")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert row in cells
    assert f"Total: {TOTAL:,} -- {4 * TOTAL:,} bytes" in table


def test_weights_are_not_read(tmp_path):
    """A sparse file of 256 GiB is described at once; reading it would not fit in memory."""
    count = 2**36
    entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    header = json.dumps({"model.text_model.norm.weight": entry}).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    assert f"Total: {count:,}" in describe(tmp_path)


def test_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        describe(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        describe(tmp_path / "nowhere")
