"""Webdataset tars: samples by key, in order, from memory alone; what is broken is counted, what is whole is given."""

import io
import random
import tarfile
from pathlib import Path

import pytest

from data_pipelines import tar
from data_pipelines.rejection import Rejected
from data_pipelines.tar_members import BrokenTar, members
from idefics_jax.errors import UserError
from tests.data_pipelines.tars import as_json, write_tar

LONG = "folder/" * 30 + "x"
PAIRS = [
    ("000.jpg", b"first"),
    ("000.txt", b"a cat"),
    ("000.json", as_json({"caption": "a cat", "url": "http://a/b.jpg", "key": "000", "width": 3, "synthetic": "cat"})),
    ("a.b/001.png", b"second"),
    ("a.b/001.json", as_json({"caption": "a dog", "exif": "{}", "status": "success", "error_message": None})),
    (f"{LONG}.webp", b"third" * 1000),
    (f"{LONG}.txt", "ein Hünd".encode()),
]
ROWS = [
    ("p.tar:000", {"image": b"first", "caption": "a cat", "url": "http://a/b.jpg", "synthetic": "cat"}),
    ("p.tar:a.b/001", {"image": b"second", "caption": "a dog"}),
    (f"p.tar:{LONG}", {"image": b"third" * 1000, "caption": "ein Hünd"}),
]


def one(path, contents, kind="pairs"):
    ((_, row),) = tar.read(write_tar(path / "p.tar", contents), kind)
    return row


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_that_share_a_key_are_a_row(tmp_path, layout):
    assert list(tar.read(write_tar(tmp_path / "p.tar", PAIRS, layout), "pairs")) == ROWS


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, layout):
    rng = random.Random(0)
    files = [(f"f{i}/" * rng.randint(0, 20) + f"{i}.bin", rng.randbytes(rng.randint(0, 2000))) for i in range(60)]
    path = write_tar(tmp_path / "p.tar", files, layout)
    with open(path, "rb") as file:
        found = []
        for member in members(file):
            file.seek(member.offset)
            found.append((member.name, file.read(member.size)))
    assert found == files


def test_folders_links_and_devices_are_passed_over(tmp_path):
    kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for i, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 10**9 if kind == tarfile.CHRTYPE else 0
            archive.addfile(info)
        for name, content in PAIRS[:3]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert list(tar.read(str(tmp_path / "p.tar"), "pairs")) == ROWS[:1]


def test_names_never_become_paths(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = ["../out", "/tmp/abs", "~/x", "a\\b", "C:x", "..", "a/../../b", "\u202eevil", "x" * 300, "a\nb"]
    contents = [(f"{name}.{suffix}", b"x") for name in names for suffix in ("jpg", "txt")]
    before = sorted(tmp_path.rglob("*"))
    path = write_tar(folder / "p.tar", contents)
    found = list(tar.read(path, "pairs"))
    assert [name for name, _ in found] == [f"p.tar:{name}" for name in names if name != ".."]
    assert all(row == {"image": b"x", "caption": "x"} for _, row in found)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, folder / "p.tar"])


def test_names_that_are_not_utf8_are_still_names(tmp_path):
    path = write_tar(tmp_path / "p.tar", [("\udcff.jpg", b"x"), ("\udcff.txt", b"y")], tarfile.GNU_FORMAT)
    assert list(tar.read(path, "pairs")) == [("p.tar:\\xff", {"image": b"x", "caption": "y"})]


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([("a.txt", b"x")], "null-image"),
        ([("a.gif", b"x"), ("a.txt", b"x")], "null-image"),
        ([("a.jpg", b"x"), ("a.txt", b"\xff\xfe")], "not-utf8"),
        ([("a.jpg", b"x"), ("a.json", b'{"caption": "\xff"}')], "not-utf8"),
        ([("a.jpg", b"x"), ("a.json", b'{"caption": "\\uD800"}')], "not-utf8"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "bad-json"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], "bad-json"),
        ([("a.jpg", b"x"), ("a.json", b"9" * 10_000)], "bad-json"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "bad-json"),
        ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.txt", b"x")], "duplicate-member"),
    ],
)
def test_a_bad_sample_is_named_by_reason(tmp_path, contents, reason):
    row = one(tmp_path, contents)
    assert isinstance(row, Rejected)
    assert (row.reason, row.name) == (reason, "p.tar:a")


def test_a_pair_may_lack_its_caption_which_its_kind_judges(tmp_path):
    assert one(tmp_path, [("a.jpg", b"x"), ("a.json", b'{"caption": null}')]) == {"image": b"x", "caption": None}


def test_a_large_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "LARGEST_MEMBER", 100)
    contents = [("a.jpg", b"x" * 101), ("a.txt", b"x"), ("b.jpg", b"x" * 100), ("b.txt", b"x")]
    (_, large), (_, good) = tar.read(write_tar(tmp_path / "p.tar", contents), "pairs")
    assert large.reason == "too-large"
    assert good == {"image": b"x" * 100, "caption": "x"}


