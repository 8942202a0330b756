"Probes: brute force, separable and random data, the sweep, the published LARS, intervals, image sets, errors."
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from mae_repro.evaluation import probes
from mae_repro.evaluation.probes import (HalfCrops, Heads, ProbeConfig, RawPixels, best_rate, compare, crop_origin_probe, extract_features, fit_heads, format_table,
                                         head_optimizer, head_step, held_out, knn_predict, linear_predict, probe, probe_all, text_table, wilson)
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.weights import UserError, data_dir
from mae_repro.training.optimisation import cosine_lr
from mae_repro.views.photos import BrokenImage


class Colours:
    "A labelled image set held in memory: noisy squares of one colour a class; `broken` indices cannot be read."

    def __init__(self, n=40, classes=2, seed=0, broken=(), labels=True, size=32):
        rand = np.random.default_rng(seed)
        wanted = np.arange(n) % classes
        colour = np.array([[200, 60, 60], [60, 60, 200], [60, 200, 60]])[wanted]
        self.pixels = (colour[:, None, None] + rand.normal(0, 25, (n, size, size, 3))).clip(0, 255).astype(np.uint8)
        self.labels, self.class_names, self.broken = wanted.tolist() if labels else None, [f"c{i}" for i in range(classes)], broken

    def __len__(self):
        return len(self.pixels)

    def name(self, i):
        return f"square {i}"

    def load(self, i):
        if i in self.broken:
            raise BrokenImage(self.name(i), "damaged")
        return Image.fromarray(self.pixels[i])


def small_timm():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)


def small_encoder():
    torch.manual_seed(0)
    return Encoder(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)


# ---- k-NN

def knn_loop(train_x, train_y, test_x, k, temperature):
    out = []
    for q in test_x:
        cos = [F.cosine_similarity(q.double(), t.double(), dim=0).item() for t in train_x]
        near = sorted(range(len(cos)), key=lambda i: -cos[i])[:k]
        votes = {}
        for i in near:
            votes.setdefault(train_y[i].item(), []).append(cos[i])
        score = {c: sum(math.exp(s / temperature) for s in cs) if temperature else (len(cs), sum(cs)) for c, cs in votes.items()}
        out.append(max(score, key=score.get))
    return torch.tensor(out)


@pytest.mark.parametrize("temperature", [0.005, 0.07, 0.5, None])       # exp(1 / 0.005) is more than float32 can hold
@pytest.mark.parametrize("k", [1, 4, 9, 500])
def test_knn_equals_brute_force(k, temperature):
    rand = torch.Generator().manual_seed(k)
    x, q, y = torch.randn(70, 6, generator=rand) + 0.5, torch.randn(40, 6, generator=rand), torch.randint(0, 5, (70,), generator=rand)
    assert torch.equal(knn_predict(x, y, q, k, temperature), knn_loop(x, y, q, k, temperature))


def test_knn_is_the_same_in_any_chunk(monkeypatch):
    rand = torch.Generator().manual_seed(0)
    x, q, y = torch.randn(50, 6, generator=rand), torch.randn(33, 6, generator=rand), torch.randint(0, 3, (50,), generator=rand)
    whole = knn_predict(x, y, q)
    sizes, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda t, n, *a: sizes.append(n) or split(t, min(n, 4), *a))
    assert torch.equal(knn_predict(x, y, q), whole)
    assert sizes[0] * len(x) <= 2**25


def test_knn_refuses_k_below_one():
    with pytest.raises(ValueError, match="k must be at least 1"):
        knn_predict(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), k=0)


# ---- linear probe

