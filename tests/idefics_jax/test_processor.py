"""Documents to ids and batches, against Idefics2Processor with the same tokenizer."""

import io
import shutil

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, LlamaTokenizer
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor

from idefics_jax.batch import BatchShape
from idefics_jax.chat import chat_parts
from idefics_jax.documents import EndOfUtterance, Image, Text
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules, RejectedImage
from idefics_jax.processor import Processor

# 27 x 27 patches at the released rules, 2 x 3 at the small ones.
RNG = np.random.default_rng(0)
PICTURES = [PIL.Image.fromarray(RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)) for _ in range(3)]
SMALL = {"patch_size": 14, "longest_edge": 42, "shortest_edge": 28, "positions_per_side": 3, "max_pixels": 10_000}


def png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


DATA = [png(picture) for picture in PICTURES]
IMAGE, OTHER, THIRD = (Image(data) for data in DATA)
END = EndOfUtterance()


@pytest.fixture(scope="session", params=[False, True], ids=["whole", "split"])
def pair(request, mistral, tmp_path_factory) -> tuple[Processor, AutoProcessor]:
    """Ours with small images, and transformers' from the folder ours saves."""
    ours = Processor(mistral, ImageRules(**SMALL, split=request.param), 5)
    folder = tmp_path_factory.mktemp("processor")
    ours.save(folder)
    return ours, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def bare(mistral_model, tmp_path_factory) -> Idefics2Processor:
    """transformers' processor on a folder with nothing but tokenizer.model."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(mistral_model, folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True, add_eos_token=False)
    return Idefics2Processor(Idefics2ImageProcessorPil(), tokenizer, image_seq_len=5)


def flat(parts) -> str:
    """The string the reference is given for the same document."""
    names = {Image: "<image>", EndOfUtterance: "<end_of_utterance>"}
    return "".join(part.text if isinstance(part, Text) else names[type(part)] for part in parts)


DOCUMENTS = {
    "plain": [Text("Hello world")],
    "nothing": [],
    "empty text": [Text("")],
    "image alone": [IMAGE],
    "image then text": [IMAGE, Text("What is this?")],
    "image then a space": [IMAGE, Text(" What is this?")],
    "image then two spaces": [IMAGE, Text("  What is this?")],
    "image then a tag": [IMAGE, Text("<b>bold</b>")],
    "image then a line break": [IMAGE, Text("\nWhat?")],
    "image then a no-break space": [IMAGE, Text("\u00a0What?")],
    "image then digits": [IMAGE, Text("12 apples")],
    "image then emoji": [IMAGE, Text("😀 and 🧿")],
    "text then image": [Text("Look at"), IMAGE],
    "text, space, image": [Text("Look at "), IMAGE],
    "space then image": [Text(" "), IMAGE],
    "adjacent": [IMAGE, OTHER],
    "three adjacent": [Text("a"), IMAGE, OTHER, THIRD, Text("b")],
    "adjacent over an empty text": [IMAGE, Text(""), OTHER],
    "apart by a space": [IMAGE, Text(" "), OTHER],
    "apart by a line break": [IMAGE, Text("\n"), OTHER],
    "interleaved": [Text("One"), IMAGE, Text("two"), OTHER, Text(" three\n\n"), THIRD, Text("four.")],
    "end right after an image": [IMAGE, END, Text("\nNext")],
    "end between images": [IMAGE, END, OTHER],
    "ends in a row": [Text("a"), END, END, Text("b")],
    "split words": [Text("Hel"), Text("lo wor"), Text("ld"), IMAGE, Text("Wh"), Text("at?")],
    "trailing space": [Text("Hello  "), IMAGE, Text("bye ")],
    "scripts": [Text("日本語"), IMAGE, Text("العربية"), END, Text("हिन्दी")],
    "bytes": [Text("\x00\x1b"), IMAGE, Text("\x07𒀀")],
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_ids_equal_the_reference(pair, name):
    ours, theirs = pair
    parts = DOCUMENTS[name]
    expected = theirs(text=flat(parts))["input_ids"][0]
    assert ours.encode(parts, add_bos=True, add_eos=False).tokens.tolist() == expected
    assert ours.encode(parts, add_bos=False, add_eos=True).tokens.tolist() == [*expected[1:], 2]


@pytest.mark.parametrize("name", sorted(DOCUMENTS.keys() - {"image then two spaces"}))
def test_ids_equal_the_reference_on_nothing_but_the_model_file(mistral, bare, name):
    """The exception is transformers' own reading of runs of spaces, which its tokenizer.json mends."""
    ours = Processor(mistral, ImageRules(**SMALL, split=False), 5)
    expected = bare(text=flat(DOCUMENTS[name]))["input_ids"][0]
    assert ours.encode(DOCUMENTS[name], add_bos=True, add_eos=False).tokens.tolist() == expected


