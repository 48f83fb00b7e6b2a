"""Tests of the imports in the package, of its programs, and of promises of the README."""

import ast
import graphlib
import importlib.metadata
import json
import pathlib
import pickle
import re

import keras
import pytest

from keras_sngm import __version__
from processes import run_python
from replica_options import FAULTS, OPTIONS
from support_table import TESTS_OF_COLUMNS

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "keras_sngm"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
OUTSIDE_BACKEND = {
    name: path for name, path in MODULES.items() if not name.startswith("keras_sngm.backend")
}

ARITHMETIC = {
    f"keras_sngm.{name}" for name in ("update_rule", "normalization", "noise_scale", "measurements")
}
BACKENDS = {f"keras_sngm.backend.{name}" for name in ("tensorflow", "jax", "torch")}
INDEPENDENT = ("checks", "learning_rate", "measurements", "update_rule", "version", "weight_decay")
# The modules of each part of the package may import those of the same part and of the parts that
# are listed here. Imports between parts go one way, and no backend imports another.
ARROWS = {
    "keras_sngm": {
        *(f"keras_sngm.{name}" for name in ("learning_rate", "monitoring", "sngm", "suggestion")),
        "keras_sngm.version",
    },
    "keras_sngm.suggestion": {
        f"keras_sngm.{name}" for name in ("backend", "checks", "learning_rate", "sngm")
    },
    "keras_sngm.sngm": {"keras_sngm.backend", "keras_sngm.update_rule", "keras_sngm.weight_decay"},
    "keras_sngm.monitoring": {
        f"keras_sngm.{name}" for name in ("backend", "checks", "measurements")
    },
    "keras_sngm.backend": {*BACKENDS, "keras_sngm.measurements"},
    "keras_sngm.backend.common": ARITHMETIC,
    **{backend: {"keras_sngm.backend.common", *ARITHMETIC} for backend in BACKENDS},
    "keras_sngm.normalization": {"keras_sngm.update_rule"},
    "keras_sngm.noise_scale": {"keras_sngm.update_rule"},
    **{f"keras_sngm.{name}": set() for name in INDEPENDENT},
    # Pickles of earlier versions name these modules.
    "keras_sngm.callbacks": {"keras_sngm.monitoring"},
    "keras_sngm.outputs": {"keras_sngm.monitoring"},
}

# Each program has a backend that it needs, or none, and arguments that it must be given.
PROGRAMS = {
    "benchmarks/accelerators.py": ("jax",),
    "benchmarks/logging_cost.py": ("tensorflow",),
    "benchmarks/logging_memory.py": (None,),
    "benchmarks/step_time.py": (None,),
    "benchmarks/train_step.py": ("tensorflow",),
    "examples/cifar10_resnet.py": ("tensorflow",),
    "examples/gradient_norms.py": (None,),
    "examples/large_batch.py": ("tensorflow",),
    "examples/multi_worker.py": ("tensorflow",),
    "examples/multi_worker_jax.py": ("jax",),
    "examples/study/__main__.py": ("tensorflow", "--task", "mnist1d"),
    "examples/study/report.py": (None,),
    "examples/study/suggestions.py": ("tensorflow",),
}


def imports_of(path):
    """Yield the names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def room_of(module):
    """Return the part of the package, a key of `ARROWS`, that a module belongs to."""
    return max((room for room in ARROWS if f"{module}.".startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_between_rooms_point_one_way(module):
    """A module imports only from its own part of the package and from those in `ARROWS`."""
    rooms = {room_of(name) for name in imports_of(MODULES[module]) if name in MODULES}
    assert rooms <= {room_of(module), *ARROWS[room_of(module)]}


def test_no_two_modules_import_each_other():
    imports = {name: set(imports_of(path)) & set(MODULES) for name, path in MODULES.items()}
    graphlib.TopologicalSorter(imports).prepare()  # It raises an error if there is a cycle.


def test_no_room_is_left_over():
    """Every part of the package in `ARROWS` has modules."""
    assert {room_of(module) for module in MODULES} == set(ARROWS)


@pytest.mark.parametrize(
    "module, name", [("callbacks", "GradientNormLogger"), ("outputs", "_of_key")]
)
def test_pickles_of_earlier_versions_find_their_names(module, name):
    assert pickle.loads(f"ckeras_sngm.{module}\n{name}\n.".encode()).__name__ == name


def test_long_modules_say_why():
    """A module of more than 300 lines says in its docstring why it is one file."""
    for path in MODULES.values():
        text = path.read_text()
        assert text.count("\n") <= 300 or "in one file" in ast.get_docstring(ast.parse(text)), path


@pytest.mark.parametrize("path", OUTSIDE_BACKEND.values(), ids=OUTSIDE_BACKEND)
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
    files = [
        path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
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
    usage = (f"usage: {path.name}", "usage: python -m study")
    assert code == 0 and printed.startswith(usage), (program, printed)
    if needed not in (None, backend):
        code, printed = end_of(str(path), *arguments)
        assert code == 2 and f"set KERAS_BACKEND={needed}" in printed, (program, printed)
""",
        ROOT,
        backend,
        json.dumps(PROGRAMS),
        KERAS_BACKEND=backend,
    )
