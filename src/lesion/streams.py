"""Random streams by place: what is drawn for a weight or a text depends on (seed, place, purpose) and on nothing else.

Not on the dose, so doses are paired and ablation masks nested; not on the batch, the chunk, the number of threads or the
device, since everything is drawn here, on the CPU. A stream is cut into blocks of BLOCK values, and block b comes from a
generator of its own (SFC64, Doty-Humphrey 2010) seeded with sha256(seed, place, kind, b), so any part can be drawn at
any time by any thread. Normals are made from uniforms by Box and Muller (1958).

What is guaranteed: uniforms are the same bits on every machine for the same numpy (whose promise for the bits beneath is
"for ever", and a test pins the values); normals are the same bits on the same machine and numpy, and agree to a few units
in the last place between machines, whose logarithms and cosines differ in rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Law = Literal["normal", "uniform"]
Span = tuple[str, int, int]  # place, first position, count

BLOCK = 2**18  # values that share a generator: enough work for a thread to run undisturbed
PAIRS = 2**13  # normals are made in groups of 2·PAIRS, so that a short stream needs no whole block
MEMORY = 2**30  # bytes of draws that are remembered, in the whole process


def uniform01(seed: int, item: str, purpose: str, n: int) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1), float64 [n], for the positions 0 … n-1 of one item. The value at a position depends on
    (seed, item, purpose, position) only, so a longer text starts with the draws of a shorter one."""
    return _generator(seed, item, purpose).random(n)


def normals(seed: int, place: str, kind: str, start: int, out: Floats) -> None:
    """Fills `out` with values start, start + 1, … of a standard normal stream. |z| ≤ √(48 ln 2) ≈ 5.77."""
    out[:] = Draws("normal", seed, kind, None).fetch([(place, start, len(out))])[0]


def uniforms(seed: int, place: str, kind: str, start: int, out: Floats) -> None:
    """Fills `out` with values start, start + 1, … of a uniform stream: multiples of 2⁻²⁴ in [0, 1)."""
    out[:] = Draws("uniform", seed, kind, None).fetch([(place, start, len(out))])[0]


@contextmanager
def drawing(law: Law, seed: int, kind: str) -> Iterator[Draws]:
    """All streams of one (seed, kind), for one walk over the weights.

    What is drawn is remembered until another (seed, kind) asks, so a sweep over doses draws once. Up to MEMORY bytes
    are kept, and what came first stays: a sweep over more weights than that finds the same part again each time.
    Of two walks at the same time the second draws afresh. The numbers are the same in every case.
    """
    free = _memory.busy.acquire(blocking=False)
    try:
        if free:
            _memory.turn_to((law, seed, kind))
        yield Draws(law, seed, kind, _memory if free else None)
    finally:
        if free:
            _memory.busy.release()


def forget() -> None:
    """Gives the remembered draws back to the system."""
    with _memory.busy:
        _memory.turn_to(None)
        _memory.slots = None


class Memory:
    """Blocks of one stream family in the slots of one array, which is committed page by page and written over and over."""

    def __init__(self, limit: int) -> None:
        self.busy = threading.Lock()  # held for a whole walk
        self.limit = limit
        self.owner: tuple[str, int, str] | None = None
        self.slots: Floats | None = None
        self.taken = 0
        self.index: dict[tuple[str, int], Floats] = {}  # as much of a block as has been drawn

    def turn_to(self, owner: tuple[str, int, str] | None) -> None:
        if owner != self.owner:
            self.owner, self.taken = owner, 0
            self.index.clear()

    def room(self) -> Floats | None:
        """Room for one more block, None where all is taken."""
        if self.slots is None:
            self.slots = np.empty((self.limit // (4 * BLOCK), BLOCK), np.float32)
        if self.taken == len(self.slots):
            return None
        self.taken += 1
        return self.slots[self.taken - 1]


_memory = Memory(MEMORY)


class Draws:
    """Reads from the streams of one (seed, kind). Made by `drawing`."""

    def __init__(self, law: Law, seed: int, kind: str, memory: Memory | None) -> None:
        self.law, self.seed, self.kind, self._memory = law, seed, kind, memory

    def fetch(self, spans: Sequence[Span]) -> list[Floats]:
        """Values start … start + count - 1 of the stream of each place, float32 [count]: not to be written into.

        What is not remembered is drawn first, by as many threads as torch may use.
        """
        needed: dict[tuple[str, int], int] = {}
        for place, start, count in spans:
            for number in range(start // BLOCK, -(-(start + count) // BLOCK)):
                upto = min(BLOCK, start + count - number * BLOCK)
                needed[place, number] = max(upto, needed.get((place, number), 0))
        blocks = self._blocks(needed)
        found = []
        for place, start, count in spans:
            first, offset = divmod(start, BLOCK)
            if offset + count <= BLOCK:
                found.append(blocks[place, first][offset : offset + count] if count else np.empty(0, np.float32))
            else:
                last = -(-(start + count) // BLOCK)
                whole = np.concatenate([blocks[place, number][:BLOCK] for number in range(first, last)])
                found.append(whole[offset : offset + count])
        return found

    def _blocks(self, needed: dict[tuple[str, int], int]) -> dict[tuple[str, int], Floats]:
        """At least so many values of each block."""
        index = self._memory.index if self._memory is not None else {}
        missing = {}
        for where, upto in needed.items():
            if len(index.get(where, ())) < upto:
                room = None if self._memory is None else self._memory.room()
                size = min(BLOCK, -(-upto // (2 * PAIRS)) * 2 * PAIRS)
                missing[where] = np.empty(size, np.float32) if room is None else room[:size]
                if room is not None:
                    index[where] = missing[where]
        if len(missing) < 2:
            for where, out in missing.items():
                self._draw(where, out)
        else:
            with ThreadPoolExecutor(min(torch.get_num_threads(), len(missing))) as pool:
                list(pool.map(self._draw, missing, missing.values()))
        return {where: missing[where] if where in missing else index[where] for where in needed}

    def _draw(self, where: tuple[str, int], out: Floats) -> None:
        place, number = where
        _generator(self.seed, place, self.kind, number).random(dtype=np.float32, out=out)
        if self.law == "normal":
            _box_muller(out)


def _box_muller(block: Floats) -> None:
    """Uniforms a, b in the halves of every group become √(-2 ln(1 - a)) · (cos 2πb, sin 2πb), in place.

    With numpy's functions, not torch's: these run on the calling thread alone and leave the interpreter to the others.
    """
    groups = block.reshape(-1, 2, PAIRS)
    a, b = groups[:, 0], groups[:, 1]
    radius = np.subtract(np.float32(1), a)
    np.log(radius, out=radius)
    np.multiply(radius, np.float32(-2), out=radius)
    np.sqrt(radius, out=radius)
    np.multiply(b, np.float32(2 * math.pi), out=b)
    np.cos(b, out=a)
    np.sin(b, out=b)
    np.multiply(a, radius, out=a)
    np.multiply(b, radius, out=b)


def _generator(*where: int | str) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(where).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "big")))
