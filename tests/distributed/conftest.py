"""The warm process, shared by the tests that fork ranks from it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.warm import Warm

SOURCE = Path(__file__).parent / "faults.c"


@pytest.fixture(scope="package")
def warm(tmp_path_factory):
    """The forking process with the library of faults in it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc) for the library of faults")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"],
        check=True,
    )
    process = Warm(library)
    yield process
    process.close()
