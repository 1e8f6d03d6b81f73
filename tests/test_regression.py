"""A guard against slower or hungrier kernels that holds on a noisy machine: no seconds.

Counted work, bytes, and ratios of two times taken in turn, in bands far wider than the noise. What
was measured stands beside each band (2026-11, two shared cores of an Intel Xeon with AVX-512, one
thread). tests/kernels/test_work.py holds the formulas of the tiles against counted kernels.
"""

import statistics
import time
from collections import Counter

import pytest
import torch
from cdfast_kernels import (
    VisualLayout,
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    visual_attention_map,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory, tile_work, work
from benchmarks.cases import Case, Problem
from benchmarks.variants import variants, whole

pytestmark = pytest.mark.usefixtures("one_thread")
NO_CPU = available_backends()["cpu"]
on_cpu = pytest.mark.skipif(NO_CPU is not None, reason=f"cpu backend: {NO_CPU}")


# Counted work


def image_layout(tokens: int, visual: int, batch: int = 1, packed: bool = False) -> VisualLayout:
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    mask[:, 20 : 20 + visual] = True
    if not packed:
        return VisualLayout.from_mask(mask)
    ends = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)
    return VisualLayout.from_packed(ends, mask.flatten())


# Tile work over ideal work at 1024 tokens, 729 of them visual; the largest over the table: 1.124
# where all keys are visited, 1.159 where slots are.
MOST_TILE_WORK = 1.17


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_tile_work_of_the_launch_table(arch, head_dim):
    launch = pytest.importorskip("cdfast_kernels.launch")
    shape = work.Shape(image_layout(1024, 729), 16, 4, head_dim, torch.bfloat16)

    def settings(name: str) -> tile_work.Settings:
        found = launch.settings_for(name, arch, head_dim, 2)
        return tile_work.Settings(found.BLOCK_M, found.BLOCK_N)

    for operation in work.OPERATIONS:
        ideal = work.ideal(shape, operation)
        for name, found in tile_work.tiles(shape, operation, settings).items():
            if ideal[name].flops:
                assert 1 <= found.flops / ideal[name].flops <= MOST_TILE_WORK, (operation, name)


