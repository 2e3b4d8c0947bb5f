"""Methods of damage by name, and presets: the options of the runs that `degrade` reproduces."""

from __future__ import annotations

from typing import Any, Literal

from lesion.trial import Step

Method = Literal[
    "mult-gauss",
    "add-gauss",
    "lognormal",
    "ablation",
    "ablate-largest",
    "ablate-smallest",
    "ablate-heads",
    "ablate-neurons",
    "ablate-layers",
    "uni-quant",
    "quant-symmetric",
    "quant-percentile",
    "quant-channel",
]

DESCRIBED: dict[str, Any] = {  # the runs of the degradation study that these presets reproduce
    "subject": "google/gemma-3-4b-it",
    "method": "uni-quant",
    "repeats": 10,
    "seed": 42,
    "new_tokens": 350,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}
SMALL: dict[
    str, Any
] = {  # minutes on two cores; noise, because the packaged model's weights lie on a 4-bit grid already
    "subject": "smollm2",
    "method": "mult-gauss",
    "doses": (0.0, 0.1, 0.2, 0.4, 0.8),
    "repeats": 2,
    "new_tokens": 60,
    "documents": 12,
    "tokens": 128,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: {
        "full": {**DESCRIBED, "battery": name},
        "small": {**SMALL, "battery": "picture-told" if name == "picture" else name},
    }
    for name in ("dreams", "iq", "picture")
}


def step_of(method: str, site: str, dose: float, seed: int) -> Step | None:
    """The step that a method means at a dose, or None where the dose is none. Unseeded methods ignore the seed."""
    from lesion.steps import Ablate, Noise, Quantise

    noise = {"mult-gauss": "multiplicative", "add-gauss": "additive", "lognormal": "lognormal"}
    ablate: dict[str, dict[str, Any]] = {
        "ablation": {"seed": seed},
        "ablate-largest": {"order": "largest"},
        "ablate-smallest": {"order": "smallest"},
        "ablate-heads": {"unit": "head", "seed": seed},
        "ablate-neurons": {"unit": "neuron", "seed": seed},
        "ablate-layers": {"unit": "layer", "seed": seed},
    }
    quantise: dict[str, dict[str, Any]] = {
        "uni-quant": {},
        "quant-symmetric": {"scheme": "symmetric"},
        "quant-percentile": {"scheme": "percentile"},
        "quant-channel": {"channel": "output"},
    }
    if dose == 0:
        return None
    if method in noise:
        return Noise(site=site, sigma=dose, law=noise[method], seed=seed)
    if method in ablate:
        return Ablate(site=site, share=dose, **ablate[method])
    if dose != int(dose):
        raise ValueError(f"{method} takes a whole number of levels, not {dose}")
    return Quantise(site=site, levels=int(dose), **quantise[method])
