"""Work shared among threads: numpy and xxhash let go of the interpreter while they compute, so threads are enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[work(item) for item in items], by as many threads as torch may use. A thread takes the next item when it is done
    with one; the results come in the order of the items."""
    results: dict[int, Result] = {}
    turns = iter(range(len(items)))  # one iterator for all: the interpreter hands out each turn once

    def take_turns() -> None:
        with torch.no_grad(), np.errstate(all="ignore"):  # what is not finite is reported by those who read the model
            for turn in turns:
                results[turn] = work(items[turn])

    count = min(torch.get_num_threads(), len(items))
    with ThreadPoolExecutor(max(1, count)) as pool:
        for future in [pool.submit(take_turns) for _ in range(count)]:
            future.result()
    return [results[turn] for turn in range(len(items))]
