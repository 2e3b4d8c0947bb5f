"""Rows of whole examples: each is there once, whole and alone, and only its reply is scored."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesion.loss import IGNORE, sum_of_losses
from lesion.packing import Packed
from lesion.responses import Examples, pack_pairs, translations
from lesion.subjects import Scratch

PAIRS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 250), min_size=1, max_size=9), st.lists(st.integers(1, 250), min_size=1, max_size=7)
    ),
    min_size=1,
    max_size=14,
)


@given(PAIRS, st.integers(0, 5))
def test_every_example_is_there_once_and_its_reply_alone_is_scored(pairs, seed):
    made = pack_pairs(pairs, 16, seed)
    ids, targets, mask, at = made.batch(0, len(made))
    found = []
    for row in range(len(made)):
        for place in range(16):
            if targets[row, place] != IGNORE:
                seen = [int(ids[row, j]) for j in range(place + 1) if mask[row, 0, place, j]]
                found.append((tuple(seen), int(targets[row, place])))
                assert int(at[row, place]) == len(seen) - 1
    wanted = [
        (tuple(p + r[:i]), token)
        for p, r in map(lambda x: (list(x[0]), list(x[1])), pairs)
        for i, token in enumerate(r)
    ]
    assert sorted(found) == sorted(wanted)


@given(PAIRS)
def test_rows_are_filled_well(pairs):
    made, total = pack_pairs(pairs, 16, 0), sum(len(p) + len(r) for p, r in pairs)
    assert len(made) <= max(1, 2 * total // 16 + 1), "two rows that are half empty would be one"


def test_an_example_that_is_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 has 9 tokens, and a row has 8"):
        pack_pairs([([1], [2]), ([1, 2, 3, 4], [5, 6, 7, 8, 9])], 8, 0)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-decoder", "tiny-gpt-neox"])
def test_the_loss_of_packed_rows_is_that_of_each_example_alone(family):
    model = Scratch(architecture=family).load().model.double()
    pairs = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13]), ([14, 15], [16]), ([3, 4, 5, 6, 7, 8], [9, 10, 11])]
    made = pack_pairs(pairs, 12, 0)
    batch = made.batch(0, len(made))
    alone = 0.0
    with torch.no_grad():
        for prompt, reply in pairs:
            logits = model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
            alone -= float(sum(logits[len(prompt) - 1 + i, t] for i, t in enumerate(reply)))
        if batch[2] is not None and family != "tiny-decoder":
            batch = (*batch[:2], batch[2], batch[3])
        assert float(sum_of_losses(model, *batch)) == pytest.approx(alone, rel=1e-6)


def test_the_loss_of_an_encoder_decoder_is_that_of_its_labels():
    model = Scratch(architecture="tiny-t5").load().model.double().eval()
    pairs = [([5, 6, 7, 8], [9, 10, 257]), ([11], [12, 257])]
    batch = translations(pairs)
    with torch.no_grad():
        theirs = sum(
            float(model(input_ids=torch.tensor([s]), labels=torch.tensor([t])).loss) * len(t) for s, t in pairs
        )
        assert float(sum_of_losses(model, *batch)) == pytest.approx(theirs, rel=1e-7)
    assert (batch[1] != IGNORE).sum() == 5


def test_rows_come_in_another_order_each_epoch_and_the_digest_knows_all():
    made = Examples([([i], [i + 1]) for i in range(9)], translations, 4, 7)
    first, second = ([made.row(i) for i in range(e * 9, e * 9 + 9)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(9)) and first != second
    other = Examples([*made.examples[:-1], ([9], [9])], translations, 4, 7)
    assert made.digest() != other.digest() != Examples(made.examples, translations, 4, 8).digest()
    a, b = pack_pairs([([1, 2], [3])], 8, 0), pack_pairs([([1], [2, 3])], 8, 0)
    assert np.array_equal(a.stream, b.stream) and a.digest() != b.digest(), "what is scored is part of it"
    assert isinstance(a, Packed) and a.batch(0, 1)[1].tolist() != b.batch(0, 1)[1].tolist()
