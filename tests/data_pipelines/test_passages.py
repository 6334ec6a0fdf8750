"""A text falls into passages where a reader would pause, and nothing of it is lost."""

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


def test_a_word_is_never_cut():
    assert passages(f"a {'x' * 1000} b") == ["a ", f"{'x' * 1000} ", "b"]


@given(st.text(st.sampled_from("ab .\n\t"), max_size=2000))
def test_passages_put_together_are_the_text(text):
    assert "".join(passages(text)) == text
    assert all(len(passage) <= 200 or not passage[:-1].count(" ") for passage in passages(text))
