"""partition: one table decides what trains and how; two trees that share no leaf and miss none."""

import numpy as np
import pytest

from idefics_jax.param_transforms import partition
from idefics_jax.param_transforms.partition import Rule, choose, split

PARAMS = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "b": {"kernel": np.ones((3, 3))}}
ADAPTERS = {"b": {"lora_A": np.ones((3, 1)), "lora_B": np.ones((1, 3))}}


def frozen(pattern):
    return Rule(pattern, "frozen")


def trainable(pattern, factor=1.0, decay=0.0):
    return Rule(pattern, "trainable", factor, decay)


def test_first_matching_row_decides():
    chosen = choose(PARAMS, {}, (frozen("a/kernel"), trainable("a/.*"), frozen(".*")))
    trained, kept = split(PARAMS, chosen)
    assert list(trained) == ["a"]
    assert list(trained["a"]) == ["bias"]
    assert sorted(kept) == ["a", "b"]
    joined = partition.combine(trained, kept)
    assert joined["a"]["kernel"] is PARAMS["a"]["kernel"]
    assert joined["b"]["kernel"] is PARAMS["b"]["kernel"]


def test_rows_speak_of_adapters_by_the_paths_of_their_modules():
    rules = (trainable("b/lora_A", 2.0, 0.1), trainable(".*/lora_.*"), frozen(".*"))
    chosen = choose(PARAMS, ADAPTERS, rules)
    assert chosen["b/lora_A"] is rules[0]
    assert chosen["b/lora_B"] is rules[1]
    assert chosen["b/kernel"] is rules[2]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((frozen("c/.*"), frozen(".*")), r"'c/\.\*' matches no parameter"),
        ((frozen(".*"), frozen("a/.*")), r"'a/\.\*' matches no parameter"),
        ((trainable("a/.*"), trainable(".*lora.*")), "no pattern matches 'b/kernel'"),
        ((frozen("("), frozen(".*")), "not a regular expression"),
        ((frozen("kernel"), frozen(".*")), "'kernel' matches no parameter"),
        ((frozen(".*"),), r"the row '\.\*' freezes the adapter 'b/lora_A'; put a 'trainable' row"),
        ((trainable(".*"), frozen(".*")), "two rows have the same pattern"),
    ],
    ids=["no-match", "shadowed", "leaf-missed", "bad-regex", "whole-path", "frozen-adapter", "twice"],
)
def test_bad_tables_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        choose(PARAMS, ADAPTERS, rules)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", "cold"), "state 'cold'"),
        (("x", "trainable", 0.0), "learning-rate factor of 'x' is 0.0"),
        (("x", "trainable", float("nan")), "learning-rate factor of 'x' is nan"),
        (("x", "trainable", 1.0, -0.1), "weight decay of 'x' is -0.1"),
    ],
)
def test_impossible_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Rule(*row)


def test_new_rows_beside_a_table_that_trains_are_refused():
    params = {"text_model": {"embed_tokens": {"embedding": np.ones((4, 3))}}}
    rows = {"text_model": {"embed_tokens": {"new_rows": np.ones((1, 3))}}}
    choose(params, rows, (trainable(".*/new_rows"), frozen(".*")))
    with pytest.raises(
        ValueError, match="row '.*' trains the whole of 'text_model/embed_tokens/embedding', .*new_rows"
    ):
        choose(params, rows, (trainable(".*"),))


def test_table_lists_every_leaf_with_state_rate_and_decay():
    chosen = choose(PARAMS, ADAPTERS, (trainable("a/.*", 0.5, 0.1), trainable(".*/lora_.*"), frozen(".*")))
    rates = {"a/kernel": 5e-4, "a/bias": 5e-4, "b/lora_A": 1e-3, "b/lora_B": 1e-3}
    lines = partition.table(PARAMS, ADAPTERS, chosen, rates).splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        ["a/kernel", "2x3", "float64", "trainable", "0.0005", "0.1"],
        ["a/bias", "3", "float64", "trainable", "0.0005", "0.1"],
        ["b/kernel", "3x3", "float64", "frozen"],
        ["b/lora_A", "3x1", "float64", "trainable", "0.001", "0"],
        ["b/lora_B", "1x3", "float64", "trainable", "0.001", "0"],
    ]
    assert lines[-1] == "24 parameters, 15 of them trainable"
