"""Streamed data: every record once per pass whatever the split, and exactly resumed."""

import io
import itertools
import json
import tarfile
import warnings

import datasets
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, TrainerCallback

import cdfast.encoding
from cdfast import DistillationConfig, DistillationTrainer
from cdfast.collator import VisionTextCollator
from cdfast.config import Recipe, StageRecipe
from cdfast.data import DataError, load_dataset
from cdfast.shards import expand, references
from cdfast.stages.student import with_lora
from cdfast.storage import CheckpointError
from cdfast.streaming import StreamedDataset, records_of_slots
from cdfast.train import main
from tests.cdfast.command import options, refused
from tests.cdfast.photo_setup import conversation, make_processor, records

PROCESSOR = make_processor()


def text_record(n):
    return {"id": f"r{n}", "conversations": conversation([("Which?", f"Number {n}.")])}


def image_record(n, name="a.png"):
    made = conversation([("Which?", f"Number {n}.")], "<image>\n")
    return {"id": f"r{n}", "image": name, "conversations": made}


def write_lines(path, made):
    path.write_text("".join(json.dumps(record) + "\n" for record in made))
    return path


@pytest.fixture
def folder(tmp_path):
    """Files of 5, 3, 4 and 1 records about one picture, r0 to r12."""
    Image.effect_noise((40, 32), 60).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "data").mkdir()
    at = 0
    for n, size in enumerate((5, 3, 4, 1)):
        made = [image_record(i, "a.png") for i in range(at, at + size)]
        write_lines(tmp_path / "data" / f"{n}.jsonl", made)
        at += size
    return tmp_path


ALL = sorted(f"r{n}" for n in range(13))


def stream(folder, processor=PROCESSOR, batch_size=1, **options):
    return StreamedDataset([folder / "data"], [folder], processor, batch_size=batch_size, **options)


def name(source):
    return source.rpartition("id ")[2].rstrip(")")


