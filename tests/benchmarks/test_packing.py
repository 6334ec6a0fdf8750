import itertools
import json

import numpy as np
import pytest
from absl import flags

from benchmarks import packing, report
from idefics_jax.batch import BatchShape


@pytest.mark.parametrize(("name", "patches"), [("pairs", 1513), ("web", 2063), ("documents", 3632)])
def test_mixes_have_the_published_mean_of_patches(name, patches):
    stream = packing.MIXES[name].documents(np.random.default_rng(1))
    grids = np.array([grid for _, images in itertools.islice(stream, 4000) for grid in images])
    assert grids.prod(1).mean() == pytest.approx(patches, rel=0.03)


@pytest.mark.parametrize("name", list(packing.MIXES))
def test_rows_reach_the_aimed_fill(name):
    mix = packing.MIXES[name]
    result = packing.measure(mix.documents(np.random.default_rng(2)), mix.shape, rows=60)
    assert result.tokens >= 0.965
    assert result.patches >= 0.945
    assert result.rejected < 0.04


def test_shares_are_counted_exactly_where_they_are_known(monkeypatch):
    monkeypatch.setattr(packing, "ROUNDS", 1)
    shape = BatchShape(rows=1, tokens=40, vision_rows=1, patches=30, images=4)
    stream = itertools.cycle([(10, [(2, 3)]), (50, [(1, 1)])])
    result = packing.measure(stream, shape, rows=5)
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
