"""A text falls into passages where a reader would pause, and nothing of it is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.passages import passages


def test_a_passage_ends_at_a_line_else_a_sentence_else_a_word():
    line, sentence, words = "a line\n" * 20, "It ends here. " * 20, "word " * 60
    assert passages(line + words)[0] == line
    assert all(passage.endswith("here. ") for passage in passages(sentence))
    assert len(passages(sentence)) == 2
    assert [len(passage) for passage in passages(words)] == [200, 100]


def test_a_text_that_is_short_is_one_passage():
    for text in ("", "two\nlines. And more.", "x" * 200):
        assert passages(text) == [text]


def test_a_word_of_ascii_is_never_cut():
    assert passages(f"a {'x' * 1000} b") == ["a ", f"{'x' * 1000} ", "b"]


@pytest.mark.parametrize("sentence", ["吾輩は猫である。", "你是谁？", "「走れ！」"])
def test_sentences_without_spaces_end_a_passage(sentence):
    found = passages(sentence * 100)
    assert len(found) > 1
    assert all(len(passage) <= 200 and passage.endswith(sentence) for passage in found)


@pytest.mark.parametrize("character", ["猫", "e\u0301", "か\u3099", "ที่", "\U0001f469\u200d\U0001f52c"])
def test_a_text_without_an_end_is_cut_between_characters(character):
    found = passages(character * 500)
    assert "".join(found) == character * 500
    assert len(found) > 2
    assert all(150 < len(passage) <= 200 and not len(passage) % len(character) for passage in found[:-1])


@given(st.text(st.sampled_from("ab .\n\t。\u0301"), max_size=2000))
def test_passages_put_together_are_the_text(text):
    assert "".join(passages(text)) == text
    assert all(len(passage) <= 200 or not passage[:-1].count(" ") for passage in passages(text))
