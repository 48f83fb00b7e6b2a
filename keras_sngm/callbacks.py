"""Callbacks that show what the optimizer measured."""

from typing import Any

import keras
import numpy as np
from keras import ops


class GradientNormLogger(keras.callbacks.Callback):
    """Logs the norm of the gradient that `SNGM` divides by.

    The norm is that of the whole gradient over all trainable variables, as it
    was normalized: summed over replicas, after coupled weight decay and after
    clipping. The optimizer has computed it anyway, so there is no second
    backward pass, and since norms are fetched once an epoch, training never
    waits for one.

    Adds to `logs`, for `History`, the progress bar, `CSVLogger`, `TensorBoard`
    and any other callback:

    - each batch: `grad_norm`, a scalar tensor on the device of the optimizer.
    - each epoch: `grad_norm`, the mean over the epoch's batches, and
      `grad_norm_max`, the largest, both floats. A batch whose gradient was not
      finite, and whose step was therefore skipped, makes them NaN or infinite.

    With `steps_per_execution=n`, only every n-th batch is seen.

    Args:
        log_dir: Directory for TensorBoard, or `None`. If set, the scalar
            `grad_norm` is written there for every batch, against
            `optimizer.iterations`, at the end of each epoch. Needs the package
            `tensorboard`.

    Raises:
        ImportError: if `log_dir` is set and `tensorboard` is not installed.
        ValueError: when training begins, if the model's optimizer is not `SNGM`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sngm import SNGM, GradientNormLogger
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=SNGM(), loss="mse")
    >>> history = model.fit(
    ...     np.ones((8, 2)), np.ones((8, 1)), callbacks=[GradientNormLogger()], verbose=0
    ... )
    >>> sorted(history.history)
    ['grad_norm', 'grad_norm_max', 'loss']
    """

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        if log_dir is not None:
            _tensorboard()
        self.log_dir = log_dir
        self._writer: Any = None
        self._norms = _DeviceSeries()
        self._steps = _DeviceSeries()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not hasattr(self._optimizer(), "gradient_norm"):
            raise ValueError(
                "`GradientNormLogger` needs a model compiled with the optimizer "
                f"`keras_sngm.SNGM`. Received: model.optimizer={self.model.optimizer}"
            )
        if self.log_dir is not None:
            self._writer = _tensorboard().Writer(str(self.log_dir))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # An epoch that was interrupted may have left some behind.
        self._norms, self._steps = _DeviceSeries(), _DeviceSeries()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        optimizer = self._optimizer()
        # A copy: the variable itself will be overwritten by the next step.
        norm = ops.copy(optimizer.gradient_norm)
        self._norms.append(norm)
        if self._writer is not None:
            self._steps.append(ops.copy(optimizer.iterations))
        if logs is not None:
            logs["grad_norm"] = norm

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        norms = self._norms.fetch()
        if not norms.size:
            return
        if logs is not None:
            logs["grad_norm"] = float(np.mean(norms, dtype="float64"))
            logs["grad_norm_max"] = float(np.max(norms))
        if self._writer is not None:
            for step, norm in zip(self._steps.fetch(), norms, strict=True):
                self._writer.add_scalar("grad_norm", norm, int(step))
            self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _optimizer(self) -> Any:
        optimizer = self.model.optimizer
        # Keras wraps the optimizer in a LossScaleOptimizer under mixed_float16.
        return getattr(optimizer, "inner_optimizer", optimizer)


class _DeviceSeries:
    """Scalars that stay on the device until they are fetched all at once."""

    CHUNK = 1024

    def __init__(self) -> None:
        self._scalars: list[Any] = []
        self._chunks: list[Any] = []

    def append(self, scalar: Any) -> None:
        self._scalars.append(scalar)
        if len(self._scalars) == self.CHUNK:
            self._pack()

    def fetch(self) -> np.ndarray:
        """Return all scalars in order, and forget them."""
        self._pack()
        chunks, self._chunks = self._chunks, []
        return np.concatenate([np.zeros(0), *map(ops.convert_to_numpy, chunks)])

    def _pack(self) -> None:
        # One tensor instead of many keeps long epochs from filling memory.
        if self._scalars:
            self._chunks.append(ops.stack(self._scalars))
            self._scalars = []


def _tensorboard() -> Any:
    try:
        import tensorboard.summary
    except ImportError as error:
        raise ImportError(
            "`GradientNormLogger(log_dir=...)` needs TensorBoard. "
            "Install it with `pip install tensorboard`."
        ) from error
    return tensorboard.summary
