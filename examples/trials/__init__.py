"""Parts of the large-batch study, `examples/study.py`."""
