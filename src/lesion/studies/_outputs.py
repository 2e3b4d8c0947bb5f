"""The generations of `degrade` in the JSON format of the study it goes back to, one record each, for notebooks that read it.

    outputs_{method}_{model}_{suffix}.json, and samples/ with at most SAMPLES records of it, spread over the whole

Names are theirs (`param_group_name`, `level_value`, `std_dev`); what a record says is what the rows say. `outputs.schema.json`
in the package's data describes the format, and `validate` holds every record against it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lesion.texts import DATA

SAMPLES = 150
GROUPS = {"attention.value": "attn_only", "mlp": "mlp_only", "embedding": "embed_only"}  # others keep their address
KINDS: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def schema() -> dict[str, Any]:
    """The JSON schema of a file."""
    found: dict[str, Any] = json.loads((DATA / "outputs.schema.json").read_text(encoding="utf-8"))
    return found


def record(
    row: Mapping[str, Any], cell: tuple[str, float, int], index: int, number: int, about: Mapping[str, Any]
) -> Any:
    """One generation. `index` is the repeat, `number` the prompt's place in its battery from 1; `about` is what all records
    of a run share, with `writer` and `perplexity` of this cell."""
    site, dose, seed = cell
    begun = datetime.datetime.strptime(about["writer"].partition("-")[0], "%Y%m%dT%H%M%S")
    return {
        "timestamp": begun.isoformat(timespec="milliseconds") + "Z",  # when the process that took it began
        "model_name": about["model_name"],
        "degradation_method": about["method"].replace("-", "_"),
        "level_value": dose,
        "std_dev": dose,
        "param_group_name": GROUPS.get(site, site),
        "repeat_index": index,
        "prompt_group": row["group"],
        "prompt_id": number,
        "prompt_text": row["asked"],
        "output": row["text"],
        "duration": row["duration"],
        "tokens": row["tokens"],
        "seed": seed,
        "temperature": about["temperature"],
        "do_sample": about["temperature"] > 0,
        "top_k": about["top_k"],
        "top_p": about["top_p"],
        "max_new_tokens": about["new_tokens"],
        "batch_size_effective": about["batch"],
        "load_4bit": about["load_4bit"],
        "perplexity": about["perplexity"],
    }


def file_name(method: str, model: str, suffix: str) -> str:
    return f"outputs_{method.replace('-', '_')}_{model.rpartition('/')[2]}_{suffix}.json"


def files(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The file and its sample, by path. Raises ValueError where a record is not as the schema says."""
    validate(records)
    few = [records[i * len(records) // SAMPLES] for i in range(SAMPLES)] if len(records) > SAMPLES else records
    return {path: _bytes(some) for path, some in ((name, records), (f"samples/{name}", few))}


def validate(records: Iterable[Mapping[str, Any]]) -> None:
    """The part of JSON schema that this format uses: kinds, required and forbidden names, minima."""
    described = schema()["items"]
    for number, found in enumerate(records):
        if missing := [name for name in described["required"] if name not in found]:
            raise ValueError(f"record {number} lacks {missing[0]!r}")
        if unknown := [name for name in found if name not in described["properties"]]:
            raise ValueError(f"record {number} has {unknown[0]!r}, which the format does not know")
        for name, value in found.items():
            kinds = described["properties"][name]["type"]
            if not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
                raise ValueError(f"record {number}: {name} should be {kinds}, not {value!r}")
            least = described["properties"][name].get("minimum")
            if least is not None and value is not None and value < least:
                raise ValueError(f"record {number}: {name} should be at least {least}, not {value!r}")


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _bytes(records: Sequence[Mapping[str, Any]]) -> bytes:
    return json.dumps(list(records), ensure_ascii=False, indent=1, allow_nan=False).encode()
