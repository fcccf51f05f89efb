"""From the `objective:` section of a config to a function of log-probs alone."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mmalign.core.objectives.paired import CHOSEN_ONLY, PAIRED, REFERENCE_FREE, Result
from mmalign.core.types import LogProbs, Pair


class BoundObjective:
    """An objective with its parameters, and what it needs. Called as `objective(policy, reference)`."""

    def __init__(self, name: str, function: Callable[..., Result]):
        self.name = name
        self.needs_reference = name not in REFERENCE_FREE
        self.chosen_only = name in CHOSEN_ONLY
        self._function = function

    def __call__(self, policy: Pair, reference: Pair | None) -> Result:
        return self._function(policy, reference)

    def at_equality(self) -> float:
        """The loss where policy and reference agree, e.g. ln 2 for dpo: what step 0 must show. Chosen-only: unknown."""
        rows = LogProbs(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
        equal = Pair(rows, rows)
        return float(self(equal, equal)[0])


def bind_objective(section: Mapping[str, Any]) -> BoundObjective:
    """`{name: dpo, beta: 0.1}` to a function. Unknown names, keys and values out of range raise ValueError here, before
    anything is loaded."""
    name = section.get("name")
    if name not in PAIRED:
        raise ValueError(f"objective.name is {name!r}; {_nearest(str(name), PAIRED)}")
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(PAIRED[name]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    parameters = {}
    for key, value in section.items():
        if key == "name":
            continue
        if key not in defaults:
            raise ValueError(f"unknown key objective.{key} for {name}: {_nearest(key, defaults)}")
        parameters[key] = _typed(key, value, type(defaults[key]))
    objective = BoundObjective(name, functools.partial(PAIRED[name], **parameters))
    objective.at_equality()
    return objective


def _typed(key: str, value: Any, expected: type) -> Any:
    """`value` as the type of the parameter's default; YAML writes 100 for 100.0 and reads 1e-3 as text."""
    try:
        if isinstance(value, bool) == (expected is bool):
            return expected(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"objective.{key} is {value!r}; expected a {expected.__name__}")


def _nearest(word: str, known: Any) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    expected = f"expected one of {', '.join(known)}" if known else "it has no parameters"
    return f"did you mean {nearest[0]}? ({expected})" if nearest else expected
