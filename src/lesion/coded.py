"""Linear layers whose weights are held as codes of eight or four bits, which no step can damage and no gradient can train.

    int8   ŵ = c·s/127    c = round(127·w/s), s = max|w| of the weight's row (Dettmers et al. 2022, "LLM.int8()", section 3)
    nf4    ŵ = q[c]·s     q: 16 quantiles of a normal distribution, s = max|w| of 64 weights that follow each other in the
                          matrix, row by row (Dettmers et al. 2023, "QLoRA", section 3)

    y = x·Ŵᵀ + b,  ∂x = g·Ŵ,  ∂b = Σg;  the codes have no gradient, and ∂x decodes them again instead of keeping Ŵ.

Codes are made and read by bitsandbytes, and are the ones that its own layers hold. What is multiplied is the same in training and
in evaluation, and on every device, which bitsandbytes' layers do not promise on a CPU:

int8   The input is coded too, by the token, but for its columns with a number of 6 or more, which are multiplied as they are (the
       mixed product of LLM.int8()). This is `bitsandbytes.matmul` as its Linear8bitLt calls it in evaluation; in training mode on
       a CPU that layer leaves the input alone. A column is kept out for a whole batch, so a row may depend on who shares it.
       The gradient passes the rounding of the input by as if it were not there.
nf4    Ŵ is multiplied in the type of the input, as Linear4bit does in training; in evaluation on a CPU with AVX512-BF16 that
       layer rounds input and weights to bfloat16. Codes are read in rows of 64: the decoder that bitsandbytes 0.50 has for
       AVX-512 misreads matrices of 48, 96 or 160 columns, whose rows are not whole numbers of blocks.

All that determines a layer lies in its buffers and its bias, so it is saved, restored and digested like any other.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lesion.constraints import class_of
from lesion.ffn import oriented
from lesion.products import times_transposed

Kind = Literal["int8", "nf4"]
BLOCK = 64  # weights that share a scale in nf4
OUTLIER = 6.0  # of LLM.int8(): inputs from here on are not coded
LARGEST = 65504.0  # float16's last number, through which int8 codes are made


def hush() -> None:
    """bitsandbytes would log at its import that a kernel is missing, which nothing here calls, and at every product that inputs
    are coded by way of float16."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def library() -> Any:
    """bitsandbytes. ValueError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("int8 and nf4 need the package bitsandbytes: pip install 'lesion[nf4]'")
    hush()
    import bitsandbytes

    return bitsandbytes


def encode_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [blocks, 32], two to a byte, and scales float32 [blocks] of a matrix of any shape; the last block is filled up
    with zeros."""
    flat = F.pad(weight.detach().reshape(-1), (0, -weight.numel() % BLOCK))
    codes, state = library().functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    return codes.view(-1, BLOCK // 2), state.absmax


def decode_nf4(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], kind: torch.dtype) -> torch.Tensor:
    """Ŵ [out, in] in a type of 16 or 32 bits, by way of float32 where it is another."""
    functional, known = library().functional, kind in (torch.float32, torch.bfloat16, torch.float16)
    rows = torch.Size((len(codes), BLOCK))
    state = functional.QuantState(scales, rows, None, BLOCK, "nf4", kind if known else torch.float32)
    found: torch.Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
    return found.view(-1)[: shape[0] * shape[1]].view(shape).to(kind)


def encode_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales float32 [out], of the weights rounded to float16. ValueError where one is beyond it."""
    if (largest := float(weight.detach().abs().max())) > LARGEST:
        raise ValueError(f"int8 codes are made by way of float16, which ends at {LARGEST:g}; a weight is {largest:g}")
    codes, scales, _ = library().functional.int8_vectorwise_quant(weight.detach().to(torch.float16))
    return torch.where(scales[:, None] > 0, codes, 0), scales  # a row of zeros was divided by its scale


def decode_int8(codes: torch.Tensor, scales: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Ŵ [out, in]."""
    return (codes.float() * (scales / 127)[:, None]).to(kind)


class _Product(torch.autograd.Function):
    """x [..., in] ↦ x·Ŵᵀ [..., out] of nf4 codes, differentiable by x as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, shape: Any) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return times_transposed(x, decode_nf4(codes, scales, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        (g,), (codes, scales) = above, ctx.saved_tensors
        weight = decode_nf4(codes, scales, ctx.shape, g.dtype)
        grad = g @ weight if torch.is_grad_enabled() else times_transposed(g, weight.T.contiguous())
        return grad, None, None, None


class Coded(nn.Linear, ABC):
    """What both kinds share: a linear layer without a parameter `weight`; what stands there decodes, and cannot be written to."""

    kind: ClassVar[Kind]
    type_of_codes: ClassVar[torch.dtype]
    codes: torch.Tensor
    scales: torch.Tensor
    held: torch.Tensor

    def __init__(self, out: int, into: int, bias: nn.Parameter | None, like: torch.Tensor):
        """Empty codes on the device of a weight [out, in], in whose type they will be decoded."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = out, into
        self.register_parameter("bias", bias)
        codes, scales = self.room()
        self.register_buffer("codes", torch.zeros(codes, dtype=self.type_of_codes, device=like.device))
        self.register_buffer("scales", torch.zeros(scales, dtype=torch.float32, device=like.device))
        self.register_buffer("held", like.new_empty(0))  # follows the model where its type is changed

    @abstractmethod
    def room(self) -> tuple[tuple[int, int], int]:
        """Shape of the codes, and number of scales."""

    @abstractmethod
    def fill(self, weight: torch.Tensor) -> None:
        """Codes a weight [out, in]."""

    @abstractmethod
    def decoded(self, kind: torch.dtype) -> torch.Tensor:
        """Ŵ [out, in]."""

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] ↦ x·Ŵᵀ + b [n, out]."""

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.decoded(self.held.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            flat = self.product(input.reshape(-1, self.in_features))
        return flat.view(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Whoever changes the type of a model changes that of what is decoded, and no scale."""
        exact = self.scales
        super()._apply(fn, recurse)
        self.scales = exact.to(self.codes.device)
        return self


