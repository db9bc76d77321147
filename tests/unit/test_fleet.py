"""A filter names something, and says so where it does not."""

from __future__ import annotations

import msgspec
import pytest

from pulse.domain.errors import Refusal
from pulse.domain.fleet import DEVICES_MAX, Filter


@pytest.mark.parametrize(
    "text",
    [
        '{"all":true}',
        '{"devices":["d1"]}',
        '{"prefix":"a-"}',
        '{"attributes":{"n":1}}',
        '{"prefix":"a","devices":["b"]}',
    ],
)
def test_a_filter_that_names_something_is_one(text: str) -> None:
    msgspec.json.decode(text, type=Filter).check()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{}", "filter"),
        ('{"all":false}', "filter"),
        ('{"prefix":""}', "filter"),
        ('{"all":true,"prefix":"a"}', "filter.all"),
        ('{"all":true,"devices":["d1"]}', "filter.all"),
        ('{"attributes":{"n":"\\u0000"}}', "filter.attributes.n"),
    ],
)
def test_one_that_names_nothing_or_all_and_more_is_refused(text: str, field: str) -> None:
    with pytest.raises(Refusal) as raised:
        msgspec.json.decode(text, type=Filter).check()
    assert raised.value.field == field


@pytest.mark.parametrize(
    "given",
    [
        {"devices": ["a.b"]},
        {"devices": ["d"] * (DEVICES_MAX + 1)},
        {"prefix": "%"},
        {"attributes": {"": 1}},
        {"attributes": {"n": [1]}},
        {"attributes": {f"n{number}": 1 for number in range(17)}},
        {"al": True},
    ],
)
def test_what_is_beyond_its_bounds_is_no_filter(given: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, Filter)
