"""The steps of SNGM on the Keras backend in use, and their recording.

This package is the only place that names private hooks of Keras and its backends.

`Attachment(model, plan, fit_params)` attaches recorders to the optimizer of a compiled model, built
or not. Its `recorders` are one for each optimizer that updates variables, several under a
`MultiOptimizer`. Its method `detach` ends that, and so does another one with other `fit_params`:
the `fit` before was interrupted. `is_current(model)` is false once the model is compiled anew.

`BackendTrials(model)` is a context in which a compiled model can be trained any number of times
from the state it has. At the end all is as it was before.
"""

from typing import Any

import keras

Attachment: Any
BackendTrials: Any
_backend = keras.backend.backend()
if _backend == "tensorflow":
    from keras_sngm.backend.tensorflow import Attachment, BackendOptimizer, BackendTrials
elif _backend == "jax":
    from keras_sngm.backend.jax import Attachment, BackendOptimizer, BackendTrials
elif _backend == "torch":
    from keras_sngm.backend.torch import Attachment, BackendOptimizer, BackendTrials
else:
    from keras_sngm.backend.unsupported import Attachment, BackendOptimizer, BackendTrials

__all__ = ["Attachment", "BackendOptimizer", "BackendTrials"]
