"""Healing: a model is trained further on clean text, after whatever was done to it.

Every weight is trained with the usual loss of language modelling through the one loop (`lesion.fit`). What it brings back is
a question for measures; the ledger says how far the loss fell and what share of the weights moved.
"""

from __future__ import annotations

from lesion.texttraining import TextTraining


class Heal(TextTraining):
    """Trains every weight on clean text."""
