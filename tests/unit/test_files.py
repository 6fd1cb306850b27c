"""Files as people have them: how they are written is found out, and whatever bytes come, they are read or refused."""

import io
import random
import zipfile
from pathlib import Path

import openpyxl
import pytest

from clients import files
from clients.ballots import BallotFile
from clients.failures import Failure
from clients.files import Encoding, UnusableFile, examine, lines, new_digest
from clients.voters import RollFile


def read(path: Path, encoding: Encoding) -> str:
    return "".join(lines(path, encoding, new_digest()))


@pytest.mark.parametrize(
    ("codec", "told"),
    [
        ("utf-8", "UTF-8"),
        ("utf-8-sig", "UTF-8"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("cp1252", "Windows-1252, as it is not UTF-8 (line 2: 'Zoë')"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_the_encoding_is_found_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, told: str, chunk: int
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "file"
    text = "id,choice\n1,Zoë\n2,Weiß\r3,ok\r\n"
    path.write_bytes(text.encode(codec))
    examined = examine(path)
    assert examined.encoding.told == told
    assert examined.sample == text
    assert read(path, examined.encoding) == text
    assert list(lines(path, examined.encoding, new_digest()))[1:3] == ["1,Zoë\n", "2,Weiß\r"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 18])
def test_a_damaged_byte_is_said_by_line_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "file"
    for damaged in (b"\xff", b"\xc3", b"\xe2\x82"):
        path.write_bytes("id\nä\nöx".encode() + damaged + b",y\n")
        with pytest.raises(UnusableFile, match=r"line 3: not valid UTF-8 at byte 4: damaged, or"):
            examine(path)
    # The other characters may also come after the first that is wrong.
    path.write_bytes(b"id\n\xff\n" + "ä\n".encode())
    with pytest.raises(UnusableFile, match=r"line 2: not valid UTF-8 at byte 1: damaged, or"):
        examine(path)


def test_an_encoding_that_is_told_is_the_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("id\nŁódź\n".encode("cp1250"))
    examined = examine(path, "cp1250")
    assert (examined.sample, examined.encoding.told) == ("id\nŁódź\n", "cp1250, as told")
    for unknown in ("klingon", "base64"):
        with pytest.raises(UnusableFile, match="there is no encoding"):
            examine(path, unknown)
    with pytest.raises(UnusableFile, match="line 2: not valid ascii"):
        examine(path, "ascii")


@pytest.mark.parametrize("name", ["votes.csv.gz", "votes.xz", "votes.zip", "votes.xlsx"])
def test_a_name_that_promises_another_content_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("id,choice\n1,a\n")
    with pytest.raises(UnusableFile, match="in spite of its name"):
        examine(path)


def test_a_secret_archive_is_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("votes.csv", b"id\n1\n")
    # The flag that says that the content is encrypted, in both headers.
    secret = (
        data.getvalue()
        .replace(b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1")
        .replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")
    )
    path = tmp_path / "votes.zip"
    path.write_bytes(secret)
    with pytest.raises(UnusableFile, match="encrypted"):
        examine(path)


def test_whatever_bytes_come_they_are_read_or_refused_in_words(tmp_path: Path) -> None:
    chance = random.Random(11)
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for row in (["id", "choice"], [1, "a"], ["x", True], ["#N/A", 2.5]):
        sheet.append(row)
    data = io.BytesIO()
    book.save(data)
    parts = zipfile.ZipFile(data)
    tables = ["id,choice\n1,a\n2,b\n".encode("utf-16"), b"sep=;\nid;choice\n1;\xfc\n", b'id\tchoice\n1\t"a\nb"\n']
    path = tmp_path / "file"

    def damaged(content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(changed))
            changed[place : place + chance.randrange(9)] = bytes(chance.choices(range(256), k=chance.randrange(4)))
        return bytes(changed)

    read = 0
    for number in range(400):
        if number % 2:
            path.write_bytes(damaged(chance.choice(tables)))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name in parts.namelist():
                    content = parts.read(name)
                    archive.writestr(name, damaged(content) if chance.random() < 0.2 else content)
        refusals = []
        try:
            ballots, roll = BallotFile(path, ("choice",), "id"), RollFile(path, "id")
            list(ballots.ballots(ballots.survey()))
            list(roll.voters(roll.survey()))
            read += 1
        except Failure as failure:
            refusals.append(str(failure))
        assert all(refusal.startswith(f"{path}: ") and "changed" not in refusal for refusal in refusals)
    assert read > 50