@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_linear_separates_separable_data_of_wild_scales(optimizer):
    rand = torch.Generator().manual_seed(0)
    y, other = torch.randint(0, 3, (300,), generator=rand), torch.randint(0, 3, (200,), generator=rand)
    centres, scale = torch.randn(3, 10, generator=rand) * 4, 10.0 ** torch.linspace(-3, 3, 10)
    x, q = ((centres[c] + torch.randn(len(c), 10, generator=rand)) * scale for c in (y, other))
    predicted, settings = linear_predict(x, y, q, ProbeConfig(optimizer=optimizer, epochs=20))
    assert (predicted == other).float().mean() > 0.98
    assert settings["held_out_accuracy"] > 0.9


def test_linear_is_at_chance_on_random_labels():
    rand = torch.Generator().manual_seed(0)
    x, q = torch.randn(400, 8, generator=rand), torch.randn(1000, 8, generator=rand)
    y, other = torch.randint(0, 4, (400,), generator=rand), torch.randint(0, 4, (1000,), generator=rand)
    predicted, _ = linear_predict(x, y, q, ProbeConfig(epochs=10))
    low, high = wilson(int((predicted == other).sum()), 1000, z=4)
    assert low < 0.25 < high


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_sweep_equals_separate_runs(optimizer):
    rand = torch.Generator().manual_seed(0)
    x, y, lrs = torch.randn(150, 7, generator=rand), torch.randint(0, 3, (150,), generator=rand), (0.001, 0.01, 0.1)
    options = dict(epochs=4, batch_size=32, optimizer=optimizer, seed=5)
    together = fit_heads(x, y, 3, lrs, **options)
    for r, lr in enumerate(lrs):
        alone = fit_heads(x, y, 3, [lr], **options)
        assert torch.allclose(together.heads[r].weight, alone.heads[0].weight, atol=1e-5)
        assert torch.allclose(together(x)[:, r], alone(x)[:, 0], atol=1e-5)
    assert not torch.allclose(together.heads[0].bias, together.heads[2].bias, atol=1e-3)


def test_sweep_survives_a_rate_that_diverges():
    rand = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (100,), generator=rand)
    x = torch.randn(100, 3, generator=rand) + 4 * y[:, None]
    predicted, settings = linear_predict(x, y, x, ProbeConfig(lrs=(0.1, 1e38), epochs=5))
    assert settings["lr"] == 0.1 and (predicted == y).float().mean() > 0.95


def test_a_rate_that_diverges_never_wins():
    "A head of nan says class 0 everywhere, which happens to be right for all that is held out here."
    x, y = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), torch.ones(100, dtype=torch.int64)
    held, rest = held_out(100, 0)
    y[held], y[rest[:5]] = 0, 0
    _, settings = linear_predict(x, y, x, ProbeConfig(lrs=(0.1, 3e38), epochs=5))
    assert settings["lr"] == 0.1 and settings["held_out_accuracy"] < 1
    with pytest.raises(UserError, match="every head of the probe diverged: .* lower lrs than 1e\\+38, 3e\\+38$"):
        linear_predict(x, y, x, ProbeConfig(lrs=(1e38, 3e38), epochs=5))
    assert best_rate([.5, .9, .9, 1.], [1., 3., 2., math.inf], [1, 2, 3, 4]) == 2


def test_held_out_examples_are_scored_in_pieces(monkeypatch):
    "Never more than 4096 at once (all logits of a tenth of ImageNet would be gigabytes), and as if all were scored together."
    rand, sizes, forward = torch.Generator().manual_seed(0), [], Heads.forward
    y = torch.randint(0, 3, (50_000,), generator=rand)
    x = torch.randn(50_000, 2, generator=rand) + y[:, None]
    config = ProbeConfig(lrs=(0.01, 0.1, 1.), epochs=1, head_batch_size=4096)
    held, rest = held_out(50_000, 0)
    assert len(held) == 5000 and torch.equal(torch.cat([held, rest]).sort().values, torch.arange(50_000))
    heads = fit_heads(x[rest], y[rest], 3, config.lrs, epochs=1, batch_size=4096)
    with torch.no_grad():
        right, loss = (heads(x[held]).argmax(2) == y[held, None]).float().mean(0), heads.losses(x[held], y[held])
    monkeypatch.setattr(Heads, "forward", lambda self, x: sizes.append((self.training, len(x))) or forward(self, x))
    settings = linear_predict(x, y, x[:5], config)[1]
    assert [size for training, size in sizes if not training] == [4096, 904, 5]
    best = best_rate(right.tolist(), loss.tolist(), config.lrs)
    assert settings["lr"] == config.lrs[best] and settings["held_out_accuracy"] == right[best].item()
    again = probes._accuracy_and_loss(heads, x[held], y[held], "cpu")
    assert again[0] == right.tolist() and again[1] == pytest.approx(loss.tolist(), rel=1e-6)


