"""Fixtures of several folders."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Models this small are slower on more, several times over on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Tiny checkpoints, photographs and records about them."""
    from tests.cdfast import photo_setup

    return photo_setup.make_checkpoints(tmp_path_factory.mktemp("photos"))
