"""What is shown is what is trained on: runs, masks, images in place, and a picture of them."""

import dataclasses
import re

import numpy as np
from PIL import Image as PilImage

from data_pipelines import cauldron, obelics
from data_pipelines import shown_rows as show
from data_pipelines.pipeline import batches
from idefics_jax.images import decode, position_ids
from tests.data_pipelines.pictures import png


def first(config, processor):
    return next(batches(config, processor, process_index=0, process_count=1)).arrays


def talk():
    texts = [
        {"user": "what?", "assistant": "five", "source": "s"},
        {"user": "sure?", "assistant": "yes", "source": "s"},
    ]
    return {"images": [{"bytes": png(28, 56), "path": None}], "texts": texts}


def test_answers_alone_are_marked_as_trained(one_source, processor):
    batch = first(one_source([talk()], "cauldron", cauldron.SCHEMA, lookahead=1), processor)
    text = show.as_text(batch, 0, processor, colour=False)
    line = text.splitlines()[1]
    assert re.sub(r"\]\[", "", line).strip() == (
        "1. <s> User:<image 28x56> what?<end_of_utterance>\u21b5Assistant:[ five<end_of_utterance>]\u21b5User: sure?"
        "<end_of_utterance>\u21b5Assistant:[ yes<end_of_utterance></s>]"
    )


def test_every_trained_token_is_in_a_trained_run(config, processor):
    batch = first(config, processor)
    for row in range(config.shape.rows):
        shown = "".join(run.text for run in show.runs(batch, row, processor) if run.trained)
        targets = batch["tokens"][row][1:][batch["loss_weights"][row][:-1] > 0]
        assert re.sub(r"<[^>]*>", "", shown).split() == processor.decode(targets.tolist()).split()
        assert f"{len(targets)} tokens trained on" in show.figures(batch, row)


def test_an_image_is_put_together_to_the_pixels_it_had(one_source, processor):
    row = {"images": [{"bytes": png(70, 42), "path": None}], "texts": talk()["texts"]}
    batch = first(one_source([row], "cauldron", cauldron.SCHEMA, lookahead=1), processor)
    wanted = np.asarray(decode(png(70, 42), processor.image_rules))
    np.testing.assert_array_equal(show.image_of(batch, 0, 0, processor), wanted)


def test_an_image_whose_rows_share_a_position_is_put_together(processor):
    """The reference gives two rows of 25 the same position."""
    processor, size = processor.with_image_rules({"positions_per_side": 25}), processor.image_rules.patch_size
    assert len(set(position_ids(25, 1, 25))) < 25
    pixels = np.random.default_rng(0).integers(0, 256, (25 * size, 19 * size, 3), np.uint8)
    batch = {
        "patches": pixels.reshape(25, size, 19, size, 3).swapaxes(1, 2).reshape(1, 1, 25 * 19, -1),
        "patch_positions": position_ids(25, 19, 25)[None, None],
        "patch_image_ids": np.ones((1, 1, 25 * 19), np.int32),
    }
    np.testing.assert_array_equal(show.image_of(batch, 0, 0, processor), pixels)


def test_the_picture_has_each_colour_where_it_belongs(one_source, processor, tmp_path):
    plain = {"images": [None], "texts": ["all of this is learnt"], "metadata": "", "general_metadata": ""}
    page = first(one_source([plain], "obelics", obelics.SCHEMA, lookahead=1), processor)
    show.draw([page], processor, tmp_path / "page.png")
    conversation = first(one_source([talk()], "cauldron", cauldron.SCHEMA, lookahead=1), processor)
    silent = {**conversation, "loss_weights": np.zeros_like(conversation["loss_weights"])}
    show.draw([silent], processor, tmp_path / "silent.png")

    def has(name, colour):
        return bool((np.asarray(PilImage.open(tmp_path / name)) == colour).all(-1).any())

    assert has("page.png", show.TRAINED)
    assert not has("silent.png", show.TRAINED)
    assert has("silent.png", show.OTHER)
    assert has("page.png", show.DOCUMENTS[0])


def test_a_row_of_padding_alone_can_be_shown(config, processor, tmp_path):
    empty = {name: np.zeros_like(array) for name, array in first(config, processor).items()}
    assert show.as_text(empty, 0, processor, colour=True).startswith("row 0: 0 documents, 0 images, 0 of 64 tokens")
    show.draw([empty], processor, tmp_path / "empty.png")


def test_split_images_are_shown_piece_by_piece(one_source, processor):
    split = dataclasses.replace(processor.image_rules, split=True)
    other = type(processor)(processor.tokenizer, split, processor.num_latents)
    batch = first(one_source([talk()], "cauldron", cauldron.SCHEMA, lookahead=1), other)
    assert sum(run.image is not None for run in show.runs(batch, 0, other)) == 5 * batch["segment_ids"][0].max()
