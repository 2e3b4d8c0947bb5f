"""The texts behind the numbers, as the page's script reads them: each text once, small ones plain, large ones packed.

Up to `PLAIN` bytes the texts stand in the page as they are. Beyond that they are packed in blocks (DEFLATE: Deutsch 1996,
RFC 1951; as base64), so that a page with tens of megabytes of text stays a file that can be sent, and a browser unpacks
only the block of the text that is shown. The texts are ordered by prompt, so that what is shown together lies together,
and what is alike is near enough to be packed well.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import polars as pl

from lesion.report import tables

PLAIN = 1_000_000  # bytes of JSON; more than that is packed
BLOCK = 500_000  # bytes of JSON in a block: unpacked in some milliseconds
_ORDER = ("prompt", "seed", "site", "dose")  # from the slowest to the fastest


@dataclass(frozen=True)
class Island:
    """What one <script> element of the page holds; `packed` says that it is base64 of DEFLATE of JSON."""

    id: str
    packed: bool
    text: str


def islands(generations: pl.DataFrame) -> list[Island]:
    """The elements of the page that hold the generations; the first tells what is in the others.

    Plain: one element, all of `explorer`. Packed: `rows` and `texts` are elements of their own; `starts` has the index of
    the first text of each block and, at its end, the number of texts.
    """
    data = explorer(generations)
    whole = to_json(data)
    if len(whole.encode()) <= PLAIN:
        return [Island("generations", False, whole)]
    rows, texts = data.pop("rows"), data.pop("texts")
    starts, blocks, size = [0], [], 0
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    for place, line in enumerate(lines):
        size += len(line.encode()) + 1
        if size >= BLOCK or place == len(lines) - 1:
            blocks.append(_packed(f"[{','.join(lines[starts[-1] : place + 1])}]"))
            starts.append(place + 1)
            size = 0
    return [
        Island("generations", False, to_json({**data, "starts": starts})),
        Island("rows", True, _packed(to_json(rows))),
        *(Island(f"block-{i}", True, block) for i, block in enumerate(blocks)),
    ]


def explorer(generations: pl.DataFrame) -> dict[str, Any]:
    """The generations as indices: every text once, in the order of prompts; one row a generation; dose 0 first."""
    rows = generations.rows(named=True)
    sites, seeds, stops = (_Index(row[name] for row in rows) for name in ("site", "seed", "stop"))
    doses = _Index([*([0.0] if any(row["dose"] == 0 for row in rows) else []), *(row["dose"] for row in rows)])
    prompts = _Index((row["prompt"], row["group"], row["asked"]) for row in rows)
    places = [
        {
            "site": sites[row["site"]],
            "dose": doses[row["dose"]],
            "seed": seeds[row["seed"]],
            "prompt": prompts[row["prompt"], row["group"], row["asked"]],
        }
        for row in rows
    ]
    near = sorted(range(len(rows)), key=lambda i: tuple(places[i][name] for name in _ORDER))
    texts = _Index(rows[i]["text"] for i in near)
    return {
        "sites": list(sites),
        "doses": [[dose, tables.short(dose)] for dose in doses],
        "seeds": list(seeds),
        "prompts": list(prompts),
        "texts": list(texts),
        "stops": list(stops),
        "rows": [
            [
                *place.values(),
                texts[row["text"]],
                row["correct"],
                stops[row["stop"]],
                row["tokens"],
                None if row["logprob"] is None else round(row["logprob"], 3),
            ]
            for row, place in zip(rows, places, strict=True)
        ],
    }


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _packed(text: str) -> str:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)  # −15: neither header nor checksum, "deflate-raw" in a browser
    return base64.b64encode(coder.compress(text.encode()) + coder.flush()).decode()


class _Index(dict[Any, int]):
    """The place of each of these values in the order in which they came first."""

    def __init__(self, values: Iterable[Any]):
        super().__init__((value, place) for place, value in enumerate(dict.fromkeys(values)))
