"""Tasks on a Ray cluster of two nodes on this machine; a node killed in the middle."""

import logging
import os
from unittest import mock

import pytest
from paths import SUPPORT
from patience import PATIENCE
from small_grid import GRID, RUNS, SMALL, begin, resume, same
from tasks import count, count_and_die_at, count_on_nodes, facts, fail, threads

from tab.compare.driver import Watcher, compare
from tab.compare.plan import Plan
from tab.data.load import load_dataset
from tab.tasks.choose import executor
from tab.tasks.tasks import ATTEMPTS, Shared, Task, run_tasks

ray = pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')
from ray.cluster_utils import Cluster  # noqa: E402

from tab.tasks.ray_cluster import Ray  # noqa: E402

pytestmark = pytest.mark.slow

HEAD = {  # a dead node is noticed in a second; nobody looks at the cluster, and it does not grow
    "num_cpus": 1,
    **{"include_dashboard": False, "include_log_monitor": False, "no_monitor": True},
    "_system_config": {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 200,
        "health_check_failure_threshold": 3,
    },
}


OWN = {  # of the nodes and their workers
    "PYTHONPATH": str(SUPPORT),  # where they find these tests
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at Ray's own, 15, they starve beside the other tests
    "RAY_worker_register_timeout_seconds": str(PATIENCE),  # busy, one starts more slowly than in 60
}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with one core each."""
    with mock.patch.dict(os.environ, OWN):
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    add_node(cluster)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster: Cluster) -> None:
    with mock.patch.dict(os.environ, OWN):
        cluster.add_node(num_cpus=1)


def test_values_errors_events_and_files(cluster, tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "count").write_text("1")  # the folder goes with the task
    tasks = [Task(count, (3,), tmp_path / str(i)) for i in range(3)]
    tasks[1] = Task(fail, ("no such luck",), tmp_path / "1")
    events = {0: [], 1: [], 2: []}
    where = Ray(cluster.address)
    ends = {d.index: d for d in run_tasks(tasks, where, lambda i, event: events[i].append(event))}
    assert events == {0: [1, 2, 3], 1: ["before"], 2: [2, 3]}
    assert {index: end.value for index, end in ends.items()} == {0: 3, 1: None, 2: 3}
    assert type(ends[1].error) is ValueError and "in fail" in ends[1].traceback
    assert (tmp_path / "0" / "count").read_text() == "3"  # and comes back
    assert not ray.is_initialized()


def test_shared_values_are_sent_and_threads_are_the_cores(cluster, tmp_path):
    shared = Shared("x", fail)  # a worker must not load it
    shared.put("sent")
    tasks = [Task(facts, (shared,), tmp_path / str(i)) for i in range(3)]
    for done in run_tasks(tasks, Ray(cluster.address)):
        assert done.value["shared"] == "sent", done.traceback
        assert done.value["threads"] == 1 and done.value["process"] != os.getpid()


def test_a_killed_worker_is_replaced_and_given_up_in_the_end(cluster, tmp_path, caplog):
    homes = tmp_path / "fatal", tmp_path / "once"
    fatal = Task(count_and_die_at, ([1, 2, 3, 4], 9, homes[0]), homes[0])
    tasks = [fatal, Task(count_and_die_at, ([2], 4, homes[1]), homes[1])]
    events = []
    with caplog.at_level(logging.WARNING, "tab"):
        ends = run_tasks(tasks, Ray(cluster.address), lambda i, event: events.append((i, event)))
        ends = {end.index: end for end in ends}
    assert f"{ATTEMPTS} times" in str(ends[0].error)
    assert ends[1].value == 4 and [event for i, event in events if i == 1] == [1, 2, 3, 4]
    assert "once: its Ray worker or node died" in caplog.text


def test_a_node_killed_in_the_middle(cluster, tmp_path):
    """Its task goes on, on the other node, from the last event: no step is made twice."""
    nodes = {node.node_id: node for node in cluster.worker_nodes}  # all but the head
    head, gone = cluster.head_node.node_id, tmp_path / "gone"
    tasks = [Task(count_on_nodes, (8, head, gone), tmp_path / str(i)) for i in range(3)]
    events, killed = [], []

    def on_event(index: int, event: tuple[str, int]) -> None:
        node, step = event
        events.append((index, node, step))
        if node in nodes and step == 3:
            killed.append(index)
            cluster.remove_node(nodes.pop(node), allow_graceful=False)
            gone.touch()

    ends = {end.index: end for end in run_tasks(tasks, Ray(cluster.address), on_event)}
    add_node(cluster)
    assert len(killed) == 1
    assert {index: end.value for index, end in ends.items()} == dict.fromkeys(range(3), 8)
    for index in range(3):
        assert [step for i, _, step in events if i == index] == list(range(1, 9))
    assert len({where for i, where, _ in events if i == killed[0]}) == 2


def test_a_comparison_is_bit_for_bit_the_same_though_a_node_dies(cluster, tmp_path):
    dataset, nodes = load_dataset(GRID.data), list(cluster.worker_nodes)
    here, there = begin(tmp_path / "here", dataset), begin(tmp_path / "there", dataset)
    epochs = []

    class Kill(Watcher):
        def epoch(self, config, row):
            epochs.append((config.id, row["epoch"]))
            if row["epoch"] == 3 and nodes:
                cluster.remove_node(nodes.pop(), allow_graceful=False)

    with threads(1):
        resume(here, dataset)
    compare(Plan.load(there), dataset, there, watcher=Kill(), executor=Ray(cluster.address))
    add_node(cluster)
    same(there, here, {})
    assert not nodes and len(epochs) == len(set(epochs)) == RUNS * SMALL["train.epochs"]


def test_a_sweep_has_the_same_winners_though_a_node_dies_within_a_rung(cluster, tmp_path):
    pytest.importorskip("optuna")
    from kill_sweep import plan, result

    from tab.sweep.driver import SweepWatcher, sweep
    from tab.sweep.halving import Budget

    budget = Budget(4, (1, 2), 2.0, 60, 20)
    toy = plan(tmp_path, attentions=["self"], budget=budget)
    nodes = list(cluster.worker_nodes)
    dataset, (here, there) = load_dataset(toy.data), (tmp_path / "here", tmp_path / "there")
    epochs = []

    class Kill(SweepWatcher):
        def epoch(self, pair, entry, row):
            epochs.append((pair, entry.configuration, row["epoch"]))
            if entry.rung == 1 and nodes:
                cluster.remove_node(nodes.pop(), allow_graceful=False)

    for out in (here, there):
        toy.save(out, dataset)
    with threads(1):
        sweep(toy, dataset, here)
    sweep(toy, dataset, there, watcher=Kill(), executor=Ray(cluster.address))
    add_node(cluster)
    assert not nodes and len(epochs) == len(set(epochs))
    assert result(there) == result(here)


def test_what_no_node_has_is_an_error(cluster, tmp_path):
    task = Task(count, (1,), tmp_path / "a")
    with pytest.raises(ValueError, match=r"no node .* has 1 CPU and 2 GPU"):
        list(run_tasks([task], Ray(cluster.address, gpus=2)))


def test_no_cluster_at_the_address_is_an_error(tmp_path):
    with pytest.raises(ConnectionError, match="no Ray cluster answers at localhost:1"):
        list(run_tasks([Task(count, (1,), tmp_path / "a")], Ray("localhost:1")))


def test_what_the_options_ask_for():
    where = executor(ray="local", cpus=2, gpus=0.5)
    assert (where.address, where.cpus, where.gpus) == ("local", 2, 0.5)
    for wrong in ({"ray": "ray://head:10001"}, {"ray": "local", "cpus": 0}):
        with pytest.raises(ValueError, match=r"cpus|client"):
            executor(**wrong)
