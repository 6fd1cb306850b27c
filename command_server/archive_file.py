"""The archive file of one poll: its events and votes as JSON lines, compressed with gzip, which check themselves.

The first line says what the poll was, then comes a line for each event, each voter of the roll and each vote. The last
line sums them up and has the SHA-256 of all lines before it. Voters are keyed hashes, as in the write database. With
the voter secret, guesses of voter ids can be tested, so a file is as confidential as the database is.

    {"tally_archive": 1, "poll_id": "…", "state": "CERTIFIED", "version": 8, "poll": {…}}
    {"event": 1, "recorded_at": "2026-05-01T20:15:00.123456+00:00", "batch_id": null, "payload": "base64 of an Event"}
    {"voter": "hex of a ballot_key", "weight": 2}
    {"vote": "hex of a ballot_key", "choices": [0], "weight": 2, "batch_id": 4711}
    {"end": {"events": 8, "voters": 1, "votes": 1, "weight": 2, "counts": [2, 0]}, "sha256": "hex"}
"""

import gzip
import json
import os
import struct
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from tally.event.v1.event_pb2 import Event, Recount
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.ballots import option_numbers
from contracts.counting import added_votes, count_changes

FORMAT = 1
SUFFIX = ".tally-archive.jsonl.gz"


class Damaged(Exception):  # noqa: N818 - says what the file is
    """The file is not a whole archive, or what it holds does not agree with itself."""


class Summary(NamedTuple):
    """What an archive file holds, after all of it was counted."""

    poll_id: UUID
    title: str
    state: str
    # Of the last event in the file.
    version: int
    events: int
    voters: int
    # The sum of the votes' weights.
    weight: int
    recount: Recount
    digest: bytes


class _Count:
    """Counts an archive's lines as they pass, for the one who writes it and the one who reads it."""

    def __init__(self, options: int) -> None:
        self.events = self.voters = self.votes = self.weight = 0
        self.certified: Recount | None = None
        self._options = options
        self._log = Counter[int]()
        self._log_votes = 0
        self._votes = Counter[int]()

    def event(self, version: int, payload: bytes) -> None:
        self.events += 1
        if version != self.events:
            raise Damaged(f"event {self.events} is missing")
        try:
            event = Event.FromString(payload)
        except DecodeError:
            raise Damaged(f"event {version} cannot be read") from None
        if event.HasField("poll_certified"):
            self.certified = event.poll_certified.recount
        self._log_votes += added_votes(event.votes_cast)
        self._log.update(count_changes(event.votes_cast))

    def vote(self, choices: Iterable[int], weight: int) -> None:
        self.votes += 1
        self.weight += weight
        for number in choices:
            self._votes[number] += weight

    def recount(self) -> Recount:
        """What the votes come to. Raises Damaged where the events, or the certified result, tell otherwise."""
        recount = self._sum(self._votes, self.votes)
        if any(number >= self._options for number in self._votes):
            raise Damaged("a vote is for an option that the poll does not have")
        if recount != self._sum(self._log, self._log_votes):
            raise Damaged("the votes and the events tell different counts")
        if self.certified is not None and recount != self.certified:
            raise Damaged("the votes are not those that were certified")
        return recount

    def _sum(self, counts: Counter[int], votes: int) -> Recount:
        return Recount(counts=[counts[number] for number in range(self._options)], total_votes=votes)


