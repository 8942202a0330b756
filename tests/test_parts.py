"Rules of the parts that hold for every method: masks, encoders on visible tokens, decoders, targets, display."
import errno
import logging
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE, PUBLISHED_SIZES
from mae_repro.parts import weights
from mae_repro.parts.attention import Attention, CrossAttention, merge_heads
from mae_repro.parts.decoders import MapMix, map_numbers
from mae_repro.parts.encoder import SIZES, Encoder, encode_views
from mae_repro.parts.masking import BlockMasking, GridMasking, Masks, RandomMasking, keep_and_predict
from mae_repro.parts.model import PixelTarget, paint
from mae_repro.parts.patches import normalise, patchify, unpatchify
from mae_repro.parts.weights import file_lock

TINY = dict(embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
CONFIGS = {"mae": MAE(img_size=32, patch_size=8, **TINY), "mae with mixing": MAE(img_size=32, patch_size=8, **TINY, inter_block=True),
           "crossmae": CrossMAE(img_size=32, patch_size=8, **TINY, prediction_ratio=.25), "rectangle": CrossMAE(img_size=(24, 40), patch_size=8, **TINY, prediction_ratio=.5),
           "last block": CrossMAE(img_size=32, patch_size=8, **TINY, inter_block=False), "projected maps": CrossMAE(img_size=32, patch_size=8, **TINY, project_maps=True),
           "subset": CrossMAE(img_size=32, patch_size=8, **TINY, mix_blocks=(0, -2), mix_input=False), "self-attention": CrossMAE(img_size=32, patch_size=8, **TINY, self_attention=True),
           "grid": CrossMAE(img_size=32, patch_size=8, **TINY, masking="grid", prediction_ratio=.25), "block": MAE(img_size=32, patch_size=8, **TINY, masking="block", mask_ratio=.5)}


def views_of(config, b=3):
    gh, gw = config.grid
    return torch.randn(b, 1, 3, gh * config.patch_size, gw * config.patch_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_trains(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    model, views = config.build(), views_of(config)
    before = model(views, generator=torch.Generator().manual_seed(2)).loss
    before.backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking, lacking
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(15):
        loss = model(views, generator=torch.Generator().manual_seed(2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < .9 * before


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_the_brute_force_one(name):
    config = CONFIGS[name]
    model, views = config.build().eval(), views_of(config)
    result = model(views, generator=torch.Generator().manual_seed(3))
    patches = patchify(views, config.patch_size)
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    target = ((patches - mean) / std)[result.predict].view_as(result.pred)
    torch.testing.assert_close(result.target, target, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.loss, (result.pred - target).square().mean())
    torch.testing.assert_close(result.patch_loss.mean(), result.loss)
    assert not (result.predict & ~result.hidden).any()


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "self-attention" and not n.startswith("mae") and n != "block"])
def test_readout_is_independent(name):
    config = CONFIGS[name]
    model, views = config.build().eval(), views_of(config)
    hidden = RandomMasking((.5,))(torch.rand(3, 1, config.grid[0] * config.grid[1]), config.grid).hidden
    everything = model(views, hidden)
    one = hidden & (hidden.cumsum(-1) == 2)
    torch.testing.assert_close(model(views, hidden, one).pred[:, 0], everything.pred[:, 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_pixels_do_not_leak(name):
    config = CONFIGS[name]
    model, views = config.build().eval(), views_of(config)
    result = model(views, generator=torch.Generator().manual_seed(4))
    patches = patchify(views, config.patch_size)
    patches[result.hidden] = torch.randn(int(result.hidden.sum()), patches.shape[-1]) * 10
    painted = unpatchify(patches, config.patch_size, config.grid)
    assert torch.equal(model(painted, result.hidden, result.predict).pred, result.pred)
    assert not torch.equal(model(views + .1, result.hidden, result.predict).pred, result.pred)


def test_samples_do_not_influence_each_other():
    config = CONFIGS["crossmae"]
    model, views, noise = config.build().eval(), views_of(config), torch.rand(3, 1, 16)
    together = model(views, noise=noise)
    alone = model(views[1:2], noise=noise[1:2])
    torch.testing.assert_close(alone.pred[0], together.pred[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("l, mask_ratio, gamma, keep, n", [(196, .75, None, 49, 147), (196, .75, .25, 49, 49), (196, .75, .15, 49, 30), (196, .85, .85, 29, 167),
                                                           (100, .9, None, 9, 91), (196, .985, None, 2, 194), (784, .75, .25, 196, 196)])
def test_published_counts(l, mask_ratio, gamma, keep, n):
    assert keep_and_predict(l, mask_ratio, gamma) == (keep, n)


@pytest.mark.parametrize("bad", [dict(mask_ratio=1.), dict(mask_ratio=-.1), dict(mask_ratio=.5, prediction_ratio=.6), dict(mask_ratio=.5, prediction_ratio=-.1)])
def test_bad_ratios(bad):
    with pytest.raises(ValueError, match="ratio"):
        keep_and_predict(16, **bad)


@pytest.mark.parametrize("masking", [RandomMasking(), RandomMasking((.5,), (.25,)), GridMasking(), GridMasking(predict=.25), GridMasking(offset=(0, 1)),
                                     BlockMasking(.5), BlockMasking(.75, 3, .25), RandomMasking((.9, .25), (None, 0))])
def test_masks_are_consistent(masking):
    noise = torch.rand(5, 3, 8 * 12, generator=torch.Generator().manual_seed(0))
    masks = masking(noise, (8, 12))
    assert not (masks.predict & ~masks.hidden).any() and sum(v.shape[1] for v in masks.visible) == 3
    again = Masks.given(masks.hidden, masks.predict)
    for a, b in zip(again.visible + again.predicted, masks.visible + masks.predicted):
        assert torch.equal(a, b)
    view = 0
    for role_v, role_p in zip(masks.visible, masks.predicted):
        for g in range(role_v.shape[1]):
            for b in range(5):
                assert role_v[b, g].tolist() == (~masks.hidden[b, view]).nonzero().flatten().tolist()
                assert role_p[b, g].tolist() == masks.predict[b, view].nonzero().flatten().tolist()
            view += 1


def test_random_masks_are_uniform():
    masks = RandomMasking((.75,), (.25,))(torch.rand(4000, 1, 16, generator=torch.Generator().manual_seed(0)), (4, 4))
    assert (masks.hidden.float().mean(0) - .75).abs().max() < .04 and (masks.predict.float().mean(0) - .25).abs().max() < .04


@pytest.mark.parametrize("bad", [dict(hidden=torch.zeros(1, 1, 4)), dict(hidden=torch.zeros(1, 4, dtype=torch.bool))])
def test_given_masks_are_checked(bad):
    with pytest.raises(ValueError, match="hidden"):
        Masks.given(**bad)


@pytest.mark.parametrize("size", ["Ti", "S", "B", "L", "H"])
@pytest.mark.parametrize("patch", [4, 8, 14, 16])
def test_encoder_sizes(size, patch):
    with torch.device("meta"):
        encoder = Encoder((patch * 5, patch * 3), patch, **SIZES[size])
        tokens, maps = encoder(torch.empty(2, 3, patch * 5, patch * 3), torch.empty(2, 4, dtype=torch.long), (0, len(encoder.blocks)))
    assert tokens.shape == (2, 5, SIZES[size]["embed_dim"]) and [m.shape for m in maps] == [tokens.shape] * 2


def test_any_size_that_is_a_multiple():
    encoder = Encoder(32, 8, 48, 2, 4).eval()
    for h, w in ((32, 32), (8, 64), (40, 24)):
        images = torch.randn(1, 3, h, w)
        assert encoder.forward_features(images).shape == (1, 1 + h * w // 64, 48)
        assert encoder.get_intermediate_layers(images, reshape=True)[0].shape == (1, 48, h // 8, w // 8)
    with pytest.raises(ValueError, match="not a multiple"):
        encoder.forward_features(torch.randn(1, 3, 36, 32))
    with pytest.raises(ValueError, match="maps"):
        encoder(torch.randn(1, 3, 32, 32), maps=(3,))


def test_views_are_encoded_alone():
    encoder = Encoder(32, 8, 48, 2, 4).eval()
    views = torch.randn(2, 3, 3, 32, 32)
    masks = RandomMasking((.75, .25), (None, 0))(torch.rand(2, 3, 16), (4, 4))
    seen = encode_views(encoder, views, masks, (1,))
    alone = encoder(views[:, 2], masks.visible[1][:, 1], (1,))[0]
    torch.testing.assert_close(seen.tokens[:, -13:], alone, atol=1e-5, rtol=0)
    assert seen.tokens.shape == seen.maps[0].shape == (2, 5 + 13 + 13, 48) and seen.places[0].max() <= 50


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_nothing_but_what_is_kept(name):
    config = CONFIGS[name]
    model, views = config.build().train(), views_of(config)
    losses, kept = [], []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(views, generator=torch.Generator().manual_seed(5)).loss
        kept.append(sum(sizes))
        loss.backward()
        losses.append((loss.item(), model.encoder.blocks[0].attn.qkv.weight.grad.clone(), model.decoder.mask_token.grad.clone()))
    assert losses[0][0] == losses[1][0] and all(torch.allclose(a, b, atol=1e-7) for a, b in zip(losses[0][1:], losses[1][1:]))
    model.decoder.set_grad_checkpointing(False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model(views, generator=torch.Generator().manual_seed(5))
    assert kept[1] < sum(sizes) < kept[0], "both the encoder's and the decoder's activations are let go"


def test_attention_weights_agree_with_the_fused_path():
    torch.manual_seed(0)
    x, memory = torch.randn(2, 7, 24), torch.randn(2, 9, 16)
    for module, args in ((Attention(24, 3), (x,)), (CrossAttention(24, 3, 16), (x, memory))):
        out, weights = module(*args, return_weights=True)
        v = module.project(*args)[2]
        torch.testing.assert_close(module.proj(merge_heads(weights @ v)), out, atol=1e-6, rtol=0)
        assert torch.equal(module(*args), out)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_map_numbers():
    assert map_numbers(4) == (1, 2, 3, 4) and map_numbers(4, with_input=True) == (0, 1, 2, 3, 4)
    assert map_numbers(4, (-1,)) == (4,) and map_numbers(4, (3, 0), True) == (0, 1, 4)
    for bad in ((4,), (-5,), (1, 1), (0, -4)):
        with pytest.raises(ValueError, match="mix_blocks"):
            map_numbers(4, bad)


def test_mix_starts_as_published():
    torch.manual_seed(0)
    code, paper = MapMix(13, 2000, 8).weight, MapMix(13, 2000, 8, "paper").weight
    assert abs(paper.std().item() - 13 ** -.5) < .01 and code.abs().max() <= (6 / 2013) ** .5
    with pytest.raises(ValueError, match="init"):
        MapMix(2, 2, 8, "none")


def test_blocks_that_nobody_reads_are_frozen_and_do_not_run():
    model = CrossMAE(img_size=32, patch_size=8, **TINY, mix_blocks=(0,)).build()
    assert not any(p.requires_grad for p in model.encoder.blocks[1:].parameters())
    model.encoder.blocks[2].attn.qkv.weight.data.fill_(torch.nan)
    assert model(torch.randn(1, 3, 32, 32)).loss.isfinite()


@pytest.mark.parametrize("size, mae, dd8, dd12", [("S", 28_204_800, 28_636_008, 32_060_316), ("B", 111_655_680, 113_369_960, 127_034_268),
                                                  ("L", 329_239_296, 332_923_336, 347_638_316), ("H", 656_613_964, 662_267_732, 678_033_368)])
def test_published_parameter_counts(size, mae, dd8, dd12):
    def count(config):
        with torch.device("meta"):
            return sum(p.numel() for p in config.build().parameters())
    assert count(MAE(**PUBLISHED_SIZES[size])) == mae
    assert (count(CrossMAE(**PUBLISHED_SIZES[size], decoder_depth=8)), count(CrossMAE(**PUBLISHED_SIZES[size]))) == (dd8, dd12)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = MAE(**PUBLISHED_SIZES["S"]).build()
    w = model.encoder.blocks[0].attn.qkv.weight
    bound = (6 / (384 + 3 * 384)) ** .5
    assert .99 * bound < w.abs().max() <= bound and model.encoder.blocks[0].attn.qkv.bias.abs().max() == 0
    embed = model.encoder.patch_embed.proj
    assert embed.weight.abs().max() <= (6 / (384 + 768)) ** .5 and 0 < embed.bias.abs().max() <= 768 ** -.5
    assert abs(model.encoder.cls_token.std().item() - .02) < .003
    assert all(m.weight.min() == m.weight.max() == 1 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_paint_shows_what_it_was_given():
    config = MAE(img_size=32, patch_size=8, **TINY, norm_pix_loss=False)
    views = normalise(torch.rand(2, 1, 3, 32, 32))
    result = config.build()(views, generator=torch.Generator().manual_seed(0))
    perfect = result._replace(pred=result.target)
    from mae_repro.parts.patches import denormalise
    torch.testing.assert_close(paint(views, perfect, 8, False), denormalise(views), atol=1e-5, rtol=0)
    normed = PixelTarget(8, True)(views, Masks.given(result.hidden))
    torch.testing.assert_close(paint(views, result._replace(pred=normed), 8, True, "true"), denormalise(views), atol=1e-4, rtol=0)
    assert (paint(views, result._replace(pred=normed), 8, True, "visible") - denormalise(views)).abs().max() > .01
    changed = unpatchify(torch.where(result.hidden[..., None], 5., patchify(views, 8)), 8, (4, 4))
    assert torch.equal(paint(views, result, 8, True, "visible"), paint(changed, result, 8, True, "visible")), "hidden pixels must not influence the honest picture"


@pytest.mark.parametrize("mix", [False, True])
def test_compiled_model_is_the_same(mix):
    config = CrossMAE(img_size=32, patch_size=8, **TINY, prediction_ratio=.25, inter_block=mix)
    torch.manual_seed(0)
    model, views, noise = config.build().eval(), views_of(config), torch.rand(3, 1, 16)
    expected = model(views, noise=noise)
    explained = torch._dynamo.explain(model.reconstruct)(views, model.make_masks(views, noise=noise))
    assert explained.graph_break_count == 0
    torch._dynamo.reset()
    model.reconstruct = torch.compile(model.reconstruct, backend="aot_eager")
    torch.testing.assert_close(model(views, noise=noise).pred, expected.pred, atol=1e-5, rtol=0)


# a file that one process holds

HOLDER = "import sys; from mae_repro.parts.weights import file_lock\nwith file_lock(sys.argv[1]) as held: print(held, flush=True); sys.stdin.read()"


def test_a_lock_is_of_one_process_and_goes_with_it(tmp_path, capsys):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with file_lock(path) as held:
            assert held is False
        later = threading.Timer(.5, other.kill)
        later.start()
        with file_lock(path, wait=True, waiting="one moment") as held:
            assert held is True and not later.is_alive()
        assert capsys.readouterr().err == "one moment\n"
    with file_lock(path) as held:
        assert held is True


def test_a_lock_is_of_one_thread(tmp_path):
    path, order = tmp_path / "lock", []

    def second():
        with file_lock(tmp_path / "." / "lock", wait=True) as held:
            order.append(("second", held))
    with file_lock(path) as held, file_lock(path) as again:
        assert held is True and again is False
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(.3)
        order.append(("first", held))
    thread.join()
    assert order == [("first", True), ("second", True)]


def _sleep_and_say(pipe):
    pipe.recv()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_does_not_keep_its_parents_lock(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    with file_lock(tmp_path / "lock"):
        child = multiprocessing.get_context("fork").Process(target=_sleep_and_say, args=(theirs,))
        child.start()
    look = subprocess.run([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert child.is_alive() and look.stdout == "True\n"
    ours.send(1)
    child.join()


def test_a_disk_without_locks_lets_everybody_pass(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(weights.fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING), file_lock(tmp_path / "lock") as held:
        assert held is None and "No locks available" in caplog.text
    monkeypatch.setattr(weights, "fcntl", None)
    with file_lock(tmp_path / "lock") as held:
        assert held is None
