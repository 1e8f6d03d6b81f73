"""The aligner against an eager reference that materialises every attention map."""

import pytest
import torch
import torch.nn.functional as F
from cdfast_kernels import keep_alignment

from cdfast import VisualAttentionAligner
from cdfast.aligner import build_layout
from tests.cdfast.tiny_models import IMAGE_TOKEN, tiny_batch, tiny_llava, tiny_teacher

TOLERANCE = 1e-5


def eager_alignment(teacher_maps, student_maps, matches, batch, reduction="mean"):
    """Paper's loss from output_attentions, sample by sample; independent of cdfast_kernels."""
    total, count = 0.0, 0
    live = batch["attention_mask"].bool()
    visual = (batch["input_ids"] == IMAGE_TOKEN) & live
    for b in range(len(visual)):
        columns = visual[b].nonzero().flatten()
        if len(columns) == 0:
            continue
        count += 1
        per_layer = []
        for layer, window in matches.items():
            s = student_maps[layer][b].mean(0)
            t = sum(teacher_maps[i][b].mean(0) for i in window) / len(window)
            rows = [i for i in range(len(live[b])) if live[b, i] and (columns <= i).any()]
            row_losses = []
            for i in rows:
                seen = columns[columns <= i]
                if len(seen) == 1:
                    row_losses.append(s.new_zeros(()))
                else:
                    row_losses.append(1 - F.cosine_similarity(s[i, seen], t[i, seen], dim=0))
            per_layer.append(torch.stack(row_losses).mean())
        stacked = torch.stack(per_layer)
        total = total + (stacked.sum() if reduction == "sum" else stacked.mean())
    return total / max(count, 1)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(got, want):
    assert set(got) == set(want)
    error = sum((got[n] - want[n]).square().sum() for n in want).sqrt()
    return float(error / sum(w.square().sum() for w in want.values()).sqrt())


def eager_gradients(teacher, student, batches, matches, weight):
    teacher.set_attn_implementation("eager")
    student.set_attn_implementation("eager")
    student.zero_grad()
    losses = []
    for batch in batches:
        with torch.no_grad():
            t = teacher(**batch, use_cache=False, output_attentions=True).attentions
        out = student(**batch, use_cache=False, output_attentions=True)
        loss = eager_alignment(t, out.attentions, matches, batch)
        losses.append(loss.item())
        ((out.loss + weight * loss) / len(batches)).backward()
    return gradients(student), losses


@pytest.mark.parametrize("padding", ["right", "left", None])
@pytest.mark.parametrize("images", [True, "mixed"])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize(
    "checkpointing",
    [None, {}, {"context_fn": keep_alignment}],
    ids=["all kept", "recomputed", "recomputed but for alignment"],
)
def test_gradients_equal_eager(padding, images, checkpointing, backend):
    teacher, student = tiny_teacher(), tiny_llava()
    batches = [tiny_batch(seed=s, padding=padding, images=images) for s in (0, 1)]
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    want, want_losses = eager_gradients(teacher, student, batches, aligner.matches, 2.0)

    aligner = VisualAttentionAligner(teacher, student, layers="all", backend=backend)
    student.zero_grad()
    student.train()
    if checkpointing is not None:
        student.gradient_checkpointing_enable({"use_reentrant": False, **checkpointing})
    got_losses = []
    for batch in batches:
        with torch.no_grad():
            _, targets = aligner.teacher_forward(**batch)
        out, alignment = aligner.student_forward(targets, **batch)
        got_losses.append(alignment.loss.item())
        ((out.loss + 2.0 * alignment.loss) / len(batches)).backward()
    assert got_losses == pytest.approx(want_losses, rel=TOLERANCE)
    assert min(got_losses) > 1e-3
    assert relative_error(gradients(student), want) <= TOLERANCE


def test_alignment_changes_the_gradient():
    """The comparison above would also pass if the alignment term vanished on both sides."""
    teacher, student = tiny_teacher(), tiny_llava()
    matches = VisualAttentionAligner(teacher, student, layers="all").matches
    batch = tiny_batch()
    with_term, _ = eager_gradients(teacher, student, [batch], matches, 2.0)
    without, _ = eager_gradients(teacher, student, [batch], matches, 0.0)
    assert relative_error(without, with_term) > 1e-2


def test_reentrant_checkpointing_is_refused():
    teacher, student = tiny_teacher(), tiny_llava()
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    batch = tiny_batch()
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        aligner.student_forward(targets, **batch)


def test_loss_can_be_evaluated_without_gradients():
    teacher, student = tiny_teacher(), tiny_llava()
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    batch = tiny_batch()
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
        _, alignment = aligner.student_forward(targets, **batch)
    assert alignment.count == 3
    assert 0 < float(alignment.loss) < 1


def test_logits_do_not_change():
    """Switching attention leaves the model's function as it was, aligned or not."""
    teacher, student = tiny_teacher(), tiny_llava()
    batch = tiny_batch(padding="right")
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        want = student(**batch).logits[live]
        aligner = VisualAttentionAligner(teacher, student, layers="all")
        plain = student(**batch).logits[live]
        _, targets = aligner.teacher_forward(**batch)
        out, _ = aligner.student_forward(targets, **batch)
    torch.testing.assert_close(plain, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits[live], want, atol=1e-5, rtol=1e-5)


def test_generation_after_switching():
    teacher, student = tiny_teacher(), tiny_llava()
    batch = tiny_batch(padding="left")
    batch.pop("labels")
    want = student.generate(**batch, max_new_tokens=4, do_sample=False)
    VisualAttentionAligner(teacher, student, layers="all")
    assert torch.equal(student.generate(**batch, max_new_tokens=4, do_sample=False), want)


