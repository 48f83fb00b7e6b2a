"""The batches that learning rates are tried on: the same for each.

What `fit` takes becomes a dataset that can be read any number of times. Arrays are sliced when
they are read, in an order that a seed decides. Batches of other data are read once and kept.
The kinds of data that `fit` takes are in one file.
"""

import contextlib
import itertools
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

DEFAULT_BATCH_SIZE = 32

MOST_ELEMENTS = 100
"""Number of elements of a container in which random generators of a dataset are looked for."""


class ArrayBatches(keras.utils.PyDataset):
    """Dataset with the batches of arrays, in another order of samples in each epoch.

    Args:
        arrays: x, (x, y) or (x, y, weights of samples), each a nested structure of arrays.
        batch_size: the number of samples in a batch, of which the last one of an epoch may have
            fewer. `None` for as many as make `steps_per_epoch` batches, or else 32.
        steps_per_epoch: the number of batches in an epoch, or `None`.
        shuffle: whether samples are in a random order.
        seed: decides the order.

    Attributes:
        per_epoch: the number of batches in an epoch.
        steps: the number of batches to be read, of any number of epochs.

    Raises:
        ValueError: if these are not arrays with the same number of samples.
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int | None,
        steps_per_epoch: int | None,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self._arrays = _converted(_as_input, arrays)
        self._samples = _count_samples(self._arrays)
        self._batch_size = batch_size or self._size_for(steps_per_epoch)
        self._shuffle = shuffle
        self._seed = seed
        self.per_epoch = _quotient(self._samples, self._batch_size)
        self.steps = self.per_epoch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Any:
        """Return a batch. Batches of later epochs have higher numbers."""
        epoch, batch = divmod(index, self.per_epoch)
        order = np.arange(self._samples)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._samples)
        chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        return _converted(lambda array: array[chosen], self._arrays)

    def _size_for(self, steps_per_epoch: int | None) -> int:
        """Return the batch size that `fit` takes where none is given."""
        if steps_per_epoch is None:
            return DEFAULT_BATCH_SIZE
        return _quotient(self._samples, steps_per_epoch)


class KeptBatches(keras.utils.PyDataset):
    """Dataset of batches that are kept in memory.

    Args:
        batches: the batches, each x, (x, y) or (x, y, weights of samples).
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        super().__init__()
        # Data may be read into the same memory each time.
        self._batches = [_converted(lambda value: _as_array(value).copy(), b) for b in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        """Return a batch."""
        return self._batches[index]


class Source:
    """Source of the batches of training data, for what `fit` takes.

    Args:
        x: arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a PyTorch `DataLoader` or
            another iterable that can be read anew.
        y: arrays of targets, `None` with datasets.
        sample_weight: arrays of weights of samples, or `None`.
        batch_size: the number of samples in a batch of arrays, `None` for 32.
        steps_per_epoch: the number of batches in an epoch, `None` for all.
        shuffle: whether arrays are shuffled, and the batches of a `PyDataset`.
        seed: decides the order of what is shuffled.

    Attributes:
        steps_per_epoch: the number of batches in an epoch.

    Raises:
        ValueError: if the data cannot be read twice, or its length is not known.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        sample_weight: Any,
        batch_size: int | None,
        steps_per_epoch: int | None,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._x, self._shuffle, self._seed = x, shuffle, seed
        self._arrays: ArrayBatches | None = None
        if isinstance(x, Iterator):
            raise ValueError(
                "`x` must be data that can be read again: arrays or a dataset, no iterator or "
                f"generator. Received: x={x}"
            )
        if not _is_dataset(x):
            arrays = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
            self._arrays = ArrayBatches(arrays, batch_size, steps_per_epoch, shuffle, seed)
        elif y is not None or sample_weight is not None:
            raise ValueError(
                "`y` and `sample_weight` must be None where `x` is a dataset, which has them. "
                f"Received: x={x}"
            )
        self.steps_per_epoch = steps_per_epoch or self._length()

    def dataset(self, steps: int) -> Any:
        """Return a dataset with the first batches, which is the same each time it is read.

        Args:
            steps: the number of batches.
        """
        if self._arrays is not None:
            self._arrays.steps = steps
            return self._arrays
        if isinstance(self._x, keras.utils.PyDataset):
            return KeptBatches(self._x[i] for i in self._indices(steps))
        if _is_of_tensorflow(self._x):
            return _kept_dataset(self._x, steps)
        return KeptBatches(itertools.islice(_endless(self._x), steps))

    def _length(self) -> int:
        """Return the number of batches in an epoch.

        Raises:
            ValueError: if the dataset does not tell it.
        """
        if self._arrays is not None:
            return self._arrays.per_epoch
        if isinstance(self._x, keras.utils.PyDataset):
            length = self._x.num_batches
        elif _is_of_tensorflow(self._x):
            length = int(self._x.cardinality())
        else:
            length = len(self._x) if hasattr(self._x, "__len__") else None
        if length is None or length < 1:
            raise ValueError(
                "`steps_per_epoch` must be given with data of unknown or infinite length. "
                f"Received: steps_per_epoch=None, x={self._x}"
            )
        return length

    def _indices(self, steps: int) -> list[int]:
        """Return the indices of the first batches of a `PyDataset`.

        Args:
            steps: the number of batches, which may be of several epochs.
        """
        count = self._x.num_batches
        if count is None:
            return list(range(steps))
        orders = []
        for epoch in range(_quotient(steps, count)):
            generator = np.random.default_rng([self._seed, epoch])
            orders += list(generator.permutation(count) if self._shuffle else range(count))
        return [int(i) for i in orders[:steps]]


@contextlib.contextmanager
def unchanged_generators(dataset: Any) -> Iterator[None]:
    """Return a context at whose end random generators of a dataset are in the state of before.

    They are all that can be reached by attributes and containers, such as those of its samplers.

    Args:
        dataset: any object.
    """
    restores = [restore for one in _reachable(dataset) if (restore := _restore_of(one)) is not None]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _reachable(dataset: Any) -> Iterator[Any]:
    """Yield all objects that are reached by attributes and containers, but no elements of arrays.

    Args:
        dataset: the object to begin with.
    """
    waiting, known = [dataset], {}
    while waiting:
        one = waiting.pop()
        if id(one) in known or isinstance(one, (str, bytes, np.ndarray, type)):
            continue
        known[id(one)] = one
        yield one
        if isinstance(one, Mapping):
            waiting += list(one.values())[:MOST_ELEMENTS]
        elif isinstance(one, (list, tuple, set)):
            # Long lists are samples.
            waiting += list(one)[:MOST_ELEMENTS]
        elif not isinstance(one, types.ModuleType):
            waiting += getattr(one, "__dict__", {}).values()


def _restore_of(generator: Any) -> Callable[[], None] | None:
    """Return a function that sets a random generator to its present state.

    `None` for any other object.
    """
    if isinstance(generator, random.Random):
        of_python = generator.getstate()
        return lambda: generator.setstate(of_python)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, keras.random.SeedGenerator):
        seed = keras.ops.convert_to_numpy(generator.state)
        return lambda: generator.state.assign(seed)
    if _is_instance(generator, "torch", "Generator"):
        of_torch = generator.get_state()
        return lambda: generator.set_state(of_torch)
    return None


def _is_dataset(x: Any) -> bool:
    """Return whether data consists of batches, and not of arrays."""
    return (
        isinstance(x, keras.utils.PyDataset)
        or _is_of_tensorflow(x)
        or _is_instance(x, "torch.utils.data", "DataLoader")
        or _is_instance(x, "grain", "MapDataset", "IterDataset", "DataLoader")
    )


def _is_of_tensorflow(x: Any) -> bool:
    """Return whether data is a `tf.data.Dataset`."""
    return _is_instance(x, "tensorflow.python", "DatasetV2")


def _is_instance(x: Any, package: str, *names: str) -> bool:
    """Return whether an object is of a class of a package, without an import of that.

    Args:
        x: the object.
        package: the beginning of the name of the module of the class.
        names: the name of the class may be any of these.
    """
    return any(
        one.__name__ in names and one.__module__.startswith(package) for one in type(x).__mro__
    )


def _kept_dataset(dataset: Any, steps: int) -> Any:
    """Return a `tf.data.Dataset` with the first batches of another, which are kept in memory."""
    kept = dataset.repeat().take(steps).cache()
    # The first one to read it fills the cache, and must read to the end.
    for _ in kept:
        pass
    return kept


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a dataset, epoch after epoch, until an epoch is empty."""
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            return


def _converted(convert: Callable[[Any], np.ndarray], structure: Any) -> Any:
    """Return a nested structure with all leaves converted but `None`, and tuples for lists.

    As Keras' `fit` has it: TensorFlow takes lists for arrays.
    """
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else convert(leaf),
        keras.tree.lists_to_tuples(structure),
    )


def _quotient(count: int, size: int) -> int:
    """Return how many parts of a size it takes to hold `count`."""
    return -(-count // size)


def _as_input(value: Any) -> np.ndarray:
    """Return a NumPy array of an array, with floating-point numbers of the type that `fit` uses."""
    array = _as_array(value)
    is_float = np.issubdtype(array.dtype, np.floating)
    return array.astype(keras.config.floatx(), copy=False) if is_float else array


def _as_array(value: Any) -> np.ndarray:
    """Return a NumPy array of a tensor of any backend, an array or a table."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no such type.
            value = value.float()
    if _is_instance(value, "pandas", "Series"):
        value = value.to_frame()
    return np.asarray(value)


def _count_samples(arrays: Any) -> int:
    """Return the number of samples in a structure of arrays.

    Raises:
        ValueError: if there is none, or the arrays differ in it.
    """
    shapes = [array.shape for array in keras.tree.flatten(arrays) if array is not None]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "`x`, `y` and `sample_weight` must be arrays with the same number of samples, or `x` a "
            f"dataset. Received: shapes {shapes}"
        )
    return lengths.pop()
