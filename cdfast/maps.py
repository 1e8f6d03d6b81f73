"""Visual attention of any Hugging Face VLM that runs flash attention, as arrays and overlays.

    maps = cdfast.maps.attention_maps(model, processor, image, "What is left of the cat?")
    maps.overlay(layer=12, token="left").save("left.png")

Cost: one forward of the model on fused attention, without its language-model head. Of each layer
are kept, in host memory, the queries of the text rows, the keys of the visual tokens and the
log-sum-exp: (rows x H + visual tokens x Hk) x d numbers. Reading one row of one layer costs
2 x H x d x visual tokens operations, a single head 1/H of them; overlays and arrays are computed
when asked for. A map of all rows never exists.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.aligner import build_layout, image_token_id
from cdfast.geometry import image_grids
from cdfast.observe import AttentionRows, RowsAndKeys, collect_rows, observed
from cdfast.overlay import draw_overlay
from cdfast.planes import GeometryError, ImageGrid
from cdfast.prompts import (
    Prompt,
    Token,
    encode_prompts,
    find_tokens,
    locate_tokens,
    make_prompt,
    visual_spans,
)

# A visual token is a sink where more than this share of the rows give it a sink's attention.
SINK_SHARE = 0.5


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one prompt's text tokens on its visual tokens; made by `attention_maps`.

    Attributes:
        prompt: the text, its images, and where the answer is.
        tokens: the text tokens in order.
        rows: the positions whose rows are kept, ascending.
        layers: layer -> what rows are computed from, on the host.
        counts: visual tokens of each image; () where they cannot be told apart.
        grids: where the visual tokens are in each image; an exception where that is not known.
    """

    prompt: Prompt
    tokens: tuple[Token, ...]
    rows: tuple[int, ...]
    layers: dict[int, AttentionRows]
    counts: tuple[int, ...]
    grids: tuple[ImageGrid, ...] | GeometryError

    def vector(
        self,
        layer: int | Sequence[int],
        *,
        token: int | str | None = None,
        word: str | None = None,
        occurrence: int | None = None,
        head: int | str = "mean",
        row: str | None = None,
        image: int | None = None,
    ) -> np.ndarray:
        """Attention of a token, a word or the answer on every visual token.

        Args:
            layer: from 0; of several the mean.
            token: number in `tokens`, or the text of one token (spaces around it do not count).
            word: characters of the prompt or answer; the mean over all tokens they touch.
                Without token and word: the answer, or, without one, what predicts its first token.
            occurrence: which one, from 0, where the token or word is there several times; -1 is
                the last.
            head: "mean" over heads, "max" over heads, or a head's number.
            row: "own": the row of the token itself, what it looked at when it was read. "before":
                the row of the position before it, which predicts it. Default: "own" for a token
                or word, "before" for the answer.
            image: only its visual tokens; None is all, in the order of the prompt.

        Returns:
            float32 (visual tokens,): probabilities that are normalised over all keys, so the sum is
            the share of attention that goes to visual tokens.

        Raises:
            ValueError: no such layer, token, word, head or image, or one that sees no image.
        """
        wanted = self._rows(token, word, occurrence, row)
        layers = [layer] if isinstance(layer, int) else list(layer)
        parts = [self._layer(number).select(wanted).reduced(head).mean(0) for number in layers]
        vector = torch.stack(parts).mean(0).float().numpy()
        return vector if image is None else vector[self._slice(image)]

    def array(
        self, layer: int | Sequence[int], *, image: int = 0, part: str = "all", **select: Any
    ) -> np.ndarray:
        """`vector` on the patch grid of an image: float32 (h, w).

        Args:
            layer: as in `vector`.
            image: which one, from 0.
            part: of models that cut a picture into tiles: "tiles", put back in their places,
                "global", the picture as a whole, or "all", their sum on the grid of the tiles (a
                cell of "global" is divided among the cells below it). Other models: "all". Newline
                tokens between rows of patches have no place in the picture.
            **select: token, word, occurrence, head, row as in `vector`.

        Raises:
            GeometryError: it is not known where this model's tokens are; `vector` has their values.
        """
        return self._grid(image).array(self.vector(layer, image=image, **select), part)

    def sinks(
        self,
        layer: int | Sequence[int],
        *,
        image: int | None = None,
        head: int | str = "mean",
        share: float = SINK_SHARE,
    ) -> np.ndarray:
        """Visual tokens that draw attention whatever is asked.

        An entry of the map (kept rows x visual tokens) is a sink's if it is above mean + std of the
        map: the threshold of the authors' sink filter, with the unbiased std over all entries,
        invisible zeros included. The authors take it over visual rows; here it is over the rows
        that are kept. A token is a sink if this holds in more than `share` of the rows that see it.

        Args:
            layer, head: as in `vector`.
            image: only its visual tokens.
            share: from 0 to 1.

        Returns:
            bool (visual tokens,).

        Source: CompoDistill, the authors' code (sink filter of the pooled objective).
        """
        layers = [layer] if isinstance(layer, int) else list(layer)
        found = [self._layer(number).reduced(head) for number in layers]
        entries = torch.stack(found).mean(0)
        threshold = entries.mean() + entries.std() if entries.numel() > 1 else torch.inf
        seen = self._layer(layers[0]).visible
        above = ((entries > threshold) & seen).sum(0) > share * seen.sum(0)
        marked = above.numpy()
        return marked if image is None else marked[self._slice(image)]

    def overlay(
        self,
        layer: int | Sequence[int],
        *,
        image: int = 0,
        part: str = "all",
        sinks: bool = True,
        smooth: bool = False,
        limit: float | None = None,
        **select: Any,
    ) -> Image.Image:
        """The map on the picture: grey where there is none, through purple to yellow at the top.

        The scale ends at the largest value that is no sink's, so that one sink does not darken the
        rest; sinks carry a cross. Parts of the picture that the model never saw are darkened.

        Args:
            layer, image, part: as in `array`.
            sinks: mark them.
            smooth: bilinear between patches; otherwise patches as they are.
            limit: value at the end of the colour scale, to compare several overlays.
            **select: token, word, occurrence, head, row as in `vector`.

        Returns:
            RGB, the picture's size times the whole number that makes its longer side 448 or more.

        Raises:
            GeometryError: as `array`.
        """
        grid = self._grid(image)
        values = self.array(layer, image=image, part=part, **select)
        marked = np.zeros(values.shape, bool)
        if sinks:
            head = select.get("head", "mean")
            marked = grid.mask(self.sinks(layer, image=image, head=head), part)
        if limit is None:
            limit = float(values[~marked].max() if (~marked).any() else values.max())
        return draw_overlay(
            self.prompt.images[image], values, grid.box_of(part), marked, limit, smooth
        )

    def find(self, token: int | str | None, word: str | None, occurrence: int | None) -> list[int]:
        """Numbers in `tokens` of a token, a word or (neither given) the answer."""
        return find_tokens(self.prompt, self.tokens, token, word, occurrence)

    def _rows(
        self, token: int | str | None, word: str | None, occurrence: int | None, row: str | None
    ) -> list[int]:
        """Places in `rows` of what is asked for."""
        of_answer = token is None and word is None
        row = row or ("before" if of_answer else "own")
        if row not in ("own", "before"):
            raise ValueError(f"row: expected 'own' or 'before'; got {row!r}.")
        if of_answer and self.prompt.answer is None:
            return [len(self.rows) - 1]  # the end of the prompt: it predicts what comes next
        numbers = self.find(token, word, occurrence)
        shift = 1 if row == "before" else 0
        places = {position: place for place, position in enumerate(self.rows)}
        wanted = []
        for number in numbers:
            position = self.tokens[number].position
            if position is None or position - shift not in places:
                why = (
                    "it cannot be told from the text that the processor puts around images"
                    if position is None
                    else "its row sees no visual token (it is before the images), or is one itself"
                )
                raise ValueError(
                    f"token {number} ({self.tokens[number].text!r}): expected one whose attention "
                    f"is kept; {why}. Choose a token behind the images."
                )
            wanted.append(places[position - shift])
        return wanted

    def _layer(self, layer: int) -> AttentionRows:
        if layer not in self.layers:
            raise ValueError(
                f"layer: expected one of {sorted(self.layers)}; got {layer}. Layers count from 0, "
                "and only those named in attention_maps(layers=...) are kept."
            )
        return self.layers[layer]

    def _check_image(self, image: int) -> None:
        number = len(self.prompt.images)
        if not 0 <= image < number:
            raise ValueError(f"image: expected a number from 0 to {number - 1}; got {image}.")

    def _slice(self, image: int) -> slice:
        self._check_image(image)
        if not self.counts:
            raise GeometryError(f"{self.grids} Which of them are image {image}'s is not known.")
        start = sum(self.counts[:image])
        return slice(start, start + self.counts[image])

    def _grid(self, image: int) -> ImageGrid:
        self._check_image(image)
        if isinstance(self.grids, GeometryError):
            raise GeometryError(str(self.grids))
        return self.grids[image]


