"""The image of the Dockerfile, built by buildah, and processes in it as compose would run them, without an engine.

Where the base image cannot be pulled, a Debian of the same release takes its place, with Debian's Python of that minor
version: every step of the Dockerfile is carried out, on another base.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose_server import program
from repository import ROOT

PULL_S_MAX = 60
BUILD_S_MAX = 600
STAND_IN = "localhost/python-stand-in"
INSTALL = "apt install buildah debootstrap"
OURS_FOR_PIP = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
"""What pip needs of this machine to reach its index, where there is such a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One that is built: its root file system, and what its configuration says."""

    root: Path
    config: dict[str, Any]
    stands_in: bool
    """Whether the base is another one than the Dockerfile's."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """`arguments` as a process in a container: read-only root, a tmpfs on /tmp, the image's user, no capability.

        In the network of this machine, and with no limits: that is left to an engine.
        """
        uid, _, gid = self.config["User"].partition(":")
        root = shlex.quote(str(self.root))
        inside = [
            *("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
            *("env", "-u", "PYTHONPATH", "-C", self.config["WorkingDir"], *self.config["Env"], *arguments),
        ]
        steps = [
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",  # noqa: S108 - of the container
            f"mount -t proc proc {root}/proc",
            f"mount --bind /dev {root}/dev",
            f"exec {program('chroot', install='apt install coreutils')} {root} {shlex.join(inside)}",
        ]
        return [
            program("unshare", install="apt install util-linux"),
            "--mount",
            "--propagation=private",
            "sh",
            "-ec",
            "\n".join(steps),
        ]


@contextmanager
def built(folder: Path) -> Iterator[Image]:
    """The image of the checkout's Dockerfile; `folder` holds everything while it is in use. Needs root."""
    buildah = [
        program("buildah", install=INSTALL),
        *("--root", str(folder / "storage"), "--runroot", str(folder / "run")),
    ]
    base = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)[0]
    pulled = subprocess.run(
        [*buildah, "pull", "--quiet", f"docker.io/library/{base}"], capture_output=True, timeout=PULL_S_MAX, check=False
    )
    used = base if pulled.returncode == 0 else _stand_in(buildah, folder)
    volumes = [option for path in OURS_FOR_PIP if Path(path).exists() for option in ("--volume", f"{path}:{path}:ro")]
    options = ["--isolation", "chroot", "--network", "host", "--build-arg", f"PYTHON_IMAGE={used}", *volumes]
    _done([*buildah, "build", *options, "--tag", "pulse-under-test", str(ROOT)])
    described = json.loads(_done([*buildah, "inspect", "--type", "image", "pulse-under-test"]))
    container = _done([*buildah, "from", "pulse-under-test"]).strip()
    root = Path(_done([*buildah, "mount", container]).strip())
    try:
        yield Image(root=root, config=described["OCIv1"]["config"], stands_in=used != base)
    finally:
        _done([*buildah, "umount", container])
        shutil.rmtree(folder / "storage")


def _stand_in(buildah: list[str], folder: Path) -> str:
    """Debian's Python, with a pip that can be removed, under the name `python`."""
    rootfs = folder / "rootfs"
    _done(
        [program("debootstrap", install=INSTALL), "--variant=minbase", "--include=python3-venv", "trixie", str(rootfs)]
    )
    steps = [
        "rm /usr/lib/python3.13/EXTERNALLY-MANAGED",
        "ln -s /usr/bin/python3 /usr/local/bin/python",
        "wheel=$(echo /usr/share/python-wheels/pip-*.whl)",
        "python $wheel/pip install -q --no-index --target /usr/local/lib/python3.13/dist-packages $wheel",
    ]
    _done(["chroot", str(rootfs), "sh", "-ec", "\n".join(steps)])
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, rootfs / "etc" / name)
    container = _done([*buildah, "from", "scratch"]).strip()
    _done([*buildah, "add", "--quiet", container, str(rootfs), "/"])
    _done([*buildah, "config", "--env", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container])
    _done([*buildah, "commit", "--quiet", "--rm", container, STAND_IN])
    shutil.rmtree(rootfs)
    return STAND_IN


def _done(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SSL_"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BUILD_S_MAX, check=False, env={**environment, "LC_ALL": "C"}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
