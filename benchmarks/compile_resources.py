"""Registers, spills, shared memory and matrix instructions of every Triton kernel, without a GPU:
python benchmarks/compile_resources.py [--full] [--rows FILE.jsonl] [--write FILE.md]

Compiles ahead of time for sm_80, sm_90 and sm_100 with the settings of launch.py, and reads the
resource usage out of the binary. These are not measurements of speed.

The full table takes about half an hour: with --rows every row is kept as it comes, and those of the
same kernels, settings and Triton are not compiled again, so it can be made in parts (--minutes 9),
by several processes (--arch, --head-size, with a file each: --rows takes several).
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
import triton
from cdfast_kernels import attn_bwd, attn_fwd, map_fwd
from cdfast_kernels.launch import head_dim_pad, settings_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {
    "fwd": (attn_fwd._attn_fwd_kernel, {}),
    "map": (map_fwd._visual_map_fwd_kernel, {"STATS": False, "IN_PANELS": True}),
    "map+stats": (map_fwd._visual_map_fwd_kernel, {"STATS": True, "IN_PANELS": False}),
    "delta": (attn_bwd._attn_bwd_delta_kernel, {"HAS_DLSE": False, "ALIGN": False}),
    "delta+align": (attn_bwd._attn_bwd_delta_kernel, {"HAS_DLSE": False, "ALIGN": True}),
    "dq": (attn_bwd._attn_bwd_dq_kernel, {"ALIGN": False}),
    "dq+align": (attn_bwd._attn_bwd_dq_kernel, {"ALIGN": True}),
    "dkdv": (attn_bwd._attn_bwd_dkdv_kernel, {"ALIGN": False}),
    "dkdv+align": (attn_bwd._attn_bwd_dkdv_kernel, {"ALIGN": True}),
    "align_dq": (attn_bwd._alignment_bwd_dq_kernel, {}),
    "align_dk": (attn_bwd._attn_bwd_dkdv_kernel, {"ALIGN": True, "ATTENTION": False}),
}
ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Arguments that are not tensors of the input dtype: everything else that is written in capitals is.
FLOATS = ("LSE", "DLSE", "DELTA", "ROW_SCALE", "DLOSS", "PARTS", "DS_SCALE")
TABLES = ("SAMPLES", "CODES", "BOUNDS", "SLOT_TILES")
LONG_TABLES = ("TILES", "PANELS")
MAPS = ("G", "TARGET")
NUMBERS = ("scale", "softmax_scale", "inv_heads", "map_scale", "target_scale")


def argument_type(name: str, dtype: str, stats: bool) -> str:
    if name in FLOATS:
        return "*fp32"
    if name in TABLES:
        return "*i32"
    if name in LONG_TABLES:
        return "*i64"
    if name == "MAP":
        return "*fp32" if stats or dtype == "fp32" else "*fp16"
    if name in MAPS:
        return "*fp32" if dtype == "fp32" else "*fp16"
    if name in NUMBERS:
        return "fp32"
    return f"*{dtype}" if name.isupper() else "i32"


def build(name: str, arch: int, dim: int, dtype: str, contiguous: bool = True):
    """The compiled kernel, as it is launched on `arch` for 16 query heads and 4 key heads."""
    function, flags = KERNELS[name]
    element = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    settings = settings_for(name.partition("+")[0], arch, dim, element)
    constants = {
        "HEADS": 16,
        "GROUP": 4,
        "HEAD_DIM": dim,
        "HEAD_DIM_PAD": head_dim_pad(dim),
        "BLOCK_M": settings.BLOCK_M,
        "BLOCK_N": settings.BLOCK_N,
        "EXACT": dtype == "fp32",
        "CONTIGUOUS": contiguous,
        "ACC_INIT": settings.acc_init,
        "ATTENTION": True,
        "RESCALE": dtype == "fp16",
        "ADD": False,
        "TARGET_IN_PANELS": True,
        # Triton makes a constant of an argument that is 1.
        "stride_ln": 1,
        "stride_en": 1,
        **flags,
    }
    signature, used, attributes = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument], used[argument] = "constexpr", constants[argument]
            continue
        signature[argument] = argument_type(argument, dtype, bool(flags.get("STATS")))
        aligned = signature[argument].startswith("*") or argument.startswith("stride_")
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, used, attributes)
    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), settings


def resources(name: str, arch: int, dim: int, dtype: str, contiguous: bool = True) -> dict:
    """What the binary uses, and the matrix instruction in its PTX ("-" for none)."""
    kernel, settings = build(name, arch, dim, dtype, contiguous)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        arguments = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    ptx = kernel.asm["ptx"]
    matrix = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return {
        "kernel": name,
        "arch": arch,
        "head_dim": dim,
        "dtype": dtype,
        "tiles": "contiguous" if contiguous else "segments",
        "block": f"{settings.BLOCK_M}x{settings.BLOCK_N}",
        "warps": settings.num_warps,
        "stages": settings.num_stages,
        "registers": int(found[1]),
        "spill_bytes": int(found[2]) + int(found[3]),
        "shared_kib": round(kernel.metadata.shared / 1024, 1),
        "matrix": next((n for n, text in matrix.items() if text in ptx), "-"),
    }


def table(rows: list[dict]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(r[c]) for c in columns] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in ("kernel", "arch", "head_dim", "dtype", "tiles"))


def fingerprint(name: str, arch: int, dim: int, dtype: str) -> str:
    """Of what a row depends on: the source of the kernel and of all it calls, settings, Triton."""
    element = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    settings = settings_for(name.partition("+")[0], arch, dim, element)
    text = f"{triton.__version__} {KERNELS[name][0].cache_key} {tuple(settings)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def known_rows(paths: list[Path]) -> dict[tuple, tuple[str, dict]]:
    """Key -> fingerprint and row, of earlier runs. A line that was cut off does not count."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                source = row.pop("source")
                found[key_of(row)] = source, row
    return found


