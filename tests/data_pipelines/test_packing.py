import hypothesis
import numpy as np
from hypothesis import strategies as st

from data_pipelines.packing import Pool, Sizes, misfit, pack_row
from idefics_jax.batch import BatchShape


def pack(documents: list[Sizes], shape: BatchShape, *, rows: int, lookahead: int, rounds: int) -> list:
    """Packs a stream of documents, each numbered, into rows."""
    stream, pool, packed = iter(enumerate(documents)), Pool(), []
    for row in range(rows):
        for number, sizes in stream:
            pool.add((number, sizes), sizes)
            if len(pool) == lookahead:
                break
        if not len(pool):
            break
        packed.append(pack_row(pool, shape, rounds=rounds, rng=np.random.default_rng((0, row))))
    return packed


documents = st.lists(
    st.builds(Sizes, st.integers(1, 40), st.lists(st.integers(1, 24), max_size=5).map(tuple)), min_size=1, max_size=40
)
shapes = st.builds(
    BatchShape,
    st.just(1),
    tokens=st.integers(20, 64),
    vision_rows=st.integers(1, 3),
    patches=st.integers(12, 30),
    images=st.integers(1, 8),
)


@hypothesis.given(documents=documents, shape=shapes, lookahead=st.integers(1, 20), rounds=st.integers(0, 6))
@hypothesis.settings(deadline=None, max_examples=150)
def test_no_budget_is_exceeded_and_no_document_lost_or_cut(documents, shape, lookahead, rounds):
    fitting = [sizes for sizes in documents if misfit(sizes, shape) is None]
    packed = pack(fitting, shape, rows=1000, lookahead=lookahead, rounds=rounds)
    for row in packed:
        assert sum(placement.item[1].tokens for placement in row) <= shape.tokens
        assert sum(len(placement.item[1].images) for placement in row) <= shape.images
        taken = np.zeros((shape.vision_rows, shape.patches), int)
        for placement in row:
            images = placement.item[1].images
            assert len(placement.vision_slots) == len(images)
            for (vision_row, first), patches in zip(placement.vision_slots, images, strict=True):
                assert first + patches <= shape.patches
                taken[vision_row, first : first + patches] += 1
        assert taken.max() <= 1
    numbers = [placement.item[0] for row in packed for placement in row]
    assert sorted(numbers) == list(range(len(fitting)))


@hypothesis.given(documents=documents, shape=shapes)
@hypothesis.settings(deadline=None, max_examples=100)
def test_a_document_is_a_misfit_exactly_if_an_empty_row_cannot_hold_it(documents, shape):
    for sizes in documents:
        pool = Pool()
        pool.add(None, sizes)
        if misfit(sizes, shape) is None:
            assert len(pack_row(pool, shape, rounds=0, rng=np.random.default_rng(0))) == 1
        else:
            assert (
                sizes.tokens > shape.tokens
                or len(sizes.images) > shape.images
                or max(sizes.images) > shape.patches
                or sum(sizes.images) + shape.vision_rows * (min(sizes.images) - 1) > shape.vision_rows * shape.patches
                or len(sizes.images) > shape.vision_rows
            )


def test_reasons_for_a_misfit_name_the_setting():
    shape = BatchShape(1, tokens=10, vision_rows=2, patches=10, images=3)
    assert misfit(Sizes(10, (10, 10)), shape) is None
    for sizes, reason, setting in [
        (Sizes(11, ()), "too-many-tokens", "raise document_tokens of the data"),
        (Sizes(1, (1, 1, 1, 1)), "too-many-images", "shape.images"),
        (Sizes(1, (11,)), "image-too-large", "shape.patches"),
        (Sizes(1, (6, 6, 6)), "too-many-patches", "shape.vision_rows"),
    ]:
        found, sentence = misfit(sizes, shape)
        assert found == reason
        assert setting in sentence


def test_every_row_begins_with_the_oldest_document():
    rng = np.random.default_rng(0)
    stream = [Sizes(int(rng.integers(1, 40)), (int(rng.integers(1, 30)),)) for _ in range(400)]
    shape = BatchShape(1, tokens=64, vision_rows=1, patches=48, images=8)
    waiting = set(range(len(stream)))
    for row in pack(stream, shape, rows=60, lookahead=30, rounds=5):
        numbers = [placement.item[0] for placement in row]
        assert numbers[0] == min(waiting)
        waiting -= set(numbers)


def test_rows_are_full_in_tokens_and_in_patches():
    rng = np.random.default_rng(0)
    stream = []
    for _ in range(4000):  # pages of 1 to 4 images, log-normal, as many patches a token as the row has
        images = tuple(int(p) for p in np.clip(rng.lognormal(4.5, 0.5, rng.integers(1, 5)), 20, 300))
        stream.append(Sizes(int(np.clip(rng.lognormal(4.4, 0.7), 10, 500)), images))
    wanted = sum(sum(sizes.images) for sizes in stream) / sum(sizes.tokens for sizes in stream)
    shape = BatchShape(1, tokens=1024, vision_rows=4, patches=round(1024 * wanted / 4), images=64)

    def useful(rounds):
        rows = pack(stream, shape, rows=120, lookahead=256, rounds=rounds)
        held = [placement.item[1] for row in rows for placement in row]
        return (
            sum(sizes.tokens for sizes in held) / (len(rows) * shape.tokens),
            sum(sum(sizes.images) for sizes in held) / (len(rows) * shape.vision_rows * shape.patches),
        )

    tokens, patches = useful(rounds=20)
    assert tokens >= 0.97
    assert patches >= 0.95
    assert sum(useful(rounds=0)) < tokens + patches


def test_documents_without_images_take_no_patches():
    pool = Pool()
    for _ in range(3):
        pool.add("text", Sizes(10, ()))
    shape = BatchShape(1, tokens=30, vision_rows=1, patches=1, images=1)
    row = pack_row(pool, shape, rounds=2, rng=np.random.default_rng(0))
    assert [placement.vision_slots for placement in row] == [(), (), ()]
