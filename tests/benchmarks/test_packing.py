import itertools
import json

import numpy as np
import pytest
from absl import flags

from benchmarks import packing
from idefics_jax.batch import BatchShape
from launch import report, stage_mixes
from launch.mixes import MIXES


@pytest.mark.parametrize(("name", "patches"), [("pairs", 1513), ("web", 2063), ("documents", 3632)])
def test_mixes_have_the_published_mean_of_patches(name, patches):
    stream = MIXES[name].documents(np.random.default_rng(1))
    grids = np.array([grid for _, images in itertools.islice(stream, 4000) for grid in images])
    assert grids.prod(1).mean() == pytest.approx(patches, rel=0.03)


@pytest.mark.parametrize("name", list(MIXES))
def test_rows_reach_the_aimed_fill(name):
    mix = MIXES[name]
    result = packing.measure(mix.documents(np.random.default_rng(2)), mix.shape, rows=60, lookahead=512, rounds=40)
    assert result.tokens >= 0.965
    assert result.patches >= 0.945
    assert result.rejected < 0.04


@pytest.mark.parametrize("name", list(stage_mixes.CONFIGS))
def test_the_rows_of_each_stage_are_full(name):
    stream, shape, lookahead, rounds = stage_mixes.stage(name)
    result = packing.measure(stream, shape, rows=200, lookahead=lookahead, rounds=rounds)
    assert result.tokens >= 0.97
    assert result.patches >= 0.95
    assert result.rejected == 0


def test_pieces_of_a_page_hold_all_of_it():
    shape = BatchShape(rows=1, tokens=2048, vision_rows=4, patches=4900, images=8)
    images = [[(27, 27)]] * 11
    pieces = list(stage_mixes.CUT["obelics"](5000, images, shape))
    assert len(pieces) > 2
    assert sum(len(grids) for _, grids in pieces) == 11
    assert sum(tokens - 2 - 66 * len(grids) for tokens, grids in pieces) == 5000
    assert all(tokens <= 2048 for tokens, _ in pieces)


def test_a_scanned_page_is_cut_between_lines_and_each_piece_has_its_image():
    shape = BatchShape(rows=1, tokens=2048, vision_rows=1, patches=4900, images=8)
    pieces = list(stage_mixes.CUT["pdf"](4995, [[(70, 52)]], shape))
    assert [(tokens - 2 - 66, grids) for tokens, grids in pieces] == [
        (1980, [(70, 52)]),
        (1980, [(70, 52)]),
        (1035, [(70, 52)]),
    ]


def test_a_page_of_images_that_no_row_holds_leaves_out_those_far_from_text():
    shape = BatchShape(rows=1, tokens=2048, vision_rows=4, patches=4900, images=8)
    pieces = list(stage_mixes.CUT["obelics"](50, [[(27, 27)]] * 20, shape))
    assert sum(len(grids) for _, grids in pieces) < 20
    assert sum(tokens - 2 - 66 * len(grids) for tokens, grids in pieces) == 50


def test_shares_are_counted_exactly_where_they_are_known():
    shape = BatchShape(rows=1, tokens=40, vision_rows=1, patches=30, images=4)
    stream = itertools.cycle([(10, [(2, 3)]), (50, [(1, 1)])])
    result = packing.measure(stream, shape, rows=5, lookahead=512, rounds=1)
    assert result.rejected == pytest.approx(0.5, abs=1e-3)
    assert result.tokens == 1.0
    assert result.patches == pytest.approx(24 / 30)
    assert result.attention == pytest.approx(30**2 / (4 * 6**2))


def test_padding_takes_the_longest_text_and_the_largest_sides():
    documents = [(10, [(2, 8)]), *[(5, [(4, 2)])] * 15]
    tokens, patches = packing.pad(documents)
    assert tokens == (10 + 15 * 5) / (16 * 10)
    assert patches == (16 + 15 * 8) / (16 * 4 * 8)


def test_numbers_are_written_as_flat_json(tmp_path, capsys):
    flags.FLAGS(["test", f"--json={tmp_path / 'out.json'}"])
    report.write_json({"a_ratio": np.float32(1.5), "n": 2})
    report.print_table(["mix", "share"], [["web", 0.25], ["documents", 1.0]])
    assert json.loads((tmp_path / "out.json").read_text()) == {"a_ratio": 1.5, "n": 2.0}
    assert capsys.readouterr().out.splitlines() == ["mix        share", "web        0.250", "documents  1.000"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
