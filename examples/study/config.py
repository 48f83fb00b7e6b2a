"""Settings and searches of a study, read from its JSON file."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from study.methods import ABLATIONS, METHODS

STUDIES = pathlib.Path(__file__).resolve().parent / "studies"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, model and length of training, the same for all methods.

    Attributes:
        name: the name of the setting, unique in the study.
        data: the name of a task in `study.tasks.TASKS` and keyword arguments for it.
        model: the name of a model in `study.tasks.MODELS` and keyword arguments for it.
        epochs: the number of epochs of each run.
        weight_decay: the coupled weight decay of all methods but AdamW.
    """

    name: str
    data: dict[str, Any]
    model: dict[str, Any]
    epochs: int
    weight_decay: float

    @property
    def fingerprint(self) -> str:
        """Return a hash of the whole setting, by which runs of a changed setting are recognized."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Search:
    """The search for the best learning rate of one method at one batch size.

    Runs at the best rate with other seeds follow, which are reported.

    Attributes:
        setting: the data, the model and the length of training.
        batch_size: the number of samples in a batch.
        method: a key of `METHODS`.
        start: the k in the middle of the first rates 2^(k/2) to try.
    """

    setting: Setting
    batch_size: int
    method: str
    start: int


@dataclasses.dataclass(frozen=True)
class Study:
    """The content of a file of `examples/study/studies`.

    Attributes:
        task: the name of the file, without its ending.
        measure: the name of the score in tables and pictures, such as "accuracy".
        rates: the least number of learning rates to try for every method.
        tuning_seeds: the seeds that each learning rate is tried with.
        final_seeds: the seeds of the runs that are reported.
        searches: all searches, in the order to run them.
    """

    task: str
    measure: str
    rates: int
    tuning_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    searches: tuple[Search, ...]


def available() -> list[str]:
    """Return the names of all studies."""
    return sorted(path.stem for path in STUDIES.glob("*.json"))


def load(task: str, quick: bool = False) -> Study:
    """Load the study of a task; with `quick`, reduced to a smoke run of about a minute.

    Raises:
        ValueError: if the file names an unknown method.
    """
    content = json.loads((STUDIES / f"{task}.json").read_text())
    settings = content["settings"]
    if quick:
        content |= {"rates": 2, "tuning_seeds": [100], "final_seeds": [0, 1]}
        settings = [_quick(setting, content["quick"]) for setting in settings[:1]]
    return Study(
        task,
        content["measure"],
        content["rates"],
        tuple(content["tuning_seeds"]),
        tuple(content["final_seeds"]),
        tuple(search for setting in settings for search in _searches(setting, content["start"])),
    )


def _quick(setting: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a setting reduced to one epoch, one batch size and the given changes."""
    batch_size, methods = next(iter(setting["batch_sizes"].items()))
    return {
        **setting,
        "data": {**setting["data"], **changes["data"]},
        "model": {**setting["model"], **changes.get("model", {})},
        "epochs": 1,
        "batch_sizes": {changes.get("batch_size", batch_size): methods},
    }


def _searches(setting: dict[str, Any], start: dict[str, int]) -> list[Search]:
    """Return the searches of a setting, one for each batch size and method.

    Args:
        setting: a setting as in the JSON file.
        start: the `Search.start` of each method.
    """
    common = Setting(
        setting["name"],
        setting["data"],
        setting["model"],
        setting["epochs"],
        setting["weight_decay"],
    )
    searches = []
    for batch_size, methods in setting["batch_sizes"].items():
        names = [name for name in METHODS if name not in ABLATIONS] if methods == "all" else methods
        if unknown := set(names) - set(METHODS):
            raise ValueError(
                f"`batch_sizes` must name methods among {list(METHODS)}. "
                f"Received: {sorted(unknown)}"
            )
        searches += [Search(common, int(batch_size), name, start[name]) for name in names]
    return searches
