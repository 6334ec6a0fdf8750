"""Geometry and pixels against transformers' PIL image processor, and the cases it leaves open."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Idefics2Config
from transformers.image_utils import SizeDict
from transformers.models.idefics2 import image_processing_pil_idefics2 as reference
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from idefics_jax import images
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules, image_patches, image_size, patch_grids, position_ids

RELEASED = {
    "patch_size": 14,
    "longest_edge": 980,
    "shortest_edge": 378,
    "positions_per_side": 70,
    "max_pixels": 64_000_000,
}
WHOLE, SPLIT = ImageRules(**RELEASED, split=False), ImageRules(**RELEASED, split=True)
# One patch of 2 x 2 pixels for an image of up to 2 x 2: a pixel is a patch's first three numbers.
TINY = ImageRules(patch_size=2, longest_edge=8, shortest_edge=2, positions_per_side=4, split=False, max_pixels=10_000)
# Across the rule's branches: within limits, too long, floored, floor that bends the ratio, odd, tall, one pixel.
SIZES = [(640, 480), (1000, 500), (1100, 825), (100, 100), (3000, 300), (1280, 720), (981, 979), (391, 1203), (7, 1)]


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> PIL.Image.Image:
    """Noise over a slope: every resampling weight shows."""
    rng = np.random.default_rng(width * 10_000 + height)
    slope = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    return PIL.Image.fromarray((slope + rng.integers(0, 56, (height, width, 3))).astype(np.uint8))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, transparency: bytes | None = None) -> bytes:
    """A PNG written by hand: what Pillow cannot write (16-bit colour), or a header with no pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    line = len(pixels) // height
    lines = b"".join(b"\0" + pixels[i * line : (i + 1) * line] for i in range(height if line else 0))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    if transparency is not None:
        chunks.insert(1, (b"tRNS", transparency))
    checked = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def first_pixel(data: bytes, rules: ImageRules = TINY) -> list[int]:
    return image_patches(data, rules)[0][0, :3].tolist()


