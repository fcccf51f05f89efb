"""Every objective: a pure function of log-probs, in families by the shape of its feedback.

Each returns `(loss, metrics)`: a scalar, and a dict of detached scalars. What stands before the star of a signature is
data, the keyword-only parameters behind it are its config keys.
"""

from mmalign.core.objectives.binding import (
    BATCH_DEPENDENT,
    FAMILIES,
    REFERENCE_FREE,
    BoundObjective,
    bind_objective,
)
from mmalign.core.objectives.labelled import LABELLED
from mmalign.core.objectives.listwise import LISTWISE
from mmalign.core.objectives.paired import CHOSEN_ONLY, PAIRED
from mmalign.core.objectives.policy_gradient import POLICY_GRADIENT

__all__ = [
    "BATCH_DEPENDENT",
    "CHOSEN_ONLY",
    "FAMILIES",
    "LABELLED",
    "LISTWISE",
    "PAIRED",
    "POLICY_GRADIENT",
    "REFERENCE_FREE",
    "BoundObjective",
    "bind_objective",
]
