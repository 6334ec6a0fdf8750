"""partition: two trees that share no leaf and miss none."""

import numpy as np
import pytest

from idefics_jax.param_transforms import partition

PARAMS = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "b": {"kernel": np.ones((3, 3))}}


def test_first_matching_rule_decides():
    trainable, frozen = partition.partition(
        PARAMS, ((r"a/kernel", "frozen"), (r"a/.*", "trainable"), (r".*", "frozen"))
    )
    assert list(trainable) == ["a"]
    assert list(trainable["a"]) == ["bias"]
    assert sorted(frozen) == ["a", "b"]
    joined = partition.combine(trainable, frozen)
    assert joined["a"]["kernel"] is PARAMS["a"]["kernel"]
    assert joined["b"]["kernel"] is PARAMS["b"]["kernel"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("c/.*", "frozen"), (".*", "frozen")), "'c/.*' matches no parameter"),
        (((".*", "frozen"), ("a/.*", "trainable")), "'a/.*' matches no parameter"),
        ((("a/.*", "frozen"),), "no pattern matches 'b/kernel'"),
        (((".*", "cold"),), "state 'cold'"),
        ((("(", "frozen"),), "not a regular expression"),
        ((("kernel", "frozen"), (".*", "frozen")), "'kernel' matches no parameter"),
    ],
    ids=["no-match", "shadowed", "leaf-missed", "unknown-state", "bad-regex", "whole-path"],
)
def test_bad_rules_are_named(rules, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("*", r"\*")):
        partition.partition(PARAMS, rules)


def test_table_lists_every_leaf_with_its_state():
    trainable, _ = partition.partition(PARAMS, ((r"a/.*", "trainable"), (r".*", "frozen")))
    lines = partition.table(PARAMS, trainable).splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["a/kernel", "2x3", "float64", "trainable"],
        ["a/bias", "3", "float64", "trainable"],
        ["b/kernel", "3x3", "float64", "frozen"],
    ]
    assert lines[-1] == "18 parameters, 9 of them trainable"
