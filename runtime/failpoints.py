"""Named places where a test can kill the process, to show what a crash there leaves behind."""

import os
import signal

_ARMED = os.environ.get("TALLY_FAILPOINT", "")


def failpoint(name: str) -> None:
    """Kills this process, as SIGKILL does, where the variable TALLY_FAILPOINT names this place; else does nothing."""
    if name == _ARMED:
        os.kill(os.getpid(), signal.SIGKILL)
