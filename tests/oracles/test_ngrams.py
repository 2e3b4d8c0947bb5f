"""Kneser-Ney against its definition in dictionaries of tuples, by hand, and as a distribution."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lesion.ngrams import NGram, discounts

V, END = 6, 0
DOCUMENTS = st.lists(st.lists(st.integers(0, V - 2), max_size=14), min_size=1, max_size=8)  # V − 1 is never seen
ORDERS = st.integers(1, 5)


class Naive:
    """The formulas of the paper, a gram a tuple, a history a slice; "<" is the start mark."""

    def __init__(self, documents, order, vocabulary, end):
        self.order, self.vocabulary = order, vocabulary
        texts = [("<", *document, end) for document in documents]
        raw = [
            Counter(text[i - k + 1 : i + 1] for text in texts for i in range(1, len(text)) if i - k + 1 >= 0)
            for k in range(order + 1)
        ]
        self.counts = [raw[order]]
        for k in range(order - 1, 0, -1):
            left = Counter(gram[1:] for gram in raw[k + 1])  # how many different tokens stand before it
            self.counts.insert(0, {g: raw[k][g] if g[0] == "<" else left[g] for g in raw[k]})
        self.discounts = [self.three(list(counts.values())) for counts in self.counts]

    @staticmethod
    def three(counts):
        n = [None] + [counts.count(i) for i in (1, 2, 3, 4)]
        y = n[1] / (n[1] + 2 * n[2]) if n[1] > 0 and n[2] > 0 else 0.5
        if all(n[1:]):
            d = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
            if all(x > 0 for x in d):
                return d
        return [y] * 3

    def p(self, token, history):
        history = history[len(history) - min(len(history), self.order - 1) :]
        below = self.p_below(token, history)
        counts, three = self.counts[len(history)], self.discounts[len(history)]
        after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == history}
        if not after:
            return below
        taken = {v: three[min(c, 3) - 1] for v, c in after.items()}
        own = after[token] - taken[token] if token in after else 0.0
        return (own + sum(taken.values()) * below) / sum(after.values())

    def p_below(self, token, history):
        return self.p(token, history[1:]) if history else 1 / self.vocabulary

    def nll(self, document):
        return [-math.log(self.p(t, ("<", *document[:i]))) for i, t in enumerate(document)]


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, V - 1), max_size=12), ORDERS)
@example([[]], [3, 3], 5)  # not one gram of orders 3 to 5
@example([[1], [1]], [1, 0], 3)
def test_equal_to_the_definition(documents, held_out, order):
    model, naive = NGram(documents, order, V, END), Naive(documents, order, V, END)
    np.testing.assert_allclose(model.discounts, naive.discounts, rtol=0, atol=1e-15)
    for document in (held_out, *documents):
        want = naive.nll(document)
        np.testing.assert_allclose(model.nll(document, skip_first=False), want, rtol=0, atol=1e-12)
        np.testing.assert_allclose(model.nll(document), want[1:], rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, V - 1), max_size=6), ORDERS, st.data())
def test_sums_to_one_after_seen_and_unseen_histories(documents, unseen, order, data):
    model = NGram(documents, order, V, END)
    whole = [*data.draw(st.sampled_from(documents)), END]
    seen = whole[: data.draw(st.integers(0, len(whole)))]  # also a whole document, which nothing ever followed
    for history in (seen, unseen, []):
        p = np.exp([-model.nll([*history, token], skip_first=False)[-1] for token in range(V)])
        assert p.sum() == pytest.approx(1, abs=1e-9)
        assert (p > 0).all()


def zipfian(rng, documents, length, vocabulary=300):
    """A chain in which three draws in four follow from the token before, the others from Zipf's law."""
    for _ in range(documents):
        fresh = np.minimum(rng.zipf(1.4, length), vocabulary - 1)
        follows = rng.random(length) < 0.75
        row = [int(fresh[0])]
        for i in range(1, length):
            row.append((row[-1] * 7 + int(fresh[i]) % 3) % (vocabulary - 1) + 1 if follows[i] else int(fresh[i]))
        yield row


@pytest.fixture(scope="module")
def chain():
    rng = np.random.default_rng(5)
    return list(zipfian(rng, 40, 100)), list(zipfian(rng, 3, 60))


@pytest.mark.parametrize("order", [1, 3, 5])
def test_equal_to_the_definition_with_three_discounts(chain, order):
    train, held_out = chain
    model, naive = NGram(train, order, 300, END), Naive(train, order, 300, END)
    np.testing.assert_allclose(model.discounts, naive.discounts, rtol=0, atol=1e-15)
    d1, d2, d3 = model.discounts[-1]
    assert 0 < d1 < 1 and 0 < d2 < 2 and 0 < d3 < 3 and len({d1, d2, d3}) == (1 if order == 1 else 3)
    document = held_out[0][:25]
    np.testing.assert_allclose(model.nll(document), naive.nll(document)[1:], rtol=0, atol=1e-12)
    p = np.exp([-model.nll([*document, token])[-1] for token in range(300)])
    assert p.sum() == pytest.approx(1, abs=1e-9)


def test_a_longer_history_helps_where_tokens_depend_on_it(chain):
    train, held_out = chain
    one, two = (sum(NGram(train, n, 300, END).nll(d).sum() for d in held_out) for n in (1, 2))
    assert two < 0.85 * one


