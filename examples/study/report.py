"""Makes tables and pictures of the large-batch study from the files of its runs.

In the folder `examples`,

    python -m study.report                                              reports on your runs
    python -m study.report --results ../docs/study --output ../docs     writes the pages in docs

Files of runs may be compressed: mnist1d.jsonl or mnist1d.jsonl.gz. If the same folder has a
template study.md.jinja, it is filled in with the numbers of the runs, and so is
learning_rate.md.jinja. Without a template the report is a table for each task.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from study.page import Report

PAGES = ("study.md", "learning_rate.md")
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
    folder = os.path.relpath(arguments.results.resolve(), arguments.output.resolve())
    templates = {name: arguments.results / f"{name}.jinja" for name in PAGES}
    found = {name: path.read_text() for name, path in templates.items() if path.exists()}
    for name, template in (found or {PAGES[0]: USUAL}).items():
        text = report.fill(template, pathlib.Path(folder).as_posix())
        page = arguments.output / name
        page.write_text(text)
        print(f"{text}\nWrote {page}")
    report.draw(arguments.results)
    print(f"Wrote pictures in {arguments.results}")


if __name__ == "__main__":
    main()
