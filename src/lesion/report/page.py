"""The page of a study: what was asked, what was done, what came out, and every text behind it.

    report.html   one file that works from a disk: no network, figures and texts inside
    tables/       claims, summary, heat, curves, generations and any further ones, as .csv and .json
    figures/      one for each measure, and the heat map, as .png and .svg

Everything is made in memory first and then written aside and renamed, so a report is whole or as it was before. What a
model wrote is data here, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lesion.report import claims as claimed
from lesion.report import explorer, figures, record, tables
from lesion.report import heat as heated

CURVES: dict[str, Any] = {
    **dict.fromkeys(("measure", "unit", "better", "site"), pl.String),
    **dict.fromkeys(("dose", "value", "low", "high", "reference"), pl.Float64),
    **dict.fromkeys(("items", "seeds"), pl.Int64),
}
GENERATIONS: dict[str, Any] = {
    **dict.fromkeys(("site", "prompt", "group", "asked", "text", "stop"), pl.String),
    **dict.fromkeys(("dose", "logprob"), pl.Float64),
    **dict.fromkeys(("seed", "tokens"), pl.Int64),
    "correct": pl.Boolean,
}
SCRIPTS = ("texts", "words", "page")  # one script in the page, in this order
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def build(
    folder: Path,
    *,
    title: str,
    question: str,
    sentences: list[str],
    summary: pl.DataFrame,
    curves: pl.DataFrame,
    generations: pl.DataFrame,
    failures: list[dict[str, Any]],
    ledgers: list[dict[str, Any]],
    environments: list[dict[str, Any]],
    notes: list[str],
    claims: pl.DataFrame | None = None,
    heat: pl.DataFrame | None = None,
    extra: dict[str, pl.DataFrame] | None = None,
    further: Sequence[figures.Drawing] = (),
    words: tuple[str, str] = ("damage to", "dose"),
) -> Path:
    """Writes a report into `folder` and returns the path of its page. The same input gives the same bytes.

    summary       any columns; `x` with `x_low` and `x_high` is shown as one cell
    curves        measure, unit, better ("higher" | "lower"), site, dose, value, low, high, items, seeds, reference:
                  the row at dose 0 is the undamaged model, the others follow in the order of growing damage (so levels
                  fall); value null: no finite value; reference: the undamaged model's value where it is known
    generations   site, dose, seed, prompt (id), group, asked, text, correct, stop, tokens, logprob
    failures      {"of", "error", "trace"}
    ledgers       {"trial": sentence, "ledger": [entries of `trial.Specimen.ledger`]}
    environments  as `environment.environment` makes them
    claims        claim, effect, low, high, unit, items, seeds, test, p, p_holm, power, verdict ("supported" |
                  "contradicted" | "inconclusive" | "not tested"), note: the effect is signed, zero is none
    heat          row, column, value (signed standardised effect, null: none), label (text in the cell), note
    extra         title → any further frame, shown folded below the summary
    further       figures that are drawn already, shown after those of `curves`
    words         what `site` and `dose` are called on the page

    `curves` may have a column `group`: figures of the first group are shown, those of each other group are folded.

    Raises ValueError where a frame lacks a column, holds another type under its name, does not say what a row is of, or
    says it twice.
    """
    frames = _frames(summary, curves, generations, claims, heat, extra or {})
    map_ = [heated.draw(frames["heat"], "Heat map")] if "heat" in frames and len(frames["heat"]) else []
    drawings = figures.draw(frames["curves"], [d.name for d in (*map_, *further)], words[1])
    drawings += further
    made: dict[str, bytes] = {}
    for name, frame in frames.items():
        made |= {f"tables/{name}.csv": tables.to_csv(frame), f"tables/{name}.json": tables.to_json(frame)}
    for drawing in [*map_, *drawings]:
        made |= {f"figures/{drawing.name}.svg": drawing.svg, f"figures/{drawing.name}.png": drawing.png}
    stated = claimed.claims(frames["claims"]) if "claims" in frames else []
    page = _render(
        title=title,
        question=question,
        sentences=sentences,
        claims=stated,
        tally=claimed.tally(stated),
        table=tables.table(summary),
        extra=[(name, tables.table(frame)) for name, frame in (extra or {}).items()],
        heat=_map(map_[0], frames["heat"]) if map_ else None,
        groups=_grouped(drawings),
        islands=[_safe(island) for island in explorer.islands(frames["generations"])] if len(generations) else [],
        failures=failures,
        histories=[record.history(entry) for entry in ledgers],
        bench=record.bench(environments),
        notes=notes,
        files=sorted(made),
        words=words,
        heading=f"By {words[1]}" if len(curves) else "Figures",
    )
    made["report.html"] = page.encode()
    for name, content in made.items():
        write(Path(folder) / name, content)
    return Path(folder) / "report.html"


def _frames(
    summary: pl.DataFrame,
    curves: pl.DataFrame,
    generations: pl.DataFrame,
    claims: pl.DataFrame | None,
    heat: pl.DataFrame | None,
    extra: dict[str, pl.DataFrame],
) -> dict[str, pl.DataFrame]:
    """Every table by the name of its file, checked."""
    schema = CURVES | ({"group": pl.String} if "group" in curves.columns else {})
    frames = {
        "summary": summary,
        "curves": _checked("curves", curves, schema, ("measure", "unit", "better", "site", "dose")),
        "generations": _checked("generations", generations, GENERATIONS, ("site", "dose", "seed", "prompt")),
    }
    _once("curves", frames["curves"], ("measure", "site", "dose"))
    if "group" in schema:
        _once("curves", frames["curves"].select("measure", "group").unique(maintain_order=True), ("measure",))
    if claims is not None:
        frames["claims"] = claimed.check(_checked("claims", claims, claimed.CLAIMS, ("claim", "verdict")))
    if heat is not None:
        frames["heat"] = _checked("heat", heat, heated.HEAT, ("row", "column"))
        _once("heat", frames["heat"], ("row", "column"))
    for name, frame in extra.items():
        frames[figures.unused(figures.slug(name) or "table", list(frames))] = frame
    return frames


def _grouped(drawings: list[figures.Drawing]) -> list[tuple[str | None, list[tuple[figures.Drawing, Markup]]]]:
    """Figures by group, both in the order in which they came."""
    groups: dict[str | None, list[tuple[figures.Drawing, Markup]]] = {}
    for drawing in drawings:
        groups.setdefault(drawing.group, []).append((drawing, Markup(figures.inline(drawing))))
    return list(groups.items())


def _map(drawing: figures.Drawing, frame: pl.DataFrame) -> dict[str, Any]:
    """The heat map as the page shows it: the figure, its least legible width, and the same in words."""
    columns, rows = heated.table(frame)
    svg = figures.inline(drawing)
    box = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    assert box, "matplotlib writes a viewBox"
    width = round(float(box[1]) * 96 / 72)  # points to pixels: as large as it was drawn
    return {
        "drawing": drawing,
        "svg": Markup(svg),
        "width": width,
        "columns": columns,
        "rows": rows,
        "notes": heated.notes(frame),
    }


def _once(name: str, frame: pl.DataFrame, key: tuple[str, ...]) -> None:
    if (twice := frame.filter(frame.select(key).is_duplicated())).height:
        what = ", ".join(key[:-1]) + (" and " if len(key) > 1 else "") + key[-1]
        raise ValueError(f"{name} has two rows for {twice.select(key).row(0)}: one is expected for each {what}")


def _checked(name: str, frame: pl.DataFrame, schema: dict[str, Any], needed: tuple[str, ...]) -> pl.DataFrame:
    """The frame with exactly these columns and types, numbers finite or null, and no null where one is needed."""
    if missing := [column for column in schema if column not in frame.columns]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; it has: {', '.join(frame.columns) or 'no columns'}")
    try:
        typed = tables.finite(frame.select(pl.col(column).cast(kind) for column, kind in schema.items()))
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{name} should have the columns and types {schema}: {error}") from None
    if empty := [column for column in needed if typed[column].null_count()]:
        raise ValueError(f"{name} must say {', '.join(needed)} in every row, but {empty[0]} is missing in some")
    return typed


def _render(**content: Any) -> str:
    """Fills the template. Everything is escaped but what is wrapped in `Markup` here."""
    here = files(__package__)
    style = (here / "page.css").read_text(encoding="utf-8")
    script = "\n".join((here / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=visible
    )
    environment.filters["arrows"] = lambda text: Markup(" <i>→</i> ").join(
        visible(part) for part in re.split(r"\s*(?:→|>>)\s*", text)
    )
    environment.filters["dots"] = lambda text: Markup(".<wbr>").join(visible(part) for part in text.split("."))
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    return template.render(style=Markup(style), script=Markup(script), digest=digest, **content)


def visible(value: Any) -> Any:
    """A text that can be written and is seen as it is: control characters and those that turn the direction of writing
    by their number (⟨U+001B⟩), half a surrogate pair as �."""
    if isinstance(value, str) and not isinstance(value, Markup):
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", whole)
    return value


def _safe(island: explorer.Island) -> dict[str, Any]:
    """JSON that cannot end the <script> element it stands in; base64 has nothing in it that could."""
    kind = "text/plain" if island.packed else "application/json"
    return {"id": island.id, "kind": kind, "text": Markup(island.text.replace("<", "\\u003c"))}


def write(path: Path, content: bytes) -> None:
    """Writes aside and renames, so that nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(3)}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
