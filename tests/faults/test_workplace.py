"""The small files of an interrupted training, torn or altered anywhere: it finishes with the same bits, or is refused by name."""

import json
import logging
import os
import random

import pytest

from faults.test_checkpoints import torn
from lesion.fit import fit
from oracles.test_fit import HOW, data, metrics, model, same, weights

TIMES = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made, folder = model(), tmp_path_factory.mktemp("whole")
    facts = fit(made, data(), HOW, folder=folder)
    return weights(made), metrics(folder), facts


def finishes(folder, whole):
    again = model()
    facts = fit(again, data(), HOW, folder=folder)
    return same(weights(again), whole[0]) and metrics(folder) == whole[1] and facts == whole[2]


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_cut_anywhere(tmp_path, whole, name, fault):
    chance = random.Random(0)
    for number in range(TIMES):
        folder = tmp_path / str(number)
        torn(folder)
        os.truncate(folder / name, chance.randrange((folder / name).stat().st_size) if number else 0)
        assert finishes(folder, whole)
    fault(f"{name} of a training cut", "at a random byte", "finished bit-identical", TIMES)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_flipped_bit_anywhere(tmp_path, whole, name, fault):
    chance, refused = random.Random(1), 0
    for number in range(TIMES):
        folder = tmp_path / str(number)
        torn(folder)
        content = bytearray((folder / name).read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(content)
        try:
            assert finishes(folder, whole)
        except ValueError as error:
            assert "holds another run" in str(error) and name == "run.json"
            refused += 1
    fault(f"{name} of a training altered", "a flipped bit anywhere", "finished bit-identical", TIMES - refused)
    if refused:
        fault(f"{name} of a training altered", "a flipped bit anywhere", "refused by name", refused)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_gone(tmp_path, whole, name, caplog, fault):
    torn(tmp_path)
    (tmp_path / name).unlink()
    with caplog.at_level(logging.WARNING, "lesion"):
        assert finishes(tmp_path, whole)
    assert len(list(tmp_path.glob("damaged-*"))) == 2, "checkpoints that nobody vouches for are set aside"
    fault(f"{name} of a training gone", "deleted", "finished bit-identical")


def test_the_checkpoint_before_is_used_where_only_the_last_metrics_are_damaged(tmp_path, whole, caplog, fault):
    torn(tmp_path)  # checkpoints are at 4 and 8
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    altered = json.dumps({**json.loads(lines[5]), "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:5], altered, *lines[6:]]) + "\n")
    with caplog.at_level(logging.WARNING, "lesion"):
        assert finishes(tmp_path, whole)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "step-00000008 is damaged" in said
    fault("metrics.jsonl of a training altered", "another loss", "said aloud, finished bit-identical")
