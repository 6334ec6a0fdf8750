import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

import idefics_jax
from idefics_jax import interop, sharding
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import from_hf
from idefics_jax.convert.hf_folder import HfFolder
from idefics_jax.convert.orbax import save_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.paths import flatten
from idefics_jax.param_tree import param_shardings
from tests.idefics_jax import reference
from tests.idefics_jax.convert import reference_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model as a Hugging Face folder, a model folder, and the work directory of a finished training."""
    root = tmp_path_factory.mktemp("model")
    hf = reference_folder.save(root / "hf", dtype="float32", max_shard_size="20KB")
    config = Idefics2Config.load(root / "hf")
    params = from_hf(HfFolder(root / "hf"), config)
    save_model(root / "model", params, config, None)
    save_model(root / "work" / "model", params, config, None)
    (root / "work" / "checkpoints").mkdir()
    return root, hf.eval()


def inputs():
    rng = np.random.default_rng(0)
    documents = [reference.document(rng, 3, (12, 8), 2, (9, 20), 2), reference.document(rng, 4)]
    return reference.hf_inputs(documents, side="left")


@pytest.mark.parametrize("form", ["hf", "model", "work"])
def test_loaded_model_gives_the_logits_of_transformers(saved, form):
    root, hf = saved
    model = idefics_jax.load(root / form)
    batch, places = interop.hf_batch(**inputs(), config=model.config)
    logits = model(batch)
    assert logits.dtype == np.float32
    with torch.inference_mode():
        wanted = hf(**inputs()).logits.numpy()
    real = places >= 0
    np.testing.assert_allclose(interop.to_hf_positions(logits, places)[real], wanted[real], atol=reference.WHOLE)


@pytest.mark.parametrize("form", ["hf", "model"])
def test_model_is_spread_over_a_mesh(saved, form):
    root, _ = saved
    mesh = sharding.make_mesh({"fsdp": -1})
    model = idefics_jax.load(root / form, mesh=mesh, rules=sharding.RULES["fsdp"])
    wanted = param_shardings(model.config, mesh, sharding.RULES["fsdp"])
    assert flatten(jax.tree.map(lambda x: x.sharding, model.params)) == flatten(wanted)
    batch, _ = interop.hf_batch(**inputs(), config=model.config)
    np.testing.assert_allclose(model(batch), idefics_jax.load(root / form)(batch), atol=1e-5)


def test_model_says_what_it_is(saved):
    root, hf = saved
    text = repr(idefics_jax.load(root / "model"))
    assert f"{sum(p.numel() for p in hf.parameters()):,} float32 parameters" in text
    assert "no processor" in text
    assert "\n" not in text


def test_parameters_keep_their_dtype_whatever_the_arithmetic(tmp_path):
    reference_folder.save(tmp_path, dtype="bfloat16", max_shard_size="5GB")
    model = idefics_jax.load(tmp_path, dtype=jax.numpy.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    batch, _ = interop.hf_batch(np.arange(1, 9)[None], config=model.config)
    assert model(batch).dtype == np.float32


def test_processor_is_found_beside_the_weights(saved, tmp_path, released):
    _, hf = saved
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match="tokenizer.model"):
        idefics_jax.load(tmp_path)


@pytest.mark.parametrize("missing", ["nothing at all", "the folder"])
def test_folder_without_a_model_is_one_sentence(tmp_path, missing):
    path = tmp_path if missing == "nothing at all" else tmp_path / "nowhere"
    with pytest.raises(UserError, match="holds no model" if path == tmp_path else "is not a folder"):
        idefics_jax.load(path)


def test_work_directory_of_an_unfinished_training_has_no_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".model.partial" / "params").mkdir(parents=True)
    with pytest.raises(UserError, match="no finished model"):
        idefics_jax.load(tmp_path)


def test_importing_the_package_imports_no_framework():
    program = """
import sys, idefics_jax
assert not {"jax", "flax", "numpy", "orbax"} & set(sys.modules), "heavy import"
idefics_jax.load, idefics_jax.Processor, idefics_jax.interop.hf_batch, idefics_jax.Model
assert "jax" in sys.modules
assert not {"torch", "transformers", "tensorflow"} & set(sys.modules), "foreign import"
try:
    idefics_jax.laod
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no attribute 'laod'" in done.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 99_999}, "tokens holds 99999; the ids of this model are 0 to "),
        ({"tokens": reference.IMAGE}, r"row 0 has \d+ <image> tokens; its 2 images need \d+ \(\d+ each\)"),
        ({"patches": None}, r"row 0 has \d+ <image> tokens; its 0 images need 0"),
    ],
)
def test_a_batch_that_the_program_would_misread_is_refused(saved, change, said):
    root, _ = saved
    model = idefics_jax.load(root / "model")
    batch, _ = interop.hf_batch(**inputs(), config=model.config)
    for name, value in change.items():
        if value is None:
            del batch[name]
        else:
            batch[name][0, 0] = value
    with pytest.raises(UserError, match=said):
        model(batch)
