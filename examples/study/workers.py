"""Concurrent searches, each in one process at a time."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from study.config import Search
from study.results import Run, Wanted

Process = concurrent.futures.ProcessPoolExecutor


def run_all(
    searches: Iterable[Search], pending: Callable[[Search], list[Wanted]], jobs: int
) -> Iterator[Run]:
    """Do the runs of all searches in several processes, until all searches are done.

    A process does all runs of a search before it begins another, so that it builds the model of
    the search once.

    Args:
        searches: the searches, in the order to begin them.
        pending: returns the runs that a search needs next, none if it is done. It is called
            again after each run of the search was yielded.
        jobs: the number of processes.

    Yields:
        Each run as soon as it is finished.
    """
    waiting = iter(searches)
    busy: dict[concurrent.futures.Future, tuple[Process, Search]] = {}

    def begin_next(process: Process, search: Search | None) -> None:
        """Submit the next run to a process: of its search, or else of the first waiting one."""
        while search is None or not pending(search):
            search = next(waiting, None)
            if search is None:
                return
        busy[process.submit(_run, search, pending(search)[0])] = (process, search)

    with contextlib.ExitStack() as stack:
        for _ in range(jobs):
            begin_next(stack.enter_context(_process(jobs)), None)
        while busy:
            finished, _ = concurrent.futures.wait(busy, return_when="FIRST_COMPLETED")
            for future in finished:
                process, search = busy.pop(future)
                yield future.result()
                begin_next(process, search)


def prepare(contents: Sequence[dict[str, Any]]) -> None:
    """Load the data of tasks once, so that several processes do not download the same data.

    Args:
        contents: the argument of `study.tasks.load` for each task.
    """
    with _process(1) as process:
        process.submit(_prepare, contents).result()


def _process(jobs: int) -> Process:
    """Return a new process, one of `jobs` that share the cores."""
    # TensorFlow would hang in a forked process.
    context = multiprocessing.get_context("spawn")
    return Process(1, mp_context=context, initializer=_begin, initargs=(jobs,))


def _begin(jobs: int) -> None:
    """Set up a new process: it ends with its parent and uses its share of the cores."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _share_cores(jobs)


def _end_with_parent() -> None:
    """Wait until the parent process has ended, then end this one."""
    # A worker whose parent was killed would wait forever for its next run.
    multiprocessing.parent_process().join()
    os._exit(1)


def _share_cores(jobs: int) -> None:
    """Limit the threads of TensorFlow to a share of the cores, one of `jobs` equal shares."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    cores = max(1, (os.cpu_count() or 1) // jobs)
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    # TensorFlow warns of retracing when one model follows another, which is no problem here.
    tf.get_logger().setLevel("ERROR")


def _prepare(contents: Sequence[dict[str, Any]]) -> None:
    """Load the data of tasks, in a worker process."""
    from study import tasks

    for content in contents:
        tasks.load(content)


def _run(search: Search, wanted: Wanted) -> Run:
    """Do a run, in a worker process."""
    # `_share_cores` must have set up TensorFlow before this import uses it.
    from study.training import trainer_for

    return trainer_for(search).run(wanted)
