"""A student with a fetched adapter as a plain LLaVA model: the same numbers, no code of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.adapters import assemble_student
from cdfast.config import ConfigError, load_recipe, override, to_dict
from cdfast.fuse import fuse_student, largest_difference, main
from cdfast.sharing.model_card import write_model_card
from tests.cdfast.tiny_models import tiny_batch, tiny_language_model, tiny_teacher

TOLERANCE = 1e-6


def student(teacher=32, width=32, tie=False, projector="linear", bias=True):
    """Weights far from small, so that a missing term shows."""
    made = tiny_teacher(hidden=teacher, heads=4, kv_heads=4)
    if not bias:
        made.config.multimodal_projector_bias = False
        for name in ("linear_1", "linear_2"):
            getattr(made.model.multi_modal_projector, name).register_parameter("bias", None)
    language_model = tiny_language_model(hidden=width, tie=tie)
    model = assemble_student(made, language_model, taf=True, student_projector=projector)
    torch.manual_seed(3)
    for parameter in model.model.multi_modal_projector.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(**{k: v for k, v in tiny_batch().items() if k != "labels"}).logits


def error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


SIZES = {
    "equal widths": {},
    "narrower teacher": {"teacher": 16},
    "tied embeddings": {"tie": True},
    "no biases": {"bias": False, "teacher": 24},
}


@pytest.mark.parametrize("name", SIZES)
def test_fused_model_computes_the_same(name, tmp_path, capsys):
    model = student(**SIZES[name])
    model.save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), str(tmp_path / "fused")])
    assert "differ by at most" in capsys.readouterr().out
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert not {"auto_map", "teacher_hidden_size", "student_projector"} & set(config)
    assert not [*(tmp_path / "fused").glob("*.py")]
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "fused", output_loading_info=True
    )
    assert not any(info.values())
    assert type(loaded).__module__ == "transformers.models.llava.modeling_llava"
    assert error(logits(loaded.eval()), logits(model)) <= TOLERANCE
    assert largest_difference(model, loaded) <= TOLERANCE
    tied = loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert tied == SIZES[name].get("tie", False)


def test_weights_have_the_names_of_published_models(tmp_path):
    student().save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), str(tmp_path / "fused")])
    names = {name.rpartition(".layers.")[0] or name for name in weights(tmp_path)}
    assert {"language_model.model", "vision_tower.vision_model.encoder"} <= names
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "multi_modal_projector.linear_2.bias" in names


def weights(folder):
    return load_file(folder / "fused" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_and_rounded_once(tmp_path, dtype):
    model = student(teacher=16).to(dtype)
    model.save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), str(tmp_path / "fused")])
    state = {k: v.double() for k, v in model.model.multi_modal_projector.state_dict().items()}
    weight = state["linear_1.weight"] @ state["teacher.linear_2.weight"]
    bias = state["linear_1.weight"] @ state["teacher.linear_2.bias"] + state["linear_1.bias"]
    got = weights(tmp_path)
    assert torch.equal(got["multi_modal_projector.linear_2.weight"][:, :16], weight.to(dtype))
    assert torch.equal(got["multi_modal_projector.linear_2.bias"], bias.to(dtype))


def test_an_exported_student_keeps_its_license_base_models_and_templates(tmp_path):
    from cdfast.sharing.upload_files import Target, upload_files
    from tests.cdfast.photo_setup import make_processor

    student().save_pretrained(tmp_path / "exported")
    processor = make_processor()
    templates = {"default": "{{ 1 }}", "rag": "{{ 2 }}"}
    processor.chat_template = processor.tokenizer.chat_template = templates
    processor.save_pretrained(tmp_path / "exported")
    recipe = to_dict(override(load_recipe("miniature"), {"student": "hub-user/small-llm"}))
    results = {"name": "mine", "checkpoint": "1-dft/checkpoint-2", "recipe": recipe}
    write_model_card(tmp_path / "exported", results, license="apache-2.0")
    main([str(tmp_path / "exported"), str(tmp_path / "fused")])
    card = ModelCard.load(tmp_path / "fused" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["hub-user/small-llm"]
    assert "one seed" not in card.text
    files = upload_files(tmp_path / "fused", Target("me/student"))
    assert files["additional_chat_templates/rag.jinja"].read_text() == "{{ 2 }}"
    loaded = AutoProcessor.from_pretrained(tmp_path / "fused")
    assert loaded.chat_template == templates


@pytest.mark.slow
def test_the_fused_folder_loads_where_cdfast_is_not(tmp_path):
    from tests.cdfast.photo_setup import make_processor

    student().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), str(tmp_path / "fused")])
    assert "trust_remote_code" not in (tmp_path / "fused" / "README.md").read_text()
    script = (
        "import sys; sys.modules['cdfast'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "folder = sys.argv[1]\n"
        "AutoModelForImageTextToText.from_pretrained(folder)\n"
        "print('loaded', type(AutoProcessor.from_pretrained(folder)).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "fused")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "loaded LlavaProcessor" in done.stdout, done.stderr
    assert "custom code" not in done.stdout + done.stderr


REFUSED = {
    "mlp": ({"projector": "mlp"}, "student_projector: expected 'linear'"),
    "wider teacher": ({"teacher": 48}, "teacher_hidden_size: expected at most 32.*got 48"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llava_has_no_room_for_is_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refusal:
        fuse_student(student(**options))
    assert "trust_remote_code=True" in str(refusal.value)


def test_other_models_and_existing_folders_are_refused(tmp_path, capsys):
    tiny_teacher().save_pretrained(tmp_path / "plain")
    for source, output, message in (
        ("plain", "new", "got 'llava', which has nothing to fuse"),
        ("plain", "plain", "exists already"),
        ("nowhere", "new", "expected a folder with config.json"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path / source), str(tmp_path / output)])
        assert message in capsys.readouterr().err
        assert not Path(tmp_path / "new").exists()
