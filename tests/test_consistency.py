"""Scores of views: the three cosines against loops, the ruler against known pairs, and the filter where the answer is known."""
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_repro.analysis import consistency, view_filter, view_scores
from mae_repro.analysis.consistency import global_similarity, local_similarity, match_figure, nearest_patch_similarity, nearest_patches, place_colours, view_tokens
from mae_repro.analysis.view_filter import BagScores, choose, classify_views, format_keep, keep_both, keep_figure, keep_report, open_classifier, score_views
from mae_repro.analysis.view_scores import ScoreConfig, centre_square, encoder_size, format_table, item_intervals, pair_source, parse_source, score_source, score_sources, summarise
from mae_repro.evaluation.propagation import patch_features
from mae_repro.methods.catalogue import open_encoder, to_timm
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.patches import normalise
from mae_repro.parts.positions import GridRotation
from mae_repro.parts.weights import UserError, data_dir
from mae_repro.views.bags import open_bags
from mae_repro.views.pairs import Crop, drawn
from mae_repro.views.photos import BrokenImage, open_images
from mae_repro.views.scenes import Scenes

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
METRICS = (global_similarity, local_similarity, nearest_patch_similarity)


pytestmark = pytest.mark.usefixtures("one_thread")


def two_views(b=3, l=16, d=24, seed=0, other=None):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, 1 + l, d, generator=g), torch.randn(b, 1 + (other or l), d, generator=g)


def scores(a, b):
    return torch.stack([metric(a, b) for metric in METRICS])


def brute(a, b):
    "Equations 1 to 3 in float64, one cosine at a time."
    def cos(u, v):
        return float(np.dot(u, v) / math.sqrt(np.dot(u, u) * np.dot(v, v)))
    found = []
    for u, v in zip(a.double().numpy(), b.double().numpy()):
        table = [[cos(u[i], v[j]) for j in range(1, len(v))] for i in range(1, len(u))]
        ls = np.mean([table[i][i] for i in range(len(table))]) if len(u) == len(v) else math.nan
        found.append((cos(u[0], v[0]), ls, np.mean([max(row) for row in table]), [int(np.argmax(row)) for row in table]))
    return found


# ---------------------------------------------------------------- the three cosines

