"""Files as people have them: compressed or not, from a pipe, in one of several encodings. Read as often as needed, line
by line, and never held in memory."""

import codecs
import gzip
import hashlib
import io
import lzma
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clients.failures import Failure

_MAX_LINE = 1 << 20
_CHUNK = 1 << 18
_SAMPLE_CHARACTERS = 1 << 16
_SHOWN_WORD = 40

STANDARD_INPUT = Path("-")
_OLD_WORKBOOK = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ZIP, _GZIP, _XZ = b"PK\x03\x04", b"\x1f\x8b", b"\xfd7zXZ\0"
# What an archive's other names may be: of the file's own folders, and what macOS adds.
_NO_CONTENT = re.compile(r"(^|/)(__MACOSX/.*|\.DS_Store|\._[^/]*|)$")
# How texts begin that are no table; a line of such a one must not become a voter.
_NO_TABLE = {
    "a web page": re.compile(r"[\s\ufeff]*<(!doctype|html|head|body|\?xml|table|!--)", re.IGNORECASE),
    "JSON": re.compile(r"""[\s\ufeff]*([{\[]\s*["{\[]|[{\[]\s*$)""", re.MULTILINE),
    "a text with a layout (RTF)": re.compile(r"\{\\rtf"),
    "a PDF": re.compile(r"%PDF-"),
}
_WORD_END = re.compile(rb"[\s,;|\"]")
_ARCHIVE_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)


class UnusableFile(Failure):
    """The file cannot be used; the text says where it is wrong."""


class ChangedFile(UnusableFile):
    """The file is not the one that was read before."""


class Encoding(NamedTuple):
    """How the characters of a file are written: Python's name of it, and what people are told."""

    codec: str
    told: str


class Examined(NamedTuple):
    """What a first look at a whole file found."""

    encoding: Encoding
    sample: str
    """The first 65,536 characters."""


def file_name(path: Path) -> str:
    """The file as messages name it."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def new_digest() -> "hashlib.blake2b":
    """Takes in a file's content; 32 hexadecimal digits, the same for votes.csv and votes.csv.gz."""
    return hashlib.blake2b(digest_size=16)


def is_workbook(path: Path) -> bool:
    """Whether the content is that of an .xlsx file, whatever its name."""
    with _content(path) as content:
        return _is_workbook(content)


def workbook(path: Path, most_bytes: int) -> bytes:
    """The content of an .xlsx file. Raises UnusableFile where it has more bytes."""
    with _content(path) as content:
        data = content.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UnusableFile(f"{file_name(path)}: a workbook of more than {most_bytes:,} bytes; save it as CSV UTF-8")
    return data


def examine(path: Path, encoding: str | None = None) -> Examined:
    """Reads the whole file, and finds out its encoding unless that is given. Raises UnusableFile, also where it is no
    table."""
    examined = _examined(path, encoding)
    for kind, beginning in _NO_TABLE.items():
        if beginning.match(examined.sample):
            raise UnusableFile(f"{file_name(path)}: {kind}, not a table; save it as CSV UTF-8")
    return examined


def lines(path: Path, encoding: Encoding, digest: "hashlib.blake2b") -> Iterator[str]:
    """The lines with their ends, which are LF, CRLF or CR. `digest` takes in the content as it is in the file."""
    number = 0
    try:
        with _content(path) as content:
            raw = io.BufferedReader(_Digesting(content, digest), _CHUNK)
            text = io.TextIOWrapper(raw, encoding.codec, newline="")
            while line := text.readline(_MAX_LINE):
                number += 1
                if len(line) == _MAX_LINE:
                    raise UnusableFile(f"{file_name(path)}: line {number}: longer than {_MAX_LINE:,} characters")
                yield line
    except UnicodeDecodeError:
        raise ChangedFile(f"{file_name(path)}: the file changed while it was being read") from None


