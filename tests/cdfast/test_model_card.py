"""The model card: what results.json says, no more, in a form that huggingface_hub reads back."""

import copy
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from cdfast.config import ConfigError, load_recipe, override, to_dict
from cdfast.sharing.local_paths import names_only, paths_in, without_paths
from cdfast.sharing.model_card import (
    CARD_FILE,
    MARKER,
    model_card,
    set_license,
    write_card_of,
    write_model_card,
)


def evaluated(level):
    kinds = {
        kind: {
            "accuracy": level + offset,
            "both_orders": level,
            "greedy": level,
            "chance": 0.5,
            "n": 600 + n,
            "ci95": [level - 0.0125, level + 0.0625],
            "group": group,
        }
        for n, kind, group, offset in ((0, "swap_att", "CR", 0.01), (1, "exist", "VQA", 0.02))
    }
    averages = {"CR": level + 0.01, "VQA": level + 0.02}
    return {"kinds": kinds, "averages": averages, "averages_chance": {"CR": 0.5, "VQA": 0.5}}


RESULTS = {
    "name": "mine",
    "recipe": to_dict(
        override(
            load_recipe("miniature"),
            {
                "teacher": "/data/models/llava-4b",
                "student": "hub-user/small-llm",
                "data": ["/data/sets/train.json", "more/extra.json"],
                "student_projector": "linear",
                "dft.alignment_weight": 2.5,
                "dpt.learning_rate": 3.0e-4,
                "push_to_hub": True,
                "hub_model_id": "me/student",
            },
        )
    ),
    "environment": {
        "python": "3.11.7",
        "versions": {"cdfast": "0.1.0", "torch": "2.13.0", "triton": None},
        "device": "cpu",
        "processes": 3,
        "command": "python -m cdfast.train --data /data/sets/train.json",
    },
    "stages": [{"stage": "dpt", "steps": 11}, *[{"stage": "dft", "steps": 22}] * 2],
    "evaluation": {
        "suite": "miniature",
        "split": "test",
        "seed": 4,
        "models": {"student": evaluated(0.8125), "teacher": evaluated(0.9)},
        "text_only": {"swap_att": 0.437, "CR": 0.437},
    },
    "similarity": {
        "samples": 29,
        "before": {"matched": {"1": 0.312}},
        "after": {"matched": {"1": 0.734}},
        "matches": {"1": [2, 3]},
    },
    "seconds": 321.5,
}


OWN_CODE = {"auto_map": {"AutoConfig": "modeling_cdfast_llava.CdfastLlavaConfig"}}


def card_of(results, config=OWN_CODE, **options):
    return model_card(results, config, **options)


