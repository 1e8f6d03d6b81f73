"""Time and peak memory of one distillation step: python -m benchmarks.bench_train_step

One step is the teacher's forward, the student's forward and backward, and AdamW. Variants, in turn
in every round, each in a process of its own (peak memory is per process):

    kd         LM + KL, no alignment: stock attention everywhere
    dft        LM + KL + alignment, cdfast on the backend given with --backend
    eager      the same losses the way the paper's authors train: eager attention in both models,
               every layer's attention map materialised, cosine on maps

The losses of `dft` and `eager` are compared before anything is reported. Models have random
weights; see --help for sizes. Results are medians over rounds; ratios are to `kd`. They are written
after every round: stop it at any time.

`python -m benchmarks.bench_train_step --preset paper` measures the models of the paper on a GPU:
preset_step.py.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import step_report
from benchmarks.result_files import RESULTS, result_path, start

VARIANTS = ("kd", "dft", "eager")
NOT_SIZES = ("output", "variant", "preset", "budget_minutes")


def models(options):
    import torch
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    side = round(options.visual_tokens**0.5)
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=14 * side,
        patch_size=14,
        vision_use_head=False,
    )

    def build(layers, seed):
        torch.manual_seed(seed)
        text = Qwen2Config(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=8 * options.width // 3,
            num_hidden_layers=layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            tie_word_embeddings=False,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=options.vocabulary - 1,
            image_seq_length=side * side,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
        model = LlavaForConditionalGeneration(config).to(options.device)
        model.model.vision_tower.requires_grad_(False)
        return model

    return build(options.teacher_layers, 1).requires_grad_(False).eval(), build(options.layers, 0)


def batch_of(options):
    import torch

    side = round(options.visual_tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.tokens)
    ids = torch.randint(3, options.vocabulary - 1, shape, generator=generator)
    ids[:, 31 : 31 + side * side] = options.vocabulary - 1
    labels = ids.clone()
    labels[:, : 31 + side * side + 40] = -100
    pixels = torch.randn(options.batch, 3, 14 * side, 14 * side, generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
    }
    return {k: v.to(options.device) for k, v in batch.items()}


def eager_losses(teacher, student, batch, matches, image_token):
    """LM + KL + alignment on materialised maps; independent of cdfast_kernels."""
    import torch
    import torch.nn.functional as F

    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        t = teacher(**inputs, use_cache=False, output_attentions=True)
    s = student(**inputs, use_cache=False, output_attentions=True)
    rows = batch["labels"][:, 1:] != -100
    logits = s.logits[:, :-1][rows].float()
    lm = F.cross_entropy(logits, batch["labels"][:, 1:][rows])
    teacher_log = t.logits[:, :-1][rows].float().log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), teacher_log, log_target=True, reduction="batchmean")
    visual = (batch["input_ids"][0] == image_token).nonzero().flatten()
    sees = slice(int(visual[0]) + 1, None)  # the first row sees one visual key only: loss 0
    n_rows = batch["input_ids"].shape[1] - int(visual[0])
    losses = []
    for layer, window in matches.items():
        mine = s.attentions[layer].mean(1)[:, sees][..., visual]
        theirs = sum(t.attentions[i].mean(1)[:, sees][..., visual] for i in window) / len(window)
        losses.append((1 - F.cosine_similarity(mine, theirs, dim=-1)).sum(-1).mean() / n_rows)
    return lm, kl, torch.stack(losses).mean()


def run_variant(variant, options):
    """One process: `options.steps` steps, the first not counted."""
    import torch

    from cdfast import VisualAttentionAligner
    from cdfast.aligner import build_layout
    from cdfast.distill import LossOptions, StudentTask, TeacherTask, student_step, teacher_step

    torch.set_num_threads(options.threads)
    teacher, student = models(options)
    batch = batch_of(options)
    aligner = VisualAttentionAligner(teacher, student, backend=options.backend)
    if variant == "eager":
        teacher.set_attn_implementation({"text_config": "eager"})
        student.set_attn_implementation({"text_config": "eager"})
    batch["layout"] = build_layout(batch, aligner.image_token_id)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-5)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    cuda = options.device.startswith("cuda")

    def step():
        if variant == "eager":
            plain = {k: v for k, v in batch.items() if k != "layout"}
            losses = eager_losses(teacher, student, plain, aligner.matches, aligner.image_token_id)
        else:
            chosen = aligner if variant == "dft" else None
            labels, layout = batch["labels"], batch["layout"]
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "layout")}
            kl = LossOptions(frozenset({"kl"}))
            out = teacher_step(teacher, inputs, TeacherTask(labels, layout, chosen, kl))
            sums = student_step(student, inputs, StudentTask(labels, layout, out, chosen, kl))
            losses = [sums["lm"] / tokens, sums["kl"] / tokens]
            if chosen:
                losses.append(sums["alignment"] / options.batch)
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.item() for loss in losses]

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    first = step()
    seconds = []
    for _ in range(options.steps - 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "variant": variant,
        "losses": first,
        "seconds": statistics.median(seconds),
        "peak_bytes": peak(),
        "peak_bytes_of_step": peak() - before,
    }


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_train_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4, help="student layers")
    parser.add_argument("--teacher-layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--visual-tokens", type=int, default=729, help="a square number")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="per process; the first is a warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="no round begins later")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--preset", help="paper or tiny, with options of its own: preset_step.py")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def ran_on(options):
    """The backend behind "auto"."""
    if options.backend != "auto":
        return options.backend
    from cdfast_kernels import available_backends

    own = "triton" if options.device.startswith("cuda") else "cpu"
    return own if available_backends()[own] is None else "reference"


def measure(variant, arguments):
    """What run_variant returns, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_train_step", *arguments]
    done = subprocess.run([*command, "--variant", variant], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs):
    """A row per variant: medians over rounds, and medians of the ratios to `kd` in each round."""
    rows = []
    for variant in VARIANTS:
        row = {"variant": variant}
        for name in ("seconds", "peak_bytes", "peak_bytes_of_step"):
            values = [run[name] for run in runs[variant]]
            base = [run[name] for run in runs["kd"]]
            row[name] = statistics.median(values)
            row[f"{name}_over_kd"] = statistics.median(v / b for v, b in zip(values, base))
        rows.append(row)
    return rows