# Products per pair and entry of all kernels of an operation, 2 H d operations each: attention 9
# (fused backwards need 7), its loss 2 more. The modular form: 5 on entries.
@pytest.mark.parametrize(
    "operation, pairs, entries", [("plain", 9, 0), ("student", 9, 2), ("modular", 0, 5)]
)
def test_products_of_an_operation(operation, pairs, entries):
    shape = work.Shape(image_layout(256, 100), 4, 2, 64, torch.bfloat16)
    total = sum(found.flops for found in work.ideal(shape, operation).values())
    count = pairs * work.visible_pairs(shape.layout) + entries * work.visible_entries(shape.layout)
    assert total == count * 2 * 4 * 64


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (32, 32)], ids=str)
def test_no_tile_is_visited_for_padding_or_for_other_sequences(block):
    """Exact: rows of tiles of the sequences alone, whatever else the batch holds."""
    alone = tile_work.row_visits(image_layout(512, 300), *block)
    rows, keys = 512 // block[0], 512 // block[1]
    # Row tile i of a causal sequence sees the key tiles up to its last row.
    assert alone == sum(-(-(i + 1) * block[0] // block[1]) for i in range(rows))
    visual = torch.zeros(1, 1024, dtype=torch.bool)
    live = torch.arange(1024)[None] < 512
    for padded in (VisualLayout.from_mask(visual, live), VisualLayout.from_mask(visual, ~live)):
        assert tile_work.row_visits(padded, *block) == alone
    packed = image_layout(512, 300, batch=3, packed=True)
    assert tile_work.row_visits(packed, *block) == 3 * alone
    # Two turns after a shared prefix of 512: the second does not see the first.
    segment = torch.arange(1024)[None] // 256 - 1
    turns = VisualLayout.from_segments(segment.clamp(min=0), visual)
    turn = tile_work.row_visits(image_layout(256, 100), *block)
    assert tile_work.row_visits(turns, *block) == alone + 2 * (turn + 256 // block[0] * keys)


def test_tile_work_of_the_cpu_backend():
    """Measured 1.061: what causal tiles of 64 compute above the diagonal."""
    shape = work.Shape(image_layout(1024, 729), 16, 16, 128, torch.float32)
    ideal = work.cpu_phases(shape)
    for phase, found in tile_work.cpu_tile_flops(shape).items():
        assert 1 <= found / ideal[phase].flops <= 1.07
    # The loss adds no product to the attention that it is fused with.
    assert ideal["aligned forward"].flops == ideal["forward"].flops
    assert ideal["aligned backward"].flops == ideal["backward"].flops


class CalledOperators(TorchDispatchMode):
    """Counts the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cdfast":
            self.calls[func.overloadpacket.__name__.removeprefix("cpu_")] += 1
        return func(*args, **(kwargs or {}))


def counted_step(aligned: bool) -> tuple[int, dict[str, int], int]:
    """Dense operations and calls of operators in a step of teacher and student; matched layers."""
    from cdfast import VisualAttentionAligner
    from cdfast.attention import AlignmentContext
    from tests.cdfast.tiny_models import tiny_batch, tiny_llava, tiny_teacher

    teacher, student = tiny_teacher(), tiny_llava()
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    batch = tiny_batch()
    inputs = {**batch, "use_cache": False}
    with FlopCounterMode(display=False) as flops, CalledOperators() as operators:
        if aligned:
            with torch.no_grad():
                _, targets = aligner.teacher_forward(**batch)
            out, alignment = aligner.student_forward(targets, **batch)
            loss = out.loss + alignment.loss
        else:
            layout = aligner.layout(batch)
            with torch.no_grad():
                teacher(**inputs, alignment=AlignmentContext(layout))
            loss = student(**inputs, alignment=AlignmentContext(layout)).loss
        loss.backward()
    return flops.get_total_flops(), dict(operators.calls), len(aligner.matches)


@on_cpu
def test_alignment_adds_no_dense_product_to_a_training_step():
    """It lives in the attention operators: one call per matched layer in place of plain attention,
    and one map per teacher layer in a window. FlopCounterMode sees all that is outside of them."""
    plain, plain_calls, _ = counted_step(aligned=False)
    flops, calls, matched = counted_step(aligned=True)
    # Without alignment attention is PyTorch's, which it may count as well.
    assert 0 < flops <= plain
    assert plain_calls == {}
    assert matched == 3  # all layers of the tiny student, whose windows take all of the teacher's 4
    assert calls == {
        "attention": 4,
        "visual_map": 4,
        "attention_with_alignment": matched,
        "attention_backward": matched,
    }


# Bytes


def problem_of(tokens: int, visual: int, heads: int, head_dim: int, backend: str) -> Problem:
    return Problem(Case(tokens, visual, 1, heads, heads, head_dim, "fp32"), "cpu", backend)


@on_cpu
@pytest.mark.parametrize("layout_packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(dtype, layout_packed):
    """q, k, v, lse and G, which is float32 on the `cpu` backend; and the tables of the layout."""
    layout = image_layout(200, 120, batch=2, packed=layout_packed)
    g = torch.Generator().manual_seed(0)
    shapes = [(*layout.shape, heads, 32) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes)
    _, lse = flash_attention(q, k, v, layout=layout, backend="cpu")
    target = visual_attention_map(q, k, lse.detach(), layout, backend="cpu")
    size, tokens = dtype.itemsize, 400
    tables = layout.schedule.tensors().values()
    expected = tokens * 32 * (4 + 2 + 2) * size + 4 * tokens * 4
    expected += sum(x.nbytes for x in tables) + layout.slot_tiles.nbytes
    plain = memory.saved_bytes(lambda: flash_attention(q, k, v, layout=layout, backend="cpu"))
    assert plain == expected
    aligned = memory.saved_bytes(
        lambda: flash_attention_with_alignment(q, k, v, target, layout, backend="cpu")
    )
    assert aligned == expected + layout.map_rows * 64 * 4


def largest_allocation(run) -> int:
    """Bytes of the largest tensor that is allocated anywhere in run(), in operators too."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@on_cpu
def test_no_map_of_a_head_is_allocated():
    """The largest tensor of forward and backward is G: no (N, N) or (N, V), of a head or a mean."""
    tokens, visual = 1024, 729
    problem = problem_of(tokens, visual, 4, 16, "cpu")
    runs = variants(problem)
    largest = {
        name: largest_allocation(lambda name=name: whole(problem, runs[name]))
        for name in ("plain[cpu]", "student[cpu]")
    }
    assert largest["plain[cpu]"] == problem.q.nbytes
    assert largest["student[cpu]"] == problem.layout.map_rows * 64 * 4
    assert largest["student[cpu]"] < 0.7 * 4 * tokens * visual  # the causal part of one mean map
    # The probe sees maps where there are some.
    problem.prepare_eager()
    assert largest_allocation(lambda: whole(problem, runs["eager"])) >= 4 * 4 * tokens**2


def peak_of(variant: str, tokens: int, visual: int) -> int | None:
    """In a process of its own; what a small problem allocates once is there before."""

    def run_of(n: int, v: int):
        problem = problem_of(n, v, 8, 64, "cpu")
        if variant == "eager":
            problem.prepare_eager()
        run = variants(problem)[variant]
        return lambda: whole(problem, run)

    run_of(128, 64)()
    return memory.peak_bytes(run_of(tokens, visual), "cpu")


@on_cpu
@pytest.mark.skipif(not memory.STATUS.exists(), reason="resident size: needs /proc, as on Linux")
def test_peak_memory_beside_eager():
    """What alignment adds to attention: measured 7.5 MiB, 1.6% of the 480 that eager adds."""
    names = ("plain[cpu]", "student[cpu]", "eager")
    plain, student, eager = (memory.in_child(peak_of, name, 2048, 1458) for name in names)
    assert eager - plain > 8 * 4 * 2048**2  # at least one map per head: the probe sees them
    assert student - plain <= 0.2 * (eager - plain)


# Ratios


# One forward and backward over another, in CPU time: (least, most, measured on a busy machine).
# By the clock, idle: 1.05 and 3.4. A map per head in the student would cost about what eager does.
RATIOS = {
    ("student[cpu]", "plain[cpu]"): (0.0, 2.5, 1.10),
    ("eager", "student[cpu]"): (1.5, float("inf"), 4.2),
}


def median_ratios(runs) -> dict[tuple[str, str], float]:
    """Medians of ratios inside a round: a pause of the machine spoils one round, not a median."""
    rounds: list[dict[str, float]] = []
    for _ in range(5):
        seconds = {}
        for name, run in runs.items():
            begin = time.process_time()  # not the time that others take the core
            run()
            seconds[name] = time.process_time() - begin
        rounds.append(seconds)
    return {(a, b): statistics.median(found[a] / found[b] for found in rounds) for a, b in RATIOS}


@on_cpu
def test_ratios_of_times():
    problem = problem_of(1024, 729, 8, 64, "cpu")
    problem.prepare_eager()
    functions = variants(problem)
    names = {name for pair in RATIOS for name in pair}
    runs = {n: (lambda run=functions[n]: whole(problem, run)) for n in sorted(names)}
    for run in runs.values():
        run()
    for attempt in range(2):
        ratios = median_ratios(runs)
        wrong = {
            pair: f"{ratios[pair]:.2f}, expected {least} to {most}, measured {measured}"
            for pair, (least, most, measured) in RATIOS.items()
            if not least <= ratios[pair] <= most
        }
        if not wrong:
            return
        print(f"attempt {attempt}: {wrong}")
    pytest.fail(f"ratios of times: {wrong}")
