"""Corpora: what is packaged is what was pinned, and a user's file is read as it says or refused by name."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion import texts
from lesion.texts import Document, corpora, corpus, corpus_digest, decoded, records, split

ROOT = Path(__file__).parents[2]
PROSE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_packaged_novel_is_whole() -> None:
    documents = corpus("austen")
    assert corpora() == ["austen", "novels"]
    assert [d.id for d in documents] == [f"austen/chapter-{n:02d}" for n in range(1, 25)]
    for number, document in enumerate(documents, 1):
        heading, _, prose = document.text.partition("\n\n")
        assert heading == f"Chapter {number}"
        assert len(prose.split()) > 1500
        assert "  " not in prose and "\f" not in prose and prose == prose.strip()
    whole = "\n".join(d.text for d in documents)
    assert whole.isascii() and len(whole.split()) == 83_273
    assert "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement," in whole
    assert whole.endswith("in its domestic virtues than in its national importance.")
    assert "gutenberg" not in whole.casefold() and "Finis" not in whole


def test_the_digest_is_that_of_the_file_and_is_told_in_its_origin() -> None:
    file = texts.DATA / "corpora" / "austen.txt"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert corpus_digest("austen") == digest
    assert digest in (texts.DATA / "corpora" / "ORIGIN.md").read_text()


def test_a_packaged_file_that_changed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path, "austen.txt", (texts.DATA / "corpora" / "austen.txt").read_bytes().replace(b"Kellynch", b"Kelynch", 1)
    )
    monkeypatch.setattr(texts, "SHELF", replace(texts.SHELF, folder=tmp_path))
    for ask in (corpus, corpus_digest):
        with pytest.raises(ValueError, match=r"packaged corpus 'austen' is damaged: .*austen\.txt has sha256"):
            ask("austen")


@pytest.mark.parametrize(
    "name", ["austin", "", "AUSTEN", "corpus.pdf", "austen.parquet", "missing.txt", "missing.JSONL"]
)
def test_an_unknown_corpus_says_what_there_is(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"packaged: austen, novels; or give the path of a \.txt, \.jsonl or \.csv file"
    ):
        corpus(name)


def test_a_text_is_split_at_lines_that_hold_only_a_form_feed(tmp_path: Path) -> None:
    name = write(tmp_path, "notes.txt", "One,\n\ntwo.\n\f\n\f\nA \f within a line\nstays.\n\f\nlast\n")
    assert corpus(name) == [
        Document("notes/document-0001", "One,\n\ntwo."),
        Document("notes/document-0002", ""),
        Document("notes/document-0003", "A \f within a line\nstays."),
        Document("notes/document-0004", "last"),
    ]


def test_a_text_without_form_feeds_is_one_document(tmp_path: Path) -> None:
    assert corpus(write(tmp_path, "a.txt", "x\n\ny\n")) == [Document("a/document-0001", "x\n\ny")]


def test_line_ends_and_byte_order_mark_are_not_text(tmp_path: Path) -> None:
    plain = corpus(write(tmp_path, "a.txt", "é\n\f\nb\n"))
    assert corpus(write(tmp_path, "a.txt", b"\xef\xbb\xbf\xc3\xa9\r\n\f\r\nb\r\n")) == plain


@given(st.lists(PROSE, min_size=1, max_size=5))
def test_what_is_joined_by_form_feeds_is_split_again(parts: list[str]) -> None:
    assert split("\n\f\n".join(parts)) == parts


def test_jsonl_keeps_ids_numbers_the_rest_and_leaves_other_keys_alone(tmp_path: Path) -> None:
    rows = ['{"id": "first", "text": "a"}', "", '{"text": "b\u2028c", "label": 3}', '{"id": 7, "text": ""}']
    assert corpus(write(tmp_path, "set.jsonl", "\n".join(rows))) == [
        Document("first", "a"),
        Document("set/document-0002", "b\u2028c"),
        Document("7", ""),
    ]


def test_csv_reads_quotes_line_breaks_and_very_long_cells(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "word " * 60_000
    documents = corpus(write(tmp_path, "set.csv", f'id,text,year\nx,"a ""b""\nc, d",1815\n,,\n\n,{long},\n'))
    assert documents == [
        Document("x", 'a "b"\nc, d'),
        Document("set/document-0002", ""),
        Document("set/document-0003", long),
    ]
    assert csv.field_size_limit() == limit


@given(rows=st.lists(st.tuples(PROSE, PROSE), max_size=5))
def test_csv_and_jsonl_say_the_same(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("same")
    path = folder / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "other"), *rows])
    table = [row for _, row in records(path, path.read_bytes())]
    lines = "\n".join(json.dumps({"text": text, "other": other}) for text, other in rows).encode()
    objects = [row for _, row in records(folder / "a.jsonl", lines)]
    assert [row["text"] for row in table] == [row["text"] for row in objects]
    assert [row.get("other", "") for row in table] == [row["other"] for row in objects]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"byte 0xff at offset 5"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8: byte 0xff at offset 10"),
        ("a.txt", "", r"a\.txt holds no text: 1 documents"),
        ("a.txt", " \n\f\n\n", r"holds no text: 2 documents"),
        ("a.jsonl", "\n\n", r"a\.jsonl holds no text: 0 documents"),
        ("a.csv", "text\n", r"a\.csv holds no text: 0 documents"),
        ("a.csv", "", r"a\.csv holds no text: 0 documents"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', r"a\.jsonl, line 2: not JSON, .* at column 13"),
        ("a.jsonl", '\n["a"]', r"line 2: expected a JSON object, got '\[\"a\"\]'"),
        ("a.jsonl", '{"txt": "a"}', r"line 1: expected a string under \"text\", got only 'txt'"),
        ("a.jsonl", '{"text": null}', r"line 1: expected a string under \"text\", got None"),
        ("a.jsonl", '{"id": true, "text": "a"}', r"line 1: expected an id .* got True"),
        ("a.jsonl", '{"id": " ", "text": "a"}', r"line 1: expected an id .* got ' '"),
        ("a.csv", 'id,text\nx,"a\nb"\ny\n', r"a\.csv, line 4: expected 2 cells, got 1"),
        ("a.csv", 'text\n"a" b\n', r"a\.csv, line 2: not CSV"),
        ("a.csv", 'text\n"a\nb', r"a\.csv, line 2: not CSV, unexpected end of data"),
        ("a.csv", "text,text\na,b\n", r"line 1: the header names a column twice"),
        ("a.csv", "body\na\n", r"line 2: expected a string under \"text\", got only 'body'"),
        (
            "a.jsonl",
            '{"id": "x", "text": "a"}\n{"text": "b"}\n{"id": "x", "text": "c"}',
            r"number 1 and number 3 .* 'x'",
        ),
        ("a.jsonl", '{"id": "a/document-0002", "text": "a"}\n{"text": "b"}', r"the same id 'a/document-0002'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        corpus(write(tmp_path, name, content))


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    first = corpus_digest(write(tmp_path, "a.txt", "one"))
    assert first == hashlib.sha256(b"one").hexdigest()
    assert corpus_digest(write(tmp_path, "a.txt", "two")) != first


@given(st.binary(max_size=60))
def test_any_bytes_are_text_or_refused_at_the_byte_where_python_fails(data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"offset {error.start} "):
            decoded(Path("x.txt"), data)
    else:
        assert decoded(Path("x.txt"), data) == data.decode("utf-8-sig").replace("\r\n", "\n")


def test_texts_and_batteries_are_read_without_torch() -> None:
    script = (
        "import sys, lesion.texts, lesion.batteries; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], check=False, env={"PYTHONPATH": str(ROOT / "src")}).returncode
        == 0
    )


# ---- the tool that made the packaged file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", ROOT / "tools" / "make_corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEADER = b"X\n" + struct.pack(">3i", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"


def strings(*words: str | None) -> bytes:
    cells = (struct.pack(">ii", 0x40009, -1 if w is None else len(w.encode())) + (w or "").encode() for w in words)
    return struct.pack(">ii", 16, len(words)) + b"".join(cells)


def test_the_tool_finds_a_vector_by_its_name(tool: ModuleType) -> None:
    entries = [HEADER + strings("x"), HEADER + strings("Chapter 1", "", None, "naïve")]
    database, places = b"", []
    for entry in entries:
        stored = struct.pack(">I", len(entry)) + zlib.compress(entry)
        places.append((len(database), len(stored)))
        database += stored
    vectors = b"".join(struct.pack(">4i", 13, 2, *place) for place in places)
    symbol = struct.pack(">ii", 1, 0x40009) + struct.pack(">i", 5) + b"names"
    named = struct.pack(">i", 0x402) + symbol + strings("first", "second") + struct.pack(">i", 0xFE)
    again = struct.pack(">ii", 0x402, 0x1FF) + strings("variables") + struct.pack(">i", 0xFE)  # refers to the symbol
    index = HEADER + struct.pack(">ii", 0x213, 1) + struct.pack(">ii", 0x213, 2) + vectors + named + again
    assert tool.lines_of(zlib.compress(index), database, "second") == ["Chapter 1", "", None, "naïve"]
    with pytest.raises(ValueError, match="no vector 'third'; there are: first, second"):
        tool.lines_of(zlib.compress(index), database, "third")


@pytest.mark.parametrize("stream", [b"A\n1", HEADER + strings("a")[:-1], HEADER + strings("a") + b"!"])
def test_the_tool_refuses_a_broken_stream(tool: ModuleType, stream: bytes) -> None:
    with pytest.raises(ValueError, match=r"expected an XDR|the stream ends|bytes are left"):
        tool.Serialised(stream).whole()


def test_the_tool_joins_lines_and_drops_what_is_not_the_novel(tool: ModuleType) -> None:
    lines = [
        "Title",
        "",
        "by",
        "",
        "Chapter 1",
        "",
        "",
        "One  line",
        "and the past--",
        "how near.",
        "",
        "   Next.",
        "",
        "",
    ]
    lines += ["Chapter 2", "", "Last.", "", "", "Finis"]
    assert tool.documents(lines) == ["Chapter 1\n\nOne line and the past--how near.\n\nNext.", "Chapter 2\n\nLast."]
    with pytest.raises(ValueError, match="expected Chapter 2, got Chapter 3"):
        tool.documents(["Chapter 1", "", "a", "", "Chapter 3"])
