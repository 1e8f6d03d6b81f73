"""One step of text-only distillation, TRL beside cdfast: python -m benchmarks.bench_text_step

    cdfast                     DistillationTrainer: kl_weight 1, lm_weight and alignment_weight 0
    TRL GKDTrainer             lmbda=0, beta=0: what TRL has for given answers (experimental)
    TRL DistillationTrainer,   beta=0: TRL's stable trainer and its chunked loss; it only trains on
      given answers            answers of the student, so this one is handed the dataset's instead

All minimise the same loss on the same batches: see text_trainers.py. Before anything is timed, two
steps of each in float32 are compared with the same steps written out without a trainer: losses,
gradients and updates. One that differs is named and not timed. Then all take turns in every round,
each in a process of its own, and train a few steps; a step lasts from the end of one optimizer step
to that of the next. Results are written after every round: stop it at any time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.logits_report import compared
from benchmarks.memory import in_child
from benchmarks.result_files import (
    NOT_MEASURED,
    RESULTS,
    described,
    headline,
    number,
    result_path,
    start,
    table,
    write_json,
)
from benchmarks.text_runs import plain_run, run
from benchmarks.text_trainers import OURS, TRAINERS, absent
from benchmarks.variants import reason_of

# Relative; in float32. An update of AdamW's first step is about the sign of the gradient, which a
# rounding turns where the gradient is nearly zero.
TOLERANCE = {"losses": 1e-4, "gradients": 1e-3, "updates": 1e-2}
SIZES = {
    "cpu": (16384, 256, 4, 384, 6, 256, 128, 2),
    "quick": (2048, 128, 2, 192, 3, 128, 64, 2),
    "cuda": (151936, 1024, 12, 2048, 16, 2048, 1024, 4),
}
SIZE_NAMES = ("vocabulary", "width", "layers", "teacher_width", "teacher_layers")
SIZE_NAMES += ("tokens", "answer", "batch")


def difference(got: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of losses, and of gradients and updates in norm."""
    losses = (abs(a - b) / abs(b) for a, b in zip(got["losses"], plain["losses"]))
    found = {"losses": max(losses)}
    for name in ("gradients", "updates"):
        ours, theirs = got[name], plain[name]
        if set(ours) != set(theirs):
            odd = sorted(set(ours) ^ set(theirs))
            raise ValueError(f"{name}: expected those of the same parameters; only one has {odd}.")
        apart = sum(float(np.square(ours[n] - theirs[n]).sum()) for n in theirs)
        found[name] = (apart / sum(float(np.square(x).sum()) for x in theirs.values())) ** 0.5
    return found


