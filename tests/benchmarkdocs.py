"""Invented documents for lm-eval tasks, with the fields of the hub's datasets: no test of the harness needs a network."""

PASSAGES = [
    "The baker had one loaf left, and when the old woman asked he gave her the loaf",
    "“Where is the map?” asked Tom. Nobody knew where Tom had put the map",
    'It rained for a week. "I am tired of rain," said Ann, and looked again at the rain',
    "He called his dog, but a cat came instead of the dog",
    "They built the boat in spring. By autumn nobody remembered the boat",
    "Snow fell on the café until one could not see the café",
]
DOCUMENTS = {
    "lambada_openai": ("test", [{"text": text} for text in PASSAGES]),
    "hellaswag": (
        "validation",
        [
            {
                "activity_label": "Washing [header] dishes",
                "ctx_a": f"A man stands at the sink number {n}.",
                "ctx_b": "he",
                "endings": ["takes a plate. [step] He wipes it.", "flies away.", "sings  loudly and long.", "is a sink."],
                "label": str(n % 4),
            }
            for n in range(6)
        ],
    ),
    "winogrande": (
        "validation",
        [
            {"sentence": f"The cup {n} did not fit in the box because _ was too big.", "option1": "the cup",
             "option2": "the box", "answer": str(1 + n % 2)}
            for n in range(6)
        ],
    ),
    "piqa": (
        "validation",
        [{"goal": f"open jar {n}", "sol1": "Turn the lid.", "sol2": "Turn the jar over.", "label": n % 2} for n in range(6)],
    ),
    "arc_easy": (
        "test",
        [
            {"id": f"x{n}", "question": f"What is {n} metres?", "choices": {"text": ["a length", "a mass", "a day"],
             "label": ["A", "B", "C"]}, "answerKey": "ABC"[n % 3]}
            for n in range(6)
        ],
    ),
    "boolq": ("validation", [{"passage": "Ice is cold.", "question": f"is ice {n} cold", "label": n % 2} for n in range(6)]),
    "copa": (
        "validation",
        [
            {"premise": f"Door {n} was open.", "choice1": "A bird flew in.", "choice2": "The sea rose.",
             "question": ("cause", "effect")[n % 2], "label": n % 2}
            for n in range(6)
        ],
    ),
    "rte": (
        "validation",
        [{"sentence1": f"Ann has {n} hats.", "sentence2": "Ann has hats.", "label": n % 2} for n in range(6)],
    ),
    "sst2": ("validation", [{"sentence": f"a film for {n} people . ", "label": n % 2} for n in range(6)]),
    "commonsense_qa": (
        "validation",
        [
            {"question": f"Where is hat {n}?", "choices": {"label": list("ABCDE"), "text": ["here", "there", "up", "in", "off"]},
             "answerKey": "ABCDE"[n % 5]}
            for n in range(6)
        ],
    ),
    "social_iqa": (
        "validation",
        [
            {"context": f"Bo lent {n} coins.", "question": "Why?", "answerA": "to help", "answerB": "to harm",
             "answerC": "to sleep", "label": str(1 + n % 3)}
            for n in range(6)
        ],
    ),
}  # fmt: skip


def invented(name):
    """What `packageddata.documents` is to say in a test."""
    split, documents = DOCUMENTS[name]
    return split, [dict(document) for document in documents]


def forget():
    """Empties what the harness remembers of tasks."""
    from lesion import harness

    harness.exam.cache_clear()
    harness.build.cache_clear()
