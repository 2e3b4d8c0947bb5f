"""The log as it grows and is compacted: whoever opens it late, or has watched all along, knows the same, and reads little."""

import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesion import log
from lesion.store import Seal, Store

KEYS = [f"{number:032x}" for number in range(3)]


def seal(store, key, take=0, n=2):
    store.seal(Seal(key, take, "s" * 32, {"is": "measure/test-norms"}, n, {"total": 1.0}, 0.1, store.writer))


def rows(start, stop):
    return [{"item": f"i{number}", "value": number} for number in range(start, stop)]


def filled(path, count, each=2):
    for number in range(count):
        store = Store(path)
        store.add_rows(f"{number:032x}", 0, rows(0, each))
        seal(store, f"{number:032x}", n=each)
        store.close()


def known(store):
    """What a store knows of what is taken and begun."""
    seals = {key: (store.index.seals.take(key), store.index.seals[key].take) for key in store.index.seals}
    return seals, {key: {take: set(rows) for take, rows in takes.items()} for key, takes in store.index.begun.items()}


def naively(path):
    """The same from every line of the log."""
    seals, begun = {}, {}
    records = [log.parse(text, path, number) for path, number, text in log.read(path / "log")]
    for record in records:
        if record["is"] == "seal":
            seals[record["reading"]] = max(seals.get(record["reading"], -1), record["take"])
    for record in records:
        if record["is"] == "row" and record["take"] > seals.get(record["reading"], -1):
            begun.setdefault(record["reading"], {}).setdefault(record["take"], set()).add(record["item"])
    return {key: (take, take) for key, take in seals.items()}, begun


ACTS = st.lists(
    st.tuples(st.sampled_from(["rows", "seal", "close", "look"]), st.integers(0, 2), st.integers(0, 8)), max_size=30
)


@settings(max_examples=200, deadline=None)
@given(ACTS)
def test_who_watched_all_along_and_who_comes_late_know_the_same(acts):
    """Three writers that open, write, close and compact in any order, some of them gone on from by others, and a watcher."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(log, "COMPACT_AT", 2):
        path, writers = Path(folder), {}
        watcher, reader, lines = Store(path), log.Reader(path / "log"), []
        for act, who, what in acts:
            store = writers.get(who) or writers.setdefault(who, Store(path))
            key, take = KEYS[what % 3], what // 3
            match act:
                case "rows":
                    store.add_rows(key, take, rows(what, what + 2))
                case "seal":
                    seal(store, key, take)
                case "close":
                    writers.pop(who).close()
                case "look":
                    watcher.refresh()
                    lines += [text for _, _, text in reader.new()]
        for store in (None, *writers.values()):
            if store is not None:
                store.close()
            watcher.refresh()
            assert known(watcher) == known(Store(path)) == naively(path)
            lines += [text for _, _, text in reader.new()]
            assert sorted(lines) == sorted(text for _, _, text in log.read(path / "log")), "each line once"


def test_what_a_reader_is_to_leave_out_it_leaves_out_wherever_it_lies(tmp_path):
    own = Store(tmp_path)
    own.add_rows(KEYS[0], 0, rows(0, 1))
    reader = log.Reader(tmp_path / "log")
    reader.skip(own._segment.path.name)
    assert not [text for _, _, text in reader.new() if text.startswith(log.ROW)]
    own.close()
    with mock.patch.object(log, "COMPACT_AT", 2):
        filled(tmp_path, 1)
    assert [path.suffix for path in (tmp_path / "log").iterdir()] == [".parquet"]
    assert sum(text.startswith(log.ROW) for _, _, text in reader.new()) == 2


def test_the_rows_of_sealed_readings_are_not_read_when_a_lab_is_opened(tmp_path):
    filled(tmp_path, log.COMPACT_AT, each=50)
    (only,) = (tmp_path / "log").iterdir()
    texts = [text for _, text in log.lines(only, settled=False)]
    assert len(texts) == 2 * log.COMPACT_AT and not any(text.startswith(log.ROW) for text in texts)
    assert len(list(log.lines(only))) == (50 + 3) * log.COMPACT_AT
    assert sum(1 for _ in Store(tmp_path).rows()) == 50 * log.COMPACT_AT


def test_rows_whose_seal_lies_elsewhere_are_read(tmp_path):
    for number in range(log.COMPACT_AT):
        store = Store(tmp_path)
        store.add_rows(KEYS[0], 0, rows(number, number + 1))
        store.close()
    (only,) = (tmp_path / "log").iterdir()
    assert sum(text.startswith(log.ROW) for _, text in log.lines(only, settled=False)) == log.COMPACT_AT
    assert len(Store(tmp_path).index.begun[KEYS[0]][0]) == log.COMPACT_AT


def test_a_file_that_was_compacted_without_a_column_of_rows_is_read_and_merged(tmp_path):
    filled(tmp_path, log.COMPACT_AT)
    (only,) = (tmp_path / "log").iterdir()
    expected = b"".join(Store(tmp_path).canonical())
    metadata = parquet.read_metadata(only).metadata
    table = pa.table({"line": pa.array([text for _, text in log.lines(only)], pa.binary())})
    parquet.write_table(table.replace_schema_metadata({b"segments": metadata[b"segments"]}), only)
    assert b"".join(Store(tmp_path).canonical()) == expected
    log._merge(tmp_path / "log", log.segments(tmp_path / "log"))
    only.unlink()
    assert b"".join(Store(tmp_path).canonical()) == expected


def test_quoting_reading_after_reading_reads_the_log_a_few_times_only(tmp_path):
    writer, read = Store(tmp_path), log.read
    for number in range(300):
        writer.add_rows(f"{number:032x}", 0, rows(0, 2))
        seal(writer, f"{number:032x}")
    writer.close()
    store = Store(tmp_path)
    with mock.patch.object(log, "read", side_effect=read) as reads:
        for number in range(300):
            found = list(store.rows([f"{number:032x}"]))
            assert [row["item"] for row in found] == ["i0", "i1"] and found[0]["reading"] == f"{number:032x}"
    assert reads.call_count <= 6


def test_what_is_recalled_is_the_callers_own_and_follows_a_new_take(tmp_path):
    filled(tmp_path, 3)
    store = Store(tmp_path)
    for row in store.rows([KEYS[0]]):
        row["value"] = "spoilt"
    assert [row["value"] for key in KEYS for row in store.rows([key])] == [0, 1] * 3
    store.add_rows(KEYS[1], 1, [{"item": "i0", "value": 9}])
    seal(store, KEYS[1], 1, n=1)
    assert [row["value"] for row in store.rows([KEYS[1]])] == [9]
    assert list(store.rows(["f" * 32])) == []


@pytest.mark.parametrize("column", ["line", "row"])
def test_damage_in_either_column_is_named(tmp_path, column):
    filled(tmp_path, log.COMPACT_AT, each=40)
    (only,) = (tmp_path / "log").iterdir()
    group = parquet.read_metadata(only).row_group(0).column(["line", "row"].index(column))
    content = bytearray(only.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    content[middle : middle + 40] = b"\xff" * 40
    only.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{only.name}.* cannot be read"):
        list(Store(tmp_path).rows())
