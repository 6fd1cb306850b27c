"""The idempotency key of the votes that this user casts from this machine.

Only a caller with the key of a recorded vote is told whether its vote is a repeat. The key is a random secret, and one
key serves all votes, because the server hashes it together with the voter.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from clients.output import say

_ENVIRONMENT = "TALLY_IDEMPOTENCY_KEY"


def idempotency_key() -> str:
    """The key in TALLY_IDEMPOTENCY_KEY, else the one in the user's state directory, which is made at first. Where there
    can be no such file, a new one for this process, after a line on stderr."""
    if key := os.environ.get(_ENVIRONMENT):
        return key
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()) / "tally"
    path = folder / "idempotency-key"
    try:
        with suppress(FileNotFoundError):
            return path.read_text("ascii").strip()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = folder / f"idempotency-key.{os.getpid()}"
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        # Of two processes that do this at once, the second finds the first one's key.
        with suppress(FileExistsError):
            os.link(new, path)
        new.unlink()
        return path.read_text("ascii").strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        say(f"no idempotency key is kept: {error}; to repeat these votes safely later, set {_ENVIRONMENT}")
        return secrets.token_urlsafe(32)