def child(name: str, options: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """What a trainer's run found, or why it did not end."""
    try:
        return in_child(run, name, options, threads=options.threads), None
    except Exception as error:
        return None, reason_of(error)


def check(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Trainer -> its differences from the plain steps, and why it is not timed, if it is not."""
    small = argparse.Namespace(**{**vars(options), "dtype": "fp32", "steps": 0})
    plain = in_child(plain_run, small, threads=options.threads)
    found: dict[str, dict[str, Any]] = {}
    for name in TRAINERS:
        reason, row = absent(name), {}
        if reason is None:
            got, reason = child(name, small)
            if got is not None:
                row = {"losses": got["losses"], "differences": difference(got, plain)}
                wrong = {n: d for n, d in row["differences"].items() if not d <= TOLERANCE[n]}
                if wrong:
                    parts = [f"{n} by {d:.1e}" for n, d in wrong.items()]
                    reason = f"differs from the plain step: {', '.join(parts)}"
        found[name] = {**row, "absent": reason} if reason else row
        print(f"check: {name}: {reason or 'agrees'}", file=sys.stderr, flush=True)
    found["plain step"] = {"losses": plain["losses"]}
    return found


def row_of(runs: list[dict[str, Any]], base: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians over rounds of one trainer's runs, and of their ratios to `base`, round by round."""
    seconds = [statistics.median(r["seconds"]) for r in runs]
    own = [statistics.median(r["seconds"]) for r in base]
    median = statistics.median(seconds)
    peaks = [r["peak_bytes"] for r in runs if r["peak_bytes"] is not None]
    base_peaks = [r["peak_bytes"] for r in base if r["peak_bytes"] is not None]
    peak = statistics.median(peaks) if peaks else None
    return {
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / 2 / median,
        "rounds": len(runs),
        "tokens_per_second": tokens / median,
        "peak_bytes": peak,
        "cdfast_seconds_over": statistics.median(a / b for a, b in zip(own, seconds))
        if own
        else None,
        "cdfast_peak_over": statistics.median(base_peaks) / peak if peak and base_peaks else None,
    }


def measure(options: argparse.Namespace, report: dict[str, Any], write: Any, until: float) -> None:
    """Rounds of runs, all trainers in turn; writes after each."""
    runs: dict[str, list[dict[str, Any]]] = {
        name: [] for name in TRAINERS if "absent" not in report["checked"][name]
    }
    for index in range(options.rounds):
        if index and time.monotonic() > until:
            break
        for name in list(runs):
            got, reason = child(name, options)
            if got is None:
                report["rows"][name] = {"absent": reason}
                del runs[name]
                continue
            runs[name].append(got)
            seconds = statistics.median(got["seconds"])
            print(f"round {index + 1}: {name}: {seconds:.3f} s", file=sys.stderr, flush=True)
        tokens = options.batch * options.tokens
        for name, values in runs.items():
            report["rows"][name] = row_of(values, runs.get(OURS, []), tokens)
        write()


def headlines(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    others = [name for name in TRAINERS if name != OURS]
    return {
        f"cdfast {what} of a step over {name}": headline(rows.get(name, {}).get(key), "x", "less")
        for name in others
        for what, key in (("time", "cdfast_seconds_over"), ("peak memory", "cdfast_peak_over"))
    }


def markdown(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    parts = [
        "# One step of text-only distillation: cdfast beside TRL",
        described(report),
        f"Student: {sizes['layers']} layers of width {sizes['width']}; teacher: "
        f"{sizes['teacher_layers']} of {sizes['teacher_width']}; vocabulary {sizes['vocabulary']}, "
        f"random weights. {sizes['batch']} samples of {sizes['tokens']} tokens, {sizes['answer']} "
        f"of them the answer. {report['dtype']}, AdamW, no gradient checkpointing. Loss: forward "
        "KL on answer tokens, no LM loss (TRL's trainers have none).",
        "`cdfast` runs the same language models inside LLaVA models, without an image. It computes "
        "the LM loss, to log it, and multiplies it by 0. GKDTrainer makes logits of all tokens. "
        "TRL's DistillationTrainer would generate the answers; it is handed them here, so its time "
        "has no generation in it.",
        rows_table(report),
    ]
    sentences = []
    for name, row in report["rows"].items():
        if name != OURS and row.get("cdfast_seconds_over") is not None:
            seconds = compared(row["cdfast_seconds_over"], "faster", "**slower**")
            peak = compared(row["cdfast_peak_over"], "less", "**more**")
            sentences.append(f"- `cdfast` takes {seconds} the time of {name} and {peak} its memory")
    if sentences:
        note = "Ratios are medians of those inside a round, in which all take turns."
        parts.append("\n".join(sentences) + f"\n\n{note}")
    parts += ["## Agreement with the step written out without a trainer", checked_table(report)]
    return "\n\n".join(parts) + "\n"


def rows_table(report: dict[str, Any]) -> str:
    rows = []
    for name in TRAINERS:
        row = report["rows"].get(name) or {"absent": NOT_MEASURED}
        if "absent" in row:
            rows.append([name, f"absent: {row['absent']}".replace("|", "/"), "", "", ""])
            continue
        peak = row["peak_bytes"]
        cells = [name, number(row["seconds"], 3), f"{100 * row['spread']:.0f}%"]
        cells.append(number(row["tokens_per_second"], 0))
        rows.append([*cells, number(None if peak is None else peak / 2**20, 0)])
    return table(["trainer", "s/step", "spread", "tokens/s", "peak of a step, MiB"], rows)


def checked_table(report: dict[str, Any]) -> str:
    rows = []
    for name, row in report["checked"].items():
        found = row.get("differences")
        losses = ", ".join(f"{x:.6f}" for x in row.get("losses", []))
        cells = [f"{found[n]:.1e}" for n in TOLERANCE] if found else [""] * len(TOLERANCE)
        rows.append([name, losses or f"absent: {row['absent']}".replace("|", "/"), *cells])
    header = ["trainer", "losses", *(f"{n} off by (at most {t})" for n, t in TOLERANCE.items())]
    return table(header, rows)


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory of a step, a bar per trainer, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {n: row for n, row in report["rows"].items() if "absent" not in row}
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained", sharey=True)
    labels = [name.replace(", ", "\n") for name in rows]
    axes[0].barh(labels, [row["seconds"] for row in rows.values()])
    axes[1].barh(labels, [(row["peak_bytes"] or 0) / 2**20 for row in rows.values()])
    axes[0].set(xlabel="seconds per step")
    axes[1].set(xlabel="peak of a step, MiB")
    axes[0].invert_yaxis()
    figure.suptitle(f"Text-only distillation; {report['environment']['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_text_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small models, two rounds")
    parser.add_argument("--budget-minutes", type=float, default=8.0, help="no round begins later")
    parser.add_argument("--rounds", type=int, help="3, --quick 2")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a run")
    for name in SIZE_NAMES:
        text = f"default: {', '.join(f'{k} {v[SIZE_NAMES.index(name)]}' for k, v in SIZES.items())}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error(
            f"--device: expected cpu, because torch finds no CUDA device; got {options.device!r}."
        )
    defaults = SIZES["quick" if options.quick else "cuda" if cuda else "cpu"]
    for name, value in zip(SIZE_NAMES, defaults):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 1 <= options.answer < options.tokens:
        parser.error(
            f"--answer: expected 1 to {options.tokens - 1} of {options.tokens} tokens, so that "
            f"there is a prompt; got {options.answer}."
        )
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1; got {options.steps}.")
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.dtype = "bf16" if cuda else "fp32"
    options.threads = torch.get_num_threads()
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    begin = time.monotonic()
    path = result_path("text_step", options.device, options.output)
    arguments = sys.argv[1:] if argv is None else argv
    report: dict[str, Any] = {
        **start("text_step", options.device, "benchmarks.bench_text_step", arguments),
        "dtype": options.dtype,
        "sizes": {name: getattr(options, name) for name in SIZE_NAMES},
        "steps": options.steps,
        "checked": check(options),
        "rows": {},
    }
    report["rows"] = {
        name: {"absent": row["absent"]}
        for name, row in report["checked"].items()
        if "absent" in row
    }

    def write() -> None:
        report["headline"] = headlines(report["rows"])
        report["seconds"] = round(time.monotonic() - begin, 1)
        write_json(path, report)
        path.with_suffix(".md").write_text(markdown(report))
        try:
            plot(report, path.with_suffix(".png"))
        except ImportError:
            print("no plot: matplotlib is not installed")

    write()
    measure(options, report, write, begin + 60 * options.budget_minutes)
    write()
    print(path.with_suffix(".md").read_text())
    print(f"written: {path}, .md and .png")
    return 1 if any("differences" in r and "absent" in r for r in report["checked"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
