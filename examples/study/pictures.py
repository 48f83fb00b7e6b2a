"""Pictures of the results of one task of the study."""

import pathlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from study.methods import METHODS
from study.search import learning_rate
from study.summary import Summary, groups_of

COLORS = dict(zip(METHODS, [*plt.get_cmap("tab10").colors, "black", "gold"], strict=True))


def widest(summaries: Sequence[Summary]) -> dict[tuple[str, int], list[Summary]]:
    """Return the batch size at which most methods were compared, for each setting.

    Settings without a comparison of several methods are left out, unless no setting has one.

    Returns:
        The summaries of the compared methods, by setting and batch size.
    """
    best: dict[str, tuple[tuple[str, int], list[Summary]]] = {}
    groups = groups_of(summaries)
    several = {key: group for key, group in groups.items() if len(group) > 1}
    for key, group in (several or groups).items():
        if key[0] not in best or len(group) > len(best[key[0]][1]):
            best[key[0]] = (key, group)
    return dict(best.values())


def draw_scores(summaries: Sequence[Summary], measure: str, path: pathlib.Path) -> None:
    """Draw test scores by method: a point for each seed, a line for the mean."""
    groups = widest(summaries)
    figure, panels = _panels(len(groups), height=3.6)
    for panel, ((setting, batch_size), group) in zip(panels, groups.items(), strict=True):
        ranked = sorted(group, key=lambda each: each.mean)
        for row, each in enumerate(ranked):
            color = COLORS[each.method]
            panel.plot(each.test, [row] * len(each.test), "o", color=color, alpha=0.5, ms=4)
            panel.plot([each.mean] * 2, [row - 0.35, row + 0.35], color=color, lw=2)
        panel.set_yticks(range(len(ranked)), [each.method for each in ranked], fontsize="small")
        panel.set(title=_title(setting, batch_size), xlabel=f"test {measure}, %")
    _save(figure, path)


def draw_rates(summaries: Sequence[Summary], measure: str, path: pathlib.Path) -> None:
    """Draw validation scores against learning rate / best learning rate, by method."""
    groups = widest(summaries)
    figure, panels = _panels(len(groups))
    for panel, ((setting, batch_size), group) in zip(panels, groups.items(), strict=True):
        for each in group:
            exponents = sorted(each.tuning)
            panel.plot(
                [learning_rate(k - each.best) for k in exponents],
                [each.tuning[k] for k in exponents],
                "o-",
                color=COLORS[each.method],
                label=each.method,
                ms=3,
                lw=1,
            )
        best = max(max(each.tuning.values()) for each in group)
        worst = min(each.tuning[each.best] for each in group)
        panel.set(
            title=_title(setting, batch_size),
            xlabel="learning rate / best learning rate",
            ylabel=f"validation {measure}, %",
            xscale="log",
            ylim=(worst - 2 * max(best - worst, 2), best + 1),
        )
        panel.set_xscale("log", base=2)
    _legend_below(figure, panels[0])
    _save(figure, path)


def draw_batch_sizes(summaries: Sequence[Summary], measure: str, path: pathlib.Path) -> None:
    """Draw the best learning rate and the test score against the batch size, by method."""
    by_setting: dict[str, dict[str, list[Summary]]] = {}
    for each in sorted(summaries, key=lambda each: each.batch_size):
        by_setting.setdefault(each.setting, {}).setdefault(each.method, []).append(each)
    several = {
        setting: by_method
        for setting, by_method in by_setting.items()
        if any(len(line) > 1 for line in by_method.values())
    }
    drawn = several or by_setting
    figure, panels = _panels(2 * len(drawn))
    for i, (setting, by_method) in enumerate(drawn.items()):
        rates, scores = panels[2 * i : 2 * i + 2]
        for method, line in by_method.items():
            if several and len(line) == 1:
                continue
            sizes = [each.batch_size for each in line]
            style = {"color": COLORS[method], "label": method, "lw": 1, "ms": 4}
            rates.plot(sizes, [each.learning_rate for each in line], "o-", **style)
            means, deviations = zip(*((each.mean, each.deviation) for each in line), strict=True)
            scores.errorbar(sizes, means, deviations, marker="o", capsize=2, **style)
        _draw_square_root(rates, by_method)
        rates.set(title=setting, xlabel="batch size", ylabel="best learning rate")
        rates.set_yscale("log", base=2)
        scores.set(title=setting, xlabel="batch size", ylabel=f"test {measure}, %")
        for panel in (rates, scores):
            panel.set_xscale("log", base=2)
        scores.legend(fontsize="xx-small")
    _save(figure, path)


def _draw_square_root(panel: Axes, by_method: dict[str, list[Summary]]) -> None:
    """Draw how SNGM's rate would grow with the square root of the batch size."""
    line = by_method.get("SNGM", [])
    if len(line) > 1:
        first, last = line[0], line[-1]
        end = first.learning_rate * np.sqrt(last.batch_size / first.batch_size)
        sizes = [first.batch_size, last.batch_size]
        panel.plot(sizes, [first.learning_rate, end], ":", color="gray", label="√(batch size)")
        panel.legend(fontsize="xx-small")


def draw_training(summaries: Sequence[Summary], measure: str, path: pathlib.Path) -> None:
    """Draw validation score, a mean over seeds, and gradient norm, a median, by epoch."""
    groups = widest(summaries)
    figure, panels = _panels(2 * len(groups))
    for i, ((setting, batch_size), group) in enumerate(groups.items()):
        scores, norms = panels[2 * i : 2 * i + 2]
        for each in group:
            epochs = np.arange(1, each.epochs + 1)
            style = {"color": COLORS[each.method], "label": each.method, "lw": 1}
            scores.plot(epochs, each.curve.mean(0), **style)
            norms.plot(epochs, np.median(each.grad_norm, axis=0), **style)
        title = _title(setting, batch_size)
        scores.set(title=title, xlabel="epoch", ylabel=f"validation {measure}, %")
        norms.set(title=title, xlabel="epoch", ylabel="gradient norm, median", yscale="log")
        for panel in (scores, norms):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, panels[0])
    _save(figure, path)


PICTURES = {
    "scores": draw_scores,
    "rates": draw_rates,
    "batch_sizes": draw_batch_sizes,
    "training": draw_training,
}


def _title(setting: str, batch_size: int) -> str:
    return f"{setting}\nbatch {batch_size:,}"


def _panels(count: int, height: float = 3.2) -> tuple[plt.Figure, list[Axes]]:
    """Return a figure of `count` panels in at most two columns, each `height` inches high."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(5.2 * columns, height * rows),
        layout="constrained",
        squeeze=False,
    )
    flat = list(panels.flat)
    for unused in flat[count:]:
        unused.remove()
    for panel in flat[:count]:
        panel.grid(alpha=0.3)
    return figure, flat[:count]


def _legend_below(figure: plt.Figure, panel: Axes) -> None:
    """Add the legend of a panel below all panels, where it hides no lines."""
    lines, names = panel.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize="x-small")


def _save(figure: plt.Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
