"""No more pixels are decoded at one time than there is room for."""

import concurrent.futures
import subprocess
import sys
import threading
import time

import PIL.Image
import pytest

from idefics_jax.pixel_room import PixelRoom


@pytest.mark.parametrize(("pixels", "most"), [(30, 3), (100, 1), (1000, 1), (1, 8)])
def test_who_does_not_fit_waits(pixels, most):
    room, lock, inside, seen = PixelRoom(100), threading.Lock(), 0, []

    def decode(_):
        nonlocal inside
        with room.taken(pixels):
            with lock:
                inside += 1
                seen.append(inside)
            time.sleep(0.01)
            with lock:
                inside -= 1

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(decode, range(24)))
    assert len(seen) == 24
    assert max(seen) == most


def test_room_is_given_back_where_decoding_fails():
    room = PixelRoom(100)
    for _ in range(3):
        with pytest.raises(KeyError), room.taken(100):
            raise KeyError


def test_large_images_take_no_more_memory_on_many_threads_than_on_one(tmp_path):
    """64 million pixels take a gigabyte on their way; here a quarter of them, one image at a time."""
    PIL.Image.new("RGBA", (4000, 4000), (9, 99, 9, 99)).save(tmp_path / "large.png", compress_level=1)
    program = """
import concurrent.futures, pathlib, re, sys
from idefics_jax import images
data = pathlib.Path(sys.argv[2]).read_bytes()
images._ROOM.__init__(16_000_000)
rules = images.ImageRules(14, 980, 378, 70, False, 64_000_000, "simd")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
with concurrent.futures.ThreadPoolExecutor(int(sys.argv[1])) as threads:
    list(threads.map(lambda _: images.image_patches(data, rules), range(8)))
print(peak() - before)
"""
    command = [sys.executable, "-c", program]
    one, eight = (int(subprocess.check_output([*command, count, tmp_path / "large.png"])) for count in ("1", "8"))
    assert one > 100_000, "it is seen at all (KiB)"
    assert eight < 1.5 * one
