"""`pulse account`: who may sign in to the console, until they may no more."""

from __future__ import annotations

import json
import re
import subprocess

import httpx
import pytest

from pulse_up import Instance

PASSWORD = "correct horse battery"


def account(running: Instance, *arguments: str, password: str = "") -> subprocess.CompletedProcess[str]:
    """`pulse account …` with a password on its standard input."""
    return subprocess.run(
        running.command("account", *arguments),
        cwd=running.folder,
        env=running.environment,
        input=f"{password}\n",
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def signs_in(running: Instance, name: str, password: str) -> bool:
    """Whether a browser gets in that way."""
    with httpx.Client(base_url=running.ui_url, headers={"accept": "text/html"}, timeout=30, trust_env=False) as browser:
        found = re.search(r'name="form_token" value="([^"]+)"', browser.get("/sign-in").text)
        assert found
        form = {"form_token": found[1], "account": name, "password": password}
        answer = browser.post("/sign-in", data=form, headers={"origin": running.ui_url})
        assert answer.status_code in (303, 401), answer.text
        return answer.status_code == 303


def test_an_account_is_made_gets_another_password_and_is_ended(running: Instance) -> None:
    made = account(running, "add", "grace", "--tenant", "demo", "--read-only", "--password-stdin", password=PASSWORD)
    assert (made.returncode, made.stderr) == (0, "")
    assert running.ui_url in made.stdout
    assert signs_in(running, "grace", PASSWORD)
    again = account(running, "add", "grace", "--operator", "--password-stdin", password=PASSWORD)
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)

    other = f"another {PASSWORD}"
    assert account(running, "password", "grace", "--password-stdin", password=other).returncode == 0
    assert not signs_in(running, "grace", PASSWORD)
    assert signs_in(running, "grace", other)

    listed = json.loads(account(running, "list", "--json").stdout)["accounts"]
    (grace,) = [each for each in listed if each["name"] == "grace"]
    assert (grace["key"]["tenant_id"], grace["key"]["read_only"]) == ("demo", True)
    assert "argon2" not in json.dumps(listed)
    assert "in force" in account(running, "list").stdout

    assert account(running, "revoke", "grace").returncode == 0
    assert not signs_in(running, "grace", other)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("add", "x"), 2, "--tenant TENANT_ID, or --operator"),
        (("add", "x", "--operator", "--tenant", "demo"), 2, "--tenant TENANT_ID, or --operator"),
        (("add", "x", "--operator", "--password-stdin"), 1, "password"),
        (("add", "no name", "--operator", "--password-stdin"), 1, "a name is 1 to 64"),
        (("revoke", "nobody"), 1, "nobody"),
    ],
)
def test_what_an_account_command_cannot_do_says_why(
    running: Instance, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = account(running, *arguments, password="short")
    assert done.returncode == code
    assert said in done.stderr
