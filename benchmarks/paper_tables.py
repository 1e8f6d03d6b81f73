"""Every table of the paper in miniature, rerun: python -m benchmarks.paper_tables

Trains each arm with the same seeds, in parallel processes of one thread, and writes tables and
plots. Finished runs are lines of benchmarks/results/miniature/runs.jsonl and are not made again;
unfinished ones go on where they were. Stop it at any time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

from benchmarks import paper_plot, paper_report, terminal
from benchmarks.paper_arms import ARMS, TABLES
from benchmarks.paper_records import BrokenRecords, read, stale
from benchmarks.paper_resolve import Absent, Resolved, resolve
from benchmarks.paper_runs import Busy, Outcome, expected_seconds, make_runs, plan
from benchmarks.result_files import RESULTS, file_name, write_json
from benchmarks.steps import INTERRUPTED, ROOT, shown

RECORDS = Path("miniature", "runs.jsonl")
WORK = ROOT / "runs" / "paper_tables"
SEEDS, QUICK_SEEDS = 5, 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(f"{name} ({t.letter})" for name, t in TABLES.items())
    parser.add_argument("--tables", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {names}")
    parser.add_argument("--only", nargs="+", choices=ARMS, metavar="ARM", help="names: --list")
    parser.add_argument("--seeds", type=_positive, help=f"0 to N-1; default: {SEEDS}")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="default: cores")
    parser.add_argument(
        "--minutes", type=float, help="start no run that is not expected to end in this time"
    )
    parser.add_argument("--list", action="store_true", help="arms, missing runs, expected hours")
    parser.add_argument("--report", action="store_true", help="tables and plots, without runs")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, two seeds, elsewhere: does it work?"
    )
    parser.add_argument("--output", type=Path, help="folder of records, tables and plots")
    parser.add_argument("--work", type=Path, help="folder of unfinished runs and of logs")
    parser.add_argument(
        "--keep", action="store_true", help="keep the models of finished runs, in WORK/kept"
    )
    options = parser.parse_args(argv)
    work = WORK.with_name(WORK.name + "_quick") if options.quick else WORK
    options.work = (options.work or work).resolve()
    options.output = (options.output or (work / "results" if options.quick else RESULTS)).resolve()
    if options.quick and options.output == RESULTS.resolve():
        parser.error(f"--quick: expected another --output than {RESULTS}: its numbers say nothing.")
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1; got {text!r}")
    return int(text)


def resolve_all(quick: bool) -> dict[str, Resolved | str]:
    """Every arm, or why it is absent."""
    found: dict[str, Resolved | str] = {}
    for name in ARMS:
        try:
            found[name] = resolve(name, quick)
        except Absent as error:
            found[name] = str(error)
    return found


def chosen_arms(options: argparse.Namespace) -> list[str]:
    """Names of the arms that are asked for, in the order of the tables, each once."""
    in_tables = [arm for name in options.tables or TABLES for arm in TABLES[name].arms]
    # Equal compute is counted, so the arm it is measured by need not be run.
    return [a for a in dict.fromkeys(in_tables) if options.only is None or a in options.only]


def write_report(options: argparse.Namespace, arms: dict[str, Resolved | str]) -> None:
    """Tables and plots from the records alone; nothing where there is none of these arms."""
    records = read(options.output / RECORDS)
    # A later command with fewer seeds takes none from the tables.
    keys = {resolved.key for resolved in arms.values() if isinstance(resolved, Resolved)}
    seeds = max([options.seeds, *(seed + 1 for key, seed in records if key in keys)])
    report = paper_report.build(records, arms, seeds, options.quick)
    if report["date"] is None:
        print("no run of these arms is recorded: no tables are written, older ones are left")
        return
    date = datetime.date.fromisoformat(report["date"])
    path = options.output / file_name(paper_report.THEME, "cpu", date)
    targets = {
        path.with_suffix(".png"): paper_plot.draw_rows,
        path.with_name(f"{path.stem}_curves.png"): paper_plot.draw_curves,
    }
    plots = []
    for target, draw in targets.items():
        if draw(target, report):
            plots.append(target.name)
        else:
            target.unlink(missing_ok=True)  # of records that are gone
    write_json(path, report)
    path.with_suffix(".md").write_text(paper_report.markdown(report, plots), encoding="utf-8")
    print(f"tables: {shown(path.with_suffix('.md'))}; plots beside: {', '.join(plots)}")


def list_arms(options: argparse.Namespace, arms: dict[str, Resolved | str]) -> None:
    """What there is, what is missing, and how long that is expected to take."""
    records = read(options.output / RECORDS)
    rows, seconds, counted = [], 0.0, set()
    for name in chosen_arms(options):
        letters = ", ".join(t.letter for t in TABLES.values() if name in t.arms)
        resolved = arms[name]
        if isinstance(resolved, str):
            rows.append([name, letters, "", "absent", ""])
            continue
        missing = sum((resolved.key, seed) not in records for seed in range(options.seeds))
        each = expected_seconds(resolved, records)
        if resolved.key not in counted:
            counted.add(resolved.key)
            seconds += missing * each
        rows.append([name, letters, str(resolved.steps), str(missing), f"{each:.0f}"])
    terminal.show(
        "Runs missing, and seconds expected of each",
        ["arm", "tables", "steps", "missing", "s each"],
        rows,
    )
    print(f"expected: {seconds / 3600:.1f} hours of one core, {options.jobs} at a time")


def name_absent(chosen: list[str], arms: dict[str, Resolved | str]) -> int:
    """Name the chosen arms that this package cannot run; returns how many."""
    absent: dict[str, list[str]] = {}
    for name in chosen:
        if isinstance(why := arms[name], str):
            absent.setdefault(why, []).append(name)
    for why, names in absent.items():
        print(f"absent: {', '.join(names)}: {why}", file=sys.stderr)
    return len(absent)


def name_stale(options: argparse.Namespace, arms: dict[str, Resolved | str]) -> None:
    """Name records that no arm has the key of."""
    keys = [resolved.key for resolved in arms.values() if isinstance(resolved, Resolved)]
    for record in stale(read(options.output / RECORDS), keys):
        print(
            f"stale: {record['arm']} seed {record['seed']} ({record['key']}, {record['date']}): of "
            "another version of package, teacher, scenes or recipe; in no table",
            file=sys.stderr,
        )


def run_missing(options: argparse.Namespace, chosen: list[str], arms: dict) -> Outcome:
    """Make the runs that are not recorded."""
    path = options.output / RECORDS
    present = [arms[name] for name in chosen if isinstance(arms[name], Resolved)]
    planned = plan(present, options.seeds, read(path))
    hours = sum(p.seconds for p in planned) / 3600
    print(f"{len(planned)} runs to make, about {hours:.1f} hours of one core: {shown(path)}")
    return make_runs(
        planned,
        options.work,
        path,
        jobs=options.jobs,
        minutes=options.minutes,
        keep=options.keep,
    )


def conclude(outcome: Outcome) -> None:
    """Say what failed and what is left."""
    for reason in outcome.failed.values():
        print(f"failed: {reason}", file=sys.stderr)
    if outcome.left:
        longest = max(p.seconds for p in outcome.left)
        print(
            f"{len(outcome.left)} runs are left, the longest of about {longest / 60:.0f} minutes: "
            "the same command goes on"
        )


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    chosen = chosen_arms(options)
    if not chosen:
        sys.exit(f"--only: expected arms of the tables {options.tables}; got {options.only}.")
    try:
        arms = resolve_all(options.quick)
        absent = name_absent(chosen, arms)
        name_stale(options, arms)
        if options.list:
            list_arms(options, arms)
            return 1 if absent else 0
        outcome = Outcome() if options.report else run_missing(options, chosen, arms)
        conclude(outcome)
        write_report(options, arms)
    except (BrokenRecords, Busy) as error:
        sys.exit(str(error))
    if outcome.interrupted:
        return INTERRUPTED
    return 1 if outcome.failed or absent else 0


if __name__ == "__main__":
    sys.exit(main())
