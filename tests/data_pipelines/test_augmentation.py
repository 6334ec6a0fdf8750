"""What chance changes: by the share asked for, the same again on resuming, otherwise in another epoch."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import cauldron, pairs
from data_pipelines.augmentation import Augmentation
from data_pipelines.pipeline import DataConfig, Stage, batches
from data_pipelines.sources import SourceConfig
from idefics_jax.documents import Document, Image, Text
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png


def start(config, processor):
    return batches(config, processor, shard_index=0, shard_count=1)


def with_augmentation(config: DataConfig, **chances) -> DataConfig:
    (stage,) = config.stages
    source = dataclasses.replace(stage.sources[0], augmentation=Augmentation(**chances))
    return dataclasses.replace(config, stages=(Stage((source,)),))


def many(augmentation, count=2000):
    document = Document((Image(b"a"), Text("x"), Image(b"b")), "s", "0")
    made = [augmentation.of_document(document, np.random.default_rng((0, index))) for index in range(count)]
    return [[part for part in document.parts if isinstance(part, Image)] for document in made]


def test_splitting_is_decided_once_a_document_by_its_share():
    images = many(Augmentation(split_share=0.3))
    assert all(first.split == second.split for first, second in images)
    np.testing.assert_allclose(np.mean([first.split for first, _ in images]), 0.3, atol=0.03)


def test_upscaling_is_drawn_for_each_image_from_the_authors_triangle():
    factors = np.array([[image.upscale for image in both] for both in many(Augmentation(upscale=0.5, upscale_to=3.0))])
    enlarged = factors[factors > 1]
    np.testing.assert_allclose(len(enlarged) / factors.size, 0.5, atol=0.03)
    assert 1.5 <= enlarged.min() < 1.6
    assert 2.95 < enlarged.max() <= 3.0
    np.testing.assert_allclose(enlarged.mean(), (1.5 + 3.0 + 3.0) / 3, atol=0.03)
    assert np.any((factors[:, 0] > 1) != (factors[:, 1] > 1))


def test_nothing_is_changed_by_default():
    assert not Augmentation().is_random
    assert {(image.split, image.upscale) for both in many(Augmentation(), 5) for image in both} == {(None, 1.0)}


def rows(count):
    return [{"key": str(i), "png": png(28, 28), "caption": f"caption {i}", "url": "x"} for i in range(count)]


@pytest.mark.parametrize("threads", [0, 2])
def test_images_are_read_as_decided_and_resuming_decides_alike(one_source, processor, threads):
    config = with_augmentation(one_source(rows(6), "pairs", pairs.SCHEMA), split_share=0.5, upscale=0.5)
    config = dataclasses.replace(config, num_threads=threads, cache_mib=16, lookahead=8)
    iterator, states, packed = start(config, processor), [], []
    for _ in range(8):
        states.append(iterator.get_state())
        packed.append(next(iterator))
    # 28 pixels are 2 x 2 patches whole and split, as both rules bring a side up to 28; enlarged 3 x 3 or 4 x 4.
    counts = set()
    for batch in packed:
        for ids in batch.arrays["patch_image_ids"]:
            counts |= set(np.bincount(ids[ids > 0]).tolist()) - {0}
    assert counts >= {4, 9}
    for step in (0, 3, 6):
        resumed = start(dataclasses.replace(config, cache_mib=0, num_threads=0), processor)
        resumed.set_state(states[step])
        again = next(resumed)
        assert again.documents == packed[step].documents
        for name, array in packed[step].arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)


def test_turns_come_in_another_order_in_another_epoch_and_none_is_lost(one_source, processor):
    texts = [{"user": f"what is {n}?", "assistant": f"{n}", "source": "s"} for n in range(4)]
    row = {"images": [], "texts": texts}
    shape = dataclasses.replace(one_source([row], "cauldron", cauldron.SCHEMA).shape, tokens=256)
    config = one_source([row], "cauldron", cauldron.SCHEMA, shape=shape, lookahead=2)
    packed = next(start(with_augmentation(config, shuffle_turns=True), processor))
    orders = set()
    for tokens, segments in zip(packed.arrays["tokens"], packed.arrays["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            text = processor.decode(tokens[segments == segment].tolist())
            orders.add(tuple(int(rest[0]) for rest in text.split("what is ")[1:]))
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}


def test_impossible_chances_are_refused():
    with pytest.raises(UserError, match="augmentation.upscale is 1.5"):
        Augmentation(upscale=1.5)
    with pytest.raises(UserError, match="augmentation.upscale_to is 1.0; it must be at least 1.5"):
        Augmentation(upscale_to=1.0)
    with pytest.raises(UserError, match="shuffle_turns is for kind cauldron, not 'pairs'"):
        SourceConfig("mine", "pairs", ("x",), augmentation=Augmentation(shuffle_turns=True))
