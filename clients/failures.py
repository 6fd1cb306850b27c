"""What ends a command."""


class Failure(Exception):  # noqa: N818 - a command that fails is an outcome, shown as one line
    """Ends a command with its exit code and its text, one line, on stderr."""

    code = 1


class WrongUsage(Failure):
    """The command line itself is wrong, or not clear enough."""

    code = 2
