"""Becomes a command that does not outlive its parent.

    python -I -S leash.py PARENT SIGNAL UID GID COMMAND [ARGUMENT ...]

The command gets SIGNAL when process PARENT ends, however that ends. A program of its own, rather than code between fork
and exec, because the parent has threads, and because the command may run as a user who cannot enter the folder of this
interpreter: it was loaded before the user changes.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, orphan_signal, uid, gid = map(int, sys.argv[1:5])
    command = sys.argv[5:]
    if (uid, gid) != (os.geteuid(), os.getegid()):
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        # Only now, because a change of user clears it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, orphan_signal, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    # exec keeps what is ignored: SIGPIPE, which Python ignores, and what the shell of the parent ignored.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