def test_text_only_batch():
    teacher, student = tiny_teacher(), tiny_llava()
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    batch = tiny_batch(images=False)
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
    out, alignment = aligner.student_forward(targets, **batch)
    assert alignment.count == 0
    assert float(alignment.loss) == 0
    (out.loss + alignment.loss).backward()


def test_segments_equal_separate_conversations():
    """Turns that share an image give each the hidden states they have alone."""
    teacher, student = tiny_teacher(), tiny_llava()
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    prefix, turn = 1 + 16, 6
    generator = torch.Generator().manual_seed(5)
    turns = torch.randint(3, IMAGE_TOKEN, (2, turn), generator=generator)
    head = torch.tensor([1] + [IMAGE_TOKEN] * 16)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    packed = {
        "input_ids": torch.cat([head, turns[0], turns[1]])[None],
        "attention_mask": torch.ones(1, prefix + 2 * turn, dtype=torch.long),
        "segment_ids": torch.tensor([[0] * prefix + [1] * turn + [2] * turn]),
        "position_ids": torch.cat(
            [torch.arange(prefix), torch.arange(turn) + prefix, torch.arange(turn) + prefix]
        )[None],
        "pixel_values": pixels,
    }
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**packed)
        out, _ = aligner.student_forward(targets, **packed)
        for i in range(2):
            alone = student(
                input_ids=torch.cat([head, turns[i]])[None],
                attention_mask=torch.ones(1, prefix + turn, dtype=torch.long),
                pixel_values=pixels,
            ).logits[0, prefix:]
            got = out.logits[0, prefix + i * turn : prefix + (i + 1) * turn]
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


def test_adaptive_matching_is_chosen_once_and_restored():
    teacher, student = tiny_teacher(layers=6), tiny_llava(layers=4)
    aligner = VisualAttentionAligner(teacher, student, matching="adaptive", layers="all")
    batch = tiny_batch()
    with pytest.raises(RuntimeError, match="calibrate"):
        aligner.teacher_forward(**batch)
    matches = aligner.calibrate(**batch)
    chosen = [window[0] for _, window in sorted(matches.items())]
    assert chosen == sorted(chosen)
    assert len(matches) == 4
    again = VisualAttentionAligner(teacher, student, matching="adaptive", layers="all")
    again.load_state_dict(aligner.state_dict())
    assert again.matches == matches
    other = VisualAttentionAligner(teacher, student, matching="group", layers="all")
    with pytest.raises(ValueError, match="matching"):
        other.load_state_dict(aligner.state_dict())


@pytest.mark.parametrize("objective", ["row", "map", "pooled", "mse", "kl", "pooled_stored"])
@pytest.mark.parametrize("matching", ["group", "simple"])
def test_every_objective_and_matching_runs(objective, matching):
    teacher, student = tiny_teacher(), tiny_llava()
    aligner = VisualAttentionAligner(
        teacher, student, objective=objective, matching=matching, layers="all"
    )
    batch = tiny_batch()
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
    _, alignment = aligner.student_forward(targets, **batch)
    alignment.loss.backward()
    assert torch.isfinite(alignment.loss)
    grads = gradients(student)
    assert any("q_proj" in n and g.abs().max() > 0 for n, g in grads.items())


def test_options_are_checked():
    teacher, student = tiny_teacher(), tiny_llava()
    for name in ("preset", "matching", "layers", "objective", "layer_reduction"):
        with pytest.raises(ValueError, match=name):
            VisualAttentionAligner(teacher, student, **{name: "nonsense"})
    student.config.image_token_index = 91
    with pytest.raises(ValueError, match="image_token_id"):
        VisualAttentionAligner(teacher, student)


def test_layout_is_found_by_token_id_on_either_padding_side():
    for padding in ("left", "right"):
        batch = tiny_batch(padding=padding, images="mixed")
        layout = build_layout(batch, IMAGE_TOKEN)
        assert layout.num_image_samples == 2
        assert torch.equal(layout.visual_mask, batch["input_ids"] == IMAGE_TOKEN)
    with pytest.raises(ValueError, match="input_ids"):
        build_layout({"inputs_embeds": None}, IMAGE_TOKEN)


def test_similarity_of_a_batch_is_the_cosine_of_text_rows_by_matched_layer():
    aligner = VisualAttentionAligner(tiny_teacher(), tiny_llava(), preset="paper")
    batch = tiny_batch()
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
        context = aligner.teacher_context(aligner.layout(batch))
        context.map_layers = frozenset(aligner.matches)
        aligner.student(**batch, alignment=context)
    visual = batch["input_ids"] == IMAGE_TOKEN
    rows = (visual.cumsum(1) > 0) & ~visual & batch["attention_mask"].bool()
    expected = {
        layer: F.cosine_similarity(
            context.maps[layer].to_dense()[rows], targets.maps[layer].to_dense()[rows], dim=-1
        )
        .mean()
        .item()
        for layer in aligner.matches
    }
    assert aligner.similarity(**batch) == pytest.approx(expected, abs=1e-6)
    assert all(value < 0.999 for value in expected.values())


def test_a_model_is_alike_to_itself():
    teacher = tiny_teacher()
    itself = VisualAttentionAligner(teacher, teacher, preset="paper", matching="simple")
    assert itself.similarity(**tiny_batch()) == pytest.approx(
        dict.fromkeys(itself.matches, 1.0), abs=1e-6
    )
