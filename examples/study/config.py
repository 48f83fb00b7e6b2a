"""What a study consists of, read from its JSON file."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from study.methods import METHODS

STUDIES = pathlib.Path(__file__).resolve().parent / "studies"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, model and length of training, the same for all methods.

    Attributes:
        name: to tell it from others of the study.
        data: a function of `study.tasks` and its arguments.
        model: the same.
        epochs: of each run.
        weight_decay: of each method but AdamW, coupled.
    """

    name: str
    data: dict[str, Any]
    model: dict[str, Any]
    epochs: int
    weight_decay: float

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes what is trained."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Search:
    """One method at one batch size: its learning rate is tuned, then it is judged.

    Attributes:
        setting: what is trained.
        batch_size: in samples.
        method: a key of `METHODS`.
        start: the k in the middle of the first rates 2^(k/2) to try.
    """

    setting: Setting
    batch_size: int
    method: str
    start: int


@dataclasses.dataclass(frozen=True)
class Study:
    """A file of `examples/study/studies`.

    Attributes:
        task: the name of the file.
        measure: what a score is, for people.
        rates: how many learning rates every method gets at least.
        tuning_seeds: each rate is tried with all of them.
        final_seeds: those of the runs that are reported.
        searches: in the order to run them.
    """

    task: str
    measure: str
    rates: int
    tuning_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    searches: tuple[Search, ...]


def available() -> list[str]:
    """The names of all studies."""
    return sorted(path.stem for path in STUDIES.glob("*.json"))


def load(task: str, quick: bool = False) -> Study:
    """The study of this name; with `quick` so little of everything that it takes a minute.

    Raises:
        ValueError: if the file names a method that there is not.
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
    batch_size, methods = next(iter(setting["batch_sizes"].items()))
    return {
        **setting,
        "data": {**setting["data"], **changes["data"]},
        "model": {**setting["model"], **changes.get("model", {})},
        "epochs": 1,
        "batch_sizes": {changes.get("batch_size", batch_size): methods},
    }


def _searches(setting: dict[str, Any], start: dict[str, int]) -> list[Search]:
    common = Setting(
        setting["name"],
        setting["data"],
        setting["model"],
        setting["epochs"],
        setting["weight_decay"],
    )
    searches = []
    for batch_size, methods in setting["batch_sizes"].items():
        names = list(METHODS) if methods == "all" else methods
        if unknown := set(names) - set(METHODS):
            raise ValueError(
                f"`batch_sizes` must name methods among {list(METHODS)}. "
                f"Received: {sorted(unknown)}"
            )
        searches += [Search(common, int(batch_size), name, start[name]) for name in names]
    return searches
