"""The rooms of the house, its programs, and what the README promises of the package."""

import ast
import importlib.metadata
import json
import pathlib
import re

import keras
import pytest

from keras_sngm import __version__
from processes import run_python
from replica_options import FAULTS, OPTIONS
from support_table import TESTS_OF_COLUMNS

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_sngm"
OUTSIDE_BACKEND = sorted(PACKAGE.glob("*.py"))

# What each module may import of this package: arrows point one way.
ALLOWED = {
    "__init__": {"keras_sngm.callbacks", "keras_sngm.sngm", "keras_sngm.version"},
    "sngm": {"keras_sngm.backend", "keras_sngm.update_rule", "keras_sngm.weight_decay"},
    "update_rule": set(),
    "callbacks": {
        "keras_sngm.backend",
        "keras_sngm.logged_values",
        "keras_sngm.measurements",
        "keras_sngm.outputs",
        "keras_sngm.recording",
        "keras_sngm.resilient_sink",
        "keras_sngm.sinks",
        "keras_sngm.variable_groups",
    },
    "epoch_statistics": set(),
    "logged_values": {"keras_sngm.measurements", "keras_sngm.variable_groups"},
    "measurements": set(),
    "outputs": set(),
    "recording": {
        "keras_sngm.epoch_statistics",
        "keras_sngm.logged_values",
        "keras_sngm.measurements",
        "keras_sngm.sinks",
    },
    "resilient_sink": {"keras_sngm.sinks"},
    "sinks": {"keras_sngm.measurements"},
    "variable_groups": set(),
    "version": set(),
    "weight_decay": set(),
    "backend/__init__": {
        "keras_sngm.backend.jax",
        "keras_sngm.backend.jax_watch",
        "keras_sngm.backend.tensorflow",
        "keras_sngm.backend.tensorflow_watch",
        "keras_sngm.backend.torch",
        "keras_sngm.backend.torch_watch",
        "keras_sngm.backend.unsupported",
    },
    "backend/host_count": set(),
    "backend/jax": {
        "keras_sngm",
        "keras_sngm.backend.jax_norm",
        "keras_sngm.backend.jax_recorder",
        "keras_sngm.backend.jax_state",
        "keras_sngm.backend.optimizer",
        "keras_sngm.backend.recorder",
        "keras_sngm.update_rule",
    },
    "backend/jax_norm": {
        "keras_sngm",
        "keras_sngm.update_rule",
    },
    "backend/jax_recorder": {
        "keras_sngm.backend.jax_state",
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.ring",
        "keras_sngm.measurements",
    },
    "backend/jax_state": {
        "keras_sngm.update_rule",
    },
    "backend/jax_watch": {
        "keras_sngm.backend",
        "keras_sngm.backend.jax",
        "keras_sngm.backend.jax_norm",
        "keras_sngm.backend.jax_recorder",
        "keras_sngm.backend.jax_state",
        "keras_sngm.backend.recorder",
        "keras_sngm.measurements",
    },
    "backend/noise": {
        "keras_sngm",
        "keras_sngm.update_rule",
    },
    "backend/optimizer": {
        "keras_sngm",
        "keras_sngm.backend.host_count",
        "keras_sngm.backend.noise",
        "keras_sngm.update_rule",
    },
    "backend/recorder": {
        "keras_sngm.backend.optimizer",
        "keras_sngm.backend.ring",
        "keras_sngm.measurements",
        "keras_sngm.update_rule",
    },
    "backend/ring": {"keras_sngm.measurements"},
    "backend/tensorflow": {
        "keras_sngm",
        "keras_sngm.backend.optimizer",
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.tensorflow_checks",
        "keras_sngm.backend.tensorflow_noise",
        "keras_sngm.backend.tensorflow_recorder",
        "keras_sngm.backend.tensorflow_replicas",
        "keras_sngm.backend.tensorflow_slot",
        "keras_sngm.backend.tensorflow_step",
        "keras_sngm.update_rule",
    },
    "backend/tensorflow_checks": {
        "keras_sngm.backend.tensorflow_replicas",
    },
    "backend/tensorflow_kernel": {
        "keras_sngm.backend.tensorflow_slot",
        "keras_sngm.update_rule",
    },
    "backend/tensorflow_noise": {
        "keras_sngm.backend",
        "keras_sngm.backend.tensorflow_slot",
    },
    "backend/tensorflow_norm": {
        "keras_sngm",
        "keras_sngm.update_rule",
    },
    "backend/tensorflow_order": set(),
    "backend/tensorflow_recorder": {
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.ring",
        "keras_sngm.backend.tensorflow_replicas",
        "keras_sngm.backend.tensorflow_slot",
        "keras_sngm.measurements",
    },
    "backend/tensorflow_replicas": {
        "keras_sngm.backend.tensorflow_slot",
    },
    "backend/tensorflow_slot": {
        "keras_sngm",
    },
    "backend/tensorflow_step": {
        "keras_sngm",
        "keras_sngm.backend",
        "keras_sngm.backend.tensorflow_slot",
        "keras_sngm.update_rule",
    },
    "backend/tensorflow_watch": {
        "keras_sngm.backend",
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.tensorflow",
        "keras_sngm.backend.tensorflow_recorder",
        "keras_sngm.backend.tensorflow_replicas",
        "keras_sngm.backend.tensorflow_slot",
        "keras_sngm.measurements",
        "keras_sngm.update_rule",
    },
    "backend/torch": {
        "keras_sngm",
        "keras_sngm.backend",
        "keras_sngm.backend.optimizer",
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.torch_lists",
        "keras_sngm.backend.torch_norm",
        "keras_sngm.backend.torch_recorder",
        "keras_sngm.backend.torch_step",
        "keras_sngm.update_rule",
    },
    "backend/torch_kernel": {
        "keras_sngm.backend.torch_lists",
        "keras_sngm.backend.torch_norm",
        "keras_sngm.update_rule",
    },
    "backend/torch_lists": {
        "keras_sngm.update_rule",
    },
    "backend/torch_norm": {
        "keras_sngm",
        "keras_sngm.backend.torch_lists",
        "keras_sngm.update_rule",
    },
    "backend/torch_recorder": {
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.ring",
        "keras_sngm.backend.torch_lists",
        "keras_sngm.measurements",
    },
    "backend/torch_step": {
        "keras_sngm",
        "keras_sngm.backend",
        "keras_sngm.backend.torch_lists",
        "keras_sngm.backend.torch_norm",
        "keras_sngm.update_rule",
    },
    "backend/torch_watch": {
        "keras_sngm.backend",
        "keras_sngm.backend.host_count",
        "keras_sngm.backend.recorder",
        "keras_sngm.backend.torch",
        "keras_sngm.backend.torch_lists",
        "keras_sngm.backend.torch_norm",
        "keras_sngm.backend.torch_recorder",
        "keras_sngm.measurements",
    },
    "backend/unsupported": {
        "keras_sngm.measurements",
    },
    "backend/watch": {
        "keras_sngm",
        "keras_sngm.backend.optimizer",
        "keras_sngm.backend.recorder",
        "keras_sngm.measurements",
        "keras_sngm.update_rule",
    },
}

