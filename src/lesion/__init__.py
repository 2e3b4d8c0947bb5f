"""Lesion: a laboratory for controlled interventions on language models.

from lesion import Lab, SmolLM2
from lesion.steps import Noise
from lesion.measures import Perplexity

damaged = SmolLM2() >> Noise(site="mlp", sigma=0.3, seed=1)
table = Lab("lab").read([SmolLM2(), damaged], [Perplexity(corpus="austen")])
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Lab": "lab",
    "Trial": "trial",
    "Reading": "trial",
    "Step": "trial",
    "Measure": "trial",
    "Subject": "trial",
    "Specimen": "trial",
    "Hub": "subjects",
    "Directory": "subjects",
    "Scratch": "subjects",
    "SmolLM2": "subjects",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imported on first use: `lesion --help` must not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"lesion.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lesion' has no attribute {name!r}")
