"""Draws src/lesion/data/pictures/kitchen.svg and kitchen.png: a busy kitchen for the picture battery.

    pip install resvg-py
    python tools/draw_kitchen.py src/lesion/data/pictures

The scene is our own. It holds what the 22 content units of `lesion.units` ask for, which are those commonly scored for
the picture of the Boston Diagnostic Aphasia Examination (Goodglass & Kaplan 1983), and shares neither the view nor the
arrangement nor the style of that picture. The letters are strokes like all the rest, so that no font is needed;
the same versions of resvg and Pillow give the same bytes.

Coordinates are pixels of a sheet of 900 × 675; the wall meets the floor at y = 440.
"""

from __future__ import annotations

import argparse
import io
import math
from itertools import pairwise
from pathlib import Path

import resvg_py
from PIL import Image
from shapes import INK, LINE, box, lettering, limb, line, oval, path, polygon, turned

WIDTH, HEIGHT = 900, 675
FAIR, BROWN = "#f3c9a5", "#a86d48"
WATER, FOAM, GLASS = "#5fb4e8", "#e4f5ff", "#eaf7f5"
WOOD, DARK_WOOD, CREAM, STEEL = "#d69a5c", "#a8693a", "#fbf3e0", "#b9c4cc"
COOKIE = "#c98a44"


# fmt: off
# ---- small things ---------------------------------------------------------------------------------------------------


def cookie(x: float, y: float, r: float = 11) -> str:
    chips = ((-0.35, -0.3), (0.35, -0.1), (-0.1, 0.4))
    return oval(x, y, r, r, COOKIE, width=2) + "".join(
        oval(x + a * r, y + b * r, r * 0.16, r * 0.16, "#5b3418", stroke="none") for a, b in chips
    )


def drop(x: float, y: float, size: float) -> str:
    d = f"M{x},{y - size} Q{x + size},{y + size * 0.3} {x},{y + size} Q{x - size},{y + size * 0.3} {x},{y - size} Z"
    return path(d, WATER, "#2b7fb8", 2)


def plate(x: float, y: float, rx: float, ry: float) -> str:
    return oval(x, y, rx, ry, "#ffffff") + oval(x, y, rx * 0.62, ry * 0.62, "#dcebf7", stroke="#7aa5c9", width=2)


# ---- the room -------------------------------------------------------------------------------------------------------


def room() -> str:
    parts = [box(0, 0, WIDTH, 445, "#f9dfb4", stroke="none")]
    parts += [line((x, 0), (x, 440), stroke="#f3d19b", width=5) for x in range(20, WIDTH, 44)]
    parts += [box(0, 440, WIDTH, 235, "#e9ddd0", stroke="none")]
    rows = [440, 468, 504, 550, 606, 675]
    for row, (top, bottom) in enumerate(pairwise(rows)):
        for column in range(-8 + row % 2, 9, 2):
            corners = [(c, y) for y, sides in ((top, (0, 1)), (bottom, (1, 0))) for c in sides]
            tile = [(450 + (column + side) * (61.5 + 0.21 * (y - 440)), y) for side, y in corners]
            parts.append(polygon([(round(x, 1), y) for x, y in tile], "#d3bda8", stroke="none"))
    parts += [box(0, 432, WIDTH, 10, CREAM, width=2)]
    return "".join(parts)


