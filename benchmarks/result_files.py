"""Result files: <theme>_<device>_<yyyymm>.json, and .md and .png beside it.

Every file begins with the same fields (`start`), which the page over time reads (page.py):

    theme, command, date, environment
    headline    name -> {value, unit, better}: the few numbers worth following over months
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import native

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("cdfast", "torch", "triton", "numpy", "transformers", "trl", "flash-attn", "xformers")
NOT_MEASURED = "not measured"
BUSY_SHARE = 0.5  # of the cores


def start(theme: str, device: str, module: str, arguments: list[str]) -> dict[str, Any]:
    """The fields that every result file begins with; the benchmark adds its own.

    Args:
        theme: first word of the file's name, such as "kernels".
        device: "cpu" or "cuda".
        module: what was run, as after `python -m`.
        arguments: its arguments; where the results went is left out of the command.
    """
    if "--output" in arguments:
        place = arguments.index("--output")
        arguments = [*arguments[:place], *arguments[place + 2 :]]
    return {
        "theme": theme,
        "command": " ".join([f"python -m {module}", *map(str, arguments)]),
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "environment": environment(device),
        "headline": {},
    }


def headline(value: float | None, unit: str, better: str) -> dict[str, Any]:
    """One number to follow over months; None where it was not measured.

    Args:
        unit: of the value, "x" for a ratio.
        better: "less" or "more".
    """
    if better not in ("less", "more"):
        raise ValueError(f'better: expected "less" or "more"; got {better!r}.')
    return {"value": value, "unit": unit, "better": better}


def environment(device: str) -> dict[str, Any]:
    """Device, versions and command; nothing that names the machine."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": versions,
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "instruction_set": native.EXTENSION.isa() if native.EXTENSION else None,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": list(torch.cuda.get_device_capability(0)),
        }
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device.startswith("cuda") else "cpu"


def result_path(theme: str, device: str, folder: Path) -> Path:
    """<folder>/<theme>_<device>_<yyyymm>.json"""
    return folder / file_name(theme, device_name(device), datetime.date.today())


def file_name(theme: str, device: str, date: datetime.date) -> str:
    """Name of a result file, of a device given as device_name says it."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{theme}_{slug}_{date:%Y%m}.json"


def write_json(path: Path, report: Any) -> None:
    """At once or not at all: a run may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)


def processor() -> str:
    """Model name of the processor."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def is_busy(environment: dict[str, Any]) -> bool:
    """Whether there was much to do in the minute before the benchmark began."""
    load, cores = environment.get("load"), environment.get("cores")
    return bool(load and cores and load > BUSY_SHARE * cores)


def described(report: dict[str, Any]) -> str:
    """Device, versions and command of a report, as Markdown."""
    environment = report["environment"]
    versions = environment["versions"]
    present = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    missing = ", ".join(k for k, v in versions.items() if not v) or "none"
    device = environment["device"]
    if device == "cpu":
        threads, instructions = environment["threads"], environment["instruction_set"]
        device = f"{environment['processor']}, {threads} thread{'s' * (threads > 1)}"
        device += f", backend cpu on {instructions}" if instructions else ", no backend cpu"
    load, cores = environment.get("load"), environment.get("cores")
    if load is not None:
        device += f". Load average at the start: {load:.1f} on {cores} cores, earlier runs included"
    text = f"{report['date']}. Device: {device}. Python {environment['python']}, {present}. "
    text += f"Not installed: {missing}.\n\nCommand: `{report['command']}`"
    if environment["interpreter"]:
        text += "\n\n**Triton ran in its interpreter: the times say nothing about a GPU.**"
    return text


def number(x: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if x is None else f"{x:.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
