"""Numbers that keep apart the files of the models that one logger is used for."""

import os
import pathlib
import uuid
import weakref
from collections.abc import Callable
from typing import Any


class Outputs:
    """Numbers of the models that a logger is used for, which their files are named after.

    Copies of a logger share this object, so that none writes to a file of another. A copy that
    was sent to another process cannot know what others do: there it creates the files of a
    number first, to claim it.

    Args:
        key: identifies the logger among all processes.
        process: id of the process that the logger was made in; `None` in others.
    """

    def __init__(self, key: str, process: int | None = None) -> None:
        self._key = key
        self._process = process
        self._models: list[tuple[Callable[[], Any], int]] = []
        self._next = 0

    def number(self, model: Any, claim: Callable[[int], bool]) -> int:
        """Return the number of a model; a model without one gets the next.

        Args:
            model: the model to be logged.
            claim: tries to create the files of a number, returns `False` if there are any. It is
                asked only in processes other than the logger's own, which cannot know what others
                write.
        """
        known = [number for of, number in self._models if of() is model]
        return known[-1] if known else self.new_number(model, claim)

    def new_number(self, model: Any, claim: Callable[[int], bool]) -> int:
        """Give a model another number, as if it had none, and return it.

        Args:
            model: the model to be logged.
            claim: tries to create the files of a number, returns `False` if there are any. It is
                asked only in processes other than the logger's own, which cannot know what others
                write.
        """
        if self._process != os.getpid():
            while not claim(self._next):
                self._next += 1
        number, self._next = self._next, self._next + 1
        self._models.append((weakref.ref(model), number))
        return number

    def is_known(self, model: Any) -> bool:
        """Return whether a model was given a number, which its files are named after."""
        return any(of() is model for of, _ in self._models)

    def __reduce__(self) -> tuple[Callable[[str], "Outputs"], tuple[str]]:
        """Pickle and copy the key alone, so that copies in one process share one object."""
        return _of_key, (self._key,)


_outputs_by_key: weakref.WeakValueDictionary[str, Outputs] = weakref.WeakValueDictionary()


def new_outputs() -> Outputs:
    """Return an empty register of which model's files have which number, for a new logger.

    It is kept by its key, to be found by copies of the logger in this process.
    """
    outputs = Outputs(uuid.uuid4().hex, os.getpid())
    _outputs_by_key[outputs._key] = outputs
    return outputs


def _of_key(key: str) -> Outputs:
    """Return the object that all copies of one logger in this process share."""
    return _outputs_by_key.setdefault(key, Outputs(key))


def numbered_file(name: str, number: int) -> str:
    """Return the name of a file for the model of this number.

    >>> numbered_file("logs/log.csv", 0), numbered_file("logs/log.csv", 1)
    ('logs/log.csv', 'logs/log_1.csv')
    """
    root, suffix = os.path.splitext(name)
    return f"{root}_{number}{suffix}" if number else name


def numbered_folder(name: str, number: int) -> str:
    """Return the name of a folder for the model of this number.

    >>> numbered_folder("logs/run.2/", 0), numbered_folder("logs/run.2/", 1)
    ('logs/run.2/', 'logs/run.2_1')
    """
    return f"{name.rstrip('/')}_{number}" if number else name


def claim_file(filename: str) -> bool:
    """Create an empty file. Returns `False` if it exists, whoever created it."""
    path = pathlib.Path(filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def claim_folder(folder: str) -> bool:
    """Create a folder. Returns `False` if it exists, whoever created it.

    A folder with a URL is taken to be free.
    """
    if "://" in folder:
        return True
    try:
        os.makedirs(folder)
    except FileExistsError:
        return False
    return True
