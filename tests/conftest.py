import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Examples import each other by name, as scripts of one folder do.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
