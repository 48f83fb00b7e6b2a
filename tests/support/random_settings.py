"""How many cases a random test draws.

The same few in each run, or new ones, as many as `KERAS_SNGM_RANDOM_CASES` says.
"""

import math
import os

from hypothesis import HealthCheck, settings

ASKED_FOR = os.environ.get("KERAS_SNGM_RANDOM_CASES")


def random_settings(usual: float, share: float = 1.0) -> settings:
    """Return the settings of a test.

    Args:
        usual: how many cases it has in a usual run.
        share: its part of the number that is asked for.
    """
    return settings(
        max_examples=math.ceil(usual if ASKED_FOR is None else int(ASKED_FOR) * share),
        derandomize=ASKED_FOR is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