class Nf4Linear(Coded):
    """NormalFloat in blocks of 64, without a second quantisation of the scales."""

    kind = "nf4"
    type_of_codes = torch.uint8

    def room(self) -> tuple[tuple[int, int], int]:
        blocks = -(-self.out_features * self.in_features // BLOCK)
        return (blocks, BLOCK // 2), blocks

    def fill(self, weight: torch.Tensor) -> None:
        self.codes, self.scales = encode_nf4(weight)

    def decoded(self, kind: torch.dtype) -> torch.Tensor:
        return decode_nf4(self.codes, self.scales, (self.out_features, self.in_features), kind)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x, self.codes, self.scales, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Linear(Coded):
    """LLM.int8(): a scale for each row, and the input coded by the token but for its outliers."""

    kind = "int8"
    type_of_codes = torch.int8

    def room(self) -> tuple[tuple[int, int], int]:
        return (self.out_features, self.in_features), self.out_features

    def fill(self, weight: torch.Tensor) -> None:
        self.codes, self.scales = encode_int8(weight)

    def decoded(self, kind: torch.dtype) -> torch.Tensor:
        return decode_int8(self.codes, self.scales, kind)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        bits = library()
        state = bits.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = self.codes, self.scales, False, False
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: torch.Tensor = bits.matmul(x, self.codes, state=state, threshold=OUTLIER, bias=bias)
        return y


KINDS: dict[Kind, type[Coded]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def coded(model: nn.Module) -> Iterator[tuple[str, Coded]]:
    """Every layer that is held as codes, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Coded):
            yield name, module


def code_of(model: nn.Module) -> str | None:
    """What its linear weights are coded as, here or by whoever loaded it; None where they are floats."""
    for module in model.modules():
        if isinstance(module, Coded):
            return module.kind
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            return str(getattr(module.weight, "quant_type", str(module.weight.dtype).removeprefix("torch.")))
    return None


@dataclass(frozen=True)
class Coding:
    """What became of the weights: Σw², and Σ(ŵ − w)², over all that were coded."""

    matrices: int
    weights: int
    square: float
    error: float


def encode(model: Any, kind: Kind) -> Coding:
    """Replaces linear layers, Conv1D among them, by coded ones of the same weights. Weights that were held to a sign keep it, and
    what held them goes, since no code is ever trained.

    The output head and what shares the weights of an embedding stay as they are; so do embeddings, norms, and experts that are
    held as one tensor. Raises ValueError for a model that holds codes already, that has adapters or no such layer, for a layer
    with a forward of its own, and for weights that are not finite or, for int8, too large.
    """
    matrices, weights, square, error = 0, 0, 0.0, 0.0
    for path, module, layer in _replaced(model, kind):
        exact = oriented(module).detach()
        try:
            layer.fill(exact)
        except ValueError as refused:
            raise ValueError(f"{path}: {refused}") from None
        exact = exact.double()
        matrices, weights, square = matrices + 1, weights + exact.numel(), square + float(exact.square().sum())
        error += float((layer.decoded(torch.float64) - exact).square().sum())
        if not math.isfinite(square):
            raise ValueError(f"{path} holds numbers that are not finite, which have no {kind} codes")
    return Coding(matrices, weights, square, error)


def structure(model: Any, kind: Kind) -> None:
    """The same layers without their codes: what a kept state is filled into. Raises ValueError as `encode` does."""
    for _ in _replaced(model, kind):
        continue


def _replaced(model: Any, kind: Kind) -> Iterator[tuple[str, Any, Coded]]:
    """Each linear layer with its path and the empty one that has taken its place."""
    library()
    if (other := code_of(model)) is not None:
        raise ValueError(f"the linear weights of this model are {other} codes already; {kind} codes are made of floats")
    places, made = _linears(model), KINDS[kind]
    if not places:
        raise ValueError(
            f"a {type(model).__name__} has no linear layer besides its head, so nothing can be held as {kind}"
        )
    for path, module in places.items():
        weight = oriented(module).detach()
        out, into = weight.shape
        layer: Coded = made(out, into, module.bias, weight)
        layer.train(module.training)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, layer)
        yield path, module, layer


def _linears(model: Any) -> dict[str, Any]:
    """What is to be coded, by its path."""
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {}
    for path, module in model.named_modules():
        if "base_layer" in module._modules:
            raise ValueError(f"{path} has an adapter, which codes would round off: merge it first")
        if isinstance(module, nn.MultiheadAttention):
            tables.add(id(module.out_proj.weight))  # which is read there without being called
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head or id(module.weight) in tables:
            continue
        if class_of(module) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"{path} is a {type(module).__name__}, whose forward is its own; a Linear or Conv1D can be held as codes"
            )
        found[path] = module
    return found
