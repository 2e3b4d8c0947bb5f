"""`tiny` is made once for a machine: killed before any call, it is made by the next who asks, with the same digest."""

import pytest

from faults import labs
from faults.labs import KILLED, cut_power

server, corpus = labs.server, labs.corpus
JOB = "make_tiny"


@pytest.fixture(scope="module")
def whole(server, corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("whole") / "cache"
    end = server.run(JOB, cache, corpus)
    assert end.code == 0 and "sha256" in end.said and len(end.calls) > 30, end
    return end, {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_made_by_the_next_who_asks(server, corpus, whole, tmp_path, power, fault):
    wrong, done = [], 0
    for k in range(2 + power, len(whole[0].calls) + 1, 3):
        cache = tmp_path / str(k)
        end = server.run(JOB, cache, corpus, mode="kill", at=k)
        assert end.code == KILLED, end
        if power:
            cut_power(cache, end.calls[:-1])
        done += 1
        again = server.run(JOB, cache, corpus)
        names = {path.name for path in cache.iterdir()}
        if again.code or again.said != whole[0].said or names != whole[1]:
            wrong.append(f"{k}, {end.calls[-1]}: {again}, with {names}")
    assert not wrong, "\n".join(wrong)
    how = "power cut, what is not synced is lost" if power else "kill -9"
    fault("making tiny, before every 3rd call", how, "made by the next, same digest, nothing left", done)
