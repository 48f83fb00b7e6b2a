"""Text and pictures of a report on all tasks of the study."""

import math
import pathlib
import statistics
from collections.abc import Sequence

import jinja2

from study import config, pictures, results, suggested, tables
from study.rates import LearningRates
from study.summary import Summary, epochs_to, summaries


class Report:
    """The results of all tasks, with methods that a template of a page calls.

    Args:
        folder: the folder with the files of runs.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
        self.runs = {path.name.partition(".")[0]: results.read(path) for path in files}
        found = {task: summaries(runs) for task, runs in self.runs.items()}
        self.tasks = {task: finished for task, finished in found.items() if finished}
        self.studies = {task: config.load(task) for task in self.tasks}
        self.rates = LearningRates(self.tasks, suggested.read(folder / "suggestions.json"))

    def find(self, task: str, setting: str, batch_size: int, method: str) -> Summary:
        """Return the summary of a finished search.

        Raises:
            KeyError: if there is none.
        """
        for each in self.tasks[task]:
            if (each.setting, each.batch_size, each.method) == (setting, batch_size, method):
                return each
        raise KeyError(f"There is no finished search {task}, {setting}, {batch_size}, {method}")

    def scores(self, task: str) -> str:
        """Return the table of the test scores of a task."""
        return tables.scores(self.tasks[task], self.studies[task].measure)

    def matrix(self, task: str, columns: Sequence[tuple[str, int]]) -> str:
        """Return the table of test scores with a row for each method.

        Args:
            task: the task.
            columns: the setting and the batch size of each column.
        """
        return tables.matrix(self.tasks[task], columns)

    def joined(self, columns: Sequence[tuple[str, str, int]]) -> str:
        """Return one table of test scores for several tasks, with a row for each method.

        Args:
            columns: the task, the setting and the batch size of each column.
        """
        found = [each for task in dict.fromkeys(c[0] for c in columns) for each in self.tasks[task]]
        return tables.matrix(found, [column[1:] for column in columns])

    def conversion_factors(self) -> list[float]:
        """Return SNGM's best rate / the length of momentum SGD's best steps, for all settings."""
        return [tables.conversion(*pair) for pair in self._pairs()]

    def growth(self, task: str, setting: str, sizes: tuple[int, int], method: str) -> float:
        """Return the g for which a method's best learning rate grows as (batch size)^g.

        Args:
            task: the task.
            setting: the name of the setting.
            sizes: the two batch sizes that g is computed from.
            method: the method.
        """
        rates = [self.find(task, setting, size, method).learning_rate for size in sizes]
        return math.log(rates[1] / rates[0]) / math.log(sizes[1] / sizes[0])

    def _pairs(self) -> list[tuple[Summary, Summary]]:
        """Return SNGM and momentum SGD at every setting and batch size of all tasks."""
        return [pair for found in self.tasks.values() for pair in tables.pairs(found)]

    def fill(self, template: str, folder: str) -> str:
        """Return the text of a Jinja template, filled in with the results.

        Args:
            template: the template. It may use the names that are passed to `render` below.
            folder: the path of the folder of pictures, relative to the text.
        """
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        return environment.from_string(template).render(
            tasks=self.tasks,
            studies=self.studies,
            pictures=pictures.PICTURES,
            folder=folder,
            count=lambda task: len(self.runs[task]),
            hours=lambda task: sum(run.seconds for run in self.runs[task]) / 3600.0,
            find=self.find,
            scores=self.scores,
            matrix=self.matrix,
            joined=self.joined,
            conversion_factors=self.conversion_factors,
            growth=self.growth,
            median=statistics.median,
            spread=tables.spread,
            lead=tables.lead,
            epochs_to=epochs_to,
            rates=self.rates,
        )

    def draw(self, folder: pathlib.Path) -> None:
        """Draw all pictures of all tasks into a folder."""
        for task, found in self.tasks.items():
            for name, draw in pictures.PICTURES.items():
                draw(found, self.studies[task].measure, folder / f"{task}_{name}.png")
