"""The real command on two ranks: the death of one ends the other, which says so."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
import yaml

from cdfast.watch import RANK_LOST
from tests.cdfast import photo_setup
from tests.distributed.test_two_ranks import ROOT, command


@pytest.mark.slow
def test_the_command_is_watched(tmp_path):
    """Without torchrun, which would end the other rank itself."""
    arguments = command(photo_setup.make_checkpoints(tmp_path), tmp_path)
    recipe = yaml.safe_load((tmp_path / "given.yaml").read_text())
    recipe["stages"] = [{"stage": "dft", "batch_size": 1, "max_steps": 10_000}]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(recipe))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    }
    log = tmp_path / "rank0.log"
    ranks = []
    for rank in range(2):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [sys.executable, *map(str, arguments)]
        with (tmp_path / f"rank{rank}.log").open("w") as output:
            process = subprocess.Popen(
                words, env=environment, stdout=output, stderr=output, cwd=tmp_path
            )
        ranks.append(process)
    try:
        until = time.monotonic() + 240
        while "'loss'" not in log.read_text():
            assert time.monotonic() < until
            assert [rank.poll() for rank in ranks] == [None, None], log.read_text()[-2000:]
            time.sleep(0.2)
        time.sleep(3)  # its step is told once a second
        ranks[1].kill()
        assert ranks[0].wait(30) == RANK_LOST
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(30)
    said = log.read_text()
    assert re.search(rf"error: rank 1 \(host \S+, pid {ranks[1].pid}\) died at step [1-9]", said)
    assert "Traceback" not in said
