"""Second derivatives: products against finite differences and dense matrices, Lanczos against exact eigenvalues, planted subspaces."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import model
from lesion import lanczos, measures
from lesion.curvature import Curvature, chosen, flat, loss_of, product, twice_differentiable
from lesion.loss import sum_of_losses
from lesion.subjects import Scratch
from lesion.trial import Trial

CAUSAL = ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-gemma3-text", "tiny-decoder", "tiny-qwen2", "tiny-opt"]
# RMS norms round to float32 on their way in these
ROUNDING = {"tiny-llama", "tiny-gemma3-text", "tiny-decoder", "tiny-qwen2"}


def batch(rows=3, length=12, seed=0):
    stream = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, 128, (rows, length), generator=stream) for _ in range(2))
    targets[0, 3] = -100
    return ids, targets, None, torch.arange(length).expand(rows, -1)


def vector(n, seed=1):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("operator", ["hessian", "gauss-newton"])
def test_products_are_symmetric_and_the_pieces_of_a_batch_add_up(family, operator):
    here = model(family)
    with twice_differentiable(here):
        parameters = chosen(here, "mlp.out@0+attention.output@1")
        with Curvature(here, parameters, batch(), operator) as whole:
            u, v = vector(whole.size, 1), vector(whole.size, 2)
            left, right = float(u @ whole.times(v)), float(v @ whole.times(u))
            scale = float(whole.times(v).norm() * u.norm())
            assert abs(left - right) <= (1e-6 if family in ROUNDING else 1e-12) * scale
            if operator == "gauss-newton":
                assert float(v @ whole.times(v)) >= 0
            expected, gradient = whole.times(v), whole.gradient()
        for keep in (True, False):
            with Curvature(here, parameters, batch(), operator, rows=2, keep=keep) as parts:
                torch.testing.assert_close(parts.times(v), expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
                torch.testing.assert_close(parts.gradient(), gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", [family for family in CAUSAL if family != "tiny-opt"])  # whose ReLU has kinks
def test_hessian_products_are_differences_of_gradients(family):
    here, given, step = model(family), batch(), 1e-3 if family in ROUNDING else 1e-4
    with twice_differentiable(here):
        parameters = chosen(here, "mlp.out@0")
        with Curvature(here, parameters, given) as c:
            v = vector(c.size)
            found, first = c.times(v), c.gradient()

    def gradient(by):
        with torch.no_grad():
            for p, d in zip(parameters.values(), v.split([p.numel() for p in parameters.values()]), strict=True):
                p += by * d.view_as(p)
        ids, targets, mask, at = given
        logits = here(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False).logits
        grads = torch.autograd.grad(loss_of(logits, targets) / (targets != -100).sum(), list(parameters.values()))
        with torch.no_grad():
            for p, d in zip(parameters.values(), v.split([p.numel() for p in parameters.values()]), strict=True):
                p -= by * d.view_as(p)
        return flat(grads)

    for p in parameters.values():
        p.requires_grad_(True)
    torch.testing.assert_close(gradient(0.0), first, rtol=1e-5, atol=1e-8)
    # of fourth order in the step (Richardson), so that truncation does not stand for an error of ours
    near, far = ((gradient(h) - gradient(-h)) / (2 * h) for h in (step, 2 * step))
    assert float(((4 * near - far) / 3 - found).norm() / found.norm()) < (2e-3 if family in ROUNDING else 1e-6)


def test_the_loss_is_that_of_training():
    here, (ids, targets, mask, at) = model("tiny-llama", "float32"), batch()
    logits = here(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False).logits
    ours, theirs = loss_of(logits, targets).item(), sum_of_losses(here, ids, targets, mask, at).item()
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_gauss_newton_is_the_dense_matrix_by_its_definition():
    here, given = model("tiny-gpt-neox"), batch(1, 5)
    with twice_differentiable(here):
        parameters = chosen(here, "mlp.out@1")
        [(name, p)] = parameters.items()
        with Curvature(here, parameters, given, "gauss-newton") as c:
            v = vector(c.size)
            found = c.times(v)
    targets = given[1]

    def logits(weight):
        return torch.func.functional_call(here, {name: weight}, (given[0],), {"use_cache": False}).logits[0]

    with twice_differentiable(here):
        jacobian = torch.func.jacrev(logits)(p.detach()).flatten(2)
        z = logits(p.detach())
    total = torch.zeros_like(v)
    for t in range(5):
        if targets[0, t] != -100:
            q = z[t].softmax(-1)
            total += jacobian[t].T @ ((torch.diag(q) - q[:, None] * q) @ (jacobian[t] @ v))
    torch.testing.assert_close(found, total / int((targets != -100).sum()), rtol=1e-9, atol=1e-15)


def test_float32_products_agree_with_float64():
    double, single = model("tiny-gpt2"), model("tiny-gpt2", "float32")
    found = []
    for here in (double, single):
        with twice_differentiable(here), Curvature(here, chosen(here, "mlp"), batch()) as c:
            found.append(c.times(vector(c.size).to(c.parameters[0])).double())
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=20)
def test_the_product_can_be_differentiated_twice(m, k, n, seed):
    stream = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(r, k, generator=stream, requires_grad=True) for r in (m, n))
    u = torch.randn(m, n, generator=stream)
    outs = []
    for multiply in (product, lambda x, y: x @ y.T):
        total = (multiply(a, b).sin() * u).sum()
        grads = torch.autograd.grad(total, (a, b), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in grads), (a, b))
        outs.append([*grads, *second])
    for mine, plain in zip(*outs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def exact(family="tiny-gpt-neox", site="attention.output@0"):
    """A small Hessian, densely."""
    here = model(family)
    with twice_differentiable(here), Curvature(here, chosen(here, site), batch()) as c:
        dense = torch.stack([c.times(row) for row in torch.eye(c.size, dtype=torch.float64)])
    return (dense + dense.T) / 2


def test_lanczos_finds_the_exact_eigenpairs_of_a_model():
    here, dense = model("tiny-gpt-neox"), exact()
    values, vectors = torch.linalg.eigh(dense)
    order = values.abs().argsort(descending=True)
    with twice_differentiable(here), Curvature(here, chosen(here, "attention.output@0"), batch()) as c:
        found = lanczos.top(c.times, vector(c.size), 6, tolerance=1e-9)
        assert found.products == c.products
    torch.testing.assert_close(found.values, values[order[:6]], rtol=1e-8, atol=0)
    assert found.residuals.max() <= 1e-9 * found.values.abs().max()
    for value, v in zip(found.values, found.vectors, strict=True):
        assert float((dense @ v - value * v).norm()) <= 1e-8 * float(values.abs().max())
    both = found.vectors @ vectors[:, order[:6]]
    torch.testing.assert_close(both.abs().diagonal(), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)


@given(st.integers(1, 5), st.integers(0, 10**6), st.booleans())
@settings(max_examples=15)
def test_lanczos_with_restarts_on_planted_spectra(k, seed, negative):
    """A bulk, k large eigenvalues of either sign, one of them twice."""
    n, stream = 150, torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=stream, dtype=torch.float64))
    planted = torch.linspace(0.01, 0.5, n, dtype=torch.float64)
    planted[:k] = torch.tensor([3.0 + i for i in range(k)]) * (-1 if negative else 1)
    dense = turn @ torch.diag(planted) @ turn.T
    found = lanczos.top(
        lambda v: dense @ v,
        torch.randn(n, generator=stream, dtype=torch.float64),
        k,
        tolerance=1e-7,
        width=k + 4,
        restarts=60,
    )
    expected = planted[planted.abs().argsort(descending=True)][:k]
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=0)
    eye = found.vectors @ found.vectors.T
    torch.testing.assert_close(eye, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-8)


def test_the_flat_subspace_of_a_planted_quadratic_is_recovered():
    """½·wᵀAw with ten steep directions and a flat rest: what is flat of a vector is what A does not see of it."""
    n, steep, stream = 400, 10, torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=stream, dtype=torch.float64))
    values = torch.cat((torch.linspace(1, 2, steep, dtype=torch.float64), torch.zeros(n - steep, dtype=torch.float64)))
    dense = turn @ torch.diag(values) @ turn.T
    found = lanczos.top(
        lambda v: dense @ v, torch.randn(n, generator=stream, dtype=torch.float64), steep, tolerance=1e-10
    )
    torch.testing.assert_close(found.vectors.T @ found.vectors, turn[:, :steep] @ turn[:, :steep].T, rtol=0, atol=1e-8)
    flat_vector, steep_vector = turn[:, steep:].sum(1), turn[:, :steep].sum(1)
    assert lanczos.flat_share(flat_vector, found.vectors) == pytest.approx(1, abs=1e-9)
    assert lanczos.flat_share(steep_vector, found.vectors) == pytest.approx(0, abs=1e-9)
    mixed = 3 * flat_vector / flat_vector.norm() + 4 * steep_vector / steep_vector.norm()
    assert lanczos.flat_share(mixed, found.vectors) == pytest.approx(9 / 25, abs=1e-7)
    with pytest.raises(ValueError, match="has no direction"):
        lanczos.flat_share(torch.zeros(n), found.vectors)


def test_the_filter_finds_the_null_space():
    n, stream = 120, torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=stream, dtype=torch.float64))
    values = torch.cat((torch.zeros(5, dtype=torch.float64), torch.linspace(0.2, 1, n - 5, dtype=torch.float64)))
    values[60:] *= -1
    dense = turn @ torch.diag(values) @ turn.T
    block = torch.randn(5, n, generator=stream, dtype=torch.float64)
    quotients, vectors, residuals = lanczos.near_null(lambda v: dense @ v, block, 1.0, 120)
    assert quotients.abs().max() < 1e-6 and residuals.max() < 1e-3
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float((vectors @ turn[:, :5]).square().sum()) == pytest.approx(5, abs=1e-4), "the span is the null space"


def test_the_density_has_the_trace_and_the_shares_of_the_spectrum():
    n, stream = 300, torch.Generator().manual_seed(0)
    values = torch.cat((torch.full((270,), 0.0), torch.full((30,), 2.0))).double()
    found = lanczos.density(lambda v: values * v, n, 4, 12, stream, values)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4, dtype=torch.float64))
    assert all(abs(share - 0.9) < 0.02 for share in found.share(-0.1, 0.1))
    assert all(trace == pytest.approx(60, rel=0.05) for trace in found.trace(n))
    dense = exact()
    probes = lanczos.density(lambda v: dense @ v, len(dense), 30, 40, stream, dense)
    assert sum(probes.trace(len(dense))) / 30 == pytest.approx(
        float(dense.trace()), abs=4 * float(dense.norm()) / 30**0.5
    )


def test_a_basis_that_does_not_fit_lies_on_disk_and_says_so(tmp_path):
    dense = exact()
    start = vector(len(dense))
    near = lanczos.top(lambda v: dense @ v, start, 4, tolerance=1e-8)
    far = lanczos.top(lambda v: dense @ v, start, 4, tolerance=1e-8, budget=1e4, folder=tmp_path)
    assert far.on_disk and not near.on_disk and not list(tmp_path.iterdir())
    torch.testing.assert_close(near.values, far.values)
    torch.testing.assert_close(near.vectors, far.vectors, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="more than the memory allowed and the .* GiB free"):
        lanczos.room(10**6, 10**9, start, 1.0, tmp_path)
    with pytest.raises(ValueError, match="0 eigenpairs were asked for"):
        lanczos.top(lambda v: v, start, 0)
    with pytest.raises(ValueError, match="not finite"):
        lanczos.top(lambda v: v * math.nan, start, 2)


@pytest.mark.parametrize("restarts", [0, 2])
def test_what_has_not_converged_has_the_residuals_that_are_said(restarts):
    n, stream = 200, torch.Generator().manual_seed(0)
    dense = torch.randn(n, n, generator=stream, dtype=torch.float64)
    dense = dense + dense.T
    found = lanczos.top(lambda v: dense @ v, vector(n), 5, tolerance=1e-14, width=12, restarts=restarts)
    for value, v, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert float(v @ dense @ v) == pytest.approx(float(value), rel=1e-9)
        assert float((dense @ v - value * v).norm()) == pytest.approx(float(residual), rel=1e-6)


def test_an_operator_of_few_directions_ends_early():
    """The identity has one eigenvalue, and a start vector reaches one direction of it."""
    found = lanczos.top(lambda v: v, vector(50), 3)
    assert len(found.values) == 1 and float(found.values[0]) == pytest.approx(1)


def test_what_has_no_second_derivative_is_refused_before_any_compute():
    here = Scratch().load().model
    parameters = chosen(here, "mlp")
    with pytest.raises(ValueError, match="attention of kind 'sdpa' has no second derivative"):
        Curvature(here, parameters, batch())
    with pytest.raises(ValueError, match="need float32 weights or better; .* is held in bfloat16"):
        chosen(Scratch(dtype="bfloat16").load().model, "mlp")
    with pytest.raises(ValueError, match="is a part of"):
        chosen(model("tiny-gpt2"), "attention.value")
    with (
        pytest.raises(ValueError, match="second derivatives need attention of kind"),
        twice_differentiable(Scratch(architecture="tiny-t5").load().model),
    ):
        pass
    ids, targets, mask, at = batch()
    with twice_differentiable(here), pytest.raises(ValueError, match="without targets"):
        Curvature(here, parameters, (ids, torch.full_like(targets, -100), mask, at))
    with pytest.raises(ValueError, match="no site 'mpl'"):
        chosen(here, "mpl")


def test_nothing_is_left_behind():
    here = Scratch().load().model
    before = here.config._attn_implementation, [p.requires_grad for p in here.parameters()]
    with twice_differentiable(here), Curvature(here, chosen(here, "mlp"), batch()) as c:
        c.times(vector(c.size).float())
    assert (here.config._attn_implementation, [p.requires_grad for p in here.parameters()]) == before
    assert not any("forward" in m.__dict__ for m in here.modules()) and all(p.grad is None for p in here.parameters())


def test_the_measure_says_what_the_kernels_say(lab):
    measure = measures.Curvature(
        documents=2, tokens=20, site="mlp.out", directions=3, random=2, null=2, degree=30, probes=1, steps=10
    ).pin()
    subject = Scratch(architecture="tiny-gpt-neox")
    rows = {row["item"]: row for row in lab.read([subject], [measure]).to_dicts()}
    specimen = subject.load()
    with measure.operated(specimen) as c:
        pairs = lanczos.top(c.times, vector(c.size).float(), 3, tolerance=1e-5)
    for i in range(3):
        assert rows[f"top/{i:02d}"]["value"] == pytest.approx(float(pairs.values[i]), rel=1e-3)
        assert rows[f"top/{i:02d}"]["residual"] < 5e-3
    assert abs(rows["random/00"]["length"]) < 1 and rows["null/00"]["length"] < rows["random/00"]["length"]
    assert sum(rows["density/00"]["weights"]) == pytest.approx(1)
    assert rows["top/00"]["size"] == 2 * 64 * 96
    with pytest.raises(ValueError, match="encoder-decoder"):
        measure.read(Scratch(architecture="tiny-t5").load(), measure._names())
    with pytest.raises(ValueError, match="longer than the context"):
        measures.Curvature(tokens=500, site="mlp").batch(specimen)


def test_the_steep_subspace_is_found_once_for_one_state_and_again_for_another(monkeypatch):
    from lesion.bench import Bench
    from lesion.steps import Noise

    specimen = Scratch().load()
    specimen.trial = Trial(subject=Scratch())
    bench, calls = Bench(specimen), []
    measure = measures.Curvature(documents=1, tokens=12, site="mlp.out@0", directions=2).pin()
    real = lanczos.top
    monkeypatch.setattr(lanczos, "top", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = measure.steep(specimen)
    assert measure.steep(specimen) is first and len(calls) == 1
    with bench.applied(Noise(site="mlp", sigma=0.5, seed=1)):
        assert float((measure.steep(specimen).values - first.values).abs().max()) > 0
    assert torch.equal(measure.steep(specimen).values, first.values) and len(calls) == 3
