"""Tables of the study, in Markdown."""

from collections.abc import Sequence

from study.methods import METHODS
from study.summary import SNGM, Summary, difference, epochs_to, groups_of, target_of


def spread(each: Summary) -> str:
    """Format the mean and the standard deviation of the test scores."""
    return f"{each.mean:.1f} ± {each.deviation:.1f}"


def scores(summaries: Sequence[Summary], measure: str) -> str:
    """Return a table of test scores and SNGM's lead by setting, batch size and method.

    The best method of each setting and batch size comes first.
    """
    rows = []
    for (setting, batch_size), group in groups_of(summaries).items():
        reference = next((each for each in group if each.method == SNGM), None)
        target = target_of(group)
        for each in sorted(group, key=lambda each: -each.mean):
            epochs = epochs_to(each, target)
            rows.append(
                [
                    setting,
                    f"{batch_size:,}",
                    each.method,
                    f"{each.learning_rate:.3g}",
                    spread(each),
                    lead(reference, each) if reference else "",
                    f"{epochs or 'never'} to {target} %",
                    f"{each.good_range:.2g}",
                ]
            )
    head = [
        "setting",
        "batch",
        "method",
        "best learning rate",
        f"test {measure}, %",
        "SNGM's lead (p)",
        "epochs to a validation score",
        "good rates, max / min",
    ]
    return markdown(head, rows)


def matrix(summaries: Sequence[Summary], columns: Sequence[tuple[str, int]]) -> str:
    """Return a table of test scores with a row for each method.

    Args:
        summaries: the results of one or more tasks.
        columns: the setting and the batch size of each column.
    """
    groups = groups_of(summaries)
    cells = {key: {each.method: spread(each) for each in groups[key]} for key in columns}
    methods = [name for name in METHODS if any(name in column for column in cells.values())]
    head = ["method", *(f"{setting}, batch {size:,}" for setting, size in columns)]
    return markdown(
        head,
        [[method, *(column.get(method, "") for column in cells.values())] for method in methods],
    )


def pairs(summaries: Sequence[Summary]) -> list[tuple[Summary, Summary]]:
    """Return SNGM and momentum SGD at every setting and batch size at which both were run."""
    groups = groups_of(summaries).values()
    by_method = [{each.method: each for each in group} for group in groups]
    return [
        (found[SNGM], found["momentum SGD"])
        for found in by_method
        if {SNGM, "momentum SGD"} <= set(found)
    ]


def conversion(sngm: Summary, sgd: Summary) -> float:
    """Return SNGM's best rate / (momentum SGD's best rate * its median gradient norm)."""
    return sngm.learning_rate / (sgd.learning_rate * sgd.typical_norm)


def lead(reference: Summary, other: Summary) -> str:
    """Format by how many points the reference is ahead of a method, with the p-value.

    The reference compared with itself is a dash.
    """
    if reference is other:
        return "–"
    lead, p_value = difference(reference, other)
    p = "< 0.001" if p_value < 0.001 else f"= {p_value:.2g}"
    return f"{lead:+.1f} (p {p})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
