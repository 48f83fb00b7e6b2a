"""Tests that the examples run, and report what they measured."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cifar10_resnet
import large_batch
from common import data, models
from processes import ROOT, run_python

EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "large_batch.py"


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    """Keep Keras' files in a temporary folder, and let Matplotlib draw without a display."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("MPLBACKEND", "agg")


def saved_runs(path):
    """Return the runs in a JSON file that `large_batch.py` has written."""
    return json.loads(path.read_text())["runs"]


def test_the_main_job_from_the_command_line(tmp_path):
    """`large_batch.py` prints a table of its runs, and writes them to a JSON file and a picture."""
    printed = run_python(SCRIPT, "--quick", "--strategy", "mirrored", "--output", tmp_path)
    for row in (
        "| SNGM | 100 |",
        "| momentum SGD | 100 |",
        "| LAMB | 100 |",
        "| momentum SGD | 32 |",
    ):
        assert row in printed
    assert "±" not in printed  # There is one seed, so there is no deviation.
    assert str(tmp_path / "compare.json") in printed
    assert str(tmp_path / "compare.png") in printed
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    runs = saved_runs(tmp_path / "compare.json")
    assert [run["method"] for run in runs] == ["SNGM", "momentum SGD", "LAMB", "momentum SGD"]
    assert [run["steps"] for run in runs] == [8, 8, 8, 24]
    assert [run["optimizer_floats_per_parameter"] for run in runs] == pytest.approx(
        [1, 1, 2, 1], abs=0.01
    )
    for run in runs:
        assert len(run["val_accuracy"]) == len(run["grad_norm"]) == 2
        assert min(run["grad_norm"]) > 0
        assert 0 <= run["test_accuracy"] <= 1


def test_suggested_rates_beside_tuned_ones(tmp_path):
    """With `--suggest` all seeds of a method train at the rate that was suggested for it."""
    command = (SCRIPT, "--quick", "--suggest", "--seeds", 2, "--output", tmp_path)
    printed = run_python(*command)
    runs = saved_runs(tmp_path / "compare.json")
    rates = [run["learning_rate"] for run in runs]
    assert rates[::2] == rates[1::2]
    assert "suggested, 0.5 tuned" in printed
    assert printed.count(" tuned") == 4
    assert f"learning rate {rates[0]:.3g} suggested" in printed


def test_quick_runs_of_methods_differ_only_in_the_optimizer(tmp_path):
    """Runs with the same seed and batches start at the same gradient, whatever the method."""
    arguments = ["--quick", "--epochs", "1", "--batch-size", "400", "--small-batch-size", "400"]
    large_batch.main([*arguments, "--output", str(tmp_path)])
    norms = [run["grad_norm"][0] for run in saved_runs(tmp_path / "compare.json")]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


def test_the_spread_of_several_seeds_is_shown(capsys):
    runs = [
        large_batch.Run("SNGM", 100, 0.5, seed, 8, 1.0, accuracy, 1.0, [], [])
        for seed, accuracy in enumerate([0.5, 0.6, 0.7])
    ]
    large_batch.print_comparison(runs)
    large_batch.print_comparison(runs[:1])
    printed = capsys.readouterr().out
    assert "| 60.0 ± 10.0 |" in printed
    assert "| 50.0 |" in printed


@pytest.mark.parametrize("name, shape", [("cifar10", (32, 32, 3)), ("mnist", (32, 32, 1))])
def test_any_image_dataset_of_tfds(tmp_path, name, shape):
    with tfds.testing.mock_data(num_examples=400):
        task = data.images(name)
        assert task.input_shape == shape
        assert task.classes == 10
        assert len(task.train) == len(task.validation) == len(task.test) == 400
        image, _ = next(iter(task.train))
        assert image.shape == shape
        assert float(np.min(image)) >= -1
        assert float(np.max(image)) <= 1


def test_datasets_without_images_are_refused():
    with (
        tfds.testing.mock_data(num_examples=4),
        pytest.raises(ValueError, match=r"`image` and `label`.*ag_news_subset"),
    ):
        data.load("ag_news_subset")


@pytest.mark.parametrize(
    "available, tested_on",
    [
        (["train", "test", "validation"], "test"),
        (["train", "validation"], "validation"),
        (["train"], "train[90%:]"),
    ],
)
def test_splits_do_not_overlap(available, tested_on):
    train, validation, test = data._splits(available)
    assert test == tested_on
    assert train.split(":")[1] == validation.split("[")[1].split(":")[0] + "]"


def test_the_main_job_on_images(tmp_path, capsys):
    """`large_batch.py` trains on a dataset of images."""
    with tfds.testing.mock_data(num_examples=1600):
        sizes = ["--epochs", "1", "--batch-size", "8", "--small-batch-size", "4"]
        large_batch.main(
            ["--quick", "--dataset", "cifar10", *sizes, "--output", str(tmp_path)],
        )
    assert "| SNGM | 8 |" in capsys.readouterr().out
    assert [run["steps"] for run in saved_runs(tmp_path / "compare.json")] == [2, 2, 2, 4]


@pytest.fixture(scope="module")
def gradient_norms(tmp_path_factory):
    """Run the example `gradient_norms.py`; return the folder that it has written to."""
    output = tmp_path_factory.mktemp("gradient_norms")
    home = {"KERAS_HOME": str(output / "keras"), "MPLBACKEND": "agg"}
    printed = run_python(EXAMPLES / "gradient_norms.py", "--quick", "--output", output, **home)
    assert str(output / "gradient_norms.png") in printed
    return output


