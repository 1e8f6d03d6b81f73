"""One recipe on its way through the stages: its folders, what stages share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from cdfast.config import ConfigError, Recipe
from cdfast.data import DataError
from cdfast.matching import Matches

# In a stage's folder when the stage is done.
STAGE_FILE = "stage.json"


@dataclass
class Run:
    """One recipe on its way through the stages."""

    recipe: Recipe
    folder: Path
    processor: Any
    state: PartialState
    # A model; its engine, once a stage has sharded it.
    teacher: nn.Module | None = None
    # Opened files by (data, roots): checking the records of a large set takes minutes.
    datasets: dict[Any, Any] = field(default_factory=dict)
    # Layers that the last stage with alignment had: adaptive matching chooses them once in a run.
    matches: Matches | None = None

    @property
    def initial_student(self) -> Path:
        return self.folder / "student-init"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def stage_folder(self, number: int) -> Path:
        return self.folder / "stages" / f"{number}-{self.recipe.stages[number - 1].stage}"

    def student_after(self, number: int) -> Path:
        """Where stage `number` (1-based) leaves the student; 0 is before the first."""
        if number == 0:
            return self.initial_student
        last = number == len(self.recipe.stages)
        return self.model if last else self.stage_folder(number) / "model"

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Around what is built from a recipe: a ValueError there is about an option, not a bug."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
