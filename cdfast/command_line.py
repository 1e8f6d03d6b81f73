"""The command line of recipes: their fields as options, and what argparse does not know."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdfast.config import (
    MINIATURE,
    OWN_MODELS,
    RECIPE_FIELDS,
    STAGE_FIELDS,
    ConfigError,
    Recipe,
    load_recipe,
    override,
)

_DRY_RUN = ("dry_run_samples", "dry_run_json")


def parse_command_line(argv: Sequence[str]) -> tuple[Recipe | None, argparse.Namespace]:
    """(recipe with overrides applied, flags); the recipe is None for --list.

    Raises:
        ConfigError: an unknown recipe or option, or a value of the wrong type.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun [--nproc-per-node N] -m cdfast.train",
        usage="%(prog)s [RECIPE|FILE.yaml] [--option value ...]",
        description="Distil a multimodal LLM. Without arguments: the embedded miniature.",
        epilog="Stage options may be given for one kind of stage, as --dft.max-steps 100. Every "
        "field of transformers.TrainingArguments is an option too, as --save-steps 50.",
        allow_abbrev=False,
    )
    flags = parser.add_argument_group("flags")
    for name, text in {
        "list": "list the shipped recipes and exit",
        "resume": "continue the run in --output-dir (default: the newest of this recipe)",
        "overwrite": "delete what is in --output-dir first",
        "dry-run": "check recipe and data, print stages, matched layers and sizes, and exit: with "
        "status 1 if the run would stop on its data",
    }.items():
        flags.add_argument(f"--{name}", action="store_true", help=text)
    flags.add_argument(
        "--dry-run-samples",
        metavar="N",
        help="with --dry-run: look at N records of each data set, evenly spaced; 0: none "
        "(default: all)",
    )
    flags.add_argument(
        "--dry-run-json", metavar="FILE", help="with --dry-run: write what the data are to FILE"
    )
    flags.add_argument(
        "--compare",
        nargs="*",
        metavar="VARIANT",
        help="also train these variants of the recipe (default: all), and print one table",
    )
    for title, group in (("recipe", RECIPE_FIELDS), ("stage", STAGE_FIELDS)):
        section = parser.add_argument_group(f"{title} options")
        for f in group:
            if title == "stage" and f.name in {r.name for r in RECIPE_FIELDS}:
                continue
            # What a recipe has that does not name the field; an empty value says nothing.
            shown = "" if f.default in (dataclasses.MISSING, None, "") else f" ({f.default})"
            several = "list" in str(f.type)
            section.add_argument(
                f"--{f.name.replace('_', '-')}",
                nargs="*" if several else "?",
                const=None if several else "true",
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=f"{f.metadata['help']}{shown}".replace("%", "%%"),
            )
    # The recipe comes first: argparse would take the value of an option it does not know for it.
    argv = _join_negative(argv)
    source = argv.pop(0) if argv and not argv[0].startswith("-") else None
    namespace, rest = parser.parse_known_args(argv)
    if source is None:
        own = any(hasattr(namespace, name) for name in ("teacher", "student", "data"))
        source = OWN_MODELS if own else MINIATURE
    flag_names = ("list", "compare", "resume", "overwrite", "dry_run", *_DRY_RUN)
    options = {k: v for k, v in vars(namespace).items() if k not in flag_names}
    options |= _pairs(rest)
    chosen = argparse.Namespace(**{k: getattr(namespace, k) for k in flag_names})
    if chosen.list:
        return None, chosen
    if chosen.resume and chosen.overwrite:
        raise ConfigError(
            "--resume, --overwrite: expected one of them; got both. --resume continues the run in "
            "--output-dir, --overwrite deletes it."
        )
    _check_dry_run(chosen)
    return override(load_recipe(source), options), chosen


def _check_dry_run(chosen: argparse.Namespace) -> None:
    """Refuse what only a dry run knows without one; read its values."""
    for name in _DRY_RUN:
        if getattr(chosen, name) is not None and not chosen.dry_run:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: expected --dry-run beside it; got none. Give --dry-run.")
    if chosen.dry_run_samples is not None:
        if not re.fullmatch(r"\d{1,18}", chosen.dry_run_samples):
            raise ConfigError(
                "--dry-run-samples: expected a number of records, 0 for none; got "
                f"{chosen.dry_run_samples!r}. Give a whole number, or leave it out to look at all."
            )
        chosen.dry_run_samples = int(chosen.dry_run_samples)
    if chosen.dry_run_json is not None:
        chosen.dry_run_json = Path(chosen.dry_run_json)


def _join_negative(argv: Sequence[str]) -> list[str]:
    """`--name -1e-4` as `--name=-1e-4`: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for token in argv:
        follows_option = bool(joined) and joined[-1].startswith("--") and "=" not in joined[-1]
        if follows_option and re.match(r"-(\.?\d|inf|nan)", token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _pairs(tokens: Sequence[str]) -> dict[str, Any]:
    """--name value, --name=value and --name a b of the options that argparse did not know."""
    options: dict[str, Any] = {}
    name = ""
    for token in tokens:
        if token.startswith("--"):
            name, _, value = token[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = [value] if "=" in token else []
        elif name:
            options[name].append(token)
        else:
            raise ConfigError(f"unexpected argument {token!r}: options start with --.")
    return {k: ("true" if not v else v[0] if len(v) == 1 else v) for k, v in options.items()}
