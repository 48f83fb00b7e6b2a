"""The large-batch study: compares methods on a task, each at its best learning rate.

For each batch size each method gets the same search for its learning rate on a grid in
powers of sqrt(2). The best rate has the highest mean score on validation data over some
seeds. The grid is extended until the best rate is not at its edge. Then the method is
trained at this rate with other seeds, whose scores on test data are reported. Tasks are
described in study/studies/*.json. In the folder `examples`,

    python -m study --task mnist1d            runs all of a task
    python -m study --task mnist1d --quick    is a smoke run
    python -m study.report                    makes tables and pictures from all results

Each run is written to a file as soon as it is done. After an interruption the same command
resumes with the remaining runs.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from tqdm import tqdm

from common.arguments import parsed_on
from study import config, results, search, workers
from study.config import Search, Study
from study.results import Run, Wanted


class Progress:
    """The finished runs of a study, in memory and in a file, with a progress bar.

    Args:
        study: the study.
        path: the file of runs; it may exist and is appended to.

    Raises:
        ValueError: if the file has runs of a setting that has been changed since.
    """

    def __init__(self, study: Study, path: pathlib.Path) -> None:
        self.study = study
        self.path = path
        self.runs: dict[tuple[str, int, str], list[Run]] = {
            results.key_of(search): [] for search in study.searches
        }
        fingerprints = {s.setting.name: s.setting.fingerprint for s in study.searches}
        for run in results.resume(path):
            if fingerprints.get(run.setting) != run.fingerprint:
                raise ValueError(
                    f"{path} has runs of '{run.setting}' as it no longer is. "
                    "Choose another `--output` or remove the file."
                )
            self.runs.setdefault(run.search, []).append(run)
        self.bar = tqdm(unit=" samples", unit_scale=True, dynamic_ncols=True, smoothing=0.0)
        self._update_total()

    def pending(self, search_: Search) -> list[Wanted]:
        """Return the runs that a search needs next, none if it is done."""
        return search.wanted(self.study, search_, self.runs[results.key_of(search_)])

    def add(self, run: Run) -> None:
        """Store a finished run and advance the bar."""
        results.append(self.path, run)
        self.runs[run.search].append(run)
        self.bar.set_description(f"{run.setting}, batch {run.batch_size}, {run.method}")
        self.bar.update(run.steps * run.batch_size)
        self._update_total()

    def _update_total(self) -> None:
        """Set the total of the bar to an estimate of the samples of all runs, done and to do.

        A search is assumed to need the usual number of runs, or more if more are pending.
        """
        usual = self.study.rates * len(self.study.tuning_seeds) + len(self.study.final_seeds)
        left = 0
        for each in self.study.searches:
            done = len(self.runs[results.key_of(each)])
            runs = max(usual - done, len(self.pending(each))) if self.pending(each) else 0
            samples = each.setting.data["samples"]
            left += runs * each.setting.epochs * (samples - samples % each.batch_size)
        self.bar.total = self.bar.n + left
        self.bar.refresh()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=config.available())
    parser.add_argument("--quick", action="store_true", help="little data, one epoch, two rates")
    parser.add_argument("--jobs", type=int, help="processes; default all cores, on a GPU one")
    parser.add_argument(
        "--output", type=pathlib.Path, help="default results/study, results/study_quick"
    )
    arguments = parsed_on("tensorflow", parser, argv)
    if arguments.output is None:
        name = "study_quick" if arguments.quick else "study"
        arguments.output = pathlib.Path("results") / name
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    study = config.load(arguments.task, arguments.quick)
    path = arguments.output / f"{study.task}.jsonl"
    with results.only_writer(path):
        carry_out(study, path, arguments.jobs or default_jobs())
    print(f"Wrote {path}")


def carry_out(study: Study, path: pathlib.Path, jobs: int) -> None:
    """Do the remaining runs of a study in `jobs` processes, and write them to a file."""
    progress = Progress(study, path)
    with progress.bar:
        if settings := {s.setting.name: s.setting for s in study.searches if progress.pending(s)}:
            progress.bar.set_description("data")
            workers.prepare([setting.data for setting in settings.values()])
        for run in workers.run_all(study.searches, progress.pending, jobs):
            progress.add(run)


def default_jobs() -> int:
    """Return the number of processes: 1 if there is a GPU, else the number of cores."""
    # PyTorch, which Keras may run on, must not be imported after TensorFlow. So TensorFlow is not
    # imported at the top.
    import tensorflow as tf

    return 1 if tf.config.list_physical_devices("GPU") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
