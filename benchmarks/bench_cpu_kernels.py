"""Time and memory of the CPU backend: python benchmarks/bench_cpu_kernels.py [--write]

Forward + backward of one attention layer, float32, B = 1. Variants, in turn in every round:

    sdpa       PyTorch's flash attention for CPUs alone, no alignment
    attention  cdfast flash_attention on `cpu`, no alignment
    aligned    cdfast flash_attention_with_alignment on `cpu`, objective `row`
    eager      the same loss the way the paper's authors compute it: every map materialised

Loss and gradients of `aligned` and `eager` are compared before anything is timed. Times are medians
over rounds, ratios medians of the ratios within a round. Memory is the largest resident size during
one forward + backward over that before it, in a process of its own, less out and gradients, which
every variant has to return. The host scheduler is timed as well.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cdfast_kernels import (
    VisualLayout,
    flash_attention,
    flash_attention_with_alignment,
    native,
    visual_attention_map,
)

RESULTS = Path(__file__).resolve().parent / "results"
NAME = f"attention_cpu_{datetime.date.today():%Y%m}"
VARIANTS = ("sdpa", "attention", "aligned", "eager")
# tokens, visual tokens, query heads, key heads, head size
CASES = (
    (1024, 729, 16, 16, 128),
    (2048, 1458, 16, 16, 128),
    (1024, 729, 16, 16, 64),
    (1024, 729, 16, 4, 128),
)


def make(case, seed=0):
    """q, k, v, dO, a target map and the layout."""
    tokens, n_visual, heads, kv_heads, dim = case
    generator = torch.Generator().manual_seed(seed)

    def draw(h):
        return torch.randn(1, tokens, h, dim, generator=generator)

    visual = torch.zeros(1, tokens, dtype=torch.bool)
    visual[:, 20 : 20 + n_visual] = True
    layout = VisualLayout.from_mask(visual)
    teacher = draw(heads), draw(kv_heads), draw(kv_heads)
    lse = flash_attention(*teacher, layout=layout)[1]
    target = visual_attention_map(*teacher[:2], lse, layout)
    inputs = [draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    return inputs, draw(heads), target, layout


def eager(q, k, v, target, layout):
    """out and loss from materialised maps, independent of cdfast_kernels."""
    heads, dim = q.shape[-2:]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * dim**-0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    visual = layout.visual[0].nonzero().flatten()
    first = int(visual[0])
    # The first row with a visual key sees one only: it counts, with loss 0.
    student = probs.mean(1)[:, first + 1 :, visual]
    loss = (1 - F.cosine_similarity(student, target, dim=-1)).sum() / (probs.shape[-1] - first)
    return (probs @ v).transpose(1, 2), loss


def variants(case):
    """Name -> a function that runs one forward + backward and returns (loss, gradients)."""
    (q, k, v), d_out, target, layout = make(case)
    visual = layout.visual[0].nonzero().flatten()
    dense = target.to_dense()[:, int(visual[0]) + 1 :, visual]
    one = torch.ones(())

    def sdpa():
        x = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            *x, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        )
        return None, torch.autograd.grad(out, (q, k, v), d_out.transpose(1, 2))

    def attention():
        out, _ = flash_attention(q, k, v, layout=layout, backend="cpu")
        return None, torch.autograd.grad(out, (q, k, v), d_out)

    def aligned():
        out, loss = flash_attention_with_alignment(q, k, v, target, layout, backend="cpu")
        return loss, torch.autograd.grad((out, loss), (q, k, v), (d_out, one))

    def materialised():
        out, loss = eager(q, k, v, dense, layout)
        return loss, torch.autograd.grad((out, loss), (q, k, v), (d_out, one))

    return dict(zip(VARIANTS, (sdpa, attention, aligned, materialised)))


def check(runs):
    (loss, grads), (want_loss, want_grads) = runs["aligned"](), runs["eager"]()
    torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-7)
    for got, want in zip(grads, want_grads):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for got, want in zip(runs["attention"]()[1], runs["sdpa"]()[1]):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def timed(runs, rounds):
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def status(field):
    """Bytes of a field of this process's status, such as VmRSS (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(x for x in lines if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(case, variant):
    """In this process: the largest resident size of one run over that before it."""
    tokens, *_ = case
    small = (min(128, tokens), 64, *case[2:])
    variants(small)[variant]()  # loads libraries and starts threads
    run = variants(case)[variant]
    gc.collect()
    # What was freed must not be counted as there already.
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    result = run()
    peak = status("VmHWM") - before
    del result
    return peak


