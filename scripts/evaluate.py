"""Former name of eval.py, kept as a command.

Python puts the folder of a script first on `sys.path`, so a script of this folder that imports the package `evaluate`
gets this file. Imported as a module, the file therefore loads the package in its place.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

if __name__ == "__main__":
    import eval as script

    sys.exit(script.main())

_scripts = Path(__file__).resolve().parent
_spec = PathFinder.find_spec("evaluate", [path for path in sys.path if Path(path or ".").resolve() != _scripts])
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
