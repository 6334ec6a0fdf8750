"""Both resizers against Pillow."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images

from idefics_jax import resize

PHOTOGRAPHS = load_sample_images().images
# Shrunk a little, a lot, on one side only, enlarged, bent, to one line, and not at all.
SIZES = [(500, 334), (61, 40), (640, 100), (100, 427), (980, 654), (378, 980), (640, 1), (640, 427)]


def reference(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BILINEAR))


def padded(pixels: np.ndarray, fourth: int) -> np.ndarray:
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), fourth, np.uint8)], axis=2)


def differences(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    assert found.shape == wanted.shape
    assert found.dtype == np.uint8
    return np.abs(found.astype(int) - wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=["china", "flower"])
def test_simd_is_a_level_beside_pillow_at_few_values(photograph, size):
    found = resize.simd(padded(photograph, 255), (0, 0, 640, 427), size)[:, :, :3]
    off = differences(found, reference(photograph, size))
    assert off.mean() < 0.02
    assert off.max() <= 2
    assert (off > 1).mean() < 1e-5


@given(st.tuples(*[st.integers(1, 400)] * 4))
@settings(max_examples=150, deadline=None)
def test_simd_is_near_whatever_the_sizes(sides):
    """The order of the passes alone would put a fifth of noise beside."""
    width, height, new_width, new_height = sides
    noise = np.random.default_rng(sides).integers(0, 256, (height, width, 3), np.uint8)
    found = resize.simd(padded(noise, 0), (0, 0, width, height), (new_width, new_height))[:, :, :3]
    off = differences(found, reference(noise, (new_width, new_height)))
    assert off.max() <= 2
    if off.size > 10_000:
        assert off.mean() < 0.06


@pytest.mark.parametrize("box", [(0, 0, 320, 213), (320, 213, 640, 427), (5, 7, 6, 8), (0, 0, 640, 427)], ids=str)
def test_nothing_beyond_the_box_is_seen(box):
    left, top, right, bottom = box
    wanted = reference(PHOTOGRAPHS[0][top:bottom, left:right], (101, 77))
    assert (resize.pillow(PIL.Image.fromarray(PHOTOGRAPHS[0]), box, (101, 77)) == wanted).all()
    assert differences(resize.simd(padded(PHOTOGRAPHS[0], 255), box, (101, 77))[:, :, :3], wanted).max() <= 2


def test_the_fourth_byte_is_not_looked_at():
    whole, size = (0, 0, 640, 427), (333, 222)
    found = [resize.simd(padded(PHOTOGRAPHS[1], fourth), whole, size)[:, :, :3].copy() for fourth in (0, 128, 255)]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