def cut(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [rows, columns, patch, patch, 3], by indexing instead of reshaping."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    return np.array(
        [
            [pixels[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for c in range(columns)]
            for r in range(rows)
        ]
    )


# The reference cannot split a side of one pixel; what ours does is tested below.
@pytest.mark.parametrize(
    ("size", "split"), [(size, False) for size in SIZES] + [(size, True) for size in SIZES if min(size) > 1], ids=str
)
def test_pixels_equal_the_reference(size, split):
    image = photo(*size)
    out = reference.Idefics2ImageProcessorPil(do_image_splitting=split)(image)
    rules = SPLIT if split else WHOLE
    ours = image_patches(encoded(image), rules)
    assert len(ours) == len(out["pixel_values"][0]) == (5 if split else 1)
    for patches, grid, pixels, mask in zip(
        ours, patch_grids(encoded(image), rules), out["pixel_values"][0], out["pixel_attention_mask"][0], strict=True
    ):
        height, width = mask[:, 0].sum(), mask[0].sum()
        theirs = pixels[:, :height, :width].transpose(1, 2, 0)
        expected = cut((theirs / 2 + 0.5) * 255, 14)
        assert expected.shape[:2] == grid
        np.testing.assert_allclose(patches.reshape(expected.shape), expected, atol=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_simd_resizer_is_two_levels_beside_the_other_at_most(size, kind):
    data = encoded(photo(*size), kind)
    for rules in (WHOLE, SPLIT):
        quick = dataclasses.replace(rules, resizer="simd")
        for near, exact in zip(image_patches(data, quick), image_patches(data, rules), strict=True):
            off = np.abs(near.astype(int) - exact)
            assert off.mean() < 0.03
            assert off.max() <= 2


@pytest.mark.parametrize("resizer", ["pillow", "simd"])
@pytest.mark.parametrize("size", [(640, 480), (1100, 825)], ids=str)
def test_patches_are_written_where_they_are_wanted(size, resizer):
    rules, data = dataclasses.replace(SPLIT, resizer=resizer), encoded(photo(*size), "JPEG")
    counts = [rows * columns for rows, columns in patch_grids(data, rules)]
    room = np.full((sum(counts) + 2, 588), 7, np.uint8)
    places = np.split(room[1:-1], np.cumsum(counts)[:-1])
    written = image_patches(data, rules, out=places)
    assert all(np.shares_memory(patches, room) for patches in written)
    np.testing.assert_array_equal(room[1:-1], np.concatenate(image_patches(data, rules)))
    assert (room[[0, -1]] == 7).all()


@given(st.integers(1, 8_000), st.integers(1, 8_000))
@settings(max_examples=300, deadline=None)
def test_grids_follow_the_reference_for_any_size(width, height):
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    processor = reference.Idefics2ImageProcessorPil()
    size = SizeDict(shortest_edge=378, longest_edge=980)
    pieces = processor.split_images(image) if min(width, height) > 1 else [image]
    expected = [reference.get_resize_output_image_size(piece, size) for piece in pieces]
    ours = patch_grids(png(width, height, 8, 2, b""), SPLIT if min(width, height) > 1 else WHOLE)
    assert ours == [(h // 14, w // 14) for h, w in expected]
    assert all(27 <= side <= 70 for grid in ours for side in grid)


def test_split_reads_the_quarters_in_reading_order_then_the_whole():
    pixels = np.zeros((5, 7, 3), np.uint8)
    pixels[:2, :3], pixels[:2, 3:], pixels[2:, :3], pixels[2:, 3:] = 10, 20, 30, 40
    patches = image_patches(encoded(PIL.Image.fromarray(pixels)), SPLIT)
    assert [set(np.unique(quarter)) for quarter in patches[:4]] == [{10}, {20}, {30}, {40}]
    assert {10, 20, 30, 40} <= set(np.unique(patches[4]))


def test_numbers_of_a_patch_run_row_column_channel():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    (patches,) = image_patches(encoded(PIL.Image.fromarray(pixels)), TINY)
    assert patches.shape == (4, 12)
    assert patches.dtype == np.uint8
    assert patches[1].tolist() == [*range(6, 12), *range(18, 24)]


@pytest.mark.parametrize(("size", "patch"), [((28, 28), 14), ((45, 61), 14), ((14, 17), 14), ((7, 9), 2), ((5, 3), 1)])
def test_four_bytes_a_pixel_are_cut_as_three_are_and_nothing_behind_them_is_written(size, patch):
    pixels = np.random.default_rng(patch).integers(0, 256, (*size, 4), np.uint8)
    wanted = images.cut(np.ascontiguousarray(pixels[:, :, :3]), patch)
    place = np.full((len(wanted) + 1, patch * patch * 3), 7, np.uint8)
    np.testing.assert_array_equal(images.cut(pixels, patch, place[:-1]), wanted)
    assert (place[-1] == 7).all()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)], ids=str)
@pytest.mark.parametrize("rules", [WHOLE, SPLIT], ids=["whole", "split"])
def test_the_thinnest_image_has_whole_rows_and_columns(size, rules):
    data = encoded(PIL.Image.new("RGB", size, (1, 2, 3)))
    grids = patch_grids(data, rules)
    assert min(min(grid) for grid in grids) == 27
    assert [len(patches) for patches in image_patches(data, rules)] == [rows * columns for rows, columns in grids]


def test_a_side_of_one_pixel_is_not_split():
    data = encoded(PIL.Image.new("RGB", (1, 4), (9, 8, 7)))
    patches = image_patches(data, SPLIT)
    assert len(patches) == 5
    assert all((quarter.reshape(-1, 3) == (9, 8, 7)).all() for quarter in patches)


def test_position_ids_equal_the_reference_for_every_count():
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = Idefics2Config(vision_config={**sizes, "image_size": 70, "patch_size": 1}).vision_config
    embeddings = Idefics2VisionEmbeddings(config)
    seen = []
    embeddings.position_embedding.register_forward_hook(lambda module, ids, out: seen.append(ids[0]))
    for count in range(1, 71):
        rows, columns = count, 71 - count
        mask = torch.zeros(1, 70, 70, dtype=torch.bool)
        mask[:, :rows, :columns] = True
        embeddings(torch.zeros(1, 3, 70, 70), mask)
        expected = seen.pop().reshape(70, 70)[:rows, :columns].reshape(-1)
        np.testing.assert_array_equal(position_ids(rows, columns, 70), expected)


def test_position_ids_round_as_released_and_not_as_whole_numbers():
    lower = {}
    for count in range(1, 71):
        off = [i for i in range(count) if position_ids(1, count, 70)[i] != 70 * i // count]
        lower |= {count: off} if off else {}
    assert lower == {25: [5, 10, 15, 20], 49: [7, 14, 28, 35], 50: [5, 10, 15, 20, 30, 40], 55: [11, 22, 33, 44]}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    image = PIL.Image.new("RGB", (6, 4), "black")
    image.paste("white", (0, 0, 3, 2))  # the stored top left quarter
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {"lossless": True}))
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    assert image_size(data, TINY) == upright.size == ((4, 6) if orientation > 4 else (6, 4))
    rows, columns = patch_grids(data, TINY)[0]
    (patches,) = image_patches(data, TINY)
    expected = cut(np.asarray(upright), 2).reshape(rows * columns, -1)
    np.testing.assert_array_equal(patches, expected)
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    row, column = corner[orientation]
    assert patches.reshape(rows, columns, -1)[row, column].min() > 200


