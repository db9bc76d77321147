"""JSON on the command line: read whole and within bounds, or refused with what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from pulse.cli.json_argument import BYTES_MAX, Json, JsonArgument, explained
from pulse.domain.errors import LimitExceeded, Reason, Refusal

ARGUMENT = JsonArgument("payload")


def read(text: str, argument: JsonArgument = ARGUMENT) -> object:
    read = argument.convert(text, None, None)
    assert argument.convert(read, None, None) is read
    return read.value


def test_any_json_is_read_from_the_argument_a_file_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read(f"@{tmp_path}/a.json") == {"a": [1, None]}
    assert read("null") is None
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"[2.5]")))
    assert read("-") == [2.5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cut off"),
        ("{", "cut off"),
        ("{]", "malformed"),
        ("NaN", "malformed"),
        ("\udcff", "malformed"),
        ('{"a":1,"a":2}', "twice"),
        ('{"a":["\\u0000"]}', "payload.a[0]: U+0000"),
        ("9223372036854775808", "payload: the integer is beyond 64 bits"),
        ("[" * 100_000, "nested too deeply"),
        ("@/nowhere/a.json", "/nowhere/a.json: No such file"),
        ("@.", "Is a directory"),
    ],
)
def test_what_is_no_json_is_a_wrong_call_that_says_why(text: str, said: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        read(text)
    assert said in refused.value.message


def test_more_than_anything_could_be_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = io.BytesIO(b" " * (BYTES_MAX * 2))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=endless))
    with pytest.raises(click.BadParameter, match="longer than"):
        read("-")
    assert endless.tell() == BYTES_MAX + 1


def test_where_an_object_is_needed_nothing_else_is_taken() -> None:
    of_object = JsonArgument("desired", of_object=True)
    assert read("{}", of_object) == {}
    assert read("null", of_object) is None
    for text in ("[]", "1", '"a"', "false"):
        with pytest.raises(click.BadParameter):
            read(text, of_object)


def test_a_refusal_is_told_with_its_path_its_bound_and_what_to_do() -> None:
    too_large = LimitExceeded(Reason.TOO_LARGE, "is 9 bytes long", limit="bytes_max", value=8, field="payload.a")
    with pytest.raises(Refusal) as told, explained({Reason.TOO_LARGE: "make it shorter"}):
        raise too_large
    assert str(told.value) == "payload.a: is 9 bytes long; bytes_max is 8 (make it shorter)"
    with pytest.raises(Refusal) as told, explained({}):
        raise Refusal(Reason.CONFLICT, "there already")
    assert str(told.value) == "there already"


def test_a_json_value_that_is_a_list_stays_one() -> None:
    assert ARGUMENT.convert("[1]", None, None) == Json([1])
