"""Compiles optimizer steps for accelerators that need not be there, and says what they do.

JAX compiles the steps for an NVIDIA H100 and for a TPU v5e. Floats moved per parameter, temporary
memory, kernels, CUDA graphs and waits of the host are facts of the compiled programs, for the TPU
memory, conditions and loops alone. Where JAX has a GPU the steps are timed on it, too.

    KERAS_BACKEND=jax python benchmarks/accelerators.py            everything, about ten minutes
    KERAS_BACKEND=jax python benchmarks/accelerators.py --quick    one model and a few steps
    KERAS_BACKEND=jax python benchmarks/accelerators.py --report   the tables once more

Needs Linux and the extra `accelerators`.
"""

import argparse
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There need be no TPU to ask.

import jax
import keras
import numpy as np
from tqdm import tqdm

import commandline
import hlo
from bandwidth import measure_bandwidth
from contestants import KERAS, MICRO_BATCHES, Step, accumulating_optimizer, weights
from jobs import run_in_new_process
from keras_sngm import SNGM
from modes_jax import gradients
from report import print_rows, programs
from shapes import MODELS, NAMES, Shape, parameters
from steps_jax import Update, compiled_step, keras_update, optax_update, sngm_of_optax
from timing import machine, quartiles_ms, sample_interleaved, timed_sampler

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
from common.arguments import parsed_on, with_defaults

DESCRIPTION = pathlib.Path(__file__).with_name("h100.txtpb")
DEVICES = {"h100": "NVIDIA H100", "h100x2": "two NVIDIA H100", "v5e": "TPU v5e"}
"""Names of the described devices. Over two of them every weight is sharded by its first axis."""
STEPS: dict[str, dict[str, Any]] = {
    "SNGM": {},
    "nesterov": {"nesterov": True},
    "blockwise": {"blockwise": True},
    "decoupled decay": {"weight_decay": 1e-4},
    "coupled decay": {"weight_decay": 1e-4, "decoupled_weight_decay": False},
    "clipvalue": {"clipvalue": 1.0},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "loss_scale_factor": {"loss_scale_factor": 128.0},
    "use_ema": {"use_ema": True},
    "accumulation": {"gradient_accumulation_steps": MICRO_BATCHES},
}
OTHERS = ("Optax chain", "Optax MultiSteps", "Keras SGD", "Keras SGD, accumulation")
QUICK = ("SNGM", "coupled decay", "Optax chain")


def update_of(name: str, shapes: Sequence[Shape]) -> tuple[Update, Any, Any]:
    """Return a step as a function of weights, state and gradients, with weights and state.

    Args:
        name: a key of `STEPS`, or one of `OTHERS`.
        shapes: the shapes of the weights.
    """
    variables = weights(shapes)
    values = [variable.value for variable in variables]
    if name.startswith("Optax"):
        transformation = sngm_of_optax()
        if name == "Optax MultiSteps":
            import optax

            steps = optax.MultiSteps(transformation, MICRO_BATCHES)
            transformation = steps.gradient_transformation()
        return optax_update(transformation), values, transformation.init(values)
    optimizer = SNGM(0.01, **STEPS[name]) if name in STEPS else _sgd(name)
    optimizer.build(variables)
    return keras_update(optimizer), values, [variable.value for variable in optimizer.variables]


def _sgd(name: str) -> keras.optimizers.Optimizer:
    """Return the SGD of Keras that is meant by one of `OTHERS`."""
    return KERAS["SGD"]() if name == "Keras SGD" else accumulating_optimizer("SGD")


def compiled_facts(device: str, model: str, name: str) -> dict[str, Any]:
    """Compile a step for a device that is only described, and return facts of the program.

    Args:
        device: a key of `DEVICES`.
        model: a key of `MODELS`.
        name: a key of `STEPS`, or one of `OTHERS`.
    """
    shapes = MODELS[model]
    update, values, state = update_of(name, shapes)
    devices = _described(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            jax.numpy.shape(leaf), leaf.dtype, sharding=_sharding(leaf, devices)
        ),
        (values, state, values),
    )
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        dump = {} if device == "v5e" else {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=dump)
        thunks = list(pathlib.Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))
        schedule = hlo.schedule(thunks[-1].read_text())._asdict() if thunks else {}
    text = compiled.as_text()
    facts = {
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "conditions": text.count(" conditional("),
        "loops": text.count(" while("),
        "all_reduces": len(re.findall(r" all-reduce(-start)?\(", text)),
        **schedule,
    }
    # XLA for TPUs moves data in slices ahead of time, which the text does not tell from traffic.
    if device == "h100":
        size = 4 * parameters(shapes)
        facts["floats_per_parameter"] = hlo.bytes_moved(text, in_branches=False) / size
        facts["floats_with_branches"] = hlo.bytes_moved(text, in_branches=True) / size
    return facts