WORDS = st.text(st.one_of(st.sampled_from("  \n<.\u2581aet1"), st.characters(exclude_categories=["Cs"])), max_size=8)
PARTS = st.lists(
    st.one_of(WORDS.filter(lambda text: ">" not in text).map(Text), st.sampled_from([IMAGE, OTHER, END])), max_size=7
)


@given(parts=PARTS)
@settings(max_examples=150, deadline=None)
def test_ids_equal_the_reference_for_any_document(pair, parts):
    ours, theirs = pair
    assert ours.encode(parts, add_bos=True, add_eos=False).tokens.tolist() == theirs(text=flat(parts))["input_ids"][0]


def test_conversation_equals_the_reference(pair):
    ours, theirs = pair
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Compare:"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Both are noise.\nIndeed."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    parts = chat_parts(messages, DATA, add_generation_prompt=True)
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)
    expected = theirs(text=rendered, images=PICTURES)
    assert ours.encode(parts, add_bos=True, add_eos=False).tokens.tolist() == expected["input_ids"][0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_the_reference(pair, side):
    ours, theirs = pair
    documents = [
        [Text("A long question about this picture:"), IMAGE],
        [IMAGE, OTHER, Text("Same?")],
        [Text("No image")],
    ]
    batch, shape = ours(documents, pad_side=side)
    images = [[PICTURES[0]], PICTURES[:2]]
    expected = theirs(text=[flat(d) for d in documents], padding=True, padding_side=side)
    np.testing.assert_array_equal(batch["tokens"] * batch["segment_ids"], expected["input_ids"])
    np.testing.assert_array_equal(batch["segment_ids"], expected["attention_mask"])
    pixels = theirs.image_processor(images, return_tensors="np")
    for row, pictures in enumerate(images):
        for number in range(len(pictures) * ours.image_rules.images_per_image):
            mask = pixels["pixel_attention_mask"][row, number].astype(bool)
            theirs_pixels = pixels["pixel_values"][row, number][:, : mask[:, 0].sum(), : mask[0].sum()]
            vision_row, place = np.nonzero(batch["patch_image_ids"][row] == number + 1)
            np.testing.assert_allclose(batch["patches"][row, vision_row, place], patched(theirs_pixels), atol=1e-3)
    assert batch["image_mask"].sum(1).tolist() == [k * ours.image_rules.images_per_image for k in (1, 2, 0)]
    assert shape.rows == 3
    assert shape.tokens == batch["tokens"].shape[1]


def patched(pixels: np.ndarray) -> np.ndarray:
    """Normalised [3, h, w] to the numbers 0..255 of [patches, 588]."""
    _, height, width = pixels.shape
    patches = pixels.reshape(3, height // 14, 14, width // 14, 14).transpose(1, 3, 2, 4, 0)
    return (patches.reshape(-1, 588) / 2 + 0.5) * 255


def test_released_counts_of_image_tokens(released):
    tokens = released.encode([IMAGE], add_bos=False, add_eos=False).tokens
    assert (len(tokens), (tokens == 32001).sum(), (tokens == 32000).sum()) == (66, 64, 2)
    rules = ImageRules(**{**SMALL, "longest_edge": 42}, split=True)
    tokens = Processor(released.tokenizer, rules, 64).encode([IMAGE], add_bos=False, add_eos=False).tokens
    assert (len(tokens), (tokens == 32001).sum(), (tokens == 32000).sum()) == (326, 320, 6)


def test_an_id_is_trained_as_the_text_it_begins_in(released):
    parts = [Text("Assis", False), Text("tant:", False), Text(" Hel"), Text("lo", False), Text(" there"), END]
    encoded = released.encode(parts, add_bos=True, add_eos=True)
    pieces = [released.tokenizer.piece(i) for i in encoded.tokens[:-2]]
    assert pieces == ["<s>", "\u2581Assistant", ":", "\u2581Hello", "\u2581there"]
    assert encoded.trained.tolist() == [False, False, False, True, True, True, True]


def test_the_space_after_an_image_is_trained_as_its_text(released):
    for flag in (True, False):
        encoded = released.encode([IMAGE, Text("What", flag), Text("?", not flag)], add_bos=True, add_eos=False)
        assert encoded.trained[-2:].tolist() == [flag, not flag]
        assert not encoded.trained[:-2].any()


def test_each_byte_of_a_rare_character_is_trained_with_it(released):
    encoded = released.encode([Text("a"), Text("🧿", False), Text("b")], add_bos=False, add_eos=False)
    assert encoded.trained.tolist() == [True, False, False, False, False, True]


@given(st.lists(st.sampled_from(["<image>", "<end_of_utterance>", "<fake_token_around_image>", "</s>", "<s>", " "])))
@settings(max_examples=100, deadline=None)
def test_text_cannot_forge_a_control_token(released, pieces):
    text = "".join(pieces) + "x"
    encoded = released.encode([Text(text), IMAGE, Text(text), END], add_bos=True, add_eos=True)
    counts = {int(token): int((encoded.tokens == token).sum()) for token in (1, 2, 32000, 32001, 32002)}
    assert counts == {1: 1, 2: 1, 32000: 2, 32001: 64, 32002: 1}
    assert len(encoded.images) == len(encoded.grids) == 1


def test_loss_weights_stand_one_token_before_what_they_train(released):
    parts = [Text("Q", False), IMAGE, Text(" A"), END]
    batch, _ = released([parts], pad_side="left")
    tokens, weights = batch["tokens"][0], batch["loss_weights"][0]
    assert [int(tokens[t + 1]) for t in np.nonzero(weights)[0]] == [*tokens[-2:]]
    assert weights[-1] == 0


def test_a_given_shape_is_filled_and_the_rest_is_padding(released):
    shape = BatchShape(rows=3, tokens=200, vision_rows=2, patches=1500, images=4)
    batch, same = released([[IMAGE, OTHER, THIRD, Text("Go")], [Text("Hi")]], pad_side="right", shape=shape)
    assert same == shape
    assert {name: array.shape for name, array in batch.items()} == {
        "tokens": (3, 200),
        "segment_ids": (3, 200),
        "positions": (3, 200),
        "loss_weights": (3, 200),
        "patches": (3, 2, 1500, 588),
        "patch_image_ids": (3, 2, 1500),
        "patch_positions": (3, 2, 1500),
        "image_mask": (3, 4),
    }
    counts = [[int((batch["patch_image_ids"][0, row] == n).sum()) for n in (1, 2, 3)] for row in (0, 1)]
    assert counts == [[729, 729, 0], [0, 0, 729]]
    assert all(not array[2].any() for array in batch.values())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Text("word " * 20)], "document 0 has 22 tokens and a row holds batch.tokens = 20"),
        ([IMAGE, Text(" "), IMAGE, Text(" "), IMAGE], "document 0 has 3 images and a row holds batch.images = 2"),
        ([IMAGE, OTHER], "finds no room in batch.vision_rows = 1 rows of 9"),
    ],
    ids=["tokens", "images", "patches"],
)
def test_documents_that_do_not_fit_are_refused_with_numbers(mistral, parts, message):
    ours = Processor(mistral, ImageRules(**SMALL, split=False), 2)
    shape = BatchShape(rows=1, tokens=20, vision_rows=1, patches=9, images=2)
    with pytest.raises(UserError, match=message):
        ours([parts], pad_side="left", shape=shape)


