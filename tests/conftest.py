"""Fixtures of several folders."""

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    """Of several processes (pytest-xdist) none should begin the longest files when the others end:
    files with slow tests come first."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


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
