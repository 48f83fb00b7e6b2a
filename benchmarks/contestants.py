"""The optimizers that are compared, and the steps of those that are not of Keras."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial

import keras
import tensorflow as tf

from keras_sngm import SNGM
from shapes import Shape

Step = Callable[[], None]

_sgd = partial(keras.optimizers.SGD, 0.01, momentum=0.9)
_DECAY_AND_AVERAGE = {"weight_decay": 1e-4, "use_ema": True}

KERAS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "SNGM": partial(SNGM, 0.01),
    "SGD": _sgd,
    "SGD, clipped": partial(_sgd, global_clipnorm=1.0),
    "Adam": keras.optimizers.Adam,
    "LAMB": keras.optimizers.Lamb,
    "SNGM, decay and average": partial(SNGM, 0.01, **_DECAY_AND_AVERAGE),
    "SGD, decay and average": partial(_sgd, **_DECAY_AND_AVERAGE),
}

SNGM_COMPILATIONS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    f"SNGM, jit_compile={jit_compile}": partial(SNGM, 0.01, jit_compile=jit_compile)
    for jit_compile in (True, False)
}


class Gradients:
    """Random gradients for all contestants, who read them and leave them as they are.

    In a training function gradients are computed. A tensor from outside is no
    substitute if it is small: TensorFlow makes it a constant, whose norm could
    be computed beforehand. So small gradients are rows of a larger tensor.
    """

    LARGEST_CONSTANT = 128

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = list(shapes)
        self._large: dict[int, tf.Tensor] = {}
        self._rows: dict[Shape, tf.Tensor] = {}
        for i, shape in enumerate(self.shapes):
            if math.prod(shape) > self.LARGEST_CONSTANT:
                self._large[i] = _random(shape, seed=i)
            elif shape not in self._rows:
                count = max(self.shapes.count(shape), self.LARGEST_CONSTANT + 1)
                self._rows[shape] = _random((count, *shape), seed=i)

    def tensors(self) -> list[tf.Tensor]:
        """To be called where they are used: in the function, if there is one."""
        rows = {shape: iter(tf.unstack(stacked)) for shape, stacked in self._rows.items()}
        return [
            self._large[i] if i in self._large else next(rows[shape])
            for i, shape in enumerate(self.shapes)
        ]


def _random(shape: Shape, seed: int) -> tf.Tensor:
    return tf.random.stateless_normal(shape, seed=(0, seed))


def weights(shapes: Sequence[Shape]) -> list[keras.Variable]:
    return [keras.Variable(keras.initializers.Ones(), shape=shape) for shape in shapes]


def momentum_kernel(gradients: Gradients) -> Step:
    """TensorFlow's kernel for momentum SGD: a step without a norm and without Keras."""
    weights = [tf.Variable(tf.ones(shape)) for shape in gradients.shapes]
    momentums = [tf.Variable(tf.zeros(shape)) for shape in gradients.shapes]

    @tf.function(autograph=False)
    def step() -> None:
        for w, u, g in zip(weights, momentums, gradients.tensors(), strict=True):
            tf.raw_ops.ResourceApplyMomentum(
                var=w.handle, accum=u.handle, lr=0.01, grad=g, momentum=0.9
            )

    return step


def pytorch(gradients: Gradients) -> Step:
    """Clipping by the global norm, then momentum SGD in one kernel per variable."""
    import torch

    weights = [torch.ones(shape, requires_grad=True) for shape in gradients.shapes]
    for w, g in zip(weights, gradients.tensors(), strict=True):
        w.grad = torch.from_numpy(g.numpy().copy())  # clipping writes to it
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


def optax_chain(gradients: Gradients) -> Step:
    """SNGM, put together from what Optax has."""
    import jax
    import optax

    transformation = optax.chain(
        optax.normalize_by_update_norm(),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.01),
    )
    weights = [jax.numpy.ones(shape) for shape in gradients.shapes]
    state = transformation.init(weights)
    own_gradients = [jax.numpy.array(g.numpy()) for g in gradients.tensors()]

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(weights, state, gradients):
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    def step() -> None:
        nonlocal weights, state
        weights, state = jax.block_until_ready(update(weights, state, own_gradients))

    return step


OTHERS: dict[str, Callable[[Gradients], Step]] = {
    "momentum kernel": momentum_kernel,
    "PyTorch": pytorch,
    "Optax": optax_chain,
}

_REQUIRES = {"PyTorch": "torch", "Optax": "optax"}


def missing() -> dict[str, str]:
    """The contestants whose library is not installed, with its name."""
    return {
        name: library
        for name, library in _REQUIRES.items()
        if importlib.util.find_spec(library) is None
    }
