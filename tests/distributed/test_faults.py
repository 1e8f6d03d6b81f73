"""Two ranks whose saves are killed or fail at chosen file operations, and what resumes from it.

Incarnations of one run follow each other: each resumes from what the one before has left, trains a
step and is killed while it saves. Every loss must be that of a run that nobody disturbed.
"""

import errno
import functools
import os
import random
import re
import signal
from pathlib import Path

import pytest

STEPS = 300
KILLED = -signal.SIGKILL
HALVES = ("write",)  # only these have a middle
STAGES = {"ddp": 0, "zero3": 3}
LENGTH = 40


class Chain:
    """One run in incarnations, and the trace that an undisturbed run of the same kind has."""

    def __init__(self, warm, folder, stage, want, what="everything"):
        self.warm, self.folder, self.want = warm, folder, want
        self.job = {"stage": stage, "what": what}
        self.events_of_rank = {}
        self.run = folder / "run"
        self.number = 0

    def step(self, fault=None, steps=STEPS, ranks=2, **options):
        """The next incarnation. Returns (exit codes, output of rank 0)."""
        self.number += 1
        log = self.folder / f"log-{self.number}"
        if fault:
            fault = {"root": str(self.run), "events": str(self.events), **fault}
            self.events.unlink(missing_ok=True)
        codes = self.warm.run(
            ranks=ranks,
            log=str(log),
            folder=str(self.run),
            steps=steps,
            trace=str(self.folder / "trace"),
            fault=fault,
            **{**self.job, **options},
        )
        return codes, Path(f"{log}-0.log").read_text()

    @property
    def events(self):
        return self.folder / "events"

    def listed(self):
        """(kind, bytes, path) of the events of the last incarnation's save."""
        lines = [line.split(" ", 3) for line in self.events.read_text().splitlines()]
        return [(kind, int(size), path) for _, kind, size, path in lines]

    def check_trace(self):
        """All losses so far are those of the undisturbed run. Returns the last step."""
        last = 0
        for line in (self.folder / "trace").read_text().splitlines():
            step, _, values = line.partition(" ")
            assert values == self.want[int(step)], f"step {step}"
            last = int(step)
        return last

    def newest(self):
        return max(
            (int(path.name.split("-")[1]) for path in self.run.glob("checkpoint-*")), default=0
        )

    def kill(self, rank, at, phase):
        """An incarnation that is killed at event `at` of its save, and what it must have left."""
        before = self.newest()
        codes, output = self.step({"rank": rank, "action": "kill", "at": at, "phase": phase})
        where = f"rank {rank}, {phase} event {at}: {codes}\n{output[-2000:]}"
        assert codes[rank] == KILLED, f"the fault did not happen: {where}"
        # What was there before is resumed from: nothing is lost, and nothing is found broken.
        assert f"resuming from {self.run}/checkpoint-{before}\n" in output, where
        assert "skipping" not in output, where
        assert self.newest() in (before, before + 1), where
        self.check_trace()

    def end(self):
        """A last incarnation for two steps more, without a fault."""
        before = self.newest()
        codes, output = self.step(steps=STEPS, stop_after=2)
        assert codes == [0, 0], output[-3000:]
        assert f"resuming from {self.run}/checkpoint-{before}\n" in output
        assert self.check_trace() == before + 2
        assert all(path.name.startswith("checkpoint-") for path in self.run.iterdir())


def undisturbed(warm, folder, length, **job):
    """Step -> loss and gradient norm, to the last bit, of a run that nobody disturbs."""
    folder.mkdir()
    straight = Chain(warm, folder, want={}, **job)
    codes, output = straight.step(save_steps=10**6, stop_after=length)
    assert codes == [0, 0], output[-3000:]
    lines = (folder / "trace").read_text().splitlines()
    assert len(lines) == length
    return {int(step): values for step, _, values in (line.partition(" ") for line in lines)}


def make_chain(warm, folder, stage, length):
    """A run with two checkpoints, so that its next save also deletes one."""
    want = undisturbed(warm, folder / "straight", length, stage=STAGES[stage])
    chain = Chain(warm, folder, STAGES[stage], want)
    codes, output = chain.step(stop_after=2)
    assert codes == [0, 0], output[-3000:]
    return chain


@pytest.fixture(scope="module")
def chains(warm, tmp_path_factory):
    return {
        stage: make_chain(warm, tmp_path_factory.mktemp(stage), stage, LENGTH) for stage in STAGES
    }


@pytest.fixture(scope="module")
def long_chain(warm, tmp_path_factory):
    """A stage's chain; each event after the rename lets it advance by a step."""
    return functools.cache(
        lambda stage: make_chain(warm, tmp_path_factory.mktemp(stage), stage, length=150)
    )


def events_of(chain, rank):
    """What a save does on a rank, by an incarnation that saves once undisturbed."""
    if rank not in chain.events_of_rank:
        codes, output = chain.step({"rank": rank, "action": "count"}, stop_after=1)
        assert codes == [0, 0], output[-3000:]
        chain.events_of_rank[rank] = chain.listed()
    return chain.events_of_rank[rank]


