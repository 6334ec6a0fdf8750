import numpy as np
import PIL.Image
import pytest
from transformers import Idefics2ImageProcessorPil, Idefics2Processor, LlamaTokenizer

from data_pipelines import cauldron
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Text
from tests.data_pipelines.pictures import png


def row(images, *turns):
    return {
        "images": [{"bytes": data, "path": None} for data in images],
        "texts": [{"user": user, "assistant": answer} for user, answer in turns],
    }


@pytest.fixture(scope="module")
def reference(mistral_model, tmp_path_factory) -> Idefics2Processor:
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(mistral_model.read_bytes())
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True, add_eos_token=False)
    return Idefics2Processor(Idefics2ImageProcessorPil(do_image_splitting=False), tokenizer)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_ids_are_those_of_the_reference_for_the_published_text(released, reference, images):
    turns = [("What is on the left?", "A cat."), ("And\nright of it?", "Nothing, 7 or 8 times.")]
    flat = (
        f"User:{'<image>' * images or ' '}What is on the left?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>"
        "\nUser: And\nright of it?<end_of_utterance>\nAssistant: Nothing, 7 or 8 times.<end_of_utterance>"
    )
    pictures = [png(400, 378) for _ in range(images)]
    parts = cauldron.parts(row(pictures, *turns), None)
    shown = [[PIL.Image.new("RGB", (400, 378))] * images] if images else None
    expected = reference(text=flat, images=shown)["input_ids"][0]
    assert released.encode(parts, add_bos=True, add_eos=False).tokens.tolist() == expected


def test_the_loss_is_on_answers_and_what_closes_them(released):
    parts = cauldron.parts(row([png(400, 378)], ("What is it?", "A cat."), ("Sure?", "Yes.")), None)
    encoded = released.encode(parts, add_bos=True, add_eos=True)
    ends = encoded.tokens == released.tokenizer.end_of_utterance_id
    trained = [encoded.trained[i] for i in np.flatnonzero(ends)]
    assert trained == [False, True, False, True]
    text = released.tokenizer.decode(encoded.tokens[encoded.trained].tolist())
    assert text.split() == ["A", "cat.", "Yes."]
    assert encoded.trained[-1]


def test_a_conversation_without_images_is_read_the_same_way():
    parts = cauldron.parts({"images": [], "texts": [{"user": "2 + 2?", "assistant": "4"}]}, None)
    assert not any(isinstance(part, Image) for part in parts)
    assert parts[0] == Text("User: ", trained=False)
    assert cauldron.parts({"images": None, "texts": [{"user": "2 + 2?", "assistant": "4"}]}, None) == parts


def test_an_image_may_lie_in_a_file(tmp_path):
    (tmp_path / "a.png").write_bytes(png(30, 30))
    stored = {"images": [{"bytes": None, "path": "a.png"}], "texts": [{"user": "?", "assistant": "!"}]}
    assert Image(png(30, 30)) in cauldron.parts(stored, str(tmp_path))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"images": [], "texts": []}, "no-turns"),
        ({"images": [], "texts": None}, "no-turns"),
        ({"images": [], "texts": [None]}, "null-text"),
        ({"images": [], "texts": [{"user": None, "assistant": "4"}]}, "null-text"),
        ({"images": [], "texts": [{}]}, "null-text"),
        ({"images": [{}], "texts": [{"user": "?", "assistant": "4"}]}, "null-image"),
        ({"images": [], "texts": [{"user": "?", "assistant": None}]}, "null-text"),
        ({"images": [], "texts": [{"user": "?", "assistant": ""}]}, "null-text"),
        ({"images": [None], "texts": [{"user": "?", "assistant": "4"}]}, "null-image"),
        ({"images": [{"bytes": None, "path": None}], "texts": [{"user": "?", "assistant": "4"}]}, "null-image"),
        ({"images": [{"bytes": None, "path": "a"}], "texts": [{"user": "?", "assistant": "4"}]}, "no-image-root"),
    ],
)
def test_rows_without_a_document_are_refused_by_reason(bad, reason):
    with pytest.raises(BadRow) as refused:
        cauldron.parts(bad, None)
    assert refused.value.reason == reason
