"""Random sequences of optimizer calls, and the expected state after each call.

A case is a model's variables, an optimizer's options, and a sequence of calls with gradients. The
expected state after a call is computed from the stored state before it, so that rounding errors of
several calls do not add up.
"""

from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from keras_sngm.normalization import least_reliable_sums
from problems import BACKEND, DTYPES
from reference import ReferenceSNGM, norm

LARGEST = float(np.finfo("float32").max)
SMALLEST_NORMAL = float(np.finfo("float32").tiny)
FLUSHES = not float(keras.ops.convert_to_tensor(np.float32(1e-40)) * 2.0**24)
"""Whether the device flushes subnormal float32 numbers to zero."""

SHAPES = [(), (1,), (3,), (0,), (4, 5), (1, 1), (2, 3, 2, 2), (0, 3), (70, 70), (130, 130)]
LARGE = (1024, 1024)
# The least and the greatest power of ten of gradients in each dtype.
EXPONENTS = {
    "float16": (-7.0, 4.7),
    "bfloat16": (-38.0, 38.4),
    "float32": (-38.0, 38.4),
    "float64": (-120.0, 120.0),
}


class Weight(NamedTuple):
    """A variable of the model.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        constrained: whether a constraint keeps it from being negative.
    """

    shape: tuple[int, ...]
    dtype: str
    constrained: bool


class Gradient(NamedTuple):
    """Description of the gradient of one variable in one call.

    Attributes:
        kind: one of `KINDS`.
        exponent: the power of ten of its largest elements.
        seed: the seed of its elements and of the rows of slices. It also chooses the tensor to
            reuse if the kind is "a weight" or "shared".
        layout: its layout in memory on PyTorch, one of `LAYOUTS`.
    """

    kind: str
    exponent: float
    seed: int
    layout: str


KINDS = ["random"] * 6 + [
    *("none", "zeros", "known zeros", "equal", "one large", "slices", "a weight", "shared"),
    *("nan", "inf", "-inf"),
]
STATIC = ("none", "known zeros")
"""Kinds that are fixed when a function is compiled."""
LAYOUTS = ["rows", "columns", "every second"] if BACKEND == "torch" else ["rows"]


class Call(NamedTuple):
    """One call of the optimizer.

    Attributes:
        gradients: one for each variable.
        before: the action before the call. It is "" for none, "move" to continue with a new
            optimizer that has loaded the state of the old one, "rewind" for a call that is undone
            by loading the state before it, or the name and the new value of a hyper-parameter.
    """

    gradients: tuple[Gradient, ...]
    before: Any


class Case(NamedTuple):
    """A random training: options of SNGM, variables of the model, and calls of the optimizer."""

    options: dict[str, Any]
    weights: tuple[Weight, ...]
    calls: tuple[Call, ...]


