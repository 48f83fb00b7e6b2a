"""Tests with language models of keras-hub, made from configurations, with random weights."""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM, GradientNormLogger
from problems import BACKEND
from selection import whole

LENGTH, VOCABULARY = 6, 20
SIZE = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "max_sequence_length": LENGTH,
    "dropout": 0.0,
}


@pytest.fixture
def keras_hub():
    """Return the package; skip the test if it is missing, as it has no wheels for Python 3.14."""
    return pytest.importorskip("keras_hub")


def tokens():
    """Return 16 sequences of different lengths, padded with zeros, and the mask of their tokens."""
    generator = np.random.default_rng(0)
    rows = generator.integers(1, VOCABULARY, (16, LENGTH)).astype("int32")
    lengths = generator.integers(2, LENGTH + 1, (16, 1))
    mask = (np.arange(LENGTH) < lengths).astype("int32")
    return rows * mask, mask


def bert(keras_hub):
    """Return a BERT model and its inputs.

    The pooler of the model takes no part in the loss, as in masked language models.
    """
    backbone = keras_hub.models.BertBackbone(**SIZE)
    output = keras.layers.Dense(1)(keras.ops.mean(backbone.output["sequence_output"], axis=1))
    model = keras.Model(backbone.input, [output, backbone.output["pooled_output"]])
    words, mask = tokens()
    return model, {"token_ids": words, "segment_ids": 0 * words, "padding_mask": mask}


def gpt2(keras_hub):
    """Return a GPT-2 model and its inputs."""
    backbone = keras_hub.models.GPT2Backbone(**SIZE)
    output = keras.layers.Dense(1)(keras.ops.mean(backbone.output, axis=1))
    words, mask = tokens()
    return keras.Model(backbone.input, [output]), {"token_ids": words, "padding_mask": mask}


def batches(inputs):
    """Return keyword arguments of `fit`: inputs and targets in batches of 4 sequences.

    TensorFlow does not know the length of the sequences while it traces.
    """
    y = inputs["token_ids"][:, :1].astype("float32") / VOCABULARY
    if BACKEND != "tensorflow":
        return {"x": inputs, "y": y, "batch_size": 4}
    import tensorflow as tf

    spec = {name: tf.TensorSpec((None,), tf.int32) for name in inputs}
    rows = [{name: array[i] for name, array in inputs.items()} for i in range(len(y))]
    data = tf.data.Dataset.from_generator(
        lambda: zip(rows, y), output_signature=(spec, tf.TensorSpec((1,), tf.float32))
    )
    return {"x": data.padded_batch(4)}


OPTIMIZERS = {
    "SNGM": lambda: SNGM(
        0.01, blockwise=True, gradient_accumulation_steps=2, noise_scale_batch_size=4
    ),
    "Adam": lambda: keras.optimizers.Adam(0.01),
}


@whole
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
def test_language_models_train_with_everything_logged(tmp_path, keras_hub, make, optimizer):
    keras.utils.set_random_seed(0)
    model, inputs = make(keras_hub)
    before = [v.numpy() for v in model.trainable_variables]
    model.compile(OPTIMIZERS[optimizer](), loss=["mse", None][: len(model.outputs)])
    loggers = [
        GradientNormLogger(
            tmp_path,
            tmp_path / "log.csv",
            per_variable=True,
            update_ratio=True,
            histogram_every=2,
            on_nonfinite="stop",
        ),
        GradientNormLogger(filename=tmp_path / "layers.jsonl", per_variable="layer"),
    ]
    history = model.fit(**batches(inputs), epochs=2, verbose=0, callbacks=loggers).history
    assert len(history["loss"]) == 2
    assert np.isfinite(history["grad_norm"]).all(), history
    assert min(history["grad_norm_min"]) > 0, history
    assert int(getattr(model.optimizer, "skipped_steps", 0)) == 0
    assert {
        v.path
        for v, old in zip(model.trainable_variables, before)
        if np.array_equal(old, v.numpy())
    } == {v.path for v in model.trainable_variables if "pooled" in v.path}
