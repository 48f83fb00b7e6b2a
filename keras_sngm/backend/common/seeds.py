"""Keras' global generator of seeds, which is made when it is first needed."""

import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator


def generator() -> keras.random.SeedGenerator | None:
    """Return the global generator of seeds, `None` if there is none yet."""
    return get_global_attribute(GLOBAL_SEED_GENERATOR)


def set_generator(value: keras.random.SeedGenerator | None) -> None:
    """Make a generator the global one, or remove the global one."""
    set_global_attribute(GLOBAL_SEED_GENERATOR, value)


@contextlib.contextmanager
def existing_generator() -> Iterator[None]:
    """Return a context in which Keras' global generator of seeds exists, if it may be needed.

    If Keras created it while a model is built without values, it would have none. It is removed
    unless it was used.
    """
    if generator() is not None:
        yield
        return
    before = random.getstate()
    made = global_seed_generator()
    after, seed = random.getstate(), made.state.numpy()
    yield
    if np.array_equal(seed, made.state.numpy()):
        set_generator(None)
        if random.getstate() == after:
            random.setstate(before)