def window() -> str:
    """Window above the sink with curtains, and a garden outside."""
    outside = [
        box(48, 66, 204, 190, "#a9dcf5", stroke="none"), oval(92, 104, 20, 20, "#ffd84a", stroke="#eeb41e"),
        oval(196, 96, 26, 10, "#ffffff", stroke="none"), oval(214, 103, 24, 10, "#ffffff", stroke="none"),
        path("M48,206 Q110,168 170,196 T252,190 L252,256 L48,256 Z", "#86c25a", stroke="#4f8a33", width=2),
        path("M118,256 Q136,226 116,204", "none", "#e7d3a1", 12), box(190, 160, 12, 50, DARK_WOOD, width=2),
        oval(196, 144, 34, 30, "#3f9447", stroke="#2b6b33"), oval(186, 138, 5, 5, "#e2463f", stroke="none"),
        oval(206, 150, 5, 5, "#e2463f", stroke="none"), oval(204, 130, 5, 5, "#e2463f", stroke="none"),
    ]
    for x in range(60, 110, 13):
        outside.append(box(x, 190, 7, 32, "#ffffff", width=1.5))
    outside.append(box(56, 200, 52, 6, "#ffffff", width=1.5))
    for x, colour in ((148, "#e2463f"), (160, "#ffd84a"), (172, "#d95fa8"), (226, "#e2463f"), (238, "#ffd84a")):
        outside.append(line((x, 246), (x, 232), stroke="#2b6b33", width=2) + oval(x, 229, 5, 5, colour, width=1.5))
    frame = [
        box(48, 66, 204, 190, "none", width=LINE), box(42, 60, 216, 202, "none", stroke="#ffffff", width=10),
        box(36, 54, 228, 214, "none"), line((150, 64), (150, 258), stroke="#ffffff", width=9),
        line((48, 152), (252, 152), stroke="#ffffff", width=9), box(28, 262, 244, 12, "#ffffff"),
    ]
    left = "M30,42 L112,42 Q108,120 52,176 L52,184 Q62,226 60,262 L24,262 Q26,226 38,184 L38,176 Q24,120 30,42 Z"
    right = "M270,42 L188,42 Q192,120 248,176 L248,184 Q238,226 240,262 "
    right += "L276,262 Q274,226 262,184 L262,176 Q276,120 270,42 Z"
    cloth = [path(left, "#e8695f"), path(right, "#e8695f")]
    for a, b in ((50, 44), (70, 46), (92, 50)):
        cloth.append(path(f"M{a},44 Q{a},116 {b},172", stroke="#b8433c", width=2))
        cloth.append(path(f"M{300 - a},44 Q{300 - a},116 {300 - b},172", stroke="#b8433c", width=2))
    cloth += [box(34, 174, 22, 10, "#ffd84a", 4, width=2), box(244, 174, 22, 10, "#ffd84a", 4, width=2)]
    rod = line((16, 40), (284, 40), stroke=INK, width=9) + line((18, 40), (282, 40), stroke=DARK_WOOD, width=4)
    return "".join([*outside, *frame, *cloth, rod])


def counter() -> str:
    """Kitchen unit with drawers along the wall, a stack of plates and cups on it, and a cooker beside it."""
    parts = [box(-6, 342, 486, 142, "#7fb3a6"), box(-6, 476, 486, 12, "#4c4450", width=2)]
    parts += [box(x, 356, w, 112, "#95c5b9", 4) for x, w in ((4, 70), (240, 76), (324, 146))]
    parts += [line((324, 392), (470, 392))] + [
        oval(x, y, 5, 5, "#f2cf5b", width=2) for x, y in ((397, 374), (397, 408), (62, 400))
    ]
    parts += [
        box(-6, 326, 492, 18, "#e9e2d8"), box(486, 332, 112, 152, "#dfe5ea", 4), box(500, 376, 84, 82, "#5a5f6b", 6),
        line((504, 366), (580, 366), width=6),
    ]
    parts += [oval(x, 350, 6, 6, "#4c4450", width=2) for x in (506, 530, 554, 578)]
    parts += [box(482, 324, 120, 10, "#4c4450", 3, width=2)]
    for level in range(7):
        parts.append(oval(412, 324 - 7 * level, 36, 8, "#ffffff", width=2.2))
    parts += [oval(412, 282, 22, 4.5, "#dcebf7", stroke="#7aa5c9", width=2)]
    for x, colour in ((360, "#f2a23c"), (458, "#6fa8dc")):
        handle = x + (14 if x > 400 else -14)
        parts += [oval(handle, 312, 7, 8, "none", width=4), box(x - 13, 298, 26, 28, colour, 4)]
    parts += [box(346, 270, 28, 26, "#6fa8dc", 4), oval(376, 282, 6, 7, "none", width=4)]
    kettle = "M512,324 Q506,276 540,274 Q576,276 570,324 Z"
    parts += [
        path("M520,284 Q540,236 562,284", width=6), path("M568,306 L592,286 L586,282 L566,292 Z", "#d6544b"),
        path(kettle, "#d6544b"), oval(541, 272, 6, 5, INK),
    ]
    return "".join(parts)


