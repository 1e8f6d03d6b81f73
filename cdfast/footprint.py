"""Bytes that a training stage needs on a GPU, counted from shapes.

Model states of a rank out of w, for N_t trained and N_f frozen parameters of the student, b bytes
per parameter (2 in bfloat16), as DeepSpeed 0.19.8 allocates them; K = reduce_bucket_size:

| ZeRO | parameters | gradients | optimizer | buckets |
|---|---|---|---|---|
| 0 (DDP) | p (N_t + N_f) | p N_t | 2 p N_t | p N_t if w > 1 |
| 1 | b (N_t + N_f) | b N_t | 12 N_t / w | b K |
| 2 | b (N_t + N_f) | b N_t / w | 12 N_t / w | b K |
| 3 | b M, and small persistent ones once more | b M_t | 12 M_t | 2 b K |

M and M_t are sums of ceil(n / w) over all and over trained parameters of n elements each.
p is the size of the recipe's `dtype`. 12 is the float32 master weight and both moments; during the
optimizer's step 4 more for the float32 gradient, when activations are gone. Stages 1 and 2 pad each
parameter group to a multiple of 2 w. With the optimizer offloaded, 16 N_t / w are in host memory.

Activations kept for backward by a decoder layer, per token, with s bytes of the compute dtype (d
width, q and kv query and key widths, f of the MLP):

    norms      2 (4 d + s d [norm weights trained])
    attention  s (2 q + 2 kv) + 4 heads          q, k, v, out, and LSE
    MLP        3 s f                             gate, its activation, up
    inputs of trained matrices       s (2 d + f)
    inputs of LoRA adapters          s (2 d + f), and with dropout (s + 1) (5 d + q + f)
    rank-r inputs of LoRA            7 s r

With gradient checkpointing: the input of each layer, and one layer as above. Under autocast (stage
0 with float32 parameters) hidden states and norms are float32, each trained matrix or adapter has
its own copy of its input, and there are bfloat16 copies of the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from cdfast_kernels import VisualLayout
from torch import nn

from cdfast.losses import KL_ROWS

# DeepSpeed's defaults, which cdfast leaves as they are.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
PERSISTENCE_THRESHOLD = 100_000
# Rows of the output embedding that are added to its Gram matrix at once.
GRAM_ROWS = 8192
# Largest buffer in which the triton backend forms a student's map, a chunk of rows at a time.
MAP_CHUNK = 64 * 2**20
MAP_TILE = 64


@dataclass(frozen=True)
class States:
    """Bytes of a model's parameters, gradients and optimizer states on one rank."""

    parameters: float
    gradients: float = 0.0
    optimizer: float = 0.0
    buckets: float = 0.0
    step: float = 0.0  # only during the optimizer's step
    host: float = 0.0


def model_states(
    trained: Iterable[int],
    frozen: Iterable[int],
    *,
    zero_stage: int,
    world_size: int,
    itemsize: int,
    offload_optimizer: bool = False,
    reduce_bucket: int = REDUCE_BUCKET,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
) -> States:
    """States of a model that is trained.

    Args:
        trained, frozen: elements of each parameter.
        zero_stage: 0 is DDP (with AdamW in the parameters' dtype), 1 to 3 DeepSpeed.
        itemsize: bytes per element: of the recipe's dtype for stage 0, else the engine's.
        offload_optimizer: optimizer states in host memory.
    """
    trained, frozen = list(trained), list(frozen)
    n, everything = sum(trained), sum(trained) + sum(frozen)
    if zero_stage == 0:
        buckets = itemsize * n if world_size > 1 else 0
        return States(itemsize * everything, itemsize * n, 2 * itemsize * n, buckets)
    # Stage 3 pads every parameter, the others each group.
    share = sharded(trained, world_size) if zero_stage == 3 else n / world_size
    parameters = float(itemsize * everything)
    if zero_stage == 3:
        parameters = itemsize * sharded([*trained, *frozen], world_size)
        small = sum(m for m in [*trained, *frozen] if m <= persistence_threshold)
        parameters += itemsize * small  # stay gathered
    gradients = itemsize * (n if zero_stage == 1 else share)
    # Stage 3 overlaps reduction with backward by default, which takes a second bucket.
    buckets = itemsize * reduce_bucket * (2 if zero_stage == 3 else 1)
    if not offload_optimizer:
        return States(parameters, gradients, 12 * share, buckets, step=4 * share)
    kept = gradients if zero_stage == 1 else 0
    return States(parameters, kept, 0, buckets, host=(16 + itemsize) * share)