def memory_of(case, variant, threads):
    arguments = ["--peak", variant, "--case", json.dumps(case), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def schedule_times():
    """Median milliseconds of whole VisualLayouts from host tensors, and of the Python builder."""
    images = torch.zeros(1, 16384, dtype=torch.bool)
    for i in range(8):
        images[0, 2000 * i + 30 : 2000 * i + 1500] = True
    batch = torch.zeros(16, 1024, dtype=torch.bool)
    batch[:, 20:749] = True
    right = torch.arange(1024).expand(16, 1024) < 1000
    turns = (torch.arange(1024) > 800).long().expand(16, 1024).contiguous()
    every = {n: torch.arange(0, 16385, n, dtype=torch.int32) for n in (1024, 2048, 16384)}
    builds = {
        "from_mask, 16 x 1024": lambda: VisualLayout.from_mask(batch),
        "from_mask, 16 x 1024, padded": lambda: VisualLayout.from_mask(batch, right),
        "from_segments, 16 x 1024, padded": lambda: VisualLayout.from_segments(turns, batch, right),
        "from_packed, 16 sequences of 1024": lambda: VisualLayout.from_packed(
            every[1024], batch.flatten()
        ),
        "from_mask, 1 x 16384, 8 images": lambda: VisualLayout.from_mask(images),
        "from_packed, 1 x 16384, 8 images": lambda: VisualLayout.from_packed(
            every[16384], images[0]
        ),
        "from_packed, 8 sequences of 2048": lambda: VisualLayout.from_packed(
            every[2048], images[0]
        ),
    }

    def median_ms(build, repeats):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            build()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    rows = []
    extension = native.EXTENSION
    for name, build in builds.items():
        native.EXTENSION = extension
        fast = median_ms(build, 200)
        native.EXTENSION = None
        slow = median_ms(build, 20)
        rows.append({"layout": name, "ms": fast, "python_ms": slow})
    native.EXTENSION = extension
    return rows


def measure(options):
    rows = []
    for case in CASES:
        runs = variants(case)
        check(runs)
        seconds = timed(runs, options.rounds)
        del runs
        outputs = output_bytes(case)
        peaks = {name: memory_of(case, name, options.threads) for name in VARIANTS}
        for name in VARIANTS:
            ratios = {
                base: statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))
                for base in ("sdpa", "eager")
            }
            rows.append(
                {
                    **dict(zip(("tokens", "visual", "heads", "kv_heads", "head_dim"), case)),
                    "variant": name,
                    "seconds": statistics.median(seconds[name]),
                    "seconds_of_rounds": seconds[name],
                    "over_sdpa": ratios["sdpa"],
                    "over_eager": ratios["eager"],
                    "peak_bytes": peaks[name],
                    "outputs_bytes": outputs,
                    "extra_bytes": peaks[name] - outputs,
                    "extra_over_eager": (peaks[name] - outputs) / (peaks["eager"] - outputs),
                }
            )
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "seconds_of_rounds"}))
    return rows


def output_bytes(case):
    """out, dq, dk and dv, which every variant returns."""
    tokens, _, heads, kv_heads, dim = case
    return 4 * tokens * dim * (2 * heads + 2 * kv_heads)


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def markdown(report):
    lines = [
        "# The CPU backend",
        "",
        f"`{report['command']}`: {report['device']}, {report['threads']} threads, instruction set "
        f"`{report['isa']}`, torch {report['torch']}, Python {report['python']}. {report['note']}",
        "",
        "Forward + backward of one layer, B = 1, float32. `sdpa` is PyTorch's flash attention "
        "alone; `eager` computes the same loss from materialised maps. Extra memory: the peak over "
        "what was there before, less out and gradients.",
        "",
        "| tokens, visual | heads, key heads, d | variant | ms | over sdpa | eager over it "
        "| out + gradients, MiB | extra, MiB | of eager's extra |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['tokens']}, {r['visual']} | {r['heads']}, {r['kv_heads']}, {r['head_dim']} "
            f"| {r['variant']} | {1e3 * r['seconds']:.0f} | {r['over_sdpa']:.2f} "
            f"| {1 / r['over_eager']:.2f} | {r['outputs_bytes'] / 2**20:.0f} "
            f"| {r['extra_bytes'] / 2**20:.0f} | {100 * r['extra_over_eager']:.1f}% |"
        )
    lines += [
        "",
        "A whole `VisualLayout` from host tensors (median):",
        "",
        "| layout | ms | Python builder, ms |",
        "|---|---|---|",
        *(f"| {r['layout']} | {r['ms']:.3f} | {r['python_ms']:.2f} |" for r in report["scheduler"]),
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine did, for the report")
    parser.add_argument("--write", action="store_true", help=f"write results/{NAME}.md and .json")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_memory(tuple(options.case), options.peak))
        return
    load = os.getloadavg()[0]
    note = f"Load average {load:.1f} at the start. {options.note}".strip()
    report = {
        "command": " ".join(["python benchmarks/bench_cpu_kernels.py", *sys.argv[1:]]),
        "device": processor(),
        "threads": options.threads,
        "isa": native.EXTENSION.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "note": note,
        "rounds": options.rounds,
        "scheduler": schedule_times(),
        "rows": measure(options),
    }
    text = markdown(report)
    print(text)
    if options.write:
        (RESULTS / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"{NAME}.md").write_text(text)


if __name__ == "__main__":
    main()
