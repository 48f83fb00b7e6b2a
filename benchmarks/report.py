"""Tables and a picture of the times that `step_time.py` measures."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from shapes import MODELS, NAMES, parameters

BARS = {
    "SNGM": "tab:blue",
    "SGD": "tab:orange",
    "SGD, clipped": "peru",
    "Adam": "tab:green",
    "LAMB": "tab:olive",
    "momentum kernel": "tab:gray",
    "PyTorch": "tab:red",
    "Optax": "tab:purple",
}
RIVALS = ("SGD", "Optax", "PyTorch")
"""Contestants whose ratio to SNGM within a round is shown."""
LIMIT = "memory bandwidth"

# Each row of the summary: a mode, the contestant, and the SNGM that it is compared with.
_SUMMARY = {
    "SGD": ("function", "SGD", "SNGM"),
    "SGD, eager": ("eager", "SGD", "SNGM"),
    "SGD, `fit(jit_compile=True)`": ("fit", "SGD", "SNGM"),
    "SGD, 2 replicas": ("mirrored", "SGD", "SNGM"),
    "SGD, 4 micro-batches": ("accumulate", "SGD", "SNGM"),
    "SGD, both with decay and average": (
        "function",
        "SGD, decay and average",
        "SNGM, decay and average",
    ),
    "SGD, clipped": ("function", "SGD, clipped", "SNGM"),
    "Adam": ("function", "Adam", "SNGM"),
    "LAMB": ("function", "LAMB", "SNGM"),
    "Optax": ("function", "Optax", "SNGM"),
    "PyTorch": ("function", "PyTorch", "SNGM"),
}
_LEAST_LIMIT_MS = 1.0
"""Least memory limit that a step is compared with. In shorter steps calls take most of the time,
and the bandwidth of the memory says nothing about them."""
_LEAST_SHOWN = 0.2
"""Lower end of the picture's axis, as a fraction of the time of SGD. Memory limits below it are cut
off, as they would squeeze everything else."""


def print_tables(results: dict[str, Any]) -> None:
    """Print the machine and all tables of a file of results."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"\n{machine['processor']}, {machine['cores']} cores")
    if machine.get("accelerator"):
        print(machine["accelerator"])
    print(versions)
    if "function" in _modes(results):
        print("\nMedians, as multiples of SNGM's\n")
        print_rows(summary(results))
    for mode in _modes(results):
        print_mode(results, mode)
    print_costs(results["costs"])
    print_growth("Growth with parameters", "parameters", results["growth"]["parameters"])
    print_growth("Growth with variables", "variables", results["growth"]["variables"])
    print_table_model(results["table"])


