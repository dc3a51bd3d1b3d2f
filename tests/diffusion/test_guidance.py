"""Guidance against the algebra of labelled Gaussians, its interval, its rescaling and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shapediff.diffusion.gaussian import PREDICTIONS, Prediction
from shapediff.diffusion.guidance import Guidance, guided, rescaled
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import Process, sample_ddim, timestep_array
from shapediff.diffusion.schedule import NoiseScheduleConfig
from tests.diffusion.closed_forms import Mixture, gaussian, normal, two_clusters

SCHEDULE = NoiseScheduleConfig("cosine").build()
NULL = 9


class _Counting:
    """A denoiser of four channels whose output tells the label; remembers the size of each forward."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x_t))
        channels = torch.arange(1.0, 5.0)[:, None]
        return (label + 1.0)[:, None, None] * channels + x_t


def _guided(denoiser: Any, label: torch.Tensor, **settings: Any) -> Any:
    return guided(denoiser, label, null_label=NULL, guidance=Guidance(**settings), schedule=SCHEDULE)


@pytest.mark.parametrize("split_batch", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_acts_on_every_channel(scale: float, split_batch: bool) -> None:
    denoiser, x_t, t, label = _Counting(), normal(2, 4, 9).float(), torch.tensor([5, 5]), torch.tensor([0, 1])
    out = _guided(denoiser, label, scale=scale, split_batch=split_batch)(x_t, t)
    calls = denoiser.calls.copy()
    unconditional = denoiser(x_t, t, torch.tensor([NULL, NULL]))
    conditional = denoiser(x_t, t, label)
    torch.testing.assert_close(out, unconditional + scale * (conditional - unconditional))
    assert calls == ([2] if scale in (0, 1) else [2, 2] if split_batch else [4])


@pytest.mark.parametrize("settings", [{}, {"split_batch": True}, {"interval": (0.0, 0.9)}, {"rescale": 0.7}])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_a_learned_variance_stays_conditional(scale: float, settings: dict[str, Any]) -> None:
    """The half of the channels that is no prediction: of the label where one is asked for, whatever the scale."""
    x_t, t, label = normal(2, 4, 9).float(), torch.tensor([5, 990]), torch.tensor([0, 1])
    plain = _Counting()

    def doubled(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.cat([plain(x, t, label), (label * 1.0)[:, None, None].expand_as(x)], 1)

    out = _guided(doubled, label, scale=scale, **settings)(x_t, t)
    assert torch.equal(out[:, :4], _guided(plain, label, scale=scale, **settings)(x_t, t))
    said = torch.tensor([NULL, NULL]) if scale == 0 and "interval" not in settings else label
    said = torch.tensor([NULL, 1]) if scale == 0 and "interval" in settings else said
    assert torch.equal(out[:, 4:], said[:, None, None].float().expand(2, 4, 9))


def _labelled(data: Mixture, prediction: Prediction = "v") -> Any:
    """The best denoiser of component `label` of the mixture, of the whole of it for the null label."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        out = data.denoiser(SCHEDULE, prediction)(x_t, t)
        for k in range(len(data.weights)):
            one = Mixture(data.weights[k : k + 1] / data.weights[k], data.means[k : k + 1], data.std)
            out = torch.where((label == k)[:, None], one.denoiser(SCHEDULE, prediction)(x_t, t), out)
        return out

    return denoise


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_of_a_mixture_adds_the_pull_of_the_label(scale: float, prediction: Prediction) -> None:
    """x_0_hat = E[x_0|x_t,c] + (s - 1) P(c'|x_t) (E[x_0|x_t,c] - E[x_0|x_t,c']), with two components c and c'."""
    data, t, label = two_clusters(std=0.4), torch.tensor([50, 300, 600, 900]), torch.tensor([0, 1, 0, 1])
    x_t, abar = normal(4, 2), SCHEDULE.abar(t)[:, None]
    each, share = data.x_0_of_components(x_t, abar), data.responsibilities(x_t, abar)
    rows = torch.arange(4)
    own, other = each[rows, label], each[rows, 1 - label]
    expected = own + (scale - 1) * share[rows, 1 - label][:, None] * (own - other)
    process = Process(SCHEDULE, prediction, clip_x0=False)
    for i in range(4):
        denoise = _guided(_labelled(data, prediction), label[i : i + 1], scale=scale)
        found = process.evaluate(denoise, x_t[i : i + 1], int(t[i]))
        torch.testing.assert_close(found.x_0, expected[i : i + 1], rtol=1e-10, atol=1e-10)


def _shifted(mean: float, mean_of_null: float, std: float) -> Any:
    def denoise(x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (gaussian(m, std).denoiser(SCHEDULE)(x_t, t) for m in (mean, mean_of_null))
        return torch.where((label == NULL)[:, None], unconditional, conditional)

    return denoise


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_samples_of_two_gaussians_are_a_gaussian_at_the_extrapolated_mean(scale: float) -> None:
    """N(m_c, s^2) against N(m, s^2): the guided score is that of N(m + scale (m_c - m), s^2) at every noise level."""
    arguments = (normal(2, 50), timestep_array(1000, 40))
    options = {"process": Process(SCHEDULE, "v", clip_x0=False), "noise": NoiseSource([0, 1])}
    label = torch.tensor([0, 0])
    found = sample_ddim(_guided(_shifted(0.5, 0.1, 0.2), label, scale=scale), *arguments, **options)
    expected = sample_ddim(gaussian(0.1 + scale * 0.4, 0.2).denoiser(SCHEDULE), *arguments, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_guided_samples_of_a_mixture_move_away_from_the_other_label() -> None:
    data, n = two_clusters(std=0.3), 2000
    means = {}
    for scale in (1.0, 2.0, 4.0):
        x_0 = sample_ddim(
            _guided(_labelled(data), torch.zeros(n, dtype=torch.int64), scale=scale),
            normal(n, 2),
            timestep_array(1000, 50),
            process=Process(SCHEDULE, "v", clip_x0=False),
            noise=NoiseSource([0]),
        )
        means[scale] = x_0.mean(0)
    # Five standard errors: the conditional samples are at their own mean.
    torch.testing.assert_close(means[1.0], data.means[0], rtol=0, atol=5 * 0.3 / math.sqrt(n))
    away = (data.means[0] - data.means[1]) / torch.linalg.vector_norm(data.means[0] - data.means[1])
    distance = [float((means[scale] - data.means[0]) @ away) for scale in (1.0, 2.0, 4.0)]
    assert distance[0] + 0.02 < distance[1] < distance[2] - 0.02
    # And in no other direction: the pull is along the line between the means.
    for mean in means.values():
        sideways = (mean - data.means[0]) - ((mean - data.means[0]) @ away) * away
        assert torch.linalg.vector_norm(sideways) < 5 * 0.3 / math.sqrt(n)


def test_outside_its_interval_guidance_costs_one_forward_and_is_conditional() -> None:
    denoiser, x_t, label = _Counting(), normal(2, 4, 9).float(), torch.tensor([0, 1])
    low, high = 0.3, 0.9
    denoise = _guided(denoiser, label, scale=3.0, interval=(low, high))
    everywhere = _guided(_Counting(), label, scale=3.0)
    for t in range(0, 1000, 9):
        denoiser.calls.clear()
        step = torch.full((2,), t)
        level = math.sqrt(1 - SCHEDULE.abar(step[:1]).item())
        out = denoise(x_t, step)
        if low <= level <= high:
            assert denoiser.calls == [4] and torch.equal(out, everywhere(x_t, step))
        else:
            assert denoiser.calls == [2] and torch.equal(out, _Counting()(x_t, step, label))
    # Timesteps of one batch may lie on either side.
    mixed = denoise(x_t, torch.tensor([500, 999]))
    assert torch.equal(mixed[0], everywhere(x_t, torch.tensor([500, 500]))[0])
    assert torch.equal(mixed[1], _Counting()(x_t, torch.tensor([999, 999]), label)[1])


def test_guided_in_an_interval_alone_the_mean_shifts_by_its_share() -> None:
    """Guided at high noise only, the shift of the mean shrinks afterwards: between none and that of guidance everywhere."""
    arguments = (normal(1, 50), timestep_array(1000, 200))
    options = {"process": Process(SCHEDULE, "v", clip_x0=False), "noise": NoiseSource([0])}
    means = [
        sample_ddim(
            _guided(_shifted(0.5, 0.1, 0.2), torch.tensor([0]), scale=3.0, interval=interval), *arguments, **options
        ).mean()
        for interval in ((0.0, 0.01), (0.5, 0.9), (0.2, 0.95), (0.0, 1.0))
    ]
    assert means == sorted(means) and means[-1] - means[0] > 0.5


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_brings_the_standard_deviation_back(phi: float) -> None:
    """Lin et al. 2024, eq. 15 and 16, over all channels of each sample."""
    conditional, out = normal(3, 4, 5, 5), 4 * normal(3, 4, 5, 5, seed=1) + 1
    found = rescaled(out, conditional, phi=phi)
    for i in range(3):
        factor = phi * conditional[i].std() / out[i].std() + (1 - phi)
        torch.testing.assert_close(found[i], factor * out[i], rtol=1e-12, atol=1e-12)
    if phi == 1:
        torch.testing.assert_close(found.flatten(1).std(1), conditional.flatten(1).std(1), rtol=1e-12, atol=0)


def test_rescaling_acts_where_guidance_does() -> None:
    x_t, t, label = normal(2, 4, 9).float(), torch.tensor([500, 500]), torch.tensor([0, 1])
    conditional = _Counting()(x_t, t, label)
    plain, back = (_guided(_Counting(), label, scale=3.0, rescale=phi)(x_t, t) for phi in (0.0, 1.0))
    torch.testing.assert_close(back.flatten(1).std(1), conditional.flatten(1).std(1))
    assert bool((plain.flatten(1).std(1) > 1.5 * back.flatten(1).std(1)).all())
    # Constants have no standard deviation to bring back.
    assert torch.equal(rescaled(torch.ones(1, 4), torch.ones(1, 4), phi=1.0), torch.ones(1, 4))


def test_refusals_name_the_setting() -> None:
    for settings, match in (
        ({"scale": -1.0}, "guidance_scale=-1.0"),
        ({"scale": math.nan}, "guidance_scale"),
        ({"interval": (0.5, 0.5)}, "guidance_interval"),
        ({"interval": (0.2, 1.5)}, "guidance_interval"),
        ({"rescale": 1.1}, "guidance_rescale=1.1"),
    ):
        with pytest.raises(ValueError, match=match):
            Guidance(**settings)  # type: ignore[arg-type]
