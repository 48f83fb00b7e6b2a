"""Asks for a learning rate by `suggest_learning_rate` at settings of the study.

What each suggestion costs follows from the study's own search at the same setting. In the folder
`examples`,

    python -m study.suggestions            runs all settings with all seeds, in about 15 minutes
    python -m study.suggestions --quick    is a smoke run

Each suggestion is written as soon as it is made. After an interruption the same command resumes
with the remaining ones.
"""

import argparse
import dataclasses
import json
import pathlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from tqdm import tqdm

from common.arguments import parsed_on, with_defaults
from keras_sngm import suggest_learning_rate
from study import config, methods, tasks
from study.config import Search
from study.suggested import Suggested, read
from study.summary import SNGM

SEEDS = (210, 211, 212)
PLACES = {
    "mnist1d": {
        "4,000 samples": (128, 500, 1000, 2000),
        "4,000 samples, batch norm": (128, 1000),
        "4,000 samples, batch norm of momentum 0.99": (1000,),
    },
    "images": {"Fashion-MNIST, conv net": (4096,)},
    "text": {"transformer, characters": (16, 128)},
    "clicks": {"click-through": (512,)},
}


def searches(quick: bool) -> list[tuple[str, Search]]:
    """Return the searches of the study at whose settings to ask, each with the name of its task."""
    if quick:
        search = config.load("mnist1d", quick=True).searches[0]
        # An epoch has fewer updates than a trial must have.
        setting = dataclasses.replace(search.setting, epochs=3)
        return [("mnist1d", dataclasses.replace(search, setting=setting))]
    return [
        (task, search)
        for task, settings in PLACES.items()
        for search in config.load(task).searches
        if search.method == SNGM and search.batch_size in settings.get(search.setting.name, ())
    ]


def suggested(task: str, search: Search, seed: int) -> Suggested:
    """Ask for a learning rate at the setting of a search."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    setting = search.setting
    loaded = tasks.load(setting.data)
    model = tasks.build(setting.model, loaded)
    # Compiled as in the study.
    model.compile(methods.METHODS[SNGM](0.1, setting.weight_decay), loaded.loss, jit_compile=False)
    whole = len(loaded.train.x) // search.batch_size * search.batch_size
    x, y = (array[:whole] for array in loaded.train)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are among the results
        found = suggest_learning_rate(
            model, x, y, search.batch_size, setting.epochs, verbose=0, seed=seed
        )
    return Suggested(
        task,
        setting.name,
        search.batch_size,
        seed,
        found.learning_rate,
        found.start,
        list(found.losses.items()),
        found.updates,
        found.doubts,
        round(time.perf_counter() - begin, 2),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m study.suggestions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="little data, one setting, one seed")
    parser.add_argument("--output", type=pathlib.Path, help="default results/study, ..._quick")
    usual: dict[str, Any] = {"output": pathlib.Path("results/study")}
    return with_defaults(
        parsed_on("tensorflow", parser, argv),
        usual=usual,
        quick={"output": pathlib.Path("results/study_quick")},
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    path = arguments.output / "suggestions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read(path)
    done = {(*one.place, one.seed) for one in results}
    left = [
        (task, search, seed)
        for task, search in searches(arguments.quick)
        for seed in (SEEDS[:1] if arguments.quick else SEEDS)
        if (task, search.setting.name, search.batch_size, seed) not in done
    ]
    with tqdm(left, unit="suggestion", dynamic_ncols=True) as bar:
        for task, search, seed in bar:
            bar.set_description(f"{task}, {search.setting.name}, batch {search.batch_size}")
            results.append(suggested(task, search, seed))
            path.write_text(json.dumps([one._asdict() for one in results], indent=1) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
