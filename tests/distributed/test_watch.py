"""Ranks that are killed, stopped or fail are named by the others, which end; real processes."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cdfast import watch
from cdfast.config import ConfigError
from cdfast.watch import RANK_LOST, note, restart_advice, watch_ranks

TIMEOUT = 5.0  # the shortest that is allowed
PROMISED = 5.0  # seconds in which a dead rank is reported

# Processes are forked from one that has imported torch and runs no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.test_watch"])


# -- what a rank does ------------------------------------------------------------------------------


def collective(rank, folder):
    while True:
        dist.all_reduce(torch.ones(1))
        time.sleep(0.02)


def idle(rank, folder):
    time.sleep(100)


def with_forked_child(rank, folder):
    """A data loader's worker outlives its killed parent for a while."""
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    (folder / f"child{rank}").write_text(str(child))
    (folder / f"ready{rank}").touch()
    idle(rank, folder)


def full_disk(culprit):
    def body(rank, folder):
        note(phase="save")
        dist.barrier()
        if rank == culprit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        dist.all_reduce(torch.ones(1))

    return body


def same_error(rank, folder):
    dist.barrier()
    time.sleep(0.3 * rank)
    raise ValueError(f"the same on every rank, here {rank}")


def broken_network(rank, folder):
    dist.barrier()
    if rank == 1:
        raise RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1")
    idle(rank, folder)


def leave_first(culprit):
    def body(rank, folder):
        if rank != culprit:
            time.sleep(1.5)

    return body


def busy(rank, folder):
    """Rank 1 computes longer than the time-out, and lets another thread run once a second."""
    if rank == 1:
        until = time.monotonic() + TIMEOUT + 2
        sys.setswitchinterval(1.0)
        while time.monotonic() < until:
            math.factorial(300)
    dist.barrier()


def port_then_idle(rank, folder):
    if rank == 0:
        (folder / "port").write_text(str(watch._active.listener.getsockname()[1]))
    idle(rank, folder)


BODIES = {
    "collective": collective,
    "idle": idle,
    "with_forked_child": with_forked_child,
    "full_disk_0": full_disk(0),
    "full_disk_1": full_disk(1),
    "same_error": same_error,
    "broken_network": broken_network,
    "leave_first_0": leave_first(0),
    "leave_first_1": leave_first(1),
    "busy": busy,
    "port_then_idle": port_then_idle,
}


def run_rank(rank, world, folder, body, timeout, environment):
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if body == "unreachable":
        watch._CONNECT_SECONDS = 1.0
        watch._addresses = lambda: ["127.0.0.2"]
    with watch_ranks(timeout):
        note(step=120, phase="data")
        if body != "with_forked_child":
            (folder / f"ready{rank}").touch()
        BODIES[body](rank, folder)
    assert "cdfast-watch" not in [thread.name for thread in threading.enumerate()]
    assert watch._active is None
    print("left")
    dist.destroy_process_group()


