"""How one SNGM step runs on the Keras backend in use.

This package is the only place that names private hooks of Keras or TensorFlow.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_sngm.backend.tensorflow import BackendOptimizer
else:
    from keras_sngm.backend.unsupported import BackendOptimizer

__all__ = ["BackendOptimizer"]
