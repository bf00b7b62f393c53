"""The causal student under training, in lower precision, through the library's services, and as a denoiser."""

import pytest
import torch
from small_wan import CLOSE, NETWORK, build, by_chunk, inputs, sizes, stream_cache

from configs.errors import UserError
from model.cache import GraphCache
from model.causal_wan import CausalWanModel, chunk_causal_mask
from model.denoiser import ScoreModel, Student


class TestTraining:
    @pytest.mark.parametrize("window, sink", [(0, 0), (2, 0), (3, 1)])
    def test_gradients_through_the_cache_are_those_of_one_masked_forward(self, window, sink):
        model, geo = build()[0], sizes(window, sink)
        x, t, text = inputs(geo, 10)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        gradients = []
        for whole in (True, False):
            x = x.detach().requires_grad_()
            mask = chunk_causal_mask(geo, 10, "cpu")
            v = model(x, t, text, mask=mask) if whole else by_chunk(model, GraphCache(geo, 3), geo, x, t, text)
            (v * weight).sum().backward()
            gradients.append([x.grad, *(p.grad for p in model.parameters())])
            model.zero_grad()
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, atol=2e-6 * a.abs().max().item() + 1e-6, rtol=1e-5)

    def test_detach_cuts_the_past(self):
        model, geo = build()[0], sizes(0, 0)
        x, t, text = inputs(geo, 4)
        for cut in (False, True):
            x = x.detach().requires_grad_()
            cache = GraphCache(geo, 3)
            model(x[:, :2], t[:, :2], text, view=cache.begin(0))
            if cut:
                cache.detach()
            model(x[:, 2:], t[:, 2:], text, view=cache.begin(1), start_frame=2).sum().backward()
            assert (x.grad[:, :2].abs().max() == 0) == cut and x.grad[:, 2:].abs().max() > 0

class TestLibrary:
    @torch.no_grad()
    def test_repeated_blocks_compile_as_one_graph(self):
        model, geo = build(num_layers=2)[0], sizes(2, 1)
        x, t, text = inputs(geo, 6)
        plain = by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text))
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text)), plain)

    def test_image_to_video_weights_are_refused(self):
        with pytest.raises(UserError, match="image_dim=8"):
            CausalWanModel(**NETWORK, image_dim=8, added_kv_proj_dim=48)


class TestDenoisers:
    @torch.no_grad()
    def test_x0_of_a_student_is_that_of_its_v(self):
        model, geo = build()[0], sizes(2, 0)
        x, _, text = inputs(geo, 2)
        v = model(x, torch.full((2,), 357.142857), text, view=GraphCache(geo, 3).begin(0))
        expected = (x.double() - 0.357142857 * v.double()).float()
        for t in (357.142857, torch.full((2,), 357.142857), torch.full((2, 2), 357.142857)):
            ours = Student(model).x0(x, t, model.text_kv(text), GraphCache(geo, 3).begin(0), 0)
            assert torch.allclose(ours, expected, **CLOSE)

    @torch.no_grad()
    def test_student_keeps_the_samples_dtype(self):
        model = build()[0].to(torch.bfloat16)
        x, _, text = inputs(sizes(2, 0), 2)
        assert Student(model).x0(x, 500.0, text).dtype == torch.float32
        assert Student(model).x0(x.bfloat16(), 500.0, text).dtype == torch.bfloat16

    @torch.no_grad()
    def test_guidance_is_cond_plus_scale_times_difference(self):
        _, theirs = build()
        x, _, text = inputs(sizes(0, 0), 2)
        null, score, t = torch.zeros_like(text[:1]), ScoreModel(theirs), torch.tensor([733.0, 250.0])
        cond, uncond = score.x0(x, t, text), score.x0(x, t, null.expand_as(text))
        assert (cond - uncond).abs().max() > 1e-3
        guided = score.guided_x0(x, t, text, null, 3.0)
        assert torch.allclose(guided, cond + 3.0 * (cond - uncond), **CLOSE)
        assert torch.allclose(score.guided_x0(x, t, text, null, 0.0), cond, **CLOSE)

    @torch.no_grad()
    def test_score_is_diffusers_v(self):
        _, theirs = build()
        x, _, text = inputs(sizes(0, 0), 2)
        t = torch.tensor([733.0, 250.0])
        v = theirs(x.transpose(1, 2), t, text).sample.transpose(1, 2)
        assert torch.allclose(ScoreModel(theirs).v(x, t, text), v)
        assert torch.allclose(ScoreModel(theirs).x0(x, t, text), x - (t / 1000).view(2, 1, 1, 1, 1) * v, **CLOSE)
