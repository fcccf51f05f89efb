"""The variance-preserving noise schedule: noisy latents, targets and the weight of each timestep, in pure torch.

Symbols of the papers and their names here:

    alphabar_t     alphas_cumprod        a_t = sqrt(alphabar_t)      signal level
    x_0            latents               s_t = sqrt(1 - alphabar_t)  noise level
    x_t            noisy                 SNR_t = alphabar_t / (1 - alphabar_t)
    eps            noise                 T     the number of timesteps

Refused: predictions other than eps and v, and the ELBO weight of an eps-prediction where the last timestep is pure
noise, for it would be infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")
WEIGHTINGS = ("auto", "eps_equivalent", "native", "elbo")


@final
@dataclass(frozen=True)
class NoiseSchedule:
    """alphabar_t for t = 0 ... T-1, what the network predicts, and how the squared error of a timestep is weighted.

    At a given x_t, eps - eps_hat = a_t (v - v_hat), hence the factor alphabar_t between the rows:

    | weighting        | epsilon                  | v_prediction      | applies to           |
    |------------------|--------------------------|-------------------|----------------------|
    | `eps_equivalent` | 1                        | alphabar_t        | the mean of squares  |
    | `native`         | 1                        | 1                 | the mean of squares  |
    | `elbo`           | T (SNR_{t-1}/SNR_t - 1)  | x alphabar_t      | the sum of squares   |

    `auto` is `eps_equivalent`, the simple loss of arXiv 2006.11239 and the loss of arXiv 2311.12908. `elbo` is Eq. 14
    of arXiv 2107.00630; its t = 0 has no previous timestep (that term of the bound is the decoder's) and weighs 0.
    At a zero terminal SNR, `eps_equivalent` gives a v-prediction's last timestep the weight 0 exactly.
    """

    alphas_cumprod: Float[Tensor, " timestep"]
    prediction_type: str
    weighting: str = "auto"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"the scheduler's prediction_type is {self.prediction_type!r}; expected one of "
                f"{', '.join(PREDICTION_TYPES)} (see model.path)"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"model.weighting is {self.weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
        if self.weighting == "elbo" and self.prediction_type == "epsilon" and self.alphas_cumprod.min() <= 0:
            raise ValueError(
                "model.weighting is elbo, but this model predicts eps and its last timestep is pure noise: the weight "
                "would be infinite; use eps_equivalent"
            )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(
        self,
        latents: Float[Tensor, "sample channel height width"],
        noise: Float[Tensor, "sample channel height width"],
        timestep: Int[Tensor, " sample"],
    ) -> Float[Tensor, "sample channel height width"]:
        """x_t = a_t x_0 + s_t eps."""
        signal, level = self._levels(timestep, latents)
        return signal * latents + level * noise

    def target(
        self,
        latents: Float[Tensor, "sample channel height width"],
        noise: Float[Tensor, "sample channel height width"],
        timestep: Int[Tensor, " sample"],
    ) -> Float[Tensor, "sample channel height width"]:
        """What the network should predict: eps, or v = a_t eps - s_t x_0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, level = self._levels(timestep, latents)
        return signal * noise - level * latents

    def weight(self, timestep: Int[Tensor, " sample"], dimensions: int) -> Float[Tensor, " sample"]:
        """w(t), fp32. `dimensions` is C x H x W, by which the sum of squares exceeds their mean."""
        alphas = self.alphas_cumprod.double()
        current = alphas[timestep.to(alphas.device)]
        if self.weighting == "elbo":
            weight = self._elbo(alphas, timestep.to(alphas.device)) * dimensions
        elif self.weighting == "native" or self.prediction_type == "epsilon":
            weight = torch.ones_like(current)
        else:
            weight = current
        return weight.float().to(timestep.device)

    def _elbo(self, alphas: Tensor, timestep: Tensor) -> Tensor:
        """T (SNR_{t-1}/SNR_t - 1), times alphabar_t for v: finite even where SNR_t is 0."""
        current = alphas[timestep]
        previous = alphas[(timestep - 1).clamp_min(0)]
        scaled = previous / (1 - previous) * (1 - current) - current
        weight = len(self) * (scaled if self.prediction_type == "v_prediction" else scaled / current)
        return weight.masked_fill(timestep == 0, 0.0)

    def _levels(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, worked out in float64, in the shape, type and place of the latents."""
        alphas = self.alphas_cumprod.double()[timestep.to(self.alphas_cumprod.device)].reshape(-1, 1, 1, 1)
        return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)
