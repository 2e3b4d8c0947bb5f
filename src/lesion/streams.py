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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Law = Literal["normal", "uniform"]

BLOCK = 2**20  # values that share a generator: enough for threads to work long stretches without asking for each other
PAIRS = 2**13  # normals are made in groups of 2·PAIRS, so that a short stream needs no whole block
MEMORY = 2**30  # bytes of draws that are remembered, in the whole process


def uniform01(seed: int, item: str, purpose: str, n: int) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1), float64 [n], for the positions 0 … n-1 of one item. The value at a position depends on
    (seed, item, purpose, position) only, so a longer text starts with the draws of a shorter one."""
    return _generator(seed, item, purpose).random(n)


def normals(seed: int, place: str, kind: str, start: int, out: Floats) -> None:
    """Fills `out` with values start, start + 1, … of a standard normal stream. |z| ≤ √(48 ln 2) ≈ 5.77."""
    Draws("normal", seed, kind, None).fill(place, start, out)


def uniforms(seed: int, place: str, kind: str, start: int, out: Floats) -> None:
    """Fills `out` with values start, start + 1, … of a uniform stream: multiples of 2⁻²⁴ in [0, 1)."""
    Draws("uniform", seed, kind, None).fill(place, start, out)


@contextmanager
def drawing(law: Law, seed: int, kind: str) -> Iterator[Draws]:
    """All streams of one (seed, kind), for one walk over the weights by any number of threads.

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
        _memory.slots.clear()


class Memory:
    """Blocks of one stream family, in slots that are asked of the system as they are needed and written over and over."""

    def __init__(self, limit: int) -> None:
        self.busy = threading.Lock()  # held for a whole walk
        self.limit = limit
        self.owner: tuple[str, int, str] | None = None
        self.slots: list[Floats] = []
        self.index: dict[tuple[str, int], Floats] = {}  # as much of a block as has been drawn
        self._taken = 0
        self._lock = threading.Lock()

    def turn_to(self, owner: tuple[str, int, str] | None) -> None:
        if owner != self.owner:
            self.owner, self._taken = owner, 0
            self.index.clear()

    def room(self) -> Floats | None:
        """Room for one more block, None where all is taken."""
        with self._lock:
            if self._taken == len(self.slots):
                if (left := self.limit // (4 * BLOCK) - self._taken) <= 0:
                    return None
                self.slots.extend(np.empty((min(8, left), BLOCK), np.float32))  # large pieces come in large pages
            self._taken += 1
            return self.slots[self._taken - 1]


_memory = Memory(MEMORY)
_NOTHING = np.empty(0, np.float32)


class Draws:
    """Reads from the streams of one (seed, kind). Made by `drawing`."""

    def __init__(self, law: Law, seed: int, kind: str, memory: Memory | None) -> None:
        self.law, self.seed, self.kind, self._memory = law, seed, kind, memory

    def read(self, place: str, start: int, count: int) -> Floats:
        """Values start … start + count - 1 of the stream of `place`, float32 [count]: not to be written into."""
        number, offset = divmod(start, BLOCK)
        if offset + count <= BLOCK:
            return self._block(place, number, offset + count)[offset : offset + count]
        out = np.empty(count, np.float32)
        self.fill(place, start, out)
        return out

    def fill(self, place: str, start: int, out: Floats) -> None:
        done = 0
        while done < len(out):
            number, offset = divmod(start + done, BLOCK)
            upto = min(BLOCK, offset + len(out) - done)
            out[done : done + upto - offset] = self._block(place, number, upto)[offset:upto]
            done += upto - offset

    def _block(self, place: str, number: int, upto: int) -> Floats:
        """At least the first `upto` values of a block."""
        memory = self._memory
        if memory is not None and len(found := memory.index.get((place, number), _NOTHING)) >= upto:
            return found
        size = min(BLOCK, -(-upto // (2 * PAIRS)) * 2 * PAIRS)
        room = None if memory is None else memory.room()
        block = np.empty(size, np.float32) if room is None else room[:size]
        _generator(self.seed, place, self.kind, number).random(dtype=np.float32, out=block)
        if self.law == "normal":
            _box_muller(block)
        if memory is not None and room is not None:
            memory.index[place, number] = block  # known to other threads only now that the numbers are there
        return block


def _box_muller(block: Floats) -> None:
    """Uniforms a, b in the halves of every group become √(-2 ln(1 - a)) · (cos 2πb, sin 2πb), in place.

    numpy's functions, unlike torch's, run on the calling thread alone and meanwhile leave the interpreter to the others.
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
