"""What is said of a dead letter to programs: by the control API, and by the command line with `--json`."""

from __future__ import annotations

import base64

import msgspec

from pulse.domain.dead_letter import Letter, Summary, parse_headers


class LetterDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A letter whole; its body is `text` where it is UTF-8, else `base64`."""

    dead_letter: Summary
    headers: dict[str, str]
    encoding: str
    body: str
    died_again_as: tuple[int, ...]


def document(letter: Letter) -> LetterDocument:
    """A letter for programs."""
    try:
        encoding, body = "text", letter.body.decode()
    except UnicodeDecodeError:
        encoding, body = "base64", base64.b64encode(letter.body).decode()
    headers = {
        name: value.encode("utf-8", "backslashreplace").decode()
        for name, value in parse_headers(letter.headers).items()
    }
    return LetterDocument(
        dead_letter=letter.summary, headers=headers, encoding=encoding, body=body, died_again_as=letter.died_again_as
    )