def check_losses(first):
    """Ends the run where `dft` and `eager` do not compute the same losses."""
    ours, theirs = first["dft"]["losses"], first["eager"]["losses"]
    if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(ours, theirs)):
        sys.exit(f"losses differ: dft {ours}, eager {theirs}. Nothing was written.")


def main():
    arguments = sys.argv[1:]
    if any(argument.startswith("--preset") for argument in arguments):
        from benchmarks import preset_step

        sys.exit(preset_step.main(arguments))
    options = parse()
    if options.variant:
        print(json.dumps(run_variant(options.variant, options)))
        return
    report = {
        **start("train_step", options.device, "benchmarks.bench_train_step", arguments),
        "ran_on": ran_on(options),
        "sizes": {k: v for k, v in vars(options).items() if k not in NOT_SIZES},
    }
    # The steps run in processes of their own, with this many.
    report["environment"]["threads"] = options.threads
    path = result_path("train_step", options.device, options.output)
    runs = {variant: [] for variant in VARIANTS}
    until = time.monotonic() + 60 * options.budget_minutes
    for done in range(1, options.rounds + 1):
        if done > 1 and time.monotonic() > until:
            break
        for variant in VARIANTS:
            runs[variant].append(measure(variant, arguments))
            seconds = runs[variant][-1]["seconds"]
            print(f"round {done}: {variant} {seconds:.2f} s", file=sys.stderr)
        if done == 1:
            check_losses({variant: runs[variant][0] for variant in VARIANTS})
        rows = summary(runs)
        report |= {"rounds_done": done, "headline": step_report.headlines(rows), "rows": rows}
        report["losses"] = {variant: runs[variant][0]["losses"] for variant in VARIANTS}
        step_report.write(path, report)
    print(f"{path.with_suffix('.md').read_text()}\nwritten: {path}, .md and .png")


if __name__ == "__main__":
    main()
