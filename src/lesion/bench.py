"""The bench: a specimen, the steps that lie on it, and the proof that what was undone is undone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lesion.digest import aliases, combined, digests, memory, named_tensors, tensor_digest
from lesion.threads import each
from lesion.trial import Specimen, Step, describe, state_key
from lesion.vocabularies import tokenizer_digest


class Undo:
    """Copies of tensors that steps are about to change.

    Siblings that touch the same tensors share one copy: after an undo the model is bit for bit what was copied, so a
    sweep over doses copies once.
    """

    def __init__(self) -> None:
        self._saved: dict[str, torch.Tensor] = {}

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        self._saved = {name: copy for name, copy in self._saved.items() if name in tensors}
        for name, tensor in tensors.items():
            if name not in self._saved:
                self._saved[name] = tensor.detach().clone()

    def restore(self, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        """Copies back. Returns the digests of what lies there then, each taken while the tensor is in the cache."""

        def one(name: str) -> str:
            tensor, saved = tensors[name], self._saved[name]
            if tensor.shape != saved.shape or tensor.dtype != saved.dtype:
                return "of another shape or type"  # there is no way back: the proof fails, and names it
            if tensor.device.type == "cpu" and tensor.is_contiguous() and saved.is_contiguous():
                np.copyto(memory(tensor), memory(saved))  # on this thread; torch would call others
            else:
                tensor.detach().copy_(saved)
            return tensor_digest(tensor)

        return dict(zip(tensors, each(one, list(tensors)), strict=True))


class Changed(RuntimeError):
    """The model is not what it must be: a step or a measure changed more than it may. The specimen is worthless.

    `of` is the key of the state or reading that did it.
    """

    of: str = ""


def manner(model: nn.Module) -> list[tuple[bool, int, int]]:
    """How every module computes, beside its tensors: in training mode or not, and behind how many hooks."""
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


class Bench:
    """A specimen and the steps that lie on it. Every change of the model goes through here. `careful`: whether a step that
    changes more than it announces is found at once, and not only when what follows it is verified."""

    def __init__(self, specimen: Specimen, careful: bool = False):
        self.specimen, self._careful = specimen, careful
        self._manner = manner(specimen.model)
        self._undos: list[Undo] = [Undo()]
        self._depth = 0
        if not specimen.digests:
            specimen.digests = digests(specimen.model)
            found = combined(specimen.digests)
            specimen.ledger.append(
                {"subject": specimen.trial.subject.to_json(), "tied": aliases(specimen.model), "after": found}
            )

    def apply(self, step: Step, names: list[str] | None = None) -> None:
        """Applies a step for good and enters it into the ledger."""
        specimen, before, tokenizer = self.specimen, self.specimen.digests, self.specimen.tokenizer
        config = dict(vars(specimen.model.config))
        facts = step.apply(specimen)
        json.dumps(facts, allow_nan=False)  # what cannot stand in a ledger is this step's failure, and nobody else's
        options = {k: v for k, v in vars(specimen.model.config).items() if k not in config or config[k] != v}
        new: dict[str, Any] = {"configuration": options} if options else {}
        new |= {} if specimen.tokenizer is tokenizer else {"tokenizer": tokenizer_digest(specimen.tokenizer)}
        after = {**before, **digests(specimen.model, names)} if names is not None else digests(specimen.model)
        changed = [name for name in after if before.get(name) != after[name]]
        specimen.digests = after
        if names is None:
            self._manner = manner(specimen.model)  # such a step may build
        elif self._careful:
            self.verify(describe(step), state_key(specimen.trial.key, step))
        specimen.trial = specimen.trial >> step
        specimen.ledger = [
            *specimen.ledger,
            {
                "step": step.to_json(),
                "before": combined(before),
                "after": combined(after),
                "changed": changed,
                "facts": facts,
                **new,
            },
        ]

    @contextmanager
    def applied(self, step: Step) -> Iterator[None]:
        """Applies an in-place step for the length of a `with` block, and undoes it whatever happens inside."""
        specimen = self.specimen
        before = specimen.digests, specimen.trial, specimen.ledger
        tokenizer, config = specimen.tokenizer, dict(vars(specimen.model.config))
        tensors = dict(named_tensors(specimen.model))
        names = list(dict.fromkeys(step.touches(specimen)))
        if unknown := [name for name in names if name not in tensors]:
            raise ValueError(f"{step.name} wants to touch {unknown[0]!r}, which is no tensor of this model")
        touched = {name: tensors[name] for name in names}
        undo = self._undos[self._depth]
        undo.save(touched)
        self._depth += 1
        self._undos[self._depth :] = [Undo()]  # what was copied under another parent is of no use here
        ruined = False
        try:
            self.apply(step, names)
            yield
        except Changed:
            ruined = True  # nothing to prove any more: the model will be loaded afresh
            raise
        finally:
            self._depth -= 1
            restored = undo.restore(touched)
            specimen.digests, specimen.trial, specimen.ledger = before
            specimen.tokenizer = tokenizer
            vars(specimen.model.config).clear()
            vars(specimen.model.config).update(config)
            if not ruined:
                self.verify(f"undoing {describe(step)}", state_key(specimen.trial.key, step), restored)

    def verify(self, what: str, key: str, known: dict[str, str] | None = None) -> None:
        """Compares every bit of the model with what lies on record. `known`: digests taken already. Raises Changed."""
        known = known or {}
        rest = [name for name, _ in named_tensors(self.specimen.model) if name not in known]
        found = known | digests(self.specimen.model, rest)
        odd = [n for n in {**found, **self.specimen.digests} if found.get(n) != self.specimen.digests.get(n)]
        if odd or manner(self.specimen.model) != self._manner:
            of = f"{len(odd)} tensors" if odd else "hooks or modes"
            such = f", such as {odd[:3]}" if odd else ""
            error = Changed(f"{what} left {of} changed that must not be{such}")
            error.of = key
            raise error
