"""Settings: the order of the layers, what is refused, and that no secret is ever shown."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pulse.domain.errors import ConfigurationError
from pulse.runtime.layers import load, load_with_sources
from pulse.runtime.masking import MASK, is_secret_name, mask_password, mask_text, mask_urls
from pulse.runtime.settings import NAMES, Settings

SECRET = "s3cr3t-Zx81"


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_each_layer_covers_the_one_below(working_directory: Path) -> None:
    write(
        working_directory / ".pulse/instance.toml",
        "ingest_writers = 3\ngateway_port = 1\nhealth_port = 1\ncrash_at = 'a'",
    )
    write(working_directory / "pulse.toml", "gateway_port = 2\nhealth_port = 2\ncrash_at = 'b'")
    environment = {"PULSE_HEALTH_PORT": "3", "PULSE_CRASH_AT": "c"}
    found, sources = load_with_sources(environment=environment, flags={"crash_at": "d"})
    assert (found.ingest_writers, found.gateway_port, found.health_port, found.crash_at) == (3, 2, 3, "d")
    assert sources == {
        "ingest_writers": ".pulse/instance.toml",
        "gateway_port": "pulse.toml",
        "health_port": "PULSE_HEALTH_PORT",
        "crash_at": "flag",
    }


def test_without_any_layer_every_value_is_its_default() -> None:
    assert load_with_sources(environment={"PATH": "/bin"}) == (Settings(), {})


def test_every_default_passes_its_own_check() -> None:
    assert msgspec.convert(msgspec.structs.asdict(Settings()), Settings) == Settings()


def test_the_instance_file_is_looked_for_in_the_data_dir_of_any_layer(working_directory: Path) -> None:
    write(working_directory / "elsewhere/instance.toml", "gateway_port = 7")
    assert load(environment={"PULSE_DATA_DIR": "elsewhere"}).gateway_port == 7
    assert load(environment={}, flags={"data_dir": "elsewhere"}).gateway_port == 7
    assert load(environment={}).gateway_port == Settings().gateway_port


def test_a_named_file_replaces_the_usual_one(working_directory: Path) -> None:
    write(working_directory / "pulse.toml", "gateway_port = 1")
    write(working_directory / "other.toml", "gateway_port = 2")
    assert load(environment={"PULSE_CONFIG": "other.toml"}).gateway_port == 2


def test_the_two_urls_are_read_by_their_usual_names_too() -> None:
    found = load(environment={"NATS_URL": "nats://n:1", "DATABASE_URL": "postgresql://d/x"})
    assert (found.nats_url, found.database_url) == ("nats://n:1", "postgresql://d/x")
    assert load(environment={"NATS_URL": "nats://n:1", "PULSE_NATS_URL": "nats://n:2"}).nats_url == "nats://n:2"


def test_an_empty_variable_is_one_that_is_not_set(working_directory: Path) -> None:
    write(working_directory / "pulse.toml", "gateway_port = 2")
    environment = {"PULSE_GATEWAY_PORT": "", "NATS_URL": "", "PULSE_CONFIG": "", "DATABASE_URL": ""}
    assert load(environment=environment) == Settings(gateway_port=2)


def test_a_flag_that_is_none_was_not_given() -> None:
    assert load(environment={"PULSE_GATEWAY_PORT": "2"}, flags={"gateway_port": None}).gateway_port == 2


UNKNOWN = st.text(string.ascii_lowercase + "_", min_size=1, max_size=30).filter(
    lambda name: name not in NAMES and name != "config" and not is_secret_name(name)
)


@given(name=UNKNOWN)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_unknown_name_is_refused_in_every_layer(name: str, working_directory: Path) -> None:
    layers: list[Callable[[], object]] = [
        lambda: load(environment={f"PULSE_{name.upper()}": "1"}),
        lambda: load(environment={f"PULSE_{name.upper()}": ""}),
        lambda: load(environment={}, flags={name: "1"}),
        lambda: load(environment={"PULSE_CONFIG": "named.toml"}),
        lambda: load(environment={"PULSE_DATA_DIR": "here"}),
    ]
    write(working_directory / "named.toml", f"{name} = 1")
    write(working_directory / "here/instance.toml", f"{name} = 1")
    for layer in layers:
        with pytest.raises(ConfigurationError, match="there is no such setting"):
            layer()


def test_a_typo_is_told_what_was_probably_meant() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^PULSE_GATWAY_PORT: there is no such setting \(did you mean gateway_port\?\)$"
    ):
        load(environment={"PULSE_GATWAY_PORT": "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gateway_port", "0"),
        ("gateway_port", "65536"),
        ("gateway_port", "http"),
        ("gateway_host", ""),
        ("data_dir", "a\0b"),
        ("ingest_writers", "17"),
        ("drain_s_max", "30"),
        ("drain_s_max", "nan"),
        ("publish_timeout_s", "inf"),
        ("publish_timeout_s", "-1"),
        ("log_level", "loud"),
        ("crash_at", "ingest.committed:0"),
        ("crash_at", "Not A Step"),
        ("database_url", "mysql://u@h/d"),
        ("nats_url", ["nats://h"]),
        ("gateway_port", None),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(name: str, value: object, working_directory: Path) -> None:
    if value is None:
        write(working_directory / "pulse.toml", f"[{name}]\nx = 1")
        with pytest.raises(ConfigurationError, match=rf"pulse.toml: {name} = "):
            load(environment={})
        return
    with pytest.raises(ConfigurationError, match=rf"flag {name} = ") as raised:
        load(environment={}, flags={name: value})
    assert "\n" not in str(raised.value)


def test_a_refusal_lists_what_the_setting_may_be() -> None:
    with pytest.raises(ConfigurationError, match=r"flag log_level = 'loud': it is one of debug, info, warning, error$"):
        load(environment={}, flags={"log_level": "loud"})


def test_a_least_delay_above_the_most_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^retry_delay_s_min = 6\.0 is above"):
        load(environment={}, flags={"retry_delay_s_min": "6"})


@pytest.mark.parametrize("content", [b"gateway_port = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_refused_by_name(content: bytes, working_directory: Path) -> None:
    (working_directory / "pulse.toml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"^pulse.toml is not TOML: ") as raised:
        load(environment={})
    assert "\n" not in str(raised.value)


def test_a_named_file_that_cannot_be_read_is_refused(working_directory: Path) -> None:
    for name, why in (("absent.toml", "No such file"), (str(working_directory), "Is a directory")):
        with pytest.raises(ConfigurationError, match=f"cannot read .*: {why}"):
            load(environment={"PULSE_CONFIG": name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", f"oracle://u:{SECRET}@h/d"),
        ("database_url", [f"postgresql://u:{SECRET}@h/d"]),
        ("nats_url", {"url": f"nats://{SECRET}@h"}),
        (f"nats://u:{SECRET}@h", "x"),
        ("gateway_port", f"postgresql://u:{SECRET}@h"),
        ("gateway_port", f"password={SECRET}"),
    ],
)
def test_no_error_shows_a_secret(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(environment={}, flags={name: value})
    assert SECRET not in str(raised.value)


def test_masked_settings_show_all_but_the_secrets() -> None:
    found = Settings(
        nats_url=f"nats://u:{SECRET}@a:1,nats://{SECRET}@b:2,tls://c:3",
        database_url=f"postgresql://pulse:{SECRET}@d:5432/pulse?sslmode=require&password={SECRET}",
    ).masked()
    assert found["nats_url"] == f"nats://u:{MASK}@a:1,nats://{MASK}@b:2,tls://c:3"
    assert found["database_url"] == f"postgresql://pulse:{MASK}@d:5432/pulse?sslmode=require&password={MASK}"
    assert set(found) == NAMES
    assert found["gateway_port"] == Settings().gateway_port


@pytest.mark.parametrize(
    "url", [f"postgresql://u:{SECRET}", f"u:{SECRET}", f"nats://[{SECRET}", f"postgresql://u:{SECRET}/d@h/x@"]
)
def test_what_is_no_url_is_masked_rather_than_shown(url: str) -> None:
    assert SECRET not in mask_password(url)


SECRETS = st.text(min_size=1, max_size=20).map(lambda text: f"{SECRET}{text}{SECRET}")
HOSTS = st.sampled_from(["h", "h:5432", "10.0.0.1", "[::1]:4222", "a:1,b:2", ""])
SCHEMES = st.sampled_from(["nats", "tls", "postgresql", "postgres", "https", "s3+x"])


@given(scheme=SCHEMES, user=st.text(max_size=10), secret=SECRETS, host=HOSTS, path=st.text(max_size=20))
@example(scheme="postgresql", user="u", secret=f"{SECRET}/{SECRET}", host="h", path="d")
@example(scheme="postgresql", user="u", secret=f"{SECRET}@[{SECRET}", host="h", path="@")
def test_a_password_never_leaks_whatever_the_url(scheme: str, user: str, secret: str, host: str, path: str) -> None:
    for url in (
        f"{scheme}://{user}:{secret}@{host}/{path}",
        f"{user}:{secret}@{host}",
        f"{scheme}://{host}/{path}?x=1&password={secret}",
        f"nats://{secret.replace(':', '')}@{host}",
    ):
        assert SECRET not in mask_password(url)
        assert SECRET not in mask_urls(f"nats://a:1,{url}")


@pytest.mark.parametrize(
    "url",
    [
        "nats://127.0.0.1:4222",
        "postgresql://pulse@h:5432/pulse?sslmode=require",
        "tls://[::1]:4222",
        "postgresql://h1:1,h2:2/d",
        "",
    ],
)
def test_a_url_without_a_secret_is_shown_as_it_is(url: str) -> None:
    assert mask_password(url) == url


@pytest.mark.parametrize(
    "text",
    [
        f"cannot connect to nats://pulse:{SECRET}@h:4222, retrying",
        f"dsn='postgresql://u:{SECRET}@h/d' refused",
        f"Authorization: Bearer {SECRET}",
        f"bearer {SECRET}",
        f"{{'token': '{SECRET}', 'x': 1}}",
        f'{{"api_key":"{SECRET}"}}',
        f"password={SECRET}&x=1",
        f"password = {SECRET}",
        f"Device(token='{SECRET}', name='x')",
    ],
)
def test_text_loses_its_secrets_and_keeps_the_rest(text: str) -> None:
    masked = mask_text(text)
    assert SECRET not in masked
    assert MASK in masked


@pytest.mark.parametrize(
    "hostile", ["a" * 32_000 + "://", "token" * 6400, "?" * 32_000, "password=" + "'" * 30_000, "x://" * 8000]
)
def test_masking_takes_linear_time(hostile: str) -> None:
    """A pattern that backtracks would hang here, and pytest's limit would end it."""
    assert isinstance(mask_text(hostile), str)
    assert isinstance(mask_password(hostile), str)


def test_secret_names_are_told_from_names_about_secrets() -> None:
    assert all(
        map(is_secret_name, ("password", "X-Provision-Token", "authorization", "apiKey", "client_secret", "Set-Cookie"))
    )
    assert not any(map(is_secret_name, ("token_id", "token_count", "tenant_id", "passed", "gateway_port")))
