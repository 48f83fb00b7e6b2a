"""The steps of SNGM on the Keras backend in use, and their recording.

This package is the only place that names private hooks of Keras and its backends.

`Attachment(model, plan, fit_params)` attaches recorders to the optimizer of a compiled model, built
or not. Its `recorders` are one for each optimizer that updates variables, several under a
`MultiOptimizer`. Its method `detach` ends that, and so does another one with other `fit_params`:
the `fit` before was interrupted. `is_current(model)` is false once the model is compiled anew.
"""

from typing import Any

import keras

Attachment: Any
_backend = keras.backend.backend()
if _backend == "tensorflow":
    from keras_sngm.backend.tensorflow import Attachment, BackendOptimizer
elif _backend == "jax":
    from keras_sngm.backend.jax import Attachment, BackendOptimizer
elif _backend == "torch":
    from keras_sngm.backend.torch import Attachment, BackendOptimizer
else:
    from keras_sngm.backend.unsupported import Attachment, BackendOptimizer

__all__ = ["Attachment", "BackendOptimizer"]
