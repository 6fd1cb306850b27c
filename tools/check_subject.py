"""Checks the subject of a commit message: `scope: what it changes`, at most 72 characters.

    python tools/check_subject.py FILE

FILE holds the message, as git gives it to the hook commit-msg. Exits 1 with one line where the subject does not fit.
"""

import re
import sys
from pathlib import Path

LONGEST = 72
_SUBJECT = re.compile(r"[a-z0-9][\w ,/.-]*: \S.*")
# What git writes by itself, and what a later rebase removes.
_BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ", "amend! ")


def fault(message: str) -> str:
    """What is wrong with the subject of a message, in words; empty if nothing is."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = next((line for line in lines if line.strip()), "")
    if subject.startswith(_BY_GIT):
        return ""
    if len(subject) > LONGEST:
        return f"the subject has {len(subject)} characters, and at most {LONGEST} are allowed"
    if not _SUBJECT.fullmatch(subject):
        return "the subject must be `scope: what it changes`, as in `relay: keep order after a reconnect`"
    if subject.endswith("."):
        return "the subject must not end with a full stop"
    after = lines[lines.index(subject) + 1 :]
    if after and after[0].strip():
        return "an empty line must follow the subject"
    return ""


if __name__ == "__main__":
    sys.exit(fault(Path(sys.argv[1]).read_text()) or 0)
