"""Alignment across different visual grids, against a loss written out from eager attention."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cdfast import VisualAttentionAligner
from cdfast.data import VisionTextCollator, encode
from cdfast.geometry import image_grids
from cdfast.planes import GeometryError, ImageGrid, Plane, resampling_matrix
from cdfast.resampling import resample_targets
from tests.cdfast.test_aligner import TOLERANCE, relative_error
from tests.cdfast.test_families import STUDENT, TEACHER, WEIGHT, gradients_of, samples
from tests.cdfast.tiny_families import llava, llava_next, llava_pad


def grid(rows, columns, box, first=0, count=None):
    tokens = np.arange(rows * columns).reshape(rows, columns) + first
    return ImageGrid({"image": Plane(tokens, box)}, count or rows * columns)


# -- the matrix ------------------------------------------------------------------------------------


def test_two_columns_to_three_by_area():
    whole = (0.0, 0.0, 60.0, 20.0)
    matrix = resampling_matrix(grid(1, 2, whole), grid(1, 3, whole))
    np.testing.assert_allclose(matrix, [[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]])
    # Back again: each third goes to the half it is in, the middle one to both.
    back = resampling_matrix(grid(1, 3, whole), grid(1, 2, whole))
    np.testing.assert_allclose(back, [[1, 0.5, 0], [0, 0.5, 1]])


def test_the_same_grid_is_left_as_it_is():
    one = grid(4, 5, (0.0, -3.0, 50.0, 43.0))
    np.testing.assert_allclose(resampling_matrix(one, one), np.eye(20))


def test_sums_are_kept_where_the_target_sees_the_picture():
    """Tiles and the picture as a whole, with newline tokens, onto one padded grid."""
    tiles = Plane(np.arange(24).reshape(3, 8)[:, :7] + 4, (0.0, -1.0, 90.0, 41.0))
    whole = Plane(np.arange(4).reshape(2, 2), (0.0, 0.0, 90.0, 40.0))
    source = ImageGrid({"tiles": tiles, "global": whole}, 28)
    matrix = resampling_matrix(source, grid(6, 6, (0.0, -25.0, 90.0, 65.0)))
    newlines = [11, 19, 27]
    want = np.ones(28)
    want[newlines] = 0
    np.testing.assert_allclose(matrix.sum(0), want)
    # The rows of padding get nothing; those beside the picture do.
    assert matrix.reshape(6, 6, 28).sum((1, 2))[[0, 5]].tolist() == [0, 0]


def test_several_planes_are_no_target():
    plane = grid(2, 2, (0.0, 0.0, 4.0, 4.0)).planes["image"]
    with pytest.raises(GeometryError, match=r"one grid of all 8 tokens.*'tiles': \(2, 2\)"):
        resampling_matrix(grid(1, 1, plane.box), ImageGrid({"tiles": plane, "global": plane}, 8))
    with pytest.raises(GeometryError, match="expected one grid of all 5 tokens"):
        resampling_matrix(grid(1, 1, plane.box), grid(2, 2, plane.box, count=5))


# -- the loss --------------------------------------------------------------------------------------


def encoded(processor, side):
    batch = VisionTextCollator(0, side)([encode(processor, sample) for sample in samples()])
    batch.pop("sample_ids")
    return batch


def grids_of(model, processor):
    """Of each sample's pictures, from the geometry of the model's own processor."""
    made = []
    for sample in samples():
        pictures = [Image.fromarray(array) for array in sample.images]
        if not pictures:
            made.append([])
            continue
        alone = encode(processor, sample)
        number = int((alone["input_ids"] == model.config.image_token_id).sum())
        made.append(image_grids(model, processor, pictures, alone["images"], number))
    return made


@pytest.fixture(scope="module", params=["padded student", "stretched student"])
def pair(request):
    """A LLaVA-NeXT teacher of tiles, and a LLaVA student of 6 x 6 tokens per picture."""
    teacher, teacher_processor = llava_next(**TEACHER)
    make = llava_pad if request.param == "padded student" else llava
    student, processor = make(**STUDENT)
    teacher.requires_grad_(False)
    # Padded on unequal sides: positions differ between the two in more than the pictures.
    batches = encoded(teacher_processor, "left"), encoded(processor, "right")
    grids = [
        list(zip(*pictures))
        for pictures in zip(grids_of(teacher, teacher_processor), grids_of(student, processor))
    ]
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = teacher(**batches[0], use_cache=False, output_attentions=True).attentions
    ours = student(**batches[1], use_cache=False, output_attentions=True)
    return teacher, student, batches, grids, theirs, ours


def places(batch, token):
    live = batch["attention_mask"].bool()
    return live, (batch["input_ids"] == token) & live


def eager_loss(pair, objective):
    """Mean over text rows behind the last picture; sum over samples, mean over layers."""
    teacher, student, (theirs, ours), grids, teacher_maps, out = pair
    live_t, visual_t = places(theirs, teacher.config.image_token_id)
    live_s, visual_s = places(ours, student.config.image_token_id)
    total = 0.0
    for b, pairs in enumerate(grids):
        if not pairs:
            continue
        shares = torch.block_diag(*(torch.from_numpy(resampling_matrix(*p)) for p in pairs))
        columns_t, columns_s = visual_t[b].nonzero()[:, 0], visual_s[b].nonzero()[:, 0]
        rows_t = [i for i in live_t[b].nonzero()[:, 0].tolist() if i > columns_t[-1]]
        rows_s = [i for i in live_s[b].nonzero()[:, 0].tolist() if i > columns_s[-1]]
        assert theirs["input_ids"][b, rows_t].tolist() == ours["input_ids"][b, rows_s].tolist()
        assert len(rows_s) > 5
        for layer, window in {0: (0, 1), 1: (1, 2)}.items():
            s = out.attentions[layer][b].double().mean(0)[rows_s][:, columns_s]
            t = sum(teacher_maps[i][b].double().mean(0) for i in window)[rows_t] / 2
            t = t[:, columns_t] @ shares.T
            if objective == "row":
                each = 1 - F.cosine_similarity(s, t, dim=-1)
            else:
                p, q = (x / x.sum(-1, keepdim=True) for x in (t, s))
                each = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0).sum(-1)
            total = total + each.mean() / 2
    return total


@pytest.mark.parametrize("objective", ["row", "kl"])
def test_loss_and_gradients_equal_eager(pair, objective):
    teacher, student, (theirs, ours), grids, _, eager = pair
    want = eager_loss(pair, objective)
    want_gradients = gradients_of(student, eager.loss + WEIGHT * want, keep_graph=True)
    without = gradients_of(student, eager.loss, keep_graph=True)
    assert relative_error(without, want_gradients) > 1e-2
    aligner = VisualAttentionAligner(
        teacher, student, layers="all", objective=objective, grid_resampling="area"
    )
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**theirs)
    with pytest.raises(ValueError, match=r"expected those of cdfast\.resampling\.resample_t"):
        aligner.student_forward(targets, **ours)
    targets = resample_targets(aligner, targets, theirs, ours, grids)
    out, alignment = aligner.student_forward(targets, **ours)
    assert alignment.count == 2
    assert alignment.sum.item() == pytest.approx(want.item(), rel=TOLERANCE)
    got = gradients_of(student, out.loss + WEIGHT * alignment.sum)
    assert relative_error(got, want_gradients) <= TOLERANCE


def test_the_example_of_the_page_runs(pair):
    teacher, student, (theirs, ours), grids, _, _ = pair
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    given = {"teacher_batch": theirs, "batch": ours, "grids": grids, "torch": torch}
    # Two layers have none in the middle of the depth.
    example = example.replace("student, grid", 'student, layers="all", grid')
    exec(example, namespace := {"teacher": teacher, "student": student, **given})
    assert namespace["alignment"].loss > 0


# -- refusals --------------------------------------------------------------------------------------


def test_without_the_option_other_grids_are_refused_by_what_differs():
    (teacher, _), (student, _) = llava_next(layers=1), llava(layers=1)
    words = r"differ in image_grid_pinpoints .* and None.*grid_resampling='area'"
    with pytest.raises(ValueError, match=words):
        VisualAttentionAligner(teacher, student, layers="all")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"grid_resampling": "nearest"}, "grid_resampling: expected one of area; got 'nearest'"),
        ({"preset": "official"}, "expected objective 'row' or 'kl'.*got 'pooled' and 'group'"),
        ({"matching": "adaptive"}, "got 'row' and 'adaptive'"),
    ],
    ids=["name", "objective", "matching"],
)
def test_options_that_do_not_go_with_it(options, words):
    teacher, student = llava(layers=1)[0], llava(layers=1)[0]
    given = {"grid_resampling": "area", "layers": "all", **options}
    with pytest.raises(ValueError, match=words):
        VisualAttentionAligner(teacher, student, **given)


def test_batches_that_do_not_fit_are_refused(pair):
    teacher, student, (theirs, ours), grids, _, _ = pair
    aligner = VisualAttentionAligner(teacher, student, layers="all", grid_resampling="area")
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**theirs)
    with pytest.raises(ValueError, match="expected one list of pictures for each sample; got 2"):
        resample_targets(aligner, targets, theirs, ours, grids[:2])
    with pytest.raises(ValueError, match=r"sample 0: expected \[\d+\] visual tokens in the t"):
        resample_targets(aligner, targets, theirs, ours, [grids[0][:1], *grids[1:]])
    other = {**ours, "input_ids": ours["input_ids"].clone()}
    last = ours["attention_mask"][2].sum() - 1
    other["input_ids"][2, last] = 5  # the end of the turn, another token now
    with pytest.raises(ValueError, match="sample 2: expected texts behind the last picture"):
        resample_targets(aligner, targets, theirs, other, grids)
    plain = VisualAttentionAligner(student, student, layers="all")
    with pytest.raises(ValueError, match="expected an aligner made with grid_resampling='area'"):
        resample_targets(plain, targets, theirs, ours, grids)


def test_a_text_that_differs_in_front_is_compared_behind_the_difference(pair):
    teacher, student, (theirs, ours), grids, _, _ = pair
    aligner = VisualAttentionAligner(teacher, student, layers="all", grid_resampling="area")
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**theirs)
    first = (ours["input_ids"][2] == student.config.image_token_id).nonzero()[-1, 0] + 1
    other = {**ours, "input_ids": ours["input_ids"].clone()}
    other["input_ids"][2, first] += 1
    weights = [
        resample_targets(aligner, targets, theirs, batch, grids).sample_weight
        for batch in (ours, other)
    ]
    seen = ours["attention_mask"][2].sum() - (first - 36)
    rows = (seen / weights[0][2]).round()
    assert weights[1][2] == pytest.approx((seen / (rows - 1)).item())
    assert weights[1][0] == weights[0][0]
    assert weights[0][1] == 0
