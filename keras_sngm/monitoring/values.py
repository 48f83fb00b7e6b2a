"""Logged values: their names, and how they are computed from what was recorded."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_sngm.measurements import DETAILS, Rows, named_details
from keras_sngm.monitoring.variable_groups import PerVariable, groups_of

DESCRIPTIONS = {
    "grad_norm": (
        "Norm of the gradient, summed over replicas and averaged over micro-batches. With SNGM as "
        "it was normalized, after coupled weight decay and clipping; with other optimizers before "
        "them."
    ),
    "gradient_noise_scale": "Smoothed tr(covariance of the gradient) / norm(gradient)^2, samples.",
    "update_ratio": "Norm of the change of the weights in this step / norm of the weights before.",
    "update_norm": "Norm of the change of the weights in this step.",
    "weight_norm": "Norm of the weights before this step.",
    "momentum_norm": "Norm of the momentum u after this step.",
    "momentum_cosine": "Cosine between the momentum u after this step and the gradient.",
    "gradients": "Elements of the gradient whose norm is `grad_norm`.",
    "momenta": "Elements of the momentum u after this step.",
}
"""Descriptions of logged values for TensorBoard, by the first part of their names."""


class LoggedValues:
    """Converter from what was recorded of a model to named values.

    Details are numbers on each variable around an update, such as the norm of its change.

    Args:
        recorders: the recorders of the model's optimizers. Their variables are numbered
            one recorder after the other.
        per_variable: which variables have values of their own, as for `GradientNormLogger`: a
            boolean, `"layer"`, a depth of paths, or a function that is true for some variables.
        model: the model.
    """

    def __init__(
        self, recorders: Sequence[Any], per_variable: PerVariable, model: keras.Model
    ) -> None:
        plan = recorders[0].plan
        variables = [variable for recorder in recorders for variable in recorder.variables]
        momenta = [recorder.has_momentum for recorder in recorders for _ in recorder.variables]
        self._has_momentum = np.array(momenta)
        self._with_details = plan.details_every is not None
        self._with_noise_scale = any(recorder.keeps_noise_scale for recorder in recorders)
        self._groups = groups_of(variables, per_variable, model)
        single = per_variable if callable(per_variable) else True
        names = groups_of(variables, single, model)
        self._names = {i: name for name, (i,) in names.items()}
        self.paths = [variable.path for variable in variables]

    def columns(self) -> list[str]:
        """Return the names of all scalars of a step."""
        count = len(self._has_momentum)
        names = [*self.of_updates(self._no_rows())]
        if self._with_details:
            names += self.of_details(np.zeros((count, len(DETAILS))))
        return names

    def columns_of_epoch(self) -> list[str]:
        """Return the names of the scalars that the `logs` of an epoch summarize.

        They do not depend on the number of variables, so one row of details stands for all.
        """
        names = [*self.of_updates(self._no_rows())]
        if self._with_details:
            names += named_details(np.zeros((1, len(DETAILS))), self._has_momentum)
        return names

    def of_updates(self, rows: Rows) -> dict[str, np.ndarray]:
        """Return the norms and noise scales of updates by name, vectors with one element each."""
        values = {"grad_norm": rows.norm}
        if self._with_noise_scale:
            values["gradient_noise_scale"] = rows.noise_scale
        for name, members in self._groups.items():
            squares = rows.norms[:, members] ** 2
            values[f"grad_norm/{name}"] = np.sqrt(np.sum(squares, axis=1))
        return values

    def of_details(self, table: np.ndarray) -> dict[str, float]:
        """Return the details of one update by name, for all variables and for each group.

        Args:
            table: matrix with a row of `DETAILS` for each variable: norms of the weight, of its
                update and of its momentum, inner product of momentum and direction, norm of the
                direction.
        """
        values = named_details(table, self._has_momentum)
        for name, members in self._groups.items():
            of_group = named_details(table[members], self._has_momentum[members])
            values |= {f"{key}/{name}": value for key, value in of_group.items()}
        return values

    def of_histograms(self, histograms: np.ndarray, first: int) -> dict[str, np.ndarray]:
        """Return the histograms of one update by name, without those that are not finite.

        Args:
            histograms: for each variable of one recorder, the histogram of its gradient and, if
                it has one, of its momentum.
            first: the index of the first of these variables among those of all recorders.
        """
        return {
            f"{kind}/{self._names[i]}": histogram
            for i, kinds in enumerate(histograms, start=first)
            if i in self._names
            for kind, histogram in zip(("gradients", "momenta"), kinds, strict=False)
            if np.isfinite(histogram).all()
        }

    def _no_rows(self) -> Rows:
        """Return the rows of no update: norms, noise scales and norms of each variable, all empty.

        The values computed from them are empty, and have the names of any others.
        """
        return Rows(np.zeros(0), np.zeros(0), np.zeros((0, len(self._has_momentum))))
