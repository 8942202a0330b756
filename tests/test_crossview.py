"""SiamMAE, CropMAE, CroCo, CDG-MAE: what must hold beyond the reference vectors of `test_parity`."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mae_repro.methods.catalogue import METHODS, export_model, open_encoder, open_model, save_model
from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo, FloorMasking, binocular_features, monocular_features
from mae_repro.methods.siamese import CropMAE, SiamMAE
from mae_repro.parts.encoder import Encoder, encode_views
from mae_repro.parts.masking import Masks
from mae_repro.parts.positions import GridRotation, interpolate_positions, rotate, sincos_positions
from mae_repro.parts.weights import UserError, load_into
from mae_repro.training.config import Config, OptimConfig
from mae_repro.training.optimisation import adamw, cosine_lr, parameter_groups, peak_lr, set_lr, step_lr

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).parents[2] / "shared"))
EVALUATION = SHARED / "golden/evaluation"
needs_vectors = pytest.mark.skipif(not EVALUATION.is_dir(), reason="reference vectors are not beside this checkout")
SIZES = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
SMALL = {"siammae": SiamMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32), "cropmae": CropMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32),
         "croco": CroCo(**SIZES, mask_ratio=.75), "croco-rope": CroCo(**SIZES | dict(decoder_num_heads=4, num_heads=6), mask_ratio=.75, positions="rope"),
         "cdgmae": CDGMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32)}


def config_of(path):
    with safe_open(path, "pt") as file:
        return {k: json.loads(v) if v.startswith(("{", "[")) else v for k, v in file.metadata().items()}


def views_of(config, batch=2, size=(32, 32), seed=0):
    return torch.randn(batch, config.num_views, 3, *size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- published training

@needs_vectors
def test_three_training_steps_of_cropmae():
    tensors, about = load_file(EVALUATION / "cropmae_trainstep.safetensors"), config_of(EVALUATION / "cropmae_trainstep.safetensors")
    c = about["config"]
    method = CropMAE(**{k: c[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads",
                                          "mask_ratio", "norm_pix_loss")}, decoder_mlp_dim=c["dim_feedforward"])
    group = lambda name: {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(name + "/")}
    model = method.build().eval()   # the reference was recorded without dropout
    assert load_into(model, method.to_ours(group("weights")))
    groups = parameter_groups(model, c["weight_decay"])
    undecayed = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    names = method.to_published({k: torch.full_like(p, float(id(p) in undecayed)) for k, p in model.named_parameters()})
    assert {k for k, v in names.items() if v.all()} == set(about["no_decay"]) and all(v.all() or not v.any() for v in names.values())
    optimizer = adamw(groups, c["lr"])
    optim = OptimConfig(epochs=c["epochs"], warmup_epochs=c["warmup_epochs"], late_schedule=True)
    for step in range(c["steps"]):
        lr = set_lr(optimizer, step_lr(optim, c["lr"], step, c["loader_len"]))
        assert lr == pytest.approx(tensors["out/lr_used"][step].item(), abs=1e-15)
        views, noise = tensors[f"in/{step}/imgs"].flip(1), tensors[f"in/{step}/noise"]   # their view 0 is the anchor
        result = model(views, noise=torch.stack([noise, torch.zeros_like(noise)], dim=1))
        assert result.loss.item() == pytest.approx(tensors["out/losses"][step].item(), abs=5e-6)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    ours = method.to_published(model.state_dict())
    for name, after in group("after").items():
        error = (ours[name] - after).abs()
        if name.endswith(("qkv.bias", "in_proj_bias")):   # no gradient in truth: Adam amplifies rounding
            third = len(error) // 3
            error = torch.cat([error[:third], error[2 * third:]])
        assert error.max() < 5e-5, name


def test_late_schedule_is_the_schedule_one_step_late():
    optim = OptimConfig(epochs=10, warmup_epochs=2)
    late = replace(optim, late_schedule=True)
    assert step_lr(late, .1, 0, 5) == .1 and step_lr(optim, .1, 0, 5) == 0
    assert [step_lr(late, .1, s + 1, 5) for s in range(50)] == [step_lr(optim, .1, s, 5) for s in range(50)]


@needs_vectors
def test_learning_rates_of_cropmae():
    for case in json.loads((EVALUATION / "cropmae_lr.json").read_text()):
        optim = OptimConfig(base_lr=case["blr"], batch_size=case["effective_batch"], epochs=case["epochs"], warmup_epochs=case["warmup_epochs"])
        peak = peak_lr(Config("x", CropMAE(), optim=optim))
        assert peak == pytest.approx(case["lr"], rel=1e-12)
        for x, y in zip(case["x"], case["y"]):
            assert cosine_lr(x, peak, optim.epochs, optim.warmup_epochs) == pytest.approx(y, rel=1e-9, abs=1e-18)


# ---------------------------------------------------------------- CroCo's parts

@needs_vectors
@pytest.mark.parametrize("key, base, scale, where", [("rope100_grid", 100., 1., "pos_grid"), ("rope10_grid", 10., 1., "pos_grid"), ("rope100_rand", 100., 1., "pos_rand"),
                                                     ("rope10_rand", 10., 1., "pos_rand"), ("rope100_F0_half_grid", 100., .5, "pos_grid")])
def test_rotations_of_croco(key, base, scale, where):
    t = load_file(EVALUATION / "croco_misc.safetensors")
    turned = rotate(t["in/tokens"], GridRotation(base, scale).at(t[f"in/{where}"], t["in/tokens"].shape[-1]))
    torch.testing.assert_close(turned, t[f"out/{key}"], atol=2e-6, rtol=0)


@needs_vectors
def test_tables_of_croco():
    t = load_file(EVALUATION / "croco_misc.safetensors")
    for dim in (16, 32):
        torch.testing.assert_close(sincos_positions(dim, (3, 5), prefix=0), t[f"out/sincos_{dim}"], atol=1e-6, rtol=0)
    for side in ("enc", "dec"):
        ours = interpolate_positions(t[f"in/ckpt_{side}_pos_embed"][None], (4, 4), (3, 5), prefix=0)[0]
        torch.testing.assert_close(ours, t[f"out/interp_{side}_pos_embed"], atol=1e-6, rtol=0)


@needs_vectors
@pytest.mark.parametrize("ratio", [.5, .75, .9])
def test_masks_of_croco(ratio):
    t = load_file(EVALUATION / "croco_misc.safetensors")
    masks = FloorMasking(ratio)(t["in/mask_noise"][:, None], (3, 5))
    assert torch.equal(masks.hidden[:, 0], t[f"out/mask_{ratio}"])


@needs_vectors
def test_feature_taps_of_croco():
    path = EVALUATION / "croco_downstream_rope_rect.safetensors"
    t, c = load_file(path), config_of(path)["config"]
    method = CroCo(tuple(c["img_size"]), c["patch_size"], c["enc_embed_dim"], c["enc_depth"], c["enc_num_heads"], c["mlp_ratio"], c["dec_embed_dim"], c["dec_depth"],
                   c["dec_num_heads"], positions="rope", norm_reference=c["norm_im2_in_dec"])
    model = method.build().eval()
    report = load_into(model, method.to_ours({k[8:]: v for k, v in t.items() if k.startswith("weights/")}))
    assert set(report.missing) == {"decoder.mask_token", "decoder.head.weight", "decoder.head.bias"} and not report.unexpected and not report.mismatched
    with torch.no_grad():  # in float64: what is left is the rounding of the vectors, the same on every machine
        first, second = t["in/img1"].double(), t["in/img2"].double()
        layers = binocular_features(model.double(), first, second)
        torch.testing.assert_close(monocular_features(model, first)[-1], t["out/monocular"].double(), atol=2e-5, rtol=0)
    assert len(layers) == c["enc_depth"] + c["dec_depth"]
    for i, layer in enumerate(layers):
        torch.testing.assert_close(layer, t[f"out/binocular_layer{i}"].double(), atol=2e-5, rtol=0)


# ---------------------------------------------------------------- sizes

def count(config, trainable=False):
    with torch.device("meta"):
        model = config.build()
    return sum(p.numel() for p in model.parameters()) if trainable else sum(t.numel() for t in model.state_dict().values())


def test_published_sizes():
    from mae_repro.training.recipes import recipe
    # tables are counted where the authors store them; CroCo's are buffers there too, left out of its published counts
    published = {"cropmae-vits16": (28_327_808, False), "siammae-vits16": (28_327_808, False), "cdgmae-a3": (28_327_808, False), "cropmae-vits8": (28_334_912, False),
                 "croco-v1": (120_076_288, True), "croco-v2-vitb-decsmall": (120_076_288, True), "croco-v2-vitb-decbase": (200_269_824, True),
                 "croco-v2-vitl-decbase": (417_918_720, True)}
    assert {name: (count(recipe(name).method, trainable), trainable) for name, (_, trainable) in published.items()} == published
    assert count(recipe("cropmae-vits16").method, trainable=True) == 28_201_728


# ---------------------------------------------------------------- who reads from whom

@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_pixels_of_hidden_patches_do_not_leak_and_anchors_count(config):
    torch.manual_seed(0)
    model, views = config.build().eval(), views_of(config)
    noise = torch.rand(2, config.num_views, 16)
    with torch.no_grad():
        result = model(views, noise=noise)
        hidden = result.hidden.view(2, -1, 1, 4, 1, 4, 1).expand(-1, -1, 3, -1, 8, -1, 8).reshape(views.shape)
        changed = model(torch.where(hidden, torch.full_like(views, 7.), views), noise=noise)
        other = model(torch.cat([views[:, :1], views[:, 1:].flip(0)], dim=1), noise=noise)
    assert torch.equal(result.pred, changed.pred) and not torch.allclose(result.pred, other.pred, atol=1e-4)
    assert result.pred.shape == (2, 12, 192) and not result.predict[:, 1:].any()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("hidden", [0., .25, .5])
def test_anchors_are_a_set_encoded_alone(n, hidden):
    config = replace(SMALL["cdgmae"], num_anchors=n, anchor_mask_ratio=hidden)
    torch.manual_seed(n)
    model, views, noise = config.build().eval(), views_of(config), torch.rand(2, 1 + n, 16)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(n)])
    with torch.no_grad():
        straight, shuffled = model(views, noise=noise), model(views[:, order], noise=noise[:, order])
        masks = model.masking(noise, (4, 4))
        seen = encode_views(model.encoder, views, masks)
        start = 1 + masks.visible[0].shape[2]
        for i in range(n):   # encoded in one batch, as if each were alone
            alone, _ = model.encoder(views[:, 1 + i], masks.visible[1][:, i] if hidden else None)
            torch.testing.assert_close(seen.tokens[:, start:start + alone.shape[1]], alone, atol=1e-5, rtol=0)
            start += alone.shape[1]
    assert start == seen.tokens.shape[1] == 1 + 4 + n * (1 + int(16 * (1 - hidden)))
    torch.testing.assert_close(straight.pred, shuffled.pred, atol=1e-5, rtol=0)
    assert len(masks.visible) == 2


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_non_square_images_and_a_batch_of_one(config):
    config = replace(config, img_size=(32, 48))
    model = config.build().eval()
    result = model(views_of(config, 1, (32, 48)), generator=torch.Generator().manual_seed(0))
    result.loss.backward()
    assert torch.isfinite(result.loss) and all(p.grad is not None for p in model.parameters())
    if config in (replace(c, img_size=(32, 48)) for c in SMALL.values()):
        assert torch.isfinite(model(views_of(config, 2, (48, 32)), generator=torch.Generator().manual_seed(0)).loss)   # another size: tables interpolate


def test_dropout_works_in_training_only():
    model, views = SMALL["cropmae"].build(), views_of(SMALL["cropmae"])
    noise = torch.rand(2, 2, 16)
    loss = lambda: model(views, noise=noise).loss.item()
    assert loss() != loss()
    model.eval()
    assert loss() == loss()
    still = replace(SMALL["cropmae"], decoder_dropout=0.).build()
    assert still(views, noise=noise).loss.item() == still(views, noise=noise).loss.item()


def test_dropout_reaches_every_branch():
    "Attention weights of both kinds, the MLP's hidden numbers and each residual branch, as torch's TransformerDecoderLayer has it."
    block = SMALL["cropmae"].build().decoder.blocks[0]
    assert block.self_attn.dropout == block.cross_attn.dropout == block.mlp.drop.p == block.drop.p == .1


def test_errors():
    model = SMALL["cropmae"].build()
    with pytest.raises(ValueError, match="at least one anchor"):
        model(torch.randn(1, 3, 32, 32))
    hidden = torch.zeros(1, 2, 16, dtype=torch.bool)
    hidden[:, :, :4] = True
    with pytest.raises(ValueError, match="anchor"):
        model(torch.randn(1, 2, 3, 32, 32), hidden)
    with pytest.raises(ValueError, match="num_anchors 0"):
        replace(SMALL["cdgmae"], num_anchors=0).build()
    with pytest.raises(ValueError, match="order"):
        replace(SMALL["cropmae"], decoder_order=("cross", "cross")).build()
    with pytest.raises(ValueError, match="multiple of 4"):
        replace(SMALL["croco-rope"], num_heads=4).build()(views_of(SMALL["croco-rope"]))
    with pytest.raises(ValueError, match="no class token"):
        SMALL["croco"].build().encoder.get_intermediate_layers(torch.randn(1, 3, 32, 32), return_class_token=True)


def test_rotary_encoder_drops_patches_as_if_they_had_never_been_turned():
    "The tokens of visible patches depend on their own places, not on how many others there are: against a loop that turns each patch by itself."
    torch.manual_seed(0)
    encoder = Encoder(32, 8, 24, 1, 2, class_token=False, rotary=GridRotation()).eval()
    images, ids = torch.randn(1, 3, 32, 32), torch.tensor([[1, 6, 11]])
    tokens, _ = encoder(images, ids)
    block, x = encoder.blocks[0], encoder.embed(images, ids)
    q, k, v = block.attn.project(block.norm1(x))
    turn = lambda y: torch.stack([rotate(y[:, :, i:i + 1], GridRotation().at(torch.tensor([[[p // 4, p % 4]]]), 12))[:, :, 0] for i, p in enumerate(ids[0].tolist())], dim=2)
    weights = (turn(q) @ turn(k).transpose(-1, -2) / 12 ** .5).softmax(-1)
    y = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(tokens, encoder.norm(y + block.mlp(block.norm2(y))), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- on disk

@pytest.mark.parametrize("name", SMALL)
def test_models_travel_through_files(tmp_path, name):
    config = SMALL[name]
    torch.manual_seed(1)
    model, views = config.build().eval(), views_of(config)
    save_model(tmp_path / "run", model, config)
    noise = torch.rand(2, config.num_views, 16)
    reference = model(views, noise=noise).pred
    export_model(tmp_path / "run", "official", tmp_path / "x.pth")
    for path in (tmp_path / "run", tmp_path / "x.pth"):
        again, same = open_model(path)
        assert same == config and torch.equal(again(views, noise=noise).pred, reference)
        assert torch.equal(open_encoder(path).forward_features(views[:, 0]), model.encoder.forward_features(views[:, 0]))
    if name == "croco-rope":
        with pytest.raises(UserError, match="rotary"):
            export_model(tmp_path / "run", "timm", tmp_path / "t.safetensors")
        return
    export_model(tmp_path / "run", "timm", tmp_path / "t.safetensors")
    assert torch.equal(open_encoder(tmp_path / "t.safetensors").forward_features(views[:, 0]), model.encoder.forward_features(views[:, 0]))


def test_published_checkpoints_are_recognised():
    "Weights alone, at published widths: CropMAE for the siamese architecture, CroCo with its positions and its norm of the reference."
    sizes = dict(img_size=32, patch_size=16, embed_dim=384, depth=1, num_heads=6)
    crop = CropMAE(**sizes, decoder_embed_dim=256, decoder_depth=1, decoder_num_heads=8)
    croco = CroCo(img_size=32, patch_size=16, embed_dim=768, depth=1, num_heads=12, decoder_embed_dim=512, decoder_depth=1, decoder_num_heads=16, norm_reference=False)
    rope = replace(croco, positions="rope", img_size=224, norm_reference=True)
    for config in (crop, croco, rope):
        state = config.to_published(config.build().state_dict())
        assert [name for name, m in METHODS.items() if m.recognises(state)] == [next(n for n, m in METHODS.items() if m is type(config))]
        assert type(config).from_published(state) == config
        assert type(config).to_ours(state).keys() == config.build().state_dict().keys()


def test_masks_given_by_hand_are_used():
    model, config = SMALL["cdgmae"].build().eval(), SMALL["cdgmae"]
    hidden = torch.zeros(1, 4, 16, dtype=torch.bool)
    hidden[:, 0, 3:], hidden[:, 1, :8], hidden[:, 3, 0] = True, True, True
    predict = torch.zeros_like(hidden)
    predict[:, 0, 5:9] = True
    result = model(views_of(config, 1), hidden, predict)
    assert torch.equal(result.hidden, hidden) and result.pred.shape == (1, 4, 192)
    assert [tuple(v.shape) for v in Masks.given(hidden, predict).visible] == [(1, 1, 3), (1, 1, 8), (1, 1, 16), (1, 1, 15)]


# ---------------------------------------------------------------- what training teaches

@pytest.mark.parametrize("name", ["siammae-tiny", "cdgmae-tiny"])
def test_shipped_weights_use_their_anchors(name):
    "Completing new scenes from the right anchors is clearly easier than from those of another scene, or from none to speak of."
    from mae_repro.parts.patches import normalise
    from mae_repro.parts.weights import data_dir
    from mae_repro.views.bags import BagViews
    from mae_repro.views.scenes import Scenes
    from mae_repro.views.samples import Views
    from mae_repro.views.videos import VideoViews
    model, config = open_model(data_dir() / "pretrained" / name)
    scenes = Scenes(num=12, num_frames=16, size=96, seed=31)
    source = VideoViews(scenes, config.num_views, config.img_size) if name.startswith("siam") else BagViews(scenes, config.num_views, config.img_size, joint=True)
    items = [Views(source, config.patch_size)[0, i] for i in range(12)]
    views, noise = normalise(torch.stack([i["views"] for i in items])), torch.stack([i["noise"] for i in items])
    with torch.no_grad():
        right = model(views, noise=noise).patch_loss.mean(1)
        wrong = model(torch.cat([views[:, :1], views[:, 1:].roll(1, 0)], dim=1), noise=noise).patch_loss.mean(1)
        grey = model(torch.cat([views[:, :1], torch.zeros_like(views[:, 1:])], dim=1), noise=noise).patch_loss.mean(1)
    assert right.mean() < .9 * wrong.mean() and right.mean() < .95 * grey.mean() and (right < wrong).float().mean() > .8