def wall() -> str:
    """Clock, and a rail with pan, ladle, spatula and a cloth."""
    parts = [
        oval(420, 92, 36, 36, "#ffffff", width=5), line((420, 92), (420, 68), width=4),
        line((420, 92), (438, 100), width=4),
    ]
    for hour in range(12):
        x, y = math.sin(math.pi * hour / 6), -math.cos(math.pi * hour / 6)
        ends = [(round(420 + r * x, 1), round(92 + r * y, 1)) for r in (29, 32)]
        parts.append(line(*ends, width=2))
    parts += [
        line((366, 166), (610, 166), width=7), line((400, 166), (400, 196), width=6), oval(400, 220, 25, 25, "#4c4450"),
        oval(400, 220, 17, 17, "#6c6472", width=2), line((462, 166), (462, 232), width=6),
        path("M446,228 Q462,256 478,228 Z", STEEL), line((520, 166), (520, 206), width=6),
        path("M508,206 L532,206 L534,244 L506,244 Z", STEEL), line((514, 216), (514, 236), width=2),
        line((520, 216), (520, 236), width=2), line((526, 216), (526, 236), width=2),
        line((566, 166), (566, 176), width=4), path("M548,176 L584,176 L580,240 L552,240 Z", "#f6e27a"),
        path("M548,190 L584,190 M550,204 L582,204", stroke="#d95f5f", width=3),
    ]
    return "".join(parts)


def larder() -> str:
    """Tall cupboard on the right: its upper door stands open, the jar is on the upper shelf."""
    parts = [
        box(716, 52, 160, 540, WOOD, 4), box(708, 40, 176, 16, DARK_WOOD, 4), box(730, 72, 132, 276, "#7c4d2b"),
        box(730, 228, 132, 12, WOOD, width=2), box(730, 338, 132, 12, WOOD, width=2),
        polygon([(862, 70), (898, 58), (898, 368), (862, 350)], "#e2ab6e"),
        polygon([(868, 84), (892, 76), (892, 346), (868, 334)], WOOD, width=2), box(730, 366, 64, 210, "#e2ab6e", 3),
        box(798, 366, 64, 210, "#e2ab6e", 3), box(738, 378, 48, 186, WOOD, 3, width=2),
        box(806, 378, 48, 186, WOOD, 3, width=2), oval(788, 470, 4.5, 4.5, "#f2cf5b", width=2),
        oval(804, 470, 4.5, 4.5, "#f2cf5b", width=2),
        path("M742,316 L784,316 Q780,338 763,338 Q746,338 742,316 Z", "#6fa8dc"),
        path("M746,304 L780,304 Q777,318 763,318 Q749,318 746,304 Z", "#9cc5ea"), box(806, 272, 42, 66, "#ffffff", 3),
        path("M806,284 L848,284", width=2), oval(827, 308, 12, 12, "#f2cf5b", width=2), jar(),
    ]
    return "".join(parts)


def jar() -> str:
    glass = "M768,150 L830,150 Q846,160 846,176 L846,216 Q846,228 834,228 "
    glass += "L764,228 Q752,228 752,216 L752,176 Q752,160 768,150 Z"
    parts = [path(glass, GLASS)]
    rows = ((214, (766, 788, 811, 832)), (200, (776, 800, 823)), (184, (768, 790, 812, 834)), (170, (780, 804, 824)))
    parts += [cookie(x, y, 11) for y, places in rows for x in places]
    parts += [
        path(glass), oval(799, 150, 32, 6, "#cfe5e2"), box(757, 186, 84, 27, "#ffffff", 4, width=2.4),
        lettering("COOKIES", 762, 192.5, 2.0),
    ]
    return "".join(parts)


