"""Shapes with outlines as SVG elements, for `draw_kitchen.py`: each function returns the element as a string."""

from __future__ import annotations

INK = "#33292e"
LINE = 3.0

Point = tuple[float, float]


def path(d: str, fill: str = "none", stroke: str = INK, width: float = LINE, extra: str = "") -> str:
    return (
        f'<path d="{d}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" '
        f'stroke-linejoin="round" stroke-linecap="round" {extra}/>'
    )


def polygon(points: list[Point], fill: str, stroke: str = INK, width: float = LINE) -> str:
    return path("M" + " L".join(f"{x},{y}" for x, y in points) + " Z", fill, stroke, width)


def box(x: float, y: float, w: float, h: float, fill: str, r: float = 0, stroke: str = INK, width: float = LINE) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{width}"/>'
    )


def oval(x: float, y: float, rx: float, ry: float, fill: str, stroke: str = INK, width: float = LINE) -> str:
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{fill}" stroke="{stroke}" stroke-width="{width}"/>'


def line(*points: Point, stroke: str = INK, width: float = LINE) -> str:
    return path("M" + " L".join(f"{x},{y}" for x, y in points), "none", stroke, width)


def limb(*points: Point, fill: str, width: float) -> str:
    """An arm or a leg: a bent tube with an outline. Three points are start, joint and end."""
    d = "M" + " L".join(f"{x},{y}" for x, y in points)
    return path(d, "none", INK, width + 2 * LINE) + path(d, "none", fill, width)


def turned(content: str, degrees: float, x: float, y: float) -> str:
    return f'<g transform="rotate({degrees} {x} {y})">{content}</g>'


LETTERS = {  # strokes on a grid of 4 × 6
    "C": ["4,1 3,0 1,0 0,1 0,5 1,6 3,6 4,5"],
    "O": ["1,0 3,0 4,1 4,5 3,6 1,6 0,5 0,1 1,0"],
    "K": ["0,0 0,6", "4,0 0,3.4", "1.3,2.6 4,6"],
    "I": ["2,0 2,6"],
    "E": ["4,0 0,0 0,6 4,6", "0,3 3,3"],
    "S": ["4,1 3,0 1,0 0,1 0,2 1,3 3,3 4,4 4,5 3,6 1,6 0,5"],
}


def lettering(word: str, x: float, y: float, size: float, stroke: str = INK, width: float = 2.2) -> str:
    parts = []
    for place, letter in enumerate(word):
        for strokes in LETTERS[letter]:
            points = [tuple(map(float, pair.split(","))) for pair in strokes.split()]
            parts.append(
                line(*((x + (place * 5.6 + a) * size, y + b * size) for a, b in points), stroke=stroke, width=width)
            )
    return "".join(parts)