def sharded(sizes: Iterable[int], world_size: int) -> int:
    """Elements on a rank of parameters that ZeRO-3 splits, each padded by itself."""
    return sum(math.ceil(n / world_size) for n in sizes)


@dataclass(frozen=True)
class TextShape:
    """Sizes of a decoder, from its configuration."""

    layers: int
    width: int
    query: int
    key: int
    heads: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> TextShape:
        text = config.get_text_config(decoder=True)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads * head,
            keys * head,
            text.num_attention_heads,
            text.intermediate_size,
            text.vocab_size,
        )


@dataclass(frozen=True)
class Training:
    """What of a decoder is trained: "all", "lora" or "none" (gradients only flow through)."""

    what: str
    lora_rank: int = 0
    lora_dropout: float = 0.0


def layer_activations(shape: TextShape, training: Training, size: int, autocast: bool) -> float:
    """Bytes per token that one decoder layer keeps for backward."""
    d, f, s = shape.width, shape.mlp, size
    kept = 2.0 * 4 * d + s * (2 * shape.query + 2 * shape.key) + 4 * shape.heads + 3 * s * f
    # Autocast makes a copy of its input for each matrix; the output of attention needs none.
    inputs = s * ((5 if autocast else 2) * d + f)
    if training.what == "all":
        return kept + 2 * (4 if autocast else s) * d + inputs
    if training.what == "lora":
        adapted = 5 * d + shape.query + f
        if training.lora_dropout > 0:  # each adapter has an input of its own, and a mask
            inputs = (s + 1) * adapted
        elif autocast:
            inputs = s * adapted
        kept += inputs + 7 * s * training.lora_rank
    return kept


def activations(
    shape: TextShape,
    training: Training,
    *,
    tokens: int,
    itemsize: int,
    checkpointing: bool,
    autocast: bool = False,
) -> float:
    """Bytes that the decoder of the student keeps between forward and backward.

    Args:
        tokens: of a micro-batch, padding included.
        itemsize: of the compute dtype.
        checkpointing: inputs of layers are kept, and one layer is repeated at a time.
    """
    layer = layer_activations(shape, training, itemsize, autocast)
    hidden = 4 if autocast else itemsize
    kept = layer + shape.layers * hidden * shape.width if checkpointing else shape.layers * layer
    last_norm = (4 + hidden * (training.what == "all")) * shape.width
    return tokens * (kept + last_norm)


def forward_working_set(shape: TextShape, tokens: int, itemsize: int) -> float:
    """Bytes that a forward without gradients needs at once: the MLP of a layer."""
    return float(tokens * (itemsize * (2 * shape.width + 3 * shape.mlp) + 8 * shape.width))


