"""Tokens per second of the DFT step, padded, packed, shared: python -m benchmarks.bench_packing

    padded             batches of `--batch` samples in random order
    padded, by length  the same, of samples of about one length
    packed             rows of at most batch x longest sample tokens (cdfast/packing.py)

    records alone      batches of `--batch` records, each with its image, in random order
    images shared      the records of an image as one sample (cdfast/shared_images.py), in batches
                       of about as many tokens

Those above go over the same samples once in a round, in turn, and so do those below: teacher,
student with fetched adapter and LoRA, alignment, AdamW. Tokens are those of samples, not padding,
and of records as they are alone. Texts are log-normal in length. One sample in eight has no image;
below, an image has one to seven records. Before anything is timed the sums of the losses over all
samples are compared; of shared images LM and KL, as the alignment is per image there. Results are
written after every round: stop it at any time.
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
SHARED_FORMS = ("records alone", "images shared")
# Median length of a text in visual tokens, spread of its logarithm, longest text.
MEDIAN, SIGMA, LONGEST = 0.25, 0.8, 1.8


def make_samples(pair: Pair, count: int) -> list[dict[str, Any]]:
    """Encoded samples with random words and pixels, a question of a third of the text."""
    random, generator = _randomness()
    made = []
    for index in range(count):
        words = _words(pair, random, generator)
        image = _image(pair, generator) if index % 8 else ([1], {})
        made.append(_sample(words, *image, source=str(index)))
    return made


def make_records(pair: Pair, count: int) -> list[list[dict[str, Any]]]:
    """The same, as the records of each image."""
    random, generator = _randomness()
    made: list[list[dict[str, Any]]] = []
    while count > 0:
        image = _image(pair, generator)
        records = min(int(random.integers(1, 8)), count)
        texts = [_words(pair, random, generator) for _ in range(records)]
        made.append([_sample(words, *image, source=f"{len(made)}") for words in texts])
        count -= records
    return made


def _randomness() -> tuple[np.random.Generator, torch.Generator]:
    return np.random.default_rng(0), torch.Generator().manual_seed(0)


def _words(pair: Pair, random: np.random.Generator, generator: torch.Generator) -> list[int]:
    text = pair.visual * min(MEDIAN * np.exp(SIGMA * random.standard_normal()), LONGEST)
    size = (max(6, int(text)),)
    return torch.randint(3, pair.vocabulary - 1, size, generator=generator).tolist()


def _image(pair: Pair, generator: torch.Generator) -> tuple[list[int], dict[str, Any]]:
    """Tokens of an image behind the first token, and its pixels."""
    pixels = torch.randn(1, 3, pair.side, pair.side, generator=generator)
    tokens = [1, *[pair.aligner.image_token_id] * pair.visual]
    return tokens, {"pixel_values": pixels.to(pair.dtype)}


def _sample(
    words: list[int], head: list[int], images: dict[str, Any], source: str
) -> dict[str, Any]:
    ids = torch.tensor([*head, *words])
    labels = ids.clone()
    labels[: len(head) + len(words) // 3] = -100
    return {"input_ids": ids, "labels": labels, "images": images, "source": source}


def together(records: list[dict[str, Any]], head: int) -> dict[str, Any]:
    """Records whose first `head` tokens are the same as one sample, as `SharedImages` makes it."""
    first = records[0]
    own = [len(record["input_ids"]) - head for record in records]
    segments = [torch.full((n,), place + 1) for place, n in enumerate(own)]
    positions = [torch.arange(head), *(torch.arange(head, head + n) for n in own)]
    rows = {
        name: torch.cat([first[name][:head], *(record[name][head:] for record in records)])
        for name in ("input_ids", "labels")
    }
    return {
        **first,
        **rows,
        "segment_ids": torch.cat([torch.zeros(head, dtype=torch.int64), *segments]),
        "position_ids": torch.cat(positions),
    }


def make_batches(pair: Pair, samples: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """Form -> its batches of all samples, on the device."""
    from cdfast.packing import PackedRows

    lengths = [len(sample["input_ids"]) for sample in samples]
    order = _order(len(samples))
    by_length = sorted(order, key=lambda n: lengths[n])
    padded = (_batches(pair, samples, cut(places, size)) for places in (order, by_length))
    rows = list(PackedRows(lengths, size * max(lengths)))
    return dict(zip(FORMS, (*padded, _batches(pair, samples, rows, pack=True))))


def make_shared_batches(
    pair: Pair, records: list[list[dict[str, Any]]], size: int
) -> dict[str, Any]:
    """As `make_batches`, of records alone and of images with all their records."""
    alone = [record for group in records for record in group]
    shared = [together(group, 1 + pair.visual) for group in records]
    tokens = [sum(len(s["input_ids"]) for s in samples) for samples in (alone, shared)]
    # As many tokens in a batch: of longer samples fewer.
    fewer = max(1, round(size * tokens[0] / len(alone) / (tokens[1] / len(shared))))
    parts = (cut(_order(len(s)), n) for s, n in ((alone, size), (shared, fewer)))
    made = (_batches(pair, samples, indices) for samples, indices in zip((alone, shared), parts))
    return dict(zip(SHARED_FORMS, made))


def _order(count: int) -> list[int]:
    return np.random.default_rng(1).permutation(count).tolist()


def cut(places: list[int], size: int) -> list[list[int]]:
    return [places[at : at + size] for at in range(0, len(places), size)]


def _batches(
    pair: Pair, samples: list[dict[str, Any]], parts: list[list[int]], pack: bool = False
) -> list[dict[str, Any]]:
    from cdfast.collator import VisionTextCollator
    from cdfast.trainer import LayoutCollator

    collator = VisionTextCollator(0)
    collate = LayoutCollator(collator.pack if pack else collator, pair.aligner.image_token_id)
    left_out = ("sample_ids", "cu_seqlens", "segment_ids")

    def batch(indices: list[int]) -> dict[str, Any]:
        made = collate([samples[n] for n in indices])
        return {n: value.to(pair.device) for n, value in made.items() if n not in left_out}

    return [batch(indices) for indices in parts]


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


def tokens_of(batches: list[dict[str, Any]]) -> int:
    return sum(int(batch["layout"].live.sum()) for batch in batches)


def row_of(
    batches: list[dict[str, Any]], times: list[float], base: list[float], tokens: int
) -> dict[str, Any]:
    """Numbers of a form; `tokens` are those of the samples of the first form."""
    places = sum(batch["input_ids"].numel() for batch in batches)
    ratios = [b / t for t, b in zip(times, base)]
    return {
        "batches": len(batches),
        "tokens": tokens_of(batches),
        "filled": tokens_of(batches) / places,
        "most_places": max(batch["input_ids"].numel() for batch in batches),
        "seconds": statistics.median(times) if times else None,
        "tokens_per_second": tokens / statistics.median(times) if times else None,
        "over_first": statistics.median(ratios) if ratios else None,
    }


def rows_table(rows: dict[str, Any]) -> str:
    first = next(iter(rows))
    header = ["form", "batches", "tokens", "places of the largest", "filled by tokens"]
    header += ["tokens/s", f"over {first}", "peak, GiB"]
    cells = []
    for form, row in rows.items():
        peak = row["peak_bytes"] and row["peak_bytes"] / 2**30
        counts = [str(row["batches"]), str(row["tokens"]), str(row["most_places"])]
        rates = [number(row["tokens_per_second"], 0), number(row["over_first"]), number(peak)]
        cells.append([form, *counts, f"{row['filled']:.1%}", *rates])
    return table(header, cells)


def markdown(report: dict[str, Any]) -> str:
    sizes, shared = report["sizes"], report["shared_sizes"]
    parts = [
        "# The DFT step, padded, packed, and with shared images",
        described(report),
        f"{report['dtype']}, {sizes['visual']} visual tokens an image. Ratios are medians of those "
        "inside a round.",
        "## Packed rows",
        f"{sizes['samples']} samples of {sizes['shortest']} to {sizes['longest']} tokens; padded "
        f"batches of {sizes['batch']}, packed rows of at most {sizes['batch']} x "
        f"{sizes['longest']} tokens.",
        rows_table(report["rows"]) if report["rows"] else NOT_MEASURED,
        "## Records that show the same image",
        f"{shared['samples']} records of {shared['shortest']} to {shared['longest']} tokens, of "
        f"{shared['images']} images. Tokens per second are those of the records alone throughout.",
        rows_table(report["shared_rows"]) if report["shared_rows"] else NOT_MEASURED,
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
    begin, first = time.monotonic(), next(iter(forms))
    tokens = tokens_of(forms[first])
    times: dict[str, list[float]] = {form: [] for form in forms}
    peaks: dict[str, int | None] = {}
    for turn in range(options.rounds + 1):
        # Half of the budget for each of the two comparisons.
        if turn > 1 and time.monotonic() - begin > 30 * options.budget_minutes:
            break
        for form, batches in forms.items():
            once = functools.partial(steps, pair, batches)
            if turn == 0:
                peaks[form] = peak_of(pair, once)
                continue
            times[form].append(seconds_of(pair, once))
            print(f"round {turn}: {form}: {times[form][-1]:.2f} s", file=sys.stderr, flush=True)
        yield {
            form: {
                **row_of(forms[form], times[form], times[first], tokens),
                "peak_bytes": peaks[form],
            }
            for form in forms
        }


def agree(pair: Pair, sums: dict[str, list[float]]) -> bool:
    """Whether all forms have the losses of the first."""
    # bfloat16 logits are rounded differently in another place of a batch.
    tolerance = 0.02 if pair.dtype == torch.bfloat16 else 1e-4
    expected = next(iter(sums.values()))
    return all(np.allclose(got, expected, tolerance) for got in sums.values())


def sizes_of(samples: list[dict[str, Any]], **others: int) -> dict[str, int]:
    lengths = [len(sample["input_ids"]) for sample in samples]
    ends = {"shortest": min(lengths), "longest": max(lengths)}
    return {"samples": len(samples), **others, **ends}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    pair = Pair(options)
    samples, records = make_samples(pair, options.samples), make_records(pair, options.samples)
    forms = make_batches(pair, samples, options.batch)
    shared = make_shared_batches(pair, records, options.batch)
    sums = {form: sums_of(pair, batches) for form, batches in forms.items()}
    # The alignment of records that share an image is per image.
    shared_sums = {form: sums_of(pair, batches)[:2] for form, batches in shared.items()}
    if not agree(pair, sums) or not agree(pair, shared_sums):
        print(
            f"the sums of LM, KL and alignment differ, so nothing was timed: {sums | shared_sums}"
        )
        return 1
    report: dict[str, Any] = {
        **start("packing", options.device, "benchmarks.bench_packing", argv or sys.argv[1:]),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "sizes": sizes_of(samples, batch=options.batch, visual=pair.visual),
        "shared_sizes": sizes_of([r for group in records for r in group], images=len(records)),
        "sums": sums | shared_sums,
        "headline": {},
        "rows": {},
        "shared_rows": {},
    }
    path = result_path("packing", options.device, options.output)
    comparisons = (
        (forms, "rows", "packed", "packing: tokens/s over padded batches"),
        (shared, "shared_rows", "images shared", "shared images: tokens/s over records alone"),
    )
    for batches, name, form, title in comparisons:
        for rows in measure(pair, batches, options):
            report[name] = rows
            report["headline"][title] = headline(rows[form]["over_first"], "x", "more")
            write_json(path, report)
            path.with_suffix(".md").write_text(markdown(report))
    print(path.with_suffix(".md").read_text())
    print(f"written: {path} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
