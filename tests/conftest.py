import pathlib
import sys

import keras

# Examples import each other by name, as scripts of one folder do.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

# Files for some backends alone. All others run on every backend.
ONLY_ON = {
    "tensorflow": [
        "backend_training.py",
        "dying_worker.py",
        "foreign_replicas.py",
        "killed_training.py",
        "replica_gradients.py",
        "replica_training.py",
        "stopped_training.py",
        "test_backends.py",
        "test_baselines.py",
        "test_benchmarks.py",
        "test_compilation.py",
        "test_distribution.py",
        "test_examples.py",
        "test_float64.py",
        "test_hooks.py",
        "test_interruption.py",
        "test_kernel.py",
        "test_multi_worker.py",
        "test_norm.py",
        "test_order.py",
        "test_package.py",
        "test_strategies.py",
        "test_study.py",
        "test_study_page.py",
        "test_tensorflow.py",
    ],
    "jax": [
        "dying_jax_process.py",
        "jax_training.py",
        "test_jax.py",
        "test_jax_distribution.py",
        "test_jax_multi_worker.py",
        "test_random_jax.py",
        "test_stateless.py",
    ],
    "torch": [
        "test_float64.py",
        "test_random_torch.py",
        "test_stateless.py",
        "test_torch.py",
        "torch_processes.py",
    ],
}

collect_ignore = sorted(
    {file for files in ONLY_ON.values() for file in files} - set(ONLY_ON[keras.backend.backend()])
)
