"""What ends a command."""


class Failure(Exception):  # noqa: N818 - a command that fails is an outcome, shown as one line
    """Ends a command with exit code 1 and its text, one line, on stderr."""