def test_bigrams_by_hand():
    """Documents 1 2 and 1 1: the grams < 1 (2), 1 2, 2 e, 1 1, 1 e; of four n₁ = 4, n₂ = 1, n₃ = 0: D = 4 / 6.

    Unigrams count what stands before them: 1 ← {<, 1}, 2 ← {1}, e ← {2, 1}; n₁ = 1, n₂ = 2: D = 1 / 5.
    """
    model = NGram([[1, 2], [1, 1]], 2, 4, END)
    assert np.array(model.discounts) == pytest.approx(np.repeat([[1 / 5], [2 / 3]], 3, axis=1))
    two, never = (0.8 + 0.6 / 4) / 5, (0.6 / 4) / 5
    behind_one = (1 - 2 / 3) / 3, 2 / 3  # 1 is followed by 2, 1 and e, once each
    assert model.nll([1, 2, 3]) == pytest.approx(
        [-math.log(behind_one[0] + behind_one[1] * two), -math.log(2 / 3 * never)]
    )
    assert model.nll([3, 2]) == pytest.approx([-math.log(two)])  # nothing ever followed 3
    one = (1.8 + 0.6 / 4) / 5
    assert model.nll([1], skip_first=False) == pytest.approx([-math.log((2 - 2 / 3) / 2 + 2 / 3 / 2 * one)])


def test_order_one_counts_tokens_and_end_tokens_but_no_start():
    model = NGram([[1, 1, 2], [1]], 1, 4, END)  # 1 three times, the end twice, 2 once: n₁ = n₂ = 1, Y = 1 / 3
    p = np.exp(-model.nll([0, 1, 2, 3], skip_first=False))
    assert model.discounts == ((1 / 3,) * 3,)
    assert p == pytest.approx((np.array([2, 3, 1, 1 / 3]) - 1 / 3 + 1 / 4) / 6)


@pytest.mark.parametrize(
    ("counts", "want"),
    [
        ([1] * 8 + [2] * 4 + [3] * 2 + [4, 9], (1 / 2, 2 - 3 / 4, 3 - 4 / 4)),
        ([1] * 8 + [2] * 4 + [3] * 2 + [5, 9], (1 / 2,) * 3),  # none with four
        ([1] * 8 + [2] * 4 + [4] * 2, (1 / 2,) * 3),  # none with three
        ([1] * 8 + [2] * 4 + [3] * 20 + [4], (1 / 2,) * 3),  # D₂ would be negative
        ([1] * 8 + [3, 4], (1 / 2,) * 3),  # Y would take all that was seen once
        ([2, 3, 4], (1 / 2,) * 3),  # Y would leave nothing for what was not seen
        ([1, 2, 2], (1 / 5,) * 3),
        ([], (1 / 2,) * 3),
    ],
)
def test_discounts_by_hand(counts, want):
    assert discounts(np.array(counts, np.int64)) == pytest.approx(want)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_short_documents(order):
    model = NGram([[1, 2, 3]], order, V, END)
    assert model.nll([1]).shape == model.nll([]).shape == model.nll([], skip_first=False).shape == (0,)
    assert model.nll([1], skip_first=False).shape == (1,)
    assert model.nll([V - 1], skip_first=False)[0] < math.inf


def test_no_gram_reaches_from_one_document_into_the_next():
    """Also not where one ends as the next begins; so their order is nothing."""
    documents = [[1, 2], [2, 3, 1], [], [1], [2, 2]]
    one, other = NGram(documents, 3, V, END), NGram(documents[::-1], 3, V, END)
    assert (one.nll([1, 2, 3, 0, 2, 2]) == other.nll([1, 2, 3, 0, 2, 2])).all()


def test_numpy_ids_are_as_good_as_lists():
    rows = [np.array([1, 2, 3], np.uint16), np.array([3, 1], np.int32)]
    mine = NGram(rows, 3, V, END).nll(np.array([1, 2, 4], np.uint8))
    assert (mine == NGram([row.tolist() for row in rows], 3, V, END).nll([1, 2, 4])).all()


@pytest.mark.parametrize("bad", [[1, V], [-1], [2**63], np.array([2**64 - 1], np.uint64)])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    with pytest.raises(ValueError, match=f"ids 0 to {V - 1}, the document has"):
        NGram([[1], bad], 2, V, END)
    with pytest.raises(ValueError, match=f"ids 0 to {V - 1}, the document has"):
        NGram([[1]], 2, V, END).nll(bad)


@pytest.mark.parametrize("bad", [[1.0, 2.0], ["a"], [[1, 2]], [True]])
def test_what_is_no_row_of_ids_is_refused(bad):
    with pytest.raises(ValueError, match="row of whole numbers"):
        NGram([[1]], 2, V, END).nll(bad)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"documents": []}, "at least one document"),
        ({"order": 0}, "1 or more, not 0 and 6"),
        ({"vocabulary": 0}, "1 or more, not 2 and 0"),
        ({"end": V}, "0 to 5, not 6"),
        ({"end": -1}, "0 to 5, not -1"),
    ],
)
def test_what_makes_no_model_is_refused(changed, match):
    with pytest.raises(ValueError, match=match):
        NGram(**{"documents": [[1]], "order": 2, "vocabulary": V, "end": END} | changed)