def _described(device: str) -> list[Any]:
    """Return devices that are described, and need not be there."""
    from jax.experimental import topologies

    if device == "v5e":
        return topologies.get_topology_desc("v5e:2x2", "tpu").devices[:1]
    return topologies.get_topology_desc(
        "",
        "cuda",
        target_config=DESCRIPTION.read_text(),
        topology="1x1x2" if device == "h100x2" else "1x1x1",
    ).devices


def _sharding(leaf: Any, devices: Sequence[Any]) -> jax.sharding.Sharding:
    """Return how an array is laid out: by its first axis over several devices, if that divides."""
    if len(devices) == 1:
        return jax.sharding.SingleDeviceSharding(devices[0])
    shape = jax.numpy.shape(leaf)
    is_divided = bool(shape) and shape[0] % len(devices) == 0
    mesh = jax.sharding.Mesh(np.array(devices), ("shard",))
    axes = ["shard"] if is_divided else []
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def measured_times(model: str, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Time the steps on the GPU that JAX has, interleaved; empty if it has none.

    Returns:
        The GPU, the bandwidth of its memory, and the quartiles of the time of each step.
    """
    if not list(pathlib.Path("/dev").glob("nvidia[0-9]*")) or jax.default_backend() != "gpu":
        return {}
    shapes = MODELS[model]
    samplers = {name: timed_sampler(_real_step(name, shapes)) for name in names}
    samples = sample_interleaved(samplers, seconds)
    rate, _ = measure_bandwidth()
    return {
        "device": jax.devices()[0].device_kind,
        "bandwidth_gb_per_s": rate / 1e9,
        "times_ms": {name: quartiles_ms(values) for name, values in samples.items()},
    }


def _real_step(name: str, shapes: Sequence[Shape]) -> Step:
    """Return a step that is taken on the device that JAX uses."""
    return compiled_step(*update_of(name, shapes), gradients("function", shapes))


def in_new_process(platforms: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, whose JAX uses some platforms, "" for the best."""
    os.environ["JAX_PLATFORMS"] = platforms
    return run_in_new_process(function, *arguments)


def run(arguments: argparse.Namespace) -> pathlib.Path:
    """Compile all that was asked for, time it where there is a GPU, and write the results.

    Returns:
        The path of the file with the results.
    """
    path = arguments.output / "accelerators.json"
    results = json.loads(path.read_text()) if path.exists() else {"compiled": {}, "timed": {}}
    results["machine"] = machine()
    jobs = [
        (device, model, name)
        for device in arguments.devices
        for model in arguments.models
        for name in arguments.steps
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    for device, model, name in tqdm(jobs, unit="program"):
        facts = in_new_process("cpu", compiled_facts, device, model, name)
        results["compiled"].setdefault(device, {}).setdefault(model, {})[name] = facts
        path.write_text(json.dumps(results, indent=1) + "\n")
    for model in arguments.models:
        times = in_new_process("", measured_times, model, arguments.steps, arguments.seconds)
        if times:
            results["timed"][model] = times
            path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def print_tables(results: dict[str, Any]) -> None:
    """Print a table of each device and model."""
    for device, models in results["compiled"].items():
        for model in models:
            print(f"\n{DEVICES[device]}, {NAMES[model]}\n")
            print_rows(programs(results, device, model))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = commandline.parser(__doc__, quick="one model and a few steps")
    parser.add_argument("--devices", nargs="*", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--models", nargs="*", choices=MODELS, help="default two (quick: one)")
    parser.add_argument("--steps", nargs="*", choices=[*STEPS, *OTHERS], help="default all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each model, on a GPU")
    arguments = parsed_on("jax", parser, argv)
    usual = {"models": ["resnet50", "bert_base"], "steps": [*STEPS, *OTHERS]}
    quick = {"models": ["resnet20"], "steps": list(QUICK)}
    return with_defaults(arguments, usual, quick)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    path = arguments.output / "accelerators.json" if arguments.report else run(arguments)
    print_tables(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
