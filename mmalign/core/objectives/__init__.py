"""Every objective: a pure function of log-probs, in families by the shape of its feedback.

Each returns `(loss, metrics)`: a scalar, and a dict of detached scalars. The keyword-only parameters of a function are
its config keys.
"""

from mmalign.core.objectives.binding import BoundObjective, bind_objective
from mmalign.core.objectives.paired import CHOSEN_ONLY, PAIRED, REFERENCE_FREE

__all__ = ["CHOSEN_ONLY", "PAIRED", "REFERENCE_FREE", "BoundObjective", "bind_objective"]