def exponents() -> st.SearchStrategy:
    """Return a strategy for powers of ten: ordinary ones, any of float32, and beyond float32."""
    return st.one_of(st.floats(-2.0, 2.0), st.floats(-38.0, 38.4), st.floats(-120.0, 120.0))


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Draw options of SNGM."""
    chosen: dict[str, Any] = {
        "learning_rate": 10.0 ** draw(st.floats(-3.0, 0.0)),
        "momentum": draw(st.sampled_from([0.9, 0.0, 0.5, 0.99])),
        "nesterov": draw(st.booleans()),
        "blockwise": draw(st.sampled_from([False, False, True])),
    }
    if draw(st.booleans()):
        chosen["weight_decay"] = 10.0 ** draw(st.floats(-3.0, -0.5))
        chosen["decoupled_weight_decay"] = draw(st.booleans())
    clip = draw(st.sampled_from([None, None, "clipnorm", "clipvalue", "global_clipnorm"]))
    if clip is not None:
        wide = 2.0 if clip == "clipvalue" else 37.0
        chosen[clip] = 10.0 ** draw(st.one_of(st.floats(-2.0, 2.0), st.floats(-wide, wide)))
    if draw(st.booleans()):
        chosen["gradient_accumulation_steps"] = draw(st.integers(2, 4))
        if draw(st.booleans()):
            chosen["noise_scale_batch_size"] = 8
            chosen["noise_scale_momentum"] = 0.5
    if draw(st.sampled_from([False, False, True])):
        chosen["use_ema"] = True
        chosen["ema_momentum"] = 0.75
        chosen["ema_overwrite_frequency"] = draw(st.sampled_from([None, 1, 2]))
    if draw(st.sampled_from([False, False, True])):
        chosen["loss_scale_factor"] = 2.0 ** draw(st.integers(-3, 6))
    return chosen


@st.composite
def weights(draw: Any) -> tuple[Weight, ...]:
    """Draw the variables of a model, rarely with a large one among them."""
    dtypes = draw(st.sampled_from([["float32"], ["float32"], DTYPES, DTYPES, ["float16"]]))
    shapes = (
        st.sampled_from(SHAPES) if draw(st.booleans()) else st.just(draw(st.sampled_from(SHAPES)))
    )
    one = st.builds(Weight, shapes, st.sampled_from(dtypes), st.sampled_from([False] * 5 + [True]))
    chosen = draw(st.lists(one, min_size=1, max_size=12))
    if draw(st.sampled_from([False] * 15 + [True])):
        chosen.append(Weight(LARGE, "float32", False))
    return tuple(chosen)


def hyper_parameters() -> st.SearchStrategy:
    """Return a strategy for hyper-parameters to assign between calls: names and new values."""
    return st.one_of(
        st.tuples(st.just("learning_rate"), st.sampled_from([0.003, 0.3])),
        st.tuples(st.just("nesterov"), st.booleans()),
        st.tuples(st.just("blockwise"), st.booleans()),
        st.tuples(st.just("clipnorm"), st.sampled_from([None, 1e-3, 1.0, 1e20])),
        st.tuples(st.just("weight_decay"), st.sampled_from([None, 0.01])),
    )


@st.composite
def cases(draw: Any, eager: bool, most_calls: int = 6, alike: bool = False) -> Case:
    """Draw a case.

    Args:
        draw: a function that draws from a strategy.
        eager: whether calls are eager. Then hyper-parameters may change between calls, and so
            may the variables that have a gradient.
        most_calls: the greatest number of calls.
        alike: whether all gradients are dense and tensors of their own, and nothing is done
            between calls.
    """
    own = draw(weights())
    always = draw(st.lists(st.sampled_from(KINDS), min_size=len(own), max_size=len(own)))
    before = st.just("")
    if not alike:
        before = st.sampled_from(["", "", "", "move", "rewind"])
        if eager:
            before = st.one_of(before, before, hyper_parameters())
    calls = [
        Call(
            tuple(
                draw(_gradients(weight, exponent, kind, eager, alike))
                for weight, kind in zip(own, always)
            ),
            draw(before),
        )
        for exponent in draw(st.lists(exponents(), min_size=1, max_size=most_calls))
    ]
    # The optimizer takes no step without any gradient, so every call has at least one.
    calls = [call if _has_any(call) else _with_first(call) for call in calls]
    if not eager and not all(map(_has_any, calls)):
        calls = list(map(_with_first, calls))
    return Case(draw(options()), own, tuple(calls))


@st.composite
def _gradients(
    draw: Any, weight: Weight, exponent: float, always: str, eager: bool, alike: bool
) -> Gradient:
    """Draw the gradient of one variable in one call.

    Args:
        draw: a function that draws from a strategy.
        weight: the variable.
        exponent: the power of ten of the largest gradients of the call.
        always: the kind of this variable's gradient in all compiled calls, if it is static.
        eager: whether calls are eager.
        alike: whether the gradient must be dense and a tensor of its own.
    """
    kind = draw(st.sampled_from(KINDS))
    if not eager:  # A compiled function cannot be called with another static kind.
        kind = always if always in STATIC else "zeros" if kind in STATIC else kind
    if alike and kind in ("slices", "a weight", "shared", "known zeros"):
        kind = "random"
    least, greatest = EXPONENTS[weight.dtype]
    shifted = exponent + draw(st.sampled_from([0.0, 0.0, 0.0, -5.0, -15.0, -25.0, -40.0]))
    return Gradient(
        kind,
        min(max(shifted, least), greatest),
        draw(st.integers(0, 99)),
        draw(st.sampled_from(LAYOUTS)),
    )


def _has_any(call: Call) -> bool:
    return any(gradient.kind != "none" for gradient in call.gradients)


def _with_first(call: Call) -> Call:
    """Return a call in which the first variable has a gradient."""
    first, *others = call.gradients
    return call._replace(gradients=(first._replace(kind="equal"), *others))


def start_of(case: Case) -> list[np.ndarray]:
    """Return the weights at first, the same at every call."""
    generator = np.random.default_rng(0)
    return [generator.uniform(0.5, 4.0, weight.shape) for weight in case.weights]


class Given(NamedTuple):
    """A gradient as a NumPy array in the dtype of its variable.

    Attributes:
        array: its elements, or the elements of its slices.
        rows: the row of the variable that each slice is added to; `None` if it is dense.
        same_as: the tensor to reuse, as ("weight", index) or ("gradient", index); `None` for a
            new tensor.
        layout: the layout of the tensor in memory.
        known: whether the gradient must be a constant in a compiled function.
    """

    array: np.ndarray
    rows: np.ndarray | None
    same_as: tuple[str, int] | None
    layout: str
    known: bool = False

    def dense(self, weight: Weight) -> np.ndarray:
        """Return the dense gradient in float64, with the numbers that the device computes with."""
        array = flushed(self.array.astype("float64"), weight.dtype)
        if self.rows is None:
            return array
        total = np.zeros(weight.shape)
        np.add.at(total, self.rows, array)
        return flushed(total, weight.dtype)


def numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def given(case: Case, call: Call, values: list[np.ndarray]) -> list[Given | None]:
    """Return the gradients of a call as arrays.

    Args:
        case: the case.
        call: a call of the case.
        values: the weights before the call.
    """
    made: list[Given | None] = []
    for i, (weight, gradient) in enumerate(zip(case.weights, call.gradients)):
        made.append(_given_one(case, weight, gradient, values, made, i))
    return made


def _given_one(
    case: Case,
    weight: Weight,
    gradient: Gradient,
    values: list[np.ndarray],
    made: list[Given | None],
    i: int,
) -> Given | None:
    """Return the gradient of one variable as an array.

    Args:
        case: the case.
        weight: the variable.
        gradient: the description of the gradient.
        values: the weights before the call.
        made: the gradients of the variables before this one.
        i: the index of the variable.
    """
    kind, generator = gradient.kind, np.random.default_rng(gradient.seed)
    dtype = numpy_dtype(weight.dtype)
    if kind == "none":
        return None
    alike = [j for j, other in enumerate(case.weights) if other[:2] == weight[:2]]
    if kind == "a weight":
        j = alike[gradient.seed % len(alike)]
        return Given(values[j].astype(dtype), None, ("weight", j), "rows")
    earlier = [j for j in alike if j < i and made[j] is not None and made[j].rows is None]
    if kind == "shared" and earlier:
        j = earlier[gradient.seed % len(earlier)]
        return Given(made[j].array, None, ("gradient", j), "rows")
    shape, rows = weight.shape, None
    if kind == "slices" and len(shape) == 2:
        rows = generator.integers(0, max(shape[0], 1), 0 if shape[0] == 0 else gradient.seed % 7)
        shape = (len(rows), shape[1])
    signs = generator.choice([-1.0, 1.0], shape)
    array = 10.0**gradient.exponent * generator.uniform(0.25, 1.0, shape) * signs
    if kind in ("zeros", "known zeros"):
        array = np.zeros(shape)
    if kind == "equal":
        array = np.full(shape, 10.0**gradient.exponent)
    elif array.size and kind == "one large":
        array = np.where(np.arange(array.size).reshape(shape) > 0, array * 1e-20, array)
    elif array.size and kind in ("nan", "inf", "-inf"):
        array.flat[gradient.seed % array.size] = float(kind)
    with np.errstate(over="ignore"):
        array = np.asarray(array).astype(dtype)
    return Given(array, rows, None, gradient.layout, kind == "known zeros")


class State(NamedTuple):
    """State of an optimizer and values of the weights, in float64.

    Attributes:
        weights: the values of the weights.
        momentums: the momentums, empty if there are none.
        averages: the moving averages of the weights, empty if there are none.
        moments: `noise_moments`, the averages behind the gradient noise scale, or zeros.
        noise_scale: `gradient_noise_scale`, or 0.
        skipped: `skipped_steps`.
        averaged: `averaged_updates`, or 0.
        norm: `gradient_norm`.
        norms: `gradient_norms`.
    """

    weights: list[np.ndarray]
    momentums: list[np.ndarray]
    averages: list[np.ndarray]
    moments: np.ndarray
    noise_scale: float
    skipped: int
    averaged: int
    norm: float
    norms: np.ndarray


def flushed(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round an array to the numbers that the device computes with.

    Except for float64 that is float32, where the device may flush subnormal numbers to zero.
    """
    if dtype == "float64":
        return array
    array = array.astype("float32").astype("float64")
    if not FLUSHES:
        return array
    return np.where(np.abs(array) < SMALLEST_NORMAL, 0.0 * array, array)


