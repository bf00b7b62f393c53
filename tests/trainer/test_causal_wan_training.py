"""The causal student under training, in lower precision, through the library's services, and as a denoiser."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from small_wan import CLOSE, NETWORK, build, by_chunk, inputs, sizes, stream_cache

from configs.errors import UserError
from model.cache import GraphCache
from model.causal_wan import CausalWanModel, chunk_causal_mask
from model.checkpointing import full_checkpoint
from model.denoiser import ScoreModel, Student
from model.flow import add_noise, v_target


class TestTraining:
    @staticmethod
    def rollout(model, geo, chunks: int) -> list[torch.Tensor]:
        """Gradients of a rollout whose chunks are denoised twice, the second time with a graph."""
        x, t, text = inputs(geo, chunks * geo.chunk_frames)
        x = x.requires_grad_()
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        cache, loss, before = GraphCache(geo, 3), 0.0, 0.0
        for k in range(chunks):
            s = geo.chunk(k)
            with torch.no_grad():
                model(-x[:, s], t[:, s], text, view=cache.begin(k), start_frame=s.start)
            before = model(x[:, s] + before, t[:, s], text, view=cache.begin(k), start_frame=s.start)
            loss = loss + (before * weight[:, s]).sum()
            model(before, 0 * t[:, s], text, view=cache.begin(k), start_frame=s.start)  # context pass
        loss.backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        return gradients

    @pytest.mark.parametrize("window, sink", [(0, 0), (2, 0), (2, 1)])
    def test_checkpointing_changes_no_gradient(self, window, sink):
        model, geo = build()[0].train(), sizes(window, sink)
        plain = self.rollout(model, geo, 3)
        model.enable_gradient_checkpointing(full_checkpoint)
        again = self.rollout(model, geo, 3)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    def test_checkpointing_keeps_less(self):
        kept = {}
        model, geo = build()[0].train(), sizes(2, 0)
        x, t, text = inputs(geo, 2)
        for on in (False, True):
            if on:
                model.enable_gradient_checkpointing(full_checkpoint)
            held = []
            with torch.autograd.graph.saved_tensors_hooks(lambda y, held=held: held.append(y.nbytes) or y, lambda y: y):
                model(x, t, text, view=GraphCache(geo, 3).begin(0))
            kept[on] = sum(held)
        assert kept[True] < kept[False] / 3

    @pytest.mark.parametrize("window, sink", [(0, 0), (2, 0), (3, 1)])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_through_the_cache_are_those_of_one_masked_forward(self, window, sink, checkpointing):
        model, geo = build()[0], sizes(window, sink)
        if checkpointing:
            model.enable_gradient_checkpointing(full_checkpoint)
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

    def test_autocast_runs_with_cache_and_backward(self):
        model, geo = build()[0], sizes(2, 0)
        x, t, text = inputs(geo, 6)
        exact = by_chunk(model, GraphCache(geo, 3), geo, x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            v = by_chunk(model, GraphCache(geo, 3), geo, x, t, text)
        v.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert (v - exact).abs().max() < 0.05 * exact.abs().max()


class TestPrecision:
    @torch.no_grad()
    def test_neighbouring_timesteps_stay_apart_under_bfloat16_weights(self):
        model = build()[0].to(torch.bfloat16)
        x, _, text = inputs(sizes(0, 0), 2)
        exact = build()[0]._embed_time(torch.tensor([[932.0, 933.0]]), torch.float32)[0]
        ours = model._embed_time(torch.tensor([[932.0, 933.0]]), torch.float32)[0]
        assert torch.allclose(ours, exact, atol=0.02), "the wave of 933, not that of 932"
        assert model(x, torch.full((2,), 933.0), text).dtype == torch.bfloat16

    def test_half_precision_timesteps_are_refused(self):
        model = build()[0]
        x, t, text = inputs(sizes(0, 0), 2)
        with pytest.raises(AssertionError, match="bfloat16"):
            model(x, t.to(torch.bfloat16), text)


class TestLibrary:
    def test_save_and_load_in_both_classes(self, tmp_path):
        ours, _ = build()
        ours.save_pretrained(tmp_path)
        x, t, text = inputs(sizes(0, 0), 2)
        t = t[:, 0]
        with torch.no_grad():
            expected = ours(x, t, text)
            again = CausalWanModel.from_pretrained(tmp_path)
            assert type(again) is CausalWanModel and torch.equal(again(x, t, text), expected)
            base = WanTransformer3DModel.from_pretrained(tmp_path)
            assert torch.allclose(base(x.transpose(1, 2), t, text).sample.transpose(1, 2), expected, **CLOSE)
            base.save_pretrained(tmp_path / "base")
            assert torch.equal(CausalWanModel.from_pretrained(tmp_path / "base")(x, t, text), expected)

    def test_lora(self):
        model = build()[0].requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 3 * 2 * 4 * 2
        x, t, text = inputs(sizes(2, 0), 4)
        geo = sizes(2, 0)
        by_chunk(model, GraphCache(geo, 3), geo, x, t, text).square().mean().backward()
        moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert sorted(moved) == sorted(n for n in trained if "lora_B" in n), "A moves once B has left zero"

    @torch.no_grad()
    def test_fused_projections(self):
        model, geo = build()[0], sizes(2, 0)
        x, t, text = inputs(geo, 6)
        plain = by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text))
        model.fuse_qkv_projections()
        fused = by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text))
        assert model.blocks[0].attn1.fused_projections and torch.allclose(plain, fused, **CLOSE)

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
    def test_student_x0(self):
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

    def test_a_network_that_knows_v_gives_back_x0(self):
        x0, eps = torch.randn(2, 2, 3, 4, 2, 2)
        t = torch.tensor([933.0629, 20.0])

        class Knows(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return v_target(x0, eps)

        assert torch.allclose(Student(Knows()).x0(add_noise(x0, eps, t), t, []), x0, atol=1e-6)
