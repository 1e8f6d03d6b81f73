"""The README's tables from the newest results: python -m benchmarks.readme

(no option)     rewrite the README between its markers
--check         exit with 1 if the README is not what the results say
--add-run DIR   first take the results of `cdfast.train --compare --output-dir DIR`
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import paper_report
from benchmarks.history import BrokenResult, Result, load, machine, newest
from benchmarks.result_files import RESULTS, file_name, headline, number, table, write_json

README = Path(__file__).resolve().parents[1] / "README.md"
LABELS = {
    "miniature": "CompoDistill: KD + VAT + TAF",
    "vat": "KD + VAT",
    "taf": "KD + TAF",
    "kd": "KD",
    "sft": "SFT",
}
VARIANTS = {
    "kd": "LM + KL, no alignment",
    "dft": "+ alignment, cdfast `{ran_on}`",
    "eager": "+ alignment, eager attention, every map materialised",
}
KIND = ("heads", "kv_heads", "head_dim", "dtype", "layout", "objective")


def versions(result: Result, *names: str) -> str:
    """ "torch 2.13.0, triton 3.6.0": those of the packages named that were there."""
    found = result.environment.get("versions") or {}
    return ", ".join(f"{name} {found[name]}" for name in names if found.get(name))


def step_table(result: Result) -> str:
    """Time and memory of one distillation step, from bench_train_step."""
    report, sizes = result.report, result.report["sizes"]
    where = "a CPU" if result.device == "cpu" else result.device
    threads = f"{sizes['threads']} thread{'s' if sizes['threads'] > 1 else ''}, "
    rows = [
        [
            VARIANTS[row["variant"]].format(ran_on=report["ran_on"]),
            number(row["seconds"]),
            f"{row['seconds_over_kd']:.2f}x",
            number(row["peak_bytes_of_step"] / 2**30),
            f"{row['peak_bytes_of_step_over_kd']:.2f}x",
        ]
        for row in report["rows"]
    ]
    text = (
        f"One distillation step on {where} ({threads if result.device == 'cpu' else ''}float32, "
        f"{versions(result, 'torch', 'transformers')}): width {sizes['width']}, "
        f"{sizes['layers']} student and {sizes['teacher_layers']} teacher layers, "
        f"{sizes['tokens']} tokens of which {sizes['visual_tokens']} visual. `{report['command']}`"
    )
    columns = ["step", "s", "against KD", "memory of the step, GiB", "against KD"]
    return f"{text}\n\n{table(columns, rows)}"


def miniature_table(result: Result) -> str:
    """Accuracy of the methods that `cdfast.train --compare` trains."""
    report = result.report
    runs = report["runs"]
    where = "CPU" if result.device == "cpu" else result.device
    text = (
        f"`{report['command']}`, seed {report['seed']}, {where}, threads: "
        f"{result.environment['threads']}, {versions(result, 'torch', 'transformers')}:"
    )

    def row(label: str, accuracy: dict[str, float], similarity: str = "", time: str = "") -> list:
        return [label, f"{accuracy['CR']:.3f}", f"{accuracy['VQA']:.3f}", similarity, time]

    rows = [row("teacher", runs["miniature"]["teacher"])]
    for name, label in LABELS.items():
        run = runs[name]
        before, after = (
            ", ".join(f"{v:.2f}" for v in run[k].values()) for k in ("before", "after")
        )
        rows.append(row(label, run["student"], f"{before} -> {after}", f"{run['seconds']:.0f}"))
    rows += [
        row("CompoDistill, shuffled images", runs["miniature"]["student, shuffled images"]),
        row("trained without images", report["text_only"]),
        row("chance", report["chance"]),
    ]
    columns = ["run", "CR", "VQA", "matched-layer similarity before -> after", "s"]
    return f"{text}\n\n{table(columns, rows)}"


def kernels_table(result: Result) -> str:
    """The main ratios of bench_kernels: the cases of the first one's kind."""
    measured = [case for case in result.report["cases"] if "failed" not in case]
    main = [case for case in measured if all(case.get(k) == measured[0].get(k) for k in KIND)]
    rows = []
    for case in main:
        ratios = case["ratios"]
        share = ratios["extra_memory_over_eagers_extra"]
        speed = number(ratios["plain_speed_over_fastest_peer"])
        peer = ratios["fastest_peer"]
        rows.append(
            [
                case["name"],
                number(ratios["student_over_plain"]),
                number(ratios["eager_over_student"]),
                number(share if share is None else 100 * share, 1),
                f"{speed} (`{peer}`)" if peer else speed,
            ]
        )
    columns = [
        "case",
        "with alignment over without, time",
        "eager over cdfast, time",
        "extra memory, % of eager's",
        "speed against the fastest peer",
    ]
    where = machine(result.environment)
    text = f"{where}, {versions(result, 'torch', 'triton')}, {result.date}. "
    text += f"`{result.report['command']}`"
    if result.environment.get("interpreter"):
        text += " **Triton ran in its interpreter: no time here is that of a GPU.**"
    others = len(result.report["cases"]) - len(main) + len(result.report["not_measured"])
    if others:
        page = result.path.with_suffix(".md").name
        text += f"; {others} other cases: [benchmarks/results](benchmarks/results/{page})."
    return f"{text}\n\n{table(columns, rows)}" if rows else f"{text}\n\nNo case was measured."


