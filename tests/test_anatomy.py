"Reconstructions taken apart: sums, the same by silencing steps with all norms frozen, pictures, mixes, layers, patches one at a time."
from itertools import pairwise

import pytest
import torch

from mae_repro.analysis.anatomy import (add_patches, anatomise, anatomy_figure, decoder_blocks, default_masks, format_anatomy, growth_figure, layers, layers_figure, linear_cka,
                                        losses_so_far, mixing, mixing_figure, part_pictures, shares)
from mae_repro.methods.catalogue import open_model
from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.methods.mum import MuM
from mae_repro.methods.siamese import CropMAE, SiamMAE
from mae_repro.parts.masking import Masks
from mae_repro.parts.model import paint
from mae_repro.parts.weights import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
WIDE = dict(img_size=(16, 40))
CASES = {  # method, changed fields, views
    "mae": (MAE, {}, 1), "mae non-square": (MAE, WIDE, 1), "mae two views": (MAE, {}, 2), "mae mixed": (MAE, dict(inter_block=True), 1), "mae pixels": (MAE, dict(norm_pix_loss=False), 1),
    "crossmae": (CrossMAE, dict(prediction_ratio=.25), 1), "crossmae non-square": (CrossMAE, WIDE, 1), "crossmae self-attention": (CrossMAE, dict(self_attention=True, project_maps=True), 1),
    "crossmae unmixed": (CrossMAE, dict(inter_block=False), 2), "crossmae block masking": (CrossMAE, dict(masking="block"), 1),
    "siammae": (SiamMAE, {}, 2), "siammae non-square": (SiamMAE, WIDE | dict(mask_ratio=.8), 2), "siammae pre-norm": (SiamMAE, dict(decoder_pre_norm=True), 2),
    "siammae other order": (SiamMAE, dict(decoder_order=("self", "cross", "mlp")), 2), "cropmae": (CropMAE, dict(mask_ratio=.9), 2),
    "cdgmae": (CDGMAE, {}, 4), "cdgmae non-square": (CDGMAE, WIDE | dict(mask_ratio=.8), 4),
    "croco": (CroCo, {}, 2), "croco rope non-square": (CroCo, WIDE | dict(positions="rope"), 2),
    "mum": (MuM, {}, 3), "mum non-square": (MuM, WIDE, 3), "mum one view": (MuM, {}, 1), "mum absolute": (MuM, dict(positions="absolute"), 2),
    "mum encoder": (MuM, dict(inter_frame="encoder"), 3), "mum reference": (MuM, dict(reference_view=True), 3)}
ONE_EACH = ("mae", "crossmae", "siammae", "cropmae", "cdgmae", "croco", "mum")
every_case = pytest.mark.parametrize("case", CASES)
each_method = pytest.mark.parametrize("case", ONE_EACH)


def case_of(name, b=2):
    "A model away from its fresh weights, whose zero biases and unit gains would hide mistakes, and views."
    kind, fields, v = CASES[name]
    torch.manual_seed(0)
    model = kind(**SMALL | fields).build().eval()
    for p in model.parameters():
        p.data += .1 * torch.randn_like(p)
    return model, torch.randn(b, v, 3, *model.encoder.img_size)


