"""Makes tables and pictures of the large-batch study from the files of its runs.

In the folder `examples`,

    python -m study.report                                              reports on your runs
    python -m study.report --results ../docs/study --output ../docs     writes docs/study.md

Files of runs may be compressed: mnist1d.jsonl or mnist1d.jsonl.gz. If the same folder has a
template study.md.jinja, it is filled in with the numbers of the runs. Without a template the
report is a table for each task.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from study.page import Report

TEMPLATE = "study.md.jinja"
USUAL = """\
{% for task in tasks %}
## {{ task }}

{{ scores(task) }}

{% for picture in pictures %}![{{ picture }}]({{ folder }}/{{ task }}_{{ picture }}.png)
{% endfor %}{% endfor %}"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m study.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results/study"))
    parser.add_argument("--output", type=pathlib.Path, help="default: the folder of the results")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_dir():
        parser.error(f"`--results` must be a folder. Received: {arguments.results}")
    arguments.output = arguments.output or arguments.results
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    report = Report(arguments.results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    template = arguments.results / TEMPLATE
    folder = os.path.relpath(arguments.results.resolve(), arguments.output.resolve())
    text = report.fill(
        template.read_text() if template.exists() else USUAL, pathlib.Path(folder).as_posix()
    )
    page = arguments.output / "study.md"
    page.write_text(text)
    report.draw(arguments.results)
    print(text)
    print(f"Wrote {page} and pictures in {arguments.results}")


if __name__ == "__main__":
    main()