def paper_block(result: Result) -> str:
    """The tables of benchmarks.paper_tables."""
    page = result.path.with_suffix(".md").name
    return paper_report.readme_text(result.report, f"benchmarks/results/{page}")


# marker -> (theme, table of one result, command that measures it)
BLOCKS: dict[str, tuple[str, Callable[[Result], str], str]] = {
    "results": ("train_step", step_table, "python -m benchmarks.bench_train_step"),
    "kernels": ("kernels", kernels_table, "python -m benchmarks.bench_kernels"),
    "miniature": ("miniature", miniature_table, "torchrun -m cdfast.train --compare"),
    "paper": (paper_report.THEME, paper_block, paper_report.COMMAND),
}
# The README may leave these out, as it does until there are results.
MAY_BE_ABSENT = ("paper",)


def miniature_headline(runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is worth following over months of a comparison's runs."""
    run = runs["miniature"]
    found = {
        f"{whose}, {group}": headline(accuracy[group], "fraction correct", "more")
        for whose, accuracy in (("CompoDistill", run["student"]), ("teacher", run["teacher"]))
        for group in ("CR", "VQA")
    }
    after = statistics.mean(run["after"].values()) if run["after"] else None
    name = "CompoDistill, attention similarity to the teacher"
    return found | {name: headline(after, "cosine, mean of matched layers", "more")}


def take_run(folder: Path, results: Path = RESULTS) -> Path:
    """Keep of a comparison's results what the table needs; logs stay in the run's folder."""
    source = folder / "compare.json"
    compared = json.loads(source.read_text())
    first = next(iter(compared.values()))
    models = first["evaluation"]["models"]
    groups = {name: kind["group"] for name, kind in models["student"]["kinds"].items()}
    text_only = first["evaluation"]["text_only"]

    def mean_of(group: str) -> float:
        return statistics.mean(text_only[name] for name in groups if groups[name] == group)

    runs = {}
    for name, run in compared.items():
        accuracy = run["evaluation"]["models"]
        runs[name] = {
            **{model: report["averages"] for model, report in accuracy.items()},
            "kinds": {k: v["accuracy"] for k, v in accuracy["student"]["kinds"].items()},
            "before": run["similarity"]["before"]["matched"],
            "after": run["similarity"]["after"]["matched"],
            "seconds": run["seconds"],
        }
    # The results have no date of their own: the day they were written.
    date = datetime.date.fromtimestamp(source.stat().st_mtime)
    environment = {k: v for k, v in first["environment"].items() if k != "command"}
    report = {
        "theme": "miniature",
        "command": "torchrun -m cdfast.train --compare",
        "date": f"{date:%Y-%m-%d}",
        "environment": environment,
        "headline": miniature_headline(runs),
        "seed": first["recipe"]["seed"],
        "chance": models["student"]["averages_chance"],
        "text_only": {group: mean_of(group) for group in ("CR", "VQA")},
        "runs": runs,
    }
    path = results / file_name("miniature", environment["device"], date)
    write_json(path, report)
    return path


def block(marker: str, results: list[Result]) -> str:
    """What stands between the markers: a table per device, or that there is none yet."""
    theme, rendered_table, command = BLOCKS[marker]
    found = newest(results, theme)
    if not found:
        return f"Not measured yet: no results of `{command}` are in benchmarks/results."
    return "\n\n".join(rendered_table(result) for result in found)


def rendered(readme: str, results: list[Result]) -> str:
    """The README with what stands between its markers replaced."""
    for marker in BLOCKS:
        begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        if marker in MAY_BE_ABSENT and begin not in readme and end not in readme:
            continue
        head, opened, rest = readme.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (opened and closed):
            sys.exit(f"README.md: expected {begin} and, after it, {end}. Put both back.")
        readme = f"{head}{begin}\n{block(marker, results)}\n{end}{tail}"
    return readme


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add-run", type=Path, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.add_run:
        print(f"written: {take_run(options.add_run)}")
    readme = README.read_text(encoding="utf-8")
    try:
        wanted = rendered(readme, load(RESULTS)[0])
    except BrokenResult as error:
        sys.exit(str(error))
    if not options.check:
        README.write_text(wanted, encoding="utf-8")
    elif wanted != readme:
        sys.exit("README.md is not what benchmarks/results says: run python -m benchmarks.readme")
    return 0


if __name__ == "__main__":
    sys.exit(main())