def row(card, first):
    [line] = [line for line in card.text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_card_reads_back_as_it_was_written(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "cdfast_llava"}')
    path = write_model_card(tmp_path, RESULTS, license="apache-2.0")
    assert path.name == CARD_FILE
    loaded = ModelCard.load(path)
    assert str(loaded) == path.read_text()
    assert loaded.data.license == "apache-2.0"
    assert loaded.data.base_model == ["hub-user/small-llm"]
    written = card_of(RESULTS).data.eval_results
    assert loaded.data.eval_results == written
    found = {entry.dataset_config: entry for entry in written}
    assert set(found) == {"CR", "VQA", "swap_att", "exist"}
    assert found["swap_att"].metric_value == 0.8125 + 0.01
    assert found["swap_att"].metric_args == {"questions": 600, "ci95": [0.8, 0.875]}
    assert found["exist"].dataset_split == "test"


def test_card_says_what_the_results_say():
    card = card_of(RESULTS)
    assert row(card, r"swap\_att") == [
        *(r"swap\_att", "600", "0.823", "0.800 to 0.875", "0.910", "0.437", "0.500")
    ]
    assert row(card, "exist")[1:3] == ["601", "0.833"]
    assert row(card, "1") == ["1", "2, 3", "0.312", "0.734"]
    assert row(card, "dpt")[1:5] == ["11", "48", "0.0003", "LM 1 + KL 1"]
    assert row(card, "sft")[1] == "not recorded"
    assert "alignment 2.5" in card.text
    for text in ("llava-4b", "train.json, extra.json", "29 samples", "321.5 s", "torch 2.13.0"):
        assert text in card.text
    assert "P_s (linear)" in card.text
    assert r"student\_projector linear" in card.text
    for absent in ("/data", "more/", "hub_model_id", r"hub\_model", "triton", "privileged"):
        assert absent not in card.text


def test_every_number_of_accuracy_and_similarity_is_in_the_results():
    """Rounded to what is shown."""
    text = card_of(RESULTS).text
    shown = text[text.index("## Accuracy") : text.index("## Not measured")]
    known = {f"{float(n):.3f}" for n in re.findall(r"-?\d+(?:\.\d+)?", json.dumps(RESULTS))}
    numbers = re.findall(r"\d+\.\d+", shown)
    assert len(numbers) == 20
    assert set(numbers) <= known


PARTS = {
    "evaluation": ("Not measured: the run evaluated no suite", "did not measure: accuracy"),
    "similarity": ("## Attention similarity\n\nNot measured.", "attention similarity with a"),
    "environment": ("## Environment\n\nNot recorded.", "16 per process"),
    "stages": ("| dpt | not recorded |", "| sft | not recorded |"),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_in_the_results_is_said(part):
    card = card_of({k: v for k, v in RESULTS.items() if k != part})
    assert all(text in card.text for text in PARTS[part])
    assert bool(card.data.eval_results) == (part != "evaluation")
    whole = card_of(RESULTS).text
    assert not any(text in whole for text in PARTS[part][:1] if part != "stages")


def test_nothing_is_claimed_without_results():
    card = card_of({})
    assert "Nothing is known about its training" in card.text
    assert "None is stated" in card.text
    assert card.data.get("license") is None
    assert card.data.get("base_model") is None
    assert not re.findall(r"\d\.\d\d", card.text.replace("2510.12184", ""))
    for claim in ("the people", "the run ", "This run", "one run", "one seed"):
        assert claim not in card.text, claim


THEIRS = {
    "license": "other",
    "license_name": "ours",
    "license_link": "LICENSE",
    "base_model": ["hub-user/small-llm", "/home/me/llava"],
    "tags": ["compodistill", "cdfast"],
    "datasets": "hub-user/set",
    "language": ["en", "de"],
}


def test_a_model_made_of_another_keeps_what_its_card_states(tmp_path):
    for folder in (tmp_path / "exported", tmp_path / "fused"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    text = yaml.safe_dump({**THEIRS, "model-index": [], "library_name": "timm"})
    (tmp_path / "exported" / CARD_FILE).write_text(f"---\n{text}---\n# Theirs\n---\na: 1\n---\n")
    card = ModelCard.load(write_card_of(tmp_path / "exported", tmp_path / "fused", fused=True))
    want = {**THEIRS, "base_model": ["hub-user/small-llm", "llava"]}
    want["tags"] = ["cdfast", "compodistill"]
    want |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    assert card.data.to_dict() == want
    assert "other, as stated by" in card.text
    assert "but what the front matter of this card says" in card.text
    assert "fused into one projector" in card.text
    set_license(card, "mit")
    assert "## License\n\nmit, as stated by" in card.text
    assert {"license", "license_name", "license_link"} & {*card.data.to_dict()} == {"license"}


@pytest.mark.parametrize("text", [None, "# No front matter", "---\n---\n# Empty"])
def test_a_card_that_states_nothing_hands_nothing_on(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    if text is not None:
        (tmp_path / CARD_FILE).write_text(text)
    card = ModelCard.load(write_card_of(tmp_path, tmp_path))
    assert card.data.get("license") is None
    assert "None is stated." in card.text
    assert "front matter" not in card.text


@pytest.mark.parametrize("text", ["a: [", "- a", "license: a\nlicense: b"])
def test_a_card_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / CARD_FILE).write_text(f"---\n{text}\n---\n")
    with pytest.raises(ConfigError, match=f"{CARD_FILE}.*front matter"):
        write_card_of(tmp_path, tmp_path)


def test_license_is_stated_only_where_one_is_given():
    card = card_of(RESULTS)
    assert card.data.get("license") is None
    assert "None is stated" in card.text
    set_license(card, "mit")
    assert "None is stated" not in card.text
    assert ModelCard(str(card)).data.license == "mit"
    assert "mit, as stated by the people" in card.text


def test_loading_is_said_plainly():
    own, plain = card_of(RESULTS).text, card_of(RESULTS, {"model_type": "llava"}, fused=True).text
    assert "is run on your machine with your rights" in own
    assert "source, trust_remote_code=True)" in own
    assert "import cdfast" in own
    theirs = card_of(RESULTS, {"auto_map": {"AutoConfig": "modeling_other.Other"}}).text
    assert r"modeling\_other.py of this repository is run" in theirs
    assert "import cdfast" not in theirs
    assert "trust_remote_code" not in plain
    assert "fused into one projector" in plain
    assert "of the model before that" in plain


def test_the_privileged_teacher_is_named_beside_its_numbers():
    results = copy.deepcopy(RESULTS)
    results["recipe"]["teacher"] = "miniature"
    assert "privileged supervision" in card_of(results).text


def test_names_of_strangers_stay_text():
    results = copy.deepcopy(RESULTS)
    results["name"] = "a: |b\n---\n<script>"
    results["recipe"]["data"] = ["x|y.json\n# Title"]
    card = ModelCard(str(card_of(results)))
    assert card.data.model_name == results["name"]
    assert "<script>" not in card.text
    assert "\n# Title" not in card.text


def test_a_card_is_written_anew_until_somebody_takes_it_over(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = write_model_card(tmp_path, None)
    assert write_model_card(tmp_path, RESULTS) == path
    theirs = path.read_text().replace(MARKER, "")
    path.write_text(theirs)
    beside = write_model_card(tmp_path, RESULTS)
    assert beside.name == "MODEL_CARD.md"
    assert path.read_text() == theirs
    assert "swap" in beside.read_text()


PATHS = {
    "/home/me/data.json": "data.json",
    "/home/me/my data/x.json": "x.json",
    "~/data.json": "data.json",
    r"C:\me\data.json": "data.json",
    "/": "...",
    "--data /home/me/x.json --out=/b/c 1/2 tokens/s": "--data x.json --out=c 1/2 tokens/s",
    "see https://host/a/b or a/b.json, <p>x</p>": "see https://host/a/b or a/b.json, <p>x</p>",
    "stage '/a/b c'": "stage 'b c'",
}


@pytest.mark.parametrize("text", PATHS)
def test_absolute_paths_are_cut_to_names(text):
    assert names_only({"k": [text]}) == {"k": [PATHS[text]]}
    page = without_paths(f"<p>{text}</p>", paths_in([text]) - {"/"})
    assert page == f"<p>{PATHS[text] if text != '/' else text}</p>"
