"""The chunked loss against torch's own in float64, and packing against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lesion import loss
from lesion.loss import IGNORE, linear_cross_entropy, sum_of_losses
from lesion.packing import pack
from lesion.subjects import Scratch


@pytest.mark.parametrize("ignored", [0, 3, 16, 17])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_the_sum_and_its_gradients_are_torchs(rows, ignored, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 4 * 50)
    monkeypatch.setattr(loss, "LEAST", 1)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(2, 17, 8, generator=g, requires_grad=True),
        torch.randn(50, 8, generator=g, requires_grad=True),
    )
    targets = torch.randint(0, 50, (2, 17), generator=g)
    targets[0, 3:6], targets[1, :ignored] = IGNORE, IGNORE
    if ignored == 17:
        targets[:] = IGNORE  # nothing is scored: no loss and no gradient
    total = linear_cross_entropy(hidden, weight, targets)
    (total * 0.25).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    want = F.cross_entropy((h @ w.T).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE)
    (want * 0.25).backward()
    assert float(total.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    torch.testing.assert_close(hidden.grad.double(), h.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-opt", "tiny-gemma3-text", "tiny-decoder"]
)
def test_with_and_without_the_head_it_is_the_models_own_loss(family):
    model = Scratch(architecture=family).load().model
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), IGNORE)), 1)
    got = sum_of_losses(model, ids, targets, None, torch.arange(20).expand(2, -1))
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum")
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 3)
)
def test_packing_keeps_every_token_in_its_place(documents, length, seed):
    stream = [t for d in documents if d for t in (*d, 0)]  # an empty one would teach to end at once
    if len(stream) <= length:
        with pytest.raises(ValueError, match="make no row"):
            pack(documents, 0, length, seed)
        return
    packed = pack(documents, 0, length, seed)
    n = len(packed)
    assert sorted(packed.row(i) for i in range(n)) == list(range(n)) == sorted(packed.row(i) for i in range(n, 2 * n))
    ids, targets, mask, at = packed.batch(0, n)
    for b in range(n):
        start = packed.row(b) * length
        assert ids[b].tolist() == stream[start : start + length]
        for t in range(length):
            here, following = packed.number[start + t], packed.number[start + t + 1]
            assert targets[b, t] == (stream[start + t + 1] if here == following else IGNORE)
            same = [u for u in range(t + 1) if packed.number[start + u] == here]
            assert mask[b, 0, t].nonzero().flatten().tolist() == same and at[b, t] == len(same) - 1
    again = packed.batch(3, 2)[0]
    assert torch.equal(again, torch.cat([packed.batch(i, 1)[0] for i in (3, 4)]))


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-decoder", "tiny-mistral"])
def test_documents_that_are_apart_do_not_see_each_other(family):
    """The loss of a packed row is the sum of the losses of its documents, each alone."""
    model = Scratch(architecture=family).load().model
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 250, n).tolist() for n in (9, 5, 14)]
    packed = pack(documents, 255, 30, 0)
    together = float(sum_of_losses(model, *packed.batch(0, 1)).detach())
    alone = 0.0
    for document in documents:
        ids = torch.tensor([[*document, 255]])
        alone += float(F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum").detach())
    assert together == pytest.approx(alone, rel=1e-5)


def test_logits_are_never_whole_at_2048_tokens_and_a_vocabulary_of_50_000():
    """No tensor of a training step is as large as all logits; the largest is a chunk, or a table of the vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return out

    tokens, vocabulary, d = 2048, 50_000, 32
    made = Scratch(
        architecture="lesion-decoder",
        config={
            "vocab_size": vocabulary, "hidden_size": d, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": tokens,
        },
    )  # fmt: skip
    model = made.load().model.train()
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        sum_of_losses(model, ids, ids.roll(-1, 1), None, torch.arange(tokens)[None]).backward()
    assert seen.bytes <= loss.LEAST * vocabulary * 4 < tokens * vocabulary * 4 / 6
