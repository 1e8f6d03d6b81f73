"""Made-up runs of the paper's tables, for tests: no number in them was measured."""

import json
import sys

from benchmarks.paper_arms import Arm
from benchmarks.paper_resolve import Resolved
from benchmarks.paper_runs import Planned
from cdfast.config import Recipe, StageRecipe

KINDS = {"swap_att": "CR", "add_obj": "CR", "colour": "VQA"}


def accuracy(cr, vqa):
    return {
        "averages": {"CR": cr, "VQA": vqa},
        "kinds": {
            kind: {
                "accuracy": {"CR": cr, "VQA": vqa}[group],
                "both_orders": 0.1,
                "chance": 0.5,
                "n": 200 if group == "CR" else 100,
                "group": group,
            }
            for kind, group in KINDS.items()
        },
    }


def record(arm, key, seed, cr, vqa=0.5, **fields):
    """A line of runs.jsonl."""
    return {
        "arm": arm,
        "key": key,
        "seed": seed,
        "recipe": "miniature",
        "options": {},
        "factor": 1.0,
        "steps": [20, 500],
        "scenes": {"suite": "miniature", "split": "test", "seed": 7},
        "student": accuracy(cr, vqa),
        "shuffled": {"CR": 0.5, "VQA": 0.4},
        "teacher_name": "miniature",
        "teacher": accuracy(0.99, 0.98),
        "similarity": {"before": {"1": 0.5}, "after": {"1": 0.8, "2": 0.9}},
        "curve": [],
        "seconds": 100.0,
        "cpu_seconds": 90.0 + seed,
        "interrupted": 0,
        "environment": {
            "device": "cpu",
            "processor": "Xeon",
            "python": "3.11.7",
            "cores": 2,
            "threads": 1,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
        "commit": "abc",
        "date": "2026-11-22",
        **fields,
    }


def resolved(name="compodistill", key="k", steps=10):
    recipe = Recipe(name=name, teacher="miniature", stages=[StageRecipe(max_steps=steps)])
    return Resolved(name, Arm(name, "miniature"), recipe, {}, 1.0, key)


def planned(name="compodistill", seed=0, seconds=1.0):
    return Planned(resolved(name, key=f"key-{name}"), seed, seconds)


def results(cr=0.75):
    """What cdfast.train leaves in results.json, as far as records need it."""
    environment = {"python": "3.11.7", "cores": 2, "threads": 1, "versions": {"torch": "2.13.0"}}
    student = accuracy(cr, 0.6)
    return {
        "environment": environment,
        "stages": [{"steps": 4}, {"steps": 6, "evaluations": [{"step": 3, "eval_CR": 0.5}]}],
        "evaluation": {
            "suite": "miniature",
            "split": "test",
            "seed": 7,
            "models": {
                "student": student,
                "student, shuffled images": accuracy(0.5, 0.4),
                "teacher": accuracy(1.0, 1.0),
            },
        },
        "similarity": {
            "matches": {"1": [2]},
            **{when: {"matched": {"1": 0.7}} for when in ("before", "after")},
        },
    }


def child(body):
    """A command for make_runs: Python code in place of cdfast.train, with `folder` and `finish`."""

    def command(run, work):
        folder = work / run.slug
        begin = (
            "import json, os, pathlib, subprocess, sys, time\n"
            f"folder = pathlib.Path({str(folder)!r}); folder.mkdir(exist_ok=True)\n"
            "def finish():\n"
            f"    (folder / 'results.json').write_text({json.dumps(results())!r})\n"
        )
        return [sys.executable, "-c", begin + body]

    return command
