"""What a model says to questions: the log-likelihood of every choice, and its free greedy reply.

Questions are scored in batches of prompts of similar length. Choices that differ in their last
token only, such as letters, share one row. Padding is to the right for likelihoods, where the
positions count from 0, and to the left for generation, where replies go on from the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from cdfast.chat import chat_template
from cdfast.logits import model_logits
from cdfast.miniature.suites import Question

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Likelihood:
    """Of one question, for each choice in order.

    Args:
        log: the choice's log-likelihood behind the prompt, in nats; the sum over its tokens.
        tokens: how many tokens it has.
        greedy: whether the most likely continuation begins with the right answer.
    """

    log: tuple[float, ...]
    tokens: tuple[int, ...]
    greedy: bool


class Prompt(NamedTuple):
    """What a reply needs of a question: a name for errors, a decoded image or None, messages."""

    kind: str
    image: Any
    messages: list[dict[str, Any]]


@dataclass
class _Row:
    """A prompt and one continuation; scores every choice that differs in its last token only."""

    question: int
    text: str
    length: int
    # Choice index -> its tokens; all but the last token are the same.
    choices: dict[int, list[int]]


def _prompts(processor: Any, questions: Sequence[Question] | Sequence[Prompt]) -> list[str]:
    template = chat_template(processor)
    return [template.render(q.messages, f"question {q.kind}", prompt=True) for q in questions]


def _rows(processor: Any, questions: Sequence[Question]) -> list[_Row]:
    prompts = _prompts(processor, questions)
    # What the template puts between the prompt and an answer, such as a space.
    answer = {"role": "assistant", "content": [{"type": "text", "text": questions[0].answer}]}
    template = chat_template(processor)
    text, spans = template.answers([*questions[0].messages, answer], "question")
    separator = text[len(prompts[0]) : spans[-1][0]]
    texts: list[str] = []
    for question, prompt in zip(questions, prompts):
        texts += [prompt, *(prompt + separator + choice for choice in question.choices)]
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = tokenizer(texts, add_special_tokens=not _has_bos(tokenizer, prompts[0]))["input_ids"]
    rows: list[_Row] = []
    at = 0
    for number, question in enumerate(questions):
        prompt_ids, *full = encoded[at : at + 1 + len(question.choices)]
        # A tokenizer may merge the end of the prompt with the answer: score from where they differ.
        shared = min(_common_prefix(prompt_ids, ids) for ids in full)
        if len({tuple(ids) for ids in full}) < len(full):
            raise ValueError(
                f"choices: expected tokens that differ, got the same ones for some of "
                f"{question.choices}; the tokenizer has no such words. Score by generation."
            )
        by_prefix: dict[tuple[int, ...], _Row] = {}
        for choice, ids in enumerate(full):
            tokens = ids[shared:]
            if not tokens:
                raise ValueError(f"choices: {question.choices[choice]!r} has no tokens")
            text = texts[at + 1 + choice]
            row = by_prefix.setdefault(tuple(tokens[:-1]), _Row(number, text, len(ids), {}))
            row.choices[choice] = tokens
        rows += by_prefix.values()
        at += 1 + len(question.choices)
    return rows


def _has_bos(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _common_prefix(a: list[int], b: list[int]) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _batch(processor: Any, texts: list[str], images: list[Any], side: str) -> dict[str, Any]:
    tokenizer = getattr(processor, "tokenizer", processor)
    arguments: dict[str, Any] = {} if images[0] is None else {"images": images}
    return processor(
        text=texts,
        padding=True,
        padding_side=side,
        add_special_tokens=not _has_bos(tokenizer, texts[0]),
        return_tensors="pt",
        **arguments,
    )


def _moved(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """The tensors on the model's device, images in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def _logits(model: Any, batch: dict[str, Any], rows: Tensor, positions: Tensor) -> Tensor:
    """Float32 logits at the given (row, position) pairs only: a vocabulary of 150k is large."""
    outputs = model.base_model(**batch, use_cache=False)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        return outputs.logits[rows, positions].float()
    return model_logits(model, hidden[rows, positions])


