"""The manners of flipping, on a planted loss that is linear in the embeddings, where brute force knows the best flips."""

from itertools import combinations, product

import pytest
import torch

from lesion import flipping
from lesion.flipping import Reach, first_order, flipped, success
from lesion.flips import candidates
from lesion.hardening import attacked_rows, hardened
from lesion.loss import IGNORE
from lesion.passages import Passage

V, D, T = 9, 4, 5
BANNED = (0, 7)


class Planted:
    """L = Σᵢ e(tᵢ) · gᵢ: what it is worth to have a token at a position is a table."""

    def __init__(self, seed):
        stream = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(V, D, generator=stream, dtype=torch.float64)
        self.gradient = torch.randn(T, D, generator=stream, dtype=torch.float64)
        self.tokens = tuple(torch.randint(1, V - 2, (T,), generator=stream).tolist())
        self.worth = self.gradient @ self.rows.T  # [T, V]
        self.passage = Passage("planted", (*self.tokens, 1), T)
        self.may = torch.ones(V, dtype=torch.bool)
        self.may[list(BANNED)] = False
        self.scored = 0

    def loss(self, tokens):
        return float(sum(self.worth[i, t] for i, t in enumerate(tokens)))

    def score(self, model, passage, variants):
        self.scored += len(variants)
        return torch.tensor([self.loss(v) for v in variants.tolist()], dtype=torch.float64)

    def reach(self, positions=tuple(range(T)), keeps=None):
        return Reach(tuple(positions), self.may, keeps)

    def best(self, n, positions=range(T)):
        """Over all choices of at most n positions and allowed tokens."""
        ids = [v for v in range(V) if v not in BANNED]
        return max(
            self.loss(flipped(self.tokens, list(zip(at, new, strict=True))))
            for count in range(n + 1)
            for at in combinations(positions, count)
            for new in product(ids, repeat=count)
        )


@pytest.fixture(params=range(8))
def planted(request, monkeypatch):
    found = Planted(request.param)
    monkeypatch.setattr(flipping, "gradients", lambda model, passage: found.gradient.clone())
    monkeypatch.setattr(flipping, "table", lambda model: found.rows)
    monkeypatch.setattr(flipping, "score", found.score)
    return found


def test_the_first_order_choice_is_that_of_brute_force_where_the_loss_is_linear(planted):
    p = planted
    every = {
        (i, v): p.loss(flipped(p.tokens, [(i, v)])) - p.loss(p.tokens)
        for i in range(T)
        for v in range(V)
        if v not in BANNED and v != p.tokens[i]
    }
    found = first_order(p.gradient, p.rows, p.tokens, p.may, V)
    assert [place for _, *place in found] == [list(k) for k in sorted(every, key=every.get, reverse=True)]
    for gain, i, v in found:
        assert gain == pytest.approx(every[i, v], abs=1e-12)
    two = first_order(p.gradient, p.rows, p.tokens, p.may, 2)
    assert all(sum(i == place for _, place, _ in two) == 2 for i in range(T))
    best = candidates(p.gradient, p.rows, p.tokens, p.may, 1)[:, 0].tolist()
    assert [max((v for i, v in every if i == at), key=lambda v: every[at, v]) for at in range(T)] == best


def test_iterative_flips_are_the_best_of_all_and_no_worse_than_described_or_clean(planted):
    p, clean = planted, planted.loss(planted.tokens)
    for n in (1, 2, 3):
        found = flipping.iterative(None, p.passage, p.reach(), n, 64, 4)
        curve = [p.loss(flipped(p.tokens, found.flips[:i])) for i in range(len(found.flips) + 1)]
        assert curve == sorted(curve) and curve[0] == clean
        assert curve[-1] == pytest.approx(p.best(n), abs=1e-12)
        assert len({at for at, _ in found.flips}) == len(found.flips) <= n
        described = flipping.described(None, p.passage, p.reach(), n)
        assert curve[-1] >= p.loss(flipped(p.tokens, described.flips)) - 1e-12
        assert (described.scorings, described.gradients, len(described.flips)) == (0, 1, n)
        for attack in (found, described):
            assert not {id for _, id in attack.flips} & set(BANNED)