def names(data, number, **loader):
    """Ids of the first samples that a loader gives out."""
    loaded = DataLoader(
        data, batch_size=data.batch_size, num_workers=data.workers, collate_fn=list, **loader
    )
    batches = itertools.islice(loaded, -(-number // data.batch_size))
    return [name(sample["source"]) for batch in batches for sample in batch][:number]


def passes(data, slot, number):
    """The ids of a slot's first passes, one list for each, without reading a record's image."""
    found = []
    for epoch in range(number):
        found.append([r.load()["id"] for r in data._pass(slot, epoch)])
    return found


@pytest.mark.parametrize(
    "world, workers", [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (5, 1)]
)
def test_slots_have_disjoint_records_whose_union_is_everything(folder, world, workers):
    """In every pass; files of their own as far as they go, else records by turns."""
    data = stream(folder, workers=workers, world_size=world)
    slots = world * workers
    for epoch in range(2):
        parts = [[r.load()["id"] for r in data._pass(slot, epoch)] for slot in range(slots)]
        assert sorted(itertools.chain(*parts)) == ALL
        assert records_of_slots((5, 3, 4, 1), slots) == list(map(len, parts))
        if slots == 4:
            assert sorted(map(len, parts)) == [1, 3, 4, 5]
        if slots in (3, 5):
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_two_ranks_see_disjoint_records_through_their_loaders(folder):
    """One file, so that both take turns in it: 7 and 6 of its 13 records."""
    made = [image_record(n) for n in range(13)]
    for path in (folder / "data").iterdir():
        path.unlink()
    write_lines(folder / "data" / "all.jsonl", made)
    parts = [
        names(stream(folder, rank=rank, world_size=2, window=3), 7 - rank) for rank in range(2)
    ]
    assert sorted(parts[0] + parts[1]) == ALL
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_over_passes_in_other_orders(folder, workers):
    """Uneven files end no rank: 13 records, 5 passes."""
    data = stream(folder, workers=workers)
    given = names(data, 65)
    assert set(given[:26]) == set(ALL) or workers
    if not workers:
        split = [given[n : n + 13] for n in range(0, 65, 13)]
        assert all(sorted(part) == ALL for part in split)
        assert len({tuple(part) for part in split}) == 5
        assert split[0] != sorted(split[0], key=lambda text: int(text[1:]))


def test_the_order_is_that_of_the_seed_and_one_record_windows_keep_the_files_order(folder):
    assert names(stream(folder, seed=1), 13) == names(stream(folder, seed=1), 13)
    assert names(stream(folder, seed=1), 13) != names(stream(folder, seed=2), 13)
    plain = names(stream(folder, window=1), 13)
    for start, size in ((0, 5), (5, 3), (8, 4)):
        at = plain.index(f"r{start}")
        assert plain[at : at + size] == [f"r{n}" for n in range(start, start + size)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("done", [1, 2, 5, 11, 40])
def test_a_stream_goes_on_where_it_was(folder, workers, done):
    """Through windows and passes; 40 batches of 2 are several passes of every slot."""
    data = stream(folder, batch_size=2, workers=workers, window=3)
    slots = max(workers, 1)
    whole = [name for batch in emitted(data, slots, done + 6) for name in batch]
    data.begin_at(done)
    rest = [name for batch in emitted(data, slots, 6) for name in batch]
    assert rest == whole[2 * done :]


def emitted(data, slots, batches):
    """What a loader of `slots` workers would give out, without starting them."""
    first = data._batch
    streams = []
    for worker in range(slots):
        slot = (first + worker) % slots
        done = len(range(slot, first, slots)) * data.batch_size
        streams.append(
            r.load()["id"] for _, several, n in data._windows(slot, done) for r in several[n:]
        )
    return [list(itertools.islice(streams[b % slots], data.batch_size)) for b in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_out_what_the_windows_say_and_resume_there(folder, workers):
    data = stream(folder, batch_size=2, workers=workers, window=3)
    expected = [name for batch in emitted(data, max(workers, 1), 12) for name in batch]
    assert names(data, 24) == expected
    data.begin_at(5)
    assert names(data, 14) == expected[10:]


def test_nothing_that_is_passed_over_is_decoded(folder, monkeypatch):
    data = stream(folder)
    opened = []
    load_image = cdfast.encoding.load_image

    def counted(*args, **kwargs):
        opened.append(args[1])
        return load_image(*args, **kwargs)

    monkeypatch.setattr(cdfast.encoding, "load_image", counted)
    data.begin_at(11)
    given = names(data, 3)
    assert [name(source) for source in opened] == given


def test_with_workers_the_main_process_opens_no_image(folder, monkeypatch):
    """Neither decodes nor reads a header of one: training waits for finished tensors alone."""
    data = stream(folder, workers=2)
    (folder / "d.json").write_text(json.dumps([image_record(n) for n in range(8)]))
    mapped = load_dataset(folder / "d.json", folder, PROCESSOR)

    def forbidden(*args, **kwargs):
        raise AssertionError("an image was opened")

    def here(*args, **kwargs):
        if torch.utils.data.get_worker_info() is None:
            forbidden()
        return opened(*args, **kwargs)

    opened = Image.open
    monkeypatch.setattr(Image, "open", here)
    assert len(names(data, 6)) == 6
    loaded = DataLoader(mapped, batch_size=2, num_workers=2, collate_fn=list)
    assert sum(len(batch) for batch in loaded) == 8
    with pytest.raises(DataError, match="an image was opened"):
        mapped[0]


def add(tar, path, content):
    info = tarfile.TarInfo(path)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_tar(path, made, picture):
    with tarfile.open(path, "w") as tar:
        for n, record in enumerate(made):
            several = isinstance(record.get("image"), list)
            if "image" in record:
                for k in range(len(record["image"]) if several else 1):
                    add(tar, f"part/{n:05}.{f'{k}.' if several else ''}png", picture)
            add(tar, f"part/{n:05}.json", json.dumps(record).encode())
    return path


def in_format(kind, folder, made):
    if kind == "jsonl":
        return write_lines(folder / "d.jsonl", made)
    if kind == "tar":
        return as_tar(folder / "d.tar", made, (folder / "a.png").read_bytes())
    rows = datasets.Dataset.from_list([{**r, "image": r.get("image")} for r in made])
    if kind == "parquet":
        rows.to_parquet(folder / "d.parquet")
        return folder / "d.parquet"
    rows.save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "tar"])
def test_every_format_gives_the_samples_of_the_same_records(folder, kind):
    made = [image_record(0), text_record(1), *(image_record(n) for n in range(2, 90))]
    path = in_format(kind, folder, made)
    (folder / "d.json").write_text(json.dumps(made))
    expected = load_dataset(folder / "d.json", folder, PROCESSOR)
    data = StreamedDataset([path], [folder], PROCESSOR, batch_size=1, window=1)
    found = list(itertools.islice(data, 90))
    assert [name(s["source"]) for s in found] == [f"r{n}" for n in range(90)]
    for n in (0, 1, 2, 64, 89):
        assert torch.equal(found[n]["input_ids"], expected[n]["input_ids"])
        assert torch.equal(found[n]["labels"], expected[n]["labels"])
        assert found[n]["images"].keys() == expected[n]["images"].keys()
        for key, value in expected[n]["images"].items():
            assert torch.equal(found[n]["images"][key], value)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_parquet_path_is_no_pattern(folder, streamed):
    """Neither fails where it has brackets, nor reads what a * would match."""
    within = folder / "run[1]"
    within.mkdir()
    for file, n in (("a*.parquet", 0), ("ab.parquet", 1)):
        datasets.Dataset.from_list([text_record(n)]).to_parquet(within / file)
    path = within / "a*.parquet"
    if streamed:
        found = [reference.load()["id"] for reference in references(path, "a")]
    else:
        data = load_dataset(path, folder, PROCESSOR)
        found = [name(data[n]["source"]) for n in range(len(data))]
    assert found == ["r0"]


def test_several_images_of_a_tar_record_stand_in_their_order(folder):
    pictures = []
    for colour in ("red", "blue"):
        content = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(content, "png")
        pictures.append(content.getvalue())
    record = {"conversations": conversation([("Same?", "No.")], "<image>\n<image>\n")}
    with tarfile.open(folder / "two.tar", "w") as tar:
        add(tar, "x.1.png", pictures[1])
        add(tar, "x.json", json.dumps(record).encode())
        add(tar, "x.0.png", pictures[0])
    data = StreamedDataset([folder / "two.tar"], [], PROCESSOR, batch_size=1)
    pixels = next(iter(data))["images"]["pixel_values"]
    assert pixels[0, 0].mean() > pixels[0, 2].mean()
    assert pixels[1, 0].mean() < pixels[1, 2].mean()


def test_images_of_a_tar_record_are_ordered_by_number_and_headers_are_not_kept(folder, monkeypatch):
    """10.png is behind 2.png; a shard's headers do not pile up in memory."""
    record = {"conversations": conversation([("Same?", "No.")], "<image>\n" * 12)}
    with tarfile.open(folder / "many.tar", "w") as tar:
        for n in (10, 3, 0, 11, 1, 2, 4, 5, 6, 7, 8, 9):
            add(tar, f"x.{n}.png", str(n).encode())
        add(tar, "x.json", json.dumps(record).encode())
    kept = []
    step = tarfile.TarFile.next
    monkeypatch.setattr(
        tarfile.TarFile, "next", lambda file: (kept.append(len(file.members)), step(file))[1]
    )
    [reference] = references(folder / "many.tar", "many.tar")
    images = reference.load()["images"]
    assert [image["bytes"] for image in images] == [str(n).encode() for n in range(12)]
    assert max(kept) <= 1


def test_a_tar_shard_leads_out_of_itself_nowhere(folder):
    """A link is no image, a name that climbs is only a name, and nothing is written."""
    record = json.dumps(image_record(0)).encode()
    with tarfile.open(folder / "evil.tar", "w") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "a.png")
        tar.addfile(link)
        add(tar, "x.json", record)
    with pytest.raises(DataError, match=r"evil.tar, record 0 .*in none of the image roots"):
        StreamedDataset([folder / "evil.tar"], [folder / "data"], PROCESSOR, batch_size=1)
    with tarfile.open(folder / "evil.tar", "w") as tar:
        add(tar, "../../up.png", (folder / "a.png").read_bytes())
        add(tar, "../../up.json", record)
    before = sorted(folder.rglob("*"))
    data = StreamedDataset([folder / "evil.tar"], [], PROCESSOR, batch_size=1)
    assert next(iter(data))["images"]
    assert sorted(folder.rglob("*")) == before


def test_a_folder_gives_its_files_in_order_and_saved_sets_count_as_one(folder):
    in_format("saved", folder, [text_record(0)])
    found = expand([folder / "data", folder / "saved"])
    assert [path.name for path in found] == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "saved"]


