"""Makes src/lesion/data/corpora/austen.txt and novels.txt.xz from the Debian package r-cran-janeaustenr 1.0.0-1.

    apt-get download r-cran-janeaustenr=1.0.0-1
    python tools/make_corpus.py r-cran-janeaustenr_1.0.0-1_all.deb src/lesion/data/corpora

The package holds six novels as R character vectors, one string a printed line, in a lazy-load database: an index
(Rdata.rdx) from names to places in a file of compressed entries (Rdata.rdb), both in R's XDR serialisation (R core
team, R Internals, "Serialization Formats"). Only the standard library is needed; the same package gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import re
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

PACKAGE_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
FOLDER = "./usr/lib/R/site-library/janeaustenr/data/"
CORPORA = {  # what is read, and what may be trained on beside it
    "austen.txt": ("persuasion",),
    "novels.txt.xz": ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey"),
}
HEADING = r"(?i:chapter) ([0-9]+|[IVXLC]+)"
ENDS = ("Finis", "FINIS", "THE END", "A NOTE ON THE TEXT")


def members(deb: bytes) -> dict[str, bytes]:
    """The files of a Debian package: an `ar` archive whose member data.tar.* is an ordinary tar."""
    if not deb.startswith(b"!<arch>\n"):
        raise ValueError("expected a Debian package, which starts with '!<arch>'")
    place = 8
    while place < len(deb):
        name, size = deb[place : place + 16].decode().strip().rstrip("/"), int(deb[place + 48 : place + 58])
        body = deb[place + 60 : place + 60 + size]
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        place += 60 + size + size % 2
    raise ValueError("the package has no member data.tar.*")


class Serialised:
    """Reads R's XDR serialisation, version 3, of the few types that a lazy-load index and character vectors need.

    Vectors become lists, pairlists (where attributes are kept) become dicts, a list that has names becomes a dict.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0
        self.symbols: list[str] = []  # R writes a symbol once and refers to it afterwards
        if self._take(2) != b"X\n" or self._integers(3)[0] != 3:
            raise ValueError(f"expected an XDR serialisation of version 3, got {data[:14]!r}")
        self._take(*self._integers(1))  # the name of the native encoding

    def whole(self) -> Any:
        """The one value of the stream; left-over bytes are an error."""
        value = self.value()
        if self.place != len(self.data):
            raise ValueError(f"{len(self.data) - self.place} bytes are left after the value")
        return value

    def value(self) -> Any:
        (flags,) = self._integers(1)
        kind, has_attributes, has_tag = flags & 0xFF, bool(flags & 0x200), bool(flags & 0x400)
        match kind:
            case 0xFE:  # NULL
                return None
            case 0xFF:  # a symbol met before; its number is packed into the flags
                return self.symbols[(flags >> 8) - 1]
            case 1:
                self.symbols.append(self.value())
                return self.symbols[-1]
            case 2:  # a pairlist: this cell, then the rest of the list
                tag = self.value() if has_tag else None
                return {tag: self.value(), **(self.value() or {})}
            case 9:  # one string; a length of -1 is NA
                (length,) = self._integers(1)
                return self._take(length).decode("utf-8") if length >= 0 else None
            case 10 | 13:  # truth values or integers
                values: list[Any] = self._integers(*self._integers(1))
            case 16 | 19:  # strings, or anything
                values = [self.value() for _ in range(*self._integers(1))]
            case _:
                raise ValueError(f"R type {kind} at byte {self.place} is none of those that this reader knows")
        attributes = self.value() if has_attributes else {}
        return dict(zip(attributes["names"], values, strict=True)) if "names" in attributes else values

    def _take(self, size: int) -> bytes:
        piece = self.data[self.place : self.place + size]
        if len(piece) != size:
            raise ValueError(f"the stream ends within {size} bytes at {self.place}")
        self.place += size
        return piece

    def _integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self._take(4 * count)))


def lines_of(index: bytes, database: bytes, name: str) -> list[str]:
    """One character vector of a lazy-load database. Raises ValueError that lists what the database holds."""
    places = Serialised(zlib.decompress(index, wbits=47)).whole()["variables"]
    if name not in places:
        raise ValueError(f"no vector {name!r}; there are: {', '.join(places)}")
    start, length = places[name]
    entry = database[start : start + length]  # uncompressed size (4 bytes), then a zlib stream
    data = zlib.decompress(entry[4:])
    assert len(data) == struct.unpack(">I", entry[:4])[0]
    lines: list[str] = Serialised(data).whole()
    return lines


def documents(lines: list[str]) -> list[str]:
    """Chapters, each its heading and its paragraphs with an empty line between, one line a paragraph.

    Title pages, headings of volumes, the closing "Finis" and whatever a publisher added behind it go. Line breaks inside a
    paragraph and double spaces are typesetting, which no model should be charged for, so they become one space, or
    nothing after a dash ("the past--" "how natural").
    """
    blocks = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n"))
    paragraphs = [re.sub(r"\s+", " ", re.sub(r"--\n", "--", block)).strip() for block in blocks]
    chapters: list[list[str]] = []
    number, ended = 0, False
    for paragraph in paragraphs:
        if found := re.fullmatch(HEADING, paragraph):
            known = number, (number := int(found[1]) if found[1].isdigit() else roman(found[1]))
            if number not in (known[0] + 1, 1):  # a volume may count anew
                raise ValueError(f"expected Chapter {known[0] + 1}, got {paragraph}")
            chapters.append([])
        ended = ended or paragraph in ENDS
        if chapters and not ended and not re.fullmatch("VOLUME [IVX]+", paragraph):
            chapters[-1].append(paragraph)
    return ["\n\n".join(chapter) for chapter in chapters]


def roman(numeral: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in numeral]
    return sum(-v if v < after else v for v, after in zip(values, [*values[1:], 0], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="r-cran-janeaustenr_1.0.0-1_all.deb")
    parser.add_argument("output", type=Path, help="folder to write the corpora into")
    given = parser.parse_args()
    deb = given.package.read_bytes()
    if (digest := hashlib.sha256(deb).hexdigest()) != PACKAGE_SHA256:
        raise SystemExit(f"{given.package}: expected sha256 {PACKAGE_SHA256}, got {digest}")
    files = members(deb)
    for name, novels in CORPORA.items():
        read = (documents(lines_of(files[FOLDER + "Rdata.rdx"], files[FOLDER + "Rdata.rdb"], n)) for n in novels)
        chapters = [chapter for novel in read for chapter in novel]
        data = ("\n\f\n".join(chapters) + "\n").encode("utf-8")
        told = f"{len(chapters)} chapters, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
        path = given.output / name
        path.write_bytes(lzma.compress(data, preset=9) if path.suffix == ".xz" else data)
        print(f"{path}: {told}")


if __name__ == "__main__":
    main()
