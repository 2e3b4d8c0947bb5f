"""Products through oneDNN against float64."""

import pytest
import torch
from torch import nn

from lesion.products import attention, fast_products, linear, times_transposed


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


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_half_precision_is_as_exact_as_the_fused_kernel(groups, masked):
    g = torch.Generator().manual_seed(1)
    q, k, v, above = (torch.randn(3, h, 20, 16, generator=g) for h in (4, groups, groups, 4))
    mask = (torch.rand(3, 1, 20, 20, generator=g) > 0.3).tril() | torch.eye(20, dtype=torch.bool) if masked else None
    module = nn.Module()

    def gradients(how, kind):
        parts = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out = how(*parts)
        out.backward(above.to(out.dtype))
        return [out.detach().double(), *(x.grad.double() for x in parts)]

    def fused(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

    def own(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(module, q, k, v, mask)[0].transpose(1, 2)

    exact = gradients(fused, torch.float64)
    for got, theirs, want in zip(gradients(own, torch.bfloat16), gradients(fused, torch.bfloat16), exact, strict=True):
        assert (got - want).abs().mean() <= 2 * (theirs - want).abs().mean() + 1e-4
    torch.testing.assert_close(attention(module, q, k, v, mask)[0].transpose(1, 2), fused(q, k, v))


def test_half_precision_training_ends_where_the_fused_kernel_ends(monkeypatch):
    from lesion import products
    from lesion.loss import sum_of_losses
    from lesion.subjects import Scratch

    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for longest in (512, 0):
        monkeypatch.setattr(products, "LONGEST", longest)
        model = Scratch(architecture="tiny-mistral").load().model.train()
        before = model.config._attn_implementation
        with fast_products(model), torch.autocast("cpu", torch.bfloat16):
            loss = sum_of_losses(model, ids, ids, None, torch.arange(40).expand(2, -1))
        loss.backward()
        assert model.config._attn_implementation == before
        found.append((float(loss.detach()), model.model.layers[0].self_attn.q_proj.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-3)
    assert nn.functional.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.98