def summary(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the README's table of step times, others as multiples of SNGM's."""
    columns = [["", "variables, parameters", "SNGM, ms", *_SUMMARY, "SNGM / limit"]]
    for model, modes in results["steps"].items():
        measured = modes["function"]
        own = measured["times_ms"]["SNGM"][1]
        ratios = [_ratio(modes.get(mode), over, sngm) for mode, over, sngm in _SUMMARY.values()]
        size = f"{measured['variables']:,}, {_format_count(measured['parameters'])}"
        known = measured["limit_ms"] > _LEAST_LIMIT_MS
        limit = f"{own / measured['limit_ms']:.2f}" if known else "–"
        columns.append([NAMES[model], size, number(own), *ratios, limit])
    return [list(row) for row in zip(*columns, strict=True) if set(row[1:]) != {"–"}]


def training(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the README's table of whole training steps."""
    rows = [["task", "batch", "XLA", "SNGM, ms", "SGD", "Adam"]]
    for task, modes in results["steps"].items():
        for mode, measured in modes.items():
            rows.append(
                [
                    NAMES.get(task, task),
                    f"{measured['batch_size']:,}",
                    "yes" if mode == "xla" else "no",
                    spread(measured["times_ms"]["SNGM"]),
                    *(_ratio(measured, name) for name in ("SGD", "Adam")),
                ]
            )
    return rows


_OF_PROGRAMS = {
    "floats_per_parameter": "floats per parameter",
    "temporary_mib": "temporary memory, MiB",
    "kernels": "kernels",
    "graphs": "CUDA graphs",
    "conditions": "conditions",
    "loops": "loops",
    "waits": "waits of the host",
    "all_reduces": "all-reduces",
}


def programs(results: dict[str, Any], device: str, model: str) -> list[list[str]]:
    """Return the rows of the table of the programs that `accelerators.py` compiles.

    Where loops or conditions move more than the usual call, both numbers of floats are given.
    Columns without any number are left out.

    Args:
        results: the contents of the file of results.
        device: the described device.
        model: the model.
    """
    timed = results["timed"].get(model, {}) if device == "h100" else {}
    columns = [["step", *_OF_PROGRAMS.values(), "ms", "share of the bandwidth"]]
    for name, facts in results["compiled"][device][model].items():
        cells = [number(facts.get(key)) for key in _OF_PROGRAMS]
        floats, most = (facts.get(f"floats_{key}", 0) for key in ("per_parameter", "with_branches"))
        if most > floats:
            cells[0] += f" to {number(most)}"
        moved = 4 * parameters(MODELS[model]) * floats
        columns.append([name, *cells, *_timed(timed, name, moved)])
    known = [row for row in zip(*columns, strict=True) if set(row[1:]) != {"–"}]
    return [list(row) for row in zip(*known, strict=True)]


def _timed(timed: dict[str, Any], name: str, moved: float) -> list[str]:
    """Return the time of a step and the share of the bandwidth, dashes if it was not timed.

    Args:
        timed: what was measured on a GPU.
        name: the step.
        moved: number of bytes that the step moves.
    """
    if name not in timed.get("times_ms", {}):
        return ["–", "–"]
    milliseconds = timed["times_ms"][name][1]
    share = moved / (milliseconds / 1e3) / (1e9 * timed["bandwidth_gb_per_s"])
    return [number(milliseconds), f"{share:.0%}"]


def _ratio(measured: dict[str, Any] | None, over: str, sngm: str = "SNGM") -> str:
    """Return the median time of `over` divided by that of `sngm`, or a dash if not measured."""
    times = measured["times_ms"] if measured else {}
    return f"{times[over][1] / times[sngm][1]:.2f}" if over in times else "–"


def print_mode(results: dict[str, Any], mode: str) -> None:
    """Print the table of step times of one mode, a row for each model."""
    measured = {model: modes[mode] for model, modes in results["steps"].items() if modes.get(mode)}
    names = list(dict.fromkeys(name for m in measured.values() for name in m["times_ms"]))
    print(f"\nMode `{mode}`, ms per step: median (quartiles)\n")
    paired = [name for name in RIVALS if any(name in m["over_sngm"] for m in measured.values())]
    ratios = [f"{name} / SNGM in a round" for name in paired]
    print_header("model", *names, *ratios, LIMIT, "SNGM/limit")
    for model, m in measured.items():
        limit = _limit(results, model, mode)
        print_row(
            model,
            *(spread(m["times_ms"].get(name)) for name in names),
            *(spread(m["over_sngm"].get(name)) for name in paired),
            number(limit),
            number(m["times_ms"]["SNGM"][1] / limit if limit else None),
        )


def _limit(results: dict[str, Any], model: str, mode: str) -> float | None:
    """Return the time in which memory could move the data of one step, `None` if unknown.

    It was measured together with mode `function`.
    """
    if mode in ("mirrored", "accumulate"):
        return None  # A step in these modes moves another amount of data.
    return (results["steps"][model].get("function") or {}).get("limit_ms")


def print_costs(costs: dict[str, dict[str, Any]]) -> None:
    """Print the table of the time and the memory of first steps, if there are any."""
    if not costs:
        return
    print("\nThe first step, and the memory a step takes besides what is there\n")
    print_header(
        "model",
        "optimizer",
        "first step, s",
        "its peak, MB",
        "a later peak, MB",
        "% of the weights",
    )
    for model, optimizers in costs.items():
        for name, cost in optimizers.items():
            if cost:
                print_row(
                    model,
                    name,
                    number(cost["first_step_s"]),
                    number(cost["first_step_peak_mb"]),
                    number(cost["later_step_peak_mb"]),
                    number(cost["later_step_peak_percent"]),
                )


def print_growth(title: str, of: str, points: Sequence[dict[str, Any]]) -> None:
    """Print the table of step times by number of `of`, "parameters" or "variables"."""
    if not points:
        return
    print(f"\n{title}, ms per step: median (quartiles)\n")
    print_header(of, "SNGM", "SGD", LIMIT)
    for point in points:
        print_row(
            f"{point[of]:,}",
            *(spread(point["times_ms"].get(name)) for name in ("SNGM", "SGD")),
            number(point["limit_ms"]),
        )


def print_table_model(table: dict[str, Any]) -> None:
    """Print the step times of the model that is one embedding table, if there are any."""
    if not table:
        return
    print("\nOne table of 10^9 parameters, ms per step: median (quartiles)\n")
    print_header("optimizer", "time", LIMIT)
    for name, measured in table.items():
        if measured:
            print_row(name, spread(measured["times_ms"][name]), number(measured["limit_ms"]))
        else:
            print_row(name, "–", "–")


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw step times by model and by size into a file, if there are any."""
    growth = {of: points for of, points in results["growth"].items() if points}
    bars = ["models"] if "function" in _modes(results) else []
    if not (bars or growth):
        return
    columns = max(1, len(growth))
    rows = ([bars * columns] if bars else []) + ([list(growth)] if growth else [])
    figure, axes = plt.subplot_mosaic(rows, figsize=(9, 3.8 * len(rows)), layout="constrained")
    if bars:
        _draw_models(axes["models"], results["steps"])
    if "parameters" in growth:
        _draw_growth_with_parameters(axes["parameters"], growth["parameters"])
    if "variables" in growth:
        _draw_growth_with_variables(axes["variables"], growth["variables"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_models(ax: Axes, steps: dict[str, Any]) -> None:
    """Draw the step times of all models in mode `function` as bars, relative to SGD's."""
    measured = {model: modes["function"] for model, modes in steps.items() if modes.get("function")}
    names = [name for name in BARS if any(name in m["times_ms"] for m in measured.values())]
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        ax.bar(
            np.arange(len(measured)) + (i - (len(names) - 1) / 2) * width,
            [_relative(m, m["times_ms"].get(name, [np.nan] * 3)[1]) for m in measured.values()],
            width,
            color=BARS[name],
            label=f"Keras {name}" if name.startswith("SGD") else name,
        )
    for x, m in enumerate(measured.values()):
        ax.hlines(
            _relative(m, m["limit_ms"]),
            x - 0.45,
            x + 0.45,
            "black",
            "--",
            label=None if x else LIMIT,
        )
    ax.axhline(1.0, color="tab:orange", linewidth=0.8, zorder=0)
    ax.set_xticks(range(len(measured)), [_model_label(*item) for item in measured.items()])
    ax.set_yscale("log")
    ax.set_ylim(_LEAST_SHOWN, 3 * ax.get_ylim()[1])  # The legend needs room.
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("time of a step, Keras SGD = 1")
    ax.set_title("The step alone, in a training function")
    ax.legend(fontsize="small", ncols=5, loc="upper center")


def _relative(measured: dict[str, Any], milliseconds: float) -> float:
    """Return a time as a multiple of the median time of SGD."""
    return milliseconds / measured["times_ms"]["SGD"][1]


def _model_label(model: str, measured: dict[str, Any]) -> str:
    size = (
        f"{measured['variables']:,} variables\n{_format_count(measured['parameters'])} parameters"
    )
    return f"{NAMES[model]}\n{size}"


def _format_count(parameters: int) -> str:
    """Format a number of parameters in thousands or millions."""
    if parameters >= 1e6:
        return f"{parameters / 1e6:.1f} M"
    return f"{parameters / 1e3:.0f} k"


def _draw_growth_with_parameters(ax: Axes, points: Sequence[dict[str, Any]]) -> None:
    _draw_growth(ax, "parameters", points)
    ax.plot(
        [point["parameters"] for point in points],
        [point["limit_ms"] for point in points],
        color="black",
        linestyle="--",
        label=LIMIT,
    )
    ax.set_title(f"{points[0]['variables']:,} variables")
    ax.legend(fontsize="small")


def _draw_growth_with_variables(ax: Axes, points: Sequence[dict[str, Any]]) -> None:
    _draw_growth(ax, "variables", points)
    ax.set_title(f"{_format_count(points[0]['parameters'])} parameters")
    ax.legend(fontsize="small")


def _draw_growth(ax: Axes, of: str, points: Sequence[dict[str, Any]]) -> None:
    """Draw the step times of SNGM and SGD by number of `of`, "parameters" or "variables"."""
    for name in ("SNGM", "SGD"):
        ax.plot(
            [point[of] for point in points],
            [point["times_ms"].get(name, [np.nan] * 3)[1] for point in points],
            marker="o",
            markersize=4,
            color=BARS[name],
            label=name,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(of)
    ax.set_ylabel("ms per step")


def _modes(results: dict[str, Any]) -> list[str]:
    """Return the modes in which at least one model was measured."""
    measured = (
        mode for modes in results["steps"].values() for mode, result in modes.items() if result
    )
    return list(dict.fromkeys(measured))


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, the first row as its header."""
    header, *others = rows
    print_header(*header)
    for row in others:
        print_row(*row)


def print_header(*cells: str) -> None:
    print_row(*cells)
    print("|" + "---|" * len(cells))


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def spread(quartiles: Iterable[float] | None) -> str:
    """Format quartiles as "median (lower–upper)", `None` as a dash."""
    if quartiles is None:
        return "–"
    low, median, high = map(number, quartiles)
    return f"{median} ({low}–{high})"


def number(value: float | None) -> str:
    """Format a number with three significant digits and without an exponent, `None` as a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")
