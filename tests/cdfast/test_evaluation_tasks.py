"""Readers of benchmark files: what they ask, and what they say of broken files."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from cdfast.evaluation.files import LeftOut
from cdfast.evaluation.tasks import TASKS, chosen_tasks, load_items
from cdfast.images import DataError
from cdfast.miniature.scenes import CR_KINDS
from cdfast.miniature.suites import miniature_suite

DATA = Path(__file__).parents[1] / "data"
FILES = DATA / "evaluation"
FROM_FILES = ["sugarcrepe", "sade", "winoground", "bivlc", "rbench", "reefknot"]


@pytest.fixture
def files(tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(FILES, tmp_path / "data")
    return tmp_path / "data"


def load(name, data=FILES, on_error="raise", **options):
    left_out = LeftOut(on_error)
    return load_items(TASKS[name], data, left_out, **options), left_out


def said(question):
    [image, text] = question.messages[0]["content"]
    assert image == {"type": "image"}
    return text["text"]


def test_committed_files_are_what_the_script_makes(tmp_path):
    runpy.run_path(str(DATA / "make_evaluation_files.py"))["main"](tmp_path)
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {p.relative_to(FILES) for p in FILES.rglob("*") if p.is_file()}
    for path in made:
        if path.suffix in (".json", ".jsonl"):
            assert (tmp_path / path).read_text() == (FILES / path).read_text()
    assert sum(p.stat().st_size for p in FILES.rglob("*") if p.is_file()) < 300_000


def test_sugarcrepe_asks_both_orders_of_seven_subsets():
    items, left_out = load("sugarcrepe")
    assert not left_out.counts
    assert list(dict.fromkeys(item.subsets[0] for item in items)) == list(CR_KINDS)
    assert len(items) == len({item.id for item in items}) == 21
    record = json.loads((FILES / "sugarcrepe" / "swap_att.json").read_text())["0"]
    [first, second] = items[0].questions
    right, wrong = record["caption"], record["negative_caption"]
    assert said(first).startswith(
        f"Which caption fits the image?\n(A) {right}\n(B) {wrong}\nAnswer"
    )
    assert f"(A) {wrong}\n(B) {right}\n" in said(second)
    assert (first.answer, second.answer) == ("A", "B")
    assert first.options == second.options[::-1] == (right, wrong)
    assert first.image.resolve("s").name == record["filename"] == items[0].cluster


@pytest.mark.parametrize("name", ["winoground", "bivlc"])
def test_matching_asks_every_image_about_every_caption(name):
    items, _ = load(name)
    assert len(items) == 4
    for item in items:
        assert [q.kind for q in item.questions] == ["choice"] * 4 + ["match"] * 4
        choices, matches = item.questions[:4], item.questions[4:]
        assert [q.answer for q in choices] == ["A", "B", "A", "B"]
        assert [q.answer for q in matches] == ["Yes", "No", "No", "Yes"]
        captions = choices[0].options
        assert [q.options for q in choices] == [
            captions,
            captions[::-1],
            captions[::-1],
            captions,
        ]
        first, second = choices[0].image, choices[2].image
        assert first != second
        assert [q.image for q in matches] == [first, first, second, second]
        asked = [f'Does this figure show "{c}"? Please answer yes or no.' for c in captions]
        assert [said(q) for q in matches] == [*asked, *asked]


def test_bivlc_images_are_read_when_they_are_needed():
    [item, *_] = load("bivlc")[0]
    first, second = item.questions[0].image, item.questions[2].image
    assert first.read("s")[:2] == second.read("s")[:2] == b"\xff\xd8"
    assert first.read("s") != second.read("s")
    assert item.subsets == ("replace_obj",)


def test_rbench_questions_belong_to_the_five_random_subsets():
    items, _ = load("rbench")
    for subset in range(1, 6):
        ids = json.loads((FILES / "rbench" / f"image-level_ids_{subset}.json").read_text())
        members = [item for item in items if f"subset {subset}" in item.subsets]
        assert sorted(int(item.id) for item in members) == ids
    [question] = items[0].questions
    assert said(question).endswith("in the image? Please answer yes or no.")
    assert question.choices == ("Yes", "No")
    assert {q.answer for item in items for q in item.questions} == {"Yes", "No"}


def test_reefknot_keeps_the_instruction_of_the_prompt_and_the_relation_type():
    items, _ = load("reefknot")
    assert len(items) == 12
    assert {item.subsets for item in items} == {("perception",), ("cognitive",)}
    assert said(items[0].questions[0]).count("yes or no") == 1
    assert items[0].questions[0].image.name.endswith(".jpg")


def test_sade_and_an_optional_type(files):
    assert {item.subsets for item in load("sade")[0]} == {("swap_att",), ("replace_rel",)}
    path = files / "sade" / "sade.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    (files / "sade" / "sade.json").write_text(
        json.dumps([{k: v for k, v in r.items() if k != "type"} for r in records])
    )
    items, _ = load("sade", files)
    assert len(items) == len(records)
    assert {item.subsets for item in items} == {("all",)}


@pytest.mark.parametrize("name", ["miniature_cr", "miniature_vqa"])
def test_miniature_suites_come_as_items(name):
    items, _ = load(name, None, per_kind=2, vqa_per_kind=3)
    suite = miniature_suite(per_kind=2, vqa_per_kind=3)
    group = "VQA" if name == "miniature_vqa" else "CR"
    told = [(q.kind, said(q), q.answer) for item in items for q in item.questions]
    assert told == [(q.kind, said(q), q.answer) for q in suite if q.group == group]
    assert {len(item.questions) for item in items} == ({1} if group == "VQA" else {2})


def test_limit_takes_the_first_of_every_subset():
    assert [item.id for item in load("sugarcrepe", limit=1)[0]] == [f"{k}/0" for k in CR_KINDS]
    assert len(load("winoground", limit=1)[0]) == 2


def test_tasks_are_named():
    names = [task.name for task in chosen_tasks(["miniature", "rbench", "miniature_cr"])]
    assert names == ["miniature_cr", "miniature_vqa", "rbench"]
    with pytest.raises(ValueError, match=r"--tasks: expected some of sugarcrepe, .*got 'pope2'"):
        chosen_tasks(["pope2"])
    with pytest.raises(ValueError, match=r"--data: .*sugarcrepe/"):
        load_items(TASKS["sugarcrepe"], None, LeftOut())


def edit(path, change):
    """Change the first record of a .json or .jsonl file."""
    if path.suffix == ".jsonl":
        first, *rest = path.read_text().splitlines()
        record = json.loads(first)
        change(record)
        path.write_text("\n".join([json.dumps(record), *rest]))
    else:
        content = json.loads(path.read_text())
        change(content["0"] if isinstance(content, dict) else content[0])
        path.write_text(json.dumps(content))


BROKEN = {
    "sugarcrepe/swap_obj.json": ("negative_caption", None, "record 0: negative_caption"),
    "sugarcrepe/add_att.json": ("filename", "../../secret.jpg", "inside its image root"),
    "sade/sade.jsonl": ("image", "http://a.b/c.jpg", "nothing is ever fetched"),
    "winoground/examples.jsonl": ("image_1", 7, "image_1: expected a text, got 7"),
    "rbench/image-level_filterd.json": ("label", "maybe", "label: expected yes or no"),
    "reefknot/YESNO.jsonl": ("image_id", "999", "999.jpg"),
}


@pytest.mark.parametrize("path", BROKEN)
def test_broken_record_is_named_or_left_out_alone(files, path):
    field, value, message = BROKEN[path]
    name = path.partition("/")[0]
    whole = load(name, files)[0]
    edit(files / path, lambda record: record.update({field: value}))
    with pytest.raises(DataError, match="Remedy") as refused:
        load(name, files)
    assert message in str(refused.value)
    assert path in str(refused.value)
    items, left_out = load(name, files, on_error="skip")
    assert len(items) == len(whole) - 1
    assert {item.id for item in items} < {item.id for item in whole}
    assert sum(left_out.counts.values()) == 1
    assert [len(names) for names in left_out.names.values()] == [1]


def test_two_equal_captions_are_no_question(files):
    path = files / "winoground" / "examples.jsonl"
    edit(path, lambda record: record.update(caption_1=record["caption_0"]))
    with pytest.raises(DataError, match="two captions that differ"):
        load("winoground", files)


@pytest.mark.parametrize("name", FROM_FILES)
def test_missing_file_is_named(files, name):
    for path in (files / name).rglob("*"):
        if path.suffix in (".json", ".jsonl", ".parquet"):
            path.unlink()
    with pytest.raises(DataError, match=r"expected the file .*, got no such file") as refused:
        load(name, files, on_error="skip")
    assert f"{name}/" in str(refused.value)


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        ("sugarcrepe/swap_att.json", "[]", "JSON object"),
        ("sugarcrepe/swap_att.json", '{"0": ', "valid JSON"),
        ("rbench/image-level_ids_2.json", "{}", "JSON list"),
        ("rbench/image-level_ids_2.json", "[1, null]", "numbers or strings"),
        ("rbench/image-level_ids_2.json", "[1, 4711]", "ids of questions"),
        ("reefknot/YESNO.jsonl", "", "at least one record"),
    ],
)
def test_damaged_file_is_an_error_even_when_records_are_skipped(files, path, content, expected):
    (files / path).write_text(content)
    with pytest.raises(DataError, match=expected):
        load(path.partition("/")[0], files, on_error="skip")


def test_question_that_stands_twice_is_refused(files):
    path = files / "rbench" / "image-level_filterd.json"
    edit(path, lambda record: record.update(question_id=5))
    with pytest.raises(DataError, match="once in the file"):
        load("rbench", files)


def test_no_record_left_is_an_error(files):
    shutil.rmtree(files / "sade" / "images")
    with pytest.raises(DataError, match=r"at least one that can be used.*image missing.*8"):
        load("sade", files, on_error="skip")
