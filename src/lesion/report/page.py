"""The page of a study: what was asked, what was done, what came out, and every text behind it.

    report.html   one file that works from a disk: no network, figures and texts inside
    tables/       summary, curves, generations, as .csv and .json
    figures/      one for each measure, as .png and .svg

Everything is made in memory first and then written aside and renamed, so a report is whole or as it was before. What a
model wrote is data here, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lesion.report import figures, record, tables

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

    Raises ValueError where a frame lacks a column, holds another type under its name, or does not say what a row is of.
    """
    curves = _checked("curves", curves, CURVES, ("measure", "unit", "better", "site", "dose"))
    generations = _checked("generations", generations, GENERATIONS, ("site", "dose", "seed", "prompt"))
    if (twice := curves.filter(curves.select("measure", "site", "dose").is_duplicated())).height:
        raise ValueError(
            f"curves have two rows for {twice.row(0)[:4]}: one is expected for each measure, site and dose"
        )
    drawings = figures.draw(curves)
    frames = {"summary": summary, "curves": curves, "generations": generations}
    made: dict[str, bytes] = {}
    for name, frame in frames.items():
        made |= {f"tables/{name}.csv": tables.to_csv(frame), f"tables/{name}.json": tables.to_json(frame)}
    for drawing in drawings:
        made |= {f"figures/{drawing.name}.svg": drawing.svg, f"figures/{drawing.name}.png": drawing.png}
    page = _render(
        title=title,
        question=question,
        sentences=sentences,
        table=tables.table(summary),
        drawings=[(drawing, Markup(figures.inline(drawing))) for drawing in drawings],
        generations=_script_json(explorer(generations)) if len(generations) else None,
        failures=failures,
        histories=[record.history(entry) for entry in ledgers],
        bench=record.bench(environments),
        notes=notes,
        files=sorted(made),
    )
    made["report.html"] = page.encode()
    for name, content in made.items():
        _write(Path(folder) / name, content)
    return Path(folder) / "report.html"


def explorer(generations: pl.DataFrame) -> dict[str, Any]:
    """The generations as the page's script reads them: every text once, rows of indices, dose 0 first."""
    sites, seeds, texts, stops = _Index(), _Index(), _Index(), _Index()
    prompts = _Index()
    doses = _Index([0.0] if (generations["dose"] == 0).any() else [])
    rows = [
        [
            sites[row["site"]],
            doses[row["dose"]],
            seeds[row["seed"]],
            prompts[row["prompt"], row["group"], row["asked"]],
            texts[row["text"]],
            row["correct"],
            stops[row["stop"]],
            row["tokens"],
            None if row["logprob"] is None else round(row["logprob"], 3),
        ]
        for row in generations.iter_rows(named=True)
    ]
    return {
        "sites": list(sites),
        "doses": [[dose, tables.short(dose)] for dose in doses],
        "seeds": list(seeds),
        "prompts": list(prompts),
        "texts": list(texts),
        "stops": list(stops),
        "rows": rows,
    }


class _Index(dict[Any, int]):
    """Values in the order in which they were first asked for, and the place of each."""

    def __init__(self, values: Iterable[Any] = ()):
        super().__init__((value, place) for place, value in enumerate(values))

    def __missing__(self, value: Any) -> int:
        self[value] = len(self)
        return self[value]


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
    style, script = ((here / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=visible
    )
    environment.filters["arrows"] = lambda text: Markup(" <i>→</i> ").join(
        visible(part) for part in re.split(r"\s*(?:→|>>)\s*", text)
    )
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    return template.render(style=Markup(style), script=Markup(script), digest=digest, **content)


def visible(value: Any) -> Any:
    """A text that can be written and is seen as it is: control characters and those that turn the direction of writing
    by their number (⟨U+001B⟩), half a surrogate pair as �."""
    if isinstance(value, str) and not isinstance(value, Markup):
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", whole)
    return value


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the <script> element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _write(path: Path, content: bytes) -> None:
    """Writes aside and renames, so that nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(3)}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