class Expectation:
    """The expected effect of each call of a case, computed by the reference.

    Args:
        case: the case.
        eager: whether a variable is updated if it had a gradient in any micro-batch of the
            accumulation cycle. Otherwise it is updated if it had one in the last micro-batch.
        skips_above: the norm of the gradient above which a step is skipped.
    """

    def __init__(self, case: Case, eager: bool, skips_above: float = np.inf) -> None:
        self.options = dict(case.options)
        self.greatest_momentum = self.options["momentum"]
        self.was_blockwise = self.options["blockwise"]
        self._weights = case.weights
        self._eager = eager
        self._skips_above = skips_above
        self._micro_batches = case.options.get("gradient_accumulation_steps") or 1
        self._calls = 0
        self.knows_noise = True
        """Whether the squared gradients of the last update sum to 0 or are well within float32."""
        self._begin_cycle()

    def _begin_cycle(self) -> None:
        """Begin an accumulation cycle."""
        self._means = [np.zeros(weight.shape) for weight in self._weights]
        self._parts = 0.0
        self._had = [False] * len(self._weights)

    def assign(self, name: str, value: Any) -> None:
        """Change a hyper-parameter for the calls to come."""
        self.options[name] = value
        self.was_blockwise = self.was_blockwise or self.options["blockwise"]

    def call(self, gradients: list[Given | None], before: State) -> State:
        """Return the expected state after a call, given its gradients and the state before it."""
        has = [gradient is not None for gradient in gradients]
        for i, (gradient, weight) in enumerate(zip(gradients, self._weights)):
            if gradient is None:
                continue
            array = gradient.dense(weight)
            scaled = array / self.options.get("loss_scale_factor", 1.0)
            scaled = flushed(scaled, weight.dtype)
            self._means[i] = self._means[i] + flushed(scaled / self._micro_batches, weight.dtype)
            self._parts += np.sum(scaled**2)
        self._had = [a or b for a, b in zip(self._had, has)]
        self._calls += 1
        if self._calls % self._micro_batches:
            return before
        active = [i for i, a in enumerate(self._had if self._eager else has) if a]
        after = self._update(active, before)
        self._begin_cycle()
        return after

    def _update(self, active: list[int], before: State) -> State:
        """Return the state after an update of the variables with the indices `active`."""
        options = self.options
        names = ("momentum", "nesterov", "blockwise", "clipnorm", "clipvalue", "global_clipnorm")
        arguments = {name: options[name] for name in names if options.get(name) is not None}
        arguments["weight_decay"] = options.get("weight_decay") or 0.0
        arguments["decoupled_weight_decay"] = options.get("decoupled_weight_decay", True)
        reference = ReferenceSNGM([before.weights[i] for i in active], **arguments)
        if before.momentums:
            reference.u = [before.momentums[i] for i in active]
        gradient = [self._means[i] for i in active]
        with np.errstate(all="ignore"):
            reference.step(gradient, options["learning_rate"])
        measured = getattr(reference, "g", None)
        norms = np.zeros(len(self._weights))
        norms[active] = [norm([g]) for g in (measured or gradient)]
        if measured is None or reference.unclipped_norm > self._skips_above:
            return before._replace(
                skipped=before.skipped + 1, norm=reference.gradient_norm, norms=norms
            )
        weights, momentums = list(before.weights), list(before.momentums)
        for k, i in enumerate(active):
            weights[i] = reference.w[k]
            if momentums:
                momentums[i] = reference.u[k]
        averages, weights = self._averaged(before, weights)
        for i in active:
            if self._weights[i].constrained:
                weights[i] = np.maximum(weights[i], 0.0)
        moments, noise_scale = self._noise(before, norm(gradient))
        return State(
            weights,
            momentums,
            averages,
            moments,
            noise_scale,
            before.skipped,
            before.averaged + bool(averages),
            reference.gradient_norm,
            norms,
        )

    def _averaged(
        self, before: State, weights: list[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the moving averages and the weights, which the averages may overwrite."""
        if not self.options.get("use_ema"):
            return [], weights
        past = self.options["ema_momentum"] if before.averaged else 0.0
        averages = [past * a + (1.0 - past) * w for a, w in zip(before.averages, weights)]
        frequency = self.options["ema_overwrite_frequency"]
        overwrites = frequency and self._calls // self._micro_batches % frequency == 0
        return averages, list(averages) if overwrites else weights

    def _noise(self, before: State, large: float) -> tuple[np.ndarray, float]:
        """Return the averages behind the gradient noise scale, and the noise scale.

        Args:
            before: the state before the update.
            large: the norm of the mean gradient of the micro-batches.
        """
        if "noise_scale_batch_size" not in self.options:
            return before.moments, before.noise_scale
        self.knows_noise = 1e-20 < self._parts < 1e33 or self._parts == 0.0
        size = sum(int(np.prod(weight.shape)) for weight in self._weights)
        least = float(least_reliable_sums((size,), "float32", error=1e-3)[0])
        if self._parts < least or self._parts > LARGEST:
            return before.moments, before.noise_scale
        micro_batches, samples = self._micro_batches, self.options["noise_scale_batch_size"]
        between = (self._parts / micro_batches - large**2) * micro_batches / (micro_batches - 1)
        new = np.array([samples * between, large**2 - between / micro_batches, 1.0])
        moments = 0.5 * before.moments + 0.5 * new
        quotient = moments[0] / moments[1] if moments[1] > 0 else LARGEST
        return moments, min(quotient, LARGEST)


def assert_as_expected(
    now: State, expected: State, before: State, case: Case, expectation: Expectation
) -> None:
    """Assert that the state after a call is as expected, up to rounding errors.

    Args:
        now: the state after the call.
        expected: the expected state after the call.
        before: the state before the call.
        case: the case.
        expectation: the object that has computed `expected`.
    """
    assert now.skipped == expected.skipped, "skipped_steps"
    assert now.averaged == expected.averaged, "averaged_updates"
    if expected.skipped > before.skipped:
        if not np.isfinite(_as_float32(expected.norm)):
            assert not np.isfinite(now.norm), "gradient_norm"
        assert not np.isfinite(now.norms[~np.isfinite(expected.norms)]).any(), "gradient_norms"
    else:
        close = {"rtol": 3e-5, "atol": 1e-37}
        np.testing.assert_allclose(
            now.norm, _as_float32(expected.norm), err_msg="gradient_norm", **close
        )
        np.testing.assert_allclose(
            now.norms, _as_float32(expected.norms), err_msg="gradient_norms", **close
        )
    beta = expectation.options["momentum"]
    for name, past in (("weights", 1.0), ("momentums", beta), ("averages", 1.0)):
        parts = (getattr(state, name) for state in (now, expected, before))
        for i, (value, wanted, old) in enumerate(zip(*parts, strict=True)):
            if wanted is old:
                np.testing.assert_array_equal(value, old, err_msg=f"{name}[{i}]")
                continue
            weight = case.weights[i]
            eps = float(ml_dtypes.finfo(numpy_dtype(weight.dtype)).eps)
            if weight.constrained:  # On PyTorch Keras' constraints round float64 to float32.
                eps = max(eps, 2.0**-23)
            stored = 2.0 * eps * (norm([wanted]) + norm([old]))
            stored += _least_of(weight.dtype) * np.sqrt(wanted.size)
            allowed = stored + 3e-5 * norm([wanted - past * old])
            error = norm([value - wanted])
            assert error <= allowed, f"{name}[{i}]: error {error:.2e}, allowed {allowed:.2e}"
    assert np.isfinite(now.noise_scale)
    if expectation.knows_noise:
        atol = 1e-5 * np.abs(expected.moments).max()  # Moments are differences of squares.
        np.testing.assert_allclose(
            now.moments, expected.moments, rtol=1e-4, atol=atol, err_msg="moments"
        )


def assert_within_the_bound(
    now: State, before: State, case: Case, expectation: Expectation
) -> None:
    """Assert that a call moves the weights by at most learning rate / (1 - momentum).

    If gradients are normalized by variable the bound holds for each variable. Nothing is asserted
    where weight decay or moving averages change the weights as well.
    """
    options = expectation.options
    if options.get("weight_decay") or options.get("ema_overwrite_frequency"):
        return
    moved = [after - old for after, old in zip(now.weights, before.weights)]
    rounding = sum(
        float(ml_dtypes.finfo(numpy_dtype(weight.dtype)).eps) * norm([old]) + 1e-6 * norm([old])
        for weight, old in zip(case.weights, before.weights)
    )
    bound = options["learning_rate"] / (1.0 - expectation.greatest_momentum)
    count = len(moved) if expectation.was_blockwise else 1
    assert norm(moved) <= bound * np.sqrt(count) * (1 + 1e-4) + rounding


def _least_of(dtype: str) -> float:
    """Return the least positive number to expect of a dtype, as subnormal numbers may be zeros."""
    return float(
        np.finfo("float16").smallest_subnormal if dtype == "float16" else 2 * SMALLEST_NORMAL
    )


def _as_float32(value: Any) -> Any:
    """Round numbers to float32 and return them in float64."""
    with np.errstate(over="ignore"):
        return np.asarray(value).astype("float32").astype("float64")
