"""The shared vision encoder, students put together from parts, and what a stage trains."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from cdfast.adapters import (
    SharedVisionTower,
    assemble_student,
    set_trainable,
    share_vision_tower,
    vision_tower,
)
from cdfast.modeling_cdfast_llava import (
    CdfastLlavaConfig,
    CdfastLlavaForConditionalGeneration,
    FetchedAdapterProjector,
)
from tests.cdfast.tiny_models import (
    IMAGE_TOKEN,
    tiny_batch,
    tiny_language_model,
    tiny_llava,
    tiny_teacher,
)


def model_batch(**options):
    batch = tiny_batch(**options)
    return {name: value for name, value in batch.items() if name != "labels"}


def pair(**student):
    """A teacher and a LLaVA student with the same vision encoder, in objects of their own."""
    teacher, student = tiny_teacher(), tiny_llava(**student).eval()
    tower = teacher.model.vision_tower.state_dict()
    student.model.vision_tower.load_state_dict(tower)
    return teacher, student


@torch.no_grad()
def logits(model, batch=None):
    return model(**(batch or model_batch())).logits


def same_state(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# -- the shared vision encoder ---------------------------------------------------------------------


def test_sharing_changes_no_logits_and_runs_the_encoder_once():
    teacher, student = pair()
    want = logits(teacher), logits(student)
    shared = share_vision_tower(teacher, student)
    batch = model_batch()
    got = logits(teacher, batch), logits(student, batch)
    assert shared.runs == 1
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    assert torch.equal(logits(student, batch), want[1])
    assert shared.runs == 1


def test_other_images_run_the_encoder_again():
    shared = share_vision_tower(*pair())
    pixels = model_batch()["pixel_values"]
    first = shared(pixels).last_hidden_state
    other = shared(pixels + 1).last_hidden_state
    assert shared.runs == 2
    assert not torch.allclose(first, other)
    assert torch.equal(shared(pixels).last_hidden_state, first)
    assert shared.runs == 3


def test_a_caller_that_writes_into_the_output_does_not_spoil_it():
    shared = share_vision_tower(*pair())
    pixels = model_batch()["pixel_values"]
    output = shared(pixels)
    want = output.last_hidden_state
    output.last_hidden_state = None
    assert torch.equal(shared(pixels).last_hidden_state, want)
    assert shared.runs == 1


def test_options_are_part_of_what_is_remembered():
    shared = share_vision_tower(*pair())
    pixels = model_batch()["pixel_values"]
    assert shared(pixels).hidden_states is None
    assert len(shared(pixels, output_hidden_states=True).hidden_states) == 3
    assert shared.runs == 2
    shared(pixels, output_hidden_states=True, use_cache=False)
    assert shared.runs == 2


def test_state_dict_has_the_names_of_a_model_of_its_own():
    teacher, student = pair()
    want = student.state_dict(), teacher.state_dict()
    share_vision_tower(teacher, student)
    assert same_state(student.state_dict(), want[0])
    assert same_state(teacher.state_dict(), want[1])


def test_shared_parameters_are_hidden_from_optimizers_and_frozen():
    teacher, student = pair()
    tower = student.model.vision_tower
    before = {name for name, _ in student.named_parameters()}
    shared = share_vision_tower(teacher, student)
    after = {name for name, _ in student.named_parameters()}
    assert before - after == {f"model.vision_tower.{name}" for name, _ in tower.named_parameters()}
    assert after < before
    assert list(shared.parameters()) == []
    assert list(shared.buffers()) == []
    assert not any(p.requires_grad for p in shared.tower.parameters())
    loss = student(**tiny_batch()).loss
    loss.backward()
    assert all(p.grad is None for p in shared.tower.parameters())
    assert student.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_training_mode_leaves_the_encoder_in_evaluation():
    teacher, student = pair()
    shared = share_vision_tower(teacher, student)
    student.train()
    assert student.model.language_model.training
    assert not any(module.training for module in shared.tower.modules())


def test_moving_a_model_moves_the_encoder():
    shared = share_vision_tower(*pair())
    model = torch.nn.Sequential(shared)
    pixels = model_batch()["pixel_values"].double()
    model.to(torch.float64)
    assert {p.dtype for p in shared.tower.parameters()} == {torch.float64}
    assert shared(pixels).last_hidden_state.dtype == torch.float64
    runs = shared.runs
    model.to(torch.float32)  # what was computed before is of the other dtype
    assert shared(pixels).last_hidden_state.dtype == torch.float32
    assert shared.runs == runs + 1


def test_checkpoint_of_a_sharing_model_loads_without_sharing(tmp_path):
    teacher, student = pair()
    share_vision_tower(teacher, student)
    student.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert not isinstance(loaded.model.vision_tower, SharedVisionTower)
    assert same_state(loaded.state_dict(), student.state_dict())
    assert torch.equal(logits(loaded), logits(student))


def test_state_dict_loads_into_a_sharing_model():
    teacher, student = pair()
    shared = share_vision_tower(teacher, student)
    other = tiny_llava(seed=7)
    result = student.load_state_dict(other.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same_state(shared.tower.state_dict(), other.model.vision_tower.state_dict())
    assert torch.equal(logits(student), logits(other.eval()))
    broken = other.state_dict()
    gone = next(name for name in broken if "vision_tower" in name)
    broken.pop(gone)
    broken["model.vision_tower.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as refused:
        student.load_state_dict(broken)
    assert gone in str(refused.value)
    assert "model.vision_tower.extra" in str(refused.value)


@pytest.mark.parametrize("change", ["value", "shape", "missing"])
def test_encoders_that_differ_are_refused_by_the_parameters_name(change):
    teacher, student = pair()
    tower = student.model.vision_tower
    name = next(n for n, _ in tower.named_parameters() if n.endswith("mlp.fc1.bias"))
    owner = tower.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        if change == "value":
            owner.bias[0] += 1e-3
        else:
            owner.bias = torch.nn.Parameter(torch.zeros(5)) if change == "shape" else None
    with pytest.raises(ValueError, match="expected teacher and student") as refused:
        share_vision_tower(teacher, student)
    assert f"{name} differs (1 in all)" in str(refused.value)
    assert not isinstance(teacher.model.vision_tower, SharedVisionTower)


def test_a_second_student_shares_the_same_encoder():
    teacher, student = pair()
    first = share_vision_tower(teacher, student)
    _, other = pair(seed=5)
    assert share_vision_tower(teacher, other).tower is first.tower
    batch = model_batch()
    for model in (teacher, student, other):
        logits(model, batch)
    assert first.runs == 1


def test_hooks_on_one_model_do_not_fire_in_the_other():
    """As an engine's do, which would take the other model's forward for its own."""
    teacher, student = pair()
    share_vision_tower(teacher, student)
    fired = []
    for module in student.modules():
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    logits(teacher)
    assert not fired


@pytest.mark.parametrize("narrow", ["teacher", "student"])
def test_unequal_dtypes_keep_the_exact_encoder(narrow):
    """As loaded in two dtypes from equal checkpoints: each adapter reads its own dtype."""
    teacher, student = pair()
    exact = copy.deepcopy(teacher.model.vision_tower.state_dict())
    want = logits(teacher), logits(student)
    {"teacher": teacher, "student": student}[narrow].to(torch.bfloat16)
    shared = share_vision_tower(teacher, student)
    assert same_state(shared.tower.state_dict(), exact)
    batch = model_batch()
    got = logits(teacher, batch), logits(student, batch)
    assert shared.runs == 1
    assert [g.dtype == torch.bfloat16 for g in got] == [narrow == "teacher", narrow == "student"]
    for g, w in zip(got, want):
        assert (g.float() - w).norm() <= (0.1 if g.dtype == torch.bfloat16 else 0) * w.norm()


def test_vision_tower_of_other_families_and_of_none():
    config = Qwen2_5_VLConfig()
    config.text_config.update(
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 50,
        }
    )
    config.vision_config.update(
        {"hidden_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    parent, name, tower = vision_tower(model)
    assert getattr(parent, name) is tower
    assert name == "visual"
    with pytest.raises(ValueError, match="qwen2: expected a vision encoder named one of"):
        vision_tower(tiny_language_model())


# -- students put together from parts --------------------------------------------------------------


def by_hand(teacher, student, batch):
    """Logits of P_s(P_t(z)) written out with the parts of both models."""
    tower, adapter = teacher.model.vision_tower, teacher.model.multi_modal_projector
    z = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
    hidden = adapter(z)
    projector = student.model.multi_modal_projector
    hidden = projector.linear_1(hidden)
    if projector.linear_2 is not None:
        hidden = projector.linear_2(torch.nn.functional.gelu(hidden))
    embedded = student.get_input_embeddings()(batch["input_ids"])
    embedded[batch["input_ids"] == IMAGE_TOKEN] = hidden.flatten(0, 1)
    states = student.model.language_model(
        inputs_embeds=embedded, attention_mask=batch["attention_mask"]
    ).last_hidden_state
    return student.lm_head(states)


@pytest.mark.parametrize("projector", ["mlp", "linear"])
@pytest.mark.parametrize("kind", ["language model", "llava"])
def test_taf_student_computes_the_students_projector_of_the_teachers_adapter(projector, kind):
    teacher = tiny_teacher()
    source = tiny_llava() if kind == "llava" else tiny_language_model()
    student = assemble_student(teacher, source, taf=True, student_projector=projector).eval()
    assert isinstance(student, CdfastLlavaForConditionalGeneration)
    own = source.model.language_model if kind == "llava" else source.model
    assert same_state(student.model.language_model.state_dict(), own.state_dict())
    assert torch.equal(student.lm_head.weight, source.lm_head.weight)
    fetched = student.model.multi_modal_projector.teacher.state_dict()
    assert same_state(fetched, teacher.model.multi_modal_projector.state_dict())
    assert (student.model.multi_modal_projector.linear_2 is None) == (projector == "linear")
    batch = model_batch()
    with torch.no_grad():
        want = by_hand(teacher, student, batch)
    live = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(student, batch)[live], want[live], atol=1e-5, rtol=1e-5)


def test_student_without_taf_is_a_plain_llava_model():
    teacher, source = tiny_teacher(), tiny_language_model()
    student = assemble_student(teacher, source, taf=False)
    assert type(student) is LlavaForConditionalGeneration
    assert same_state(student.model.language_model.state_dict(), source.model.state_dict())
    tower = student.model.vision_tower.state_dict()
    assert same_state(tower, teacher.model.vision_tower.state_dict())
    assert student.model.multi_modal_projector.linear_1.out_features == 32


def test_llava_student_without_taf_is_taken_as_it_is_with_the_teachers_encoder():
    teacher, source = tiny_teacher(), tiny_llava()
    projector = copy.deepcopy(source.model.multi_modal_projector.state_dict())
    student = assemble_student(teacher, source, taf=False)
    assert student is source
    assert same_state(student.model.multi_modal_projector.state_dict(), projector)
    tower = student.model.vision_tower.state_dict()
    assert same_state(tower, teacher.model.vision_tower.state_dict())


@pytest.mark.parametrize("taf", [True, False])
def test_tied_embeddings_stay_tied(taf, tmp_path):
    source = tiny_language_model(tie=True)
    student = assemble_student(tiny_teacher(), source, taf=taf)
    assert student.lm_head.weight is student.get_input_embeddings().weight
    assert torch.equal(student.lm_head.weight, source.lm_head.weight)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, source.lm_head.weight)


@pytest.mark.parametrize("kind", ["language model", "llava"])
@pytest.mark.parametrize("tie", [False, True])
def test_image_token_outside_the_students_vocabulary_makes_room(kind, tie):
    teacher, vocab = tiny_teacher(), 80
    source = tiny_language_model(vocab=vocab, tie=tie)
    if kind == "llava":
        source = tiny_llava(vocab=vocab, tie=tie)
    embeddings = source.get_input_embeddings().weight.detach().clone()
    head = source.lm_head.weight.detach().clone()
    student = assemble_student(teacher, source, taf=True)
    assert student.config.text_config.vocab_size == IMAGE_TOKEN + 1
    assert student.get_input_embeddings().weight.shape[0] == IMAGE_TOKEN + 1
    assert torch.equal(student.get_input_embeddings().weight[:vocab], embeddings)
    assert torch.equal(student.lm_head.weight[:vocab], head)
    assert (student.lm_head.weight is student.get_input_embeddings().weight) == tie
    batch = model_batch()
    text = batch["input_ids"] != IMAGE_TOKEN
    batch["input_ids"][text] = batch["input_ids"][text] % vocab
    assert logits(student, batch).isfinite().all()


def test_teachers_that_no_student_can_be_built_from_are_refused():
    with pytest.raises(ValueError, match=r"expected a LLaVA model \(model_type 'llava'\)"):
        assemble_student(tiny_language_model(), tiny_language_model(), taf=False)
    taf_student = assemble_student(tiny_teacher(), tiny_language_model(), taf=True)
    with pytest.raises(ValueError, match="plain adapter to fetch"):
        assemble_student(taf_student, tiny_language_model(seed=9), taf=True)
    second = assemble_student(taf_student, tiny_language_model(seed=9), taf=False)
    assert second.config.model_type == "llava"


def test_half_precision_parts_give_a_half_precision_student():
    student = assemble_student(tiny_teacher(), tiny_language_model().to(torch.bfloat16), taf=True)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


# -- what a stage trains ---------------------------------------------------------------------------


PROJECTOR = {
    f"model.multi_modal_projector.linear_{n}.{p}" for n in (1, 2) for p in ("weight", "bias")
}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_set_trainable_freezes_everything_else():
    student = assemble_student(tiny_teacher(), tiny_language_model(), taf=True)
    everything = {name for name, _ in student.named_parameters()}
    text = {n for n in everything if n.startswith(("model.language_model.", "lm_head."))}
    assert len(text) > 30
    set_trainable(student, projector=True, language_model=False)
    assert trained(student) == PROJECTOR
    set_trainable(student, projector=True, language_model=True)
    assert trained(student) == PROJECTOR | text
    set_trainable(student, projector=False, language_model=True)
    assert trained(student) == text
    set_trainable(student, projector=False, language_model=False)
    assert trained(student) == set()


def test_set_trainable_of_a_plain_llava_model():
    student = tiny_llava()
    set_trainable(student, projector=True, language_model=False)
    assert trained(student) == PROJECTOR


# -- the student's class ---------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_checkpoint_of_a_taf_student_loads_by_its_registered_class(projector, tmp_path):
    student = assemble_student(
        tiny_teacher(), tiny_language_model(), taf=True, student_projector=projector
    ).eval()
    student.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_cdfast_llava.py").is_file()
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CdfastLlavaConfig
    assert config.student_projector == projector
    assert config.teacher_hidden_size == 48
    assert set(config.auto_map) == {"AutoConfig", "AutoModelForImageTextToText"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is CdfastLlavaForConditionalGeneration
    assert same_state(loaded.state_dict(), student.state_dict())
    assert torch.equal(logits(loaded), logits(student))


def test_generation_continues_as_the_forward_says():
    torch.manual_seed(0)
    student = assemble_student(tiny_teacher(), tiny_language_model(), taf=True).eval()
    batch = model_batch(batch=1, padding=None)
    answer = student.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    prompt = batch["input_ids"].shape[1]
    assert answer.shape == (1, prompt + 4)
    for at in range(prompt, prompt + 4):
        prefix = {"input_ids": answer[:, :at], "pixel_values": batch["pixel_values"]}
        scores = logits(student, prefix)[0, -1]
        scores[student.generation_config.eos_token_id] = -torch.inf
        assert answer[0, at] == scores.argmax()


def test_projector_options_are_checked():
    config = CdfastLlavaConfig(student_projector="deep", teacher_hidden_size=8)
    with pytest.raises(ValueError, match="student_projector: expected 'mlp' or 'linear'"):
        FetchedAdapterProjector(config)
    with pytest.raises(ValueError, match="teacher_hidden_size: expected the width"):
        FetchedAdapterProjector(CdfastLlavaConfig())


def test_features_of_several_layers_are_read_side_by_side():
    teacher = tiny_llava(seed=1, hidden=48, heads=6, kv_heads=6)
    config = teacher.config
    config.vision_feature_layer = [-2, -1]
    torch.manual_seed(3)
    teacher = LlavaForConditionalGeneration(config).eval()
    student = assemble_student(teacher, tiny_language_model(), taf=True).eval()
    assert student.model.multi_modal_projector.teacher.linear_1.in_features == 2 * 16
    assert logits(student).isfinite().all()
