"""The steps of SNGM on the Keras backend in use, and their recording.

This package is the only place that names private hooks of Keras and its backends.

`attach(model, plan, fit_params)` attaches recorders to the optimizer of a compiled model, built
or not; they record from the next training step on. It returns an `Attachment`, whose `recorders`
are one for each optimizer that updates variables, several under a `MultiOptimizer`; a ValueError
is raised if these do not accumulate over the same number of steps. `detach(attachment)` ends
that, and so does an `attach` with other `fit_params`: the `fit` before was interrupted.
`is_current(attachment, model)` is false once the model has been compiled anew.
"""

import keras

_backend = keras.backend.backend()
if _backend == "tensorflow":
    from keras_sngm.backend.tensorflow import BackendOptimizer, attach, detach, is_current
elif _backend == "jax":
    from keras_sngm.backend.jax import BackendOptimizer, attach, detach, is_current
elif _backend == "torch":
    from keras_sngm.backend.torch import BackendOptimizer, attach, detach, is_current
else:
    from keras_sngm.backend.unsupported import BackendOptimizer, attach, detach, is_current

__all__ = ["BackendOptimizer", "attach", "detach", "is_current"]
