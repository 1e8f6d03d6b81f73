"""The README's tables from committed results: python benchmarks/readme.py [--check | --add-run DIR]

(no option)     rewrite the README between its markers
--check         exit with 1 if the README is not what the results say
--add-run DIR   first take the results of `cdfast.train --compare --output-dir DIR`
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEP = RESULTS / "train_step_cpu_202611.json"
MINIATURE = RESULTS / "miniature_cpu_202611.json"
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


def step_table(report):
    sizes = report["sizes"]
    lines = [
        f"One distillation step on a CPU ({sizes['threads']} thread"
        f"{'s' if sizes['threads'] > 1 else ''}, float32, torch {report['torch']}, transformers "
        f"{report['transformers']}): width {sizes['width']}, {sizes['layers']} student and "
        f"{sizes['teacher_layers']} teacher layers, {sizes['tokens']} tokens of which "
        f"{sizes['visual_tokens']} visual. `{report['command']}`",
        "",
        "| step | s | against KD | memory of the step, GiB | against KD |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {VARIANTS[row['variant']].format(**report)} | {row['seconds']:.2f} "
            f"| {row['seconds_over_kd']:.2f}x | {row['peak_bytes_of_step'] / 2**30:.2f} "
            f"| {row['peak_bytes_of_step_over_kd']:.2f}x |"
        )
    lines += []
    return "\n".join(lines)


def miniature_table(report):
    runs = report["runs"]
    teacher = runs["miniature"]["teacher"]
    environment = report["environment"]
    lines = [
        f"`{report['command']}`, seed {report['seed']}, CPU, threads: {environment['threads']}, "
        f"torch {environment['versions']['torch']}, transformers "
        f"{environment['versions']['transformers']}:",
        "",
        "| run | CR | VQA | matched-layer similarity before -> after | s |",
        "|---|---|---|---|---|",
        f"| teacher | {teacher['CR']:.3f} | {teacher['VQA']:.3f} | | |",
    ]
    for name, label in LABELS.items():
        run = runs[name]
        before, after = (
            ", ".join(f"{v:.2f}" for v in run[k].values()) for k in ("before", "after")
        )
        lines.append(
            f"| {label} | {run['student']['CR']:.3f} | {run['student']['VQA']:.3f} "
            f"| {before} -> {after} | {run['seconds']:.0f} |"
        )
    blind = runs["miniature"]["student, shuffled images"]
    lines += [
        f"| CompoDistill, shuffled images | {blind['CR']:.3f} | {blind['VQA']:.3f} | | |",
        f"| trained without images | {report['text_only']['CR']:.3f} "
        f"| {report['text_only']['VQA']:.3f} | | |",
        f"| chance | {report['chance']['CR']:.3f} | {report['chance']['VQA']:.3f} | | |",
    ]
    return "\n".join(lines)


def take_run(folder):
    """Keep of a comparison's results what the table needs; logs stay in the run's folder."""
    results = json.loads((folder / "compare.json").read_text())
    first = next(iter(results.values()))
    models = first["evaluation"]["models"]
    groups = {name: kind["group"] for name, kind in models["student"]["kinds"].items()}
    text_only = first["evaluation"]["text_only"]

    def mean_of(group):
        values = [text_only[name] for name in groups if groups[name] == group]
        return sum(values) / len(values)

    runs = {}
    for name, run in results.items():
        accuracy = run["evaluation"]["models"]
        runs[name] = {
            **{model: report["averages"] for model, report in accuracy.items()},
            "kinds": {k: v["accuracy"] for k, v in accuracy["student"]["kinds"].items()},
            "before": run["similarity"]["before"]["matched"],
            "after": run["similarity"]["after"]["matched"],
            "seconds": run["seconds"],
        }
    report = {
        "command": "torchrun -m cdfast.train --compare",
        "seed": first["recipe"]["seed"],
        "environment": {k: v for k, v in first["environment"].items() if k != "command"},
        "chance": models["student"]["averages_chance"],
        "text_only": {group: mean_of(group) for group in ("CR", "VQA")},
        "runs": runs,
    }
    MINIATURE.write_text(json.dumps(report, indent=1) + "\n")


def rendered(readme):
    """The README with what stands between its markers replaced."""
    for marker, text in (
        ("results", step_table(json.loads(STEP.read_text()))),
        ("miniature", miniature_table(json.loads(MINIATURE.read_text()))),
    ):
        begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        head, _, rest = readme.partition(begin)
        _, _, tail = rest.partition(end)
        readme = f"{head}{begin}\n{text}\n{end}{tail}"
    return readme


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add-run", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.add_run:
        take_run(options.add_run)
    path = ROOT / "README.md"
    readme = path.read_text()
    if not options.check:
        path.write_text(rendered(readme))
    elif rendered(readme) != readme:
        sys.exit("README.md is not what benchmarks/results says: run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
