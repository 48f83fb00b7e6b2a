"""The runs of a study, one JSON object per line."""

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
    """A run of a search: learning rate 2^(exponent / 2), seed, and whether it is reported."""

    exponent: int
    seed: int
    final: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training run gave.

    Attributes:
        setting: name of the setting.
        fingerprint: of all that the setting says.
        method: name of the method.
        batch_size: in samples.
        exponent: the learning rate is 2^(exponent / 2).
        seed: of weights and of the order of samples.
        final: whether it is one of those that are reported, or one of tuning.
        epochs: that were asked for.
        steps: that were asked for.
        seconds: that training took.
        validation: score on validation data after each epoch; of a run of tuning at the
            end alone.
        test: score on test data at the end, `None` in tuning.
        test_loss: the same of the loss; infinite if training failed.
        train_loss: mean of each epoch.
        grad_norm: mean of each epoch; none in tuning.
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
        return self.setting, self.batch_size, self.method


def key_of(search: Search) -> tuple[str, int, str]:
    """What `Run.search` is for runs of this search."""
    return search.setting.name, search.batch_size, search.method


def read(path: pathlib.Path) -> list[Run]:
    """All runs of a file, compressed if its name ends in `.gz`.

    A last line that was cut off, as when its process was killed, is left out.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [Run(**json.loads(line)) for line in lines]


def grouped(runs: Iterable[Run]) -> dict[tuple[str, int, str], list[Run]]:
    """The runs of each search."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.search, []).append(run)
    return groups


@contextlib.contextmanager
def only_writer(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from doing the same runs and writing them to the same file.

    Raises:
        RuntimeError: if there is another one.
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
    """The runs of a file that is to be gone on with; a line that was cut off is removed."""
    path.touch()
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    return read(path)


def append(path: pathlib.Path, run: Run) -> None:
    """Write one more run."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(run)) + "\n")