# -- how they are run ------------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path):
    """start(body, world) -> the run; whatever is left of it is killed at the end."""
    processes = []

    def start(body, world=2, timeout=TIMEOUT, ready=True, **environment):
        environment = {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", **environment}
        for rank in range(world):
            process = CONTEXT.Process(
                target=run_rank, args=(rank, world, tmp_path, body, timeout, environment)
            )
            process.start()
            processes.append(process)
        if ready:
            wait_for(lambda: all((tmp_path / f"ready{r}").exists() for r in range(world)), 60)
            time.sleep(1.2)  # a beat, so that the others know the step
        return Run(processes, tmp_path)

    yield start
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(10)


class Run(SimpleNamespace):
    def __init__(self, processes, folder):
        super().__init__(processes=processes, folder=folder)

    def send(self, rank, signal_number):
        os.kill(self.processes[rank].pid, signal_number)
        return time.monotonic()

    def exit_codes(self, but=None, seconds=60):
        others = [p for rank, p in enumerate(self.processes) if rank != but]
        wait_for(lambda: not any(p.is_alive() for p in others), seconds)
        return [p.exitcode for p in others]

    def log(self, rank):
        return (self.folder / f"rank{rank}.log").read_text()

    def others(self, rank):
        return [r for r in range(len(self.processes)) if r != rank]

    def name(self, rank):
        return f"rank {rank} (host {socket.gethostname()}, pid {self.processes[rank].pid})"


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


# -- dead ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("body", ["collective", "idle"])
def test_a_killed_rank_is_named_by_all_others(ranks, body, culprit):
    run = ranks(body, world=3)
    killed = run.send(culprit, signal.SIGKILL)
    assert run.exit_codes() == [-signal.SIGKILL if r == culprit else RANK_LOST for r in range(3)]
    assert time.monotonic() - killed < PROMISED
    for rank in run.others(culprit):
        said = run.log(rank)
        assert f"error: {run.name(culprit)} died at step 120 (data)" in said
        assert re.search(r"last sign of life \d\.\d s ago\. Its own output has the reason", said)
        assert "with --resume" in said
        assert "Traceback" not in said  # of the collective that broke


@pytest.mark.slow
def test_a_killed_rank_is_named_although_its_forked_child_lives_on(ranks):
    run = ranks("with_forked_child", timeout=30.0)
    killed = run.send(1, signal.SIGKILL)
    assert run.exit_codes(but=1) == [RANK_LOST]
    assert time.monotonic() - killed < PROMISED
    child = int((run.folder / "child1").read_text())
    os.kill(child, 0)  # it did live
    assert f"{run.name(1)} died" in run.log(0)
    for rank in (0, 1):
        os.kill(int((run.folder / f"child{rank}").read_text()), signal.SIGKILL)


# -- stopped ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_rank_is_named_after_the_timeout(ranks, culprit):
    run = ranks("collective")
    stopped = run.send(culprit, signal.SIGSTOP)
    assert run.exit_codes(but=culprit) == [RANK_LOST]
    seconds = time.monotonic() - stopped
    assert TIMEOUT - 2 * watch.BEAT_SECONDS < seconds < TIMEOUT + PROMISED
    said = run.log(1 - culprit)
    assert f"error: {run.name(culprit)} has given no sign of life for" in said
    assert f"(rank_timeout {TIMEOUT:g} s), last at step 120 (data)" in said
    # Should it wake up, it does not train on alone.
    run.send(culprit, signal.SIGCONT)
    assert run.exit_codes() == [RANK_LOST, RANK_LOST]
    assert "rank 1" in run.log(culprit) or "rank 0" in run.log(culprit)


# -- failed ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_the_reason_of_a_failed_rank_reaches_the_others(ranks, culprit):
    run = ranks(f"full_disk_{culprit}", world=3, ready=False)
    codes = run.exit_codes()
    assert codes == [1 if r == culprit else RANK_LOST for r in range(3)]
    for rank in run.others(culprit):
        said = run.log(rank)
        assert f"error: {run.name(culprit)} failed at step 120 (save): " in said
        assert "OSError: [Errno 28] No space left on device" in said
        assert "Traceback" not in said
    assert "Traceback" in run.log(culprit)
    assert "error: rank" not in run.log(culprit)


def test_an_error_on_all_ranks_is_raised_by_each(ranks):
    run = ranks("same_error", ready=False)
    assert run.exit_codes() == [1, 1]
    for rank in (0, 1):
        assert f"ValueError: the same on every rank, here {rank}" in run.log(rank)


@pytest.mark.slow
def test_a_collective_that_breaks_by_itself_is_reported_too(ranks):
    run = ranks("broken_network", ready=False)
    assert run.exit_codes() == [RANK_LOST, 1]
    assert f"{run.name(1)} failed at step 120 (data): RuntimeError: gloo" in run.log(0)
    assert "RuntimeError: gloo: Connection closed by peer" in run.log(1)


# -- well ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_may_end_one_after_the_other(ranks, first):
    run = ranks(f"leave_first_{first}", world=3, ready=False)
    assert run.exit_codes() == [0, 0, 0]
    assert [run.log(rank) for rank in range(3)] == ["left\n"] * 3


@pytest.mark.slow
def test_a_busy_rank_gives_no_alarm(ranks):
    run = ranks("busy", ready=False)
    assert run.exit_codes() == [0, 0]
    assert [run.log(rank) for rank in range(2)] == ["left\n"] * 2


class Planted:
    """Its pickle runs a command where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.slow
def test_strangers_on_the_port_change_nothing(ranks, tmp_path, monkeypatch):
    run = ranks("port_then_idle")
    wait_for((tmp_path / "port").exists, 10)
    port = int((tmp_path / "port").read_text())
    lies = {"token": "0" * 32, "rank": 1, "host": "x", "pid": 1}
    sent = [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        pickle.dumps(Planted()) + b"\n",
        b"\xff" * 100_000,
        b"[" * 7000 + b"\n",
        b"null\n",
        json.dumps(lies).encode() + b"\n",
        json.dumps(lies | {"token": "é"}).encode() + b"\n",
        json.dumps(lies | {"token": None, "rank": "x"}).encode() + b"\n",
        b'{"verdict": "x", "grace": 0}\n{"failed": "x", "collective": false}\n{"bye": true}\n',
    ]
    strangers = []
    for data in [*sent, *[b""] * 100]:
        stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
        strangers.append(stranger)
        with contextlib.suppress(OSError):  # it may be shut out while it is still talking
            stranger.sendall(data)
    time.sleep(2)
    assert [p.is_alive() for p in run.processes] == [True, True]
    assert not (tmp_path / "planted").exists()
    run.send(1, signal.SIGKILL)
    assert run.exit_codes() == [RANK_LOST, -signal.SIGKILL]
    assert f"error: {run.name(1)} died at step 120" in run.log(0)
    for stranger in strangers:
        stranger.close()


def test_the_port_is_open_to_this_machine_alone_if_all_ranks_are_here(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for local, address in (("2", "127.0.0.1"), ("1", "::")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("MASTER_ADDR", "node0")
        with watch._listen() as server:
            assert server.getsockname()[0] in (address, "0.0.0.0" if address == "::" else address)
        assert watch._addresses()[0] == ("127.0.0.1" if local == "2" else "node0")


def test_a_rank_that_cannot_connect_is_refused_on_all(ranks):
    run = ranks("unreachable", ready=False)
    assert run.exit_codes() == [1, 1]
    for rank in (0, 1):
        assert "ConfigError: heartbeat: rank 1 cannot reach rank 0 (127.0.0.2 port" in run.log(rank)


def test_a_single_process_starts_nothing():
    before = threading.enumerate()
    with watch_ranks(TIMEOUT):
        note(step=1, phase="data")
        assert watch._active is None
        assert threading.enumerate() == before


@pytest.mark.parametrize("timeout", [0, 4.9, -1, math.inf, math.nan])
def test_a_timeout_that_would_not_work_is_refused(timeout):
    refused = pytest.raises(ConfigError, match="rank_timeout: expected at least 5 seconds; got")
    with refused, watch_ranks(timeout):
        pass


# -- restarts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "restarts, shared, disabled, said",
    [
        ("0", "True", None, None),
        ("3", "False", "1", None),
        ("3", "True", None, "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        ("3", "True", "1", "--rdzv-backend c10d"),
        (None, None, None, None),
    ],
)
def test_advice_on_restarts(monkeypatch, restarts, shared, disabled, said):
    for name, value in {
        "TORCHELASTIC_MAX_RESTARTS": restarts,
        "TORCHELASTIC_USE_AGENT_STORE": shared,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": disabled,
    }.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    advice = restart_advice()
    assert advice is None if said is None else said in advice
