"""Where preferences come from: scorers (sample -> number), judges that label segments, and the pairs that follow."""

from mmalign.feedback.endpoint import EndpointJudge, EndpointSettings
from mmalign.feedback.fine_grained import (
    KINDS,
    Agreement,
    Fact,
    Finding,
    FineGrained,
    Malformed,
    Response,
    Tally,
    agreement,
    parse_facts,
    rejected,
    stated,
)
from mmalign.feedback.journal import Journal, Journalled
from mmalign.feedback.judges import Answer, Judge, Template, answers, says_yes
from mmalign.feedback.pairing import Balance, Pairing, PairingSettings, pair, pair_balanced
from mmalign.feedback.reward_models import ClipScore, Scorer, clip_score
from mmalign.feedback.segments import segments

__all__ = [
    "KINDS",
    "Agreement",
    "Answer",
    "Balance",
    "ClipScore",
    "EndpointJudge",
    "EndpointSettings",
    "Fact",
    "FineGrained",
    "Finding",
    "Journal",
    "Journalled",
    "Judge",
    "Malformed",
    "Pairing",
    "PairingSettings",
    "Response",
    "Scorer",
    "Tally",
    "Template",
    "agreement",
    "answers",
    "clip_score",
    "pair",
    "pair_balanced",
    "parse_facts",
    "rejected",
    "says_yes",
    "segments",
    "stated",
]
