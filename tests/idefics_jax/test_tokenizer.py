"""Ids on the real Mistral tokenizer against transformers, and text that tries to be a control token."""

import shutil

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from idefics_jax.errors import UserError
from idefics_jax.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer

TEXTS = {
    "plain": "Hello world",
    "empty": "",
    "leading space": " Hello",
    "trailing space": "Hello ",
    "one space": " ",
    "newline": "\nHello\n\nworld\r\n\ttab",
    "word boundary sign": "\u2581Hello",
    "accents": "Ça va, naïve façade? É\u0301",
    "scripts": "日本語のテキスト العربية हिन्दी",
    "emoji": "😀🧿👩\u200d👩\u200d👧",
    "byte fallback": "\x00\x1b\u0378𒀀",
    "spelt bytes": "<0x0A>",
    "no-break space": "\u00a0x\u3000y",
    "byte order mark": "\ufeffx",
    "digits": "1234567 3.14159",
    "code": "def f(x): return x**2 # <b>bold</b>",
}


@pytest.fixture(scope="session")
def bare(mistral_model, tmp_path_factory) -> LlamaTokenizer:
    """transformers' own reading of a folder with nothing but tokenizer.model."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(mistral_model, folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True, add_eos_token=False)


@pytest.fixture(scope="session")
def by_score(mistral_model) -> LlamaTokenizer:
    """transformers' tokenizer with merges ranked by sentencepiece's scores, as in the released tokenizer.json."""
    spec = sentencepiece_model_pb2.ModelProto.FromString(mistral_model.read_bytes())
    vocab = {piece.piece: index for index, piece in enumerate(spec.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in spec.pieces})
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=False)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_equal_the_reference(name, mistral, bare):
    text = TEXTS[name]
    assert mistral.encode(text, at_start=True) == bare(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\u2581aeinot.")), max_size=60))
@settings(max_examples=500, deadline=None)
def test_ids_equal_the_reference_for_any_text(mistral, by_score, text):
    assume(not any(special in text for special in ("<unk>", "<s>", "</s>")))  # control tokens to the reference
    assert mistral.encode(text, at_start=True) == by_score(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("spaces", range(1, 40))
def test_runs_of_spaces_rank_by_score(spaces, mistral, by_score):
    # From a bare tokenizer.model transformers 5.23 ranks these merges first instead (see tokenizer_json.py).
    text = "x" + " " * spaces + "Hello"
    assert mistral.encode(text, at_start=True) == by_score(text, add_special_tokens=False)["input_ids"]


def test_only_the_opening_text_gets_a_word_boundary(mistral):
    assert mistral.encode("Hello", at_start=True) == [22557]
    assert mistral.encode(" Hello", at_start=True) == [22557]
    assert mistral.encode("Hello", at_start=False) == [16230]


def test_ids_of_the_special_tokens_are_the_released_ones(mistral):
    assert (mistral.unk_id, mistral.bos_id, mistral.eos_id, mistral.pad_id) == (0, 1, 2, 0)
    assert (mistral.fake_token_id, mistral.image_token_id, mistral.end_of_utterance_id) == (32000, 32001, 32002)
    assert mistral.vocab_size == 32003


@given(
    st.lists(
        st.one_of(st.sampled_from([*CONTROL_TOKENS, "<s>", "</s>", "<unk>", "<", ">"]), st.text(max_size=5)), max_size=8
    )
)
@settings(max_examples=300, deadline=None)
def test_no_text_becomes_a_control_token(mistral, pieces):
    text = "".join(pieces)
    ids = mistral.encode(text, at_start=True)
    assert ids == mistral.encode_spans(text, at_start=True)[0]
    assert all(token not in (mistral.unk_id, mistral.bos_id, mistral.eos_id) for token in ids)
    assert all(token < mistral.fake_token_id for token in ids)
    if not text.startswith((" ", "\u2581")):
        assert mistral.decode(ids) == text.replace("\u2581", " ")


def test_spans_name_the_character_an_id_begins_at(mistral):
    text = "Hi 🧿 there"
    ids, begins = mistral.encode_spans(text, at_start=True)
    assert [mistral.piece(i) for i in ids] == [
        "\u2581Hi",
        "\u2581",
        "<0xF0>",
        "<0x9F>",
        "<0xA7>",
        "<0xBF>",
        "\u2581there",
    ]
    assert begins == [0, 2, 3, 3, 3, 3, 4]
    assert mistral.encode_spans(text, at_start=False)[1] == [0, 2, 3, 3, 3, 3, 4]


def test_surrogates_become_the_replacement_character(mistral):
    for text in ("a\ud800b", "a\udc00\ud800b", "\ud83d\ude00"):
        ids, begins = mistral.encode_spans(text, at_start=True)
        assert max(begins) < len(text)
        assert set(mistral.decode(ids)) <= {"a", "b", "\ufffd"}


def test_decoding_drops_special_tokens(mistral, bare):
    ids = [1, 22557, 32000, 32001, 32000, 28705, 1526, 32002, 13, 2, 0]
    assert mistral.decode(ids) == bare.decode([i for i in ids if 2 < i < 32000]) == "Hello  world\n"


def test_a_million_characters_without_a_space_are_encoded(mistral):
    assert mistral.decode(mistral.encode("ab" * 500_000, at_start=True)) == "ab" * 500_000


@given(text=st.text(alphabet=st.sampled_from(" x\n=-*\u00e9\u4e2d\U0001f468")).map(lambda text: text * 20))
def test_no_id_stands_for_more_than_the_longest_piece(mistral, text):
    assert len(text) <= len(mistral.encode(text, at_start=True)) * mistral.longest_piece


def test_training_is_deterministic_and_small():
    texts = ["What digit is this? 7", "The digits are 3, 1 and 4."] * 20
    model = train_tokenizer(texts, 400)
    assert model == train_tokenizer(texts, 400)
    tokenizer = Tokenizer(model)
    assert tokenizer.vocab_size <= 403
    assert tokenizer.decode(tokenizer.encode("The digit 7 é", at_start=True)) == "The digit 7 é"


def test_loading_names_what_is_wrong(tmp_path, mistral_model):
    with pytest.raises(UserError, match="absent.model does not exist"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "cut.model").write_bytes(mistral_model.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut.model: 1000 bytes"):
        Tokenizer.load(tmp_path / "cut.model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "unigram"}, "not of type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
        ({"bos_id": -1}, "lacks an unk, bos or eos"),
        ({"user_defined_symbols": ["<image>"]}, "holds <image> as a piece"),
    ],
    ids=str,
)
def test_models_that_would_break_the_rules_are_refused(change, message, tmp_path):
    flags = {"model_type": "bpe", "normalization_rule_name": "identity", "vocab_size": 300, "byte_fallback": True}
    prefix = tmp_path / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from, 1 2 3"] * 20),
        model_prefix=str(prefix),
        hard_vocab_limit=False,
        minloglevel=2,
        **{**flags, **change},
    )
    with pytest.raises(UserError, match=message):
        Tokenizer.load(f"{prefix}.model")