@pytest.mark.parametrize(
    "task, layer, updates", [("conv net", "conv1d", 8), ("transformer", "embedding", 8)]
)
@pytest.mark.parametrize("kind", ["SNGM", "SGD"])
def test_gradient_norms_are_read_by_tensorboard(gradient_norms, task, kind, layer, updates):
    events = EventAccumulator(str(gradient_norms / "tensorboard" / task / kind)).Reload()
    tags = set(events.Tags()["tensors"])
    (of_layer,) = (tag for tag in tags if re.fullmatch(f"grad_norm/(.+/)?{layer}", tag))
    text = (gradient_norms / f"{task} {kind}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for tag in ("grad_norm", of_layer, "update_ratio", "weight_norm"):
        values = {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
        assert list(values) == list(range(1, updates + 1))
        assert values == pytest.approx({line["step"]: line[tag] for line in lines}, rel=1e-6)
        plugin = events.SummaryMetadata(tag).plugin_data.plugin_name
        assert plugin == "scalars"
        assert events.SummaryMetadata(tag).summary_description
    histograms = {tag for tag in tags if tag.startswith(("gradients/", "momenta/"))}
    assert {tag.partition("/")[0] for tag in histograms} == (
        {"gradients", "momenta"} if kind == "SNGM" else {"gradients"}
    )
    for tag in histograms:
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == "histograms"
        assert tf.make_ndarray(events.Tensors(tag)[0].tensor_proto).shape == (30, 3)
    assert ("gradient_noise_scale" in tags) == (kind == "SNGM")


def test_the_picture_of_gradient_norms(gradient_norms):
    picture = (gradient_norms / "gradient_norms.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_the_manual_of_python_as_a_text():
    text = data.python_manual(16, pieces=5)
    pieces = [(x.numpy(), y.numpy()) for x, y in text.pairs]
    assert len(pieces) == 5
    for (x, y), (following, _) in zip(pieces, [*pieces[1:], pieces[0]]):
        np.testing.assert_array_equal(x[1:], y[:-1])
        assert y.max() < text.characters
        if following is not pieces[0][0]:
            assert y[-1] == following[0]


def test_mnist1d_is_generated_once(capsys):
    first = data.mnist1d(quick=True)
    assert "Generating" in capsys.readouterr().out
    second = data.mnist1d(quick=True)
    assert "Generating" not in capsys.readouterr().out
    assert [len(d) for d in (first.train, first.validation, first.test)] == [400, 400, 1000]
    for a, b in zip(first.train, second.train):
        np.testing.assert_array_equal(a[0], b[0])


def test_networks_are_those_of_the_papers():
    net = models.conv_net_1d((40, 1), 10)
    assert net.count_params() == 5 * 25 + 25 + 2 * (3 * 25 * 25 + 25) + 5 * 25 * 10 + 10
    # He et al. give 0.27 million parameters and 20 weighted layers.
    resnet = models.resnet((32, 32, 3), 10)
    assert sum(np.prod(w.shape) for w in resnet.trainable_weights) == pytest.approx(
        0.27e6, rel=0.02
    )
    weighted = [layer for layer in resnet.layers if "conv2d" in layer.name or "dense" in layer.name]
    assert len(weighted) == 20


@pytest.mark.parametrize("depth", [8, 56])
def test_resnets_have_the_depth_they_are_asked_for(depth):
    resnet = models.resnet((32, 32, 3), 10, depth)
    weighted = [layer for layer in resnet.layers if "conv2d" in layer.name or "dense" in layer.name]
    assert len(weighted) == depth


@pytest.mark.parametrize("depth", [2, 18])
def test_other_depths_of_resnets_are_refused(depth):
    with pytest.raises(ValueError, match=f"`depth` must be.*Received: depth={depth}"):
        models.resnet((32, 32, 3), 10, depth)


def cifar(output, *arguments):
    """Run the example `cifar10_resnet.py` on 16 made-up images, in batches of 8."""
    with tfds.testing.mock_data(num_examples=1600):
        quick = ["--quick", "--depth", "8", "--batch-size", "8", "--verbose", "0"]
        cifar10_resnet.main([*quick, *arguments, "--output", str(output)])


@pytest.mark.parametrize(
    "options",
    [[], ["--accumulate", "2", "--precision", "mixed_float16"]],
    ids=["plain", "accumulated-float16"],
)
def test_cifar10_resnet_trains_with_all_it_writes(tmp_path, capsys, options):
    cifar(tmp_path, "--epochs", "2", *options)
    assert "Test accuracy" in capsys.readouterr().out
    norms = (tmp_path / "norms.csv").read_text().splitlines()
    assert len(norms) == 1 + 4  # Each epoch has two updates.
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert "grad_norm" in events.Tags()["tensors"]
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert int(model.optimizer.iterations) == 4
    assert int(model.optimizer.skipped_steps) == 0
    assert model.optimizer.gradient_accumulation_steps == (2 if options else None)


def test_cifar10_resnet_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    class Interrupt(keras.callbacks.BackupAndRestore):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keras.callbacks, "BackupAndRestore", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            cifar(tmp_path, "--epochs", "3")
    cifar(tmp_path, "--epochs", "3")
    lines = (tmp_path / "norms.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, 7))]
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert int(model.optimizer.iterations) == 6


def test_cifar10_resnet_refuses_batches_that_cannot_be_divided(capsys):
    with pytest.raises(SystemExit):
        cifar10_resnet.main(["--batch-size", "10", "--accumulate", "4"])
    assert "must be a multiple of `--accumulate`" in capsys.readouterr().err