# The backend that each program needs, and the arguments that it must have.
PROGRAMS = {
    "benchmarks/logging_cost.py": ("tensorflow",),
    "benchmarks/logging_memory.py": (None,),
    "benchmarks/step_time.py": (None,),
    "benchmarks/train_step.py": ("tensorflow",),
    "examples/cifar10_resnet.py": ("tensorflow",),
    "examples/gradient_norms.py": (None,),
    "examples/large_batch.py": ("tensorflow",),
    "examples/multi_worker.py": ("tensorflow",),
    "examples/multi_worker_jax.py": ("jax",),
    "examples/report.py": (None,),
    "examples/study.py": ("tensorflow", "--task", "mnist1d"),
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("module", ALLOWED)
def test_arrows_point_one_way(module):
    own = {name for name in imports_of(PACKAGE / f"{module}.py") if "keras_sngm" in name}
    assert own <= ALLOWED[module]


def test_every_module_has_its_room():
    modules = {str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py")}
    assert modules == set(ALLOWED)


@pytest.mark.parametrize("path", OUTSIDE_BACKEND, ids=lambda path: path.stem)
def test_private_names_of_keras_stay_in_the_backend(path):
    private = {name for name in dir(keras.optimizers.SGD()) if re.match("_[a-z]", name)}
    used = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not used & private
    assert not any(name.startswith("tensorflow") for name in imports_of(path))


def test_the_package_depends_on_keras_alone():
    required = importlib.metadata.requires("keras-sngm")
    assert [needed for needed in required if "extra" not in needed] == ["keras>=3.10"]
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_has_a_row_for_every_option():
    cells = "".join(rf" \| \[.*\]\(tests/{test}.py\)" for test in TESTS_OF_COLUMNS)
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(rf"^\| (.+){cells} \| .+ \|$", readme, re.MULTILINE)
    assert rows == [*OPTIONS, *FAULTS]


def test_links_in_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_every_program_is_in_the_table():
    files = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py")]
    programs = [path for path in files if 'if __name__ == "__main__":' in path.read_text()]
    assert {str(path.relative_to(ROOT)) for path in programs} == set(PROGRAMS)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_programs_have_help_on_every_backend_and_say_which_one_they_need(backend):
    run_python(
        "-c",
        """
import contextlib, io, json, pathlib, runpy, sys


def end_of(program, *arguments):
    sys.argv = [program, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            return end.code, printed.getvalue()


root, backend, programs = sys.argv[1:]
for program, (needed, *arguments) in json.loads(programs).items():
    path = pathlib.Path(root, program)
    sys.path.insert(0, str(path.parent))
    code, printed = end_of(str(path), "--help")
    assert code == 0 and printed.startswith(f"usage: {path.name}"), (program, printed)
    if needed not in (None, backend):
        code, printed = end_of(str(path), *arguments)
        assert code == 2 and f"set KERAS_BACKEND={needed}" in printed, (program, printed)
""",
        ROOT,
        backend,
        json.dumps(PROGRAMS),
        KERAS_BACKEND=backend,
    )
