"""Tests that benchmarks run, and that the figures of the README are those they have measured.

No test asserts a time.
"""

import json
import pathlib
import sys

import pytest

from processes import run_python

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = ROOT / "docs" / "step_time"
BACKENDS = ("tensorflow", "jax", "torch")
STEP_TIMES = [f"step_time_{backend}" for backend in BACKENDS]


@pytest.fixture
def report(monkeypatch):
    """Return the module `report` of the benchmarks, imported anew for each test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    yield report
    del sys.modules["report"]


def test_every_way_of_logging_is_timed():
    run_python(
        "-c",
        """
import sys
sys.path.insert(0, sys.argv[1])
import keras
import logging_cost
logging_cost.models.resnet = lambda shape, classes: keras.Sequential(
    [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(classes)]
)
samples = logging_cost.sample_variants("tiny", 0.0)
assert len(samples) == len(logging_cost.VARIANTS)
assert all(seconds > 0 for values in samples.values() for seconds in values)
results = dict.fromkeys(("tiny", "batch"), logging_cost.costs(samples))
assert len(logging_cost.table(results)) == 1 + len(logging_cost.LOGGERS) + 1
""",
        BENCHMARKS,
    )


def test_the_readme_shows_what_logging_costs():
    printed = run_python(BENCHMARKS / "logging_cost.py", "--report")
    rows = [line for line in printed.splitlines() if line.startswith("| S")]
    assert len(rows) == 5
    readme = (ROOT / "README.md").read_text()
    assert all(row in readme for row in rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_contestant_of_a_backend_takes_steps_and_imports_no_other(backend):
    """Contestants import no backend but their own. Imports of Keras itself do not count."""
    run_python(
        "-c",
        """
import sys
import keras
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import bandwidth
from modes import CONTESTANTS, samplers
# First the one that splits the CPU into two devices.
for mode in sorted(CONTESTANTS, key=lambda mode: mode != "mirrored"):
    for name, sampler in samplers(mode, [(3,), (3,), (200, 2)]).items():
        assert all(seconds > 0 for seconds in sampler()), (mode, name)
bandwidth.FLOATS = 16
assert bandwidth.measure_bandwidth(calls=1).bytes_per_second > 0
others = {"tensorflow", "jax", "torch"} - {keras.backend.backend()}
assert not {name.partition(".")[0] for name in set(sys.modules) - before} & others
""",
        BENCHMARKS,
        KERAS_BACKEND=backend,
    )


def test_contestants_of_other_libraries_have_processes_of_their_own():
    run_python(
        "-c",
        """
import sys
sys.path.insert(0, sys.argv[1])
from step_time import CONTESTANTS, contestants_of_other_backends, model_times
assert contestants_of_other_backends("eager") == {"PyTorch": "torch"}
assert contestants_of_other_backends("function") == {"PyTorch": "torch", "Optax": "jax"}
measured = model_times([(3,), (200, 2)], "function", 0.0)
names = set(CONTESTANTS["function"])
assert set(measured["times_ms"]) == set(measured["samples"]) == names
assert set(measured["over_sngm"]) == names - {"SNGM", "PyTorch", "Optax"}
assert measured["limit_ms"] > 0
assert "torch" not in sys.modules
""",
        BENCHMARKS,
    )


def test_whole_training_steps_are_taken():
    run_python(
        "-c",
        """
import sys
sys.path.insert(0, sys.argv[1])
from train_step import train_times
measured = train_times("embedding", "graph", 0.0, quick=True)
assert set(measured["times_ms"]) == {"SNGM", "SGD", "Adam"}
""",
        BENCHMARKS,
    )


@pytest.mark.parametrize(
    "name, rows", [*((name, "summary") for name in STEP_TIMES), ("train_step", "training")]
)
def test_the_readme_shows_what_was_measured(report, name, rows):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in getattr(report, rows)(results):
        assert f"| {' | '.join(row)} |" in readme


@pytest.mark.parametrize("model", ["resnet50", "bert_base"])
def test_the_readme_shows_what_was_compiled_for_an_h100(report, model):
    results = json.loads((RESULTS / "accelerators.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in report.programs(results, "h100", model):
        assert f"| {' | '.join(row)} |" in readme


def test_the_facts_of_a_program_are_read_from_its_text(monkeypatch):
    """A kernel reads its operands and writes its results, in loops and branches as they run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hlo

    program = """HloModule step

%fused (p: f32[8], q: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  ROOT %sum = f32[8]{0} add(%p, %q)
}

%body (t: (pred[], f32[8])) -> (pred[], f32[8]) {
  %t = (pred[], f32[8]{0}) parameter(0)
  %w = f32[8]{0} get-tuple-element(%t), index=1
  %new = f32[8]{0} negate(%w)
  %no = pred[] constant(false)
  ROOT %both = (pred[], f32[8]{0}) tuple(%no, %new)
}

%again (t: (pred[], f32[8])) -> pred[] {
  %t = (pred[], f32[8]{0}) parameter(0)
  ROOT %go = pred[] get-tuple-element(%t), index=0
}

ENTRY %main (w: f32[8], g: f32[8], c: pred[]) -> (pred[], f32[8]) {
  %w = f32[8]{0} parameter(0)
  %g = f32[8]{0} parameter(1)
  %c = pred[] parameter(2)
  %fusion = f32[8]{0} fusion(%w, %g), kind=kLoop, calls=%fused
  %both = (pred[], f32[8]{0}) tuple(%c, %fusion)
  ROOT %loop = (pred[], f32[8]{0}) while(%both), condition=%again, body=%body
}
"""
    assert hlo.bytes_moved(program, in_branches=False) == 3 * 8 * 4
    assert hlo.bytes_moved(program, in_branches=True) == (3 + 2) * 8 * 4
    thunks = """000: kCommandBuffer [source | next=3]
    001: kKernel [source | sink] fusion
    002: kConditional [source | sink] inside
003: kWhile [source | sink]
    body:
        000: kCommandBuffer [source | sink]
            001: kKernel [source | sink] negate
"""
    assert hlo.schedule(thunks) == hlo.Schedule(kernels=2, graphs=2, waits=1)


@pytest.mark.parametrize("name", STEP_TIMES)
def test_the_picture_is_drawn_from_the_results(report, tmp_path, name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    report.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
