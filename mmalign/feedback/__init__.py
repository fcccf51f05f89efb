"""Where preferences come from: scorers (sample -> number) and the pairs that follow from scores."""

from mmalign.feedback.pairing import Pairing, PairingSettings, pair
from mmalign.feedback.reward_models import ClipScore, Scorer, clip_score

__all__ = ["ClipScore", "Pairing", "PairingSettings", "Scorer", "clip_score", "pair"]