def wanted(options: argparse.Namespace) -> list[tuple[str, int, int, str, bool]]:
    layouts = [not options.segments]
    if options.full:
        layouts = [True, False]
    shapes = itertools.product(options.arch, layouts, options.dtype, options.dim, options.kernel)
    return [(name, arch, dim, dtype, contiguous) for arch, contiguous, dtype, dim, name in shapes]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--head-size", "--dim", dest="dim", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--segments", action="store_true", help="layouts with several segments")
    parser.add_argument("--full", action="store_true", help="every head size, dtype and layout")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="the first is added to")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--write", type=Path, help="a .md file to write the table to")
    options = parser.parse_args(argv)
    options.dim = options.dim or ([32, 64, 80, 96, 128, 256] if options.full else [64, 128])
    options.dtype = options.dtype or (list(DTYPES) if options.full else ["bf16"])
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    begin = time.monotonic()
    known = known_rows(options.rows)
    rows, missing = [], 0
    for job in wanted(options):
        name, arch, dim, dtype, contiguous = job
        key = (name, arch, dim, dtype, "contiguous" if contiguous else "segments")
        source = fingerprint(name, arch, dim, dtype)
        if key not in known or known[key][0] != source:
            if time.monotonic() - begin > 60 * options.minutes:
                missing += 1
                continue
            known[key] = source, resources(*job)
            if options.rows:
                # The newline stands first: the last line of a run that was stopped may be cut off.
                with options.rows[0].open("a") as file:
                    file.write("\n" + json.dumps({**known[key][1], "source": source}))
        rows.append(known[key][1])
        print(json.dumps(rows[-1]), flush=True)
    if missing:
        print(f"{missing} rows not compiled yet: the same command goes on", file=sys.stderr)
    if options.write and rows and not missing:
        title = f"# Compiled resources of the Triton kernels (Triton {triton.__version__})\n\n"
        note = (
            "Ahead of time, no GPU: registers per thread, bytes of stack and local memory per "
            "thread, shared memory per program. Speed: not measured.\n\n"
        )
        command = f"Command: `{' '.join(['python', *sys.argv])}`"
        options.write.write_text(f"{title}{note}{command}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