def test_reference_vectors():
    path = SHARED / "golden/evaluation/consistency.safetensors"
    if not path.is_file():
        pytest.skip("needs golden/evaluation/consistency.safetensors (MAE_REPRO_SHARED)")
    v = load_file(path)
    a, b = v["in/v1"], v["in/v2"]
    for found, key in ((global_similarity(a, b), "GS"), (local_similarity(a, b), "LS"), (nearest_patch_similarity(a, b), "NPS_12"), (nearest_patch_similarity(b, a), "NPS_21")):
        torch.testing.assert_close(found, v[f"out/{key}"], atol=1e-6, rtol=0)
    assert not torch.allclose(v["out/NPS_12"], v["out/NPS_21"], atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_against_loops(seed):
    a, b = two_views(seed=seed)
    ours, (similarity, index) = scores(a, b), nearest_patches(a, b)
    for k, (gs, ls, nps, where) in enumerate(brute(a, b)):
        assert ours[:, k].tolist() == pytest.approx([gs, ls, nps], abs=1e-6)
        assert index[k].tolist() == where
    assert ours.dtype == similarity.dtype == torch.float32 and similarity.shape == index.shape == (3, 16)
    torch.testing.assert_close(similarity.mean(1), ours[2])


def test_views_of_different_sizes():
    a, b = two_views(l=9, other=20)
    assert nearest_patch_similarity(a, b).tolist() == pytest.approx([nps for _, _, nps, _ in brute(a, b)], abs=1e-6)
    assert nearest_patches(a, b)[1].shape == (3, 9) and nearest_patches(b, a)[1].shape == (3, 20)


def test_identities():
    a, b = two_views()
    torch.testing.assert_close(scores(a, a), torch.ones(3, 3), atol=1e-6, rtol=0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = torch.cat([b[:, :1], b[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(scores(a, shuffled)[[0, 2]], scores(a, b)[[0, 2]])
    assert ((local_similarity(a, shuffled) - local_similarity(a, b)).abs() > .01).all()
    torch.testing.assert_close(nearest_patch_similarity(a, torch.cat([a[:, :1], a[:, 1:][:, order]], dim=1)), torch.ones(3))
    assert (nearest_patch_similarity(a, b) >= local_similarity(a, b)).all()
    scale = torch.rand(3, 17, 1, generator=torch.Generator().manual_seed(2)) * 100 + .01
    torch.testing.assert_close(scores(a * scale, b * 1e-3), scores(a, b), atol=1e-5, rtol=0)
    assert ((nearest_patch_similarity(a, b) - nearest_patch_similarity(b, a)).abs() > 5e-4).all()
    changed = torch.cat([torch.randn(3, 1, 24), b[:, 1:]], dim=1)  # the class token is nobody's nearest patch, and nobody's partner
    torch.testing.assert_close(scores(a, changed)[1:], scores(a, b)[1:])


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that any operation makes."
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and not x._is_view() and func is not torch.ops.aten.split.Tensor and x.untyped_storage().nbytes() == x.nbytes:
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("table", [1, 30, 64, 600, 5000])
def test_pieces_change_nothing_and_stay_small(monkeypatch, table):
    a, b = two_views(b=7, l=32, d=8, other=32)
    whole, nearest = scores(a, b), nearest_patches(a, b)[1]
    monkeypatch.setattr(consistency, "TABLE", table)
    with Largest() as seen:
        pieces, index = scores(a, b), nearest_patches(a, b)[1]
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)
    assert torch.equal(index, nearest)
    assert seen.numel <= max(table, 32 * 8), seen.numel  # one sample's tokens at least; never 7 x 32 x 32, nor 7 x 32 x 8
    assert seen.numel >= min(table, 7 * 32), "the watcher saw nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_compared_in_float32(dtype):
    a, b = (x.to(dtype) for x in two_views())
    assert scores(a, b).dtype == torch.float32
    torch.testing.assert_close(scores(a, b), scores(a.float(), b.float()))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scores(a, b), scores(a.float(), b.float()), atol=1e-6, rtol=0)
    big = torch.full((1, 3, 600), 200., dtype=dtype)  # their squares would overflow float16
    torch.testing.assert_close(scores(big, big), torch.ones(3, 1), atol=1e-5, rtol=0)


def test_zeros_are_like_nothing():
    a, b = two_views()
    a[:, 3] = 0
    assert scores(a, b).isfinite().all() and (nearest_patches(a, b)[0][:, 2] == 0).all()


@pytest.mark.parametrize("a, b, metric, words", [
    ((3, 17, 8), (2, 17, 8), nearest_patch_similarity, "not pairs"), ((3, 17, 8), (3, 17, 9), global_similarity, "not pairs"),
    ((3, 17, 8), (3, 10, 8), local_similarity, "16 patches and b 9"), ((17, 8), (17, 8), global_similarity, "a has shape"),
    ((3, 17, 8), (3, 1, 8), nearest_patch_similarity, "b has shape"), ((3, 1, 8), (3, 1, 8), local_similarity, "at least one patch")])
def test_shapes_that_do_not_fit(a, b, metric, words):
    with pytest.raises(ValueError, match=words):
        metric(torch.rand(a), torch.rand(b))


# ---------------------------------------------------------------- tokens of any encoder

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)


def test_tokens_of_ours_and_timms():
    torch.manual_seed(0)
    ours, images = Encoder(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(ours.cls_token)
    other = to_timm(ours)
    for layer in (-3, -1, 0, 1, 2):
        for norm in (True, False):
            found = view_tokens(ours, images, layer, norm)
            torch.testing.assert_close(found, view_tokens(other, images, layer, norm), atol=1e-5, rtol=1e-5)
            raw = ours(images, maps=(layer % 3 + 1,))[1][0]
            torch.testing.assert_close(found, ours.norm(raw) if norm else raw)
    torch.testing.assert_close(view_tokens(ours, images), ours.forward_features(images))
    assert not found.requires_grad
    assert not torch.allclose(view_tokens(ours, images, norm=False), view_tokens(ours, images))


def test_registers_go_and_cls_stays():
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(**SMALL, reg_tokens=4, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    every = vit.forward_features(images)
    assert every.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(view_tokens(vit, images), torch.cat([every[:, :1], every[:, 5:]], dim=1))


def test_tokens_of_timms_eva():
    "DINOv3 of timm: another class, with rotary positions and registers, and without get_intermediate_layers."
    torch.manual_seed(0)
    vit = timm.models.eva.Eva(**SMALL, num_reg_tokens=4, use_rot_pos_emb=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    every = vit.forward_features(images)
    assert not hasattr(vit, "get_intermediate_layers") and every.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(view_tokens(vit, images), torch.cat([every[:, :1], every[:, 5:]], dim=1))
    torch.testing.assert_close(patch_features(vit, images)[0], every[:, 5:])
    assert not torch.allclose(view_tokens(vit, images, 0), view_tokens(vit, images))


def test_the_mean_stands_in_for_a_missing_class_token():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    encoders = [Encoder(**SMALL, class_token=False), Encoder(**SMALL, class_token=False, rotary=GridRotation()),
                timm.models.VisionTransformer(**SMALL, class_token=False, global_pool="", num_classes=0),
                timm.models.VisionTransformer(**SMALL, class_token=False, reg_tokens=2, global_pool="", num_classes=0)]
    for encoder in encoders:
        tokens = view_tokens(encoder.eval(), images)
        assert tokens.shape == (2, 17, 32)
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
        torch.testing.assert_close(tokens[:, 1:], encoder.forward_features(images)[:, -16:])


@pytest.mark.parametrize("layer", [3, -4])
def test_no_such_block(layer):
    with pytest.raises(ValueError, match=f"layer {layer} is not a block"):
        view_tokens(Encoder(**SMALL), torch.zeros(1, 3, 32, 32), layer)


def test_no_encoder():
    with pytest.raises(ValueError, match="Linear has no get_intermediate_layers"):
        view_tokens(nn.Linear(3, 3), torch.zeros(1, 3, 32, 32))


def test_match_figure():
    a, b = two_views(b=1)
    images = torch.rand(2, 3, 32, 32)
    fig = match_figure(images[0], images[1], a[0], b[0])
    assert len(fig.axes) == 6  # five panels and a bar
    painted = fig.axes[4].images[1].get_array()[..., :3]
    expected = place_colours(4, 4).flatten(0, 1)[nearest_patches(a, b)[1][0]].view(4, 4, 3)
    np.testing.assert_allclose(painted, expected.numpy(), atol=1e-6)
    local = fig.axes[2].images[0].get_array()
    assert float(local.mean()) == pytest.approx(float(local_similarity(a, b)), abs=1e-6)
    wide = match_figure((images[0] * 255).byte(), torch.rand(3, 32, 64), a[0], two_views(b=1, l=32)[0][0], patch_size=8)
    assert "grids differ" in wide.axes[2].get_title()
    with pytest.raises(ValueError, match="16 patches of 8, but 9 patch tokens"):
        match_figure(images[0], images[1], a[0, :10], b[0, :10], patch_size=8)
    colours = place_colours(5, 7).flatten(0, 1)
    assert (torch.cdist(colours, colours) + torch.eye(35) > .02).all()  # no two places look alike


# ---------------------------------------------------------------- sources

@pytest.fixture(scope="module")
def tiny():
    return open_encoder(data_dir() / "pretrained/siammae-tiny")


@pytest.fixture
def data(tmp_path):
    "Two videos of eight frames, three bags of different sizes, seven images, all rendered or cut from built-in photographs."
    photos, scenes = open_images(), Scenes(num=5, num_frames=8, size=40, seed=3, supersample=1)
    for i in range(2):
        (folder := tmp_path / f"videos/v{i}").mkdir(parents=True)
        for t, frame in enumerate(scenes.frames(i, range(8))):
            frame.save(folder / f"{t}.png")
    for i, size in enumerate((4, 1, 3)):
        (folder := tmp_path / f"bags/b{i}").mkdir(parents=True)
        for k, frame in enumerate(scenes.frames(2 + i, range(size))):
            frame.save(folder / ("real.png" if k == 0 else f"gen_{k}.png"))
    (tmp_path / "images").mkdir()
    for i in range(7):
        photos.load(i % 5).resize((60, 50)).rotate(90 * (i // 5)).save(tmp_path / f"images/{i}.png")
    return tmp_path


FEW = ScoreConfig(pairs=12, img_size=32)


@pytest.mark.parametrize("text, answer", [("video", ("video", None)), ("bag:x/y", ("bag", Path("x/y"))), ("crop-pair:a:b", ("crop-pair", Path("a:b")))])
def test_sources_are_read(text, answer):
    assert parse_source(text) == answer


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (9, 200)])
def test_centre_is_what_the_fallback_gives(size):
    image = open_images().load(0).resize(size)
    for _ in range(3):
        assert torch.equal(Crop(32, (1, 1), (1, 1), flip=False)([image])[0], centre_square(image, 32))


def test_each_kind_draws_its_pairs(data):
    photos = open_images()
    config = replace(FEW, limit=4)
    same = pair_source("identical", config, 32).draw(1)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], centre_square(photos.load(1), 32))
    strangers = pair_source("random-pair", config, 32).draw(0)
    assert torch.equal(strangers[0], centre_square(photos.load(0), 32)) and any(torch.equal(strangers[1], centre_square(photos.load(i), 32)) for i in (1, 2, 3))
    bags = open_bags(data / "bags").take(np.array([0, 2]))
    (data / "bags/b1/real.png").unlink()
    real = pair_source(f"bag:{data}/bags", config, 32)
    assert len(real) == len(bags)
    for _ in range(5):
        pair = real.draw(0)
        assert torch.equal(pair[0], centre_square(bags.frames(0, [0])[0], 32)) and any(torch.equal(pair[1], centre_square(bags.frames(0, [k])[0], 32)) for k in (1, 2, 3))
    assert not torch.equal(pair_source(f"bag:{data}/bags", replace(config, target="generated"), 32).draw(0)[0], pair[0])
    crops = pair_source("crop-pair", replace(config, strategy="RandomViews"), 32).draw(0)
    assert not torch.equal(crops[0], crops[1])
    train = pair_source("random-pair", replace(config, preprocess="train"), 32)
    assert len({train.draw(0)[0].sum().item() for _ in range(4)}) > 1
    video = pair_source(f"video:{data}/videos", config, 32)
    frames = [centre_square(f, 32) for f in video.videos.frames(0, range(8))]
    for _ in range(5):
        now, before = ([torch.equal(view, f) for f in frames].index(True) for view in video.draw(0))
        assert 4 <= now - before <= 7
    neighbour = pair_source(f"neighbour:{data}/images", replace(config, limit=None, neighbours=1, embed=str(data_dir() / "pretrained/siammae-tiny")), 32)
    assert neighbour.neighbours.shape == (7, 1) and neighbour.draw(0).shape == (2, 3, 32, 32)


def test_score_source_against_pairs_scored_one_by_one(tiny, data):
    found = score_source(tiny, f"video:{data}/videos", FEW)
    source = pair_source(f"video:{data}/videos", FEW, 32)
    for p in range(12):
        views = drawn(source, p, 0, item=p // 6)
        tokens = view_tokens(tiny, normalise(views))
        gs, ls, ab, _ = brute(tokens[:1], tokens[1:])[0]
        ba = brute(tokens[1:], tokens[:1])[0][2]
        assert [getattr(found, m)[p] for m in view_scores.METRICS] == pytest.approx([gs, ls, (ab + ba) / 2, ab, ba], abs=1e-5)
    assert found.item == [0] * 6 + [1] * 6 and found.skipped == 0 and found.settings["img_size"] == 32
    json.dumps(asdict(found), allow_nan=False)


def test_no_result_depends_on_batches_or_workers(tiny, data):
    source = f"video:{data}/videos"
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other = (score_source(tiny, source, replace(FEW, batch_size=size, workers=workers, preprocess="train")) for size, workers in ((1, 0), (7, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    for m in view_scores.METRICS:
        assert getattr(one, m) == pytest.approx(getattr(other, m), abs=1e-5)
    assert one.distinct == other.distinct > 6
    assert score_source(tiny, source, replace(FEW, seed=1, preprocess="train")).gs != pytest.approx(one.gs, abs=1e-5)
    assert not tiny.training


def test_the_order_of_known_sources(tiny):
    "Rendered scenes and the photographs they are painted with: one picture twice, frames of a scene, strangers; trained or not, by NPS and LS and GS."
    config = ScoreConfig(pairs=60, limit=10, img_size=64)
    rows = score_sources(tiny, ["identical", "video", "random-pair"], config)
    same, video, strangers = rows
    for m in view_scores.METRICS:
        assert same.scores[m] == pytest.approx(1, abs=1e-4) and .999 > video.scores[m] > strangers.scores[m] + .02, m
    assert same.intervals["nps"] == pytest.approx((1, 1), abs=1e-4)
    assert video.intervals["nps"][0] > strangers.intervals["nps"][1]
    assert video.distance == 0 and same.distance == pytest.approx(math.dist([1, 1, 1], [video.scores[m] for m in ("gs", "ls", "nps")]), abs=1e-4)
    assert strangers.difference["ls"] == pytest.approx(strangers.scores["ls"] - video.scores["ls"])
    text = format_table(rows)
    assert ".600" in text and "distance: from video" in text and "distinct" in text.splitlines()[2]  # five photographs, drawn 60 times
    json.dumps([asdict(r) for r in rows], allow_nan=False)


def test_layer_and_norm_matter(tiny):
    config = ScoreConfig(pairs=10, limit=4, img_size=64)
    found = [score_source(tiny, "random-pair", replace(config, layer=layer, norm=norm)).ls for layer in (0, -1) for norm in (True, False)]
    assert all(np.abs(np.subtract(a, b)).max() > 1e-3 for i, a in enumerate(found) for b in found[:i])
    assert score_source(tiny, "random-pair", replace(config, layer=5)).ls == pytest.approx(found[2], abs=1e-6)


def test_intervals_draw_items():
    random = np.random.default_rng(1)
    items = np.repeat(np.arange(8), 50)
    values = (random.normal(size=8)[items] + .01 * random.normal(size=400))[:, None]  # pairs of one item say the same
    low, high = item_intervals(values, items)[:, 0]
    means = values.reshape(8, 50).mean(1)
    expected = np.percentile([random.choice(means, 8).mean() for _ in range(4000)], (2.5, 97.5))
    assert (low, high) == pytest.approx(tuple(expected), abs=.08) and high - low > 5 * 2 * 1.96 * values.std() / 20
    np.testing.assert_array_equal(item_intervals(values, items), item_intervals(values, items))
    assert np.isnan(item_intervals(values[:50], items[:50])).all()
    uneven = item_intervals(np.array([[0.], [1], [1], [1]]), [3, 9, 9, 9])[:, 0]
    assert uneven.tolist() == [0, 1]
    order = random.permutation(400)
    np.testing.assert_allclose(item_intervals(values[order], items[order]), item_intervals(values, items))


def test_one_item_has_no_interval_and_a_plain_row(tiny, data):
    rows = score_sources(tiny, [f"video:{data}/videos"], replace(FEW, limit=1))
    assert rows[0].items == 1 and all(math.isnan(v) for pair in rows[0].intervals.values() for v in pair)
    assert "nan" not in format_table(rows)


def test_unreadable_items_are_counted_and_named(tiny, data):
    (data / "images/3.png").write_bytes(b"no picture")
    found = score_source(tiny, f"random-pair:{data}/images", replace(FEW, pairs=28))
    assert 4 <= found.skipped < 28 and len(found.gs) == 28 - found.skipped == len(found.item)
    assert 3 not in found.item and set(found.item) == {0, 1, 2, 4, 5, 6}
    assert len(found.broken) == 1 and "3.png" in found.broken[0]
    assert "could not be read" in format_table(summarise([found])) and np.isfinite(found.nps).all()
    for path in (data / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 12 pairs can be read; the first: .*empty"):
        score_source(tiny, f"identical:{data}/images", FEW)


@pytest.mark.parametrize("sources, change, words", [
    (["photo:x"], {}, "no kind 'photo'"), (["video:"], {}, "no folder after the colon"), (["video:not/there"], {}, "not/there is missing"), ([], {}, "no sources"),
    (["neighbour"], {}, "need an encoder"), (["video"], dict(pairs=0), "pairs 0"), (["video"], dict(batch_size=0), "batch_size 0"), (["video"], dict(img_size=30), "not a multiple of patch_size 8: give 32"),
    (["video"], dict(layer=6), "layer 6 is not a block"), (["video"], dict(gap=(4, 4)), "gap 4 4"), (["identical", "not a kind"], {}, "no kind"), (["video"], dict(limit=0), "limit 0"),
    (["random-pair"], dict(limit=1), "draws 2 different images")])
def test_bad_sources_and_settings(tiny, sources, change, words):
    with pytest.raises(UserError, match=words) as error:
        score_sources(tiny, sources, replace(FEW, limit=4, **change) if "limit" not in change else replace(FEW, **change))
    assert "\n" not in str(error.value)


def test_bad_data_of_a_kind(tiny, data):
    (data / "none").mkdir()
    for kind, words in (("bag", "no bags in"), ("video", "no videos in"), ("identical", "no images in")):
        with pytest.raises(UserError, match=words):
            score_source(tiny, f"{kind}:{data}/none", FEW)
    with pytest.raises(UserError, match="1 picture"):
        pair_source(f"bag:{data}/bags", FEW, 32)  # one bag holds its real image only
    with pytest.raises(UserError, match="reference 'bag' is none"):
        score_sources(tiny, ["video"], FEW, reference="bag")


def test_sizes_of_encoders():
    assert encoder_size(Encoder(**SMALL)) == 32 and encoder_size(Encoder(**SMALL | dict(img_size=(32, 64)))) == 32
    assert encoder_size(timm.models.VisionTransformer(**SMALL)) == 32


def test_results_in_the_repository():
    "data/results/consistency.json holds what the notebook shows, and names nobody's folders."
    path = data_dir() / "results/consistency.json"
    if not path.is_file():
        pytest.skip("needs data/results/consistency.json, which the wheel does not carry")
    text = path.read_text()
    assert len(text) < 60_000 and not any(f"/{home}/" in text for home in ("home", "root", "tm" "p", "wo" "rk"))
    found = json.loads(text)
    assert {"date", "commit", "device", "command"} <= found.keys() | found["runs"][0].keys()
    for run in found["runs"]:
        nps = {row["kind"]: row["scores"]["nps"] for row in run["rows"]}
        assert nps["identical"] > nps["video"] > nps["random-pair"], run["encoder"]


# ---------------------------------------------------------------- the filter

class Fake(nn.Module):
    "An encoder of 32 x 32 images whose only patch features are (red, green), so that cosines are known from colours."
    img_size, patch_size, num_prefix_tokens = 32, 16, 1

    def __init__(self):
        super().__init__()
        self.cls_token, self.blocks = nn.Parameter(torch.zeros(1)), nn.ModuleList([nn.Identity()])

    def get_intermediate_layers(self, images, n=1, reshape=False, return_class_token=False, norm=True):
        from mae_repro.parts.patches import denormalise, patchify
        patches = patchify(denormalise(images), 16).unflatten(-1, (256, 3)).mean(-2)[..., :2]
        return ((patches, patches.mean(1)),)


class FakeClassifier(nn.Module):
    "Logits are the mean red, green and blue."
    def forward(self, images):
        return images.mean((2, 3))


def angle(degrees, blue=0):
    "A picture whose (red, green) points that way: the cosine of two is that of their difference."
    return (round(250 * math.cos(math.radians(degrees))), round(250 * math.sin(math.radians(degrees))), blue)


def bag_folder(root, name, colours):
    (folder := root / name).mkdir(parents=True)
    for k, colour in enumerate(colours):
        Image.new("RGB", (40, 32), colour).save(folder / ("real.png" if k == 0 else f"gen_{k}.png"))
    return folder


@pytest.fixture
def bags(tmp_path):
    bag_folder(tmp_path, "a", [angle(0), angle(60), angle(0), angle(30)])
    bag_folder(tmp_path, "b", [angle(45)])
    bag_folder(tmp_path, "c", [angle(90), angle(80), angle(0), angle(80), angle(90), angle(45)])
    return open_bags(tmp_path)


def test_scores_of_views_that_are_known(bags):
    found = score_views(Fake(), bags, batch_size=2)
    assert found.sizes == [4, 1, 6] and not found.broken and [Path(n).name for n in found.names] == ["a", "b", "c"]
    expected = [[60, 0, 30], [], [10, 90, 10, 0, 45]]
    for m in view_scores.METRICS:
        for row, angles in zip(found.values[m], expected):
            assert row == pytest.approx([math.cos(math.radians(x)) for x in angles], abs=.01), m
    one = score_views(Fake(), bags, batch_size=1)
    assert all(x == pytest.approx(y, abs=1e-6) for x, y in zip(one.values["nps"], found.values["nps"]))
    json.dumps(asdict(found), allow_nan=False)


def test_directions_of_the_scores(tmp_path):
    "A view that is half the real image: all of it is found in the real one, half of the real one in it."
    (tmp_path / "a").mkdir()
    real = np.zeros((32, 32, 3), np.uint8)
    real[:16], real[16:] = angle(0), angle(90)
    Image.fromarray(real).save(tmp_path / "a/real.png")
    Image.new("RGB", (32, 32), angle(0)).save(tmp_path / "a/gen_1.png")
    found = score_views(Fake(), open_bags(tmp_path)).values
    assert [found[m][0][0] for m in ("nps_ab", "nps_ba", "nps", "ls", "gs")] == pytest.approx([.5, 1, .75, .5, math.sqrt(.5)], abs=.01)


def test_choosing(bags):
    found = score_views(Fake(), bags)
    assert choose(found, at_least=.8) == [[0, 2, 3], [0], [0, 1, 3, 4]]
    assert choose(found, at_least=.8, at_most=.99) == [[0, 3], [0], [0, 1, 3]]  # no copies
    assert choose(found, at_most=.1) == [[0], [0], [0, 2]]
    assert choose(found, best=1) == [[0, 2], [0], [0, 4]]
    assert choose(found, best=2) == [[0, 2, 3], [0], [0, 1, 4]]  # views 1 and 3 of c are equal: the first of them
    assert choose(found, best=1, at_most=.99) == [[0, 3], [0], [0, 1]]
    assert choose(found, best=99) == [[0, 1, 2, 3], [0], [0, 1, 2, 3, 4, 5]]
    assert choose(found, by="gs", at_least=.999) == [[0, 2], [0], [0, 4]]
    exact = found.values["nps"][0][0]
    assert 1 in choose(found, at_least=exact)[0] and 1 in choose(found, at_most=exact)[0]  # both ends belong to it


@pytest.mark.parametrize("rule, words", [
    (dict(), "nothing says"), (dict(by="beauty", best=1), "no score 'beauty': choose by gs"), (dict(best=0), "best 0"), (dict(at_least=.9, at_most=.1), "no view can be both"),
    (dict(at_least=1.5), "no view would be kept: nps at_least 1.5, at_most None, and the scores lie in"), (dict(at_least=math.nan), "no view can be both")])
def test_bad_rules(bags, rule, words):
    with pytest.raises(UserError, match=words) as error:
        choose(score_views(Fake(), bags), **rule)
    assert "\n" not in str(error.value)


def test_broken_pictures(bags, tmp_path):
    (tmp_path / "a/gen_2.png").write_bytes(b"")
    (tmp_path / "c/real.png").write_bytes(b"no picture")
    found = score_views(Fake(), bags)
    assert [(b["bag"], b["picture"]) for b in found.broken] == [(0, 2), (2, 0)] and "gen_2.png" in found.broken[0]["reason"] and found.lost == {2}
    assert math.isnan(found.values["nps"][0][1]) and all(map(math.isnan, found.values["nps"][2])) and found.sizes == [4, 1, 6]
    kept = choose(found, at_least=.4)
    assert kept == [[0, 1, 3], [0], []]
    report = keep_report(kept, found.sizes)
    assert (report.images, report.dropped, report.views, report.kept) == (3, 1, 8, 2) and "1 of 3 images dropped" in format_keep(report)
    (tmp_path / "a/gen_3.png").unlink()  # fewer pictures than when the bags were opened
    assert (0, 3) in [(b["bag"], b["picture"]) for b in score_views(Fake(), bags).broken]
    for name in "abc":
        (tmp_path / name / "real.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 bags has a real image"):
        score_views(Fake(), bags)


def test_classes_that_are_known(tmp_path):
    bag_folder(tmp_path, "a", [(200, 100, 0), (200, 0, 100), (100, 200, 0), (50, 100, 200), (100, 100, 0)])
    found = classify_views(FakeClassifier(), open_bags(tmp_path), topk=2, transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
    assert found.values["rank"] == [[1, 2, 3, 1]] and found.values["same_class"] == [[1, 1, 0, 1]]  # a tie counts as first
    assert choose(found, by="same_class", at_least=1) == [[0, 1, 2, 4]] == choose(found, by="rank", at_most=2)
    assert choose(found, by="rank", best=1) == [[0, 1]]
    with pytest.raises(UserError, match="topk 4 must be in 1..3"):
        classify_views(FakeClassifier(), open_bags(tmp_path), topk=4)


def test_two_rules_together(bags):
    found = score_views(Fake(), bags)
    assert keep_both(choose(found, at_least=.8), choose(found, at_most=.99)) == choose(found, at_least=.8, at_most=.99)
    assert keep_both([[0, 1], []], [[0, 1, 2], [0, 1]]) == [[0, 1], []]
    with pytest.raises(UserError, match="no view is kept by all rules"):
        keep_both([[0, 1]], [[0, 2]])


def test_report_counts(bags):
    kept = choose(score_views(Fake(), bags), at_least=.8)
    report = keep_report(kept, bags.sizes)
    assert (report.images, report.views, report.kept, report.share) == (3, 8, 5, 5 / 8)
    assert report.at_least == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 1 / 3, 4: 0, 5: 0})
    assert "5 of 8 views kept (62.5%)" in format_keep(report) and "3 or more" in format_keep(report)
    json.dumps(asdict(report))
    with pytest.raises(ValueError, match="2 choices for 3 bags"):
        keep_report(kept[:2], bags.sizes)


def test_threshold_figure(bags):
    found = score_views(Fake(), bags)
    lines = {line.get_label(): line.get_xydata() for line in keep_figure(found, at_most=.999, at_least=.5).axes[1].lines}
    views = lines["views"]
    for at, share in views[:-1]:
        assert share == pytest.approx(sum(at <= s <= .999 for row in found.values["nps"] for s in row) / 8)
    assert views[-1, 1] == 0
    with pytest.raises(UserError, match="of at most -2"):
        keep_figure(found, at_most=-2)


def test_real_encoder_prefers_frames_of_the_scene(tiny, tmp_path):
    "Bags of frames with a stranger among them: the stranger is the one that goes."
    scenes, photo = Scenes(num=3, num_frames=4, size=64, seed=11), open_images().load(2)
    for i in range(3):
        folder = bag_folder(tmp_path, f"s{i}", [(0, 0, 0)])
        for k, frame in enumerate([*scenes.frames(i, range(4)), photo]):
            frame.save(folder / ("real.png" if k == 0 else f"gen_{k}.png"))
    assert choose(score_views(tiny, open_bags(tmp_path)), best=3) == [[0, 1, 2, 3]] * 3


def test_no_bags():
    class Nothing:
        def __len__(self): return 0
    with pytest.raises(UserError, match="no bags to score"):
        score_views(Fake(), Nothing())


@pytest.mark.parametrize("change, words", [(dict(img_size=20), "not a multiple of patch_size 16"), (dict(layer=1), "layer 1 is not a block")])
def test_bad_settings_of_the_filter(bags, change, words):
    with pytest.raises(UserError, match=words):
        score_views(Fake(), bags, **change)


def test_classifiers_of_timm(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    opened, transform = open_classifier(f"test_vit={tmp_path / 'w.pth'}")
    x = transform(open_images().load(0))
    assert torch.equal(opened(x[None]), model.eval()(x[None])) and not opened.training
    torch.save({k: v for k, v in model.state_dict().items() if "head" not in k}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not fit test_vit: 2 missing"):
        open_classifier(f"test_vit={tmp_path / 'bare.pth'}")
    with pytest.raises(UserError, match="no model of timm"):
        open_classifier("no_such_net")
    with pytest.raises(UserError, match="no such file"):
        open_classifier(f"test_vit={tmp_path / 'none.pth'}")

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand a long story")
    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr(view_filter, "impatient_hub", lambda: __import__("contextlib").nullcontext())
    with pytest.raises(UserError, match="could not load it .OSError: We couldn't connect to the hub.*test_vit=PATH") as error:
        open_classifier("test_vit")
    assert "\n" not in str(error.value)


def test_a_length_that_cannot_be_known():
    class Odd:
        def __len__(self): return 2
        def name(self, i): return f"bag {i}"
        def length(self, i):
            if i: raise BrokenImage("bag 1", "gone")
            return 2
        def frames(self, i, ids): return [Image.new("RGB", (32, 32), angle(0)) for _ in ids]
    found = score_views(Fake(), Odd())
    assert found.lost == {1} and found.sizes == [2, 1] and choose(found, best=1) == [[0, 1], []]


def test_scores_can_come_from_json():
    "What the command line keeps and reads again."
    found = BagScores(["a"], [3], {"nps": [[.5, .9]]}, [])
    assert choose(BagScores(**json.loads(json.dumps(asdict(found)))), best=1) == [[0, 2]]
