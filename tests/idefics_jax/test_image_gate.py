"""Hostile image bytes: refused with a reason, before they cost anything, and never with another exception."""

import dataclasses
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import PIL.Image
import pytest

from idefics_jax import image_gate
from idefics_jax.images import ImageRules, RejectedImage, image_patches, image_size, patch_grids

ROOT = Path(__file__).parents[2]
RULES = ImageRules(
    patch_size=2, longest_edge=16, shortest_edge=4, positions_per_side=8, split=True, max_pixels=1_000_000
)
KINDS = ("JPEG", "PNG", "WEBP", "GIF")


def encoded(kind: str, size: tuple[int, int] = (20, 12), mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_mandelbrot(size, (-2, -1, 1, 1), 30).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def rejected(data: bytes) -> RejectedImage:
    """The refusal, which must be one sentence."""
    with pytest.raises(RejectedImage) as caught:
        image_patches(data, RULES)
    assert "\n" not in str(caught.value)
    assert "object at" not in str(caught.value)
    return caught.value


def reason_or_patches(data: bytes):
    """The reason of a refusal, or else the patches; any other exception fails the test."""
    try:
        return image_patches(data, RULES)
    except RejectedImage as error:
        return error.reason


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (header, pixels)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def riff(chunk: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def outgrown_gif(side: int) -> bytes:
    screen, frame = struct.pack("<HHBBB", 10, 10, 0, 0, 0), struct.pack("<HHHHB", 0, 0, side, side, 0)
    return b"GIF89a" + screen + b"," + frame + b"\x02\x00"


# Each claims what it must not get; none is longer than a kilobyte or two.
BOMBS = {
    "png 100,000 x 100,000 at one bit": png_header(100_000, 100_000),
    "png as large as it can say": png_header(2**31 - 1, 2**31 - 1),
    "png one pixel high": png_header(10**9, 1),
    "jpeg 65,500 x 65,500": b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65_500, 65_500) + b"\x03" + bytes(9),
    "jpeg progressive": b"\xff\xd8\xff\xc2\x00\x11\x08" + struct.pack(">HH", 65_500, 65_500) + b"\x03" + bytes(9),
    "jpeg behind a comment": b"\xff\xd8\xff\xfe\x00\x04hi\xff\xc0\x00\x11\x08" + struct.pack(">HH", 40_000, 40_000),
    "gif 65,535 x 65,535": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(20),
    "gif whose frame outgrows its screen": outgrown_gif(5_000),
    "gif whose frame outgrows Pillow's own limit": outgrown_gif(65_535),
    "webp lossy": riff(b"VP8 " + struct.pack("<I", 20) + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383)),
    "webp lossless": riff(b"VP8L" + struct.pack("<I", 20) + b"\x2f" + struct.pack("<I", 2**28 - 1) + bytes(20)),
    "webp canvas": riff(b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_by_its_header(name):
    error = rejected(BOMBS[name])
    assert error.reason == "bomb"
    assert "scale it down" in str(error)
    with pytest.raises(RejectedImage, match="scale it down"):
        image_size(BOMBS[name], RULES)
    with pytest.raises(RejectedImage, match="scale it down"):
        patch_grids(BOMBS[name], RULES)


def test_bombs_cost_no_memory():
    script = f"""
import resource
from idefics_jax import image_gate
from idefics_jax.images import ImageRules, RejectedImage, image_patches
rules = {RULES!r}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for data in {list(BOMBS.values())!r}:
    try:
        image_patches(data, rules)
    except RejectedImage:
        pass
print(peak() - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(grown) < 20_000  # kB; the smallest of them decodes to 64 MB


OTHER_FORMATS = {
    "tiff": b"II*\0\x08\0\0\0",
    "tiff big end first": b"MM\0*\0\0\0\x08",
    "bmp": b"BM\x36\0\0\0",
    "photoshop": b"8BPS\0\x01",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0",
    "pdf": b"%PDF-1.7",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "avif": b"\0\0\0\x20ftypavif",
    "heic": b"\0\0\0\x18ftypheic",
    "icon": b"\0\0\x01\0\x01\0",
    "fits": b"SIMPLE  =                    T",
    "portable pixmap": b"P6\n1 1\n255\n\0\0\0",
    "dds": b"DDS |\0\0\0",
    "wave, also a riff": b"RIFF\x24\0\0\0WAVEfmt ",
    "web page": b"<!DOCTYPE html><html>",
    "zeros": bytes(64),
    "one byte": b"\xff",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_no_other_format_reaches_a_parser(name, monkeypatch):
    monkeypatch.setattr(PIL.Image, "open", lambda *a, **k: pytest.fail("a parser was called"))
    error = rejected(OTHER_FORMATS[name])
    assert error.reason == "format"
    assert "convert it" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bomb_reaches_a_parser(kind, monkeypatch):
    data = encoded(kind, size=(1100, 1000))
    monkeypatch.setattr(PIL.Image, "open", lambda *a, **k: pytest.fail("a parser was called"))
    assert rejected(data).reason == "bomb"


@pytest.mark.parametrize("junk", [b"\xff", b"\xff\x00", b"\xff\xe0\x00\x02"])
def test_a_jpeg_of_segments_without_end_is_not_walked_to_its_end(junk):
    error = rejected(b"\xff\xd8\xff\xe0\x00\x02" + junk * 20_000 + encoded("JPEG")[2:])
    assert error.reason == "corrupt"
    assert "10000 segments" in str(error)


def with_scans(size: tuple[int, int], extra: int) -> bytes:
    """A progressive JPEG whose last refinement of the luma is there so many times more."""
    data = encoded("JPEG", size, progressive=True)
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    refinement = next(
        start for start in starts if data[start + 4] == 1 and data[start + 5] == 1 and data[start + 8] >> 4
    )
    tables = data.rindex(b"\xff\xc4", 0, refinement)
    end = min(place for place in [*starts, len(data) - 2, *places(data, b"\xff\xc4")] if place > refinement)
    return data[:-2] + data[tables:end] * extra + data[-2:]


def places(data: bytes, marker: bytes) -> list[int]:
    return [place for place in range(len(data)) if data.startswith(marker, place)]


def test_a_jpeg_of_more_scans_than_its_size_allows_is_a_bomb():
    """Each goes over all pixels: of 64 million, two thousand scans in 600 kB took three minutes."""
    rules = dataclasses.replace(RULES, max_pixels=64 * 64)
    for data, allowed in [
        (with_scans((64, 64), extra=0), True),
        (with_scans((64, 64), extra=5), True),
        (with_scans((64, 64), extra=40), False),
        (with_scans((16, 16), extra=40), True),
    ]:
        with PIL.Image.open(io.BytesIO(data)) as whole:
            whole.load()  # the parser takes them all
        if allowed:
            image_patches(data, rules)
        else:
            with pytest.raises(RejectedImage, match="far more scans than it needs") as refused:
                image_patches(data, rules)
            assert refused.value.reason == "bomb"


def test_what_looks_like_scans_in_metadata_is_none():
    data = encoded("JPEG", (64, 64))
    comment = b"\xff\xda" * 5000
    told = data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:]
    image_patches(told, dataclasses.replace(RULES, max_pixels=64 * 64))


@pytest.mark.parametrize("before", [b"\xff\xc0", b"\xff\xda"], ids=["before the frame", "before the pixels"])
def test_a_jpeg_with_a_head_of_megabytes_is_a_bomb(before):
    """Pillow copies EXIF once more for each of its segments: 65 MB took 19 s."""
    data = encoded("JPEG", (64, 64))
    place = data.index(before)
    segment = b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
    image_patches(data[:place] + segment * 20 + data[place:], RULES)
    assert rejected(data[:place] + segment * 300 + data[place:]).reason == "bomb"


def test_empty_bytes_are_refused():
    assert rejected(b"").reason == "empty"


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused_or_harmless(kind):
    data = encoded(kind)
    whole = image_patches(data, RULES)
    for length in range(1, len(data), max(1, len(data) // 100)):
        result = reason_or_patches(data[:length])
        if isinstance(result, str):
            assert result in ("truncated", "corrupt", "format")
        else:  # only bytes after the pixels were lost
            assert all((cut == full).all() for cut, full in zip(result, whole, strict=True))
            assert length > 0.8 * len(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_pixels_cut_short_are_called_truncated(kind):
    data = encoded(kind, size=(200, 120))
    assert patch_grids(data[: len(data) // 2], RULES) == patch_grids(data, RULES)  # the header is still whole
    assert rejected(data[: len(data) // 2]).reason == "truncated"


def test_a_header_with_another_format_behind_it_is_corrupt():
    jpeg, png = encoded("JPEG"), encoded("PNG")
    assert rejected(png[:8] + jpeg).reason in ("corrupt", "truncated", "bomb")
    assert rejected(jpeg[:3] + png).reason in ("corrupt", "truncated")


def test_a_damaged_checksum_is_corrupt():
    data = bytearray(encoded("PNG"))
    data[-20] ^= 1
    assert rejected(bytes(data)).reason == "corrupt"


@pytest.mark.parametrize("data", [png_header(0, 5), png_header(5, 0), b"GIF89a" + bytes(20)], ids=["0x5", "5x0", "gif"])
def test_an_image_without_pixels_is_corrupt(data):
    assert rejected(data).reason == "corrupt"


def test_the_reason_survives_a_process_boundary():
    error = rejected(b"")
    rebuild, arguments = error.__reduce__()
    assert rebuild(*arguments).reason == "empty"
    assert str(rebuild(*arguments)) == str(error)


ROUNDS = 2000
SEEDS = {
    "jpeg": encoded("JPEG"),
    "jpeg progressive with exif": encoded(
        "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0"
    ),
    "jpeg cmyk": encoded("JPEG", mode="CMYK"),
    "png": encoded("PNG"),
    "png 16 bit": encoded("PNG", mode="I;16"),
    "png palette": encoded("PNG", mode="P", transparency=0),
    "png with alpha": encoded("PNG", mode="RGBA"),
    "png animated": encoded("PNG", save_all=True, append_images=[PIL.Image.new("RGB", (20, 12))]),
    "webp": encoded("WEBP"),
    "webp lossless with alpha": encoded("WEBP", mode="RGBA", lossless=True),
    "webp animated": encoded("WEBP", save_all=True, append_images=[PIL.Image.new("RGB", (20, 12))]),
    "gif": encoded("GIF", mode="P"),
    "gif animated": encoded("GIF", save_all=True, append_images=[PIL.Image.new("RGB", (20, 12))]),
}


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_bytes_are_refused_or_decoded_as_measured(name):
    rng = random.Random(name)
    refused = 0
    for _ in range(ROUNDS):
        data = mutated(SEEDS[name], rng)
        result = reason_or_patches(data)
        if isinstance(result, str):
            assert result in ("truncated", "corrupt", "format", "bomb")
            refused += 1
        else:
            assert [len(cut) for cut in result] == [rows * columns for rows, columns in patch_grids(data, RULES)]
    assert 0 < refused < ROUNDS


def test_a_plain_jpeg_is_one_that_pillow_opens_as_it_was_measured():
    """Damage is done to headers alone, of JPEG plain and not: whichever passes for plain, Pillow agrees with."""
    rng, plain = random.Random(0), 0
    seeds = [
        encoded("JPEG", **options)
        for options in ({}, {"progressive": True}, {"comment": b"by hand"}, {"keep_rgb": True}, {"icc_profile": b"icc"})
    ]
    assert [image_gate.plain_jpeg_size(seed, max_pixels=10**6) is not None for seed in seeds] == [True] * 3 + [
        False
    ] * 2
    for _ in range(4000):
        seed = rng.choice(seeds)
        end = rng.choice([200, seed.index(b"\xff\xda") + 14])  # the tables of Huffman codes are most of the header
        data = mutated(seed[:end], rng) + seed[end:]
        size = image_gate.plain_jpeg_size(data, max_pixels=10**6)
        if size is not None:
            image = image_gate.open_image(data, max_pixels=10**6)
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
            assert image_gate.transpose_of(image) is None
            plain += 1
    assert 200 < plain < 3500


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flips, splices, drops or repeats a few bytes; half of the time a PNG's checksums are mended, to get behind."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
            case 2:
                del data[at : at + rng.randint(1, 8)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 40)]
    return mended(bytes(data)) if rng.random() < 0.5 else bytes(data)


def mended(data: bytes) -> bytes:
    """Gives every chunk of a PNG the checksum of what it now holds."""
    if not data.startswith(b"\x89PNG"):
        return data
    out, at = bytearray(data), 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        out[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)