def test_among_equally_accurate_rates_the_lower_loss_wins():
    rand = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (200,), generator=rand)
    x = torch.randn(200, 3, generator=rand) + 12 * y[:, None]
    _, settings = linear_predict(x, y, x, ProbeConfig(lrs=(0.003, 0.3), epochs=5))
    assert settings["held_out_accuracy"] == 1 and settings["lr"] == 0.3


def test_test_labels_and_order_cannot_matter():
    "Predictions come from training data alone: each test vector is judged on its own."
    rand = torch.Generator().manual_seed(0)
    x, y, q = torch.randn(90, 5, generator=rand), torch.randint(0, 3, (90,), generator=rand), torch.randn(30, 5, generator=rand)
    whole, _ = linear_predict(x, y, q, ProbeConfig(epochs=3))
    flipped, _ = linear_predict(x, y, q.flip(0), ProbeConfig(epochs=3))
    assert torch.equal(whole, flipped.flip(0))


def test_lars_is_the_authors():
    with safe_open(data_dir() / "reference" / "linprobe_lars.safetensors", "pt") as f:
        ref, cfg = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])
    heads = Heads(cfg["dim"], cfg["classes"]).train()
    assert not list(heads.norm.parameters())                                                    # no learned scale and shift
    assert heads.norm.eps == cfg["bn_eps"] and heads.norm.momentum == cfg["bn_momentum"]
    heads.heads[0].load_state_dict({k: ref[f"weights/head.1.{k}"] for k in ("weight", "bias")})
    optimizer = head_optimizer(heads, [cfg["lr"]], "lars")
    losses = torch.cat([head_step(heads, optimizer, x, y, cosine_lr(e, 1.0, cfg["epochs"], cfg["warmup_epochs"]))
                        for x, y, e in zip(ref["in/features"], ref["in/targets"], cfg["step_epochs"])])
    with torch.no_grad():
        logits = heads.eval()(ref["in/features"][0])[:, 0]
    got = {"step/losses": losses, "step/head.1.weight": heads.heads[0].weight, "step/head.1.bias": heads.heads[0].bias,
           "step/head.0.running_mean": heads.norm.running_mean, "step/head.0.running_var": heads.norm.running_var, "out/eval_logits": logits}
    for key, value in got.items():
        # Steps at rate 6.4 multiply the rounding of a sum of 16 gradients, whose order depends on the number of threads: 1e-5 of values around 1.
        assert (value - ref[key]).abs().max() < 1e-5, key


def test_lars_defaults_are_the_published_recipe():
    x, y = torch.randn(512, 4), torch.arange(512) % 2
    _, settings = linear_predict(x, y, x[:5], ProbeConfig(optimizer="lars"))
    assert settings["lr"] == pytest.approx(0.2) and settings["epochs"] == 90 and settings["batch_size"] == 512


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="sgd, adamw, lars"):
        head_optimizer(Heads(2, 2), [0.1], "adam")
    with pytest.raises(ValueError, match="knn, linear"):
        probe(small_timm(), Colours(8), Colours(4), kind="svm", progress=False)


# ---- intervals and tables

