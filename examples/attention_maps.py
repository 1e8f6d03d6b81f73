"""Attention maps of a running model, without eager attention.

    python examples/attention_maps.py [WHERE_TO_SAVE.png]

It asks the teacher of cdfast's miniature about a scene. For a model of your own change what "real"
stands beside; it keeps the attention it runs on.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import cdfast.maps
from cdfast.miniature.scenes import render
from cdfast.synthetic import SceneDataset, teacher_path

device = "cuda" if torch.cuda.is_available() else "cpu"
name = teacher_path()  # real: "Qwen/Qwen2.5-VL-7B-Instruct"
processor = AutoProcessor.from_pretrained(name)
# real: dtype=torch.bfloat16, attn_implementation="flash_attention_2"
model = AutoModelForImageTextToText.from_pretrained(
    name, dtype=torch.float32, attn_implementation="sdpa"
)
model.to(device).eval()
# real: image, question, word = Image.open("photo.jpg"), "What is left of the cat?", "left"
scene, _ = SceneDataset("test").draw(3)
image = Image.fromarray(render(scene))
word = scene.objects[0].shape
question = f"what colour {word} ?"

# The model writes up to 2 tokens, and its own answer is read with the question.
maps = cdfast.maps.attention_maps(model, processor, image, question, max_new_tokens=2)
print(maps.prompt.text)
print("attention of the model:", model.config.text_config._attn_implementation)
for layer in maps.layers:
    grid = maps.array(layer, word=word)  # (rows, columns) of patches; head="max" or a number
    row, column = divmod(int(grid.argmax()), grid.shape[1])
    print(
        f"layer {layer}: {word!r} gives {grid.sum():.0%} of its attention to the image, "
        f"{grid.max():.0%} to the patch in row {row}, column {column}"
    )
path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/attention_maps.png")
path.parent.mkdir(parents=True, exist_ok=True)
maps.overlay(layer=2, word=word, sinks=False).save(path)
print("the map of layer 2 on the picture:", path)
