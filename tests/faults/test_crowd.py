"""Many processes on one lab, each opening, writing, closing and compacting it while the others do."""

import os
import traceback

from lesion import log
from lesion.store import Seal, Store

PROCESSES, EACH, ROWS = 6, 12, 4


def work(path, process):
    for number in range(EACH):
        key = f"{process:016x}{number:016x}"
        store = Store(path)
        assert store.next_take(key) == 0
        store.add_state(key[::-1], {}, [])
        store.add_rows(key, 0, [{"item": f"i{i}", "value": i} for i in range(ROWS)])
        store.seal(Seal(key, 0, key[::-1], {"is": "measure/test"}, ROWS, {}, 0.1, store.writer))
        assert sum(1 for _ in store.rows([key])) == ROWS
        store.close()


def test_a_crowd_of_writers_loses_nothing_and_doubles_nothing(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(log, "COMPACT_AT", 2)
    children = []
    for process in range(PROCESSES):
        pid = os.fork()
        if not pid:
            try:
                work(tmp_path, process)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * PROCESSES
    store = Store(tmp_path)
    count = PROCESSES * EACH
    assert len(store.index.seals) == len(store.index.states) == count and not store.index.begun
    assert store.table().height == sum(1 for _ in store.rows()) == count * ROWS
    texts = [text for _, _, text in log.read(store.log)]
    assert sum(text.startswith(b'{"is":"row"') for text in texts) == count * ROWS
    log.compact(store.log)
    assert len(list(store.log.iterdir())) <= 8
    assert len(Store(tmp_path).index.seals) == count
    fault("many processes on one lab", f"{PROCESSES} open, write and compact it", "no row lost, none twice", count)