def _examined(path: Path, encoding: str | None) -> Examined:
    if encoding is not None:
        try:
            codec = codecs.lookup(encoding).name
            "".encode(codec)
        except LookupError:
            raise UnusableFile(f"there is no encoding {encoding!r}; there are utf-8, utf-16, cp1252, …") from None
        return _decoded(path, Encoding(codec, f"{encoding}, as told"))
    with _content(path) as content:
        start = content.read(1 << 12)
    for mark, found in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return _decoded(path, found)
    # Of a table in UTF-16 at least the delimiters, line ends and digits have a zero for their other byte.
    if (zeros := start.count(0)) > len(start) // 10:
        in_front = start[::2].count(0)
        if max(in_front, zeros - in_front) < 0.9 * zeros:
            raise UnusableFile(f"{file_name(path)}: holds zero bytes and is no text; save it as CSV UTF-8")
        order = "BE" if 2 * in_front > zeros else "LE"
        return _decoded(path, Encoding(f"utf-16-{order.lower()}", f"UTF-16{order}"))
    try:
        return _decoded(path, Encoding("utf-8", "UTF-8"))
    except _Undecodable as not_utf8:
        if not_utf8.others:
            # A file that is UTF-8 elsewhere was damaged; another encoding would misread all the rest.
            raise UnusableFile(f"{not_utf8}: damaged, or in an encoding that --encoding has to name") from None
        told = f"Windows-1252, as it is not UTF-8 (line {not_utf8.line}: {not_utf8.word!r})"
        try:
            return _decoded(path, Encoding("cp1252", told))
        except _Undecodable:
            raise UnusableFile(f"{not_utf8}, and not Windows-1252; save it as CSV UTF-8, or see --encoding") from None


class _Undecodable(UnusableFile):
    """The file is not in this encoding: the line, the word with the byte, and whether other bytes beyond ASCII are."""

    def __init__(self, text: str, line: int, word: str, others: bool) -> None:
        super().__init__(text)
        self.line = line
        self.word = word
        self.others = others


_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: Encoding("utf-8-sig", "UTF-8"),
    codecs.BOM_UTF32_LE: Encoding("utf-32", "UTF-32"),
    codecs.BOM_UTF32_BE: Encoding("utf-32", "UTF-32"),
    codecs.BOM_UTF16_LE: Encoding("utf-16", "UTF-16"),
    codecs.BOM_UTF16_BE: Encoding("utf-16", "UTF-16"),
}


def _decoded(path: Path, encoding: Encoding) -> Examined:
    """Decodes the whole file once. Raises _Undecodable."""
    decoder = codecs.getincrementaldecoder(encoding.codec)()
    sample, line, others = "", 1, False
    # The bytes of the current line in the chunks before: how many, and the last of them.
    earlier, recent = 0, b""
    with _content(path) as content:
        while True:
            chunk = content.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # The decoder may have kept the beginning of a character in the chunk before.
                place = error.start - (len(error.object) - len(chunk))
                before = chunk[: max(place, 0)]
                in_line, number = before.rpartition(b"\n")[2], place - before.rfind(b"\n")
                if b"\n" not in before:
                    in_line, number = recent[: len(recent) + min(place, 0)] + before, earlier + place + 1
                line += before.count(b"\n")
                rest = error.object[error.start :] + content.read(_SHOWN_WORD)
                others |= not before.isascii() or _has_characters_of(encoding, content, rest)
                word = _WORD_END.split(in_line[-_SHOWN_WORD:])[-1] + rest[:1] + _WORD_END.split(rest[1:_SHOWN_WORD])[0]
                problem = f"{file_name(path)}: line {line}: not valid {encoding.told} at byte {number}"
                raise _Undecodable(problem, line, word.decode("cp1252", "replace"), others) from None
            if len(sample) < _SAMPLE_CHARACTERS:
                sample += text[: _SAMPLE_CHARACTERS - len(sample)]
            line += text.count("\n")
            end = chunk.rfind(b"\n")
            earlier = earlier + len(chunk) if end < 0 else len(chunk) - end - 1
            recent = (recent + chunk if end < 0 else chunk[end + 1 :])[-_SHOWN_WORD:]
            others |= not text.isascii()
            if not chunk:
                return Examined(encoding, sample)


