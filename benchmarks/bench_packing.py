"""Tokens per second of the DFT step, padded and packed: python -m benchmarks.bench_packing

    padded            batches of `--batch` samples in random order
    padded, by length the same, of samples of about one length
    packed            rows of at most batch x longest sample tokens (cdfast/packing.py)

All go over the same samples once in a round, in turn: teacher, student with fetched adapter and
LoRA, alignment, AdamW. Tokens are those of samples, not padding. One sample in eight has no image;
texts are log-normal in length. Before anything is timed the sums of the losses over all samples are
compared. Results are written after every round: stop it at any time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.preset_step import TINY, Pair, peak_of, seconds_of
from benchmarks.result_files import (
    RESULTS,
    described,
    headline,
    number,
    result_path,
    start,
    table,
    write_json,
)


def decoder(role: str, width: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "vocab_size": 8192}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), width // 64)
    return {**TINY[role], **sizes, **heads, "num_hidden_layers": layers}


# 64 visual tokens. On a GPU the sizes are the paper's: 729, two billion parameters.
CPU = {
    "vision": {**TINY["vision"], "image_size": 112},
    "teacher": decoder("teacher", 384, 6),
    "student": decoder("student", 256, 4),
}
FORMS = ("padded", "padded, by length", "packed")
# Median length of a text in visual tokens, spread of its logarithm, longest text.
MEDIAN, SIGMA, LONGEST = 0.25, 0.8, 1.8


def make_samples(pair: Pair, count: int) -> list[dict[str, Any]]:
    """Encoded samples with random words and pixels, a question of a third of the text."""
    random = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    token, made = pair.aligner.image_token_id, []
    for index in range(count):
        text = pair.visual * min(MEDIAN * np.exp(SIGMA * random.standard_normal()), LONGEST)
        words = torch.randint(3, pair.vocabulary - 1, (max(6, int(text)),), generator=generator)
        images, head = {}, torch.tensor([1])
        if index % 8:
            head = torch.tensor([1, *[token] * pair.visual])
            pixels = torch.randn(1, 3, pair.side, pair.side, generator=generator)
            images = {"pixel_values": pixels.to(pair.dtype)}
        ids = torch.cat([head, words])
        labels = ids.clone()
        labels[: len(head) + len(words) // 3] = -100
        made.append({"input_ids": ids, "labels": labels, "images": images, "source": str(index)})
    return made


def make_batches(pair: Pair, samples: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """Form -> its batches of all samples, on the device."""
    from cdfast.collator import VisionTextCollator
    from cdfast.packing import PackedRows
    from cdfast.trainer import LayoutCollator

    lengths = [len(sample["input_ids"]) for sample in samples]
    order = np.random.default_rng(1).permutation(len(samples)).tolist()
    by_length = sorted(order, key=lambda n: lengths[n])
    collator = VisionTextCollator(0)
    chosen: dict[str, Any] = {
        form: (collator, [places[at : at + size] for at in range(0, len(places), size)])
        for form, places in zip(FORMS, (order, by_length))
    }
    chosen["packed"] = (collator.pack, list(PackedRows(lengths, size * max(lengths))))

    def batch(collate: Any, indices: list[int]) -> dict[str, Any]:
        made = LayoutCollator(collate, pair.aligner.image_token_id)([samples[n] for n in indices])
        kept = {n: v for n, v in made.items() if n not in ("sample_ids", "cu_seqlens")}
        return {name: value.to(pair.device) for name, value in kept.items()}

    return {form: [batch(how, i) for i in parts] for form, (how, parts) in chosen.items()}


def sums_of(pair: Pair, batches: list[dict[str, Any]]) -> list[float]:
    """LM, KL and alignment summed over all samples."""
    pair.use("dft")
    total = [0.0, 0.0, 0.0]
    for batch in batches:
        rows = int((batch["labels"][:, 1:] != -100).sum())
        counts = (rows, rows, len(batch["labels"]))
        with torch.no_grad():
            means = pair.losses("dft", batch)
        total = [t + m.item() * n for t, m, n in zip(total, means, counts)]
    return total


def steps(pair: Pair, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        pair.step("dft", batch)


def row_of(batches: list[dict[str, Any]], times: list[float], base: list[float]) -> dict[str, Any]:
    tokens = sum(int(batch["layout"].live.sum()) for batch in batches)
    places = sum(batch["input_ids"].numel() for batch in batches)
    ratios = [b / t for t, b in zip(times, base)]
    return {
        "batches": len(batches),
        "filled": tokens / places,
        "most_places": max(batch["input_ids"].numel() for batch in batches),
        "seconds": statistics.median(times) if times else None,
        "tokens_per_second": tokens / statistics.median(times) if times else None,
        "over_padded": statistics.median(ratios) if ratios else None,
    }


def markdown(report: dict[str, Any]) -> str:
    header = ["form", "batches", "places of the largest", "filled by tokens"]
    header += ["tokens/s", "over padded", "peak, GiB"]
    rows = []
    for form, row in report["rows"].items():
        peak = row["peak_bytes"] and row["peak_bytes"] / 2**30
        cells = [form, str(row["batches"]), str(row["most_places"]), f"{row['filled']:.1%}"]
        rows.append([*cells, number(row["tokens_per_second"], 0), number(row["over_padded"])])
        rows[-1].append(number(peak))
    sizes = report["sizes"]
    parts = [
        "# The DFT step, padded and packed",
        described(report),
        f"{sizes['samples']} samples of {sizes['shortest']} to {sizes['longest']} tokens, "
        f"{sizes['visual']} of them visual; padded batches of {sizes['batch']}, packed rows of at "
        f"most {sizes['batch']} x {sizes['longest']} tokens. {report['dtype']}. Ratios are medians "
        "of those inside a round.",
        table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8, help="samples of a padded batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-minutes", type=float, default=5.0, help="no round begins later")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    options.gradient_checkpointing = options.device.startswith("cuda")
    options.preset = "paper" if options.gradient_checkpointing else "tiny"
    options.architecture, options.backend = CPU, "auto"
    return options


def measure(pair: Pair, forms: dict[str, Any], options: argparse.Namespace) -> Iterator[dict]:
    """Form -> its row so far, after every round; in the first kernels are compiled."""
    begin = time.monotonic()
    times: dict[str, list[float]] = {form: [] for form in forms}
    peaks: dict[str, int | None] = {}
    for turn in range(options.rounds + 1):
        if turn > 1 and time.monotonic() - begin > 60 * options.budget_minutes:
            break
        for form, batches in forms.items():
            once = functools.partial(steps, pair, batches)
            if turn == 0:
                peaks[form] = peak_of(pair, once)
                continue
            times[form].append(seconds_of(pair, once))
            print(f"round {turn}: {form}: {times[form][-1]:.2f} s", file=sys.stderr, flush=True)
        yield {
            form: {**row_of(forms[form], times[form], times["padded"]), "peak_bytes": peaks[form]}
            for form in forms
        }


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    pair = Pair(options)
    samples = make_samples(pair, options.samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    forms = make_batches(pair, samples, options.batch)
    sums = {form: sums_of(pair, batches) for form, batches in forms.items()}
    report: dict[str, Any] = {
        **start("packing", options.device, "benchmarks.bench_packing", argv or sys.argv[1:]),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "sizes": {"samples": len(samples), "batch": options.batch, "visual": pair.visual}
        | {"shortest": min(lengths), "longest": max(lengths)},
        "sums": sums,
    }
    # bfloat16 logits are rounded differently in another place of a batch.
    tolerance = 0.02 if pair.dtype == torch.bfloat16 else 1e-4
    if not all(np.allclose(got, sums["padded"], tolerance) for got in sums.values()):
        print(f"the sums of LM, KL and alignment differ, so nothing was timed: {sums}")
        return 1
    path = result_path("packing", options.device, options.output)
    for rows in measure(pair, forms, options):
        ratio = headline(rows["packed"]["over_padded"], "x", "more")
        report |= {"rows": rows, "headline": {"packing: tokens/s over padded batches": ratio}}
        write_json(path, report)
        path.with_suffix(".md").write_text(markdown(report))
    print(path.with_suffix(".md").read_text())
    print(f"written: {path} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
