"""How one SNGM step runs on the Keras backend in use, and how it is watched.

This package is the only place that names private hooks of Keras or TensorFlow.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_sngm.backend.tensorflow import BackendOptimizer
    from keras_sngm.backend.tensorflow_watch import attach, detach
else:
    from keras_sngm.backend.unsupported import BackendOptimizer, attach, detach

__all__ = ["BackendOptimizer", "attach", "detach"]
