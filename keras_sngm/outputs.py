"""The function under the name that pickled loggers of earlier versions know."""

from keras_sngm.monitoring.outputs import _of_key

__all__ = ["_of_key"]
