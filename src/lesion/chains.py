"""Ordered text chains: sentences that differ in one word, whose words rise in degree. Written for this purpose."""

from __future__ import annotations

SCALES: dict[str, tuple[str, ...]] = {
    "quality": ("terrible", "bad", "acceptable", "good", "excellent"),
    "warmth": ("freezing", "cold", "mild", "warm", "boiling"),
    "size": ("tiny", "small", "average", "large", "enormous"),
    "age": ("newborn", "young", "grown", "elderly", "ancient"),
    "wealth": ("destitute", "poor", "comfortable", "wealthy", "opulent"),
    "loudness": ("silent", "quiet", "audible", "loud", "deafening"),
    "speed": ("motionless", "slow", "brisk", "fast", "lightning-fast"),
    "brightness": ("black", "dark", "dim", "bright", "dazzling"),
    "certainty": ("impossible", "unlikely", "possible", "likely", "certain"),
    "frequency": ("never", "rarely", "sometimes", "often", "always"),
    "difficulty": ("effortless", "easy", "moderate", "hard", "unbearable"),
    "danger": ("harmless", "safe", "risky", "dangerous", "deadly"),
    "beauty": ("hideous", "ugly", "plain", "pretty", "gorgeous"),
    "cleverness": ("stupid", "dull", "ordinary", "clever", "brilliant"),
    "happiness": ("miserable", "sad", "content", "happy", "ecstatic"),
    "amount": ("none", "few", "some", "many", "all"),
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "it": ("Everybody who saw it agreed on one word for it:", "If I had to describe it in a single word, it would be"),
    "frequency": ("How often does that happen? The honest answer is", "When they were asked how often, they all said"),
    "amount": ("How many of them came back? The answer is", "Of all the letters he wrote, the number that arrived was"),
}


def chains() -> dict[str, tuple[str, ...]]:
    """Id → texts in rising order."""
    found = {}
    for scale, words in SCALES.items():
        for number, template in enumerate(TEMPLATES.get(scale, TEMPLATES["it"])):
            found[f"{scale}/{number}"] = tuple(f"{template} {word}" for word in words)
    return found
