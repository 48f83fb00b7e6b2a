"""Tables of the study, in Markdown."""

from collections.abc import Sequence

from trials.pictures import groups_of
from trials.summary import Summary, difference, epochs_to, target_of

REFERENCE = "SNGM"


def spread(each: Summary) -> str:
    """Mean and standard deviation."""
    return f"{each.mean:.1f} ± {each.deviation:.1f}"


def scores(summaries: Sequence[Summary], measure: str) -> str:
    """Test scores by setting, batch size and method, the best first, and SNGM's lead."""
    rows = []
    for (setting, batch_size), group in groups_of(summaries).items():
        reference = next(each for each in group if each.method == REFERENCE)
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
                    lead(reference, each),
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


def matrix(summaries: Sequence[Summary]) -> str:
    """Test scores with a row for each method and a column for each setting and batch size."""
    groups = groups_of(summaries)
    methods = list(dict.fromkeys(each.method for group in groups.values() for each in group))
    cells = {key: {each.method: spread(each) for each in group} for key, group in groups.items()}
    head = ["method", *(f"{setting}, batch {size:,}" for setting, size in groups)]
    return markdown(
        head, [[method, *(cells[key].get(method, "") for key in groups)] for method in methods]
    )


def lead(reference: Summary, other: Summary) -> str:
    """By how many points the reference is ahead, with the p-value."""
    if reference is other:
        return "–"
    lead, p_value = difference(reference, other)
    p = "< 0.001" if p_value < 0.001 else f"= {p_value:.2g}"
    return f"{lead:+.1f} (p {p})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
