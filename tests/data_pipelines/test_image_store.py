"""Images by URL: what was downloaded is found, whatever form it was stored in; what was not, or has changed, is not."""

import hashlib
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import downloads, obelics
from data_pipelines.image_files import read_image
from data_pipelines.image_index import ARRAYS, HEAD, build
from data_pipelines.image_store import Images
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Text
from idefics_jax.errors import UserError
from tests.data_pipelines.stores import SCHEMA, write_parquet, write_webdataset
from tests.data_pipelines.tars import as_json, write_tar


def url(number: int) -> str:
    return f"https://example.com/{number}.jpg?ä=1"


def data(number: int) -> bytes:
    return np.random.default_rng(number).bytes(50 + number % 7)


def fetched(numbers) -> list[tuple[str, bytes | None]]:
    """Every fifth download failed."""
    return [(url(number), None if number % 5 == 0 else data(number)) for number in numbers]


def index(paths, folder, sha256="stored", processes=1) -> Images:
    build(paths, str(folder), sha256=sha256, processes=processes, keep_cut_short=False)
    return Images(str(folder))


def why_not(images: Images, address: str) -> str:
    with pytest.raises(BadRow) as refused:
        images.read(address)
    return refused.value.reason


@pytest.mark.parametrize("form", ["parquet", "tar", "tar without json"])
def test_every_image_that_was_downloaded_is_found_by_its_url_and_no_other(tmp_path, form):
    paths = []
    for number in range(3):
        numbers = range(100 * number, 100 * number + 100)
        if form == "parquet":
            paths.append(write_parquet(tmp_path / f"{number}.parquet", fetched(numbers), group=7))
        else:
            paths.append(write_webdataset(tmp_path / f"{number}.tar", fetched(numbers), with_json=form == "tar"))
    images = index(paths, tmp_path / "index")
    assert len(images) == 240
    for number in range(310):
        if number < 300 and number % 5:
            assert images.read(url(number)) == data(number)
        else:
            assert why_not(images, url(number)) == "missing-image"


def test_the_first_download_that_succeeded_counts(tmp_path):
    first = write_parquet(tmp_path / "0.parquet", [(url(1), None), (url(2), b"first"), (url(2), b"second")])
    second = write_webdataset(tmp_path / "1.tar", [(url(1), b"later"), (url(2), b"third")])
    counts = build([first, second], str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=False)
    assert counts == {"urls": 2, "repeated": 2, "failed": 1, "cut_short": 0}
    images = Images(str(tmp_path / "index"))
    assert (images.read(url(1)), images.read(url(2))) == (b"later", b"first")


def test_processes_change_nothing_about_an_index(tmp_path):
    paths = [write_parquet(tmp_path / f"{n}.parquet", fetched(range(30 * n, 30 * n + 40))) for n in range(4)]
    for processes in (1, 2):
        build(paths, str(tmp_path / f"index{processes}"), sha256="computed", processes=processes, keep_cut_short=False)
    one, two = tmp_path / "index1", tmp_path / "index2"
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in two.iterdir()
    }


def change(path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("sha256", ["stored", "computed"])
def test_bytes_that_changed_after_the_index_was_made_are_not_given_out(tmp_path, sha256):
    path = write_webdataset(tmp_path / "0.tar", [(url(1), b"as it was"), (url(2), b"unharmed")])
    images = index([path], tmp_path / "index", sha256)
    change(tmp_path / "0.tar", b"as it was", b"poisoned!")
    assert why_not(images, url(1)) == "wrong-digest"
    assert images.read(url(2)) == b"unharmed"


def test_without_digests_changed_bytes_are_given_out(tmp_path):
    path = write_webdataset(tmp_path / "0.tar", [(url(1), b"as it was")])
    images = index([path], tmp_path / "index", "none")
    change(tmp_path / "0.tar", b"as it was", b"poisoned!")
    assert images.read(url(1)) == b"poisoned!"


@pytest.mark.parametrize("name", ["0.tar", "0.parquet"])
def test_digests_of_downloads_that_were_resized_are_refused_with_what_to_give(tmp_path, name):
    row = {"url": url(1), "status": "success", "sha256": hashlib.sha256(b"as downloaded").hexdigest()}
    if name == "0.tar":
        path = write_tar(tmp_path / name, [("0.jpg", b"resized"), ("0.json", as_json(row))])
    else:
        schema = pa.schema([*(SCHEMA.field(column) for column in row), ("jpg", pa.binary())])
        path = str(tmp_path / name)
        pa.parquet.write_table(pa.Table.from_pylist([{**row, "jpg": b"resized"}], schema=schema), path)
    with pytest.raises(UserError, match="1 of its first 1 images differ .* --sha256 computed, or none"):
        index([path], tmp_path / "stored")
    assert index([path], tmp_path / "computed", "computed").read(url(1)) == b"resized"


def test_a_store_without_statuses_is_read_by_what_is_there(tmp_path):
    schema = pa.schema([("url", pa.string()), ("webp", pa.binary())])
    table = pa.Table.from_pylist([{"url": url(1), "webp": b"x"}, {"url": url(2), "webp": None}], schema=schema)
    pa.parquet.write_table(table, tmp_path / "0.parquet")
    images = index([str(tmp_path / "0.parquet")], tmp_path / "index")
    assert images.read(url(1)) == b"x"
    assert url(2) not in images


def test_names_in_a_tar_are_never_paths(tmp_path):
    members = [
        ("../../escaped.jpg", b"image"),
        ("../../escaped.json", as_json({"url": url(1)})),
        ("/etc/absolute.png", b"other"),
        ("/etc/absolute.json", as_json({"url": url(2)})),
    ]
    (tmp_path / "deep").mkdir()
    path = write_tar(tmp_path / "deep" / "0.tar", members)
    images = index([path], tmp_path / "deep" / "index")
    assert (images.read(url(1)), images.read(url(2))) == (b"image", b"other")
    assert not list(tmp_path.glob("escaped*"))


@pytest.mark.parametrize("told", [b"", b"{", b"[]", b'{"url": 3}', b'{"status": "success"}', b"\xff\xfe"])
def test_an_image_whose_url_is_not_told_is_counted_as_failed(tmp_path, told):
    members = [("0.jpg", b"image"), ("0.json", told), ("1.jpg", b"image"), ("1.json", as_json({"url": url(1)}))]
    path = write_tar(tmp_path / "0.tar", members)
    assert build([path], str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=False)["failed"] == 1


def test_a_tar_that_breaks_off_is_named_and_its_images_are_kept_only_when_told(tmp_path, capfd):
    path = write_webdataset(tmp_path / "0.tar", [(url(number), bytes(3000)) for number in range(1, 5)])
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[6].offset_data + 100
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"1 of 1 files break off, .* --keep_cut_short"):
        build([path], str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=False)
    assert f"CUT SHORT: {path}: it has " in capfd.readouterr().err
    assert not (tmp_path / "index").exists()
    counts = build([path], str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=True)
    assert (counts["urls"], counts["cut_short"]) == (1, 1)
    assert Images(str(tmp_path / "index")).read(url(1)) == bytes(3000)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_file_that_was_replaced_stops_the_run_and_one_that_is_gone_loses_its_images(tmp_path, form):
    write = write_webdataset if form == "tar" else write_parquet
    path = tmp_path / f"0.{form}"
    images = index([write(path, fetched(range(9)))], tmp_path / "index")
    write(path, fetched(range(99)))
    with pytest.raises(UserError, match="has changed since"):
        images.read(url(1))
    path.unlink()
    assert why_not(images, url(1)) == "missing-image"


