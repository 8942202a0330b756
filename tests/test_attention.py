"Recorded attention: outputs unchanged, rows against a naive softmax, what is kept, timm, views, distances, rollout, who talks to whom, errors."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from mae_repro.analysis.attention import (attention_distance, attention_entropy, attention_errors, attention_names, cross_view_figure, cross_view_maps, format_errors, format_talks, keys_by_view, places_of,
                                          readable_pairs, record, rollout, summed_over_maps, talk_figure, talk_masses, true_places, who_talks, with_prefix)
from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.methods.mum import MuM
from mae_repro.methods.siamese import CropMAE, SiamMAE
from mae_repro.parts.weights import UserError
from mae_repro.views.photos import BrokenImage, open_images
from mae_repro.views.posed import RenderedScenes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
METHODS = {"mae": MAE, "crossmae": CrossMAE, "siammae": SiamMAE, "cropmae": CropMAE, "croco": CroCo, "cdgmae": CDGMAE, "mum": MuM}


def small(kind=MAE, **more):
    torch.manual_seed(0)
    model = kind(**SMALL | more).build().eval()
    for p in model.parameters():                      # away from the even attention of fresh weights
        p.data += .15 * torch.randn_like(p)
    return model


def views_for(kind, b=2):
    return torch.randn(b, 1 if kind in (MAE, CrossMAE) else 3 if kind is MuM else 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_outputs_stay_bit_identical_and_rows_sum_to_one(kind):
    model, views = small(kind), views_for(kind)
    draw = lambda: torch.Generator().manual_seed(2)
    plain = model(views, generator=draw())
    plain.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with record(model) as maps:
        watched = model(views, generator=draw())
        watched.loss.backward()
    assert torch.equal(plain.pred, watched.pred) and torch.equal(plain.loss, watched.loss)
    assert all(torch.equal(g, dict(model.named_parameters())[k].grad) for k, g in grads.items())
    assert set(maps) == set(attention_names(model))
    for found in maps.values():
        for weights in found:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            assert not weights.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def by_hand(attn, x, num_heads):
    "softmax(q k / sqrt d) of self-attention without rotation, one head and one token at a time."
    b, t, dim = x.shape
    d, qkv, out = dim // num_heads, x @ attn.qkv.weight.T + attn.qkv.bias, torch.zeros(b, num_heads, t, t)
    for h in range(num_heads):
        q, k = qkv[..., h * d:(h + 1) * d], qkv[..., dim + h * d:dim + (h + 1) * d]
        for i in range(t):
            logits = (q[:, i:i + 1] * k).sum(-1) / math.sqrt(d)
            out[:, h, i] = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return out


def test_recorded_equals_naive_softmax():
    model, seen = small(), {}
    images = views_for(MAE)[:, 0]
    hooks = [block.attn.register_forward_pre_hook(lambda module, given, i=i: seen.__setitem__(i, given[0].detach())) for i, block in enumerate(model.encoder.blocks)]
    with record(model.encoder) as maps, torch.no_grad():
        model.encoder(images)
    for hook in hooks:
        hook.remove()
    for i, block in enumerate(model.encoder.blocks):
        torch.testing.assert_close(maps[f"blocks.{i}.attn"][0], by_hand(block.attn, seen[i], 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [MuM, CroCo])
def test_weights_explain_the_output(kind):
    "With values put through the recorded weights, rotations included, a module's output comes out."
    model, views, calls = small(kind), views_for(kind), {}
    names = attention_names(model, ["decoder.*"])
    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, given, out, n=n: calls.__setitem__(n, (given, out.detach()))) for n in names]
    with record(model, names) as maps, torch.no_grad():
        model(views, generator=torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    for name in names:
        given, out = calls[name]
        v = modules[name].project(*given)[2]
        again = modules[name].proj((maps[name][-1] @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)


def test_chosen_queries_and_heads_are_parts_of_the_whole_and_little_is_kept():
    model, images = small(), views_for(MAE, 3)[:, 0]
    with torch.no_grad(), record(model) as whole:
        model.encoder(images)
    with torch.no_grad(), record(model, ["encoder.blocks.1"], heads=[1], queries=[3, 16, -1]) as part:
        model.encoder(images)
    assert list(part) == ["encoder.blocks.1.attn"] and part["encoder.blocks.1.attn"][0].shape == (3, 1, 3, 17)
    torch.testing.assert_close(part["encoder.blocks.1.attn"][0], whole["encoder.blocks.1.attn"][0][:, [1]][:, :, [3, 16, -1]])
    assert part["encoder.blocks.1.attn"][0].untyped_storage().nbytes() == 3 * 3 * 17 * 4   # no view of something large
    with torch.no_grad(), record(model, [0], reduce=lambda name, weights: weights.mean()) as means:
        model.encoder(images)
        model.encoder(images)
    assert [x.shape for x in means["encoder.blocks.0.attn"]] == [(), ()]


def test_a_long_row_is_never_a_square():
    "One query of 4097 tokens: the largest thing that recording makes is a row, not 4097 x 4097."
    model, sizes = small(depth=1), []
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad(), record(model, ["encoder.*"], queries=[7], reduce=lambda name, weights: sizes.append(weights.numel())):
        model.encoder(images)
    assert sizes == [2 * 4097]


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3, qk_norm=True).eval()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    x, seen = torch.randn(2, 3, 32, 32), []
    with torch.no_grad():
        plain = vit(x)
        with record(vit) as maps:
            watched = vit(x)
        assert torch.equal(plain, watched) and list(maps) == ["blocks.0.attn", "blocks.1.attn"]
        vit.blocks[1].attn.fused_attn = False                                              # timm's slow path shows its weights to the dropout
        vit.blocks[1].attn.attn_drop.register_forward_hook(lambda module, given, out: seen.append(given[0]))
        vit(x)
    torch.testing.assert_close(maps["blocks.1.attn"][0], seen[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="mask"), record(vit):
        vit.blocks[0].attn(torch.randn(1, 17, 32), attn_mask=torch.zeros(17, 17))


def test_names_and_what_is_wrong_with_them():
    model = small(MuM)
    assert attention_names(model, ["decoder.global_blocks.*"]) == ["decoder.global_blocks.0.attn"] == attention_names(model, [-1])
    assert attention_names(model, [0, "encoder.blocks.1"]) == ["encoder.blocks.0.attn", "encoder.blocks.1.attn"]
    for blocks, said in (([9], "place"), ([-9], "place"), (["decoder.blocks.0"], "name")):
        with pytest.raises(UserError, match=said):
            attention_names(model, blocks)
    with pytest.raises(UserError, match="no attention"):
        attention_names(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="heads 0..1"), record(model, ["encoder.*"], heads=[2]):
        pass
    with pytest.raises(RuntimeError), record(model):
        raise RuntimeError("hooks must go all the same")
    assert not any(module._forward_hooks for module in model.modules())


def test_across_views():
    model, views = small(MuM), views_for(MuM, 1)[0]
    maps = cross_view_maps(model, views, patches=[5, 2], view=1)
    assert list(maps) == ["decoder.global_blocks.0.attn"] and maps["decoder.global_blocks.0.attn"].shape == (2, 4, 3, 4, 4)
    from mae_repro.parts.encoder import encode_views
    from mae_repro.parts.masking import Masks
    masks = Masks.given(torch.zeros(1, 3, 16, dtype=torch.bool))
    with torch.no_grad(), record(model, ["decoder.global_blocks.0"]) as whole:
        model.decoder(encode_views(model.encoder, views[None], masks), masks)
    rows = whole["decoder.global_blocks.0.attn"][0][0, :, 17 + 1 + torch.tensor([5, 2])]      # (h, 2, 51)
    for v in range(3):
        torch.testing.assert_close(maps["decoder.global_blocks.0.attn"][:, :, v].flatten(2), rows[..., v * 17 + 1:(v + 1) * 17].transpose(0, 1))
    lost = 1 - maps["decoder.global_blocks.0.attn"].sum((2, 3, 4))
    torch.testing.assert_close(lost, rows[..., [0, 17, 34]].sum(-1).T, atol=1e-5, rtol=1e-4)      # what class tokens get


def test_across_views_by_cross_attention():
    model, views = small(SiamMAE), views_for(SiamMAE, 1)[0]
    maps = cross_view_maps(model, views)
    assert all(x.shape == (16, 4, 2, 4, 4) and (x[:, :, 0] == 0).all() and (x[:, :, 1] > 0).all() for x in maps.values()) and len(maps) == 2
    with pytest.raises(ValueError, match="view 1"):
        cross_view_maps(model, views, view=1)
    for other in (small(MAE), small(CrossMAE)):
        with pytest.raises(UserError, match="several"):
            cross_view_maps(other, views)
    with pytest.raises(UserError, match="two views"):
        cross_view_maps(model, views[:1])
    with pytest.raises(ValueError, match="hidden"):
        keys_by_view(torch.ones(2, 20), (4, 4), 1)
    assert len(cross_view_figure([np.zeros((32, 32, 3), np.uint8)] * 2, maps, patch=3, i=3).axes) == 6


def test_errors_against_ground_truth():
    scenes = RenderedScenes(1, 6, 32, seed=1)
    a, b = scenes.frame(0, 0), scenes.frame(0, 5)
    truth, seen = true_places(a, b, (4, 4))
    from mae_repro.views.posed import project
    for i in (5, 6, 9):                                                            # centres of patches lie between four pixels
        row, col = divmod(i, 4)
        x, y = 8 * col + 3.5, 8 * row + 3.5
        depth = a.depth[8 * row + 3:8 * row + 5, 8 * col + 3:8 * col + 5].mean()
        (u, v), _ = project(a, b, np.array(x), np.array(y), np.array(float(depth)))
        np.testing.assert_allclose(truth[i].numpy(), [(v + .5) / 8 - .5, (u + .5) / 8 - .5], atol=.02)
    model, pairs = small(MuM), [(0, 0, 5), (0, 5, 1)]
    rows = {r.name: r for r in attention_errors(model, scenes, pairs, 32, progress=False)}
    assert list(rows) == ["decoder.global_blocks.0.attn", "same place", "any place"]
    expected = []
    for _, one, two in pairs:
        t, s = true_places(scenes.frame(0, one), scenes.frame(0, two), (4, 4))
        expected += (t - places_of((4, 4))).norm(dim=1)[s].tolist()
    same = rows["same place"]
    assert same.error == pytest.approx(np.mean(expected), abs=1e-5) and same.patches == len(expected) and (same.pairs, same.scenes, same.skipped) == (2, 1, 0) and math.isnan(same.low) and math.isnan(same.high)
    far = {r.name: r for r in attention_errors(model, scenes, pairs, 32, moved=.3, progress=False)}["same place"]
    assert far.error == pytest.approx(np.mean([e for e in expected if e >= .3]), abs=1e-5)
    with pytest.raises(UserError, match="other frames"):
        attention_errors(model, scenes, pairs, 32, moved=50, progress=False)
    same_frame = {r.name: r for r in attention_errors(model, scenes, [(0, 2, 2)], 32, progress=False)}
    assert same_frame["same place"].error < .01                                     # nothing moved


class Torn(RenderedScenes):
    "Some frames cannot be read."
    lost = {(0, 0), (2, 3)}

    def frame(self, i, k):
        if (i, k) in self.lost:
            raise BrokenImage(f"scene {i}, frame {k}", "is not a picture")
        return super().frame(i, k)


def test_unreadable_frames_are_skipped_and_counted(caplog):
    model, pairs = small(MuM), [(i, a, b) for i in range(3) for a, b in ((0, 3), (3, 0), (1, 2))]
    torn, whole = Torn(3, 4, 32, seed=1), RenderedScenes(3, 4, 32, seed=1)
    rows = attention_errors(model, torn, pairs, 32, progress=False)
    left = [pair for pair in pairs if not {(pair[0], pair[1]), (pair[0], pair[2])} & Torn.lost]
    same = attention_errors(model, whole, left, 32, progress=False)
    assert [(r.error, r.low, r.high, r.pairs, r.scenes) for r in rows] == [(r.error, r.low, r.high, r.pairs, r.scenes) for r in same] and rows[0].skipped == 4 and same[0].skipped == 0
    assert rows[0].low < rows[0].error < rows[0].high and caplog.text.count("skipped:") == 4
    assert "4 pairs could not be read" in format_errors(rows) and "could not" not in format_errors(same) and f"{rows[0].error:.2f} [" in format_errors(rows)
    assert [(i, a.image.tobytes()) for i, a, _ in readable_pairs(torn, pairs, 32)] == [(i, whole.frame(i, k).image.tobytes()) for i, k, _ in left]
    alone = format_errors(attention_errors(model, whole, pairs[:3], 32, progress=False))
    assert "[" not in alone and "nan" not in alone and " -" in alone and "1 scene" in alone
    with pytest.raises(UserError, match="none of the 2 pairs"):
        attention_errors(model, torn, pairs[:2], 32, progress=False)
    with pytest.raises(UserError, match="seed -1"):
        attention_errors(model, whole, pairs, 32, seed=-1, progress=False)


def test_intervals_of_errors_come_from_scenes():
    "The same pair again and again makes no interval narrower."
    model, scenes = small(MuM), RenderedScenes(4, 4, 32, seed=1)
    once = [(i, 0, 3) for i in range(4)]
    for one, many in zip(attention_errors(model, scenes, once, 32, progress=False), attention_errors(model, scenes, once * 5, 32, progress=False)):
        assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=1e-5) and one.low < one.high


def test_unreadable_images_are_counted():
    model, images = small(), open_images(None)

    def load(i):
        if i in (0, 3):
            raise BrokenImage(f"image {i}", "is not a picture")
        return images.load(i)
    class Some(SimpleNamespace):
        __len__ = lambda self: 5
    some = Some(load=load)
    talks = who_talks(model, some, batch_size=1, samples=50, progress=False)
    assert talks[0].images == 3 and talks[0].skipped == 2 and "3 images" in format_talks(talks) and "2 could not be read" in format_talks(talks)
    some.load = lambda i: load(1 if i == 1 else 0)
    one = who_talks(model, some, samples=50, progress=False)
    assert math.isnan(one[0].total_mask[1]) and "nan" not in format_talks(one) and "[" not in format_talks(one) and "1 image;" in format_talks(one)
    assert len(talk_figure(one).axes) == 2
    some.load = lambda i: load(0)
    for options, message in ((dict(), "none of the 5"), (dict(img_size=0), "img_size 0"), (dict(img_size=30), "img_size 30"), (dict(batch_size=0), "batch_size 0"), (dict(seed=-1), "seed -1")):
        with pytest.raises(UserError, match=message):
            who_talks(model, some, progress=False, **options)


def test_numbers_of_a_map():
    g = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 17, 17, generator=g).softmax(-1) for _ in range(3)]
    where = with_prefix(places_of((4, 4)), 1)
    distance = attention_distance(maps[0], where, where)
    assert distance[:, :, 0].isnan().all()
    for b, h, i in ((0, 0, 1), (1, 2, 9), (0, 1, 16)):
        w = maps[0][b, h, i]
        total = sum(w[j] * math.dist(divmod(i - 1, 4), divmod(j - 1, 4)) for j in range(1, 17)) / w[1:].sum()
        assert distance[b, h, i].item() == pytest.approx(total.item(), abs=1e-5)
    assert attention_entropy(torch.full((1, 8), .125)).item() == pytest.approx(math.log(8)) and attention_entropy(torch.eye(4)).abs().max() == 0
    out = torch.eye(17).repeat(2, 1, 1)
    for weights in maps:
        step = torch.zeros(2, 17, 17)
        for b in range(2):
            step[b] = .5 * sum(weights[b, h] for h in range(3)) / 3 + .5 * torch.eye(17)
        out = torch.stack([step[b] @ out[b] for b in range(2)])
    torch.testing.assert_close(rollout(maps), out)
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(2, 17))


