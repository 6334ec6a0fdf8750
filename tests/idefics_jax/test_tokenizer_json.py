"""tokenizer.json and the sentencepiece model give the same ids, in both directions."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer

from idefics_jax import tokenizer_json
from idefics_jax.errors import UserError
from idefics_jax.tokenizer import Tokenizer, train_tokenizer

# Text without special tokens, rich in what BPE ranks disagree about: runs of spaces, common pairs, rare characters.
TEXTS = st.text(
    st.one_of(st.sampled_from("   \n\n\u2581etaoinshr01"), st.characters(exclude_categories=["Cs"])), max_size=60
).filter(lambda text: "<" not in text)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return Tokenizer(train_tokenizer(["What   digit  is this? 7", "The digits are\n\n3, 1 and 4."] * 20, 400))


@pytest.fixture(scope="session", params=["mistral", "small"])
def trio(request) -> tuple[Tokenizer, JsonTokenizer, Tokenizer]:
    """The model, its tokenizer.json in Hugging Face's library, and the model rebuilt from that file."""
    tokenizer = request.getfixturevalue(request.param)
    content = json.loads(json.dumps(tokenizer_json.to_json(tokenizer)))
    return tokenizer, JsonTokenizer.from_str(json.dumps(content)), tokenizer_json.from_json(content)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_all_three_give_the_same_ids(trio, text):
    tokenizer, theirs, rebuilt = trio
    ids = tokenizer.encode(text, at_start=True)
    assert theirs.encode(text).ids == [tokenizer.bos_id, *ids]
    assert rebuilt.encode(text, at_start=True) == ids
    assert theirs.decode(ids) == tokenizer.decode(ids) == rebuilt.decode(ids)


def test_the_rebuilt_model_keeps_its_special_ids(trio):
    tokenizer, theirs, rebuilt = trio
    assert tokenizer_json.special_tokens(rebuilt) == tokenizer_json.special_tokens(tokenizer)
    for token, name in tokenizer_json.special_tokens(tokenizer).items():
        assert theirs.token_to_id(name) == token


def test_merges_in_another_order_are_noticed_and_followed(mistral):
    content = tokenizer_json.to_json(mistral)
    assert tokenizer_json.same_ids(content, mistral)
    merges = content["model"]["merges"]
    merges.insert(0, merges.pop(merges.index(["\u2581", "\u2581"])))
    assert not tokenizer_json.same_ids(content, mistral)
    rebuilt, theirs = tokenizer_json.from_json(content), JsonTokenizer.from_str(json.dumps(content))
    text = "x  Hello"
    assert rebuilt.encode(text, at_start=True) == theirs.encode(text, add_special_tokens=False).ids
    assert rebuilt.encode(text, at_start=True) != mistral.encode(text, at_start=True)


def test_merges_written_as_strings_are_read(small):
    content = tokenizer_json.to_json(small)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    assert tokenizer_json.same_ids(content, small)
    assert tokenizer_json.from_json(content).encode("The digits", at_start=True) == small.encode(
        "The digits", at_start=True
    )


@pytest.mark.parametrize("model", [{}, {"type": "Unigram"}, {"type": "BPE", "byte_fallback": False}], ids=str)
def test_other_kinds_of_tokenizer_are_refused(model):
    with pytest.raises(UserError, match="does not hold a byte-fallback BPE"):
        tokenizer_json.from_json({"model": model})