def test_described_takes_the_positions_of_largest_gradient_and_their_best_tokens(planted):
    p = planted
    found = flipping.described(None, p.passage, p.reach(), 3)
    sizes = p.gradient.square().sum(1)
    assert [at for at, _ in found.flips] == sorted(range(T), key=lambda i: -float(sizes[i]))[:3]
    for at, id in found.flips:
        allowed = [v for v in range(V) if v not in BANNED and v != p.tokens[at]]
        assert id == max(allowed, key=lambda v: float(p.worth[at, v]))


def test_it_stops_where_no_flip_raises_the_loss_and_random_flips_do_not(planted):
    p = planted
    perfect = tuple(
        max((v for v in range(V) if v not in BANNED), key=lambda v, i=i: float(p.worth[i, v])) for i in range(T)
    )
    p.tokens, p.passage = perfect, Passage("perfect", (*perfect, 1), T)
    found = flipping.iterative(None, p.passage, p.reach(), 3, 64, 4)
    assert found.flips == [] and found.gradients == 1
    assert flipping.query(None, p.passage, p.reach(), 3, 8, 4, (1,)).flips == []
    assert len(flipping.at_random(None, p.passage, p.reach(), 3, 2, (1,)).flips) == 3


def test_query_scores_as_many_as_iterative_and_both_count_right(planted):
    p = planted
    p.worth[torch.arange(T), list(p.tokens)] = -100.0  # so that there is always something to gain
    p.worth[:, BANNED[0]] = -200.0
    for width, each in ((6, 2), (64, 2), (3, 4)):
        p.scored = 0
        one = flipping.iterative(None, p.passage, p.reach(), 3, width, each)
        assert one.scorings == p.scored
        p.scored = 0
        other = flipping.query(None, p.passage, p.reach(), 3, width, each, ("seed",))
        assert other.scorings == p.scored == one.scorings and len(other.flips) == 3
        assert (one.gradients, other.gradients) == (3, 0)


def test_random_flips_are_the_best_of_their_draws_at_different_positions(planted):
    p = planted
    found = flipping.at_random(None, p.passage, p.reach((0, 2, 3)), 2, 5, ("seed", 1))
    assert found.scorings == len(found.draws) == 5
    last = [p.loss(flipped(p.tokens, drawn)) for drawn in found.draws]
    assert found.flips == found.draws[last.index(max(last))]
    for drawn in found.draws:
        assert len({at for at, _ in drawn}) == len(drawn) == 2 and {at for at, _ in drawn} <= {0, 2, 3}
        assert all(p.may[id] and id != p.tokens[at] for at, id in drawn)
    assert found == flipping.at_random(None, p.passage, p.reach((0, 2, 3)), 2, 5, ("seed", 1))
    assert found != flipping.at_random(None, p.passage, p.reach((0, 2, 3)), 2, 5, ("seed", 2))


def test_only_positions_within_reach_are_flipped_and_only_texts_that_keep(planted):
    p = planted
    odd = lambda tokens: sum(tokens) % 2 == 1  # noqa: E731
    p.tokens = (1, 1, 1, 1, 1)
    p.passage = Passage("odd", (*p.tokens, 1), T)
    attacks = [
        flipping.described(None, p.passage, p.reach((1, 3), odd), 4),
        flipping.iterative(None, p.passage, p.reach((1, 3), odd), 4, 64, 8),
        flipping.query(None, p.passage, p.reach((1, 3), odd), 4, 64, 8, ()),
        flipping.at_random(None, p.passage, p.reach((1, 3), odd), 4, 3, ()),
    ]
    for attack in attacks:
        assert {at for at, _ in attack.flips} <= {1, 3}
        assert all(odd(flipped(p.tokens, attack.flips[:n])) for n in range(len(attack.flips) + 1))
    assert any(attack.flips for attack in attacks)
    nothing = p.reach((1, 3), lambda tokens: False)
    for attack in (
        flipping.described(None, p.passage, nothing, 4),
        flipping.iterative(None, p.passage, nothing, 4, 64, 4),
        flipping.query(None, p.passage, nothing, 4, 64, 4, ()),
        flipping.at_random(None, p.passage, nothing, 4, 2, ()),
        flipping.described(None, p.passage, p.reach(()), 4),
        flipping.iterative(None, p.passage, p.reach(()), 4, 64, 4),
        flipping.at_random(None, p.passage, p.reach(()), 4, 2, ()),
    ):
        assert attack.flips == []


