"""Conversations rendered as parts equal the released template rendered as a string."""

import jinja2
import pytest

from idefics_jax.chat import CHAT_TEMPLATE, chat_parts
from idefics_jax.documents import EndOfUtterance, Image, Text
from idefics_jax.errors import UserError


def text(words: str) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": [text("What?")]}],
    "image first": [{"role": "user", "content": [IMAGE, text("What?")]}],
    "text first": [{"role": "user", "content": [text("Look: "), IMAGE, IMAGE, text(" same?")]}],
    "several turns": [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("A cat.")]},
        {"role": "user", "content": [text("Colour?")]},
        {"role": "assistant", "content": [text("Black"), text(" and white.")]},
    ],
    "another role": [{"role": "system", "content": [text("Be brief.")]}, {"role": "user", "content": [text("Hi")]}],
    "empty answer": [{"role": "user", "content": [text("Hi")]}, {"role": "assistant", "content": [text("")]}],
    "image alone": [{"role": "user", "content": [IMAGE]}],
}


def spelt(part) -> str:
    return part.text if isinstance(part, Text) else "<image>" if isinstance(part, Image) else "<end_of_utterance>"


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_parts_spell_what_the_template_renders(name, prompt):
    messages = CONVERSATIONS[name]
    images = [b"%d" % i for i in range(str(messages).count("'image'"))]
    parts = chat_parts(messages, images, add_generation_prompt=prompt)
    rendered = jinja2.Template(CHAT_TEMPLATE, keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=prompt
    )
    assert "".join(map(spelt, parts)) == rendered
    assert [part.data for part in parts if isinstance(part, Image)] == images


def test_only_what_the_assistant_says_is_trained():
    parts = chat_parts(CONVERSATIONS["several turns"], [b""], add_generation_prompt=False)
    trained = "".join(map(spelt, (part for part in parts if not isinstance(part, Image) and part.trained)))
    assert trained == " A cat.<end_of_utterance> Black and white.<end_of_utterance>"


def test_the_template_is_the_released_example():
    messages = CONVERSATIONS["several turns"][:3]
    parts = chat_parts(messages, [b""], add_generation_prompt=True)
    assert "".join(map(spelt, parts)) == (
        "User:<image>What?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
        "User: Colour?<end_of_utterance>\nAssistant:"
    )
    assert sum(isinstance(part, EndOfUtterance) for part in parts) == 3


@pytest.mark.parametrize(("images", "given"), [([], 0), ([b"a", b"b"], 2)], ids=["too few", "too many"])
def test_images_must_match_the_image_entries(images, given):
    with pytest.raises(UserError, match=f"1 image entries and {given} images were given"):
        chat_parts(CONVERSATIONS["image first"], images, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": "What?"}, r"messages\[0\].content is 'What\?'"),
        ({"role": "user", "content": []}, r"messages\[0\].content is \[\]"),
        ({"role": "user"}, r"messages\[0\].content is None"),
        ({"content": [text("Hi")]}, r"messages\[0\].role is None"),
        ({"role": "user", "content": [{"type": "video"}]}, "'video'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "'text': None"),
        ({"role": "user", "content": ["Hi"]}, "holds 'Hi'"),
    ],
    ids=str,
)
def test_messages_of_another_form_are_refused(message, problem):
    with pytest.raises(UserError, match=problem):
        chat_parts([message], [], add_generation_prompt=True)
