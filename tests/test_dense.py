"Dense and attentive probes: truth of rendered scenes, readers of real layouts, scores by brute force, the sweep, perfect features, bad input."
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

from mae_repro.evaluation.attentive import AttentiveConfig, AttentiveHeads, attentive_compare, attentive_predict, attentive_probe, fit_attentive
from mae_repro.evaluation.dense import (Classes, DenseConfig, Depth, DPTMaps, FrozenTokens, LinearMaps, Normals, dense_compare, dense_figure, dense_probe, dense_size, fit_maps,
                                        format_table, held_out, intervals, knn_reader, token_statistics)
from mae_repro.evaluation.pair_data import posed_splits
from mae_repro.evaluation.propagation import patch_features
from mae_repro.evaluation.dense_maps import (EIGEN_CROP, TASKS, DenseSet, class_counts, class_scores, depth_errors, normal_errors, normals_from_depth, open_maps, posed_maps,
                                             remembered, rendered_things)
from mae_repro.methods.catalogue import open_encoder
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.weights import UserError
from mae_repro.views.layouts import write_layout
from mae_repro.views.photos import BrokenImage
from mae_repro.views.posed import RenderedScenes, SceneFolders
from mae_repro.views.scenes import render
from miniatures import write_ade20k, write_nyu

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = dict(progress=False)


def small_encoder(depth=4, img_size=32):
    torch.manual_seed(0)
    return Encoder(img_size=img_size, patch_size=8, embed_dim=24, depth=depth, num_heads=2).eval()


# ---- normals

def test_normals_of_a_plane_are_exact():
    rand = np.random.default_rng(0)
    K = np.array([[80., 0, 21], [0, 90, 14], [0, 0, 1]])
    rays = np.stack([*np.meshgrid(np.arange(40), np.arange(30)), np.ones((30, 40))], -1) @ np.linalg.inv(K).T
    for _ in range(5):
        n = np.append(rand.normal(0, .6, 2), -1.)
        n /= np.linalg.norm(n)
        depth = -3 / (rays @ n)                  # the plane n . P = -3
        found = normals_from_depth(depth, K)
        assert np.abs(found[:, 1:-1, 1:-1] - n[:, None, None]).max() < 1e-5
        assert not found[:, 0].any() and not found[..., -1].any()


def test_normals_of_a_sphere():
    K, radius, centre = np.array([[200., 0, 40], [0, 200, 40], [0, 0, 1]]), 1., np.array([0, 0, 6.])
    rays = np.stack([*np.meshgrid(np.arange(81), np.arange(81)), np.ones((81, 81))], -1) @ np.linalg.inv(K).T
    a, b = (rays ** 2).sum(-1), -2 * rays @ centre
    root = b * b - 4 * a * (centre @ centre - radius ** 2)
    depth = np.where(root > 0, (-b - np.sqrt(root.clip(0))) / (2 * a), 0)
    truth = (rays * depth[..., None] - centre) / radius
    found = normals_from_depth(depth, K)
    known = np.abs(found).sum(0) > 0
    assert known.sum() > .8 * (depth > 0).sum() and not known[depth == 0].any()
    angle = np.degrees(np.arccos((found[:, known].T * truth[known]).sum(-1).clip(-1, 1)))
    assert np.median(angle) < .2 and angle.max() < 8


def test_normals_of_rendered_scenes_are_those_of_flat_rooms():
    scene = render((5, 0), 2, 96, still=True)
    found = normals_from_depth(scene.depth[0], scene.K)
    room = (scene.ids[0] == 0) & (np.abs(found).sum(0) > 0)
    assert room.mean() > .4
    # a room is a box: in the axes of the world each of its normals is, up to sign, one of three directions that are at right angles
    n = found[:, room].T @ scene.R[0]
    first = n[0]
    parallel = np.abs(n @ first)
    assert ((parallel > .995) | (parallel < .1)).mean() > .95
    assert np.isclose(np.linalg.norm(n, axis=1), 1, atol=1e-5).all()
    rays = np.stack([*np.meshgrid(np.arange(96), np.arange(96)), np.ones((96, 96))], -1) @ np.linalg.inv(scene.K).T
    assert ((found.transpose(1, 2, 0) * rays).sum(-1)[np.abs(found).sum(0) > 0] < 0).all()     # all of them face the camera


