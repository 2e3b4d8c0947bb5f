"""Peak memory of a poison run against what `lesion plan` says of it before: within 15 %.

    python benchmarks/peak.py [--subjects smollm2 350m] [--optimizers adamw sgd] [--steps 3]

Each run is a process of its own, whose largest resident size is read; a name of a size (125m, 350m) is a decoder of ours with
random weights. What a plan says of larger models, such as Pythia-1B, is the same arithmetic.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

GIB = 2**30


def sentence(name, optimizer, steps):
    from lesion.shapes import SIZES
    from lesion.steps import Poison
    from lesion.subjects import Scratch, parse
    from lesion.trial import Trial

    config = {**SIZES.get(name, {}), "vocab_size": 32_000}
    subject = Scratch(architecture="lesion-decoder", config=config) if name in SIZES else parse(name)
    return Trial(subject=subject).pin() >> Poison(arm="random-fresh", optimizer=optimizer, steps=steps).pin()


def measured(name, optimizer, steps):
    """Bytes."""
    import torch

    torch.set_num_threads(2)
    trial = sentence(name, optimizer, steps)
    specimen = trial.subject.load()
    trial.steps[0].apply(specimen)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=["smollm2", "350m"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(measured(options.subjects[0], options.optimizers[0], options.steps))
        return
    from lesion.estimates import training

    for name in options.subjects:
        for optimizer in options.optimizers:
            trial = sentence(name, optimizer, options.steps)
            _, _, planned = training(trial.subject, trial.steps[0])
            line = [sys.executable, __file__, "--one", "--subjects", name, "--optimizers", optimizer]
            found = int(
                subprocess.run(
                    [*line, "--steps", str(options.steps)], check=True, capture_output=True, text=True
                ).stdout
            )
            said = f"planned {planned / GIB:6.2f} GiB   measured {found / GIB:6.2f} GiB   {planned / found - 1:+.1%}"
            print(f"{name:10}{optimizer:14}{said} (bar: 15 %)")


if __name__ == "__main__":
    main()
