"""Settings of Hypothesis for tests with random cases.

A test draws the same few cases in each run. If the environment variable
`KERAS_SNGM_RANDOM_CASES` is set to a number, tests draw that many new cases.
"""

import math
import os

from hypothesis import HealthCheck, settings

ASKED_FOR = os.environ.get("KERAS_SNGM_RANDOM_CASES")


def random_settings(usual: float, share: float = 1.0) -> settings:
    """Return the settings of a test.

    Args:
        usual: the number of its cases if the environment variable is not set.
        share: the fraction of the cases that the environment variable asks for.
    """
    return settings(
        max_examples=math.ceil(usual if ASKED_FOR is None else int(ASKED_FOR) * share),
        derandomize=ASKED_FOR is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
