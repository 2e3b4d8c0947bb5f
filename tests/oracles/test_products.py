"""Products through oneDNN against float64."""

import pytest
import torch
from torch import nn

from lesion.products import fast_products, linear, times_transposed


@pytest.mark.parametrize("shape", [(7, 5), (2, 9, 16), (1, 3), (4, 1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients(shape, bias):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, requires_grad=True)
    w, b = torch.randn(11, shape[-1], generator=g, requires_grad=True), torch.randn(11, generator=g, requires_grad=True)
    above = torch.randn(*shape[:-1], 11, generator=g)
    out = linear(x, w, b if bias else None)
    out.backward(above)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = nn.functional.linear(exact[0], exact[1], exact[2] if bias else None)
    want.backward(above.double())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    for got, right in zip((x, w, b) if bias else (x, w), exact, strict=False):
        torch.testing.assert_close(got.grad.double(), right.grad, atol=1e-5, rtol=1e-5)


def test_frozen_parts_and_other_types_keep_to_their_rules():
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    assert linear(x.double(), w.detach().double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert times_transposed(torch.zeros(0, 4), w).shape == (0, 5)


def test_only_plain_linear_layers_are_arranged_and_only_for_the_block():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with fast_products(model):
        assert ["forward" in m.__dict__ for m in model] == [True, False, False]
        model(torch.randn(2, 4)).sum().backward()
    assert not any("forward" in m.__dict__ for m in model)
