"""What does the student look at? Attention of teacher, student and baseline on the same questions.

    python -m cdfast.analyze TEACHER STUDENT [--baseline SFT] [--output-dir DIR]

Five experiments: the answer token's attention on visual and text keys by layer; similarity with the
teacher's attention by layer; answer probability by similarity; the teacher's attention put in place
of the student's; overlays on the picture. Writes analysis.json, cases.jsonl (as cases are done) and
PNG figures. Without --data the questions are the miniature's scenes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoProcessor, PreTrainedModel

from cdfast.aligner import image_token_id
from cdfast.analysis import ROWS, SUBSTITUTE_ROWS, Plan, measure
from cdfast.analysis_output import draw_cases, draw_figures, results_table
from cdfast.analysis_summary import RESAMPLES, summarise
from cdfast.cases import (
    ANSWER_TOKENS,
    Case,
    batches,
    cases_of_file,
    cases_of_questions,
    encode_cases,
)
from cdfast.config import EMBEDDED_SCENES, EMBEDDED_TEACHERS, MINIATURE, ConfigError
from cdfast.geometry import GeometryError
from cdfast.images import DataError
from cdfast.matching import LAYER_RANGES, Matches, layers_in_range, match_group, match_simple
from cdfast.models import load_config, load_model
from cdfast.similarity import num_layers
from cdfast.substitution import RENORMALISE
from cdfast.suites import miniature_suite
from cdfast.synthetic import teacher_path
from cdfast.worlds import WORLDS

# What every experiment runs on; goes into analysis.json.
RAN_ON = {
    "answer_attention": "Fused attention in every layer. Rows of the answer token are computed "
    "from q, k and the log-sum-exp it returns: per-head probabilities exist for these rows only, "
    "on all keys, because the sum over text keys is asked for.",
    "similarity": "Fused attention in every layer, rows as above (with rows='text' some rows at a "
    "time); text keys need no other kernel, they are the columns that are not visual.",
    "groups": "The numbers of 'similarity' and the logits of the answer: nothing more is run.",
    "substitution": "Fused attention in every layer. In the chosen layers the fused output is "
    "corrected by (P' - P) v over visual keys, because no fused kernel takes another model's "
    "probabilities: they are materialised for the chosen rows and visual keys, some rows at a "
    "time. Text keys need none.",
    "overlays": "Fused attention; rows of the chosen tokens on visual keys, as cdfast.maps.",
}


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
        help=f"student layers from 0, or one of {', '.join(LAYER_RANGES)}, or none",
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
    options.output_dir.mkdir(parents=True, exist_ok=True)  # before the work, not after
    models, processor = load_models(options)
    cases = load_cases(options)
    plan = make_plan(models, options)
    measured, interrupted = _measure_all(models, processor, cases, plan, options)
    if not measured:
        return 130
    content = {
        "models": {name: str(getattr(options, name)) for name in models},
        "settings": _settings(options, plan),
        "ran_on": RAN_ON,
        "interrupted": interrupted,
        **summarise(measured, options.groups, options.seed, options.resamples),
    }
    console = Console()
    content["overlays"] = draw_cases(models, processor, cases, plan, options)
    content["figures"] = draw_figures(content, options.output_dir)
    content["seconds"] = round(time.perf_counter() - start, 1)
    path = options.output_dir / "analysis.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    console.print(results_table(content))
    console.print(f"{path}, {len(content['figures']) + len(content['overlays'])} figures beside it")
    return 130 if interrupted else 0


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
        return cases_of_file(options.data, root, options.limit)
    questions = miniature_suite(
        options.split,
        options.per_kind,
        options.vqa_per_kind,
        options.seed,
        WORLDS[options.suite],
    )
    return cases_of_questions(questions, options.limit)


def make_plan(models: Mapping[str, PreTrainedModel], options: argparse.Namespace) -> Plan:
    """Which layers are compared with which, and what is measured.

    Raises:
        ConfigError: layers that a model does not have.
    """
    match = match_group if options.matching == "group" else match_simple
    depth = {name: num_layers(model) for name, model in models.items()}
    every = range(depth["teacher"])

    def in_range(layers: str) -> Matches:
        ranges = [layers_in_range(depth[name], layers) for name in ("student", "teacher")]
        return match(*ranges)

    layerwise = {name: match(range(depth[name]), every) for name in models if name != "teacher"}
    try:
        matched = in_range(options.layers)
        wanted = options.substitute_layers
        if wanted == ["none"]:
            substituted: Matches = {}
        elif len(wanted) == 1 and wanted[0] in LAYER_RANGES:
            substituted = in_range(wanted[0])
        else:
            substituted = {layer: layerwise["student"][layer] for layer in map(int, wanted)}
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"layers: expected numbers from 0 to {depth['student'] - 1}, one of "
            f"{', '.join(LAYER_RANGES)} that both models have, or none; got "
            f"{options.substitute_layers} and {options.layers!r} ({error})."
        ) from error
    return Plan(
        layerwise,
        matched,
        substituted,
        options.rows,
        options.heads,
        tuple(options.substitute_weights),
        options.substitute_rows,
        options.renormalise,
        options.backend,
    )


def _measure_all(
    models: dict[str, PreTrainedModel],
    processor: Any,
    cases: Sequence[Case],
    plan: Plan,
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], bool]:
    """The numbers of all cases, and whether the user stopped before the end."""
    measured: list[dict[str, Any]] = []
    token = image_token_id(models["student"])
    with (
        (options.output_dir / "cases.jsonl").open("w") as file,
        tqdm(total=len(cases), desc="analysis", unit="case") as bar,
    ):
        try:
            for chunk in batches(cases, options.batch_size):
                encoded = encode_cases(processor, chunk, token, options.answer_tokens)
                found = measure(models, encoded, plan)
                _check_finite(found, options.dtype)
                measured += found
                file.writelines(json.dumps(case) + "\n" for case in found)
                file.flush()
                bar.update(len(chunk))
        except KeyboardInterrupt:
            print(f"stopped after {len(measured)} of {len(cases)} cases", file=sys.stderr)
            return measured, True
    return measured, False


def _check_finite(cases: Sequence[Mapping[str, Any]], dtype: str) -> None:
    for case in cases:
        for name, answer in case["answers"].items():
            if not math.isfinite(answer["probability"]):
                raise ConfigError(
                    f"{name}: expected a finite probability of the answer; got "
                    f"{answer['probability']} ({case['kind']}, {case['unit']}). Its weights or "
                    f"activations are not finite in {dtype}: give another --dtype, or check them."
                )


def _settings(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    names = (
        *("split", "per_kind", "vqa_per_kind", "limit", "answer_tokens", "heads", "rows"),
        *("matching", "layers", "groups", "substitute_rows", "renormalise", "seed", "resamples"),
        *("batch_size", "dtype", "device", "backend"),
    )
    windows = {
        "layerwise": plan.layerwise,
        "matched": plan.matched,
        "substituted": plan.substituted,
    }
    return {
        "data": options.suite if options.data is None else str(options.data),
        **{name: getattr(options, name) for name in names},
        **{name: _listed(value) for name, value in windows.items()},
        "substitute_weights": list(plan.weights),
    }


def _listed(value: Any) -> Any:
    """With the keys and lists of JSON."""
    if isinstance(value, Mapping):
        return {str(k): _listed(v) for k, v in value.items()}
    return list(value)


if __name__ == "__main__":
    sys.exit(main())
