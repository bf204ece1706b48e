"""API keys: what the file may say, what follows from it, and what is wrong with others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config.keys import Caller, Group, digest_of, entry_text, new_key, parse_keys
from service.errors import ConfigError

HEX = "0" * 64


def test_what_is_written_for_a_key_is_what_is_read() -> None:
    key = new_key()
    keys = parse_keys(entry_text("shop", key, (Group.INFERENCE, Group.METRICS), ("fraud-*",)))
    assert keys.callers == {digest_of(key): Caller("shop", frozenset({Group.INFERENCE, Group.METRICS}), ("fraud-*",))}


def test_two_keys_are_never_the_same_and_are_long() -> None:
    assert new_key() != new_key()
    assert len(new_key()) > 43


def test_whoever_shows_no_key_may_ask_for_health_and_nothing_else() -> None:
    """Unless the file says otherwise: also that they may not even do that."""
    nobody = parse_keys("").anonymous
    assert [group for group in Group if nobody.may(group)] == [Group.HEALTH]
    assert not nobody.reaches("m")
    assert not any(parse_keys("[anonymous]\ngroups = []").anonymous.may(group) for group in Group)
    open_to_all = parse_keys('[anonymous]\ngroups = ["inference"]\nmodels = ["public-*"]').anonymous
    assert open_to_all.reaches("public-digits")
    assert not open_to_all.reaches("digits")


@pytest.mark.parametrize(
    ("patterns", "model", "reached"),
    [
        (("fraud",), "fraud", True),
        (("fraud",), "fraud2", False),
        (("fraud-*",), "fraud-shop", True),
        (("fraud-*",), "Fraud-shop", False),
        (("a", "b?"), "b1", True),
        ((), "a", False),
        (("*",), "a", True),
        (("*",), "", True),
        (("a*",), "", False),
    ],
)
def test_models_are_patterns(patterns: tuple[str, ...], model: str, reached: bool) -> None:
    """A call that names no model is about all of them."""
    caller = Caller("c", frozenset({Group.INFERENCE}), patterns)
    assert caller.reaches(model) is reached
    assert caller.reaches(model) is reached


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[key", "not TOML"),
        ("[[keys]]", "unknown 'keys'; did you mean 'key'?"),
        ("key = 3", "expected [[key]] tables"),
        (f'[[key]]\nsha256 = "{HEX}"\ngroups = []', "key[0].name: expected a text"),
        (f'[[key]]\nname = "a"\nsha256 = "{HEX}"', "key[0].groups: missing"),
        (f'[[key]]\nname = "a"\nsha256 = "{HEX}"\ngroups = ["infer"]\n', "did you mean 'inference'?"),
        (f'[[key]]\nname = "a"\nsha256 = "{HEX}"\ngroups = ["inference"]\n', "key[0].models: missing"),
        (f'[[key]]\nname = "a"\nsha256 = "{HEX}"\ngroups = "metrics"', "key[0].groups: expected a list"),
        ('[[key]]\nname = "a"\nsha256 = "abc"\ngroups = []', "key[0].sha256: expected 64 hexadecimal digits"),
        ('[[key]]\nname = "a"\ngroups = []', "key[0].sha256: expected a text"),
        (f'[[key]]\nname = "a"\nsha256 = "{HEX}"\ngroups = []\n' * 2, "key[1].sha256: is that of 'a' already"),
        (f'[[key]]\nname = "a"\nsha256 = "{HEX}"\ngroups = []\nmodel = "a"', "did you mean 'models'?"),
        ("anonymous = 3", "anonymous: expected a table"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text)
    assert said in str(caught.value)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    """Whatever a file holds, it is keys or a `ConfigError`."""
    try:
        keys = parse_keys(text)
    except ConfigError:
        return
    assert keys.anonymous.name == "anonymous"


@given(st.text(min_size=1, max_size=20), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3))
def test_any_name_and_pattern_survives_the_file(name: str, models: list[str]) -> None:
    keys = parse_keys(entry_text(name, "k", (Group.INFERENCE,), tuple(models)))
    assert keys.callers[digest_of("k")] == Caller(name, frozenset({Group.INFERENCE}), tuple(models))
