"""Models that scale or cap their logits: read as they are, refused where losses would ignore it."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from cdfast.config import ConfigError, load_recipe, override
from cdfast.logits import logit_transforms, model_logits
from cdfast.models import check_models
from tests.cdfast.test_trainer import make_trainer
from tests.cdfast.tiny_models import VOCAB, text_config, tiny_llava, tiny_teacher

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CHANGED = {
    "granite": {"logits_scaling": 5.0},
    "hyperclovax": {"logits_scaling": 0.3},
    "gemma2": {"final_logit_softcapping": 0.1, "head_dim": 8},
}


def tiny(kind):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **CHANGED[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", CHANGED)
@torch.no_grad()
def test_logits_are_those_of_the_forward(kind):
    model = tiny(kind)
    ids = torch.arange(3, 15).view(2, 6)
    want = model(ids).logits
    torch.testing.assert_close(model_logits(model, model.model(ids).last_hidden_state), want)
    plain = model.get_output_embeddings()(model.model(ids).last_hidden_state)
    assert (plain - want).norm() > 0.1 * want.norm()


def test_float64_stays_and_half_precision_is_widened():
    model = tiny_llava()
    hidden = torch.randn(3, 32)
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert model_logits(model.to(dtype), hidden.to(dtype)).dtype == wide


def test_options_that_change_nothing_are_none():
    assert logit_transforms(text_config()) == {}
    assert logit_transforms(transformers.GraniteConfig(logits_scaling=1.0)) == {}
    assert logit_transforms(transformers.Gemma2Config()) == {"final_logit_softcapping": 30.0}


def test_a_model_that_changes_its_logits_is_refused_before_anything_is_loaded(tmp_path):
    tiny("granite").config.save_pretrained(tmp_path)
    recipe = override(load_recipe("compodistill"), {"student": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"student: .*'granite' with {'logits_scaling': 5.0}"):
        check_models(recipe)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_trainer_refuses_it_too(tmp_path, role):
    models = {"student": tiny_llava(), "teacher": tiny_teacher()}
    models[role].config.text_config.final_logit_softcapping = 30.0
    trainer = make_trainer(tmp_path, **models)
    with pytest.raises(ValueError, match=r"llava: expected logits .* final_logit_softcapping 30.0"):
        trainer.train()


def test_an_adapter_in_the_output_embedding_is_refused(tmp_path):
    """Its part would be left out of the losses without a word."""
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    trainer = make_trainer(tmp_path, get_peft_model(tiny_llava(), config))
    with pytest.raises(ValueError, match=r"a PEFT adapter.* target_modules"):
        trainer.train()