def _has_characters_of(encoding: Encoding, content: BinaryIO, chunk: bytes) -> bool:
    """Whether the rest of a file has characters beyond ASCII in this encoding."""
    decoder = codecs.getincrementaldecoder(encoding.codec)("ignore")
    while chunk:
        if not decoder.decode(chunk).isascii():
            return True
        chunk = content.read(_CHUNK)
    return False


@contextmanager
def _content(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, out of whatever it is packed in. Raises UnusableFile."""
    name = file_name(path)
    try:
        with _opened(path) as file:
            start = file.read(len(_OLD_WORKBOOK))
            file.seek(0)
            suffix = path.suffix.lower()
            if start.startswith(_OLD_WORKBOOK):
                raise UnusableFile(f"{name}: an old Excel workbook (.xls); save it as .xlsx or as CSV UTF-8")
            for packed, magic in {".gz": _GZIP, ".xz": _XZ, ".zip": _ZIP, ".xlsx": _ZIP}.items():
                if suffix == packed and start and not start.startswith(magic):
                    raise UnusableFile(f"{name}: damaged, or no {packed} file in spite of its name")
            if start.startswith(_GZIP):
                with gzip.open(file) as content:
                    yield io.BufferedReader(content)
            elif start.startswith(_XZ):
                with lzma.open(file) as content:
                    yield io.BufferedReader(content)
            elif start.startswith(_ZIP) and not _is_workbook(file):
                with zipfile.ZipFile(file) as archive, archive.open(_only_name(name, archive)) as content:
                    yield io.BufferedReader(content)  # type: ignore[type-var]
            else:
                yield file
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise UnusableFile(f"{name}: damaged: {error}") from None
        raise UnusableFile(f"{name}: {error.strerror or error}") from None
    except _ARCHIVE_ERRORS as error:
        raise UnusableFile(f"{name}: damaged: {error}") from None
    except RuntimeError as error:
        # What zipfile says of an archive with a password.
        raise UnusableFile(f"{name}: {error}") from None


def _is_workbook(file: BinaryIO) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.startswith("xl/") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
    finally:
        file.seek(0)


def _only_name(name: str, archive: zipfile.ZipFile) -> str:
    names = [each for each in archive.namelist() if not _NO_CONTENT.search(each)]
    if "mimetype" in names and "content.xml" in names:
        raise UnusableFile(f"{name}: an OpenDocument spreadsheet; save it as .xlsx or as CSV UTF-8")
    if len(names) != 1:
        listed = ", ".join(repr(each) for each in names[:5]) + (", …" if len(names) > 5 else "")
        raise UnusableFile(f"{name}: a zip archive is read with one file in it; this has {len(names)}: {listed}")
    return names[0]


def _opened(path: Path) -> BinaryIO:
    if path == STANDARD_INPUT or (path.exists() and stat.S_ISFIFO(path.stat().st_mode)):
        return Path(_spooled(path).name).open("rb")
    if path.exists() and not path.is_file():
        raise UnusableFile(f"{path}: not a file that can be read twice")
    return path.open("rb")


@cache
def _spooled(path: Path) -> "tempfile._TemporaryFileWrapper[bytes]":
    """What came through a pipe, in a file that is there until the command ends: it is read more than once."""
    spool = tempfile.NamedTemporaryFile(prefix="tally-")  # noqa: SIM115 - it is open for as long as it is cached
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise UnusableFile("standard input is closed")
        shutil.copyfileobj(sys.stdin.buffer, spool)
    else:
        with path.open("rb") as pipe:
            shutil.copyfileobj(pipe, spool)
    spool.flush()
    return spool


class _Digesting(io.RawIOBase):
    """Passes a file on, and gives a digest every byte of it."""

    def __init__(self, content: BinaryIO, digest: "hashlib.blake2b") -> None:
        self._content = content
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._content.read(len(buffer))
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)
