"""Fuzzes command_server/_ballots.c, built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/fuzz_ballots.py SECONDS [SEED]

Makes requests that are nearly right, damages some of them, and compares what the compiled code reads with what protobuf
and the rules in Python read. A read or write out of bounds, undefined behaviour or a difference ends it with an error;
the seed and the request are printed, and the same seed makes the same requests again.
"""

import mmap
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "fuzz"
SOURCE = ROOT / "command_server" / "_ballots.c"
MODULE = "command_server._ballots"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")
# Marks the process that has the sanitizer's library loaded before everything else.
_SANITIZED = "TALLY_FUZZ_LIBRARY"
_LAST_REQUEST_BYTES = 1 << 16
_SECRET = "a secret that only the fuzzer uses, 32+"

OPTIONS = ["pizza", "soup", "o", "ä", "日本", "x" * 100, "a b", *(f"option-{number}" for number in range(12))]


def build() -> tuple[Path, str]:
    """Compiles the module with sanitizers; returns it, and the library that must be loaded first."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    library = BUILD / f"_ballots{sysconfig.get_config_var('EXT_SUFFIX')}"
    BUILD.mkdir(parents=True, exist_ok=True)
    include = sysconfig.get_path("include")
    command = [*compiler, *SANITIZERS, "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library)]
    try:
        subprocess.run(command, check=True)
        found = subprocess.run([*compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("the fuzzer needs a C compiler with AddressSanitizer, such as gcc")
    except subprocess.CalledProcessError as error:
        sys.exit(f"the fuzzer could not be built: {error}")
    return library, found.stdout.strip()


def load(library: Path) -> ModuleType:
    """Puts the sanitized module in the place of the one that command_server.ballots imports."""
    loader = ExtensionFileLoader(MODULE, str(library))
    spec = spec_from_file_location(MODULE, library, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


class Requests:
    """Random serialized requests; those of `whole` are as protobuf writes them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def whole(self) -> bytes:
        """A request in the canonical encoding, of which most votes are plain."""
        from tally.command.v1.command_service_pb2 import CastVotesRequest, Vote  # noqa: PLC0415 - after `load`

        chance = self.chance
        votes = [
            Vote(
                voter_id=self.text().decode(errors="replace"),
                option_ids=chance.choices(OPTIONS, k=chance.choice([1, 1, 1, 1, 0, 2])),
            )
            for _ in range(chance.choice([1, 2, 3, 9, 40]))
        ]
        return CastVotesRequest(
            batch_sequence=chance.choice([0, 1, -1, 1 << 62, chance.getrandbits(62)]),
            poll_id=chance.choice(["", "5f7cf027-0d9c-46ea-91f4-290a492e70cf", "5F7CF027-0D9C-46EA-91F4-290A492E70CF"]),
            votes=votes,
            idempotency_key=chance.choice(["", "", "k" * 16, "k" * 64, "k" * 65]),
        ).SerializeToString()

    def unusual(self) -> bytes:
        """A request as other writers may encode it: fields in any order, twice or unknown, numbers too long."""
        chance = self.chance
        parts = [b"\x08" + self.number(chance.getrandbits(chance.choice([7, 32, 64])))]
        parts += [self.field(2, chance.choice([b"5f7cf027-0d9c-46ea-91f4-290a492e70cf", self.text()]))]
        parts += [self.field(3, self.vote()) for _ in range(chance.choice([1, 2, 5]))]
        if chance.random() < 0.2:
            parts.append(self.field(chance.choice([2, 4, 5, 1000]), self.text()))
        if chance.random() < 0.1:
            parts.append(self.number(chance.randrange(1, 50) << 3) + self.number(chance.getrandbits(64)))
        if chance.random() < 0.3:
            chance.shuffle(parts)
        return b"".join(parts)

    def vote(self) -> bytes:
        chance = self.chance
        parts = [self.field(1, self.text())] * chance.choice([1, 1, 1, 1, 0, 2])
        for _ in range(chance.choice([1, 1, 1, 1, 0, 2])):
            parts.append(self.field(2, chance.choice(OPTIONS).encode() if chance.random() < 0.9 else self.text()))
        if chance.random() < 0.05:
            parts.append(self.field(chance.randrange(3, 3000), self.text()))
        if chance.random() < 0.2:
            chance.shuffle(parts)
        return b"".join(parts)

    def field(self, field: int, value: bytes) -> bytes:
        return self.number(field << 3 | 2, plain=True) + self.number(len(value)) + value

    def number(self, value: int, *, plain: bool = False) -> bytes:
        """A varint; now and then longer than it need be."""
        longer = 0 if plain else self.chance.choice([0] * 20 + [1, 3, 4, 8])
        encoded = bytearray()
        while value > 0x7F or longer > 0:
            encoded.append(value & 0x7F | 0x80)
            longer -= value <= 0x7F
            value >>= 7
        encoded.append(value)
        return bytes(encoded)

    def text(self) -> bytes:
        chance = self.chance
        match chance.randrange(16):
            case 0:
                return bytes(chance.randrange(128) for _ in range(chance.randrange(300)))
            case 1:
                return chance.randbytes(chance.randrange(40))
            case 2:
                return "".join(
                    chr(chance.choice([0x41, 0xE9, 0x301, 0x7FF, 0xFFFF, 0x1F600])) for _ in range(9)
                ).encode()
            case 3:
                return b"a" * chance.choice([0, 1, 127, 128, 129, 255, 256, 257, 1000])
            case 4:
                return chance.choice(
                    [b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\0", b" ada", b"ada ", b"\x7f"]
                )
        return b"voter-%d" % chance.randrange(10**6)

    def damaged(self, request: bytes) -> bytes:
        chance, data = self.chance, bytearray(request)
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            if not data:
                break
            place = chance.randrange(len(data))
            match chance.randrange(6):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    del data[place : place + chance.randrange(1, 6)]
                case 2:
                    data[place:place] = chance.randbytes(chance.randrange(1, 4))
                case 3:
                    del data[place:]
                case 4:
                    data[place] ^= 1 << chance.randrange(8)
                case 5:
                    long = [b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 9 + b"\0", b"\xff\xff\xff\xff\x0f"]
                    data[place:place] = chance.choice(long)
        return bytes(data)


class Comparison:
    """Compares the compiled code with protobuf and the rules in Python."""

    def __init__(self, compiled: ModuleType) -> None:
        from command_server import ballots  # noqa: PLC0415 - after `load`
        from contracts.voters import VoterKeys  # noqa: PLC0415

        assert ballots.compiled is compiled
        self.seen = Counter[str]()
        self._compiled = compiled
        self._ballots = ballots
        self._voters = VoterKeys(_SECRET)
        self._reader = ballots.Reader(self._voters)
        self._markings = {option: ballots.marking([number]) for number, option in enumerate(OPTIONS)}

    def request(self, data: bytes, *, canonical: bool) -> None:
        """Raises AssertionError where the compiled code reads something else. A canonical request has to be read."""
        from google.protobuf.message import DecodeError  # noqa: PLC0415 - after `load`
        from tally.command.v1.command_service_pb2 import CastVotesRequest  # noqa: PLC0415

        envelope = self._reader.envelope(data)
        if envelope is None:
            assert not canonical or b"k" * 65 in data, "a plain request was left to Python"
            self.seen["requests left to Python"] += 1
            return
        marked = self._reader.mark(data, self._markings, envelope.idempotency_key)
        try:
            request = CastVotesRequest.FromString(data)
        except DecodeError:
            # The server reads a request with such a vote, or without any, by protobuf.
            assert None in marked or not marked, "it takes what protobuf refuses"
            self.seen["requests that protobuf refuses"] += 1
            return
        read = request.batch_sequence, request.poll_id, len(request.votes), request.idempotency_key
        assert envelope == read, f"{envelope} is not {read}"
        assert len(marked) == len(request.votes)
        for ballot, vote in zip(marked, request.votes, strict=True):
            expected = self._expected(vote, request.idempotency_key)
            if ballot is None:
                assert expected is None or not canonical, f"a plain vote was left to Python: {vote}"
            else:
                assert ballot == expected, f"{ballot!r} is not {expected!r}"
            self.seen["votes left to Python" if ballot is None else "votes"] += 1

    def _expected(self, vote: Any, key: str) -> bytes | None:
        from contracts.text import voter_id_problem  # noqa: PLC0415 - after `load`

        voter_id, options = vote.voter_id, list(vote.option_ids)
        plain = voter_id.isascii() and 0 < len(voter_id) <= 256 and not voter_id_problem(voter_id)
        if not plain or len(options) != 1 or options[0] not in self._markings:
            return None
        voter_key = self._voters.voter_key(voter_id)
        end = self._ballots.keyed(self._voters.idempotency_hash(voter_key, key)) if key else b""
        return voter_key + self._markings[options[0]] + end

    def order(self, chance: random.Random) -> None:
        """Parting and sorting, beside what Python makes of it."""
        number = chance.choice([0, 1, 2, 5, 300])
        ballots = [chance.randbytes(chance.choice([16, 22, 22, 33])) for _ in range(number)]
        if chance.random() < 0.5:
            same = chance.choice([1, 8])
            ballots = [bytes([chance.randrange(3)]) * same + ballot[same:] for ballot in ballots]
        ranges = chance.choice([1, 2, 3, 7, 32, 255, 256])
        parted: list[list[bytes]] = [[] for _ in range(ranges)]
        for ballot in ballots:
            parted[ballot[0] * ranges // 256].append(ballot)
        assert self._compiled.by_range(ballots, ranges) == parted
        assert self._compiled.in_order(ballots) == sorted(ballots, key=lambda ballot: ballot[:8])
        self.seen["lists of ballots"] += 1

    def hash(self, chance: random.Random) -> None:
        """BLAKE2b, beside hashlib."""
        key, person = chance.randbytes(chance.randrange(1, 65)), chance.randbytes(chance.randrange(17))
        voter = b"v" * chance.choice([1, 2, 127, 128, 129, 255, 256])
        request = b"\x1a" + _length(len(voter) + 5 + (len(voter) > 127)) + b"\x0a" + _length(len(voter)) + voter
        request += b"\x12\x01z"
        keyed = self._compiled.keyed(key, person)
        found = self._compiled.mark(request, keyed, {"z": b"M"}, keyed, b"")
        assert found == [blake2b(voter, digest_size=16, key=key, person=person).digest() + b"M"]
        self.seen["hashes"] += 1

    def arguments(self, chance: random.Random) -> None:
        """Arguments that it must refuse, not read."""
        functions: list[tuple[Callable[..., object], tuple[object, ...]]] = [
            (self._compiled.envelope, (chance.choice(["text", None, 5, bytearray(b"x")]),)),
            (self._compiled.by_range, (chance.choice([[b"x" * 15], [None], ["a" * 30], (b"x" * 20,), None]), 32)),
            (self._compiled.by_range, ([b"x" * 16], chance.choice([0, 257, -1, "x", 1 << 70]))),
            (self._compiled.in_order, (chance.choice([[b"x" * 15], [None], [b""], (b"x" * 20,), 5]),)),
            (
                self._compiled.keyed,
                chance.choice([(b"", b""), (b"k" * 65, b""), (b"k", b"p" * 17), ("k", b""), (b"k",)]),
            ),
            (self._compiled.mark, (b"", b"short", {}, b"short", b"")),
            (self._compiled.mark, (b"\x1a\x7f", bytes(64), {}, bytes(64), b"")),
            (self._compiled.mark, (b"", bytes(64), [], bytes(64), b"")),
            (self._compiled.mark, (b"", bytes(64), {}, bytes(64), b"k" * 65)),
            (self._compiled.mark, (b"\x1a\x08\x0a\x01v\x12\x03yes", bytes(64), {"yes": 5}, bytes(64), b"")),
        ]
        function, given = chance.choice(functions)
        try:
            function(*given)
        except (TypeError, ValueError, OverflowError):
            self.seen["refused arguments"] += 1
        else:
            raise AssertionError(f"{function.__name__}{given!r} was not refused")


def _length(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 0x7F | 0x80, number >> 7])


def fuzz(library: Path, seconds: float, seed: int) -> None:
    """Compares for `seconds`. Ends the process with an error at the first difference."""
    comparison, requests = Comparison(load(library)), Requests(seed)
    # Written before each call, so that it is there when the sanitizer ends the process.
    last = BUILD / "last-request"
    last.write_bytes(bytes(_LAST_REQUEST_BYTES))
    with last.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:

        def compare(data: bytes, *, canonical: bool = False) -> None:
            memory[: 4 + len(data)] = len(data).to_bytes(4) + data
            try:
                comparison.request(data, canonical=canonical)
            except AssertionError as error:
                sys.exit(f"seed {seed}: {error}\nrequest {data.hex()}")

        until = time.monotonic() + seconds
        count = 0
        while time.monotonic() < until:
            whole, unusual = requests.whole(), requests.unusual()
            compare(whole, canonical=True)
            compare(unusual)
            for _ in range(2):
                compare(requests.damaged(whole))
                compare(requests.damaged(unusual))
            compare(requests.chance.randbytes(requests.chance.randrange(200)))
            for check in (comparison.order, comparison.hash, comparison.arguments):
                if requests.chance.random() < 0.02:
                    check(requests.chance)
            count += 7
    seen = ", ".join(f"{number:,} {name}" for name, number in sorted(comparison.seen.items()))
    print(f"seed {seed}: {count:,} requests agree ({seen})")
    missing = [
        name for name in ("votes", "votes left to Python", "hashes", "lists of ballots") if not comparison.seen[name]
    ]
    if missing:
        sys.exit(f"nothing was tried of: {', '.join(missing)}")


def main() -> None:
    """Builds the module, and fuzzes it in a process that has the sanitizer's library loaded."""
    try:
        seconds = float(sys.argv[1])
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    except (IndexError, ValueError):
        sys.exit("usage: fuzz_ballots.py SECONDS [SEED]")
    if library := os.environ.get(_SANITIZED):
        fuzz(Path(library), seconds, seed)
        return
    library_path, sanitizer = build()
    environment = os.environ | {
        _SANITIZED: str(library_path),
        "LD_PRELOAD": sanitizer,
        # Each object is an allocation of its own, so that a read past its end is seen. Python itself leaks by design.
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gen")]),
    }
    code = subprocess.run([sys.executable, __file__, str(seconds), str(seed)], env=environment, check=False).returncode
    if code:
        sys.exit(f"seed {seed} failed; the last request is in {BUILD / 'last-request'}, after its length in 4 bytes")


if __name__ == "__main__":
    main()
