"""A process that has imported everything and forks ranks: a start takes no 10 s but none.

`python -m tests.distributed.warm` reads jobs from its standard input, one JSON object a line, and
answers each with the exit codes of its ranks (negative: the signal). A job is the keyword arguments
of `train`, or `argv` for the command, with `ranks`, `log` (prefix of the files for output) and
`fault`: {"rank": of the rank it happens on, "root", "events": file for the list of events, ...}.

`Warm` is the other end, for tests.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
ACTIONS = {"count": 0, "kill": 1, "error": 2}
PHASES = {"before": 0, "halfway": 1, "after": 2}
# The survivor of a killed rank ends by itself, when the connection breaks; else it is killed.
SURVIVAL_SECONDS = 5.0
# Ranks that wait for each other are killed, so that the test fails by their exit codes.
JOB_SECONDS = 120.0


class Warm:
    """Starts the process, sends it jobs, ends it."""

    def __init__(self, preload=None):
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        if preload:
            environment["LD_PRELOAD"] = str(preload)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def run(self, **job):
        """Exit codes of the ranks."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


# -- in a rank -------------------------------------------------------------------------------------


class Fault:
    """The C library's fault, armed for the saves or the start of a run."""

    def __init__(self, root, events, action="count", at=0, phase="before", code=0, sticky=False):
        self.library = ctypes.CDLL(None)
        self.library.fault_disarm.restype = ctypes.c_long
        self.arguments = (
            os.fsencode(root),
            os.fsencode(events),
            ACTIONS[action],
            ctypes.c_long(at),
            PHASES[phase],
            code,
            int(sticky),
        )

    def arm(self):
        self.library.fault_arm(*self.arguments)

    def disarm(self):
        self.library.fault_disarm()


def train(
    folder,
    steps,
    trace=None,
    stage=0,
    what="everything",
    save_steps=1,
    save_total_limit=2,
    resume=True,
    stop_after=None,
    fault=None,
    end=None,
    verified=True,
    **options,
):
    """Train tiny models, resuming if possible; every step's loss goes to `trace`.

    With `stop_after` only so many of the steps are taken now. The fault is armed for the first
    save. The trained weights are left in the file `end`. Without `verified`, whatever is found is
    resumed from.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback

    import cdfast.checkpoint
    from cdfast import DistillationConfig
    from cdfast.collator import VisionTextCollator
    from cdfast.engine import full_state_dict
    from tests.cdfast.samples import TinySamples
    from tests.distributed.step_script import InOrder, make_student

    torch.set_num_threads(1)
    if not verified:
        cdfast.checkpoint.verify = lambda checkpoint, zero_stage: None
    if stage:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        options["deepspeed"] = {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }

    class Trace(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.begin = state.global_step

        def on_step_end(self, args, state, control, **kwargs):
            if stop_after and state.global_step >= self.begin + stop_after:
                control.should_training_stop = True

        def on_log(self, args, state, control, logs, **kwargs):
            if trace and state.is_world_process_zero and "loss" in logs:
                with open(trace, "a") as file:
                    norm = float(logs["grad_norm"]).hex()
                    file.write(f"{state.global_step} {logs['loss'].hex()} {norm}\n")

    class Faulty(InOrder):
        def _save_checkpoint(self, *args, **kwargs):
            nonlocal fault
            mine, fault = fault, None
            if mine:
                mine.arm()
            super()._save_checkpoint(*args, **kwargs)
            if mine:
                mine.disarm()

    teacher, student = make_student("everything")
    if what == "lora":
        # With dropout: a rank that does not get its own generator back takes another step.
        torch.manual_seed(0)
        student = get_peft_model(
            student,
            LoraConfig(
                r=4,
                lora_dropout=0.2,
                init_lora_weights=False,  # so that both factors have a gradient
                target_modules=r".*language_model.*\.(q|v|down)_proj",
                modules_to_save=[f"multi_modal_projector.linear_{n}" for n in (1, 2)],
            ),
        )
    arguments = DistillationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        use_cpu=True,
        logging_steps=1,
        save_steps=save_steps,
        save_total_limit=save_total_limit,
        report_to="none",
        disable_tqdm=True,
        layers="all",
        **options,
    )
    trainer = Faulty(
        model=student,
        teacher=teacher,
        args=arguments,
        train_dataset=TinySamples(4 * 50),
        data_collator=VisionTextCollator(0),
        callbacks=[Trace()],
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = full_state_dict(trainer.model)
    if end and trainer.is_world_process_zero():
        torch.save(weights, end)


def command(argv, fault):
    """The command, with the fault armed all the time."""
    import torch

    from cdfast.train import main

    torch.set_num_threads(1)
    if fault:
        fault.arm()
    main(argv)
    if fault:
        fault.disarm()


def rank_main(rank, port, ranks, log, fault=None, **job):
    """What a forked rank does; returns its exit code."""
    from cdfast.storage import CheckpointError

    output = os.open(f"{log}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        mine = Fault(**fault) if fault and fault.pop("rank") == rank else None
        if "argv" in job:
            command(job["argv"], mine)
        else:
            train(fault=mine, **job)
    except SystemExit as end:
        return end.code or 0
    except CheckpointError as error:
        print(f"error: {error}", flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(ranks, kill=None, **job):
    """Fork the ranks and wait; once one has failed the others get a little time.

    `kill`: {"ranks", "after": seconds, "file": whose growth starts the clock, if given}.
    """
    children = fork_ranks(ranks, **job)
    size = file_size(kill)
    begun = started = time.monotonic()
    codes, deadline = {}, None
    while len(codes) < ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children[pid]] = os.waitstatus_to_exitcode(status)
            if codes[children[pid]] and deadline is None:
                deadline = time.monotonic() + SURVIVAL_SECONDS
            continue
        if kill and kill.get("file") and file_size(kill) == size:
            started = time.monotonic()
        due = kill and time.monotonic() > started + kill["after"]
        hung = time.monotonic() > begun + JOB_SECONDS
        if due or hung or (deadline and time.monotonic() > deadline):
            chosen = kill["ranks"] if due else range(ranks)
            for child, rank in children.items():
                if rank in chosen and rank not in codes:
                    os.kill(child, signal.SIGKILL)
            kill, deadline = None, time.monotonic() + SURVIVAL_SECONDS
        time.sleep(0.005)
    return [codes[rank] for rank in range(ranks)]


def file_size(kill):
    """None where the clock starts at once."""
    path = kill and kill.get("file")
    return (os.path.getsize(path) if os.path.exists(path) else 0) if path else None


def fork_ranks(ranks, **job):
    """{process id: rank}"""
    port = free_port()
    children = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = rank_main(rank, port, ranks, **job)
                sys.stdout.flush()
            finally:
                os._exit(code)
        children[pid] = rank
    return children


def warm_up():
    """Import and build once what every rank needs, as far as it starts no thread."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    from cdfast_kernels import available_backends

    import cdfast.plots
    import cdfast.train  # noqa: F401
    from tests.distributed.step_script import make_student

    available_backends()
    _, student = make_student("lora")
    with tempfile.TemporaryDirectory() as folder:
        student.get_base_model().save_pretrained(folder)
    del student
    gc.collect()
    gc.freeze()  # a collection in a rank looks at what the rank has made


def main():
    warm_up()
    answers = os.dup(1)  # what libraries print is not an answer
    os.dup2(2, 1)
    for line in sys.stdin:
        os.write(answers, (json.dumps(run_ranks(**json.loads(line))) + "\n").encode())
    os._exit(0)  # frozen objects would be reported as leaked


if __name__ == "__main__":
    main()
