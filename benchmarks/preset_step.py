"""The DFT step at the paper's sizes: python -m benchmarks.bench_train_step --preset paper

Teacher, student with fetched adapter and LoRA, and the shared vision tower of the recipe
compodistill-2b, with random weights; a step is the teacher's forward, the student's forward and
backward, and AdamW. Three variants of it, in turn in every round, in one process:

    kd      LM + KL, no alignment
    dft     LM + KL + alignment, the backend of cdfast_kernels given with --backend
    eager   the same losses the way the paper's authors train: eager attention in both models, every
            layer's attention map materialised, logits of all tokens

All three share the tower's features, the LoRA adapters (in the compute dtype) and gradient
checkpointing, so that they differ in attention and losses only. The losses of `dft` and `eager` are
compared before anything is timed. With --max-micro-batch the largest batch of each variant is
looked for by doubling and bisection, and its samples per second measured. Results are written as
they come. `--preset tiny` runs all of it on a CPU, at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_train_step import VARIANTS, eager_losses
from benchmarks.memory import out_of_memory
from benchmarks.result_files import RESULTS, headline, result_path, start, write_json

# What is aimed at, on a GPU; results stand in a column of their own.
GOALS = {
    "step time, with alignment over without": "<= 1.02",
    "samples/s, dft over eager, same batch": ">= 5",
    "samples/s, dft over eager, each at its largest batch": ">= 5",
    "largest micro-batch, dft over eager": ">= 8",
}
TINY = {
    "vision": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    },
    **{
        role: {
            "model_type": "qwen2",
            "vocab_size": 128,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        }
        for role, width, layers in (("teacher", 64, 6), ("student", 32, 4))
    },
}
SYSTEM_TOKENS, QUESTION_TOKENS = 31, 40


class Pair:
    """Teacher and student of the recipe's DFT stage with random weights, and steps of them."""

    def __init__(self, options: argparse.Namespace):
        from transformers import AutoModelForImageTextToText

        from cdfast.adapters import set_trainable, share_vision_tower, vision_tower
        from cdfast.aligner import VisualAttentionAligner
        from cdfast.config import load_recipe, override
        from cdfast.dry_run import model_configs
        from cdfast.flops import step_flops
        from cdfast.stages.student import with_lora

        recipe = load_recipe("compodistill-2b")
        if options.preset == "tiny":
            recipe = override(recipe, {"lora_r": 4})
            recipe.architecture = getattr(options, "architecture", TINY)
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        teacher_config, student_config = model_configs(recipe)
        torch.manual_seed(0)
        with self.device:
            load = AutoModelForImageTextToText.from_config
            self.teacher = load(teacher_config, dtype=self.dtype).requires_grad_(False).eval()
            self.student = load(student_config, dtype=self.dtype)
        theirs, ours = (vision_tower(m)[2] for m in (self.teacher, self.student))
        ours.load_state_dict(theirs.state_dict())
        share_vision_tower(self.teacher, self.student)
        set_trainable(self.student, projector=True, language_model=False)
        with_lora(self.student, recipe).to(self.dtype)  # adapters are put into the student
        self.student.train()
        if options.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.aligner = VisualAttentionAligner(self.teacher, self.student, backend=options.backend)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-6, fused=self.device.type == "cuda")
        self.flops = step_flops(self.student, self.teacher)
        self.visual = student_config.image_seq_length
        self.vocabulary = student_config.text_config.vocab_size
        self.side = student_config.vision_config.image_size

    def batch(self, size: int, length: int) -> dict[str, Any]:
        from cdfast.aligner import build_layout

        if length < SYSTEM_TOKENS + self.visual + QUESTION_TOKENS + 2:
            sys.exit(
                f"--length: expected room for {self.visual} visual tokens, at least "
                f"{SYSTEM_TOKENS + self.visual + QUESTION_TOKENS + 2}; got {length}."
            )
        generator = torch.Generator().manual_seed(size)
        image_token = self.aligner.image_token_id
        ids = torch.randint(3, self.vocabulary - 1, (size, length), generator=generator)
        ids[:, SYSTEM_TOKENS : SYSTEM_TOKENS + self.visual] = image_token
        labels = ids.clone()
        labels[:, : SYSTEM_TOKENS + self.visual + QUESTION_TOKENS] = -100
        shape = (size, 3, self.side, self.side)
        pixels = torch.randn(shape, generator=generator).to(self.dtype)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "pixel_values": pixels,
        }
        layout = build_layout(batch, image_token).to(self.device)
        return {k: v.to(self.device) for k, v in batch.items()} | {"layout": layout}

    def use(self, variant: str) -> None:
        """Switch both text models to the attention of a variant."""
        from cdfast.attention import use_cdfast_attention

        for model in (self.teacher, self.student):
            if variant == "eager":
                model.set_attn_implementation({"text_config": "eager"})
            else:
                use_cdfast_attention(model)

    def losses(self, variant: str, batch: dict[str, Any]) -> list[torch.Tensor]:
        from cdfast.distill import LossOptions, StudentTask, TeacherTask, student_step, teacher_step

        # A tensor of its own, as every batch has: the tower's features are kept for the same one.
        batch = {**batch, "pixel_values": batch["pixel_values"].clone()}
        if variant == "eager":
            plain = {k: v for k, v in batch.items() if k != "layout"}
            token = self.aligner.image_token_id
            return list(
                eager_losses(self.teacher, self.student, plain, self.aligner.matches, token)
            )
        aligner = self.aligner if variant == "dft" else None
        labels, layout = batch["labels"], batch["layout"]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "layout")}
        kl = LossOptions(frozenset({"kl"}))
        out = teacher_step(self.teacher, inputs, TeacherTask(labels, layout, aligner, kl))
        sums = student_step(self.student, inputs, StudentTask(labels, layout, out, aligner, kl))
        rows = (batch["labels"][:, 1:] != -100).sum()
        found = [sums["lm"] / rows, sums["kl"] / rows]
        return [*found, sums["alignment"] / len(batch["labels"])] if aligner else found

    def step(self, variant: str, batch: dict[str, Any]) -> list[torch.Tensor]:
        self.use(variant)
        losses = self.losses(variant, batch)
        torch.stack([loss.float() for loss in losses]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def operations(self, batch: dict[str, Any]) -> float:
        """Model FLOPs of a step on a batch: see cdfast/flops.py."""
        from cdfast.flops import COUNTS, patch_size, step_counts

        rows = (batch["labels"][:, 1:] != -100).sum()
        counts = step_counts(batch, rows, rows, patch_size(self.student)).tolist()
        return sum(self.flops[name] * n for name, n in zip(COUNTS, counts))

    def free(self) -> None:
        """Give back what a step, finished or not, has left."""
        self.optimizer.zero_grad()
        tower = self.student.model.vision_tower
        tower._input = tower._output = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def attempt(pair: Pair, run: Callable[[], Any]) -> Any:
    """The result of run(); None if memory did not suffice."""
    try:
        return run()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    finally:
        pair.free()
    return None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Largest n <= most with fits(n), by doubling, then bisection; 0 if 1 does not fit."""
    good, bad = 0, None
    n = 1
    while bad is None and good < most:
        if fits(n):
            good, n = n, min(2 * n, most)
        else:
            bad = n
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def seconds_of(pair: Pair, run: Callable[[], Any]) -> float:
    if pair.device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_of(pair: Pair, run: Callable[[], Any]) -> int | None:
    """Largest number of bytes allocated during run(), models included; None on a CPU."""
    if pair.device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def compare(pair: Pair, batch: dict[str, Any]) -> dict[str, Any]:
    """Losses of `dft` and `eager` on one batch, and whether they agree."""
    found: dict[str, Any] = {}
    for variant in ("dft", "eager"):
        pair.use(variant)
        run = lambda v=variant: [x.item() for x in pair.losses(v, batch)]  # noqa: E731
        found[variant] = attempt(pair, run)
    # bfloat16 maps and logits are rounded differently by the two ways, float32 ones hardly.
    tolerance = 0.05 if pair.dtype == torch.bfloat16 else 1e-4
    both = found["dft"] and found["eager"]
    agree = bool(both) and all(
        abs(a - b) <= tolerance * abs(b) for a, b in zip(found["dft"], found["eager"])
    )
    return {**found, "tolerance": tolerance, "agree": agree}


def speed(pair: Pair, batch: dict[str, Any], times: list[float]) -> dict[str, Any]:
    from cdfast.flops import device_peak

    seconds = statistics.median(times)
    size, length = batch["input_ids"].shape
    peak, of = device_peak(pair.device, pair.dtype)
    return {
        "seconds": seconds,
        "rounds": len(times),
        "samples_per_second": size / seconds,
        "tokens_per_second": size * length / seconds,
        "mfu": pair.operations(batch) / seconds / peak,
        "mfu_of": of,
    }


def time_steps(pair: Pair, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Variant -> speed and peak memory at the given batch, all variants in turn in every round."""
    batch = pair.batch(options.batch, options.length)
    rows: dict[str, Any] = {}
    for variant in VARIANTS:  # the first step compiles kernels; its memory is what a step takes
        pair.free()
        attempt(pair, lambda v=variant: pair.step(v, batch))
        peak = attempt(pair, lambda v=variant: (peak_of(pair, lambda: pair.step(v, batch)),))
        rows[variant] = {"peak_bytes": peak[0]} if peak else {"absent": "out of memory"}
    running = [v for v in VARIANTS if "absent" not in rows[v]]
    times: dict[str, list[float]] = {v: [] for v in running}
    for number in range(options.rounds):
        if number >= 3 and time.monotonic() > deadline:
            break
        for variant in running:
            times[variant].append(
                seconds_of(pair, lambda v=variant: pair.step(v, batch))  # type: ignore[misc]
            )
    for variant in running:
        rows[variant] |= speed(pair, batch, times[variant])
        base = times.get("kd")
        if base:
            ratios = [t / b for t, b in zip(times[variant], base)]
            rows[variant]["seconds_over_kd"] = statistics.median(ratios)
    return rows


def largest_batch(
    pair: Pair, variant: str, options: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    """Largest micro-batch of a variant, and its speed there."""
    late = False

    def fits(size: int) -> bool:
        nonlocal late
        late = late or time.monotonic() > deadline
        if late:
            return False
        batch = pair.batch(size, options.length)
        return attempt(pair, lambda: pair.step(variant, batch)) is not None

    found = largest(fits, options.most)
    row: dict[str, Any] = {"batch": found, "at_least": late or found == options.most}
    if found:
        batch = pair.batch(found, options.length)
        run = lambda: pair.step(variant, batch)  # noqa: E731
        times = attempt(pair, lambda: [seconds_of(pair, run) for _ in range(3)])
        row |= speed(pair, batch, times[1:]) if times else {}
    return row


def measured_goals(report: dict[str, Any]) -> dict[str, float | None]:
    """GOALS -> what was measured; None where it was not."""

    def ratio(part: str, field: str, over: str) -> float | None:
        rows = report.get(part, {})
        a, b = rows.get("dft", {}).get(field), rows.get(over, {}).get(field)
        return a / b if a and b else None

    found = [
        report.get("steps", {}).get("dft", {}).get("seconds_over_kd"),
        ratio("steps", "samples_per_second", "eager"),
        ratio("largest", "samples_per_second", "eager"),
        ratio("largest", "batch", "eager"),
    ]
    return dict(zip(GOALS, found))


def headlines(measured: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """The ratios that are aimed at, to follow over months."""
    return {
        what: headline(value, "x", "less" if GOALS[what].startswith("<") else "more")
        for what, value in measured.items()
    }


def markdown(report: dict[str, Any]) -> str:
    def cell(value: Any, digits: int = 3) -> str:
        return "not measured" if value is None else f"{value:,.{digits}f}"

    def gib(value: Any) -> str:
        return cell(None if value is None else value / 2**30, 2)

    options = report["options"]
    lines = [
        f"# DFT step, preset {options['preset']}, {report['environment']['device']}",
        "",
        f"{report['dtype']}, {options['length']} tokens, gradient checkpointing "
        f"{options['gradient_checkpointing']}; losses of dft and eager "
        + ("agree." if report["compared"]["agree"] else "**do not agree**: nothing was timed."),
        "",
    ]
    columns = ("seconds", "seconds_over_kd", "samples_per_second", "tokens_per_second", "mfu")
    if "steps" in report:
        head = "| variant | s/step | over kd | samples/s | tokens/s | MFU | peak GiB |"
        lines += [f"Batch {options['batch']}:", "", head, "|" + "---|" * 7]
        for name, row in report["steps"].items():
            cells = [row.get("absent")] if "absent" in row else [cell(row[c]) for c in columns]
            lines.append(f"| {name} | {' | '.join(cells)} | {gib(row.get('peak_bytes'))} |")
        lines.append("")
    if "largest" in report:
        lines += ["| variant | largest micro-batch | samples/s there | MFU |", "|---|---|---|---|"]
        for name, row in report["largest"].items():
            size = f"{'at least ' * row['at_least']}{row['batch']}"
            rate, mfu = cell(row.get("samples_per_second")), cell(row.get("mfu"))
            lines.append(f"| {name} | {size} | {rate} | {mfu} |")
        lines.append("")
    lines += ["| what | goal | measured |", "|---|---|---|"]
    on_gpu = options["preset"] == "paper"
    for what, value in report["measured"].items():
        goal = f"goal {GOALS[what]}" if on_gpu else "goal: at the paper's sizes only"
        lines.append(f"| {what} | {goal} | {cell(value)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_train_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--preset", choices=("paper", "tiny"), required=True)
    parser.add_argument("--device", help="default: cuda for paper, cpu for tiny")
    parser.add_argument("--length", type=int, help="tokens per sample (2048; tiny: 96)")
    parser.add_argument("--batch", type=int, default=2, help="samples of a timed step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument("--max-micro-batch", action="store_true", help="look for the largest")
    parser.add_argument("--most", type=int, default=512, help="largest micro-batch that is tried")
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    paper = options.preset == "paper"
    options.device = options.device or ("cuda" if paper else "cpu")
    options.length = options.length or (2048 if paper else 96)
    options.gradient_checkpointing = not options.no_gradient_checkpointing
    if paper and not (options.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(
            "--preset paper: expected a CUDA device (models of 6.5 billion parameters in "
            f"bfloat16); got {options.device!r}, CUDA available: {torch.cuda.is_available()}. "
            "--preset tiny runs the same code on a CPU."
        )
    return options


def main(argv: list[str] | None = None) -> int:
    # Before the first allocation: fragments would end the search for the largest batch early.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    options = parse(argv)
    begin = time.monotonic()
    deadline = begin + 60 * options.budget_minutes
    pair = Pair(options)
    kept = ("preset", "length", "batch", "rounds", "backend", "gradient_checkpointing", "most")
    theme = f"train_step_{options.preset}"
    report: dict[str, Any] = {
        **start(theme, options.device, "benchmarks.bench_train_step", argv or sys.argv[1:]),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "options": {name: getattr(options, name) for name in kept},
        "goals": GOALS,
        "compared": compare(pair, pair.batch(1, options.length)),
    }
    path = result_path(theme, options.device, options.output)

    def write() -> None:
        report["measured"] = measured_goals(report)
        report["headline"] = headlines(report["measured"])
        report["minutes"] = round((time.monotonic() - begin) / 60, 2)
        write_json(path, report)
        path.with_suffix(".md").write_text(markdown(report))

    write()
    if report["compared"]["agree"]:
        # Half of the time for steps, the rest shared by the searches.
        until = begin + 30 * options.budget_minutes if options.max_micro_batch else deadline
        report["steps"] = time_steps(pair, options, until)
        write()
        if options.max_micro_batch:
            report["largest"] = {}
            for left, variant in zip((3, 2, 1), ("eager", "dft", "kd")):
                now = time.monotonic()
                until = now + (deadline - now) / left
                report["largest"][variant] = largest_batch(pair, variant, options, until)
                write()
    print(path.with_suffix(".md").read_text())
    print(f"written: {path} and .md")
    return 0 if report["compared"]["agree"] else 1
