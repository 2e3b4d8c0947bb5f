"""Ten thousand jobs on a simulated cluster that loses, kills, preempts and doubles them, against one plain walk.

    python benchmarks/cluster.py [--jobs 10000] [--seed 1]

The cluster is that of `tests/faults/simulation.py`: its clock and its misfortunes are simulated, the walk, the tasks, the
leases and the lab on disk are the real ones. It prints what befell the jobs, what it took until nothing was missing, and
whether the lab is byte for byte that of the plain walk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults.simulation import Cluster
from faults.test_cluster_simulated import WIDTH, campaign, dependants, doubled, missing, rows_of, study
from lesion.store import Store
from lesion.walk import Walk

JOBS_OF_A_FAMILY = 8.3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--nodes", type=int, default=64)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    readings = study(round(chosen.jobs / JOBS_OF_A_FAMILY))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        plain = Store(Path(folder) / "plain")
        Walk(plain).take(readings)
        plain.close()
        alone = time.perf_counter() - started

        lab, started = Path(folder) / "lab", time.perf_counter()
        with pytest.MonkeyPatch.context() as patch:
            cluster = Cluster(lab, chosen.seed, chosen.nodes)
            cluster.take_over(patch)
            sizes = campaign(cluster, readings, WIDTH, missing(plain, readings))
        took = time.perf_counter() - started

        store = Store(lab)
        rows = rows_of(lab)
        files = list(store.log.iterdir())
        lines = {
            "tasks of each submission": ", ".join(f"{size:,}" for size in sizes),
            "jobs started": f"{cluster.count.pop('starts'):,}",
            "cancelled, for want of what they waited for": f"{cluster.count.pop('cancelled'):,}",
            **{fate: f"{times:,}" for fate, times in sorted(cluster.count.items())},
            "readings taken": f"{len(store.index.seals):,}",
            "rows": f"{len(rows):,}",
            "rows said again by who had been cut off": f"{sum(map(len, rows.values())) - len(rows):,}",
            "rows said again by others": len(doubled(rows, cluster)),
            "files in the log": f"{len(files)}, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB",
            "simulated": f"{cluster.clock / 3600:.1f} h",
            "took": f"{took:.0f} s, the plain walk {alone:.0f} s",
            "missing but what really fails": len(missing(store, readings) - missing(plain, readings)),
            "dependants of what really fails that were started": len(dependants(readings, plain) & cluster.started),
        }
        Walk(store).take(readings)
        store.close()
        same = list(Store(lab).canonical()) == list(plain.canonical())
        for what, value in {**lines, "byte for byte the plain walk's lab": "yes" if same else "NO"}.items():
            print(f"{what:55}{value:>24}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
