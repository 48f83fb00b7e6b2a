"""What the page on learning rates says: the formula, suggestions and what they cost."""

import inspect
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property

import keras_sngm
from keras_sngm.learning_rate import CONSTANT, EXPONENT
from study import formula
from study.formula import Law, Quality, Row
from study.methods import ABLATIONS
from study.suggested import Suggested
from study.summary import SNGM, Summary
from study.tables import markdown

CONSTANT_RATE = "SNGM, constant rate"
"""The variation of SNGM that the package's default learning rate is for."""

STALE = "batch norm of momentum 0.99"
"""End of the name of the setting whose batch statistics lag behind."""


class LearningRates:
    """Learning rates of SNGM by the formula and by suggestion, beside the best of the study.

    Args:
        tasks: the results of each task.
        suggested: the suggestions that were made at settings of these tasks.
    """

    def __init__(
        self, tasks: Mapping[str, Sequence[Summary]], suggested: Sequence[Suggested]
    ) -> None:
        self.ablations = tasks.get("ablations", ())
        self.tasks = {task: found for task, found in tasks.items() if task != "ablations"}
        self.all_suggested = suggested

    @property
    def law(self) -> Law:
        """Return the law of the package's formula."""
        return Law(CONSTANT, EXPONENT)

    @property
    def default(self) -> float:
        """Return the package's default learning rate."""
        return inspect.signature(keras_sngm.SNGM).parameters["learning_rate"].default

    @property
    def fitted(self) -> Law:
        """Return the law that fits the best rates of all tasks."""
        return formula.fitted([each for _, each in formula.of_sngm(self.tasks)])

    @property
    def fitted_without(self) -> dict[str, Law]:
        """Return for each task the law that fits the best rates of all others."""
        return {task: formula.fitted_without(self.tasks, task) for task in self.tasks}

    @property
    def median_constant(self) -> float:
        """Return the median of the constants that would give the best rates, at the exponent."""
        return statistics.median(
            each.learning_rate / formula.updates_per_epoch(each) ** EXPONENT
            for _, each in formula.of_sngm(self.tasks)
        )

    @cached_property
    def of_formula(self) -> list[Row]:
        """Return the formula's rate at every setting of the study."""
        return formula.formula_rows(self.tasks)

    @cached_property
    def left_out(self) -> Quality:
        """Return how good rates are by laws that were fitted without the task."""
        return formula.quality(formula.left_out_rows(self.tasks))

    @cached_property
    def suggested(self) -> list[tuple[Suggested, Row]]:
        """Return the suggestions at all settings but that of lagging statistics."""
        return [pair for pair in self._pairs if not pair[0].setting.endswith(STALE)]

    @cached_property
    def stale(self) -> list[Row]:
        """Return the suggestions at the setting whose batch statistics lag behind."""
        return [row for one, row in self._pairs if one.setting.endswith(STALE)]

    @property
    def stale_formula(self) -> Row:
        """Return the formula's rate at the setting whose batch statistics lag behind."""
        return next(row for row in self.of_formula if row.summary.setting.endswith(STALE))

    @property
    def of_suggestion(self) -> list[Row]:
        """Return the suggested rates."""
        return [row for _, row in self.suggested]

    @property
    def of_formula_there(self) -> list[Row]:
        """Return the formula's rate at every setting that has suggestions."""
        there = {row.place for row in self.of_suggestion}
        return [row for row in self.of_formula if row.place in there]

    @property
    def doubted(self) -> list[Row]:
        """Return the suggested rates that came with a warning."""
        return [row for one, row in self.suggested if one.doubts]

    @property
    def undoubted(self) -> list[Row]:
        """Return the suggested rates that came without a warning."""
        return [row for one, row in self.suggested if not one.doubts]

    @property
    def counts(self) -> list[int]:
        """Return how many rates each suggestion has tried."""
        return [len(one.losses) for one, _ in self.suggested]

    @property
    def mean_updates(self) -> float:
        """Return the mean number of updates of all trials of a suggestion."""
        return statistics.fmean(len(one.losses) * one.updates for one, _ in self.suggested)

    @property
    def mean_updates_of_training(self) -> float:
        """Return the mean number of updates of a whole training at the same settings."""
        return statistics.fmean(row.summary.steps for row in self.of_suggestion)

    @staticmethod
    def quality(rows: Sequence[Row]) -> Quality:
        """Return how good the rates of some rows are."""
        return formula.quality(rows)

    def formula_table(self) -> str:
        """Return a table of the formula's rate at every setting of the study."""
        head = ["task", "setting", "batch", "best rate", "formula", "/ best", "cost, points"]
        return markdown(
            head,
            [
                [
                    row.task,
                    row.summary.setting,
                    f"{row.summary.batch_size:,}",
                    f"{row.summary.learning_rate:.2g}",
                    f"{row.rate:.2g}",
                    f"{row.factor:.2f}",
                    f"{row.cost:.1f}",
                ]
                for row in self.of_formula
            ],
        )

    def suggestion_table(self) -> str:
        """Return a table of the suggestions at each setting, beside the formula."""
        head = ["task", "setting", "batch", "best rate", "suggested", "cost, points"]
        head += ["rates tried", "cost of the formula"]
        return markdown(head, [self._suggestion_row(row) for row in self.of_formula_there])

    def _suggestion_row(self, of_formula: Row) -> list[str]:
        """Return the row of a setting in the table of suggestions."""
        there = [pair for pair in self.suggested if pair[1].place == of_formula.place]
        return [
            of_formula.task,
            of_formula.summary.setting,
            f"{of_formula.summary.batch_size:,}",
            f"{of_formula.summary.learning_rate:.2g}",
            ", ".join(f"{row.rate:.2g}" for _, row in there),
            ", ".join(f"{row.cost:.1f}" for _, row in there),
            ", ".join(str(len(one.losses)) for one, _ in there),
            f"{of_formula.cost:.1f}",
        ]

    def worst(self, rank: int) -> str:
        """Return the name and the cost of the setting where the formula costs most.

        Args:
            rank: 0 for the worst, 1 for the next.
        """
        row = sorted(self.of_formula, key=lambda row: -row.cost)[rank]
        return (
            f"{row.task}, {row.summary.setting}, batch {row.summary.batch_size:,} "
            f"({row.cost:.1f} points)"
        )

    def ablation_places(self) -> list[tuple[str, int]]:
        """Return setting and batch size of all comparisons of SNGM with variations of it."""
        return list(dict.fromkeys((one.setting, one.batch_size) for one in self.ablations))

    def costs_of(self, method: str) -> str:
        """Return by how many points of the test score a variation of SNGM is behind, as a range.

        Args:
            method: one of `ABLATIONS`.
        """
        costs = [sngm.mean - other.mean for sngm, other in self._ablation_pairs(method)]
        # The sum with zero is not negative where the cost is rounded to zero.
        least, greatest = (round(cost, 1) + 0.0 for cost in (min(costs), max(costs)))
        return f"{least:.1f} to {greatest:.1f}"

    def constant_cost(self, rate: float) -> float:
        """Return what a constant rate costs beside the best constant rate.

        It is in points of the validation score, the mean over all settings of the ablations.
        """
        constant = [one for one in self.ablations if one.method == CONSTANT_RATE]
        return statistics.fmean(formula.row("", one, rate).cost for one in constant)

    def ratios_of(self, method: str) -> str:
        """Return the best rate of a variation divided by SNGM's, as a range.

        Args:
            method: one of `ABLATIONS`.
        """
        ratios = [
            other.learning_rate / sngm.learning_rate for sngm, other in self._ablation_pairs(method)
        ]
        return f"{min(ratios):.2g} to {max(ratios):.2g}"

    def _ablation_pairs(self, method: str) -> list[tuple[Summary, Summary]]:
        """Return SNGM and a variation of it at every setting where both were run."""
        assert method in ABLATIONS
        found = {(one.setting, one.batch_size, one.method): one for one in self.ablations}
        return [
            (found[(*place, SNGM)], found[(*place, method)]) for place in self.ablation_places()
        ]

    @cached_property
    def _pairs(self) -> list[tuple[Suggested, Row]]:
        """Return all suggestions, each with what it costs."""
        summaries = {
            (task, each.setting, each.batch_size): each
            for task, each in formula.of_sngm(self.tasks)
        }
        return [
            (one, formula.row(one.task, summaries[one.place], one.learning_rate))
            for one in self.all_suggested
        ]