def sink() -> str:
    """Sink that runs over: the tap is open, water falls over the front edge and lies on the floor."""
    pool = "M6,566 Q-4,534 60,532 Q110,512 190,526 Q262,516 330,546 Q392,562 "
    pool += "352,588 Q318,614 220,600 Q150,622 88,602 Q16,602 6,566 Z"
    parts = [path(pool, WATER, "#2b7fb8", 3)]
    parts += [
        path(d, stroke=FOAM, width=3.5)
        for d in ("M60,566 q24,-12 52,-4", "M190,590 q30,10 62,0", "M250,556 q30,-8 56,4", "M110,588 q18,6 36,2")
    ]
    basin = "M92,316 L220,316 L240,340 L72,340 Z"
    parts += [
        path(basin, "#ffffff"), path("M100,321 L212,321 L226,337 L86,337 Z", WATER, "#2b7fb8", 2),
        box(72, 338, 168, 92, "#ffffff", 6), line((84, 420), (228, 420), stroke="#cfd8de"),
    ]
    spout = "M112,322 Q100,262 130,258 Q158,256 158,284"
    parts += [
        path(spout, "none", INK, 17), path(spout, "none", STEEL, 11), box(102, 314, 20, 10, STEEL, 3),
        line((90, 296), (122, 296), width=8), oval(108, 296, 8, 8, "#d6544b", width=2),
        path("M151,287 L165,287 L168,330 L148,330 Z", WATER, "#2b7fb8", 2),
        line((158, 292), (158, 324), stroke=FOAM, width=3),
    ]
    lip = "M84,330 Q156,338 228,330 Q236,338 234,356 Q230,372 222,362 "
    lip += "L218,470 Q216,540 216,544 Q206,554 200,542 L202,372 "
    lip += "Q196,358 186,372 L188,540 Q176,556 160,544 Q146,556 132,542 "
    lip += "L132,374 Q126,360 116,376 L112,540 Q100,552 92,540 "
    lip += "L94,370 Q82,378 76,356 Q76,338 84,330 Z"
    parts += [path(lip, WATER, "#2b7fb8", 3)]
    strands = ((104, 360, 516), (143, 356, 520), (160, 350, 502), (176, 356, 526), (209, 360, 520))
    parts += [path(f"M{x},{top} Q{x + 4},430 {x - 1},{end}", stroke=FOAM, width=3.5) for x, top, end in strands]
    parts += [
        path("M70,548 Q84,526 96,546 Q112,522 128,546 Q148,526 162,548 Q180,524 "
             "198,546 Q214,528 228,548 Q190,564 150,562 Q100,564 70,548 Z", FOAM, "#2b7fb8", 2),
    ]
    parts += [
        drop(x, y, s)
        for x, y, s in ((62, 512, 7), (238, 508, 7), (250, 528, 5), (52, 530, 5), (66, 440, 5), (232, 452, 5))
    ]
    parts += [
        oval(x, y, r, r, "#ffffff", stroke="#8cc9ef", width=2)
        for x, y, r in ((186, 320, 10), (202, 322, 8), (196, 310, 7), (120, 322, 8), (212, 262, 5), (196, 246, 4))
    ]
    return "".join(parts)


# ---- the people -----------------------------------------------------------------------------------------------------


def eye(x: float, y: float, look: float = 0, size: float = 5) -> str:
    pupil = oval(x + look, y + 1, size * 0.52, size * 0.62, INK, "none")
    return oval(x, y, size, size * 1.25, "#ffffff", width=2) + pupil


def woman() -> str:
    """She stands at the sink with her back to the children, looks out of the window and dries a plate."""
    trousers, blouse, apron, hair = "#4a5d8f", "#b05fa3", "#f7f0df", "#6b3f2a"
    parts = [
        limb((318, 360), (322, 460), (324, 548), fill=trousers, width=36),
        limb((290, 360), (288, 460), (286, 556), fill=trousers, width=36),
        path("M304,556 L344,556 Q346,570 336,570 L288,570 Q286,562 304,556 Z", "#7a3b2e"),
        path("M268,562 L306,562 Q308,578 298,578 L246,578 Q244,570 268,562 Z", "#7a3b2e"),
        limb((322, 262), (318, 318), (262, 314), fill=blouse, width=24),
        path("M282,236 Q306,224 330,238 Q346,290 336,330 Q344,372 340,392 "
             "L268,392 Q266,350 272,326 Q268,276 282,236 Z", blouse),
        path("M278,262 Q268,300 272,326 Q258,390 262,446 L322,446 Q328,386 318,330 Q296,300 300,240 L286,240 Z", apron),
        path("M272,330 L338,330", width=4), path("M334,330 q22,6 14,34 M334,330 q-2,20 6,40", width=4),
        box(272, 366, 34, 34, apron, 5, width=2), limb((300, 226), (302, 244), fill=FAIR, width=22),
    ]
    head = "M262,182 Q262,140 302,140 Q342,142 342,186 Q340,230 300,232 Q272,232 268,212 L256,206 Q254,200 264,192 Z"
    parts += [
        oval(346, 156, 20, 20, hair), path(head, FAIR),
        path("M266,166 Q274,132 308,132 Q354,134 350,188 Q346,214 330,222 "
             "Q334,196 318,182 Q308,176 308,164 Q286,172 266,166 Z", hair),
        oval(318, 194, 8, 10, FAIR, width=2.4), oval(318, 210, 4, 4, "#ffd84a", width=2), eye(281, 186, -2.2),
        path("M270,172 Q280,167 290,172", width=3), path("M269,215 Q279,221 287,212", width=3),
        oval(294, 206, 7, 5, "#eda58b", "none"), plate(216, 276, 34, 36),
        limb((292, 258), (278, 320), (236, 292), fill=blouse, width=24), oval(232, 290, 14, 13, FAIR),
        path("M198,270 Q214,258 234,276 Q250,288 246,304 Q256,330 246,352 Q236,344 "
             "228,352 Q220,340 208,344 Q216,316 206,300 Q194,288 198,270 Z", "#fff3f0"),
        path("M206,290 Q226,296 244,312 M212,326 Q228,326 248,334", stroke="#e8695f", width=3),
        oval(222, 284, 15, 12, FAIR), path("M212,279 q-4,6 0,12 M219,274 q-4,8 -1,18", width=2),
    ]
    return "".join(parts)


