"""Encoded samples of unequal lengths for the trainer's tests: with and without an image."""

import torch

from tests.cdfast.tiny_models import IMAGE_TOKEN, NUM_VISUAL


def one_step(folder, **changed):
    """Options of a trainer that takes one plain SGD step on a CPU and writes nothing."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **changed,
    }


class TinySamples(torch.utils.data.Dataset):
    """`size` samples as `cdfast.encoding.encode` returns them; every fourth has no image."""

    def __init__(self, size, seed=0, text_only_every=4):
        self.size, self.seed, self.text_only_every = size, seed, text_only_every

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        with_image = not self.text_only_every or index % self.text_only_every != 3
        question, answer = 3 + index % 4, 2 + 3 * (index % 3)
        text = torch.randint(3, IMAGE_TOKEN, (question + answer,), generator=generator)
        head = [1] + [IMAGE_TOKEN] * NUM_VISUAL if with_image else [1]
        ids = torch.cat([torch.tensor(head), text])
        labels = ids.clone()
        labels[: len(head) + question] = -100
        images = {}
        if with_image:
            images["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
        return {
            "input_ids": ids,
            "labels": labels,
            "images": images,
            "source": f"tiny, sample {index}",
        }


class TinyPairs(torch.utils.data.Dataset):
    """`size` pairs as `cdfast.pairs.encode_pair` returns them; answers differ in length."""

    def __init__(self, size, seed=0, text_only_every=4):
        self.chosen = TinySamples(size, seed, text_only_every)

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, index):
        chosen = self.chosen[index]
        prompt = int((chosen["labels"] == -100).sum())
        generator = torch.Generator().manual_seed(77 + index)
        answer = torch.randint(3, IMAGE_TOKEN, (1 + index % 5,), generator=generator)
        ids = torch.cat([chosen["input_ids"][:prompt], answer])
        labels = ids.clone()
        labels[:prompt] = -100
        return {**chosen, "rejected": {**chosen, "input_ids": ids, "labels": labels}}