def test_what_no_index_can_be_made_of_is_refused(tmp_path):
    empty = write_parquet(tmp_path / "empty.parquet", [(url(1), None)])
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "bad.parquet").write_text("PAR1")
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    urls = pa.array([b"\xff\xfe"]).view(pa.string())
    pa.parquet.write_table(pa.table({"url": urls, "jpg": [b"x"]}), tmp_path / "bytes.parquet")
    for paths, message in [
        ([empty], "no image was downloaded"),
        ([str(tmp_path / "notes.txt")], "neither .parquet nor .tar"),
        ([str(tmp_path / "bad.parquet")], "bad.parquet is not a readable parquet file"),
        ([str(tmp_path / "bytes.parquet")], "bytes.parquet cannot be read"),
        (
            [str(tmp_path / "other.parquet")],
            "has the columns a int64; it needs url string and one of jpg, png, webp binary",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            build(paths, str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=False)
    good = write_parquet(tmp_path / "good.parquet", fetched(range(9)))
    index([good], tmp_path / "index")
    with pytest.raises(UserError, match="index is there already"):
        build([good], str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=False)
    with open(tmp_path / "index" / "place.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="place.bin does not have the 112 bytes"):
        Images(str(tmp_path / "index"))
    (tmp_path / "index" / HEAD).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Images(str(tmp_path / "index"))


def test_two_builds_of_an_index_at_once_are_kept_apart_and_what_a_killed_one_left_goes(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "0.parquet", fetched(range(9)))
    read = downloads.read

    def read_while_another_begins(*arguments, **options):
        monkeypatch.setattr(downloads, "read", read)
        with pytest.raises(UserError, match="another command is at work in .*index.partial"):
            index([path], tmp_path / "index")
        return read(*arguments, **options)

    monkeypatch.setattr(downloads, "read", read_while_another_begins)
    (tmp_path / "index.partial").mkdir()
    (tmp_path / "index.partial" / "high.bin").write_bytes(bytes(99))
    assert len(index([path], tmp_path / "index")) == 7
    assert downloads.read is read
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == sorted([HEAD, *(f"{n}.bin" for n in ARRAYS)])
    assert not (tmp_path / "index.partial").exists()


def test_many_threads_read_more_files_than_stay_open(tmp_path):
    paths = [write_webdataset(tmp_path / f"{n}.tar", [(url(n), data(n))]) for n in range(1, 100)]
    images = index(paths, tmp_path / "index", "none")
    numbers = np.random.default_rng(0).integers(1, 100, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: images.read(url(number)), numbers)) == [data(n) for n in numbers]


def test_a_page_finds_its_images_in_the_index_its_image_root_names(tmp_path):
    paths = [write_webdataset(tmp_path / f"{i}.tar", fetched(range(5 * i, 5 * i + 4))) for i in range(2)]
    inputs = [argument for path in paths for argument in ("--input", path)]
    command = [sys.executable, "-m", "data_pipelines.image_store", *inputs, "--output", str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "urls 6, repeated 0, failed 0" in done.stdout
    page = {"images": [url(1), None, url(2)], "texts": [None, "words", None]}
    expected = (Image(data(1)), Text("words", trained=True), Image(data(2)))
    assert obelics.parts(page, str(tmp_path / "index")) == expected
    with pytest.raises(BadRow, match="it was not downloaded"):
        read_image(url(5), str(tmp_path / "index"))