def test_wilson_interval():
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    share = 0.1
    rand = np.random.default_rng(0)
    inside = [low <= share <= high for low, high in (wilson(c, 50) for c in rand.binomial(50, share, 4000).tolist())]
    assert 0.93 < np.mean(inside) < 0.985


def test_text_table():
    lines = [("name", "n", "about", ""), ("a", "10", "long words", ""), ("longer", "9", "", "")]
    assert text_table(lines) == "name     n       about\na       10  long words\nlonger   9"
    assert text_table(lines, (0, 2)).splitlines()[0] == "name     n  about"
    assert text_table([["only"]]) == "only"


def test_table_and_json():
    rows = compare(small_timm(), Colours(30), Colours(20, seed=1), small_timm, kinds=("knn", "linear"), pools=("mean", "both"), progress=False, config=ProbeConfig(epochs=5))
    assert [(r.encoder, r.kind, r.pool) for r in rows] == [(e, k, p) for e in ("encoder", "untrained") for p in ("mean", "both") for k in ("knn", "linear")] + [
        ("raw pixels", "knn", "mean"), ("raw pixels", "linear", "mean")]
    again = json.loads(json.dumps([asdict(r) for r in rows]))
    assert again[0]["tested"] == 20 and again[0]["trained"] == 30 and again[0]["chance"] == 0.5 and again[0]["settings"]["k"] == 20
    assert [r.dim for r in rows] == [24, 24, 48, 48] * 2 + [3072] * 2
    text = format_table(rows).splitlines()
    assert len(text) == len(rows) + 1 and text[-1].startswith("raw pixels") and "100.0" in text[-1]
    assert rows[0].low <= rows[0].accuracy <= rows[0].high


# ---- image sets and encoders

@pytest.mark.parametrize("build", [small_timm, small_encoder])
def test_features_of_any_encoder_and_any_batch_size(build):
    encoder, images = build().train(), Colours(11)
    big, small = (extract_features(encoder, images, pools=("cls", "mean", "both"), batch_size=b, progress=False) for b in (8, 3))
    assert encoder.training                                                                     # left as found
    for pool in ("cls", "mean", "both"):
        assert big[pool].x.shape == (11, 48 if pool == "both" else 24) and big[pool].x.dtype == torch.float32
        assert torch.allclose(big[pool].x, small[pool].x, atol=1e-5)
    assert torch.equal(big["both"].x, torch.cat([big["cls"].x, big["mean"].x], 1))
    assert big["mean"].y.tolist() == images.labels and big["mean"].names[10] == "square 10"
    results = [probe(encoder, images, Colours(20, seed=3), kind=k, batch_size=b, progress=False, config=ProbeConfig(epochs=3)) for k in ("knn", "linear") for b in (5, 16)]
    assert results[0] == results[1] and results[2] == results[3]


