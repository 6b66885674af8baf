"""What processes, a cluster and checkpoints save: python bench/sweeps.py DATA [ROUNDS]

One small sweep (4 mechanisms × 2 models, the `quick` budget) run in turns by one process, by two,
and by a Ray cluster of two nodes on this machine, one thread each; then by one process that trains
every promoted configuration again from its first epoch. All must choose the same winners.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import tab.sweep.driver
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.sweep.driver import SweepWatcher, sweep
from tab.sweep.halving import BUDGETS
from tab.sweep.plan import SweepPlan
from tab.sweep.space import load_space
from tab.tasks.processes import Processes
from tab.tasks.tasks import Executor

ATTENTIONS = ["none", "multi_head", "linear", "performer"]
continued = tab.sweep.driver.train_rung


def from_scratch(config, dataset, epochs, device, *, folder, emit):
    for file in folder.iterdir():
        file.unlink()
    return continued(config, dataset, epochs, device, folder=folder, emit=emit)


class Counter(SweepWatcher):
    epochs = 0

    def epoch(self, pair, entry, row) -> None:
        self.epochs += 1


def run(dataset, data: str, executor: Executor, train=continued) -> tuple[float, int, dict]:
    """Seconds, epochs trained, the winner of each pair."""
    plan = SweepPlan(
        load_recipe("quick"),
        load_space("small"),
        BUDGETS["quick"],
        ["mlp", "cnn"],
        ATTENTIONS,
        data,
        "cpu",
        seed=0,
    )
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sweep"
        plan.save(out, dataset)
        tab.sweep.driver.train_rung = train
        start = time.perf_counter()
        best = sweep(plan, dataset, out, watcher=counter, executor=executor)
        seconds = time.perf_counter() - start
    tab.sweep.driver.train_rung = continued
    return seconds, counter.epochs, {p: (e.entry.configuration, e.score) for p, e in best.items()}


def main() -> None:
    from ray.cluster_utils import Cluster

    from tab.tasks.ray_cluster import Ray

    data, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    dataset = load_dataset(data)
    node = {"num_cpus": 1, "object_store_memory": 500 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ways = {
        "1 process": (Processes(1, 1), continued),
        "2 processes": (Processes(2, 1), continued),
        "2 Ray nodes": (Ray(cluster.address), continued),
        "1 process, from scratch": (Processes(1, 1), from_scratch),
    }
    found: dict[str, list] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (executor, train) in ways.items():
            found[name].append(run(dataset, data, executor, train))
    cluster.shutdown()
    first = found["1 process"][0][2]
    for name, results in found.items():
        seconds = sorted(result[0] for result in results)
        same = all(winners == first for _, _, winners in results)
        print(
            f"{name:24s} {statistics.median(seconds):6.1f} s [{seconds[0]:.1f}–{seconds[-1]:.1f}]  "
            f"{results[0][1]} epochs  {'the same winners' if same else 'OTHER WINNERS'}"
        )


if __name__ == "__main__":
    main()
