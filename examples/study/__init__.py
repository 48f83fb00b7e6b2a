"""The large-batch study: `python -m study` runs it, `python -m study.report` reports on it."""