def test_a_flip_after_which_the_loss_is_not_finite_is_none(planted):
    p = planted
    best = max((v for v in range(V) if v not in BANNED and v != p.tokens[2]), key=lambda v: float(p.worth[2, v]))
    p.worth[2, best] = float("nan")
    for attack in (
        flipping.iterative(None, p.passage, p.reach(), 3, 64, 8),
        flipping.query(None, p.passage, p.reach(), 3, 64, 8, ()),
    ):
        assert (2, best) not in attack.flips


def test_success_is_a_rise_by_the_threshold_after_so_many_flips():
    losses = [2.0, 2.25, 2.5, 2.25]
    assert success(losses, 2, 0.25, relative=True) and not success(losses, 2, 0.26, relative=True)
    assert success(losses, 2, 0.5, relative=False) and not success(losses, 2, 0.51, relative=False)
    assert success(losses, 9, 0.25, relative=False) and not success(losses, 3, 0.25, relative=True)
    assert not success(losses, 0, 1e-9, relative=True)
    assert not success([0.0, 0.0], 1, 0.15, relative=True), "15 % of nothing is no rise"
    with pytest.raises(ValueError, match="positive rise"):
        success(losses, 1, 0.0, relative=False)
    with pytest.raises(ValueError, match="expected losses"):
        success([], 1, 0.1, relative=False)


def test_a_hardened_row_has_its_best_flips_and_does_not_score_them():
    p = Planted(3)
    ids, targets = torch.tensor(p.tokens), torch.tensor([*p.tokens[1:], 1])
    changed, scored = hardened(ids, targets, p.gradient, p.rows, p.may, 2)
    gains = {
        i: max(float(p.worth[i, v] - p.worth[i, t]) for v in range(V) if p.may[v] and v != t)
        for i, t in enumerate(p.tokens)
    }
    want = [i for i in sorted(gains, key=gains.get, reverse=True)[:2] if gains[i] > 0]
    assert want and [i for i in range(T) if changed[i] != ids[i]] == sorted(want)
    assert [i for i in range(T) if scored[i] == IGNORE] == sorted(i - 1 for i in want if i)
    kept = scored != IGNORE
    assert torch.equal(scored[kept], targets[kept]) and ids.tolist() == list(p.tokens)
    for i in want:
        assert p.loss(flipped(p.tokens, [(i, int(changed[i]))])) - p.loss(p.tokens) == pytest.approx(gains[i])


def test_a_hardened_row_keeps_what_may_not_be_replaced_and_what_cannot_get_worse():
    p = Planted(3)
    may = p.may.clone()
    may[p.tokens[0]] = False
    ids = torch.tensor([p.tokens[0]] * T)
    same, scored = hardened(ids, ids, p.gradient, p.rows, may, T)
    assert torch.equal(same, ids) and torch.equal(scored, ids)
    none, _ = hardened(torch.tensor(p.tokens), ids, torch.full((T, D), torch.nan), p.rows, p.may, T)
    assert none.tolist() == list(p.tokens)


def test_the_rows_of_a_step_that_are_attacked_follow_from_its_number():
    assert attacked_rows(1, 5, 8, 0.5) == attacked_rows(1, 5, 8, 0.5)
    drawn = [tuple(attacked_rows(1, step, 8, 0.5)) for step in range(50)]
    assert all(len(set(rows)) == 4 and set(rows) <= set(range(8)) for rows in drawn) and len(set(drawn)) > 20
    assert attacked_rows(0, 0, 3, 1.0) == [0, 1, 2]
