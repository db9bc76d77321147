"""Secrets at rest open with their key and in their place, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.sealing.box import Sealer
from pulse.domain.errors import ConfigurationError

OLD, NEW = "o" * 32, "n" * 32


@given(st.binary(max_size=200), st.text(max_size=30))
def test_what_is_sealed_opens_again(secret: bytes, context: str) -> None:
    try:
        context.encode()
    except UnicodeEncodeError:
        return
    sealer = Sealer([NEW])
    sealed = sealer.seal(secret, context=context)
    assert sealer.open(sealed, context=context) == secret
    assert len(secret) < 4 or secret not in sealed


def test_twice_the_same_secret_is_not_the_same_text() -> None:
    assert Sealer([NEW]).seal(b"x", context="c") != Sealer([NEW]).seal(b"x", context="c")


def test_it_does_not_open_in_another_row() -> None:
    sealed = Sealer([NEW]).seal(b"secret", context="route/acme/r-1")
    with pytest.raises(ConfigurationError, match="changed, or moved"):
        Sealer([NEW]).open(sealed, context="route/evil/r-1")


@given(st.integers(0, 1000), st.integers(1, 255))
def test_any_change_is_noticed(where: int, flip: int) -> None:
    sealed = bytearray(Sealer([NEW]).seal(b"secret", context="c"))
    sealed[where % len(sealed)] ^= flip
    with pytest.raises(ConfigurationError):
        Sealer([NEW]).open(bytes(sealed), context="c")


@pytest.mark.parametrize("length", [0, 1, 5, 10, 28])
def test_a_text_that_was_cut_off_does_not_open(length: int) -> None:
    with pytest.raises(ConfigurationError):
        Sealer([NEW]).open(Sealer([NEW]).seal(b"secret", context="c")[:length], context="c")


def test_a_new_key_seals_and_the_old_one_still_opens() -> None:
    sealed = Sealer([OLD]).seal(b"secret", context="c")
    both = Sealer([NEW, OLD])
    assert both.open(sealed, context="c") == b"secret"
    assert not both.is_current(sealed)
    again = both.seal(b"secret", context="c")
    assert both.is_current(again)
    assert Sealer([NEW]).open(again, context="c") == b"secret"
    with pytest.raises(ConfigurationError, match="not known"):
        Sealer([NEW]).open(sealed, context="c")


@pytest.mark.parametrize("keys", [[], ["short"], [NEW, ""]])
def test_a_weak_key_is_refused(keys: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="32 characters"):
        Sealer(keys)


def test_keys_are_not_shown_by_accident() -> None:
    assert NEW not in repr(Sealer([NEW]))