def test_unreadable_exif_leaves_the_image_as_stored():
    data = encoded(PIL.Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert image_size(data, TINY) == (6, 4)


def test_palette_takes_its_colours():
    image = PIL.Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    assert first_pixel(encoded(image)) == [12, 34, 56]


def test_alpha_is_laid_on_white():
    assert first_pixel(encoded(PIL.Image.new("RGBA", (2, 2), (200, 0, 0, 0)))) == [255, 255, 255]
    assert first_pixel(encoded(PIL.Image.new("RGBA", (2, 2), (200, 0, 0, 128)))) == [227, 127, 127]
    assert first_pixel(encoded(PIL.Image.new("LA", (2, 2), (0, 51)))) == [204, 204, 204]
    assert first_pixel(encoded(PIL.Image.new("RGBA", (2, 2), (200, 0, 0, 128)), "WEBP", lossless=True)) == [
        227,
        127,
        127,
    ]


def test_a_transparent_palette_colour_is_laid_on_white():
    image = PIL.Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    assert first_pixel(encoded(image, transparency=1)) == [255, 255, 255]
    assert first_pixel(encoded(image, "GIF", transparency=1)) == [255, 255, 255]


def test_grey_fills_the_three_channels():
    assert first_pixel(encoded(PIL.Image.new("L", (2, 2), 77))) == [77, 77, 77]
    assert first_pixel(encoded(PIL.Image.new("1", (2, 2), 1))) == [255, 255, 255]


def test_sixteen_bits_keep_the_high_byte():
    grey = PIL.Image.fromarray(np.full((2, 2), 0x7BFF, np.uint16))
    assert grey.mode == "I;16"
    assert first_pixel(encoded(grey)) == [0x7B, 0x7B, 0x7B]
    assert first_pixel(encoded(grey, transparency=0x7BFF)) == [255, 255, 255]


def test_sixteen_bit_colour_keeps_the_high_byte():
    pixel = struct.pack(">HHH", 0x10FF, 0x20FF, 0x30FF)
    assert first_pixel(png(2, 2, 16, 2, pixel * 4)) == [0x10, 0x20, 0x30]
    opaque_grey, clear = struct.pack(">HH", 0x40FF, 0xFFFF), struct.pack(">HHHH", 1, 2, 3, 0)
    assert first_pixel(png(2, 2, 16, 4, opaque_grey * 4)) == [0x40, 0x40, 0x40]
    assert first_pixel(png(2, 2, 16, 6, clear * 4)) == [255, 255, 255]


def test_cmyk_becomes_rgb():
    image = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = first_pixel(encoded(image, "JPEG", quality=100))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    frames = [PIL.Image.new("RGB", (2, 2), colour) for colour in ((0, 0, 255), (255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 3
    assert first_pixel(data) == [0, 0, 255]


def test_a_jpeg_of_several_pictures_is_its_first():
    """As phones write them: Pillow calls the format MPO."""
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ((0, 0, 254), (254, 0, 0))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert data[:3] == b"\xff\xd8\xff"
    assert first_pixel(data) == [0, 0, 254]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": 14.0}, "patch_size is 14.0"),
        ({"max_pixels": True}, "max_pixels is True"),
        ({"max_pixels": 10**9}, "max_pixels is 1000000000"),
        ({"split": 1}, "split is 1"),
        ({"resizer": "fast"}, "resizer is 'fast'; it must be one of pillow, simd"),
        ({"shortest_edge": 13}, "shortest_edge is 13"),
        ({"shortest_edge": 981}, "shortest_edge is 981"),
        ({"positions_per_side": 69}, "longest_edge is 980"),
    ],
    ids=str,
)
def test_rules_refuse_what_cannot_work(change, message):
    with pytest.raises(UserError, match=message):
        ImageRules(**{**RELEASED, "split": False, **change})