def partly(masks):
    "The same masks with the first half of each view's predicted patches."
    kept = masks.predict & (masks.predict.cumsum(-1) <= (masks.predict.sum(-1, keepdim=True) + 1) // 2)
    return Masks.given(masks.hidden, kept)


def assert_sums(found):
    torch.testing.assert_close(found.parts.sum(0), found.result.pred, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the sum

@every_case
def test_parts_sum_to_the_prediction(case):
    model, views = case_of(case)
    masks = default_masks(model, views, seed=3)
    with torch.no_grad():
        plain = model(views, masks.hidden, masks.predict)
    for steps in (False, True):
        found = anatomise(model, views, masks, steps=steps)
        assert_sums(found)
        assert torch.equal(found.result.pred, plain.pred) and len(set(found.names)) == len(found.names) == len(found.parts)
    own = model.make_masks(views, generator=torch.Generator().manual_seed(0))   # a share only, as in training
    for some in (own, partly(masks)):
        found = anatomise(model, views, some)
        assert_sums(found)
        assert found.parts.shape[2] == some.predict[0].sum() and torch.isfinite(found.parts).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["mae-tiny", "crossmae-tiny", "siammae-tiny", "cdgmae-tiny", "mum-tiny"])
def test_shipped_models_sum(name):
    model, config = open_model(name)
    views = torch.randn(2, config.num_views, 3, *model.encoder.img_size, generator=torch.Generator().manual_seed(0))
    found = anatomise(model, views)
    assert (found.parts.sum(0) - found.result.pred).abs().max() < 1e-5
    larger = anatomise(model, torch.randn(1, config.num_views, 3, 64, 112))     # positions interpolated
    assert (larger.parts.sum(0) - larger.result.pred).abs().max() < 1e-5


def test_names_follow_the_work():
    names = lambda case, **more: anatomise(*case_of(case), **more).names
    assert names("mae") == ("norms and bias", "start", "block 0", "block 1")
    assert names("mae", steps=True)[2:] == ("block 0 self", "block 0 mlp", "block 1 self", "block 1 mlp")
    assert names("siammae", steps=True)[2:5] == ("block 0 cross", "block 0 mlp", "block 0 self")
    assert names("croco", steps=True)[2:5] == ("block 0 self", "block 0 cross", "block 0 mlp")
    assert names("mum")[2:] == ("frame 0", "global 0")
    torch.manual_seed(0)
    deeper = MuM(**SMALL | dict(decoder_depth=4)).build().eval()
    assert tuple(decoder_blocks(deeper.decoder)) == ("frame 0", "global 0", "frame 1", "global 1")


@each_method
def test_steps_add_up_to_their_block(case):
    model, views = case_of(case)
    whole, apart = anatomise(model, views), anatomise(model, views, steps=True)
    for name, part in zip(whole.names, whole.parts):
        mine = [x for n, x in zip(apart.names, apart.parts) if n == name or n.startswith(name + " ")]
        torch.testing.assert_close(sum(mine), part, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the same by brute force

def replayed(model, views, masks, silent):
    """The real model's prediction when every step of its decoder says what it said before, except those of `silent`, which say nothing, and the norms on the residual
    path divide by the deviations of before."""
    decoder, said, deviation = model.decoder, {}, {}
    steps = {f"{name} {key}": module for name, block in decoder_blocks(decoder).items() for key, module in block.named_children() if key in ("self_attn", "cross_attn", "attn", "mlp")}
    norms = {"final": decoder.norm}
    for name, block in decoder_blocks(decoder).items():
        if not getattr(block, "pre_norm", True):
            norms |= {f"{name} {step}": getattr(block, f"norm_{step}") for step in block.order}
    hooks = [m.register_forward_hook(lambda m, given, out, n=n: said.__setitem__(n, out)) for n, m in steps.items()]
    hooks += [m.register_forward_hook(lambda m, given, out, n=n: deviation.__setitem__(n, (given[0].var(-1, unbiased=False, keepdim=True) + m.eps).sqrt())) for n, m in norms.items()]
    with torch.no_grad():
        before = model(views, masks.hidden, masks.predict).pred
    for hook in hooks:
        hook.remove()

    def again(n):
        quiet = n.rpartition(" ")[0] in silent
        return lambda m, given, out: said[n] * (0 if quiet else 1)

    def frozen(n):
        return lambda m, given, out: (given[0] - given[0].mean(-1, keepdim=True)) / deviation[n] * m.weight + m.bias
    hooks = [m.register_forward_hook(again(n)) for n, m in steps.items()] + [m.register_forward_hook(frozen(n)) for n, m in norms.items()]
    if "start" in silent:
        first = next(iter(decoder_blocks(decoder).values()))
        hooks.append(first.register_forward_pre_hook(lambda m, given: (torch.zeros_like(given[0]), *given[1:])))
    with torch.no_grad():
        after = model(views, masks.hidden, masks.predict).pred
    for hook in hooks:
        hook.remove()
    return before, after


@pytest.mark.parametrize("case", [*ONE_EACH, "siammae other order", "crossmae self-attention", "mum encoder"])
def test_a_part_is_what_goes_missing_when_its_block_is_silent_and_all_norms_are_frozen(case):
    model, views = case_of(case)
    masks = default_masks(model, views)
    found = anatomise(model, views, masks)
    for name, part in list(zip(found.names, found.parts))[1:]:
        before, after = replayed(model, views, masks, {name})
        torch.testing.assert_close(before - after, part, atol=2e-5, rtol=1e-4)
        assert part.abs().max() > 1e-3
    nothing = replayed(model, views, masks, set(found.names))[1]
    torch.testing.assert_close(nothing, found.parts[0], atol=2e-5, rtol=1e-4)      # what no block wrote


def test_training_mode_is_refused_and_hooks_go_when_the_model_fails():
    model, views = case_of("siammae")
    with pytest.raises(ValueError, match="eval"):
        anatomise(model.train(), views)
    with pytest.raises(ValueError, match="at least one anchor"):
        anatomise(model.eval(), views[:, :1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------- pictures and numbers

@pytest.mark.parametrize("case", [*ONE_EACH, "mae non-square", "mae pixels", "mae two views", "mum reference"])
@pytest.mark.parametrize("statistics", ["visible", "true"])
def test_pictures_sum_to_what_paint_shows(case, statistics):
    model, views = case_of(case)
    masks = partly(default_masks(model, views))
    found = anatomise(model, views, masks)
    names, stack = part_pictures(model, views, found, statistics)
    assert names == ("given", *found.names) and stack.shape == (len(names), *views.shape)
    shown = paint(views, found.result, 8, model.target.norm_pix_loss, statistics)
    torch.testing.assert_close(stack.sum(0).clamp(0, 1), shown, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="neither"):
        part_pictures(model, views, found, "mean")


@each_method
def test_shares_sum_to_one_and_losses_end_at_the_loss(case):
    model, views = case_of(case)
    found = anatomise(model, views, steps=True)
    torch.testing.assert_close(shares(found).sum(), torch.tensor(1.))
    torch.testing.assert_close(losses_so_far(model, found)[-1], found.result.loss, atol=1e-5, rtol=1e-5)
    k = 3
    by_loop = sum(float(p @ q) for p, q in zip(found.parts[k].flatten(0, 1), found.result.pred.flatten(0, 1))) / float(found.result.pred.square().sum())
    assert shares(found)[k].item() == pytest.approx(by_loop, abs=1e-5)
    text = format_anatomy(model, found)
    assert len(text.splitlines()) == 1 + len(found.names) and all(n in text for n in found.names)


# ---------------------------------------------------------------- mixes

@pytest.mark.parametrize("case", ["crossmae", "crossmae self-attention", "mae mixed"])
def test_shares_of_the_mix_sum_to_one_and_equal_a_loop(case):
    model, views = case_of(case)
    masks, mix, calls = default_masks(model, views), model.decoder.mix, []
    hook = mix.register_forward_hook(lambda m, given, out: calls.append((given[0], out)))
    found = mixing(model, views, masks)
    hook.remove()
    (maps, mixed), = calls
    depth = 1 if case == "mae mixed" else 2
    assert found.maps == ("input", "block 0", "block 1", "block 2") and found.weights.shape == found.shares.shape == (depth, 4)
    assert torch.equal(found.weights, mix.weight) and len(mix._forward_hooks) == 0
    torch.testing.assert_close(found.shares.sum(1), torch.ones(depth))
    for j in range(depth):
        parts = [w * (mix.projections[m](x) if mix.projections else x) for m, (w, x) in enumerate(zip(mix.weight[j], maps))]
        torch.testing.assert_close(sum(parts), mixed[j], atol=1e-5, rtol=1e-4)       # the weights mean what they say
        centred = [p - p.mean(-1, keepdim=True) for p in parts]
        for m in range(4):
            by_hand = (centred[m] * sum(centred)).sum() / sum(centred).square().sum()
            assert found.shares[j, m].item() == pytest.approx(by_hand.item(), abs=1e-4)


def test_chosen_maps_are_named_and_models_without_a_mix_are_refused():
    torch.manual_seed(0)
    model = CrossMAE(**SMALL | dict(mix_blocks=(0, -1), mix_input=False)).build().eval()
    assert mixing(model, torch.randn(1, 3, 32, 32)).maps == ("block 0", "block 2")
    for case in ("mae", "siammae", "mum", "crossmae unmixed"):
        with pytest.raises(UserError, match="inter_block"):
            mixing(*case_of(case))


# ---------------------------------------------------------------- layers

def test_cka_equals_its_definition_by_kernels():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5).double(), torch.randn(30, 7).double() + 3
    h = torch.eye(30).double() - 1 / 30
    hsic = lambda a, b: torch.trace(h @ (a @ a.T) @ h @ (b @ b.T))
    assert linear_cka(x, y).item() == pytest.approx((hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item(), abs=1e-9)
    turned = 7 * x @ torch.linalg.qr(torch.randn(5, 5).double())[0] + 2
    assert linear_cka(x, turned).item() == pytest.approx(1) and linear_cka(x, y) < .9


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("case", [*ONE_EACH, "mum encoder", "mum reference"])
def test_layers(case, part):
    model, views = case_of(case)
    found = layers(model, views, part)
    n = len(found.names)
    assert n == 1 + (3 if part == "encoder" else 2) and found.names[0] == "input"
    assert found.cka.shape == (n, n) and found.variance.shape == found.cosine.shape == (n,)
    torch.testing.assert_close(found.cka.diagonal(), torch.ones(n).double())
    torch.testing.assert_close(found.cka, found.cka.T)
    assert (found.variance > 0).all() and (found.cosine.abs() <= 1).all()


def test_layers_equal_the_encoders_own_maps():
    model, views = case_of("mae")
    masks = default_masks(model, views)
    found = layers(model, views, masks=masks)
    with torch.no_grad():
        maps = model.encoder(views[:, 0], masks.visible[0][:, 0], (0, 1, 2, 3))[1]
    for i, x in enumerate(m.flatten(0, 1).double() for m in maps):
        pairs = [torch.cosine_similarity(x[a], x[b], dim=0) for a in range(len(x)) for b in range(len(x)) if a != b]
        assert found.cosine[i].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
        assert found.variance[i].item() == pytest.approx((x - x.mean(0)).square().sum(0).mean().item() / (len(x) - 1), rel=1e-6)
    with pytest.raises(ValueError, match="neither"):
        layers(model, views, "head")


# ---------------------------------------------------------------- one patch more

@pytest.mark.parametrize("case", ["mae", "mae non-square", "crossmae", "siammae non-square", "cdgmae non-square", "croco", "mum"])
def test_patches_one_at_a_time_end_at_the_full_set(case):
    model, views = case_of(case)
    masks = default_masks(model, views, seed=5)
    growth, k = add_patches(model, views, masks), int((~masks.hidden[0, 0]).sum())
    assert growth.order.shape == (2, k) and growth.loss.shape == (k, 2) and len(growth.results) == k
    some, watched = partly(masks), torch.zeros_like(masks.hidden)
    watched[:, 0] = masks.hidden[:, 0]
    assert torch.equal(add_patches(model, views, some).results[0].predict[:, 0], some.predict[:, 0])   # what is watched can be chosen
    with torch.no_grad():
        full = model(views, masks.hidden, watched)
    assert torch.equal(growth.results[-1].hidden, masks.hidden)
    torch.testing.assert_close(growth.results[-1].pred, full.pred, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(growth.loss[-1], full.patch_loss.mean(-1))
    for count, result in enumerate(growth.results, 1):
        assert torch.equal(result.predict, watched)
        assert all(set((~h[0]).nonzero()[:, 0].tolist()) == set(order[:count].tolist()) for h, order in zip(result.hidden, growth.order))
        assert torch.equal(result.hidden[:, 1:], masks.hidden[:, 1:])
    assert all((a.pred - b.pred).abs().max() > 1e-4 for a, b in pairwise(growth.results))     # each patch is read
    assert all(len(set(order.tolist())) == k for order in growth.order)


def test_an_order_and_a_view_can_be_given_and_are_checked():
    model, views = case_of("mum")
    masks = default_masks(model, views)
    order = masks.visible[0][:, 1].flip(-1)
    growth = add_patches(model, views, masks, order, view=1)
    assert torch.equal(growth.order, order) and growth.results[0].predict[:, 1].any() and not growth.results[0].predict[:, 0].any()
    assert torch.equal((~growth.results[0].hidden[:, 1]).nonzero()[:, 1], order[:, 0])
    for wrong in (order[:, :-1], order.clone().fill_(order[0, 0]), masks.hidden[:, 1].float().topk(order.shape[1]).indices):
        with pytest.raises(ValueError, match="each once"):
            add_patches(model, views, masks, wrong, view=1)
    model, views = case_of("mum reference")
    with pytest.raises(ValueError, match="view 0 hides no patch"):
        add_patches(model, views)
    everything = Masks.given(torch.ones(2, 1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="view 0 shows no patch"):
        add_patches(*case_of("mae"), everything)


# ---------------------------------------------------------------- figures

def test_figures_draw():
    for case in ("mae", "crossmae", "mum reference"):
        model, views = case_of(case)
        narrow, wide = anatomy_figure(model, views, per_row=3), anatomy_figure(model, views, i=1, steps=True, statistics="true")
        assert [a.get_title() for a in narrow.axes][:3] == ["image / given", "norms, bias", "mask token"]
        assert len(narrow.axes) == 4 * 3 and narrow.axes[6].get_title() and wide.axes[0].images
    for case, view in (("crossmae", 0), ("mum reference", 1)):      # the last panel is the reconstruction of the view that has one
        model, views = case_of(case)
        last = anatomy_figure(model, views, i=1).axes[-1].images[0].get_array()
        shown = paint(views, anatomise(model, views).result, 8, True)[1, view]
        torch.testing.assert_close(torch.from_numpy(last.data).permute(2, 0, 1), shown, atol=1e-5, rtol=1e-5)
    model, views = case_of("crossmae")
    assert len(mixing_figure(mixing(model, views)).axes) == 2
    assert len(layers_figure({"encoder": layers(model, views), "decoder": layers(model, views, "decoder")}).axes) == 6
    assert growth_figure(model, views, add_patches(model, views), i=1, frames=3).axes
