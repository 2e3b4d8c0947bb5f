"""A spec is one description in three forms: a frozen object, a JSON value, and a content key.

    object  --to_json-->  {"is": "step/noise", "version": 1, "sigma": 0.3, ...}  --sha256-->  key

Nothing is rounded and no default is left out on the way, so two specs share a key exactly when they would do the same
thing. A class whose behaviour changes raises its `version`, and everything it ever made is asked for again.

A spec class is found by its name: the step `noise` is the class `Noise` in `lesion/steps/noise.py`. There is no list
to edit.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import PurePath
from types import ModuleType
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

KEY_LENGTH = 32  # hexadecimal digits: 128 bits of sha256


class Spec(BaseModel):
    """Base of every description. Fields are keyword-only, unknown ones are refused, instances cannot change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=False)

    family: ClassVar[str] = ""  # "step", "measure", "subject", …: set once by each base of the grammar
    name: ClassVar[str] = ""  # "noise": by default the class name with dashes
    version: ClassVar[int] = 1

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "family" in cls.__dict__ and "name" not in cls.__dict__:
            return  # a base of the grammar, not a word of it
        if "name" not in cls.__dict__:
            cls.name = dashed(cls.__name__)
        other = _words.setdefault(cls.kind(), cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two classes are called {cls.kind()!r}: {other} and {cls}")
        _words[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """The name under which this class is written to JSON, as in "step/noise"."""
        return f"{cls.family}/{cls.name}"

    def to_json(self) -> dict[str, Any]:
        """The whole spec as a JSON value: `from_json(spec.to_json()) == spec`."""
        fields = {name: _plain(getattr(self, name)) for name in type(self).model_fields}
        return {"is": self.kind(), "version": self.version, **fields}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Rebuilds a spec. Raises ValueError where the word is unknown or was written by another version of it."""
        return cls.model_validate(value)

    @model_validator(mode="wrap")
    @classmethod
    def _by_name(cls, value: Any, build: Any) -> Any:
        """A JSON value names its own class, so a field typed `Step` accepts the JSON of any step."""
        if not (isinstance(value, dict) and "is" in value):
            return build(value)
        found = find(value["is"])
        if not issubclass(found, cls):
            raise ValueError(f"expected a {cls.family or 'spec'}, got {value['is']!r}")
        if value.get("version") != found.version:
            raise ValueError(
                f"{value['is']!r} is version {found.version} here, the record is of {value.get('version')!r}"
            )
        fields = {k: v for k, v in value.items() if k not in ("is", "version")}
        return build(fields) if found is cls else found.model_validate(fields)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The same spec with other values, validated again. pydantic's own would carry the old key along."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, **(update or {})})

    def pin(self) -> Self:
        """The same spec with everything that could move fixed: a branch becomes a commit, a file its digest."""

        def pinned(value: Any) -> Any:
            if isinstance(value, tuple):
                found = tuple(map(pinned, value))
                return value if all(a is b for a, b in zip(found, value, strict=True)) else found
            return value.pin() if isinstance(value, Spec) else value

        moved = {name: pinned(getattr(self, name)) for name in type(self).model_fields}
        moved = {name: value for name, value in moved.items() if value is not getattr(self, name)}
        return self.model_copy(update=moved) if moved else self

    def with_digest(self, what: str, found: str, field: str = "sha256") -> Self:
        """The same spec with its field `sha256` (or another one) filled in. Raises ValueError where it names another digest
        already: `what` has changed since."""
        known: str | None = getattr(self, field)
        if known not in (None, found):
            raise ValueError(f"{what} was to have sha256 {known} but has {found}")
        return self if known else self.model_copy(update={field: found})

    def identity(self) -> Any:
        """The JSON value that the key is made of: everything, unless a field only says where to look."""
        return self.to_json()

    @cached_property
    def key(self) -> str:
        """Content key: sha256 of the canonical JSON (sorted keys, no spaces, shortest exact floats)."""
        return key_of(self.identity())

    def quotes(self) -> Iterator[Spec]:
        """The specs that this one holds as fields, directly or inside a tuple."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Spec):
                    yield item


_words: dict[str, type[Spec]] = {}


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def key_of(value: Any) -> str:
    """Key of a plain JSON value. NaN and infinities have no JSON and are refused (ValueError)."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:KEY_LENGTH]


def find(kind: str) -> type[Spec]:
    """The class of a word such as "step/noise", imported on demand. Raises ValueError that lists what exists."""
    if kind not in _words:
        family, _, name = str(kind).partition("/")
        room = _room(family)
        if name in _names(room):
            importlib.import_module(f"{room.__name__}.{name.replace('-', '_')}")
        if kind not in _words:
            raise ValueError(f"no {family} {name!r}; there are: {', '.join(words(family))}")
    return _words[kind]


def words(family: str) -> list[str]:
    """Names of all subjects, steps, measures or studies: those in their folder and those a caller has defined."""
    here = (kind.split("/")[1] for kind in _words if kind.startswith(f"{family}/"))
    return sorted({*here, *_names(_room(family))})


def _room(family: str) -> ModuleType:
    rooms = {"step": "steps", "measure": "measures", "study": "studies", "task": "tasks"}
    rooms |= {"subject": "subjects", "trial": "trial"}
    if family not in rooms:
        raise ValueError(f"no kind of spec {family!r}; there are: {', '.join(rooms)}")
    return importlib.import_module(f"lesion.{rooms[family]}")


def _names(room: ModuleType) -> list[str]:
    files = pkgutil.iter_modules(room.__path__) if hasattr(room, "__path__") else ()
    return [dashed(file.name) for file in files if not file.name.startswith("_")]


def lazily(room: str, name: str) -> Any:
    """`from lesion.steps import Noise` without importing the other steps: the `__getattr__` of such a folder."""
    if name[:1].isupper():
        module, folder = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower(), importlib.import_module(room)
        if dashed(module) in _names(folder):
            found = getattr(importlib.import_module(f"{room}.{module}"), name)
            setattr(folder, name, found)  # the folder is searched once
            return found
    raise AttributeError(f"module {room!r} has no attribute {name!r}")


def dashed(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).replace("_", "-").lower()


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in a spec")
