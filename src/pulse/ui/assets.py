"""The files that pages load: our own, and those of two libraries that were fetched at installation.

None of the libraries' code is in this repository. `libraries.json` names their files and the SHA-512 of each; a file
that is missing, or is another one, is not served, and the pages say what does not work without it.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

STATIC = Path(__file__).parent / "static"
LIBRARIES_FILE = Path(__file__).parent / "libraries.json"
COMPRESSED_FROM_BYTES = 1024
KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


class LibraryFile(msgspec.Struct, frozen=True):
    """One file of a library: what pages call it, where pip has put it, and what it is."""

    name: str
    path: str
    sha512: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A file in memory, and its name by content, under which browsers may keep it for ever."""

    address: str
    content_type: str
    body: bytes
    compressed: bytes | None


class Assets:
    """All files by address; `missing` are the libraries' that are not there as they should be."""

    def __init__(self, libraries: Path) -> None:
        found = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.is_file()}
        self.missing: list[str] = []
        for each in library_files():
            body = _verified(libraries / each.path, each.sha512)
            if body is None:
                self.missing.append(each.name)
            else:
                found[each.name] = body
        self._by_name = {name: _asset(name, body) for name, body in found.items()}
        self.by_address: Mapping[str, Asset] = {asset.address: asset for asset in self._by_name.values()}

    def address(self, name: str) -> str:
        """Where pages load `name`; empty where it is missing."""
        asset = self._by_name.get(name)
        return "" if asset is None else asset.address


def library_files() -> list[LibraryFile]:
    """What `libraries.json` names."""
    return msgspec.json.decode(LIBRARIES_FILE.read_bytes(), type=list[LibraryFile])


def _verified(path: Path, sha512: str) -> bytes | None:
    try:
        body = path.read_bytes()
    except OSError:
        return None
    return body if hashlib.sha512(body).hexdigest() == sha512 else None


def _asset(name: str, body: bytes) -> Asset:
    stem, _, suffix = name.rpartition(".")
    version = b64encode(hashlib.sha256(body).digest(), b"-_")[:12].decode()
    compressed = gzip.compress(body, 9, mtime=0) if len(body) >= COMPRESSED_FROM_BYTES else None
    kind = KINDS.get(f".{suffix}") or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Asset(address=f"/static/{stem}.{version}.{suffix}", content_type=kind, body=body, compressed=compressed)
