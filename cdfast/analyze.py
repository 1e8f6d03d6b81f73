"""What does the student look at? Attention of teacher, student and baseline on the same questions.

    python -m cdfast.analyze TEACHER STUDENT [--baseline SFT] [--output-dir DIR]

Five experiments: the answer token's attention on visual and text keys by layer; similarity with the
teacher's attention by layer; answer probability by similarity; the teacher's attention put in place
of the student's; overlays on the picture. Writes analysis.json, cases.jsonl (as cases are done),
PNG figures, and report.html with an explorer of single questions. Without --data the questions are
the miniature's scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoProcessor, PreTrainedModel

from cdfast.aligner import image_token_id
from cdfast.analysis.cases import ANSWER_TOKENS, Case, cases_of_file, cases_of_questions
from cdfast.analysis.explorer import explorer_data
from cdfast.analysis.measure import ROWS, SUBSTITUTE_ROWS, Plan
from cdfast.analysis.output import draw_cases, draw_figures, explorer_cases, results_table
from cdfast.analysis.report import EXPLORER_FILE, UNAVAILABLE, write_analysis_page
from cdfast.analysis.run import Settings, analyze_cases, make_plan, write_analysis
from cdfast.analysis.substitution import RENORMALISE
from cdfast.analysis.summary import RESAMPLES
from cdfast.config import EMBEDDED_SCENES, EMBEDDED_TEACHERS, MINIATURE, ConfigError
from cdfast.images import DataError
from cdfast.matching import LAYER_RANGES
from cdfast.miniature.suites import miniature_suite
from cdfast.miniature.worlds import WORLDS
from cdfast.models import load_config, load_model
from cdfast.planes import GeometryError
from cdfast.synthetic import teacher_path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return analyze(options)
    except (ConfigError, DataError, GeometryError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("cdfast.analyze", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="checkpoint folder, hub name, or an embedded teacher")
    add("student", metavar="STUDENT", help="checkpoint folder or hub name")
    add("--baseline", help="a student trained otherwise (SFT), to compare with")
    add("--output-dir", type=Path, default=Path("runs/analysis"))
    add("--data", type=Path, help="LLaVA JSON or messages (default: the miniature's scenes)")
    add("--image-root", type=Path, help="folder of the data's images (default: the data's folder)")
    add("--suite", choices=EMBEDDED_SCENES, default=MINIATURE, help="scenes, without --data")
    add("--split", choices=["validation", "test"], default="test", help="of the miniature")
    add("--per-kind", type=_count, default=50, help="caption pairs per kind (miniature)")
    add("--vqa-per-kind", type=_count, default=50, help="questions per kind (miniature)")
    add("--limit", type=_count, help="the most cases of a kind")
    add("--answer-tokens", choices=ANSWER_TOKENS, default="first", help="of every answer")
    add("--heads", choices=["mean", "max"], default="mean", help="how heads are reduced")
    add("--rows", choices=ROWS, default="answer", help="rows that similarity is averaged over")
    add("--matching", choices=["group", "simple"], default="group")
    add("--layers", choices=LAYER_RANGES, default="intermediate", help="matched, for the groups")
    add("--groups", type=_count, default=5, help="of cases by similarity")
    add(
        "--substitute-layers",
        nargs="+",
        default=["intermediate"],
        metavar="LAYER",
        help=f"student layers from 0, or one of {', '.join(LAYER_RANGES)}, matched or none",
    )
    add("--substitute-weights", nargs="+", type=_share, default=[0.5, 1.0], metavar="W")
    add("--substitute-rows", choices=SUBSTITUTE_ROWS, default="all")
    add("--renormalise", choices=RENORMALISE, default="row", help="rows after the substitution")
    add("--overlays", type=int, default=4, help="cases to draw")
    add("--overlay-words", nargs="*", default=[], metavar="WORD", help="beside the answer")
    add("--seed", type=int, default=0, help="of scenes and intervals")
    add("--resamples", type=_count, default=RESAMPLES, help="of the bootstrap")
    add("--batch-size", type=_count, default=16)
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="auto", help="of cdfast_kernels")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1; got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1; got {text!r}")
    return value


def analyze(options: argparse.Namespace) -> int:
    """Run the experiments that the command line asks for. Returns the exit status."""
    start = time.perf_counter()
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)  # before the work, not after
    models, processor = load_models(options)
    cases = load_cases(options)
    names = [f.name for f in fields(Settings) if f.name != "matched"]
    settings = Settings(**{name: getattr(options, name) for name in names})
    plan = make_plan(models, settings)
    content = analyze_cases(models, processor, cases, plan, settings, folder)
    if content is None:
        return 130
    sources = {name: str(getattr(options, name)) for name in models}
    content = {"models": sources, **content}
    content["settings"] = {**_source(options), **content["settings"]}
    console = Console()
    content["overlays"] = draw_cases(
        models,
        processor,
        cases,
        plan,
        folder,
        layers=options.layers,
        number=options.overlays,
        words=options.overlay_words,
    )
    content["figures"] = draw_figures(content, folder)
    content["seconds"] = round(time.perf_counter() - start, 1)
    path = write_analysis(content, folder)
    console.print(results_table(content))
    explorer = _explorer(models, processor, cases, plan)
    (folder / EXPLORER_FILE).write_text(json.dumps(explorer, allow_nan=False) + "\n")
    page = write_analysis_page(folder, content, explorer)
    drawn = len(content["figures"]) + len(content["overlays"])
    print(f"{path}, {drawn} figures beside it\n{page}")
    return 130 if content["interrupted"] else 0


def _explorer(
    models: dict[str, PreTrainedModel], processor: Any, cases: Sequence[Case], plan: Plan
) -> dict[str, Any]:
    """Of the first question of every kind; or why there is none."""
    try:
        return explorer_data(
            models,
            processor,
            explorer_cases(cases),
            matches=plan.matched,
            backend=plan.backend,
        )
    except ValueError as error:  # the analysis itself is done and written
        return {UNAVAILABLE: str(error)}


def _source(options: argparse.Namespace) -> dict[str, Any]:
    """Where models and questions come from, as analysis.json has it."""
    names = ("split", "per_kind", "vqa_per_kind", "limit", "dtype", "device")
    data = options.suite if options.data is None else str(options.data)
    return {"data": data, **{name: getattr(options, name) for name in names}}


def load_models(options: argparse.Namespace) -> tuple[dict[str, PreTrainedModel], Any]:
    """Teacher, student and baseline (if given), in evaluation mode, and the teacher's processor.

    Raises:
        ConfigError: a model that cannot be loaded, or models that do not read the same tokens.
    """
    models: dict[str, PreTrainedModel] = {}
    processor: Any = None
    for name in ("teacher", "student", "baseline"):
        source = getattr(options, name)
        if source is None:
            continue
        if source in EMBEDDED_TEACHERS:
            try:
                source = teacher_path(source)
            except FileNotFoundError as error:
                raise ConfigError(str(error)) from error
        load_config(source)  # refuses code from the hub
        loaded: Any = load_model(source, options.dtype)
        models[name] = loaded.to(options.device).eval()
        if processor is None:
            try:
                processor = AutoProcessor.from_pretrained(source)
            # Tokenizers and configurations raise a dozen errors on damaged files.
            except Exception as error:
                raise ConfigError(f"model {str(source)!r} has no processor: {error}") from error
    try:
        ids = {name: image_token_id(model) for name, model in models.items()}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if len(set(ids.values())) > 1:
        raise ConfigError(
            f"image_token_id: expected one id in all models; got {ids}. They must read the same "
            "tokens: compare models of one tokenizer."
        )
    return models, processor


def load_cases(options: argparse.Namespace) -> list[Case]:
    """The questions: of --data, or the miniature's scenes."""
    if options.data is not None:
        root = options.image_root or options.data.parent
        return cases_of_file(options.data, [root], options.limit)
    questions = miniature_suite(
        options.split,
        options.per_kind,
        options.vqa_per_kind,
        options.seed,
        WORLDS[options.suite],
    )
    return cases_of_questions(questions, options.limit)


if __name__ == "__main__":
    sys.exit(main())
