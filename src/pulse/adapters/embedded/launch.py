"""What every child runs first: drop to its user, tie its life to its parent's, become the program.

    python -I -S launch.py PARENT_PID ORPHAN_SIGNAL UID GID PROGRAM [ARGUMENT…]    (UID and GID of -1: stay who you are)

A script and not a `preexec_fn`, because running Python between fork and exec can deadlock in a parent that has
threads (and CPython 3.12 warns of it). Costs about 15 ms. Standard library only: it sees neither site-packages nor
`pulse`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends to this process when the *thread* that made it ends."""
EXIT_CANNOT_LAUNCH = 127


def launch(arguments: list[str]) -> None:
    """Become the program; returns never, ends with EXIT_CANNOT_LAUNCH where it cannot."""
    parent, orphan_signal, user, group = (int(argument) for argument in arguments[:4])
    program = arguments[4:]
    os.umask(0o077)
    if user >= 0:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    # After the change of user, which clears it; before the look at the parent, or one that dies between is missed.
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, orphan_signal, 0, 0, 0):
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the parent has gone")
    # CPython ignores these two, and what is ignored stays so through exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execv(program[0], program)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    try:
        launch(sys.argv[1:])
    except OSError as error:
        sys.stderr.write(f"cannot run {sys.argv[5:6]}: {error}\n")
        sys.exit(EXIT_CANNOT_LAUNCH)
