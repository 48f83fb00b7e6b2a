"""Searches side by side, each in one process at a time."""

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
    """Does what the searches want, until they want nothing more.

    A process stays with a search until it is done, so that it builds its model once.

    Args:
        searches: in the order to begin them.
        pending: what a search wants next. It is asked again after each of its runs, when
            that has been handed out.
        jobs: how many processes there are.

    Yields:
        Each run as soon as it is there.
    """
    waiting = iter(searches)
    busy: dict[concurrent.futures.Future, tuple[Process, Search]] = {}

    def begin_next(process: Process, search: Search | None) -> None:
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
    """Gets the data of tasks in one process, before several would download it at once.

    Args:
        contents: what `study.tasks.load` gets.
    """
    with _process(1) as process:
        process.submit(_prepare, contents).result()


def _process(jobs: int) -> Process:
    # A forked TensorFlow would hang.
    context = multiprocessing.get_context("spawn")
    return Process(1, mp_context=context, initializer=_begin, initargs=(jobs,))


def _begin(jobs: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _share_cores(jobs)


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for more to do for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _share_cores(jobs: int) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    cores = max(1, (os.cpu_count() or 1) // jobs)
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    # TensorFlow takes models that follow each other for one that is traced again and again.
    tf.get_logger().setLevel("ERROR")


def _prepare(contents: Sequence[dict[str, Any]]) -> None:
    from study import tasks

    for content in contents:
        tasks.load(content)


def _run(search: Search, wanted: Wanted) -> Run:
    # Not before TensorFlow has been told how many cores to use.
    from study.training import trainer_for

    return trainer_for(search).run(wanted)