def girl() -> str:
    """She laughs, lays a finger on her lips and reaches up with the other hand for a cookie."""
    hair, dress, shoe = "#2a1d1c", "#f6c83f", "#d6544b"
    parts = [
        limb((508, 540), (508, 606), fill=BROWN, width=17), limb((540, 540), (542, 606), fill=BROWN, width=17),
        limb((508, 592), (508, 608), fill="#ffffff", width=17), limb((542, 592), (542, 608), fill="#ffffff", width=17),
        path("M494,606 L518,606 L518,622 L484,622 Q482,610 494,606 Z", shoe),
        path("M530,606 L554,606 Q566,610 564,622 L530,622 Z", shoe),
        limb((546, 456), (576, 424), (600, 366), fill=BROWN, width=16),
        path("M600,372 L592,350 M601,368 L602,344 M602,368 L612,347 M604,372 L620,356", width=11),
        path("M600,372 L592,350 M601,368 L602,344 M602,368 L612,347 M604,372 L620,356", stroke=BROWN, width=6),
        oval(602, 368, 9, 9, BROWN, stroke="none"),
        path("M504,440 Q524,432 546,440 L558,494 Q572,530 578,554 L474,554 Q480,528 494,494 Z", dress),
        path("M493,494 Q524,504 558,494", stroke="#c8921c", width=5),
    ]
    parts += [
        oval(x, y, 4.5, 4.5, "#ffffff", "none") for x, y in ((500, 530), (524, 522), (550, 532), (512, 474), (538, 474))
    ]
    parts += [
        path("M540,442 L560,436 L566,456 L550,466 Z", dress), oval(476, 378, 21, 18, hair),
        oval(570, 372, 21, 18, hair), oval(489, 384, 6, 6, "#e84f8a", width=2),
        oval(558, 380, 6, 6, "#e84f8a", width=2), limb((525, 430), (525, 440), fill=BROWN, width=16),
        oval(524, 398, 40, 40, BROWN),
        path("M484,396 Q486,354 524,354 Q562,354 564,396 Q552,376 524,376 Q496,376 484,396 Z", hair),
        eye(512, 398, 2, 5.5), eye(542, 396, 2, 5.5), path("M503,386 Q511,380 519,385", width=3),
        path("M535,384 Q543,378 551,383", width=3), path("M530,396 q5,7 -3,8", width=2.4),
        path("M508,415 Q528,422 550,411 Q546,434 530,434 Q514,434 508,415 Z", "#ffffff", width=2.6),
        oval(500, 412, 6, 4.5, "#d9825f", "none"), oval(555, 408, 6, 4.5, "#d9825f", "none"),
        limb((502, 452), (484, 492), (519, 452), fill=BROWN, width=15), path("M523,446 L527,411", width=13),
        path("M523,446 L527,411", stroke=BROWN, width=7), oval(521, 449, 12, 11, BROWN),
        path("M513,446 q6,-3 12,0 M513,452 q6,-2 12,0", width=2),
    ]
    return "".join(parts)


def stool() -> str:
    """Three-legged stool; upright here, it is turned about the foot it still stands on."""
    legs = [
        limb(a, b, fill=DARK_WOOD, width=10)
        for a, b in (((668, 446), (676, 600)), ((640, 446), (622, 604)), ((700, 446), (722, 604)))
    ]
    rungs = [limb((630, 540), (714, 540), fill=DARK_WOOD, width=7)]
    return "".join([*rungs, *legs, box(620, 432, 104, 18, "#e2ab6e", 8)])


