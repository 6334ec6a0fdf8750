"""Settings: every wrong name, type and value is one sentence that says where and what to do."""

import dataclasses
from collections.abc import Mapping

import pytest

from idefics_jax import settings
from idefics_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    name: str = "x"

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"inner.rate is {self.rate}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner
    flag: bool
    pairs: tuple[tuple[str, float], ...]
    limit: int | None
    parts: Mapping[str, Inner]


GOOD = {
    "steps": 3,
    "inner": {"rate": 1},
    "flag": True,
    "pairs": [("a", 1)],
    "limit": None,
    "parts": {"one": {"rate": 2.0, "name": "y"}},
}


def test_builds_nested_dataclasses():
    assert settings.build(Outer, GOOD, "config") == Outer(
        3, Inner(1.0), True, (("a", 1.0),), None, {"one": Inner(2.0, "y")}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "config.stepz is not a setting; did you mean 'steps'"),
        ({"steps": True}, "config.steps is True; it must be a whole number"),
        ({"steps": 1.5}, "config.steps is 1.5; it must be a whole number"),
        ({"inner": {"rate": float("nan")}}, "config.inner.rate is nan; it must be a finite number"),
        ({"inner": {"rate": True}}, "config.inner.rate is True; it must be a number"),
        ({"inner": {"rate": -1}}, "inner.rate is -1.0; it must be positive"),
        ({"inner": {}}, "config.inner.rate is missing"),
        ({"inner": 3}, "config.inner is 3; it must be a group of settings"),
        ({"flag": 1}, "config.flag is 1; it must be True or False"),
        ({"pairs": [("a",)]}, r"config.pairs\[0\] has 1 items; it needs 2"),
        ({"pairs": "ab"}, "config.pairs is 'ab'; it must be a sequence"),
        ({"limit": "3"}, "config.limit is '3'; it must be a whole number"),
        ({"parts": {"one": {"rat": 1}}}, "config.parts.one.rat is not a setting; did you mean 'rate'"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(UserError, match=message):
        settings.build(Outer, {**GOOD, **change}, "config")


def test_a_missing_setting_is_named():
    with pytest.raises(UserError, match="config.flag is missing"):
        settings.build(Outer, {name: value for name, value in GOOD.items() if name != "flag"}, "config")


def test_differences_are_listed_by_dotted_name():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert settings.differences(old, new) == ["a.c: 2 -> 5", "d: 3 -> None", "e: None -> 4"]