def test_a_tar_cut_anywhere_gives_what_is_whole_and_then_says_so(tmp_path):
    whole = Path(write_tar(tmp_path / "whole.tar", PAIRS)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in range(0, end, 509):
        (tmp_path / "p.tar").write_bytes(whole[:length])
        *rows, (name, last) = tar.read(str(tmp_path / "p.tar"), "pairs")
        assert rows == ROWS[: len(rows)]
        assert (name, last.name, last.reason) == ("p.tar", "p.tar", "broken-tar")
        assert f"it has {length} bytes and ends" in last.message
    assert len(rows) == 2


def test_a_damaged_header_ends_a_tar_with_a_rejection(tmp_path):
    whole = bytearray(Path(write_tar(tmp_path / "p.tar", PAIRS, tarfile.GNU_FORMAT)).read_bytes())
    whole[whole.index(b"a.b/001.png")] ^= 1
    (tmp_path / "p.tar").write_bytes(whole)
    (name, broken) = list(tar.read(str(tmp_path / "p.tar"), "pairs"))[-1]
    assert (name, broken.reason) == ("p.tar", "broken-tar")
    assert "damaged" in broken.message


def test_zeros_in_the_middle_are_no_end(tmp_path):
    pairs = [(f"{i:03d}.{suffix}", b"x" * 600) for i in range(300) for suffix in ("jpg", "txt")]
    whole = Path(write_tar(tmp_path / "p.tar", pairs, tarfile.USTAR_FORMAT)).read_bytes()
    middle = whole.index(b"150.jpg")
    for zeros in (512, 1024, len(whole) - middle):
        (tmp_path / "p.tar").write_bytes(whole[:middle] + bytes(zeros) + whole[middle + zeros :])
        *rows, (name, last) = tar.read(str(tmp_path / "p.tar"), "pairs")
        assert len(rows) == 149
        assert all(isinstance(row, dict) for _, row in rows)
        assert (name, last.reason) == ("p.tar", "broken-tar")


@pytest.mark.parametrize("record", [512, 10_240, 1 << 18, 1 << 20])
def test_the_last_record_may_be_filled_with_zeros_and_no_more(tmp_path, record):
    whole = Path(write_tar(tmp_path / "p.tar", PAIRS)).read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    ended = whole + bytes(1024)
    (tmp_path / "p.tar").write_bytes(ended + bytes(-len(ended) % record))
    assert list(tar.read(str(tmp_path / "p.tar"), "pairs")) == ROWS
    for broken in (whole + bytes(512), ended + bytes(2 << 20), ended + bytes(511) + b"x"):
        (tmp_path / "p.tar").write_bytes(broken)
        assert list(tar.read(str(tmp_path / "p.tar"), "pairs"))[-1][1].reason == "broken-tar"


def test_no_mutation_of_a_tar_raises_anything_else(tmp_path):
    whole = Path(write_tar(tmp_path / "p.tar", PAIRS)).read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 0x20, 0x30, 0x37, 0x78, 0x80, 0xFF, rng.randrange(256)))
        (tmp_path / "p.tar").write_bytes(data)
        for name, row in tar.read(str(tmp_path / "p.tar"), "pairs"):
            assert isinstance(row, dict | Rejected)
            name.encode()


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, layout: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(layout)


@pytest.mark.parametrize(
    "data",
    [
        _header("a.jpg", 10**13),
        _header("a.jpg", -512),
        _header("x", 2 << 20, tarfile.XHDTYPE) + bytes(2 << 20),
        _header("x", 512, tarfile.XHDTYPE) + b"9999999999999999999 path=x\n".ljust(512, b"\0"),
        _header("x", 20, tarfile.XHDTYPE) + b"20 size=99999999999\n".ljust(512, b"\0") + _header("a.jpg", 0),
        _header("x", 11, tarfile.XHDTYPE) + b"11 size=-5\n".ljust(512, b"\0") + _header("a.jpg", 0),
        _header("a", 0, tarfile.GNUTYPE_SPARSE),
    ],
)
def test_sizes_are_checked_before_anything_is_read(tmp_path, data):
    (tmp_path / "p.tar").write_bytes(data + bytes(1024))
    with open(tmp_path / "p.tar", "rb") as file, pytest.raises(BrokenTar):
        list(members(file))


def test_what_a_tar_cannot_hold_is_said(tmp_path):
    path = write_tar(tmp_path / "p.tar", PAIRS)
    with pytest.raises(UserError, match="holds kind pairs or pdf, not 'obelics'"):
        next(tar.read(path, "obelics"))
    with pytest.raises(UserError, match="cannot be read"):
        next(tar.read(str(tmp_path / "missing.tar"), "pairs"))