def boy() -> str:
    """He stands on the tipping stool, one foot in the air, one hand in the jar, and has begun to fall."""
    hair, shirt, shorts, shoe = "#c8642c", "#4d8fd6", "#3d6b4f", "#ffffff"
    parts = [
        limb((690, 334), (716, 372), (744, 396), fill=FAIR, width=18),
        path("M738,384 L754,406 Q772,402 774,412 Q762,424 746,424 L730,402 Z", shoe),
        limb((666, 336), (652, 376), (640, 412), fill=FAIR, width=18),
        path("M628,404 L652,410 L650,428 Q628,432 606,420 Q606,410 628,404 Z", shoe),
        limb((690, 322), (708, 358), fill=shorts, width=30), limb((668, 322), (658, 366), fill=shorts, width=30),
        path("M654,318 L708,318 L704,344 L656,344 Z", shorts, "none"),
        limb((660, 262), (628, 284), (618, 318), fill=shirt, width=19),
        path("M652,246 Q680,236 708,246 L712,330 Q680,338 648,328 Z", shirt),
    ]
    parts += [path(f"M651,{y} Q680,{y + 8} 711,{y}", stroke="#ffffff", width=6) for y in (272, 294, 314)]
    parts += [
        cookie(609, 338, 13), oval(616, 324, 10, 9, FAIR), limb((682, 232), (682, 246), fill=FAIR, width=18),
        oval(680, 202, 39, 39, FAIR), oval(641, 206, 7, 9, FAIR, width=2.4), oval(719, 202, 7, 9, FAIR, width=2.4),
        path("M641,198 Q636,158 680,156 Q726,156 719,196 Q710,182 698,178 "
             "L694,188 L684,176 L672,188 L666,178 Q648,184 641,198 Z", hair),
        path("M672,158 Q668,144 658,142 M684,156 Q688,142 700,144", width=5), eye(666, 203, 1, 7.5),
        eye(696, 202, 1, 7.5), path("M654,188 Q664,179 674,186", width=3.4),
        path("M688,185 Q698,178 708,187", width=3.4), oval(683, 225, 9, 10, "#8e2f2f", width=2.6),
        oval(656, 219, 6, 4, "#eda58b", "none"), oval(708, 217, 6, 4, "#eda58b", "none"),
        limb((702, 258), (742, 210), (782, 140), fill=shirt, width=19),
        limb((772, 158), (786, 134), fill=FAIR, width=15), cookie(798, 124, 13), oval(788, 132, 11, 11, FAIR),
        path("M786,126 q8,0 12,4 M784,132 q8,1 12,4", width=2),
    ]
    return "".join(parts)


def cat() -> str:
    """A cat that does not like the water."""
    fur = "#8d8f9c"
    parts = [
        path("M452,634 Q492,640 488,602 Q486,584 474,590", "none", INK, 16),
        path("M452,634 Q492,640 488,602 Q486,584 474,590", "none", fur, 10),
        path("M410,648 Q402,596 428,582 Q460,592 462,648 Z", fur),
        path("M398,566 L396,538 L414,550 Q424,546 434,550 L450,536 L450,566 Q450,590 424,590 Q398,590 398,566 Z", fur),
        oval(413, 566, 6, 7, "#e9f27a", width=2), oval(435, 566, 6, 7, "#e9f27a", width=2),
        oval(412, 567, 2, 5, INK, "none"), oval(434, 567, 2, 5, INK, "none"),
        path("M421,575 L427,575 L424,579 Z", "#e88f95", width=1.5),
        path("M404,577 L386,574 M404,581 L388,584 M444,577 L462,574 M444,581 L460,584", width=1.6),
        path("M424,648 L424,622 M446,648 L446,626", width=2),
    ]
    return "".join(parts)


def fall() -> str:
    """Cookies in the air, and arcs that show which way the stool tips."""
    parts = [cookie(x, y, 10) for x, y in ((652, 500), (592, 478), (676, 640))]
    tips = "M596,452 Q584,434 588,412 M584,460 Q570,436 574,408 M742,600 Q752,586 750,570 M756,606 Q768,588 764,568"
    return "".join([*parts, path(tips, width=3)])


def drawing() -> str:
    """The whole scene as an SVG document."""
    tipped = turned(stool(), -13, 622, 604)
    scene = [room(), wall(), window(), counter(), larder(), sink(), woman(), cat(), tipped, boy(), girl(), fall()]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return "\n".join([head, "<title>A busy kitchen</title>", *scene, "</svg>", ""]).replace(" />", "/>")

# fmt: on


def png(svg: str) -> bytes:
    """The drawing as an RGB image without metadata."""
    image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)))
    out = io.BytesIO()
    image.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws kitchen.svg and kitchen.png.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    svg = drawing()
    (folder / "kitchen.svg").write_text(svg, encoding="utf-8", newline="\n")
    (folder / "kitchen.png").write_bytes(png(svg))


if __name__ == "__main__":
    main()