def find(events, kind, pattern):
    """Number of the event of that kind whose path matches; the largest if several do."""
    found = [
        (size, number)
        for number, (k, size, path) in enumerate(events, 1)
        if k == kind and re.search(pattern, path)
    ]
    assert found, f"no {kind} of {pattern} among {len(events)} events"
    return max(found)[1]


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_every_way_of_writing_is_seen(chains, stage, rank):
    """torch.save, safetensors, DeepSpeed, JSON, copies; and each rank syncs its share of files."""
    events = events_of(chains[stage], rank)
    written = {Path(path).name for kind, size, path in events if kind == "write" and size}
    patterns = [rf"rng_state_{rank}\.pth"]
    if rank == 0:
        patterns += [r"\.tmp|safetensors", r"trainer_state\.json", "manifest", "modeling_.*py"]
        patterns += [r"optimizer\.pt"] if stage == "ddp" else ["latest", r"zero_to_fp32\.py"]
    if stage == "zero3":
        patterns += [f"rank_{rank}.*optim_states", f"rank_{rank}.*model_states"]
    for pattern in patterns:
        assert any(re.search(pattern, name) for name in written), pattern
    assert sum(kind == "fsync" for kind, _, _ in events) >= 5
    renames = [path for kind, _, path in events if kind == "rename" and "manifest" not in path]
    assert len(renames) == (2 if rank == 0 else 0)  # the checkpoint's, and that of the one deleted


# Spread over kinds of operation, ranks and moments.
POINTS = {
    "ddp": [
        (0, "write", r"optimizer\.pt", "halfway"),
        (0, "rename", r"^checkpoint-\d+$", "before"),
        (0, "unlink", r"^_trash", "after"),
    ],
    "zero3": [
        (1, "write", "optim_states", "halfway"),
        (0, "write", "manifest", "halfway"),
        (0, "rename", r"^checkpoint-\d+$", "after"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_killed_in_a_save_loses_nothing(chains, stage):
    chain = chains[stage]
    for rank, kind, pattern, phase in POINTS[stage]:
        chain.kill(rank, find(events_of(chain, rank), kind, pattern), phase)
    chain.end()


@pytest.mark.full
@pytest.mark.parametrize("phase", ["before", "halfway", "after"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_killed_at_any_point_of_a_save_loses_nothing(long_chain, stage, rank, phase):
    chain = long_chain(stage)
    events = events_of(chain, rank)
    points = [n for n, (kind, _, _) in enumerate(events, 1) if phase != "halfway" or kind in HALVES]
    for at in points:
        chain.kill(rank, at, phase)
    chain.end()
    print(f"{stage}, rank {rank}, {phase}: {len(points)} points")


@pytest.mark.slow
def test_ten_random_kills_leave_the_trace_of_an_undisturbed_run(warm, tmp_path):
    """At any time: in a step, in a save, in the start; one rank or both. Adapters with dropout."""
    job = {"stage": 0, "what": "lora"}
    want = undisturbed(warm, tmp_path / "straight", LENGTH, **job)
    chain = Chain(warm, tmp_path, want=want, **job)
    random_kills(chain, 10, draw=random.Random(0))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", STAGES)
def test_random_kills_at_every_stage(warm, long_chain, tmp_path, stage, seed):
    chain = Chain(warm, tmp_path, STAGES[stage], long_chain(stage).want)
    random_kills(chain, 20, draw=random.Random(seed))


def random_kills(chain, kills, draw):
    for number in range(kills):
        kill = {"ranks": draw.choice([[0], [1], [0, 1]]), "after": draw.uniform(0, 0.25)}
        if number % 5:
            kill["file"] = str(chain.folder / "trace")  # once it trains
        codes, output = chain.step(kill=kill, save_steps=2)
        assert all(codes[rank] == KILLED for rank in kill["ranks"]), output[-3000:]
        assert "skipping" not in output
    codes, output = chain.step(save_steps=2, stop_after=3)
    assert codes == [0, 0], output[-3000:]
    assert chain.check_trace() >= 3


# -- failing ---------------------------------------------------------------------------------------


FAILURES = {
    "ddp": [
        (0, "write", r"\.tmp|safetensors", errno.ENOSPC),
        (0, "write", r"optimizer\.pt", errno.ENOSPC),
        (1, "write", "rng_state_1", errno.ENOSPC),
        (0, "mkdir", "_staging", errno.EROFS),
    ],
    "zero3": [
        (1, "write", "optim_states", errno.ENOSPC),
        (0, "write", "latest", errno.ENOSPC),
        (1, "fsync", "", errno.EIO),
        (0, "rename", r"^checkpoint-\d+$", errno.EROFS),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_on_one_rank_ends_all_with_one_message(chains, stage):
    chain = chains[stage]
    before = None
    for rank, kind, pattern, code in FAILURES[stage]:
        at = find(events_of(chain, rank), kind, pattern)
        before = before or chain.newest()
        codes, output = chain.step(
            {"rank": rank, "action": "error", "at": at, "code": code, "sticky": True}
        )
        where = f"rank {rank}, {kind} of {pattern}: {codes}\n{output[-2000:]}"
        assert codes == [2, 2], where
        error = output[output.index("error: ") :]
        assert f"rank {rank}: {chain.run}" in error, where
        assert f"cannot be written: {os.strerror(code)}" in error, where
        assert f"{chain.run}/checkpoint-{before} is whole" in error, where
        assert "--resume" in error, where
        assert chain.newest() == before, where
    chain.end()