def test_an_image_larger_than_a_vision_row_is_refused(mistral):
    ours = Processor(mistral, ImageRules(**SMALL, split=False), 2)
    shape = BatchShape(rows=1, tokens=20, vision_rows=2, patches=5, images=2)
    with pytest.raises(RejectedImage, match="2 x 3 = 6 patches and a vision row holds batch.patches = 5") as caught:
        ours([[IMAGE]], pad_side="left", shape=shape)
    assert caught.value.reason == "too-many-patches"


def test_arguments_out_of_range_are_refused(released):
    with pytest.raises(UserError, match="pad_side is 'up'"):
        released([[Text("Hi")]], pad_side="up")
    with pytest.raises(UserError, match="2 documents do not fit batch.rows = 1"):
        released(
            [[Text("Hi")]] * 2,
            pad_side="left",
            shape=BatchShape(rows=1, tokens=9, vision_rows=1, patches=1, images=1),
        )
    with pytest.raises(UserError, match="batch.patch_dim is 12; patches of side 14 have 588"):
        released(
            [[Text("Hi")]],
            pad_side="left",
            shape=BatchShape(rows=1, tokens=9, vision_rows=1, patches=1, images=1, patch_dim=12),
        )
    with pytest.raises(UserError, match="a part is 'H'; it must be Text"):
        released(["Hi"], pad_side="left")
    with pytest.raises(UserError, match="num_latents is True"):
        Processor(released.tokenizer, released.image_rules, True)


def test_a_bad_image_is_refused_before_anything_is_decoded(released):
    with pytest.raises(RejectedImage, match="0 bytes"):
        released([[IMAGE, Image(b""), Text("Hi")]], pad_side="left")


def test_decoding_equals_the_reference(pair):
    ours, theirs = pair
    parts = [Text("User:"), IMAGE, Text("Two  spaces, é 🧿?"), END, Text("\nAssistant: Yes.")]
    ids = ours.encode(parts, add_bos=True, add_eos=True).tokens
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
