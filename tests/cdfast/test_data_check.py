"""`--dry-run` on data: what is counted, what is named, and when a run would stop."""

import io
import itertools
import json

import pytest
from PIL import Image
from rich.console import Console

from cdfast.config import Recipe, StageRecipe
from cdfast.data import load_dataset
from cdfast.data_check.check import (
    DataCheck,
    EncodingOptions,
    check_masks,
    evenly_spaced,
    findings,
)
from cdfast.data_check.run import check_recipe_data, data_sets
from cdfast.data_check.samples import FileSamples
from cdfast.images import DataError
from tests.cdfast.photo_setup import NUM_VISUAL, conversation, make_processor

PROCESSOR = make_processor()


def record(answer="A cat.", image="a.png", question="Which animal is it?", **other):
    head = "<image>\n" if image else ""
    made = {"conversations": conversation([(question, answer)], head), **other}
    return {**made, "image": image} if image else made


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one of them cut off in the middle, behind a whole header."""
    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "a.png")
    whole = tmp_path / "a.png"
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    return tmp_path


def checked(folder, records, processor=PROCESSOR, workers=0, **options):
    """(what is found, why the run would stop)"""
    (folder / "d.json").write_text(json.dumps(records))
    samples = FileSamples([str(folder / "d.json")], [], options.get("pairs", False))
    check = DataCheck(EncodingOptions(**options), range(len(samples)), processor)
    for found in findings(samples, check, workers):
        check.add(found)
    check_masks(samples, check)
    return check.summary(), check.stops(samples.faults)


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_of_records_as_training_encodes_them(folder, workers, monkeypatch):
    monkeypatch.setattr("cdfast.data_check.check._AT_ONCE", 2)  # so that there is work for both
    records = [
        record(),
        record("A very long story about a cat, " * 5),
        record(image=None),
        record("Two.", question="<image>\nSame?", image=["a.png", "a.png"]),
        record(),
    ]
    found, stops = checked(folder, records, workers=workers)
    dataset = load_dataset(folder / "d.json", folder, PROCESSOR)
    lengths = [len(dataset[n]["input_ids"]) for n in range(5)]
    answers = [int((dataset[n]["labels"] != -100).sum()) for n in range(5)]
    assert not stops
    assert not found["broken"]
    assert found["checked"] == found["usable"] == 5
    assert found["images_per_record"] == {"0": 1, "1": 3, "2": 1}
    total = found["tokens"]["total"]
    assert (total["min"], total["max"], total["sum"]) == (min(lengths), max(lengths), sum(lengths))
    assert total["median"] == sorted(lengths)[2]
    assert total["mean"] == pytest.approx(sum(lengths) / 5, abs=0.06)
    assert found["tokens"]["answer"]["sum"] == sum(answers)
    assert found["tokens"]["visual"]["sum"] == 5 * NUM_VISUAL
    assert found["tokens"]["visual"]["min"] == 0
    assert found["duplicates"]["records"] == 1
    assert found["duplicates"]["first"] == ["d.json, record 4 repeats d.json, record 0"]


def test_what_max_length_takes(folder):
    """Nothing, a part of an answer, a whole answer, all answers, an image."""
    two = {"conversations": conversation([("One?", "a"), ("Two?", "b")], "<image>\n")}
    records = [
        record("a", question="b"),
        record("A very long story about a cat, " * 5),
        {**two, "image": "a.png"},
        record("a", question="What " * 60),
        record("a", image=["a.png"] * 4, question="<image>\n" * 3 + "b"),
    ]
    whole, _ = checked(folder, records)
    lengths = [len(s["input_ids"]) for s in load_dataset(folder / "d.json", folder, PROCESSOR)]
    limit = lengths[2] - 6
    assert lengths[0] <= limit < min(lengths[1:])
    found, stops = checked(folder, records, max_length=limit)
    cut = found["truncation"]
    assert cut["sequences"] == 4
    assert cut["tokens_lost"] == sum(length - limit for length in lengths[1:])
    assert cut["answer_shortened"] == 4
    assert cut["whole_answer_lost"] == 3
    assert found["broken"]["nothing left within max_length"]["records"] == 2
    assert found["tokens"] == whole["tokens"]
    assert stops == ["2 records cannot be used, and on_error is 'raise'"]
    with pytest.raises(DataError, match="a part of an answer within"):
        [*iter(load_dataset(folder / "d.json", folder, PROCESSOR, max_length=limit))]


FAULTS = {
    "broken record": record(image=7),
    "image missing": record(image="absent.png"),
    "image corrupt": record(image="cut.png"),
    "image outside its root": record(image="../a.png"),
    "image is a URL": record(image="https://example.com/a.png"),
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_every_fault_is_counted_and_named_and_none_ends_the_check(folder, on_error):
    records = [record(), *FAULTS.values(), *[record(image="absent.png")] * 4]
    found, stops = checked(folder, records, on_error=on_error)
    assert {reason: f["records"] for reason, f in found["broken"].items()} == {
        **dict.fromkeys(FAULTS, 1),
        "image missing": 5,
    }
    assert found["usable"] == 1
    named = found["broken"]["image missing"]["first"]
    assert [text.split(":")[0] for text in named] == [f"d.json, record {n}" for n in (2, 6, 7)]
    assert "absent.png" in named[0]
    expected = ["9 records cannot be used, and on_error is 'raise'"] if on_error == "raise" else []
    assert stops == expected


def test_without_a_processor_records_and_images_are_checked(folder):
    found, _ = checked(folder, [record(), *FAULTS.values()], processor=None)
    assert {reason: f["records"] for reason, f in found["broken"].items()} == dict.fromkeys(
        FAULTS, 1
    )
    assert "tokens" not in found
    assert found["example"] is None


def test_nothing_usable_stops_whatever_the_policy(folder):
    _, stops = checked(folder, [record(image="absent.png")], on_error="skip")
    assert stops == ["no record can be used"]


def test_an_unexpected_error_is_a_finding_that_stops(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("not in this processor")

    monkeypatch.setattr("cdfast.encoding.process", fail)
    found, stops = checked(folder, [record()], on_error="skip")
    [message] = found["broken"]["unexpected error"]["first"]
    assert message == "d.json, record 0: TypeError: not in this processor"
    assert "1 records end in an error that none expects" in stops


def test_the_example_shows_what_is_trained_on(folder):
    found, _ = checked(folder, [record(image=None), record("A cat.")])
    example = found["example"]
    assert example["source"] == "d.json, record 1"
    kinds = [kind for kind, _ in example["parts"]]
    texts = [text for _, text in example["parts"]]
    assert kinds == ["prompt", "answer", "prompt"]
    assert f"[<image> x {NUM_VISUAL}]" in texts[0]
    assert texts[0].endswith("Which animal is it?<|im_end|>\n<|im_start|>assistant\n")
    assert texts[1] == "A cat.<|im_end|>"


def test_a_wrong_answer_mask_stops_the_run(folder, monkeypatch):
    def mismatch(*args):
        raise DataError("labels: expected others", reason="chat template")

    monkeypatch.setattr("cdfast.data_check.check.check_answers", mismatch)
    _, stops = checked(folder, [record()], on_error="skip")
    assert stops == ["the answer mask is wrong: labels: expected others"]


def test_pairs_have_two_sequences_and_are_never_cut(folder):
    records = [record("A cat.", rejected="A dog."), record(), record("a", rejected="b " * 200)]
    found, stops = checked(folder, records, pairs=True, max_length=100)
    assert {reason: f["records"] for reason, f in found["broken"].items()} == {
        "broken record": 1,
        "answer beyond max_length": 1,
    }
    assert found["tokens"]["visual"]["sum"] == 2 * NUM_VISUAL
    assert found["truncation"]["sequences"] == 0
    parts = found["example"]["parts"]
    assert [text for kind, text in parts if kind == "rejected"] == ["A dog.<|im_end|>"]
    assert len(stops) == 1


def test_a_chosen_number_is_evenly_spaced():
    assert list(evenly_spaced(10, 3)) == [0, 3, 6]
    assert evenly_spaced(10, 10) == evenly_spaced(10, None) == range(10)
    spaced = evenly_spaced(1_000_003, 1000)
    gaps = {b - a for a, b in itertools.pairwise(spaced)}
    assert gaps == {1000, 1001}


def recipe(folder, stages, **options):
    made = [StageRecipe(**stage) for stage in stages]
    return Recipe(name="mine", student="s", workers=0, stages=made, **options)


def test_data_of_several_stages_are_read_once(folder):
    made = recipe(
        folder,
        [
            {"stage": "dpt"},
            {"stage": "dft"},
            {"stage": "preference"},
            {"stage": "sft", "data": ["b"]},
        ],
        data=["a.json"],
        eval_data=["held.json"],
    )
    assert [(d.names, d.used_by) for d in data_sets(made)] == [
        (["a.json"], ["1 (dpt)", "2 (dft)"]),
        (["a.json"], ["3 (preference)"]),
        (["b"], ["4 (sft)"]),
        (["held.json"], ["held out"]),
        (["held.json"], ["held out, as pairs"]),
    ]


def run(folder, monkeypatch, records, processor=PROCESSOR, samples=None, **options):
    """(would run, what is printed, JSON)"""

    def load(recipe):
        if processor is None:
            from cdfast.config import ConfigError

            raise ConfigError("model 's' has a processor that cannot be loaded")
        return processor

    monkeypatch.setattr("cdfast.data_check.run.load_processor", load)
    (folder / "d.json").write_text(json.dumps(records))
    data = [str(folder / "d.json")]
    made = recipe(folder, [{"stage": "dpt"}, {"stage": "dft"}], **{"data": data, **options})
    console = Console(width=200, record=True, file=io.StringIO())
    path = folder / "out" / "check.json"
    fits = check_recipe_data(made, console, samples=samples, path=path)
    return fits, console.export_text(), json.loads(path.read_text())


def test_tables_and_file_say_the_same(folder, monkeypatch):
    records = [record(), *FAULTS.values(), record(image=None), record()]
    fits, printed, content = run(folder, monkeypatch, records)
    assert not fits
    assert not content["would_run"]
    [result] = content["data_sets"]
    assert result["records"] == result["checked"] == 8
    assert result["used_by"] == ["1 (dpt)", "2 (dft)"]
    assert "stages 1 (dpt), 2 (dft)" in printed
    for text in ("8: all", "5 (62.5%)", "0: 1; 1: 6", "A cat.<|im_end|>", "absent.png"):
        assert text in printed, text
    assert "the run would stop" in printed
    assert "5 records cannot be used, and on_error is 'raise'" in printed


def test_good_data_would_run(folder, monkeypatch):
    fits, printed, content = run(folder, monkeypatch, [record()] * 3, samples=2)
    assert fits
    assert content["would_run"]
    assert "2, evenly spaced" in printed
    assert "would not stop" in printed


def test_what_is_not_checked_without_a_processor_is_said(folder, monkeypatch):
    fits, printed, content = run(folder, monkeypatch, [record()], processor=None)
    assert fits
    assert "not checked: tokens, truncation and answer masks" in printed
    assert "has a processor that cannot be loaded" in content["not_checked"]


def test_a_processor_that_cannot_be_loaded_stops_the_run_where_its_model_is_here(
    folder, monkeypatch
):
    fits, printed, content = run(folder, monkeypatch, [record()], None, teacher=str(folder))
    assert not fits
    assert not content["would_run"]
    assert content["stops"] == ["model 's' has a processor that cannot be loaded"]
    assert "the run would stop: processor: model 's' has a processor" in printed
    assert content["data_sets"][0]["usable"] == 1


@pytest.mark.parametrize("processes, fits", [(5, True), (6, False)])
def test_a_stream_is_to_have_a_record_for_every_slot(folder, monkeypatch, processes, fits):
    """Counted as far as that asks, also where fewer are looked at."""
    lines = "".join(json.dumps(record(str(n))) + "\n" for n in range(5))
    (folder / "five.jsonl").write_text(lines)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = {"data": [str(folder / "five.jsonl")], "streaming": True, "samples": 2}
    found, printed, content = run(folder, monkeypatch, [], **given)
    assert content["data_sets"][0]["checked"] == 2
    assert found == fits
    assert ("expected records for 6 processes with 1 workers each" in printed) != fits


def test_files_that_cannot_be_read_stop_the_run_and_the_others_are_checked(folder, monkeypatch):
    (folder / "bad.json").write_text("{")
    files = [str(folder / name) for name in ("absent.json", "d.json", "bad.json")]
    fits, printed, content = run(folder, monkeypatch, [record()], data=files)
    assert not fits
    [result] = content["data_sets"]
    assert result["checked"] == 1
    assert len(result["stops"]) == 2
    assert "absent.json: file: expected an existing file" in printed


def test_an_interrupt_keeps_what_was_found(folder, monkeypatch):
    def stopping(samples, check, workers):
        yield from list(findings(samples, check, 0))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr("cdfast.data_check.run.findings", stopping)
    fits, printed, content = run(folder, monkeypatch, [record()] * 5)
    [result] = content["data_sets"]
    assert not fits
    assert "the check was stopped" in printed
    assert result["checked"] == 2
    assert not result["complete"]
    assert "2, then stopped" in printed


def test_of_a_stream_the_first_of_each_file_are_looked_at(folder, monkeypatch):
    (folder / "shards").mkdir()
    for n, count in enumerate((5, 1, 4)):
        made = [record(f"{n} {k}") for k in range(count)]
        lines = "".join(json.dumps(one) + "\n" for one in made)
        (folder / "shards" / f"{n}.jsonl").write_text(lines)
    (folder / "shards" / "3.tar").write_text("no tar")
    data, roots = [str(folder / "shards")], [str(folder)]
    given = {"data": data, "image_root": roots, "streaming": True}
    fits, printed, content = run(folder, monkeypatch, [], samples=12, **given)
    [result] = content["data_sets"]
    assert (result["checked"], result["usable"], result["records"]) == (7, 7, None)
    assert "7, the first of each file" in printed
    assert not fits
    assert "3.tar: file: expected a readable file" in printed
