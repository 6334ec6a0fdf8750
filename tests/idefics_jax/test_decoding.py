"""The short way of plain JPEG against Pillow's, bit for bit, and what is left to Pillow."""

import io
import random

import numpy as np
import PIL.Image
import pytest
import simplejpeg
from sklearn.datasets import load_sample_images

from idefics_jax import decoding, image_gate
from idefics_jax.image_gate import RejectedImage

PHOTOGRAPH = PIL.Image.fromarray(load_sample_images().images[0])


def encoded(image: PIL.Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> PIL.Image.Image:
    return image_gate.open_image(data, max_pixels=10**6)


def array(data: bytes, *, channels: int = 3) -> np.ndarray:
    return decoding.rgb_array(decoding.Stored(data, max_pixels=10**6), channels=channels).copy()


def both_ways(data: bytes) -> tuple[np.ndarray | str, np.ndarray | str]:
    """Returns the array and Pillow's image, or the reasons they were refused for."""

    def attempt(decode):
        try:
            return np.asarray(decode())
        except RejectedImage as error:
            return error.reason

    return attempt(lambda: array(data)), attempt(lambda: decoding.rgb_image(opened(data)))


def took_the_short_way(data: bytes, monkeypatch) -> bool:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "rgb_image", lambda image: PIL.Image.new("RGB", decoding.upright_size(image), "red"))
        return not (array(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(640, 427), (333, 111), (17, 9), (8, 8), (1, 1), (1, 50)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "keep rgb"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_plain_jpeg_is_bit_for_bit_as_pillow_decodes_it(size, subsampling, progressive, monkeypatch):
    options = {"keep_rgb": True} if subsampling == "keep rgb" else {"subsampling": subsampling}
    data = encoded(PHOTOGRAPH.resize(size), quality=83, progressive=progressive, restart_marker_blocks=3, **options)
    short, pillow = both_ways(data)
    assert (short == pillow).all()
    assert took_the_short_way(data, monkeypatch)


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_rarer_subsampling_is_decoded_so_too(subsampling, monkeypatch):
    data = simplejpeg.encode_jpeg(np.asarray(PHOTOGRAPH), quality=90, colorsubsampling=subsampling)
    short, pillow = both_ways(data)
    assert (short == pillow).all()
    assert took_the_short_way(data, monkeypatch)


def test_four_channels_are_the_three_and_one_more():
    for data in (encoded(PHOTOGRAPH), encoded(PHOTOGRAPH, "PNG"), encoded(PHOTOGRAPH.convert("L"))):
        three, four = (array(data, channels=channels) for channels in (3, 4))
        assert four.shape == (427, 640, 4)
        assert (four[..., :3] == three).all()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_left_to_pillow(mode, monkeypatch):
    data = encoded(PHOTOGRAPH.convert(mode))
    short, pillow = both_ways(data)
    assert (short == pillow).all()
    assert not took_the_short_way(data, monkeypatch)


def test_turned_jpeg_is_left_to_pillow(monkeypatch):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encoded(PHOTOGRAPH, exif=exif)
    short, pillow = both_ways(data)
    assert short.shape == (640, 427, 3)
    assert (short == pillow).all()
    assert not took_the_short_way(data, monkeypatch)


def test_damaged_jpeg_ends_both_ways_alike():
    rng, ends = random.Random(0), set()
    data = encoded(PHOTOGRAPH.resize((96, 64)))
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(2, len(damaged))
            damaged[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        short, pillow = both_ways(bytes(damaged))
        assert np.array_equal(short, pillow)
        ends.add(short if isinstance(short, str) else "decoded")
    assert ends >= {"decoded", "truncated", "corrupt"}


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGBA", {}), ("LA", {}), ("P", {"transparency": 3}), ("P", {"transparency": bytes(range(256))})]
    + [("RGB", {"transparency": (255, 255, 255)}), ("L", {"transparency": 7})],
)
def test_transparency_is_laid_on_white_in_strips_as_it_is_whole(mode, options, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 17, 4), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(file, "PNG", **options)
    whole = PIL.Image.open(file).convert("RGBA")
    whole = PIL.Image.alpha_composite(PIL.Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", 17 * 4)
    found = decoding.rgb_image(image_gate.open_image(file.getvalue(), max_pixels=1000))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(whole))