def _score_batch(
    model: Any, processor: Any, rows: Sequence[_Row], questions: Sequence[Question]
) -> list[tuple[dict[int, float], bool]]:
    """Of each row the log-likelihood of its choices, and whether greedy decoding is right."""
    images = [questions[row.question].image for row in rows]
    batch = _batch(processor, [row.text for row in rows], images, "right")
    lengths = batch["attention_mask"].sum(1).tolist()
    wanted = []
    for number, row in enumerate(rows):
        first = next(iter(row.choices.values()))
        tail = batch["input_ids"][number, lengths[number] - len(first) : lengths[number]].tolist()
        if tail != first:
            raise ValueError("processor: expected the answer's tokens at the end of the text")
        # The token at position p is predicted at p - 1.
        start = lengths[number] - len(first) - 1
        wanted += [(number, start + k) for k in range(len(first))]
    index, positions = torch.tensor(wanted, device=model.device).unbind(1)
    logits = _logits(model, _moved(batch, model), index, positions)
    log_probabilities = logits.log_softmax(-1).cpu()
    greedy_tokens = log_probabilities.argmax(-1)
    results = []
    at = 0
    for row in rows:
        scores, greedy = {}, False
        question = questions[row.question]
        for choice, tokens in row.choices.items():
            steps = slice(at, at + len(tokens))
            target = torch.tensor(tokens)
            scores[choice] = log_probabilities[steps].gather(1, target[:, None]).sum().item()
            if question.choices[choice] == question.answer:
                greedy = bool((greedy_tokens[steps] == target).all())
        results.append((scores, greedy))
        at += len(tokens)
    return results


@torch.inference_mode()
def likelihoods(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    batch_size: int,
    advance: Callable[[int], Any] = lambda number: None,
) -> list[Likelihood]:
    """The log-likelihood of every choice of every question.

    Args:
        model: an image-text model in evaluation mode; in its own dtype, on its own device.
        processor: the model's processor, with a chat template.
        questions: their images decoded (PIL images or uint8 arrays), or None.
        batch_size: rows at a time.
        advance: called with a number of questions that are done, such as by a progress bar.

    Returns:
        One for each question, in order.
    """
    rows = _rows(processor, questions)
    rows.sort(key=lambda row: row.length)
    scores: list[dict[int, float]] = [{} for _ in questions]
    tokens: list[dict[int, int]] = [{} for _ in questions]
    greedy = [False] * len(questions)
    for chunk in _chunks(rows, [questions[row.question].image for row in rows], batch_size):
        for row, result in zip(chunk, _score_batch(model, processor, chunk, questions)):
            scores[row.question].update(result[0])
            tokens[row.question].update({c: len(ids) for c, ids in row.choices.items()})
            greedy[row.question] |= result[1]
        done = {row.question for row in chunk}
        advance(sum(len(scores[i]) == len(questions[i].choices) for i in done))
    return [
        Likelihood(
            tuple(scores[i][c] for c in range(len(question.choices))),
            tuple(tokens[i][c] for c in range(len(question.choices))),
            greedy[i],
        )
        for i, question in enumerate(questions)
    ]


@torch.inference_mode()
def replies(
    model: Any,
    processor: Any,
    questions: Sequence[Question] | Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    advance: Callable[[int], Any] = lambda number: None,
) -> list[str]:
    """The model's free reply to every question: greedy, without any penalty.

    Args:
        model, processor, questions, batch_size, advance: see `likelihoods`.
        max_new_tokens: where a reply is cut.

    Returns:
        One text for each question, in order, without special tokens.
    """
    prompts = _prompts(processor, questions)
    tokenizer = getattr(processor, "tokenizer", processor)
    known = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        bos_token_id=known.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if known.eos_token_id is None else known.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    said = [""] * len(questions)
    for chunk in _chunks(order, [questions[i].image for i in order], batch_size):
        images = [questions[i].image for i in chunk]
        batch = _batch(processor, [prompts[i] for i in chunk], images, "left")
        ids = model.generate(**_moved(batch, model), generation_config=config)
        new = ids[:, batch["input_ids"].shape[1] :]
        for i, text in zip(chunk, tokenizer.batch_decode(new, skip_special_tokens=True)):
            said[i] = text.strip()
        advance(len(chunk))
    return said


def _chunks(rows: Sequence[Any], images: Sequence[Any], size: int) -> Iterable[list[Any]]:
    """At most `size` rows each; rows with and without an image never together."""
    with_image = [row for row, image in zip(rows, images) if image is not None]
    without = [row for row, image in zip(rows, images) if image is None]
    return [part[i : i + size] for part in (with_image, without) for i in range(0, len(part), size)]