UNUSABLE = {
    "list": ("d.json", "[]", r"one record a line as .jsonl"),
    "compressed": ("d.tar.gz", "x", r"expected .jsonl, .parquet, .tar"),
    "not a tar": ("d.tar", "no tar", r"d.tar: file: expected a readable file"),
    "not parquet": ("d.parquet", "no parquet", r"d.parquet: file: expected a readable file"),
    "empty": ("d.jsonl", "\n", "too few of them in 1 files"),
    "absent": ("absent.jsonl", None, "expected an existing file"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_cannot_be_streamed_is_named(tmp_path, case):
    file, content, words = UNUSABLE[case]
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=words):
        StreamedDataset([tmp_path / file], [], PROCESSOR, batch_size=1)


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(DataError, match="none of them"):
        StreamedDataset([tmp_path], [], PROCESSOR, batch_size=1)


def test_a_set_smaller_than_the_slots_is_refused_when_it_is_read(folder):
    data = stream(folder, rank=0, world_size=14)
    assert names(data, 1)
    with pytest.raises(DataError, match="records for 14 processes"):
        next(iter(stream(folder, rank=13, world_size=14)))


def broken_folder(folder):
    made = one_file(folder, 8, lost=(2, 5))
    made[6]["conversations"] = []
    write_lines(folder / "data" / "x.jsonl", made)
    return folder


def one_file(folder, count, lost):
    """In place of the others: records of one file, some without their image."""
    for path in (folder / "data").iterdir():
        path.unlink()
    made = [image_record(n, "absent.png" if n in lost else "a.png") for n in range(count)]
    write_lines(folder / "data" / "x.jsonl", made)
    return made


def test_broken_records_stop_the_stream_or_are_replaced_and_counted(folder):
    broken_folder(folder)
    with pytest.raises(DataError, match=r"x.jsonl, record 2 \(line 3, id r2\)"):
        names(stream(folder, window=1), 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = stream(folder, on_error="skip")
        given = names(data, 16)
    assert set(given) == {f"r{n}" for n in (0, 1, 3, 4, 7)}
    assert data.skipped == {"image missing": 4, "broken record": 2}
    assert len([w for w in caught if "the next good record" in str(w.message)]) == 2
    data = stream(folder, on_error="skip")
    data.begin_at(9)
    assert names(data, 7) == given[9:]


# Records, window, those without an image, ranks.
LOST = {
    "short last window": (9, 4, {8}, 1),
    "windows of one": (9, 1, {0, 1, 4, 8}, 1),
    "window in the middle": (9, 3, {3, 4, 5}, 1),
    "two slots": (9, 2, {4, 6, 8}, 2),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.filterwarnings("ignore:image missing")
def test_a_window_without_a_usable_record_is_given_those_of_the_next(folder, case):
    """Every rank goes on for as long as it is asked, and resumes at any of its samples."""
    count, window, lost, ranks = LOST[case]
    one_file(folder, count, lost)
    for rank in range(ranks):
        part = {"rank": rank, "world_size": ranks, "window": window, "on_error": "skip"}
        whole = names(stream(folder, **part), 3 * count)
        assert len(whole) == 3 * count
        assert set(whole) == {f"r{n}" for n in range(rank, count, ranks) if n not in lost}
        for done in range(1, count + 2):
            data = stream(folder, **part)
            data.begin_at(done)
            assert names(data, count) == whole[done : done + count]


@pytest.mark.filterwarnings("ignore:image missing")
def test_a_stream_of_windows_of_one_gives_the_next_good_record_and_counts_once(folder):
    one_file(folder, 9, lost=LOST["windows of one"][2])
    data = stream(folder, on_error="skip", window=1)
    assert names(data, 18) == [f"r{n}" for n in (2, 2, 2, 3, 5, 5, 6, 7, 2)] * 2
    assert data.skipped == {"image missing": 2 * len(LOST["windows of one"][2])}


@pytest.mark.filterwarnings("ignore:image missing")
def test_loader_workers_go_on_behind_a_window_without_a_usable_record(folder):
    one_file(folder, 9, lost={7, 8})
    data = stream(folder, on_error="skip", window=4, workers=2)
    whole = names(data, 18)
    assert set(whole) == {f"r{n}" for n in range(7)}
    data.begin_at(7)
    assert names(data, 11) == whole[7:]


@pytest.mark.filterwarnings("ignore:image missing")
def test_a_part_without_a_usable_record_in_a_whole_pass_is_named(folder):
    one_file(folder, 6, lost={1, 3, 5})
    part = {"world_size": 2, "window": 1, "on_error": "skip"}
    assert names(stream(folder, rank=0, **part), 4) == ["r0", "r2", "r4", "r0"]
    words = r"among those of rank 1, loader worker 0, got none: {'image missing': 6}.*--workers"
    with pytest.raises(DataError, match=words):
        names(stream(folder, rank=1, **part), 1)
    one_file(folder, 6, lost=range(6))
    with pytest.raises(DataError, match=r"among all, got none: {'image missing': 6}"):
        stream(folder, on_error="skip")


@pytest.mark.filterwarnings("ignore:image missing")
def test_samples_for_probes_begin_with_the_first_that_can_be_used(folder):
    one_file(folder, 9, lost={0, 1, 3})
    data = stream(folder, on_error="skip", window=3)
    assert [name(sample["source"]) for sample in data.first()] == ["r2", "r4"]


def test_counts_of_workers_are_summed(folder):
    broken_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = stream(folder, on_error="skip", workers=2, max_length=40)
        taken = names(data, 40, prefetch_factor=1)
    assert len(taken) == 40
    assert data.skipped["image missing"] >= 8
    assert data.truncated == 0 or data.truncated >= 20


def test_a_second_iteration_of_workers_that_are_kept_is_refused(folder):
    """They would begin where the first one began, whatever begin_at has said since."""
    data = stream(folder, workers=1)
    loader = DataLoader(data, batch_size=1, num_workers=1, collate_fn=list, persistent_workers=True)
    first = [name(batch[0]["source"]) for batch in itertools.islice(loader, 2)]
    assert first == names(data, 2)
    data.begin_at(2)
    with pytest.raises(ValueError, match="persistent_workers: expected False"):
        next(iter(loader))


def test_a_loader_of_other_workers_is_refused(folder):
    data = stream(folder, workers=2)
    with pytest.raises(ValueError, match=r"expected a loader of 2 workers.*got 1"):
        next(iter(DataLoader(data, batch_size=1, num_workers=0, collate_fn=list)))


# -- in the trainer --------------------------------------------------------------------------------


class Killed(Exception):
    """In place of a signal."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trainer(paths, folder, out, workers, kill_at=None, **changed):
    """LoRA with dropout, so that the random generators must be resumed too."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(paths.teacher)
    recipe = Recipe(student="s", lora_r=4, lora_dropout=0.2, stages=[StageRecipe(stage="sft")])
    model.requires_grad_(False)
    options = {
        "max_steps": 5,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "dataloader_num_workers": workers,
        "kl_weight": 0.0,
        "alignment_weight": 0.0,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        **changed,
    }
    return DistillationTrainer(
        model=with_lora(model, recipe),
        args=DistillationConfig(output_dir=str(out), **options),
        train_dataset=stream(folder, batch_size=2, workers=workers, window=4),
        data_collator=VisionTextCollator(PROCESSOR.tokenizer.pad_token_id),
        callbacks=[KillAt(kill_at)] if kill_at else [],
    )


def losses(trained):
    log = [entry for entry in trained.state.log_history if "loss" in entry]
    return [(entry["step"], entry["loss"], entry["grad_norm"], entry["epoch"]) for entry in log]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_as_if_it_had_not_been(paths, folder, tmp_path, workers):
    whole = trainer(paths, folder, tmp_path / "whole", workers)
    whole.train()
    with pytest.raises(Killed):
        trainer(paths, folder, tmp_path / "run", workers, kill_at=3).train()
    resumed = trainer(paths, folder, tmp_path / "run", workers)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == 5
    assert len({loss for _, loss, *_ in losses(whole)}) == 5
    assert losses(resumed) == losses(whole)
    for changed, words in (
        ({"workers": 3}, f"workers of the streamed data was {max(workers, 1)}; got 3"),
        ({"gradient_accumulation_steps": 1}, "steps of the streamed data was 2; got 1"),
        ({}, r"files of the streamed data was 4 \(names and sizes"),
    ):
        if not changed:
            write_lines(folder / "data" / "0.jsonl", [image_record(0)])
        other = trainer(paths, folder, tmp_path / "run", **{"workers": workers, **changed})
        with pytest.raises(CheckpointError, match=words):
            other.train(resume_from_checkpoint=True)


def test_a_stream_for_other_batches_than_the_trainers_is_refused(paths, folder, tmp_path):
    other = trainer(paths, folder, tmp_path, 0, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"made for {'batch_size': 1, .*got one for .*: 2"):
        other.train()


def test_the_command_streams_and_asks_for_a_number_of_steps(paths, tmp_path, capsys):
    data = write_lines(tmp_path / "photos.jsonl", records())
    made = {"name": "one", "streaming": True, "workers": 1, "stages": [{"stage": "dpt"}]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(made))
    given = [str(tmp_path / "one.yaml"), *options(paths, tmp_path / "run", data=data)]
    line = refused(["miniature", "--streaming", "true"], capsys)
    assert "streaming: expected data files, because embedded scenes are generated" in line
    line = refused(given, capsys)
    assert "max_steps: stage 1 (dpt): expected at least 1, because streamed data" in line
    assert "--dpt.max-steps N" in line
    main([*given, "--max-steps", "1", "--batch-size", "2"])
    stage = json.loads((tmp_path / "run" / "stages" / "1-dpt" / "stage.json").read_text())
    assert stage["steps"] == 1
    assert (tmp_path / "run" / "results.json").exists()
