"""How one SNGM step runs on the Keras backend in use, and how it is watched.

This package is the only place that names private hooks of Keras and its backends.

`attach(model, plan, fit)` has the optimizer of a compiled model, which must be built, recorded
from the next training step on. It returns a recorder for each optimizer that updates
variables, several under a `MultiOptimizer`, and raises a ValueError if these do not accumulate
over the same number of steps. `detach(recorders)` ends that, and so does an `attach` with
another object for `fit`: the one before has been interrupted.
"""

import keras

_backend = keras.backend.backend()
if _backend == "tensorflow":
    from keras_sngm.backend.tensorflow import BackendOptimizer
    from keras_sngm.backend.tensorflow_watch import attach, detach
elif _backend == "jax":
    from keras_sngm.backend.jax import BackendOptimizer
    from keras_sngm.backend.jax_watch import attach, detach
elif _backend == "torch":
    from keras_sngm.backend.torch import BackendOptimizer
    from keras_sngm.backend.torch_watch import attach, detach
else:
    from keras_sngm.backend.unsupported import BackendOptimizer, attach, detach

__all__ = ["BackendOptimizer", "attach", "detach"]