class Writer:
    """Writes the archive file of one poll; made by `create`. Lines come in the order of its methods."""

    def __init__(self, file: gzip.GzipFile, poll_id: UUID, state: str, version: int, spec: PollSpec) -> None:
        self._file = file
        self._sha256 = sha256()
        self._poll = poll_id, spec.title, state, version
        self._count = _Count(len(spec.options))
        plain = MessageToDict(spec, preserving_proto_field_name=True)
        self._line(
            {"tally_archive": FORMAT, "poll_id": str(poll_id), "state": state, "version": version, "poll": plain}
        )

    def event(self, version: int, recorded_at: datetime, batch_id: int | None, payload: bytes) -> None:
        """The next event. Raises Damaged where it is not the next one, or cannot be read."""
        self._count.event(version, payload)
        encoded = b64encode(payload).decode()
        self._line({"event": version, "recorded_at": recorded_at.isoformat(), "batch_id": batch_id, "payload": encoded})

    def voter(self, ballot_key: bytes, weight: int) -> None:
        """A voter of the electoral roll."""
        self._count.voters += 1
        self._line({"voter": ballot_key.hex(), "weight": weight})

    def vote(self, ballot_key: bytes, choices: bytes, weight: int, batch_id: int) -> None:
        """A vote; `choices` as the write database has them. Raises Damaged for those that cannot be read."""
        try:
            numbers = option_numbers(choices)
        except struct.error:
            raise Damaged(f"the choices of vote {ballot_key.hex()} cannot be read") from None
        self._count.vote(numbers, weight)
        self._line({"vote": ballot_key.hex(), "choices": numbers, "weight": weight, "batch_id": batch_id})

    def end(self) -> Summary:
        """Writes the last line. Raises Damaged where the events are not all there, or the counts do not agree."""
        summary = _summary(self._poll, self._count, self._sha256.digest())
        self._file.write(_dump({"end": _end(self._count, summary.recount), "sha256": summary.digest.hex()}))
        return summary

    def _line(self, data: dict[str, Any]) -> None:
        line = _dump(data)
        self._sha256.update(line)
        self._file.write(line)


@contextmanager
def create(path: Path, poll_id: UUID, state: str, version: int, spec: PollSpec) -> Iterator[Writer]:
    """A file that has its name only once it is whole and on the disk; readable by its owner only."""
    partial = path.with_name(f"{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "wb") as raw:
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as file:
                yield Writer(file, poll_id, state, version, spec)
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def verify(path: Path) -> Summary:
    """Reads an archive file and counts all of its votes and events again. Raises Damaged, or OSError."""
    digest = sha256()
    head: dict[str, Any] | None = None
    count = _Count(0)
    try:
        with gzip.open(path) as file:
            for line in file:
                data = json.loads(line)
                if head is None:
                    if data.get("tally_archive") != FORMAT:
                        raise Damaged(f"it is not an archive of format {FORMAT}")
                    head = data
                    count = _Count(len(data["poll"]["options"]))
                elif "event" in data:
                    count.event(data["event"], b64decode(data["payload"], validate=True))
                elif "voter" in data:
                    count.voters += 1
                elif "vote" in data:
                    count.vote(data["choices"], data["weight"])
                elif "end" in data:
                    break
                digest.update(line)
            else:
                raise Damaged("its end is missing")
            if file.read(1):
                raise Damaged("there is something after its end")
    except (EOFError, gzip.BadGzipFile, ValueError, LookupError, TypeError, Base64Error) as error:
        raise Damaged(f"it cannot be read: {error!r}") from None
    poll = UUID(head["poll_id"]), head["poll"].get("title", ""), head["state"], head["version"]
    summary = _summary(poll, count, digest.digest())
    if data != {"end": _end(count, summary.recount), "sha256": summary.digest.hex()}:
        raise Damaged("its lines are not those that were written")
    return summary


def _summary(poll: tuple[UUID, str, str, int], count: _Count, digest: bytes) -> Summary:
    poll_id, title, state, version = poll
    if count.events != version:
        raise Damaged(f"it has {count.events:,} events of {version:,}")
    counted = count.events, count.voters, count.weight, count.recount()
    return Summary(poll_id, title, state, version, *counted, digest)


def _end(count: _Count, recount: Recount) -> dict[str, Any]:
    rows = {"events": count.events, "voters": count.voters, "votes": count.votes}
    return rows | {"weight": count.weight, "counts": list(recount.counts)}


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