def test_edges_and_holes_have_no_normal():
    depth = np.full((20, 20), 2.)
    depth[:, 10:], depth[5, 5] = 4., 0
    known = np.abs(normals_from_depth(depth, np.diag([50., 50, 1]))).sum(0) > 0
    assert not known[:, 9:11].any() and known[1:4, 1:9].all()
    assert not known[[5, 4, 6, 5, 5], [5, 5, 5, 4, 6]].any() and known[4, 4]


# ---- scores against loops over pixels

def test_depth_errors_by_a_loop():
    rand = torch.Generator().manual_seed(0)
    pred, truth = (torch.rand(1, 7, 9, generator=rand) * 4 + .5 for _ in range(2))
    truth[0, :3] = 0
    for scaling in (False, True):
        pairs = [(p, z) for p, z in zip(pred.flatten().tolist(), truth.flatten().tolist()) if z > 0]
        scale = sorted(z for _, z in pairs)[(len(pairs) - 1) // 2] / sorted(p for p, _ in pairs)[(len(pairs) - 1) // 2] if scaling else 1
        wanted = [math.sqrt(sum((p * scale - z) ** 2 for p, z in pairs) / len(pairs)), sum(abs(p * scale - z) / z for p, z in pairs) / len(pairs),
                  sum(max(p * scale / z, z / p / scale) < 1.25 for p, z in pairs) / len(pairs), 1]
        assert np.allclose(depth_errors(pred, truth, scaling), wanted, atol=1e-6)
    assert depth_errors(pred, truth * 0) is None
    assert np.allclose(depth_errors(truth.clamp(min=1) * 3, truth.clamp(min=1), True), [0, 0, 1, 1], atol=1e-6)


def test_normal_errors_by_a_loop():
    rand = torch.Generator().manual_seed(0)
    pred, truth = (F.normalize(torch.randn(3, 6, 5, generator=rand), dim=0) for _ in range(2))
    truth[:, 0] = 0
    angles = [math.degrees(math.acos(max(-1, min(1, (pred[:, i, j] @ truth[:, i, j]).item())))) for i in range(1, 6) for j in range(5)]
    wanted = [np.mean(angles), sorted(angles)[(len(angles) - 1) // 2], np.sqrt(np.mean(np.square(angles))), *(np.mean(np.array(angles) < d) for d in (11.25, 22.5, 30)), 1]
    assert np.allclose(normal_errors(pred, truth), wanted, atol=1e-3)
    assert np.allclose(normal_errors(truth, truth), [0, 0, 0, 1, 1, 1, 1], atol=1e-4) and normal_errors(pred, truth * 0) is None


def test_class_scores_by_a_loop():
    rand = torch.Generator().manual_seed(0)
    said, true = torch.randint(0, 4, (3, 8, 9), generator=rand), torch.randint(-1, 3, (3, 8, 9), generator=rand)
    scores = class_scores(sum(class_counts(a, b, 5) for a, b in zip(said, true)))
    ious, right, pixels = [], 0, 0
    for c in range(5):
        both = either = 0
        for p, t in zip(said.flatten().tolist(), true.flatten().tolist()):
            both, either = both + (t >= 0 and p == c == t), either + (t >= 0 and (p == c or t == c))
        if either:
            ious.append(both / either)
    for p, t in zip(said.flatten().tolist(), true.flatten().tolist()):
        right, pixels = right + (p == t), pixels + (t >= 0)
    assert len(ious) == 4 and np.isclose(scores["miou"], np.mean(ious)) and np.isclose(scores["accuracy"], right / pixels)
    assert class_counts(said[0], true[0] * 0 - 1, 5) is None


def test_intervals_are_drawn_by_group():
    answer = Depth([torch.tensor([1., 2.])], DenseConfig(bins=4))
    measured = np.concatenate([np.random.default_rng(0).random((12, 3)), np.ones((12, 1))], 1)
    point, low, high = intervals(answer, measured, ["a"] * 6 + ["b"] * 6, 500)
    assert np.isclose(point["rmse"], measured[:, 0].mean())
    ends = sorted([measured[:6, 0].mean(), measured[6:, 0].mean()])
    assert np.isclose(low["rmse"], ends[0]) and np.isclose(high["rmse"], ends[1])             # two groups: a resample is one, the other, or both
    assert intervals(answer, measured[:1], ["a"], 500)[1:] == ({"rmse": None, "absrel": None, "delta1": None},) * 2
    one = intervals(answer, measured, ["a"] * 12, 500)
    assert one[1]["rmse"] < point["rmse"] < one[2]["rmse"]


# ---- readers

def test_rendered_scenes_and_their_folders_tell_the_same(tmp_path):
    write_layout("scene", tmp_path, num=2, num_frames=3, size=(48, 64), seed=1)
    folders = SceneFolders(tmp_path)
    train, test = open_maps(tmp_path, "depth", frames=2)
    assert (len(train), len(test)) == (2, 2) and not set(train.groups) & set(test.groups)
    image, depth = test.load(0, (24, 32))
    frame = folders.frame(1, 0)
    assert image.size == (32, 24) and np.array_equal(depth[0], frame.resized((24, 32)).depth)
    normals = open_maps(tmp_path, "normals", frames=2)[1].load(0, (48, 64))[1]
    assert normals.shape == (3, 48, 64) and np.array_equal(normals, normals_from_depth(frame.depth, frame.K))
    masks = open_maps(tmp_path, "segmentation")[0].load(0, (48, 64))[1]
    assert masks.dtype == np.int64 and masks.max() > 0


def test_things_of_rendered_scenes():
    scenes = RenderedScenes(3, 2, 48)
    things = rendered_things(scenes, 1, 1)
    parts, ids = scenes.scene(1).parts[1], scenes.scene(1).ids[1]
    assert np.array_equal(things == 0, ids == 0) and np.array_equal(things == 1, ids == 1) and np.array_equal(things == 3, parts == 12)
    train, test = posed_maps(scenes, "segmentation", 2)
    assert set(train.groups) == {scenes.name(0), scenes.name(1)} and set(test.groups) == {scenes.name(2)} and len(test) == 2


def test_ade20k(tmp_path):
    write_ade20k(tmp_path)
    train, test = open_maps(tmp_path, "segmentation", "ade20k")
    image, truth = train.load(1, (18, 24))
    assert (len(train), len(test), len(train.classes)) == (4, 4, 150) and image.size == (24, 18)
    assert truth[0, 0, 0] == -1 and truth[0, 1, 0] == 149 and truth[0, 10, 3] == -1 and truth[0, 10, 20] == 1
    assert train.load(1, (9, 12))[1].shape == (1, 9, 12)
    assert len(open_maps(tmp_path, "segmentation-knn", "ade20k", limit=2)[0]) == 2
    Image.new("RGB", (24, 18)).save(tmp_path / "annotations/training/ADE_0.png")
    with pytest.raises(BrokenImage, match="and its picture"):
        train.load(0, (18, 24))
    (tmp_path / "annotations/training/ADE_0.png").unlink()
    row, _ = dense_probe(small_encoder(), train, test, "segmentation-knn", DenseConfig(img_size=(16, 24)), **quiet)
    assert (row.trained, row.tested, row.skipped) == (3, 4, 1)


def test_voc(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    labels = np.array([[0, 255], [20, 1]], np.uint8).repeat(4, 0).repeat(4, 1)
    for name in ("2007_1", "2007_2"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        png = Image.fromarray(labels, "P")
        png.putpalette(bytes(range(256)) * 3)
        png.save(tmp_path / f"SegmentationClass/{name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_1\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_2\n")
    train, test = open_maps(tmp_path, "segmentation", "voc")
    assert train.load(0, (8, 8))[1][0, ::4, ::4].tolist() == [[0, -1], [20, 1]] and len(test) == 1 and len(train.classes) == 21


def test_nyu(tmp_path):
    write_nyu(tmp_path)
    train, test = open_maps(tmp_path, "depth", "nyu")
    assert len(train) == len(test) == 1 and train.load(0, (480, 640))[1][0, 0, [0, -1]].tolist() == [1.5, 3.]
    cropped = test.load(0, (480, 640))[1][0]
    assert (cropped[EIGEN_CROP] > 0).all() and (cropped > 0).sum() == 426 * 560
    normals = open_maps(tmp_path, "normals", "nyu")[0].load(0, (240, 320))[1]
    assert np.allclose(normals[:, 100, 50], [0, 0, -1], atol=1e-6) and not normals[:, 100, 160].any()


# ---- heads

def told(size=16, patch=8, n=20, seed=0):
    "Pictures of patches, black or red by chance, whose class is what is red."
    def load(i, wanted):
        cells = np.random.default_rng((seed, i)).integers(0, 2, [s // patch for s in wanted]).repeat(patch, 0).repeat(patch, 1)
        return Image.fromarray(np.stack([cells * 255] * 3, -1).astype(np.uint8)), cells[None]
    names = tuple(map(str, range(n)))
    return DenseSet(names, names, load)


class Teller(nn.Module):
    "The token of a patch is what is true of its middle: a perfect feature."
    num_prefix_tokens, patch_size, img_size = 0, 8, (64, 64)

    def forward_features(self, images):
        return F.one_hot((images[:, 0, 4::8, 4::8] > 0).long().flatten(1), 2).float()


@pytest.mark.parametrize("task", ["segmentation", "segmentation-knn"])
def test_a_perfect_feature_gives_a_perfect_score(task):
    toy = told(64)
    row, said = dense_probe(Teller(), toy.take(range(12)), toy.take(range(12, 20)), task, DenseConfig(steps=100, lrs=(.03, .1)), **quiet)
    assert row.metrics["miou"] > .9 and row.metrics["accuracy"] > .95 and list(said) == [0, 1, 2]
    assert row.low["miou"] <= row.metrics["miou"] <= row.high["miou"] and row.groups == 8
    mute = replace(toy, load=lambda i, size: (Image.new("RGB", size[::-1]), toy.load(i, size)[1]))       # nothing to see: the classes are chance
    row, _ = dense_probe(Teller(), mute.take(range(12)), mute.take(range(12, 20)), task, DenseConfig(steps=100, lrs=(.03,)), **quiet)
    assert row.metrics["accuracy"] < .6


class Slopes(nn.Module):
    "The token of a patch is the depth in its middle, which the red channel holds."
    num_prefix_tokens, patch_size, img_size = 0, 8, (64, 64)

    def forward_features(self, images):
        return torch.stack([images[:, 0, 4::8, 4::8].flatten(1), torch.ones_like(images[:, 0, 4::8, 4::8].flatten(1))], -1)


def test_depth_is_read_from_a_feature_that_tells_it():
    def load(i, size):
        a, b, c = np.random.default_rng(i).uniform(.2, .8, 3)
        y, x = np.mgrid[:size[0], :size[1]] / size[0]
        grey = (a + b * x * .3 - c * y * .3).clip(.02, 1)
        return Image.fromarray(np.repeat((grey * 255).astype(np.uint8)[..., None], 3, 2)), (grey * 5 + 1)[None].astype(np.float32)
    names = tuple(map(str, range(24)))
    data = DenseSet(names, names, load)
    config = DenseConfig(steps=250, bins=16, lrs=(1e-2, 3e-2), batch_size=4)
    row, _ = dense_probe(Slopes(), data.take(range(16)), data.take(range(16, 24)), "depth", config, **quiet)
    flat, _ = dense_probe(Slopes(), data.take(range(16)), data.take(range(16, 24)), "depth", config, constant=True, **quiet)
    assert row.metrics["absrel"] < .05 and row.metrics["delta1"] > .98 and flat.metrics["absrel"] > 3 * row.metrics["absrel"]


def test_bins_by_hand():
    depth = Depth([torch.tensor([[[1., 0.], [3., 2.]]])], DenseConfig(bins=3, upsample=1))
    assert depth.centres.tolist() == [1., 2., 3.] and depth.usual == 2.
    a = torch.tensor([[.5, -2.], [0., 4.], [1.9, -1.]]).view(1, 3, 1, 2)
    p = a.clamp(min=0) + .1
    wanted = (p * torch.tensor([1., 2., 3.]).view(1, 3, 1, 1)).sum(1) / p.sum(1)
    assert torch.allclose(depth.decode(a, (1, 2))[:, 0], wanted)
    pred, truth = torch.tensor([2., 3., 9.]), torch.tensor([1., 2., 0.])
    g = np.log([2., 1.5])
    assert math.isclose(depth.loss(pred, truth).item(), math.sqrt(g.var() + .15 * g.mean() ** 2), rel_tol=1e-5)


@pytest.fixture(scope="module")
def rendered():
    scenes = RenderedScenes(10, 2, 48)
    return {task: tuple(remembered(s, (48, 48), 1e9) for s in posed_maps(scenes, task, 2)) for task in TASKS}


@pytest.mark.parametrize("task", ["depth", "normals", "segmentation"])
def test_a_head_of_a_sweep_is_the_head_trained_alone(task, rendered):
    train, _ = rendered[task]
    layers = (0, 1, 2, 3) if task == "normals" else (3,)
    frozen = FrozenTokens(small_encoder(img_size=48), train, (48, 48), layers, torch.device("cpu"), 1e9)
    rows, held = held_out(train, 0)
    assert not {train.groups[r] for r in rows} & {train.groups[r] for r in held} and sorted(rows + held) == list(range(len(train)))
    config = DenseConfig(steps=6, batch_size=3, bins=8, feature_dim=8)
    truths = [truth for _, _, truth in frozen.batches(rows, 4)]
    answer = {"depth": Depth, "normals": Normals, "segmentation": Classes}[task](truths, config)
    statistics = token_statistics(frozen, rows, 4)

    def heads(*lrs):
        maps = DPTMaps(*statistics, (6, 6), 3, len(lrs), 8, 8) if task == "normals" else LinearMaps(*statistics, (6, 6), answer.channels, len(lrs))
        fit_maps(maps, answer, frozen, rows, lrs, config)
        return [torch.cat([p.detach().flatten() for p in head.parameters()]) for head in maps.heads]
    together = heads(1e-4, 1e-2, 1e-3)
    for number, lr in enumerate((1e-4, 1e-2, 1e-3)):
        assert torch.allclose(together[number], heads(lr)[0], atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_statistics_of_tokens_are_exact_and_never_hold_all_of_them():
    rand, made = torch.Generator().manual_seed(0), []
    scale, offset = torch.tensor([1., 1e-3, 3., .05, 0., 0.]), torch.tensor([0., 0., -100., 1e5 / 3, 1e5 / 3, 0.])     # the fourth and fifth would cancel; the last two never change
    every = torch.randn(7, 2, 5, 6, generator=rand) * scale + offset
    every[:, 1] += torch.arange(7)[:, None, None] * scale                                                        # pictures differ

    class Known:
        device = torch.device("cpu")

        def batches(self, rows, batch_size):
            for i in range(0, len(rows), batch_size):
                yield rows[i:i + batch_size], every[rows[i:i + batch_size]], None

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out
    with Sizes():
        mean, std = token_statistics(Known(), range(7), 2)
    x = every.double().transpose(0, 1).flatten(1, 2)
    assert mean.shape == std.shape == (2, 1, 6) and mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.mean(1, keepdim=True), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std.double(), x.std(1, keepdim=True).clamp(min=1e-6), rtol=1e-6, atol=0)
    assert max(made) == 2 * every[0].numel()


def test_tokens_are_computed_once_if_they_fit(rendered):
    class Counting(Teller):
        calls = 0
        img_size = (48, 48)

        def forward_features(self, images):
            self.calls += len(images)
            return super().forward_features(images)
    train, _ = rendered["depth"]
    for room, calls in ((1e9, 6), (0, 12)):
        encoder = Counting()
        frozen = FrozenTokens(encoder, train, (48, 48), (0,), torch.device("cpu"), room)
        a, b = frozen.batch(range(6)), frozen.batch(range(6))
        assert encoder.calls == calls and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_layers_of_ours_and_of_timm():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    for encoder in (vit, small_encoder()):
        found = patch_features(encoder, images, (1, 3))
        assert found[0].shape == (2, 16, 24) and torch.allclose(found[1], encoder.forward_features(images)[:, 1:], atol=1e-5)
        assert patch_features(encoder, torch.randn(1, 3, 48, 64), (0,))[0].shape == (1, 48, 24)


def test_neighbours_by_a_loop(rendered):
    train, test = rendered["segmentation-knn"]
    frozen = FrozenTokens(small_encoder(img_size=48), train, (48, 48), (3,), torch.device("cpu"), 1e9)
    config, answer, rows = DenseConfig(k=3, temperature=.1, batch_size=5, centre=False), Classes([torch.arange(4)], DenseConfig()), list(range(6))
    read = knn_reader(frozen, rows, answer, (6, 6), (6, 6), config)
    tokens = FrozenTokens(small_encoder(img_size=48), test, (48, 48), (3,), torch.device("cpu"), 1e9).batch([0])[0]
    found = read(tokens)[0].flatten(1).T
    bank, truth = frozen.batch(rows)
    shares = torch.stack([(truth[i, 0, 8 * (l // 6):8 * (l // 6) + 8, 8 * (l % 6):8 * (l % 6) + 8].flatten()[:, None] == torch.arange(4)).float().mean(0) for i in range(6) for l in range(36)])
    bank = bank[:, 0].flatten(0, 1)
    for l in (0, 7, 20, 35):
        cos = F.cosine_similarity(tokens[0, 0, l][None], bank, dim=1)
        near = cos.argsort(descending=True)[:3]
        weight = (cos[near] / .1).exp()
        assert torch.allclose(found[l], (weight[:, None] * shares[near]).sum(0) / weight.sum(), atol=1e-3)


def test_the_bank_of_neighbours_is_never_larger_than_asked(rendered, monkeypatch):
    train, _ = rendered["segmentation-knn"]
    frozen = FrozenTokens(small_encoder(img_size=48), train, (48, 48), (3,), torch.device("cpu"), 1e9)
    answer, sizes, normalize = Classes([torch.arange(4)], DenseConfig()), [], F.normalize
    monkeypatch.setattr("mae_repro.evaluation.dense.F.normalize", lambda x, **kw: sizes.append(x.shape[0] * x.shape[1]) or normalize(x, **kw))
    for bank, kept in ((5, 5), (16, 16), (50, 48), (10**6, 16 * 36)):
        sizes.clear()
        knn_reader(frozen, list(range(16)), answer, (48, 48), (6, 6), DenseConfig(bank=bank, batch_size=4))
        assert sum(sizes) == kept <= bank and len(train) == 16


@pytest.mark.parametrize("task", ["depth", "normals", "segmentation"])
def test_heads_that_diverge_are_not_chosen(task, rendered):
    config = DenseConfig(img_size=48, steps=12, bins=8, feature_dim=8, batch_size=3, lrs=(1e30, 1e-3))
    row, _ = dense_probe(small_encoder(), *rendered[task], task, config, **quiet)
    assert row.settings["lr"] == 1e-3 and row.settings["held_out"][0] is None and all(math.isfinite(v) for v in row.metrics.values())
    json.dumps(asdict(row), allow_nan=False)
    for lrs in ((1e30,), (1e30, 1e29)):
        with pytest.raises(UserError, match="every head of the dense probe diverged: give lower --lrs than 1e\\+30"):
            dense_probe(small_encoder(), *rendered[task], task, replace(config, lrs=lrs), **quiet)


def test_one_test_picture_has_no_interval(rendered):
    train, test = rendered["depth"]
    row, _ = dense_probe(small_encoder(), train, test.take([0]), "depth", DenseConfig(img_size=48, steps=2, bins=4, lrs=(1e-3,)), **quiet)
    assert set(row.low.values()) == set(row.high.values()) == {None} and "(-)" in format_table([row])


def test_one_folder_has_one_test_set():
    "Dense probes leave the scenes to the test that matching leaves to it."
    scenes = RenderedScenes(9, 3, 16)
    for seed in (0, 1):
        _, test = posed_maps(scenes, "depth", 1, seed)
        matched = posed_splits(scenes, (8, 8, 8), (0., 1.), seed).test
        assert set(test.groups) == {scenes.name(s) for s, _, _ in matched.index} and len(test) == 2


# ---- the whole probe

def test_shipped_mae_beats_a_constant_and_raw_pixels_on_rendered_scenes(tmp_path):
    train, test = posed_maps(RenderedScenes(20, 2, 96), "depth", 2)
    rows, said = dense_compare(open_encoder("mae-tiny"), train, test, "depth", DenseConfig(steps=100, bins=16, upsample=2, lrs=(3e-3,), batch_size=4), **quiet)
    by = {row.encoder: row for row in rows}
    assert list(by) == list(said) == ["encoder", "raw pixels", "constant"]
    for control in ("raw pixels", "constant"):
        assert by["encoder"].low["delta1"] > by[control].high["delta1"]
        assert by["encoder"].metrics["absrel"] < .9 * by[control].metrics["absrel"]     # intervals of four scenes are wide: in one of them much is near
    json.dumps([asdict(row) for row in rows], allow_nan=False)
    assert all(name in format_table(rows) for name in ("encoder", "raw pixels", "constant", "absrel"))
    assert {test.groups[i] for i in said["encoder"]} == set(list(dict.fromkeys(test.groups))[:3])
    dense_figure(test, "depth", said, (96, 96), 2).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_repeats(task, rendered):
    config = DenseConfig(img_size=32, steps=4, bins=8, feature_dim=8, batch_size=3)
    first, again = (dense_probe(small_encoder(), *rendered[task], task, config, **quiet) for _ in range(2))
    assert first[0] == again[0] and first[0].tested == 4 and first[0].groups == 2
    assert all(math.isfinite(v) for v in first[0].metrics.values())
    constant, said = dense_probe(small_encoder(), *rendered[task], task, config, constant=True, **quiet)
    assert len({tuple(m[:, 0, 0].tolist()) for m in said.values()}) == 1


def test_unreadable_pictures_are_skipped_and_counted(rendered):
    train, test = rendered["depth"]

    def load(i, size):
        if i == 1:
            raise BrokenImage("one", "damaged")
        return train.load(i, size)
    row, _ = dense_probe(small_encoder(), replace(train, load=load), test, "depth", DenseConfig(img_size=32, steps=2, bins=4), **quiet)
    assert row.skipped == 1 and row.trained == len(train) - 1


@pytest.mark.parametrize("what, said", [
    (lambda: open_maps("/nowhere/at/all", "depth"), "no such folder"),
    (lambda: open_maps(None, "depth", "ade20k"), "has no truth for --task depth"),
    (lambda: open_maps(None, "segmentation", "voc"), "needs --data.root"),
    (lambda: open_maps(".", "segmentation", "voc"), "no train pictures in the layout voc"),
    (lambda: open_maps(None, "flow"), "the tasks are"),
    (lambda: open_maps(None, "depth", limit=0), "^--data.limit 0 must be at least 1$"),
    (lambda: open_maps(None, "depth", frames=0), "^--frames 0 must be at least 1$"),
    (lambda: DenseConfig(lrs=(1e-3, math.nan)), "^lrs .* must be positive, finite numbers$"),
    (lambda: DenseConfig(lrs=(math.inf,)), "finite"),
    (lambda: DenseConfig(temperature=math.nan), "^temperature nan must be"),
    (lambda: dense_size(small_encoder(), 0, "depth"), "img_size 0 x 0"),
    (lambda: posed_maps(RenderedScenes(1, 1, 32), "depth"), "cannot both train and test"),
    (lambda: DenseConfig(steps=0), "steps 0 must be at least 1"),
    (lambda: DenseConfig(lrs=()), "must be positive"),
    (lambda: dense_size(small_encoder(), 36, "depth"), "multiples of 8"),
    (lambda: dense_size(small_encoder(), 40, "normals"), "multiples of 16"),
    (lambda: dense_probe(small_encoder(), told(), told(), "depth", DenseConfig(img_size=32, layer=9), **quiet), "has the blocks 0..3"),
    (lambda: dense_probe(small_encoder(2), told(), told(), "normals", DenseConfig(img_size=32), **quiet), "reads four blocks"),
    (lambda: dense_probe(small_encoder(), replace(told(), load=lambda i, s: (Image.new("RGB", s), np.zeros((1, *s), np.float32))), told(), "depth", DenseConfig(img_size=32), **quiet), "known depth"),
])
def test_bad_input_is_one_line(what, said):
    with pytest.raises(UserError, match=said) as error:
        what()
    assert "\n" not in str(error.value)


# ---- attentive probe

def marks(n, seed=0):
    "Tokens of equal mean; one of them carries a mark, and beside it the class."
    rand = torch.Generator().manual_seed(seed)
    x, y, where = torch.randn(n, 9, 8, generator=rand), torch.randint(0, 2, (n,), generator=rand), torch.randint(0, 9, (n,), generator=rand)
    x[torch.arange(n), where, 0], x[torch.arange(n), where, 1] = 6, 2 * y.float() - 1
    x[..., 1] -= x[..., 1].mean(1, keepdim=True)
    return x, y


def test_attention_finds_what_the_mean_cannot():
    x, y = marks(400)
    found, settings = attentive_predict(x[:300], y[:300], x[300:], AttentiveConfig(lrs=(3e-3, 1e-2), epochs=60, batch_size=50, num_heads=2))
    assert (found == y[300:]).float().mean() > .8 and settings["num_heads"] == 2
    assert x.mean(1)[:, 1].abs().max() < 1e-6


def test_attentive_heads_fold_exactly_and_never_meet():
    x, y = marks(60)
    heads = AttentiveHeads(x.mean((0, 1)), x.std((0, 1)), 2, 2, 2)
    nn.init.normal_(heads.heads[1].query)
    head, z = heads.heads[1], (x - heads.mean) / heads.std
    keys, values = (torch.einsum("bld,hed->bhle", z, w) for w in (head.key, head.value))
    seen = F.scaled_dot_product_attention(head.query[None, :, None].expand(60, -1, -1, -1), keys, values)
    assert torch.allclose(heads(x)[:, 1], head.out(seen.flatten(1)), atol=1e-5)
    config = AttentiveConfig(epochs=2, batch_size=20, num_heads=2)
    together, alone = fit_attentive(x, y, 2, [1e-3, 1e-2], config), fit_attentive(x, y, 2, [1e-2], config)
    for a, b in zip(together.heads[1].parameters(), alone.heads[0].parameters()):
        assert torch.allclose(a, b, atol=1e-5)


class Corners:
    "Labelled pictures: noise, and one bright patch whose hue is the class."
    class_names = ["red", "blue"]

    def __init__(self, n, seed):
        rand = np.random.default_rng(seed)
        self.labels = (np.arange(n) % 2).tolist()
        self.pixels = rand.integers(60, 120, (n, 32, 32, 3)).astype(np.uint8)
        for i, label in enumerate(self.labels):
            y, x = rand.integers(0, 4, 2) * 8
            self.pixels[i, y:y + 8, x:x + 8] = (250, 20, 20) if label == 0 else (20, 20, 250)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"picture {i}"

    def load(self, i):
        return Image.fromarray(self.pixels[i])


def test_where_heads_look_by_a_loop():
    "softmax of q . k / sqrt(e), e = 4 channels of each of two heads, over standardised tokens; a scale that is off changes every weight."
    x, _ = marks(3)
    heads = AttentiveHeads(x.mean((0, 1)), x.std((0, 1)), 2, 2)
    head = heads.heads[0]
    nn.init.normal_(head.query, std=3)
    z = (x - x.mean((0, 1))) / x.std((0, 1))
    looks = heads.attention(z)
    for b in range(3):
        for h in range(2):
            weight = [math.exp((head.query[h] @ (head.key[h] @ token)).item() / 2) for token in z[b]]
            np.testing.assert_allclose(looks[b, 0, h].detach(), np.array(weight) / sum(weight), atol=1e-5)
    values = torch.einsum("hed,bhd->bhe", head.value, torch.einsum("bhl,bld->bhd", looks[:, 0], z)).flatten(1)
    np.testing.assert_allclose(heads(x)[:, 0].detach() * 100, (head.out(values) * 100).detach(), atol=1e-4)


def test_attentive_heads_that_diverge_are_not_chosen():
    x, y = marks(60)
    config = AttentiveConfig(lrs=(1e30, 1e-3), epochs=3, batch_size=20, num_heads=2)
    assert attentive_predict(x[:50], y[:50], x[50:], config)[1]["lr"] == 1e-3
    with pytest.raises(UserError, match="diverged"):
        attentive_predict(x[:50], y[:50], x[50:], replace(config, lrs=(1e30, 1e29)))


def test_attentive_probe_of_image_sets():
    train, test = Corners(60, 0), Corners(30, 1)
    config = AttentiveConfig(lrs=(3e-3, 1e-2), epochs=20, batch_size=20)
    rows = attentive_compare(small_encoder(), train, test, small_encoder, progress=False, config=config)
    assert [row.encoder for row in rows] == ["encoder", "untrained", "raw pixels"] and rows[2].accuracy == 1. and rows[0].accuracy == rows[1].accuracy
    assert {row.kind for row in rows} == {"attentive"} and rows[0].dim == 24 and rows[2].dim == 192 and rows[0].settings["lr"] in config.lrs
    with pytest.raises(UserError, match="give --data.limit"):
        attentive_probe(small_encoder(), train, test, progress=False, config=replace(config, memory_gb=1e-6))
