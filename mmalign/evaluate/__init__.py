"""Evaluation: judged samples, the table with intervals, and the report.

`mmalign.evaluate(...)` is a verb of the Python API, too. Importing a package replaces the function of that name in its
parent, so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, config: Any = None, *overrides: str) -> Any:
        from mmalign import run_verb

        return run_verb("evaluate", config, overrides)


sys.modules[__name__].__class__ = _Package
