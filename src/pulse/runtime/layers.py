"""Where a setting's value comes from: defaults < instance < file < environment < flags.

    defaults      `runtime/settings.py`; every bound stands here with a concrete value and its unit in its name
    instance      `<data_dir>/instance.toml`, which a running `pulse up` leaves so that the other commands find it
    file          `pulse.toml` in the working directory, or the one that `PULSE_CONFIG` names
    environment   `PULSE_<NAME>`, and `NATS_URL` and `DATABASE_URL` by those names
    flags         `--set name=value` and the named flags of a command

An unknown name in any layer is refused: a typo must not become a default. An empty environment variable counts as one
that is not set. No error line shows a secret.
"""

from __future__ import annotations

import difflib
import errno
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from pulse.domain.errors import ConfigurationError
from pulse.runtime.masking import mask_text
from pulse.runtime.settings import NAMES, Settings, shown

ENVIRONMENT_PREFIX = "PULSE_"
ENVIRONMENT_BY_OWN_NAME = {"NATS_URL": "nats_url", "DATABASE_URL": "database_url"}
CONFIG_VARIABLE = "PULSE_CONFIG"
INSTANCE_FILE = "instance.toml"
CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Settings).items() if get_origin(kind) is Literal}
"""What a setting may be, of those that are no more than a few words or numbers."""


class Given(NamedTuple):
    """One value of one layer, before it is checked; `where` is what the operator would have to change."""

    source: str
    name: str
    value: object
    where: str


def load(*, environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings:
    """The settings alone; see `load_with_sources`."""
    return load_with_sources(environment=environment, flags=flags)[0]


def load_with_sources(
    *, environment: Mapping[str, str], flags: Mapping[str, object] | None = None, with_instance: bool = True
) -> tuple[Settings, dict[str, str]]:
    """Read every layer and check it; returns the settings, and for each that is no default the layer it came from.

    Without `with_instance` the layer of a running `pulse up` is left out: what starts a system does not look for one.

    A relative `data_dir` is below the working directory. A flag that is None was not given. Raises ConfigurationError
    for an unknown name, a value of the wrong type or out of bounds, and a file that cannot be read; the message names
    the layer and the value at fault.
    """
    named_file = environment.get(CONFIG_VARIABLE, "")
    given = [
        *_file_layer(Path(named_file or "pulse.toml"), must_exist=bool(named_file)),
        *_environment_layer(environment),
        *(Given("flag", name, value, f"flag {name}") for name, value in (flags or {}).items() if value is not None),
    ]
    for each in given:
        _check(each)
    data_dir = msgspec.convert(_merged(given), Settings, strict=False).data_dir
    instance = list(_file_layer(Path(data_dir) / INSTANCE_FILE, must_exist=False)) if with_instance else []
    for each in instance:
        _check(each)
    given = [*instance, *given]
    settings = msgspec.convert(_merged(given), Settings, strict=False)
    least, most = settings.retry_delay_s_min, settings.retry_delay_s_max
    if least > most:
        raise ConfigurationError(f"retry_delay_s_min = {least} is above retry_delay_s_max = {most}")
    return settings, {each.name: each.source for each in given}


def _merged(given: Sequence[Given]) -> dict[str, object]:
    return {each.name: each.value for each in given}


def _environment_layer(environment: Mapping[str, str]) -> Iterator[Given]:
    for key, name in ENVIRONMENT_BY_OWN_NAME.items():
        if environment.get(key):
            yield Given(key, name, environment[key], key)
    for key, value in environment.items():
        name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key.startswith(ENVIRONMENT_PREFIX) and key != CONFIG_VARIABLE and (value or name not in NAMES):
            yield Given(key, name, value, key)


def _file_layer(path: Path, *, must_exist: bool) -> Iterator[Given]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if not must_exist and error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {mask_text(str(error))}") from error
    for name, value in content.items():
        yield Given(str(path), name, value, f"{path}: {mask_text(name)}")


def _check(given: Given) -> None:
    if given.name not in NAMES:
        nearest = difflib.get_close_matches(given.name, NAMES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "`pulse settings` lists them"
        raise ConfigurationError(f"{mask_text(given.where)}: there is no such setting", hint=hint)
    try:
        msgspec.convert({given.name: given.value}, Settings, strict=False)
    except msgspec.ValidationError as error:
        text = shown(given.name, given.value if isinstance(given.value, str) else repr(given.value))
        why = str(error).partition(" - at ")[0]
        if given.name in CHOICES:
            why = "it is one of " + ", ".join(map(str, CHOICES[given.name]))
        raise ConfigurationError(f"{given.where} = {text!r}: {why}") from error