def attention_maps(
    model: PreTrainedModel,
    processor: Any,
    images: Any,
    prompt: str | Sequence[dict[str, Any]],
    answer: str | None = None,
    *,
    layers: Collection[int] | None = None,
    max_new_tokens: int = 0,
    backend: str = "auto",
) -> AttentionMaps:
    """Attention on visual tokens in one forward of a vision-language model.

    The model is left as it was: its attention implementation, training mode and hooks. For the
    memory and time it takes see the top of this module.

    Args:
        model: a Hugging Face vision-language model whose text attention is causal and goes through
            AttentionInterface (flash attention, SDPA or eager).
        processor: the model's processor, with a fast tokenizer.
        images: one or several: PIL images, uint8 arrays (H, W, 3), bytes, or paths.
        prompt: a question, which the chat template puts behind the images; a text with the
            processor's image placeholders; or messages.
        answer: read as the model's reply. None: the prompt alone.
        layers: which to keep; default all.
        max_new_tokens: without an answer, let the model write one of up to so many tokens
            (greedily), and read its text as the answer.
        backend: backend of `cdfast_kernels` for the kept layers.

    Returns:
        The maps of every text token that sees an image.

    Raises:
        ValueError: a model that is refused by name, or layers that do not exist.
        DataError: an image, prompt or template that does not fit.
    """
    one = make_prompt(processor, images, prompt, answer)
    if answer is None and max_new_tokens:
        written = _generate(model, processor, one, max_new_tokens)
        one = make_prompt(processor, images, prompt, written)
    return batch_attention_maps(model, processor, [one], layers=layers, backend=backend)[0]