def test_who_talks_to_whom():
    model, images = small(), open_images(None)
    talks = who_talks(model, images, batch_size=5, samples=100, progress=False)
    assert [t.name for t in talks] == ["decoder.blocks.0.self_attn", "decoder.blocks.1.self_attn"] and talks[0].masked == 12 and talks[0].visible == 5 and talks[0].images == len(images)
    on_mask, on_visible = summed_over_maps(talks)
    assert 12 * on_mask + 5 * on_visible == pytest.approx(8, abs=1e-4)                # two blocks of four heads
    assert 12 * on_mask + 4 * on_visible < 7.9                                          # the class token is one of the visible
    for t in talks:
        assert t.total_mask[0] + t.total_visible[0] == pytest.approx(1, abs=1e-5) and t.total_mask[0] == pytest.approx(12 * t.per_pair_mask[0], abs=1e-5)
        assert t.total_mask[1] <= t.total_mask[0] <= t.total_mask[2]
    weights, hidden = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1), torch.tensor([[True, False, True, True], [False, True, True, True]])
    for b in range(2):
        ids = [1 + i for i in range(4) if hidden[b, i]]
        naive = np.mean([[sum(weights[b, h, i, j].item() for j in ids) for h in range(3)] for i in ids])
        assert talk_masses(weights, hidden, 1)[b, 0].item() == pytest.approx(naive, abs=1e-6)
    assert len(talk_figure(talks).axes) == 2
    again = who_talks(model, images, batch_size=5, samples=100, progress=False)
    assert again == talks
    for other in (small(CrossMAE), small(CroCo)):
        with pytest.raises(UserError, match="mae-tiny"):
            who_talks(other, images)
