"""Trains with loggers whose files cannot grow beyond a few kilobytes, as on a full disk.

`test_full_disk.py` runs this in its own process, as the operating system limits all files of a
process.

    python full_disk_training.py FOLDER

Prints the history of training and the warnings.
"""

import json
import pathlib
import resource
import sys
import warnings

import keras
import numpy as np

from keras_sngm import SNGM, GradientNormLogger

EPOCHS = 3
UPDATES = 150
MOST_BYTES = 3_000


def history_of_training(folder: pathlib.Path) -> dict[str, list[float]]:
    """Train with three loggers that write to a folder, and return the history."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(SNGM(), "mse")
    loggers = [
        GradientNormLogger(folder / "logs", folder / "log.csv", update_ratio=True),
        GradientNormLogger(filename=folder / "log.jsonl"),
        GradientNormLogger(filename=folder / "short.csv", log_every=50),
    ]
    x = np.ones((UPDATES // EPOCHS, 3), "float32")
    return model.fit(x, x[:, :1], batch_size=1, epochs=EPOCHS, verbose=0, callbacks=loggers).history


def main(folder: str) -> None:
    """Limit the size of files, train, and print history and warnings as JSON."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, hard))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        history = history_of_training(pathlib.Path(folder))
    print(json.dumps([history, [str(warning.message) for warning in caught]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