def batch_attention_maps(
    model: PreTrainedModel,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    layers: Collection[int] | None = None,
    backend: str = "auto",
) -> list[AttentionMaps]:
    """`attention_maps` of several prompts (`cdfast.prompts.make_prompt`) in one padded forward."""
    batch = encode_prompts(processor, prompts)
    layout = build_layout(batch, image_token_id(model))
    live, visual = layout.live, layout.visual
    keys = [v.nonzero()[:, 0] for v in visual]
    # Rows that are no visual token, from the first one behind a visual token on.
    rows = [(lv & ~v & (v.cumsum(0) > 0)).nonzero()[:, 0] for lv, v in zip(live, visual)]
    with observed(model):
        found, _ = collect_rows(
            model,
            to_model(batch, model),
            layout.to(model.device),
            RowsAndKeys(rows, keys),
            layers=layers,
            device="cpu",
            backend=backend,
        )
    made = []
    for sample, prompt in enumerate(prompts):
        # Without the padding that a batch may add to the images of one prompt.
        alone = batch if len(prompts) == 1 else encode_prompts(processor, [prompt])
        grids, counts = _grids(model, processor, prompt, alone, len(keys[sample]))
        ids = batch["input_ids"][sample, live[sample]].tolist()
        # Padding is behind, so positions among the live ids are positions in the batch.
        spans = visual_spans(keys[sample], counts, len(prompt.images))
        tokens = locate_tokens(processor, prompt, ids, spans)
        kept = tuple(rows[sample].tolist())
        read = {layer: samples[sample] for layer, samples in found.items()}
        made.append(AttentionMaps(prompt, tuple(tokens), kept, read, tuple(counts), grids))
    return made


def _grids(
    model: PreTrainedModel, processor: Any, prompt: Prompt, batch: dict[str, Tensor], number: int
) -> tuple[tuple[ImageGrid, ...] | GeometryError, list[int]]:
    """Grids and visual tokens of each image; where the first are not known, why."""
    try:
        grids = image_grids(model, processor, prompt.images, batch, number)
        return tuple(grids), [grid.count for grid in grids]
    except GeometryError as unknown:
        counts = []
        for image in prompt.images:
            alone = Prompt((image,), prompt.placeholder, prompt.placeholder, None, 0)
            ids = encode_prompts(processor, [alone])["input_ids"]
            counts.append(int((ids == image_token_id(model)).sum()))
        # Some families give an image among others fewer tokens than the same image alone.
        return unknown, counts if sum(counts) == number else []


def to_model(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The batch on the model's device, floats in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def _generate(model: PreTrainedModel, processor: Any, prompt: Prompt, max_new_tokens: int) -> str:
    batch = to_model(encode_prompts(processor, [prompt]), model)
    with observed(model):
        generate: Any = model.generate
        ids = generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    written = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    if not written.strip():
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the model wrote no text. Give the answer to read, "
            "or read the prompt alone (max_new_tokens=0)."
        )
    return written.strip()
