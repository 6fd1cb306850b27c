"""Where the lines of the log go: a file descriptor that may be full, broken or stuck.

A log is worth nothing to a voter: a line that cannot be written is lost and counted, and neither raises nor waits.
"""

import os
import select
import stat
import threading

from prometheus_client import Counter

# How long a line may wait for a reader that is slow, unless the line before it was lost already; seconds.
_PATIENCE_SECONDS = 0.02
# A file takes a whole line at once, so that lines of several processes do not mix. A pipe that select calls writable
# takes PIPE_BUF bytes without waiting.
_FILE_BYTES = 1 << 20

lost_lines = Counter("tally_log_lost_lines", "Lines of the log that could not be written.")


class LogOutput:
    """A text stream for whole lines, over a file descriptor; None: there is nothing to write to."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._losing = False
        # Whether the last line was written in part: the next one has to begin a line of its own.
        self._cut = False

    def write(self, line: str) -> None:
        """Writes a line, or counts it as lost."""
        data = line.encode(errors="backslashreplace")
        with self._lock:
            if self._cut:
                data = b"\n" + data
            written = self._write(data)
            self._losing = written < len(data)
            if written:
                self._cut = self._losing
            if self._losing:
                lost_lines.inc()

    def flush(self) -> None:
        """Nothing is kept back."""

    def _write(self, data: bytes) -> int:
        """How many of the bytes were written."""
        written = 0
        if self._descriptor is None:
            return written
        try:
            most = _FILE_BYTES if stat.S_ISREG(os.fstat(self._descriptor).st_mode) else select.PIPE_BUF
            while written < len(data):
                patience = 0 if self._losing else _PATIENCE_SECONDS
                if not select.select([], [self._descriptor], [], patience)[1]:
                    break
                written += os.write(self._descriptor, data[written : written + most])
        except (OSError, ValueError):
            # No room, no reader, or closed.
            pass
        return written
