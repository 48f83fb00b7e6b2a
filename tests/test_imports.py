"""Test of the modules that `import keras_sngm` brings along."""

from processes import run_python


def test_only_the_backend_in_use_is_imported():
    """`keras_sngm` imports no backend but the one in use. Imports of Keras itself do not count."""
    run_python(
        "-c",
        """
import sys
import keras
before = set(sys.modules)
import keras_sngm
others = {"tensorflow", "jax", "torch"} - {keras.backend.backend()}
assert not {name.partition(".")[0] for name in set(sys.modules) - before} & others
own = [name.rpartition(".")[2] for name in sys.modules if "sngm.backend." in name]
assert not {name.partition("_")[0] for name in own} & others
""",
    )
