"""Modules of a backend are collected where it is in use, for their doctests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

collect_ignore_glob = [
    f"keras_sngm/backend/{backend}/*.py"
    for backend in ("tensorflow", "jax", "torch")
    if backend != keras.backend.backend()
]
