"""Make tests/data/evaluation: a few records of every benchmark's format, drawn by this project.

    python tests/data/make_evaluation_files.py [FOLDER]

The scenes, captions and questions are those of `cdfast.miniature`; nothing is
taken from the benchmarks but their names of files and fields.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from cdfast.miniature.scenes import CR_KINDS, caption_pair, draw_scene, is_true, render

FOLDER = Path(__file__).parent / "evaluation"
PAIRS_PER_SUBSET = 3
MATCHINGS = 4
QUESTIONS = 12


def jpeg(scene: Any) -> bytes:
    """A small file: the scene's noise takes 7 kB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def png(scene: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def scenes(rng: random.Random, number: int) -> list[Any]:
    """Scenes of three objects, of which every kind of question can be asked."""
    found: list[Any] = []
    while len(found) < number:
        scene = draw_scene(rng, "test")
        if len(scene.objects) == 3 and all(caption_pair(scene, kind, rng) for kind in CR_KINDS):
            found.append(scene)
    return found


def matching(rng: random.Random, kind: str) -> tuple[Any, Any, Any, Any]:
    """Two scenes and two captions, each of which fits one scene only."""
    while True:
        scene = draw_scene(rng, "test")
        pair = caption_pair(scene, kind, rng)
        for _ in range(3000 if pair else 0):
            other = draw_scene(rng, "test")
            if is_true(other, pair[1]) and not is_true(other, pair[0]):
                return scene, other, *pair


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_image(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def sugarcrepe(folder: Path) -> None:
    rng = random.Random("sugarcrepe")
    shown = scenes(rng, PAIRS_PER_SUBSET)
    names = [f"{rng.randrange(10**6):012d}.jpg" for _ in shown]
    for name, scene in zip(names, shown):
        write_image(folder / "images" / name, jpeg(scene))
    for kind in CR_KINDS:
        records = {}
        for n, (name, scene) in enumerate(zip(names, shown)):
            true, false = caption_pair(scene, kind, rng)
            records[str(n)] = {
                "filename": name,
                "caption": str(true),
                "negative_caption": str(false),
            }
        write_json(folder / f"{kind}.json", records)


def sade(folder: Path) -> None:
    rng = random.Random("sade")
    records = []
    for n, scene in enumerate(scenes(rng, 4)):
        write_image(folder / "images" / f"{n}.jpg", jpeg(scene))
        for kind in ("swap_att", "replace_rel"):
            true, false = caption_pair(scene, kind, rng)
            pair = {"caption": str(true), "negative_caption": str(false)}
            records.append({"image": f"{n}.jpg", **pair, "type": kind})
    write_lines(folder / "sade.jsonl", records)


def winoground(folder: Path) -> None:
    rng = random.Random("winoground")
    records = []
    for n in range(MATCHINGS):
        kind = ("swap_obj", "swap_att")[n % 2]
        first, second, *captions = matching(rng, kind)
        names = [f"ex_{n}_img_{i}" for i in (0, 1)]
        for name, scene in zip(names, (first, second)):
            write_image(folder / "images" / f"{name}.png", png(scene))
        records.append(
            {
                "id": n,
                "image_0": names[0],
                "image_1": names[1],
                "caption_0": str(captions[0]),
                "caption_1": str(captions[1]),
                "tag": kind,
                "secondary_tag": "",
                "num_main_preds": 1,
                "collapsed_tag": ("Object", "Relation")[n % 2],
            }
        )
    write_lines(folder / "examples.jsonl", records)


def bivlc(folder: Path) -> None:
    import datasets

    rng = random.Random("bivlc")
    records = []
    for n in range(MATCHINGS):
        kind = ("replace_obj", "replace_rel", "swap_att", "swap_obj")[n % 4]
        first, second, true, false = matching(rng, kind)
        records.append(
            {
                "image": {"bytes": jpeg(first), "path": f"{n}.jpg"},
                "caption": str(true),
                "negative_caption": str(false),
                "negative_image": {"bytes": jpeg(second), "path": None},
                "type": kind.split("_")[0],
                "subtype": kind.split("_")[1],
            }
        )
    columns = {name: datasets.Value("string") for name in records[0]}
    columns |= {"image": datasets.Image(), "negative_image": datasets.Image()}
    rows = datasets.Dataset.from_list(records, features=datasets.Features(columns))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))


def relations(folder: Path, seed: str) -> list[dict]:
    """Statements about four images, every second one true."""
    rng = random.Random(seed)
    shown = scenes(rng, 4)
    names = [str(2300000 + rng.randrange(10**5)) for _ in shown]
    for name, scene in zip(names, shown):
        write_image(folder / "images" / f"{name}.jpg", jpeg(scene))
    records = []
    for n in range(QUESTIONS):
        scene = shown[n % len(shown)]
        pair = caption_pair(scene, "replace_rel", rng)
        records.append({"image": names[n % len(shown)], "text": str(pair[n // 4 % 2]), "n": n})
    return records


def rbench(folder: Path) -> None:
    questions = [
        {
            "question_id": r["n"],
            "image": f"{r['image']}.jpg",
            "text": f"Is there {r['text']} in the image?",
            "label": ("yes", "no")[r["n"] // 4 % 2],
        }
        for r in relations(folder, "rbench")
    ]
    write_json(folder / "image-level_filterd.json", questions)
    rng = random.Random("subsets")
    for subset in range(1, 6):
        ids = [q["question_id"] for q in questions]
        write_json(folder / f"image-level_ids_{subset}.json", sorted(rng.sample(ids, 8)))


def reefknot(folder: Path) -> None:
    records = [
        {
            "image_id": r["image"],
            "query_prompt": f"Is it {r['text']} in this photo? Please answer yes or no.",
            "label": ("Yes", "No")[r["n"] // 4 % 2],
            "relation_type": ("perception", "cognitive")[r["n"] % 2],
        }
        for r in relations(folder, "reefknot")
    ]
    write_lines(folder / "YESNO.jsonl", records)


def main(folder: Path = FOLDER) -> None:
    for make in (sugarcrepe, sade, winoground, bivlc, rbench, reefknot):
        shutil.rmtree(folder / make.__name__, ignore_errors=True)
        make(folder / make.__name__)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
