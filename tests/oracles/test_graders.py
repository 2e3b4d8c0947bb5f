"""The graders against a person: real answers of SmolLM2, undamaged and damaged, that were read and judged by hand.

`development` is a hard sample, half of it graded right by an early version and a good part word salad; the graders were
mended by it. `test` was drawn at random afterwards from other answers of models that still speak, and judged before it was
graded; nothing was changed after that.
"""

import json
from pathlib import Path

import pytest

from lesion.batteries import battery, grade

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "graded-by-hand.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]
PROMPTS = {prompt.id: prompt for prompt in battery("iq")}


@pytest.mark.parametrize(("name", "size", "least"), [("test", 120, 0.95), ("development", 140, 0.90)])
def test_graders_agree_with_a_careful_reader(name, size, least):
    rows = [row for row in ROWS if row["set"] == name]
    agree = [grade(PROMPTS[row["id"]], row["text"]) == row["right"] for row in rows]
    assert len(rows) == size and sum(agree) / size >= least, [
        r["text"][:60] for r, a in zip(rows, agree, strict=True) if not a
    ]
    assert {row["right"] for row in rows} == {True, False}


def test_the_sample_is_of_real_answers_of_all_kinds():
    assert len({(row["id"], row["text"]) for row in ROWS}) >= 250
    assert {row["site"] for row in ROWS} == {"", "attention.value", "mlp", "embedding"}
    assert len({row["id"] for row in ROWS}) > 60 and any(len(row["text"]) < 10 for row in ROWS)
