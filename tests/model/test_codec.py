"""The Wan codec against diffusers' own encode and decode, whole and streamed."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan

from configs.errors import UserError
from model import codec as codec_module
from model.codec import WanCodec


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    mean, std = torch.randn(4).tolist(), (torch.rand(4) + 0.5).tolist()
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=mean,
        latents_std=std,
    ).eval()


def codec_of(vae: AutoencoderKLWan) -> WanCodec:
    """On a copy, because the codec exchanges the class of the convolutions."""
    return WanCodec(copy.deepcopy(vae))


def latents(frames: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, frames, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def reference_decode(vae: AutoencoderKLWan, x: torch.Tensor) -> torch.Tensor:
    """diffusers frame by frame, statistics applied by hand."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        return vae.decode(x.transpose(1, 2) * std + mean).sample.transpose(1, 2)


@pytest.mark.parametrize("frames", [1, 2, 6])
def test_decode_matches_diffusers(vae, frames):
    x = latents(frames)
    ours = codec_of(vae).decode(x)
    assert ours.shape == (2, 1 + 4 * (frames - 1), 3, 16, 24)
    torch.testing.assert_close(ours, reference_decode(vae, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("budget", [1, 10**9])
def test_encode_matches_diffusers(vae, frames, budget, monkeypatch):
    monkeypatch.setitem(codec_module.WORK_PER_CALL, "cpu", budget)
    pixels = torch.rand(2, frames, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(codec_of(vae).encode(pixels), (mode - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 1, 4, 1, 2), (2, 7), (9,)])
def test_streamed_equals_whole(vae, sizes):
    x = latents(9)
    stream = codec_of(vae).stream()
    chunks = [stream.decode(part) for part in x.split(list(sizes), dim=1)]
    assert [c.shape[1] for c in chunks] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    torch.testing.assert_close(torch.cat(chunks, 1), reference_decode(vae, x), rtol=0, atol=1e-5)


def test_streams_do_not_share_state_and_can_be_rewound(vae):
    codec = codec_of(vae)
    a, b = latents(6, batch=1, seed=3), latents(6, batch=1, seed=4)
    first, second = codec.stream(), codec.stream()
    out_a, out_b = [first.decode(a[:, :3])], [second.decode(b[:, :3])]
    codec.decode(latents(2))  # a whole decode between two chunks disturbs nobody
    mark = first.snapshot()
    first.decode(b[:, 3:])
    first.restore(mark)
    out_a.append(first.decode(a[:, 3:]))
    out_b.append(second.decode(b[:, 3:]))
    torch.testing.assert_close(torch.cat(out_a, 1), reference_decode(vae, a), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(out_b, 1), reference_decode(vae, b), rtol=0, atol=1e-5)
    first.restore(mark)  # a snapshot can be used twice
    torch.testing.assert_close(first.decode(a[:, 3:]), out_a[1], rtol=0, atol=0)


def test_training_path_matches_diffusers_gradients(vae):
    """`posterior` and `decode_latents` carry the same gradient as diffusers' forward."""
    pixels = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    codec = codec_of(vae)
    names, weights = zip(*vae.named_parameters(), strict=True)
    own_weights = tuple(codec.vae.parameters())

    posterior = codec.posterior(pixels)
    ours = (codec.decode_latents(posterior.mean).clamp(-1, 1) - pixels).square().mean()
    theirs_posterior = vae.encode(pixels.transpose(1, 2)).latent_dist
    theirs = (vae.decode(theirs_posterior.mean).sample.transpose(1, 2) - pixels).square().mean()
    torch.testing.assert_close(posterior.logvar.transpose(1, 2), theirs_posterior.logvar)
    kl = posterior.kl()
    assert kl.shape == (1,)
    torch.testing.assert_close(kl, theirs_posterior.kl().sum(-1))  # diffusers leaves the last axis of 5-D latents

    ours_grad = torch.autograd.grad(ours, own_weights, allow_unused=True)
    theirs_grad = torch.autograd.grad(theirs, weights, allow_unused=True)
    for name, g, h in zip(names, ours_grad, theirs_grad, strict=True):
        assert (g is None) == (h is None), name
        if g is not None:
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-7, msg=name)


def test_sample_has_the_posterior_spread(vae):
    pixels = torch.zeros(1, 5, 3, 64, 64)
    posterior = codec_of(vae).posterior(pixels)
    spread = (posterior.sample(torch.Generator().manual_seed(0)) - posterior.mean) / (0.5 * posterior.logvar).exp()
    assert abs(spread.std().item() - 1) < 0.1


def test_half_precision_keeps_float32_outside(vae):
    torch.manual_seed(0)
    half = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                            latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()  # fmt: skip
    x = latents(3)
    exact = WanCodec(half).decode(x)
    out = WanCodec(half.to(torch.bfloat16)).decode(x)
    assert out.dtype == torch.float32 and (out - exact).abs().mean() < 0.02


def test_refuses_frame_counts_off_the_grid(vae):
    with pytest.raises(UserError, match="try 5"):
        codec_of(vae).encode(torch.zeros(1, 8, 3, 16, 16))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_one_clip_on_a_cpu_avoids_the_fallback_kernel(vae):
    with torch.profiler.profile() as profile:
        codec_of(vae).decode(latents(3, batch=1))
    ran = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in ran and "aten::slow_conv3d_forward" not in ran
