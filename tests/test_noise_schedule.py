"""The noise schedule against diffusers, against the formulas, and where a zero terminal SNR makes things delicate."""

import math
from typing import Any

import pytest
import torch

from mmalign.modalities.noise_schedule import NoiseSchedule

STEPS = 1000


def schedule(prediction_type="epsilon", weighting="auto", zero_snr=False):
    return NoiseSchedule(scheduler(prediction_type, zero_snr).alphas_cumprod, prediction_type, weighting)


def scheduler(prediction_type="epsilon", zero_snr=False) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": zero_snr,
        }
    )


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noisy_latents_and_velocity_are_those_of_diffusers(zero_snr):
    theirs, ours = scheduler("v_prediction", zero_snr), schedule("v_prediction", zero_snr=zero_snr)
    latents, noise = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    timestep = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(ours.add_noise(latents, noise, timestep), theirs.add_noise(latents, noise, timestep))
    torch.testing.assert_close(ours.target(latents, noise, timestep), theirs.get_velocity(latents, noise, timestep))
    assert torch.equal(schedule().target(latents, noise, timestep), noise)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_errors_of_eps_and_v_agree_under_the_eps_equivalent_weight(zero_snr):
    """At fixed x_t, eps - eps_hat = a_t (v - v_hat): the same model gives the same log-prob in either form."""
    eps, v = schedule(zero_snr=zero_snr), schedule("v_prediction", zero_snr=zero_snr)
    latents, noise, guess = torch.randn(3, 6, 4, 2, 2, dtype=torch.float64)
    timestep = torch.tensor([0, 10, 300, 700, 990, 999])
    alphas = eps.alphas_cumprod.double()[timestep].reshape(-1, 1, 1, 1)
    noisy = eps.add_noise(latents, noise, timestep)
    eps_guess = alphas.sqrt() * guess + (1 - alphas).sqrt() * noisy  # the eps that the velocity `guess` implies
    eps_error = (noise - eps_guess).square().mean((1, 2, 3)) * eps.weight(timestep, 16)
    v_error = (v.target(latents, noise, timestep) - guess).square().mean((1, 2, 3)) * v.weight(timestep, 16)
    torch.testing.assert_close(eps_error, v_error, rtol=1e-6, atol=1e-12)


def test_weights_are_the_formulas():
    timestep = torch.tensor([1, 500, 999])
    alphas = schedule().alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    elbo = STEPS * (snr[timestep - 1] / snr[timestep] - 1)
    assert schedule().weight(timestep, 64).tolist() == [1, 1, 1]
    assert schedule(weighting="native").weight(timestep, 64).tolist() == [1, 1, 1]
    assert schedule("v_prediction", "native").weight(timestep, 64).tolist() == [1, 1, 1]
    torch.testing.assert_close(schedule("v_prediction").weight(timestep, 64), alphas[timestep].float())
    torch.testing.assert_close(schedule(weighting="elbo").weight(timestep, 64), 64 * elbo.float())
    torch.testing.assert_close(
        schedule("v_prediction", "elbo").weight(timestep, 64), 64 * (elbo * alphas[timestep]).float()
    )


def test_native_v_overweights_noise_by_the_known_factor():
    last = torch.tensor([999])
    factor = schedule("v_prediction", "native").weight(last, 1) / schedule("v_prediction").weight(last, 1)
    assert factor.item() == pytest.approx(215, abs=1)


def test_zero_terminal_snr_is_exact():
    timestep = torch.tensor([999])
    latents, noise = torch.randn(2, 1, 4, 2, 2).unbind()
    v = schedule("v_prediction", zero_snr=True)
    assert v.weight(timestep, 16).item() == 0
    assert torch.equal(v.add_noise(latents, noise, timestep), noise)
    assert torch.equal(v.target(latents, noise, timestep), -latents)
    elbo = schedule("v_prediction", "elbo", zero_snr=True).weight(torch.arange(STEPS), 16)
    assert torch.isfinite(elbo).all()
    assert (elbo >= 0).all()
    assert elbo[0] == 0
    snr = v.alphas_cumprod[998].double() / (1 - v.alphas_cumprod[998].double())
    assert elbo[999].item() == pytest.approx(16 * STEPS * snr.item(), rel=1e-5)


def test_the_elbo_is_exact_for_a_gaussian():
    """The weights times the optimal denoiser's error add up to the KL that the diffusion must remove.

    For x_0 ~ N(0, 1) in one dimension the best eps error at t is alphabar_t. The sum over t of
    1/2 (SNR_{t-1} - SNR_t) Var(x_0 | x_t), with Var = 1 - alphabar_t = 1 / (1 + SNR_t), approaches the integral of
    1/2 dSNR / (1 + SNR), which is 1/2 log((1 - alphabar_T) / (1 - alphabar_0)).
    """
    alphas = torch.sigmoid(torch.linspace(6, -6, 4000, dtype=torch.float64))
    weight = NoiseSchedule(alphas, "epsilon", "elbo").weight(torch.arange(4000), 1).double()
    total = (0.5 * weight * alphas).mean().item()
    assert total == pytest.approx(0.5 * math.log((1 - alphas[-1]) / (1 - alphas[0])), rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"weighting": "snr"}, "model.weighting is 'snr'"),
        ({"weighting": "elbo", "zero_snr": True}, "use eps_equivalent"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(**arguments)
