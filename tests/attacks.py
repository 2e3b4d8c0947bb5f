"""What the tests of attacks share: models in float64, and losses computed the long way."""

import functools

import torch

from lesion import packaged
from lesion.passages import Passage
from lesion.subjects import Scratch

FAMILIES = list(packaged.TINY)


@functools.cache
def model(family, dtype="float64", **config):
    """A tiny model that no test may change."""
    return Scratch(architecture=family, config=config).load().model.to(getattr(torch, dtype))


def passage(family, length=40, target=30, seed=0, item="a text"):
    """A passage of random bytes; of T5 the part that may be attacked is the source."""
    stream = torch.Generator().manual_seed(seed)
    tokens = tuple(torch.randint(0, 128, (length,), generator=stream).tolist())
    if family == "tiny-t5":
        return Passage(item, tokens[target:], source=tokens[:target])
    return Passage(item, tokens, target)


def naive(model, passage):
    """Mean −ln p of the targets in float64, one text at a time, by the model's plain forward."""
    targets = torch.tensor(passage.targets)
    with torch.no_grad():
        if passage.source is not None:
            start = model.config.decoder_start_token_id
            ids = torch.tensor([[start, *passage.tokens[:-1]]])
            logits = model(input_ids=torch.tensor([passage.source]), decoder_input_ids=ids).logits[0]
        else:
            logits = model(input_ids=torch.tensor([passage.tokens])).logits[0, passage.target - 1 : -1]
    return float(-logits.double().log_softmax(-1)[torch.arange(len(targets)), targets].mean())
