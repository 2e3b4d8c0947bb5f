"""The store: nothing lost, nothing rewritten, nothing misread."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion import log
from lesion.log import COMPACT_AT, line
from lesion.store import Seal, Store

KEY = "0123456789abcdef" * 2
OTHER = "f" * 32


def seal(key=KEY, take=0, n=2, **more):
    fields = {"reading": key, "take": take, "state": "s" * 32, "measure": {"is": "measure/test-norms"}, "n": n}
    return Seal(**{**fields, "summary": {"total": 1.5}, "duration": 0.1, "writer": "w", **more})


def rows(n, start=0, **more):
    return [{"item": f"i{i}", "value": i / 7, **more} for i in range(start, start + n)]


def filled(path, key=KEY, n=2):
    store = Store(path)
    store.add_rows(key, 0, rows(n))
    store.seal(seal(key, n=n))
    store.close()
    return store


def segment(path):
    (found,) = (path / "log").glob("*.jsonl")
    return found


def test_opening_a_lab_creates_nothing(tmp_path):
    assert list(Store(tmp_path / "lab").rows()) == []
    assert not (tmp_path / "lab").exists()


def test_what_was_written_is_read_back_exactly(tmp_path):
    values = [
        0.1 + 0.2,
        1e-310,
        -0.0,
        1e308,
        3,
        None,
        True,
        "nul \x00, lone \ud800?".encode("utf-8", "replace").decode(),
        "日本 “…”\n",
    ]
    store = Store(tmp_path)
    store.add_rows(KEY, 0, [{"item": str(i), "value": v} for i, v in enumerate(values)])
    store.seal(seal(n=len(values)))
    store.close()
    found = [row["value"] for row in Store(tmp_path).rows()]
    assert found == values and list(map(repr, found)) == list(map(repr, values))


def test_nan_is_refused_before_anything_is_written(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.add_rows(KEY, 0, [{"item": "a", "value": 1.0}, {"item": "b", "value": float("nan")}])
    assert not store.log.exists()


def test_rows_without_a_seal_are_begun_not_taken(tmp_path):
    store = Store(tmp_path)
    store.add_rows(KEY, 0, rows(2))
    store.close()
    again = Store(tmp_path)
    assert again.next_take(KEY) == 0 and set(again.index.begun[KEY][0]) == {"i0", "i1"}
    assert list(again.rows()) == [] and again.table().height == 0


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_torn_last_line_is_skipped(tmp_path, cut):
    store = Store(tmp_path)
    store.add_rows(KEY, 0, rows(3, word="größer"))
    store._segment.sync()
    path = segment(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert set(Store(tmp_path).index.begun[KEY][0]) == {"i0", "i1"}


def test_a_line_torn_inside_a_character_is_skipped(tmp_path):
    path = tmp_path / "log" / "x.jsonl"
    path.parent.mkdir()
    whole = line({"is": "row", "reading": KEY, "take": 0, "item": "a", "text": "é"})
    path.write_bytes(whole + whole[: whole.index("é".encode()) + 1])
    assert set(Store(tmp_path).index.begun[KEY][0]) == {"a"}


@pytest.mark.parametrize(
    "bad", [b"{broken\n", b"[1]\n", b"\n", b'{"is":"row","reading":"' + KEY.encode() + b'","take":0,"item\n']
)
def test_any_other_unreadable_line_is_named_and_nothing_changes(tmp_path, bad):
    filled(tmp_path, OTHER)
    path = segment(tmp_path)
    path.write_bytes(path.read_bytes() + bad + line({"is": "close"}))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path.name} line 6.*nothing was changed"):
        Store(tmp_path)
    assert path.read_bytes() == before


def test_a_lab_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "lab").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "lab")


def test_two_stores_on_one_lab_write_segments_of_their_own(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.add_rows(KEY, 0, rows(1))
    second.add_rows(OTHER, 0, rows(1))
    first.add_rows(KEY, 0, rows(1, 1))
    assert len(list((tmp_path / "log").iterdir())) == 2
    assert set(Store(tmp_path).index.begun) == {KEY, OTHER}


def test_many_segments_are_compacted_line_for_line(tmp_path):
    for number in range(COMPACT_AT):
        filled(tmp_path, f"{number:032x}", n=3)
    (only,) = (tmp_path / "log").iterdir()
    assert only.suffix == ".parquet"
    store = Store(tmp_path)
    assert len(store.index.seals) == COMPACT_AT and store.table().height == 3 * COMPACT_AT
    filled(tmp_path / "plain", KEY)
    assert sum(1 for _ in store.rows()) == 3 * COMPACT_AT


def test_compaction_interrupted_before_its_sources_are_gone_counts_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    for number in range(COMPACT_AT):
        filled(tmp_path, f"{number:032x}")
    assert len(list((tmp_path / "log").iterdir())) == COMPACT_AT + 1
    before = b"".join(Store(tmp_path).canonical())
    monkeypatch.undo()
    log.compact(tmp_path / "log")
    assert len(list((tmp_path / "log").iterdir())) == 1
    assert b"".join(Store(tmp_path).canonical()) == before
    assert before.count(b'"is": "row"') == 2 * COMPACT_AT


def test_a_segment_that_is_compacted_while_it_is_read_is_read_once(tmp_path, monkeypatch):
    for number in range(COMPACT_AT - 1):
        filled(tmp_path, f"{number:032x}")
    listed = log.segments
    before = listed(tmp_path / "log")
    filled(tmp_path, f"{COMPACT_AT:032x}")
    answers = iter([before])
    monkeypatch.setattr(log, "segments", lambda folder, known=None: next(answers, None) or listed(folder, known))
    assert len(Store(tmp_path).index.seals) == COMPACT_AT
    reader = log.read(tmp_path / "log")
    answers = iter([before])
    assert sum(text.startswith(b'{"is":"row"') for _, _, text in reader) == 2 * COMPACT_AT


def test_what_two_processes_compacted_at_the_same_time_counts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "COMPACT_AT", 1000)
    for number in range(6):
        filled(tmp_path, f"{number:032x}")
    expected = b"".join(Store(tmp_path).canonical())
    files = list(log.segments(tmp_path / "log").items())
    for chosen in (files[:4], files[:4], files[1:6]):  # equal, and overlapping
        log._merge(tmp_path / "log", dict(chosen))
    assert b"".join(Store(tmp_path).canonical()) == expected
    assert Store(tmp_path).table().height == 12
    log.compact(tmp_path / "log")
    assert b"".join(Store(tmp_path).canonical()) == expected
    assert sorted(len(held) for held in log.segments(tmp_path / "log").values()) == [4, 5]
    log._merge(tmp_path / "log", log.segments(tmp_path / "log"))
    log.compact(tmp_path / "log")
    ((only, held),) = log.segments(tmp_path / "log").items()
    assert sum(held.values()) == sum(1 for _ in log.lines(only)) == 6 * 5
    assert b"".join(Store(tmp_path).canonical()) == expected


@given(st.lists(st.frozensets(st.integers(0, 5), min_size=1), min_size=1, max_size=12), st.data())
def test_no_segment_goes_however_late_the_removals_of_other_processes_come(contents, data):
    """Each process decides from what it saw, which may be only a part, and removes it whenever it comes to it."""
    files = {Path(f"{n:02}.parquet"): dict.fromkeys(map(str, held)) for n, held in enumerate(contents)}
    gone = set()
    for _ in range(3):
        appeared = list(files.items())[: data.draw(st.integers(1, len(files)))]
        gone |= set(log.superfluous({p: held for p, held in appeared if p not in gone or data.draw(st.booleans())}))
    left = set().union(*(held for path, held in files.items() if path not in gone))
    assert left == set().union(*files.values())


def test_however_many_writers_there_were_the_files_are_few_and_their_names_short(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "COMPACT_AT", 3)
    names = set()
    for number in range(60):
        filled(tmp_path, f"{number:032x}")
        names |= {path.name for path in (tmp_path / "log").iterdir()}
    assert len(list((tmp_path / "log").iterdir())) <= 2 * 4  # two of each size: 1, 3, 9, 27
    assert len({name for name in names if name.endswith("parquet")}) <= 60 / 2, "no line is merged again and again"
    assert len({len(name) for name in names if name.endswith("parquet")}) == 1
    assert len(Store(tmp_path).index.seals) == 60


def test_the_unfinished_file_of_a_killed_compaction_goes_after_a_day(tmp_path):
    filled(tmp_path)
    old, new = tmp_path / "log" / "a.tmp", tmp_path / "log" / "b.tmp"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 2 * log.ABANDONED_S,) * 2)
    log.compact(tmp_path / "log")
    assert not old.exists() and new.exists()


def test_the_segment_of_a_living_writer_is_left_alone(tmp_path):
    living = Store(tmp_path)
    living.add_rows(OTHER, 0, rows(1))
    for number in range(COMPACT_AT + 2):
        filled(tmp_path, f"{number:032x}")
    assert living._segment.path.exists()
    living.add_rows(OTHER, 0, rows(1, 1))
    assert set(Store(tmp_path).index.begun[OTHER][0]) == {"i0", "i1"}


def test_a_damaged_parquet_is_named(tmp_path):
    for number in range(COMPACT_AT):
        filled(tmp_path, f"{number:032x}")
    (only,) = (tmp_path / "log").iterdir()
    only.write_bytes(only.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{only.name} cannot be read"):
        Store(tmp_path)


def test_the_canonical_export_forgets_timings_and_order_only(tmp_path):
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    for store, order in ((a, 1), (b, -1)):
        for row in rows(4)[::order]:
            store.add_rows(KEY, 0, [{**row, "duration": 0.1 * order}])
        store.seal(seal(n=4, duration=order, writer=str(order)))
        store.close()
    assert list(a.canonical()) == list(b.canonical()) and len(list(a.canonical())) == 5
    c = Store(tmp_path / "c")
    c.add_rows(KEY, 0, [*rows(3), {"item": "i3", "value": 3 / 7 + 1e-16}])
    c.seal(seal(n=4))
    assert list(c.canonical()) != list(a.canonical())


def test_a_new_take_counts_only_once_it_is_sealed(tmp_path):
    filled(tmp_path)
    store = Store(tmp_path)
    assert store.next_take(KEY) is None and store.next_take(KEY, force=True) == 1
    store.add_rows(KEY, 1, [{"item": "i0", "value": 9.0}])
    store.close()
    assert [r["value"] for r in Store(tmp_path).rows()] == [0.0, 1 / 7]
    store = Store(tmp_path)
    store.add_rows(KEY, 2, [{"item": "i0", "value": 8.0}, {"item": "i1", "value": 7.0}])
    store.seal(seal(take=2))
    store.close()
    assert [r["value"] for r in Store(tmp_path).rows()] == [8.0, 7.0]
    assert Store(tmp_path).table()["value"].to_list() == [8.0, 7.0]


def test_rows_of_a_later_take_are_begun_wherever_they_stand(tmp_path):
    early, late = Store(tmp_path), Store(tmp_path)  # the writer that began first seals last
    late.add_rows(KEY, 1, rows(1))
    early.add_rows(KEY, 0, rows(2))
    early.seal(seal())
    early.close()
    late.close()
    store = Store(tmp_path)
    assert store.index.seals[KEY].take == 0 and list(store.index.begun[KEY]) == [1]
    assert store.next_take(KEY) is None and store.next_take(KEY, force=True) == 2


def test_a_state_is_there_again_as_it_was_written(tmp_path):
    store = Store(tmp_path)
    trial, ledger = {"subject": "größe"}, [{"after": "x", "facts": {"share": 0.1 + 0.2}}]
    store.add_state(KEY, trial, ledger)
    for there in (store, Store(tmp_path)):
        assert KEY in there.index.states and OTHER not in there.index.states and there.index.states.get(OTHER) is None
        assert list(there.index.states) == [KEY] and len(there.index.states) == 1
        assert there.index.states[KEY] == {"is": "state", "state": KEY, "trial": trial, "ledger": ledger}


def test_what_this_process_writes_has_its_environment(tmp_path):
    store = Store(tmp_path, {"python": "3"})
    store.add_rows(KEY, 0, rows(2))
    store.seal(seal(writer=store.writer))
    for there in (store, Store(tmp_path)):
        assert there.index.environments[there.index.seals[KEY].writer] == {"python": "3"}


def test_failures_are_forgotten_when_they_are_mended(tmp_path):
    store = Store(tmp_path)
    store.fail(KEY, ValueError("no"), "trace")
    store.close()
    assert Store(tmp_path).index.failures[KEY]["error"] == "ValueError: no"
    filled(tmp_path)
    assert Store(tmp_path).index.failures == {}
    assert json.loads(next(iter(Store(tmp_path).canonical())))["is"] == "row"
