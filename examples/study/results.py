"""The runs of a study and their file, with one JSON object per line."""

import contextlib
import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterable, Iterator

import filelock

from study.config import Search


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A run that a search needs.

    Attributes:
        exponent: the learning rate is 2^(exponent / 2).
        seed: the seed of the initial weights and of the order of samples.
        final: whether the run is one of those that are reported, or one of tuning.
    """

    exponent: int
    seed: int
    final: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings and results of one training run.

    Attributes:
        setting: the name of the setting.
        fingerprint: the hash of the setting.
        method: the name of the method.
        batch_size: the number of samples in a batch.
        exponent: the learning rate is 2^(exponent / 2).
        seed: the seed of the initial weights and of the order of samples.
        final: whether the run is one of those that are reported, or one of tuning.
        epochs: the number of epochs that were asked for.
        steps: the number of steps that were asked for.
        seconds: the duration of training.
        validation: the score on validation data after each epoch, or only at the end in tuning.
        test: the score on test data at the end, `None` in tuning.
        test_loss: the loss on test data at the end, `None` in tuning; infinite if training
            failed.
        train_loss: the mean training loss of each epoch.
        grad_norm: the mean gradient norm of each epoch; empty in tuning.
    """

    setting: str
    fingerprint: str
    method: str
    batch_size: int
    exponent: int
    seed: int
    final: bool
    epochs: int
    steps: int
    seconds: float
    validation: list[float]
    test: float | None
    test_loss: float | None
    train_loss: list[float]
    grad_norm: list[float]

    @property
    def search(self) -> tuple[str, int, str]:
        """Return setting, batch size and method, which identify the search of this run."""
        return self.setting, self.batch_size, self.method


def key_of(search: Search) -> tuple[str, int, str]:
    """Return the setting, batch size and method of a search: the `Run.search` of its runs."""
    return search.setting.name, search.batch_size, search.method


def read(path: pathlib.Path) -> list[Run]:
    """Read all runs of a file, which is compressed if its name ends in `.gz`.

    An incomplete last line, as a killed process may leave, is ignored.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [Run(**json.loads(line)) for line in lines]


def grouped(runs: Iterable[Run]) -> dict[tuple[str, int, str], list[Run]]:
    """Group runs by their search."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.search, []).append(run)
    return groups


@contextlib.contextmanager
def only_writer(path: pathlib.Path) -> Iterator[None]:
    """Lock a file of runs, so that no other process does the same runs and writes them.

    Raises:
        RuntimeError: if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise RuntimeError(f"Another process writes to {path}. Wait for it or end it.") from None
    try:
        yield
    finally:
        lock.release()


def resume(path: pathlib.Path) -> list[Run]:
    """Read the runs of a file to append to, and remove an incomplete last line from the file."""
    path.touch()
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    return read(path)


def append(path: pathlib.Path, run: Run) -> None:
    """Append a run to a file."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(run)) + "\n")
