import numpy as np
import pytest
import torch

from idefics_jax import images, interop
from idefics_jax.batch import BatchShape, batch_spec
from idefics_jax.errors import UserError
from tests.idefics_jax import reference
from tests.idefics_jax.reference import FAKE, IMAGE, LATENTS, PATCH


@pytest.fixture(scope="module")
def twin():
    return reference.twin(text={"sliding_window": 7})


def documents():
    """Three images, one, none; sides that are no multiple of the patch."""
    rng = np.random.default_rng(0)
    return [
        reference.document(rng, 2, (12, 8), 3, (9, 22), (40, 5), 2),
        reference.document(rng, (17, 30), 9),
        reference.document(rng, 6),
    ]


def arrays(side="right", of=None):
    return {name: x.numpy() for name, x in reference.hf_inputs(of or documents(), side=side).items()}


def logits(twin, inputs):
    batch, places = interop.hf_batch(**inputs, config=twin.config)
    return interop.to_hf_positions(reference.apply(twin.model, twin.params, batch), places), places >= 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_stand_where_those_of_transformers_stand(twin, side):
    inputs = arrays(side)
    with torch.no_grad():
        wanted = twin.hf(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits.numpy()
    found, real = logits(twin, inputs)
    np.testing.assert_array_equal(real, inputs["attention_mask"] == 1)
    np.testing.assert_allclose(found[real], wanted[real], atol=reference.WHOLE)
    assert not found[~real].any()


def test_side_of_the_padding_makes_no_difference(twin):
    left, _ = interop.hf_batch(**arrays("left"), config=twin.config)
    right, places = interop.hf_batch(**arrays("right"), config=twin.config)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
    np.testing.assert_array_equal(places[0], np.arange(places.shape[1]))


def test_batch_is_the_one_that_is_documented(twin):
    batch, places = interop.hf_batch(**arrays(), config=twin.config)
    rows, tokens = places.shape
    shape = BatchShape(
        rows=rows, tokens=tokens, vision_rows=3, patches=batch["patches"].shape[2], images=3, patch_dim=3 * PATCH**2
    )
    spec = batch_spec(shape)
    assert batch.keys() == spec.keys()
    for name, array in batch.items():
        assert array.shape == spec[name].shape
        assert array.dtype == (np.float32 if name == "patches" else spec[name].dtype)
    assert places.dtype == np.int32
    np.testing.assert_array_equal(batch["image_mask"], [[1, 1, 1], [1, 0, 0], [0, 0, 0]])


def test_patches_are_those_that_we_cut_ourselves(twin):
    """The same image by way of transformers' pixels and by way of our own uint8 patches."""
    batch, _ = interop.hf_batch(**arrays(), config=twin.config)
    for row, document in enumerate(documents()):
        for i, image in enumerate(document.images):
            rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
            own = slice(rows * columns)
            ours = reference.normalized(reference.cut(image, PATCH))
            np.testing.assert_array_equal(batch["patches"][row, i, own], ours)
            np.testing.assert_array_equal(batch["patch_image_ids"][row, i, own], i + 1)
            np.testing.assert_array_equal(batch["patch_positions"][row, i, own], images.position_ids(rows, columns, 10))
            assert not batch["patch_image_ids"][row, i, rows * columns :].any()


def test_loss_weights_are_the_labels_of_transformers(twin):
    inputs = arrays("left")
    batch, places = interop.hf_batch(**inputs, config=twin.config)
    ids, real = inputs["input_ids"], inputs["attention_mask"] == 1
    weights = interop.to_hf_positions(batch["loss_weights"], places)
    wanted = np.zeros(ids.shape)
    wanted[:, :-1] = real[:, :-1] & real[:, 1:] & (ids[:, 1:] != IMAGE)
    np.testing.assert_array_equal(weights, wanted)

    torch_inputs = {name: torch.from_numpy(x) for name, x in inputs.items()}
    targets = np.where(real & (ids != IMAGE), ids, -100)
    targets[np.arange(len(ids)), real.argmax(axis=1)] = -100  # nothing predicts a row's first token
    with torch.no_grad():
        theirs = twin.hf(**torch_inputs, labels=torch.from_numpy(targets)).loss.item()
    log_probs = torch.log_softmax(torch.from_numpy(logits(twin, inputs)[0]), dim=-1).numpy()
    following = np.take_along_axis(log_probs[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    ours = -(following * weights[:, :-1]).sum() / weights.sum()
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_text_alone_has_no_image_arrays(twin):
    batch, _ = interop.hf_batch(np.arange(1, 9).reshape(2, 4), config=twin.config)
    assert set(batch) == {"tokens", "segment_ids", "positions", "loss_weights"}
    padding = np.zeros((2, 1, 3, 8, 8), np.float32)
    assert set(interop.hf_batch(np.arange(1, 9).reshape(2, 4), None, padding, config=twin.config)[0]) == set(batch)


def test_masks_may_be_left_out(twin):
    inputs = arrays(of=[reference.document(np.random.default_rng(0), 3, (12, 20), 2)])
    full, _ = interop.hf_batch(**inputs, config=twin.config)
    bare, _ = interop.hf_batch(inputs["input_ids"], pixel_values=inputs["pixel_values"], config=twin.config)
    for name in full:
        np.testing.assert_array_equal(full[name], bare[name])


def test_padding_images_may_stand_anywhere(twin):
    inputs = arrays()
    before, _ = interop.hf_batch(**inputs, config=twin.config)
    for name in ("pixel_values", "pixel_attention_mask"):
        inputs[name] = np.insert(inputs[name], 1, 0, axis=1)
    after, _ = interop.hf_batch(**inputs, config=twin.config)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_torch_tensors_are_taken_as_they_come(twin):
    of_torch, _ = interop.hf_batch(**reference.hf_inputs(documents()), config=twin.config)
    of_numpy, _ = interop.hf_batch(**arrays(), config=twin.config)
    for name in of_numpy:
        np.testing.assert_array_equal(of_torch[name], of_numpy[name])


def test_values_without_a_feature_axis_go_back_too():
    places = np.array([[-1, 0, 1], [0, 1, -1]], np.int32)
    found = interop.to_hf_positions(np.array([[5, 6, 7], [8, 9, 1]]), places)
    np.testing.assert_array_equal(found, [[0, 5, 6], [8, 9, 0]])


def changed(**changes):
    inputs = arrays()
    for name, change in changes.items():
        inputs[name] = change(inputs[name].copy())
    return inputs


def with_hole(mask):
    mask[0, 0, 3, 3] = False
    return mask


def with_sliver(mask):
    mask[1, 0, :, 3:] = False
    return mask


def fewer_image_tokens(ids):
    ids[1, ids[1].argmax() + 1] = FAKE
    return ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": fewer_image_tokens}, f"row 1 has {LATENTS - 1} <image> tokens; its 1 images need {LATENTS}"),
        ({"pixel_values": np.zeros_like}, f"row 0 has {3 * LATENTS} <image> tokens; its 0 images need 0"),
        ({"pixel_values": lambda x: x[:2]}, "pixel_values has 2 rows and input_ids 3"),
        ({"pixel_values": lambda x: x[:, 0]}, r"it must be \[batch, images, 3, height, width\]"),
        ({"pixel_attention_mask": lambda x: x[..., 1:]}, "pixel_attention_mask is .*; pixel_values ask for"),
        ({"pixel_attention_mask": with_hole}, "image 0 of row 0 is no rectangle"),
        ({"pixel_attention_mask": with_sliver}, f"image 0 of row 1 is 3x17 pixels; .* one patch of {PATCH}x{PATCH}"),
        ({"attention_mask": lambda x: x[:, 1:]}, "input_ids is .* and attention_mask .*; both must be"),
        ({"input_ids": lambda x: x[0], "attention_mask": lambda x: x[0]}, r"both must be \[batch, tokens\]"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_inputs_that_do_not_fit_are_named(twin, changes, words):
    with pytest.raises(UserError, match=words):
        interop.hf_batch(**changed(**changes), config=twin.config)
