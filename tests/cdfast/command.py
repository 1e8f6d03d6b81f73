"""The command with bad input: what it prints when it refuses."""

import pytest

from cdfast.train import main


def refused(arguments, capsys):
    """The one line that the command prints when it ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert printed.rstrip("\n").endswith(lines[0])
    return lines[0]


def options(paths, out, **changed):
    """Options of a run on the photographs; None leaves one out."""
    given = {
        "teacher": paths.teacher,
        "student": paths.student,
        "data": paths.data,
        "image-root": paths.images,
        "output-dir": out,
        **changed,
    }
    pairs = [(f"--{k}", str(v)) for k, v in given.items() if v is not None]
    return [text for pair in pairs for text in pair]


def arguments(paths, out, **changed):
    """Of a run of one step."""
    return ["compodistill", *options(paths, out, **{"max-steps": 1, **changed})]