def test_the_encoder_is_frozen():
    "Dropout is off while features are taken, and no weight changes."
    encoder = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, proj_drop_rate=0.5).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    first, second = (extract_features(encoder, Colours(6), progress=False)["mean"].x for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    probe(encoder, Colours(8), Colours(4), kind="linear", progress=False, config=ProbeConfig(epochs=2))
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_one_pass_serves_all_kinds_and_pools():
    encoder, calls = small_timm(), []
    forward = encoder.forward_features
    encoder.forward_features = lambda x: calls.append(len(x)) or forward(x)
    rows = probe_all(encoder, Colours(12), Colours(6, seed=1), ("knn", "linear"), ("cls", "mean"), batch_size=12, progress=False, config=ProbeConfig(epochs=2))
    assert len(rows) == 4 and calls == [12, 6]


def test_broken_images_are_skipped_and_counted(caplog):
    images = Colours(9, broken=(2, 5))
    found = extract_features(small_encoder(), images, batch_size=4, progress=False)["mean"]
    assert found.skipped == ("square 2", "square 5") and len(found.x) == len(found.y) == len(found.names) == 7
    assert found.y.tolist() == [c for i, c in enumerate(images.labels) if i not in (2, 5)]
    assert "2 of 9 images could not be read" in caplog.text
    assert probe(small_encoder(), images, Colours(6), progress=False).skipped == 2
    with pytest.raises(UserError, match="none of the 3 images"):
        extract_features(small_encoder(), Colours(3, broken=(0, 1, 2)), progress=False)


# ---- new crops in every epoch

def test_drawn_crops_are_those_of_the_published_probe():
    "Areas uniform in .08 .. 1 and ratios within 3/4 .. 4/3, but where the image is too small; a crop depends on seed, epoch and index alone."
    ramp = np.stack(np.broadcast_arrays(np.arange(200)[None], np.arange(150)[:, None], 0), -1).astype(np.uint8)      # red says where across, green where down
    image = Image.fromarray(ramp)
    crops = torch.stack([probes.DrawnCrop(32, 0, epoch)(image, i) for epoch in range(4) for i in range(100)]).float()
    assert torch.equal(probes.DrawnCrop(32, 0, 3)(image, 99).float(), crops[-1]) and not torch.equal(crops[0], crops[100])
    width, height = ((crops[:, c].amax((1, 2)) - crops[:, c].amin((1, 2))) * 32 / 31 for c in (0, 1))                # pixels; the last step is half outside
    share, ratio = width * height / (200 * 150), width / height
    assert share.min() > .06 and share.max() < 1.05 and share.mean().item() == pytest.approx(.52, abs=.06)
    assert ratio[width < 150][height[width < 150] < 112].log().abs().max() < math.log(4 / 3) + .08
    mirrored = crops[:, 0, 0, 0] > crops[:, 0, 0, -1]
    assert .4 < mirrored.float().mean() < .6
    assert probes.DrawnCrop((16, 24))(image, 0).shape == (3, 16, 24) and probes.DrawnCrop(8)(Image.new("RGB", (1, 1)), 0).shape == (3, 8, 8)


def test_the_encoder_reads_new_crops_in_every_epoch():
    encoder, calls = small_timm(), []
    forward = encoder.forward_features
    encoder.forward_features = lambda x: calls.append(x.clone()) or forward(x)
    config = ProbeConfig(optimizer="lars", epochs=3, augment=True)
    row, = probe_all(encoder, Colours(12, broken=(4,)), Colours(6, seed=1), ("linear",), batch_size=12, progress=False, config=config)
    assert [len(x) for x in calls] == [11, 6, 11, 11, 11] and row.settings["augment"] and row.trained == 11
    assert not torch.equal(calls[2], calls[3]) and not torch.equal(calls[2], calls[0])
    assert not probe(small_timm(), Colours(12), Colours(6), kind="linear", progress=False, config=ProbeConfig(epochs=2)).settings["augment"]


def test_features_drawn_anew_are_trained_on():
    "With features that swap the classes in every epoch a head trained on one epoch says the opposite of one trained on the other."
    x, y = torch.tensor([[1.], [-1.]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20)
    right, wrong = (fit_heads(x, y, 2, [.5], epochs=5, batch_size=10, anew=lambda epoch: sign * x)(x).argmax(2)[:, 0] for sign in (1, -1))
    assert torch.equal(right, y) and torch.equal(wrong, 1 - y)
    with pytest.raises(ValueError, match="9 learning rates"):
        linear_predict(x, y, x, anew=lambda epoch: x)


def test_raw_pixels_are_the_pixels():
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(RawPixels(16).forward_features(images), images.flatten(1)[:, None])
    assert RawPixels(64).forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 1, 3 * 32 * 32)
    with pytest.raises(ValueError, match="mean"):
        extract_features(RawPixels(32), Colours(4), pools=("cls",), progress=False)


def test_global_random_state_is_left_alone():
    "A probe during training must not change what training draws next."
    encoder = small_timm()
    before = torch.get_rng_state()
    probe_all(encoder, Colours(12), Colours(6, seed=1), ("knn", "linear"), progress=False, config=ProbeConfig(epochs=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_is_quiet_without_a_terminal(capsys):
    probe(small_timm(), Colours(8), Colours(4), kind="linear", config=ProbeConfig(epochs=2))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("change, message", [
    (dict(train=Colours(6, labels=False)), "training images have no labels.*folder per class"),
    (dict(test=Colours(6, labels=False)), "test images have no labels"),
    (dict(train=Colours(6, classes=1), test=Colours(6, classes=1)), "one class only"),
    (dict(test=Colours(6, classes=3)), "other classes"),
    (dict(test=Colours(0)), "no test images"),
    (dict(train=Colours(6, broken=(1, 3, 5))), "fewer than two classes"),
])
def test_bad_image_sets(change, message):
    sets = dict(train=Colours(6), test=Colours(6, seed=1)) | change
    with pytest.raises(UserError, match=message):
        probe(small_timm(), sets["train"], sets["test"], progress=False)


def test_image_size_is_asked_for_when_unknown():
    with pytest.raises(ValueError, match="img_size is needed"):
        extract_features(torch.nn.Identity(), Colours(4), progress=False)


# ---- which photograph is this crop from?

class Photos:
    "Three synthetic photographs whose left and right halves never share a value."
    labels = None

    def __init__(self, names=("a", "b", "c")):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def load(self, i):
        if self.names[i] == "broken":
            raise BrokenImage("broken", "damaged")
        rows, columns = np.mgrid[:120, :200]
        stripes = (np.sin((rows, columns, rows + columns)[i % 3] * 0.7) * 50 + 128).astype(np.uint8)
        return Image.fromarray(np.stack([stripes, stripes, np.where(columns < 100, 0, 255).astype(np.uint8)], 2))


def test_half_crops_never_cross_and_are_seeded():
    for half, value in ((0, 0), (1, 255)):
        crops = HalfCrops(Photos(), half, per_photo=12, side=(0.2, 0.9), plain=False)
        assert len(crops) == 36 and crops.labels == [0] * 12 + [1] * 12 + [2] * 12 and crops.class_names == ["a", "b", "c"]
        assert all((np.asarray(crops.load(i))[..., 2] == value).all() for i in range(36))
        assert all(0.19 * 100 <= crops.load(i).width == crops.load(i).height <= 0.91 * 100 for i in range(36))
        again = HalfCrops(Photos(), half, per_photo=12, side=(0.2, 0.9), plain=False)
        assert np.array_equal(crops.load(7), again.load(7)) and not np.array_equal(crops.load(7).resize((9, 9)), crops.load(8).resize((9, 9)))
    plain = np.asarray(HalfCrops(Photos(), 0).load(3))
    assert (plain == plain[..., :1]).all() and plain.min() == 0 and plain.max() == 255


def test_crop_origin_probe():
    rows = crop_origin_probe(small_encoder(), Photos(), small_encoder, per_photo=8, progress=False)
    assert {r.encoder for r in rows} == {"encoder", "untrained", "raw pixels"}
    assert rows[0].tested == rows[0].trained == 24 and rows[0].chance == pytest.approx(1 / 3)
    assert rows == crop_origin_probe(small_encoder(), Photos(), small_encoder, per_photo=8, progress=False)
    assert crop_origin_probe(small_encoder(), Photos(("a", "broken", "c")), per_photo=4, progress=False)[0].classes == 2
    for few in (("a",), ("a", "broken")):
        with pytest.raises(UserError, match="at least two"):
            crop_origin_probe(small_encoder(), Photos(few), progress=False)


def test_public_names_stay():
    assert {"extract_features", "probe", "probe_all", "compare", "crop_origin_probe", "format_table", "ProbeResult", "Features", "ProbeConfig"} <= set(probes.__all__)