def tower_features(config: Any, images: int, itemsize: int) -> float:
    """Bytes of the hidden states of all layers, which the tower returns and the batch keeps."""
    patches = (config.image_size // config.patch_size) ** 2
    return float(images * patches * config.hidden_size * (config.num_hidden_layers + 1) * itemsize)


def one_image_layout(batch: int, tokens: int, visual: int, start: int = 35) -> VisualLayout:
    """A batch whose samples are full and have one image near their start."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    begin = min(start, max(0, tokens - visual))
    mask[:, begin : begin + visual] = True
    return VisualLayout.from_mask(mask)


@dataclass(frozen=True)
class AlignmentMaps:
    """Bytes of alignment while the teacher and while the student runs."""

    teacher: float = 0.0
    student: float = 0.0


def alignment_maps(
    layout: VisualLayout, matches: dict[int, tuple[int, ...]], objective: str, *, kept_layers: int
) -> AlignmentMaps:
    """Maps of half-precision models, stored as float16: exact sizes from the layout's panels.

    Args:
        matches: student layer -> teacher layers.
        kept_layers: layers whose G = dL/dS is held at once: all aligned ones, or 1 under gradient
            checkpointing.
    """
    if not matches:
        return AlignmentMaps()
    map_bytes = layout.map_rows * MAP_TILE * 2
    windows = {layer for window in matches.values() for layer in window}
    g_bytes = map_bytes * (2 if objective == "kl" else 1)
    sums = 28 * layout.num_samples * layout.length * layout.num_slots
    forming = 4 * layout.map_rows * MAP_TILE
    if objective in ("row", "mse", "kl"):
        forming = min(forming, MAP_CHUNK)
    return AlignmentMaps(
        teacher=map_bytes * (len(windows) + len(matches)),
        student=map_bytes * len(matches) + g_bytes * kept_layers + sums + forming,
    )


def logits_chunk(
    student: TextShape,
    teacher: TextShape | None,
    *,
    rows: int,
    itemsize: int,
    teacher_itemsize: int,
    head_trained: bool,
) -> float:
    """Bytes of the chunked losses over the vocabulary.

    LM: a chunk of about rows d / V logits, and the gradients of the hidden states and of a trained
    head. KL: a chunk of KL_ROWS with three float32 tensors of its logits, in half precision with
    one more in that; the gradient of the hidden states, and of a trained head with the part of a
    chunk, added in float32, or both gradients scaled; a teacher in another dtype is copied.
    """
    v, d = student.vocabulary, student.width
    chunk = min(rows, 2 ** math.ceil(math.log2(max(1.0, rows / math.ceil(v / d)))))
    head = itemsize * v * d
    lm = itemsize * (chunk * v + rows * d) + head * head_trained
    if teacher is None:
        return float(lm)
    shared = min(v, teacher.vocabulary)
    logits = min(rows, KL_ROWS) * shared * (12 + (itemsize if itemsize < 4 else 0))
    summed = shared * d * (itemsize + 4 * (rows > KL_ROWS)) * head_trained
    scaled = 2 * itemsize * (rows * d + shared * d * head_trained)
    kl = max(logits + itemsize * rows * d + summed, scaled)
    if itemsize != teacher_itemsize:
        kl += itemsize * shared * teacher.width
    # The gradients of the LM loss are kept beside it.
    return float(kl + itemsize * rows * d + head * head_trained)


def relation_loss(
    student: TextShape,
    teacher: TextShape,
    samples: int,
    visual: int,
    *,
    itemsize: int,
    teacher_itemsize: int,
    head_trained: bool,
) -> float:
    """Bytes of the relation loss.

    Gram matrices in float32, gradient included where the head is trained; rows of both models and
    H G; and the largest of: R of both models for every sample with the backward of one; the head's
    gradient with a chunk of it in float32; a float32 chunk of a half-precision head.
    """
    d, t, copied = student.width, teacher.width, itemsize < 4
    grams = 4.0 * (d**2 * (3 if head_trained else 1) + t**2)
    rows = samples * visual * (itemsize * d + teacher_itemsize * t + 4 * d + 4 * copied * (d + t))
    relations = 4 * visual**2 * (2 * samples + 4)
    head = itemsize * student.vocabulary * d + 4 * GRAM_ROWS * d * (1 + copied)
    chunk = 4 * GRAM_ROWS * max(d, t) * copied
    return grams + rows + max(relations, head * head_trained, chunk)


def hidden_loss(student: TextShape, teacher: TextShape, *, rows: int, itemsize: int) -> float:
    """Bytes of the hidden-state loss: the MLP's input, what its two layers keep and give, and both
    sides of the comparison in float32 with a gradient.
    """
    return rows * (itemsize * (student.width + 4 * teacher.width) + 4.0 * 4 * teacher.width)


def parameter_sizes(
    model: nn.Module, *, tower: nn.Module | None = None
) -> tuple[list[int], list[int]]:
    """(trained, frozen) elements of each parameter, those of `tower` left out."""
    apart = set() if tower is None else {id(p) for p in tower.parameters()}
    found = [p for p in model.parameters() if id(p) not in apart]
    trained = [p.numel() for p in found if p.requires_grad]
    return trained, [p.numel() for p in found if not p.requires_grad]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one combination of ZeRO stage, teacher placement and checkpointing.

    Attributes:
        total: states, and the phase that needs most: the teacher's forward, the student's forward
            and backward (whose columns these are), or the optimizer's step.
    """

    zero_stage: int
    placement: str
    checkpointing: bool
    offload_optimizer: bool
    columns: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    host: float = 0.0
