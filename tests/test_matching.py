"Pairs with known matches and the dense-matching probe: recorded outputs of the authors' code, loops, exact truth of rendered scenes, miniatures of each layout."
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from mae_repro.evaluation import matching as M
from mae_repro.evaluation import pair_data as D
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.weights import UserError
from mae_repro.views.layouts import write_layout
from mae_repro.views.photos import BrokenImage
from mae_repro.views.posed import PosedFrame, RenderedScenes
from mae_repro.views.scenes import correspondences
from miniatures import write_megadepth, write_scannet

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
VECTOR = SHARED / "golden/evaluation/match_probe.safetensors"
MOTORCYCLE = SHARED / "data/multiview/middlebury_motorcycle_stereo"
SLAMBOOK = SHARED / "data/multiview/slambook_rgbd"


@pytest.fixture(scope="module")
def scenes():
    return RenderedScenes(4, 5, (48, 64), seed=1)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(32, 8, 24, 3, 2).eval()


@pytest.fixture(scope="module")
def splits():
    return D.open_pairs(None, num=(8, 4, 6), size=40, limit=4, shake=(.2, .2))


# recorded outputs

@pytest.fixture(scope="module")
def recorded():
    if not VECTOR.is_file():
        pytest.skip("needs golden/evaluation/match_probe.safetensors of the shared folder (MAE_REPRO_SHARED)")
    with safe_open(VECTOR, "pt") as file:
        t = {k: file.get_tensor(k) for k in file.keys()}
        config = json.loads(file.metadata()["config"]) if "config" in file.metadata() else {}
    image, pairs = Image.new("RGB", (64, 64)), []
    for b in range(2):
        T, frames = t["in/T_AtoB"][b].double().numpy(), []
        for side, R, shift in (("A", np.eye(3), np.zeros(3)), ("B", T[:3, :3], T[:3, 3])):
            K = t[f"in/K_{side}"][b].double().numpy().copy()
            K[:2, 2] -= .5  # theirs counts from the corner of the picture
            frames.append(PosedFrame(image, K, R, shift, t[f"in/depth_{side}"][b].numpy()))
        pairs.append(frames)
    truth = {size: [torch.from_numpy(np.stack(x)) for x in zip(*(D.depth_warp(a, b, (size, size)) for a, b in pairs))] for size in (8, 64)}
    return t, config, truth


def tokens(maps):
    return maps.flatten(2).mT


def test_truth_as_recorded(recorded):
    t, _, truth = recorded
    warp, valid = truth[8]
    torch.testing.assert_close(warp, t["out/gt_warp"], atol=1e-12, rtol=0)
    assert torch.equal(valid, t["out/gt_prob"].bool()) and 0 < valid.sum() < valid.numel()
    assert torch.equal(truth[64][1], t["out/valid_fullres"].bool())
    assert torch.equal(M.nearest_cells(warp, (8, 8)), t["out/gt_class"])


@pytest.mark.parametrize("name", ["knn", "probe0", "probe1"])
def test_matcher_and_metrics_as_recorded(recorded, name):
    t, _, truth = recorded
    a, b = tokens(t["in/feat_A"]), tokens(t["in/feat_B"])
    if name != "knn":
        head = M.Heads(16, 1)
        head.weight.data, head.bias.data = t[f"weights/{name}.weight"][None, :, :, 0, 0], t[f"weights/{name}.bias"][None]
        a, b = head(a)[0].detach(), head(b)[0].detach()
    logp = M.log_probs(a, b)
    torch.testing.assert_close(logp, t[f"out/{name}_logp"].flatten(2), atol=2e-5, rtol=0)
    warp = M.kernel_warp(logp, (8, 8))
    torch.testing.assert_close(warp, t[f"out/{name}_flow"].flatten(1, 2), atol=2e-6, rtol=0)
    full = M.full_warp(warp, (8, 8), (64, 64))
    if name == "knn":
        torch.testing.assert_close(full, t["out/knn_matches"][..., 2:], atol=2e-6, rtol=0)
        torch.testing.assert_close(torch.from_numpy(D.cell_centres((64, 64))).float(), t["out/knn_matches"][0, ..., :2], atol=1e-6, rtol=0)
        each = M.pair_statistics(full, *truth[64])
        torch.testing.assert_close(each[:, 1] / each[:, 0], t["out/knn_gd_per_image_mean"], atol=1e-5, rtol=0)
    found = M.summarise(M.pair_statistics(full, *truth[64]))
    expected = torch.cat([t[f"out/{name}_epe"].double()[None], t[f"out/{name}_robustness32"].double()[None], t[f"out/{name}_pck"].double()])
    torch.testing.assert_close(found[:1], expected[:1], atol=2e-5, rtol=0)
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-6, rtol=0)


def test_loss_and_gradients_as_recorded(recorded):
    t, _, truth = recorded
    heads = M.Heads(16, 2)
    heads.weight.data = torch.stack([t[f"weights/probe{i}.weight"][:, :, 0, 0] for i in range(2)])
    heads.bias.data = torch.stack([t[f"weights/probe{i}.bias"] for i in range(2)])
    logp = M.log_probs(heads(tokens(t["in/feat_A"])), heads(tokens(t["in/feat_B"])))
    loss = M.match_loss(logp, M.nearest_cells(truth[8][0].flatten(1, 2), (8, 8)), truth[8][1].flatten(1))
    torch.testing.assert_close(loss.mean(), t["out/probe_loss"], atol=5e-6, rtol=0)
    loss.mean().backward()
    for i in range(2):
        torch.testing.assert_close(heads.weight.grad[i], t[f"grad/probe{i}.weight"][:, :, 0, 0], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(heads.bias.grad[i], t[f"grad/probe{i}.bias"], atol=2e-6, rtol=1e-4)


# truth

def test_truth_against_the_ray_tracer(scenes):
    for i, a, b in ((0, 0, 4), (1, 3, 1), (2, 2, 4)):
        warp, valid = D.depth_warp(scenes.frame(i, a), scenes.frame(i, b), (48, 64))
        xy, seen = correspondences(scenes.scene(i), a, b)
        inside = (xy > 0).all(-1) & (xy < [62, 46]).all(-1)
        both = valid & seen
        assert both.mean() > .3 and np.abs((warp + 1) / 2 * [64, 48] - .5 - xy)[both].max() < .05
        assert (valid == seen)[inside | ~seen].mean() > .9  # they differ at the edges of things, and where something is hidden by less than 5 %


def test_truth_of_one_place_by_hand():
    a = PosedFrame(Image.new("RGB", (8, 6)), np.array([[4., 0, 3.5], [0, 4, 2.5], [0, 0, 1]]), np.eye(3), np.zeros(3), np.full((6, 8), 2., np.float32))
    b = replace(a, t=np.array([.5, 0, 0]))  # everything moves by 4 * .5 / 2 = one pixel to the right
    warp, valid = D.depth_warp(a, b, (6, 8))
    np.testing.assert_allclose((warp[..., 0] + 1) / 2 * 8 - .5, np.broadcast_to(np.arange(8) + 1., (6, 8)), atol=1e-3)
    assert valid[:5, :6].all() and not valid[:, 6:].any() and not valid[5].any()  # 0 < x < w - 1 from the corner: the last column and row are out
    hidden = replace(b, depth=np.where(np.arange(8) == 4, np.float32(1), b.depth).astype(np.float32))
    assert not D.depth_warp(a, hidden, (6, 8))[1][:, 3].any()
    unknown = replace(a, depth=np.where(np.arange(8) == 2, np.float32(0), a.depth).astype(np.float32))
    assert not D.depth_warp(unknown, b, (6, 8))[1][:, 2].any() and D.depth_warp(unknown, b, (6, 8))[1][:5, 3].all()


@pytest.mark.parametrize("there, valid", [(2.104, True), (2.107, False), (1.907, True), (1.903, False)])   # a twentieth of b's depth, not of the projected one
def test_how_far_depths_may_differ(there, valid):
    a = PosedFrame(Image.new("RGB", (8, 8)), np.array([[4., 0, 3.5], [0, 4, 3.5], [0, 0, 1]]), np.eye(3), np.zeros(3), np.full((8, 8), 2., np.float32))
    assert (D.depth_warp(a, replace(a, depth=np.full((8, 8), there, np.float32)), (8, 8))[1][1:6, 1:6] == valid).all()
    loose = D.depth_warp(a, replace(a, depth=np.full((8, 8), there, np.float32)), (8, 8), tolerance=.1)[1]
    assert loose[1:6, 1:6].all()


def test_where_valid_places_begin_and_end():
    "Half a pixel from the left and top edges, because depth is 0 beyond them; one pixel from the right and bottom ones."
    a = PosedFrame(Image.new("RGB", (8, 8)), np.array([[4., 0, 3.5], [0, 4, 3.5], [0, 0, 1]]), np.eye(3), np.zeros(3), np.full((8, 8), 2., np.float32))
    for shift, end, edge in ((-.5, "min", .45), (.5, "max", 7.)):   # by a pixel up and left, or down and right; .45: there bilinear depth with 0 beyond is within a twentieth
        warp, valid = (x[25:-25, 25:-25] for x in D.depth_warp(a, replace(a, t=np.array([shift, shift, 0])), (400, 400)))   # without the outer half pixels of a, whose depth is padded too
        assert np.abs(getattr(((warp + 1) / 2 * 8)[valid], end)(0) - edge).max() < .03


def test_behind_the_camera_is_no_match():
    a = PosedFrame(Image.new("RGB", (8, 8)), np.array([[4., 0, 3.5], [0, 4, 3.5], [0, 0, 1]]), np.eye(3), np.zeros(3), np.full((8, 8), 2., np.float32))
    for t in ([0, 0, -2.], [0, 0, -4.]):
        warp, valid = D.depth_warp(a, replace(a, t=np.array(t)), (4, 4))
        assert np.isfinite(warp).all() and not valid.any()


def test_cut_and_flip_keep_the_truth(scenes):
    a, b = scenes.frame(0, 0), scenes.frame(0, 4)
    warp, valid = D.depth_warp(a, b, (48, 64))
    x = (warp + 1) / 2 * [64, 48] - .5
    small, known = D.depth_warp(D.cut(a, 10, 4, (40, 48)), D.cut(b, 6, 8, (36, 50)), (40, 48))
    moved, there = (small + 1) / 2 * [50, 36] - .5, known & valid[4:44, 10:58]
    assert there.mean() > .2
    np.testing.assert_allclose(moved[there], x[4:44, 10:58][there] - [6, 8], atol=.01)  # not exactly: .0001 is added to depths, as published
    mirrored, seen = D.depth_warp(D.flip(a), D.flip(b), (48, 64))
    both = seen & valid[:, ::-1]
    assert both.mean() > .3
    np.testing.assert_allclose(mirrored[both] * [-1, 1], warp[:, ::-1][both], atol=3e-4)
    np.testing.assert_array_equal(np.asarray(D.flip(a).image)[:, ::-1], np.asarray(a.image))


def test_depth_of_another_size_than_the_picture(scenes):
    a, b = scenes.frame(1, 0), scenes.frame(1, 3)
    large = replace(a, image=a.image.resize((128, 96)), K=a.resized((96, 128)).K)
    whole, piece = D.depth_warp(large, b, (12, 16)), D.depth_warp(a, b, (12, 16))
    np.testing.assert_allclose(whole[0], piece[0], atol=1e-9)
    assert D.cut(large, 2, 2, (60, 60)).depth.shape == (60, 60)


def test_scenes_without_depth_are_left_out(tmp_path, scenes):
    K = np.eye(3).tolist()
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/x.png")
    views = [dict(file="x.png", K=K, R=K, t=[0, 0, 0])] * 2
    (tmp_path / "a/cameras.json").write_text(json.dumps(dict(views=views)))
    with pytest.raises(UserError, match="none of 1 scenes has depth"):
        D.open_pairs(tmp_path)
    for name in "bcd":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png"), Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / name / "z.png")
        (tmp_path / name / "cameras.json").write_text(json.dumps(dict(views=[v | dict(depth="z.png") for v in views])))
    found = D.open_pairs(tmp_path, num=(2, 2, 2), span=(0., 1.))
    assert {s for part in (found.train, found.val, found.test) for s, _, _ in part.index} == {1, 2, 3}


def folder_of(tmp_path, scenes, depths=5):
    "Three scenes as files; of each, the first `depths` of five frames have depth."
    write_layout("scene", tmp_path, num=3, num_frames=5, size=(32, 32), seed=1)
    paths = sorted(tmp_path.rglob("cameras.json"))
    for path in paths:
        about = json.loads(path.read_text())
        about["views"] = [v if k < depths else {name: v[name] for name in ("file", "K", "R", "t")} for k, v in enumerate(about["views"])]
        path.write_text(json.dumps(about))
    return [[path.parent / v["depth"] for v in json.loads(path.read_text())["views"] if "depth" in v] for path in paths]


def test_frames_that_cannot_be_read_are_named_and_counted(tmp_path, scenes, caplog):
    maps = folder_of(tmp_path, scenes)
    whole = D.open_pairs(tmp_path, num=(6, 4, 4), span=(0., 1.))
    assert whole.skipped == () and not caplog.text
    maps[0][1].unlink(), Image.fromarray(np.zeros((9, 9), np.uint16)).save(maps[1][2])
    found = D.open_pairs(tmp_path, num=(30, 30, 30), span=(0., 1.))
    assert len(found.skipped) == 2 and "in no pair: 2, the first" in caplog.text and str(maps[0][1]) in found.skipped[0] and str(maps[1][2]) in found.skipped[1]
    assert not {(0, 1), (1, 2)} & {(s, k) for part in (found.train, found.val, found.test) for s, a, b in part.index for k in (a, b)}
    for path in sum(maps, [])[:-1]:
        path.unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"left out: 14, the first: {maps[0][0]}"):
        D.open_pairs(tmp_path, num=(30, 30, 30), span=(0., 1.))


def test_frames_without_depth_among_others(tmp_path, scenes):
    folder_of(tmp_path, scenes, 3)
    found = D.open_pairs(tmp_path, num=(30, 30, 30), span=(0., 1.))
    assert len(found.skipped) == 6 and all("has no depth" in text for text in found.skipped)
    assert {k for part in (found.train, found.val, found.test) for _, a, b in part.index for k in (a, b)} == {0, 1, 2}


def test_one_frame_is_no_pair(tmp_path, scenes):
    folder_of(tmp_path, scenes, 1)
    with pytest.raises(UserError, match="no scene has more than one frame with depth, and a pair needs two"):
        D.open_pairs(tmp_path)
    with pytest.raises(UserError, match="a pair needs two frames"):
        D.posed_splits(RenderedScenes(3, 1, 16))


def test_without_a_probe_everything_is_test(tmp_path, scenes, caplog):
    folder_of(tmp_path, scenes)
    assert {s for s, _, _ in D.open_pairs(tmp_path, num=(0, 0, 30), span=(0., 1.), everything=True).test.index} == {0, 1, 2}
    one = D.open_pairs(tmp_path, num=(0, 0, 30), span=(0., 1.), limit=1, everything=True)
    assert len(one.test) == 20 and len(one.train) == len(one.val) == 0 and "divided by pair" not in caplog.text


def test_what_the_right_picture_sees_by_loops():
    rng = np.random.default_rng(0)
    d = np.where(rng.random((5, 30)) < .2, np.inf, rng.integers(1, 9, (5, 30)))
    expected = np.zeros(d.shape, bool)
    for y in range(5):
        for x in range(30):
            if np.isfinite(d[y, x]) and 0 <= x - d[y, x] < 30:
                rivals = [d[y, k] for k in range(30) if np.isfinite(d[y, k]) and k - d[y, k] == x - d[y, x]]
                expected[y, x] = d[y, x] > max(rivals) - 1
    np.testing.assert_array_equal(D.seen_in_right(d), expected)
    warp, valid = D.disparity_warp(d, (5, 30))
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_allclose(((warp[..., 0] + 1) / 2 * 30 - .5)[valid], (np.arange(30) - d)[valid], atol=1e-9)
    np.testing.assert_allclose(warp[..., 1], D.cell_centres((5, 30))[..., 1])


# layouts

def test_scenes_are_divided(scenes):
    splits = D.posed_splits(scenes, (6, 3, 4), (.1, .95), seed=2)
    parts = [{s for s, _, _ in getattr(splits, part).index} for part in ("train", "val", "test")]
    assert splits.by == "scene" and all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert splits.train.index == D.posed_splits(scenes, (6, 3, 4), (.1, .95), seed=2).train.index != D.posed_splits(scenes, (6, 3, 4), (.1, .95), seed=3).train.index
    assert len(splits.train) == 6 and all(.1 <= D.covisibility(splits.train[i]) <= .95 and a != b for i, (_, a, b) in enumerate(splits.train.index))
    narrow = D.choose_pairs(scenes, range(4), 20, (.6, .7), np.random.default_rng(0))
    assert narrow and all(.6 <= D.covisibility(D.PosedPairs(scenes, [row])[0]) <= .7 for row in narrow)
    whole = D.posed_splits(scenes, (6, 3, 8), (.1, .95), everything=True)
    assert whole.by == "scene" and len(whole.train) == len(whole.val) == 0 and {s for s, _, _ in whole.test.index} == {0, 1, 2, 3}
    assert D.posed_splits(scenes, (0, 0, 4), (.1, .95), seed=2).test.index == splits.test.index  # the test does not depend on what else is asked for
    assert {s for s, _, _ in D.posed_splits(scenes, (0, 0, 8), (.1, .95), everything=True, among=[1, 3]).test.index} == {1, 3}


def test_one_scene_is_divided_by_pair(caplog):
    splits = D.posed_splits(RenderedScenes(1, 5, 32), (10, 4, 6), (.0, 1.))
    found = [set(getattr(splits, part).index) for part in ("train", "val", "test")]
    assert splits.by == "pair" and [len(f) for f in found] == [10, 4, 6] and "divided by pair" in caplog.text
    assert set.union(*found) == {(0, a, b) for a in range(5) for b in range(5) if a != b}


def test_every_number_of_scenes_gives_three_parts():
    for count in range(3, 30):
        parts = D.split_scenes(count, np.random.default_rng(count))
        assert sorted(sum(parts, [])) == list(range(count)) and all(parts)


def test_shaken_pairs_are_drawn_once(scenes):
    pairs = D.PosedPairs(scenes, [(0, 0, 4), (0, 0, 4)], shake=.25, flips=True, seed=1)
    one, again, other = pairs[0], pairs[0], pairs[1]
    assert one.image_a.size == (48, 36) and one.image_a.tobytes() == again.image_a.tobytes() != other.image_a.tobytes() and one.truth((6, 8))[1].any()


@pytest.mark.parametrize("options, message", [
    (dict(root="nowhere"), "no such folder"), (dict(root=None, layout="stereo"), "needs --data.root"), (dict(layout="other"), "none of"),
    (dict(span=(.5, .5)), "^covisibility 0.5 0.5 must be two rising numbers in 0..1$"), (dict(span=(float("nan"), 1.)), "rising"), (dict(limit=0), "^data.limit 0 must be at least 1$"),
    (dict(num=(0, 0, 0)), "^pairs 0 0 0 must be more than none"), (dict(num=(3, -1, 2)), "^pairs 3 -1 2 must be numbers that are not negative$"),
    (dict(shake=(.1, 1.)), "shake"), (dict(span=(.999, 1.), limit=3, size=32), "widen --data.covisibility$")])
def test_bad_requests_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        D.open_pairs(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["scenes", "megadepth", "scannet", "stereo"])
def test_an_empty_folder_is_one_line(tmp_path, layout):
    with pytest.raises(UserError, match=str(tmp_path)):
        D.open_pairs(tmp_path, layout)


def write_pfm(path, x):
    path.write_bytes(f"Pf\n{x.shape[1]} {x.shape[0]}\n-1.0\n".encode() + x[::-1].astype("<f4").tobytes())


def test_stereo(tmp_path):
    rng = np.random.default_rng(0)
    left, d = rng.integers(0, 255, (12, 40, 3), np.uint8), np.full((12, 40), 3., np.float32)
    d[:, 20:25] = np.inf
    right = np.roll(left, -3, 1)
    for folder, names, ext in (("a", ("left.png", "right.png"), "npz"), ("b", ("im0.png", "im1.png"), "pfm"), ("c", ("view1.png", "view5.png"), "npy"), ("d/images", ("x.png", "y.png"), "npy")):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(left).save(tmp_path / folder / names[0]), Image.fromarray(right).save(tmp_path / folder / names[1])
        home = tmp_path / folder.partition("/")[0]
        if ext == "npz":
            np.savez(home / "disparity.npz", d)
        elif ext == "pfm":
            write_pfm(home / "disp0.pfm", d)
            write_pfm(home / "disp1.pfm", d * 9)
        else:
            np.save(home / "disp.npy", d)
    pairs = D.StereoPairs(tmp_path)
    assert len(pairs) == 4
    for pair in (pairs[i] for i in range(4)):
        warp, valid = pair.truth((12, 40))
        assert valid[:, 4:20].all() and not valid[:, 20:25].any() and not valid[:, :3].any()
        b = np.asarray(pair.image_b)
        x = np.round((warp[..., 0] + 1) / 2 * 40 - .5).astype(int)
        np.testing.assert_array_equal(b[np.arange(12)[:, None].repeat(40, 1)[valid], x[valid]], np.asarray(pair.image_a)[valid])
    splits = D.open_pairs(tmp_path, "stereo", seed=0)
    assert [len(getattr(splits, p)) for p in ("train", "val", "test")] == [2, 1, 1]
    assert len({splits_of.name(i) for splits_of in (splits.train, splits.val, splits.test) for i in range(len(splits_of))}) == 4
    assert len(D.open_pairs(tmp_path, "stereo", limit=2).test) == 2 and len(D.open_pairs(tmp_path, "stereo", everything=True).test) == 4
    asymmetric = np.arange(480, dtype=np.float32).reshape(12, 40)
    write_pfm(tmp_path / "x.pfm", asymmetric)
    np.testing.assert_array_equal(D.read_pfm(tmp_path / "x.pfm"), asymmetric)
    (tmp_path / "b/disp0.pfm").write_bytes(b"PF\n3 3\n-1.0\n")
    with pytest.raises(UserError, match="disp0.pfm"):
        pairs[1]
    np.save(tmp_path / "c/disp.npy", d[:, :30])
    with pytest.raises(BrokenImage, match="disp.npy"):
        pairs[2]


def test_scannet(tmp_path, scenes):
    write_scannet(tmp_path, scenes)
    splits = D.open_pairs(tmp_path, "scannet", (4, 2, 2), (.05, 1.))
    assert splits.by == "list" and len(splits.test) == 2
    used = [{splits.train.scenes.folders[s].name for s, _, _ in part.index} for part in (splits.train, splits.val)]
    assert all(used) and not used[0] & used[1] and "scene0707_00" not in used[0] | used[1]
    pair = splits.test[0]
    assert pair.image_a.size == (64, 48)
    warp, valid = pair.truth((48, 64))
    true, known = D.depth_warp(scenes.frame(0, 1), scenes.frame(0, 4), (48, 64))
    both = valid & known
    assert (valid == known).mean() > .98 and np.abs(warp - true)[both].max() < .01
    (tmp_path / "scannet_test_1500/scene0707_00/pose/15.txt").write_text("-inf " * 16)
    with pytest.raises(BrokenImage, match="tracking"):
        splits.test[0]
    np.savez(tmp_path / "test.npz", name=np.array([[707, 0, 15, 16]]))
    with pytest.raises(UserError, match="frames 15 and 16"):
        D.open_pairs(tmp_path, "scannet")
    np.savez(tmp_path / "test.npz", name=np.array([["scene", "0", "1", "2"]], object))
    with pytest.raises(UserError, match="whole numbers"):
        D.open_pairs(tmp_path, "scannet")


def test_megadepth(tmp_path, scenes):
    pytest.importorskip("h5py"), pytest.importorskip("pycolmap")
    write_megadepth(tmp_path, scenes)
    splits = D.open_pairs(tmp_path, "megadepth", (10, 10, 10))
    world = splits.test.scenes
    assert {world.scene(s) for s, _, _ in splits.test.index} == {"0015", "0022"}
    assert not {world.scene(s) for part in (splits.train, splits.val) for s, _, _ in part.index} & {"0015", "0022"}
    assert not {world.scene(s) for s, _, _ in splits.train.index} & {world.scene(s) for s, _, _ in splits.val.index} and len(splits.train) and len(splits.val)
    assert {(a, b) for _, a, b in splits.test.index} == {(0, 1), (1, 0)}  # photograph 2 shares nothing, 3 has no depth
    i = next(k for k, (s, a, b) in enumerate(splits.test.index) if world.scene(s) == "0015" and (a, b) == (0, 1))
    warp, valid = splits.test[i].truth((48, 64))
    true, known = D.depth_warp(scenes.frame(1, 0), scenes.frame(1, 1), (48, 64))
    assert np.array_equal(valid, known) and np.abs(warp - true)[known].max() < 1e-6
    assert splits.test.index == D.open_pairs(tmp_path, "megadepth", (10, 10, 10)).test.index
    (next(tmp_path.rglob("0015/dense0/depths")) / "0.h5").write_bytes(b"no")
    with pytest.raises(BrokenImage, match="0.h5"):
        splits.test[i]


@pytest.mark.parametrize("weighted, share", [(True, 90 ** .25 / (90 ** .25 + 1056 ** .25)), (False, 90 / 1146)])
def test_large_scenes_of_megadepth_count_less_in_training(weighted, share, monkeypatch):
    class Sizes:
        def model(self, i):
            return (10, 33)[i], list(range((10, 33)[i])), []
    monkeypatch.setattr("mae_repro.views.scene_data.overlap", lambda n: np.ones((n, n)))
    counts = [sum(i == 0 for i, _, _ in D._overlapping(Sizes(), [0, 1], 200, .01, np.random.default_rng(seed), weighted)) for seed in range(20)]
    assert abs(np.mean(counts) / 200 - share) < .02
    drawn = D._overlapping(Sizes(), [0, 1], 200, .01, np.random.default_rng(0), weighted)
    assert len(set(drawn)) == len(drawn) == 200 and all(a != b for _, a, b in drawn)


@pytest.mark.skipif(not MOTORCYCLE.is_dir(), reason="needs data/multiview/middlebury_motorcycle_stereo of the shared folder")
def test_motorcycle():
    pair = D.open_pairs(MOTORCYCLE, "stereo").test[0]
    warp, valid = pair.truth((500, 741))
    a, b = (np.asarray(im.convert("L"), float) for im in (pair.image_a, pair.image_b))
    carried = D.sample(b, warp)
    assert .6 < valid.mean() < .98 and np.corrcoef(carried[valid], a[valid])[0, 1] > .93 > np.corrcoef(b[valid], a[valid])[0, 1]


@pytest.mark.skipif(not SLAMBOOK.is_dir(), reason="needs data/multiview/slambook_rgbd of the shared folder")
def test_slambook():
    splits = D.open_pairs(SLAMBOOK, "scenes", (0, 0, 6), (.1, 1.), everything=True)
    pair = splits.test[0]
    warp, valid = pair.truth((120, 160))
    a, b = (np.asarray(im.convert("L").resize((160, 120)), float) for im in (pair.image_a, pair.image_b))
    carried = D.sample(b, warp)
    assert len(splits.test) == 6 and np.corrcoef(carried[valid], a[valid])[0, 1] > max(.6, np.corrcoef(b[valid], a[valid])[0, 1])


# matcher

def test_probabilities_and_warp_by_loops():
    g = torch.Generator().manual_seed(0)
    a, b, (gh, gw) = torch.randn(2, 5, 4, generator=g), torch.randn(2, 12, 4, generator=g), (3, 4)
    logp = M.log_probs(3 * a, b)
    warp = M.kernel_warp(logp, (gh, gw))
    for k in range(2):
        for n in range(5):
            scores = [float(F.cosine_similarity(a[k, n], b[k, m], dim=0)) / .1 for m in range(12)]
            p = [np.exp(s) / sum(np.exp(scores)) for s in scores]
            np.testing.assert_allclose(logp[k, :, n].exp(), p, atol=1e-5)
            m = int(np.argmax(p))
            cells = [min(max(c, 0), 11) for c in (m, m - 1, m + 1, m - gw, m + gw)]
            mass = sum(p[c] for c in cells)
            place = [sum(p[c] * ((2 * (c % gw) + 1) / gw - 1) for c in cells) / mass, sum(p[c] * ((2 * (c // gw) + 1) / gh - 1) for c in cells) / mass]
            np.testing.assert_allclose(warp[k, n], place, atol=1e-5)


def test_metrics_by_loops():
    rng = torch.Generator().manual_seed(1)
    found, true = torch.rand(11, 4, 6, 2, generator=rng) * 2 - 1, torch.rand(11, 4, 6, 2, generator=rng) * 2 - 1
    valid = torch.rand(11, 4, 6, generator=rng) < torch.linspace(.1, 1, 11)[:, None, None]
    distances = [[float(np.hypot(*((found - true)[p, y, x].numpy() * [3, 2]))) for y in range(4) for x in range(6) if valid[p, y, x]] for p in range(11)]
    batches = [sum(distances[:8], []), sum(distances[8:], [])]
    expected = [np.mean([np.mean(b) for b in batches])] + [np.mean([np.mean(np.array(b) < t) for b in batches]) for t in M.THRESHOLDS]
    statistics = M.pair_statistics(found, true, valid)
    np.testing.assert_allclose(M.summarise(statistics), expected, atol=1e-6)
    everything = sum(distances, [])
    np.testing.assert_allclose(M.summarise(statistics, None)[0], np.mean(everything), atol=1e-6)
    low, high = M.interval(statistics)
    assert low[0] < M.summarise(statistics)[0] < high[0] and (M.interval(statistics) == torch.stack([low, high])).all()
    assert torch.isnan(M.summarise(torch.zeros(3, 8))).all()


def test_nearest_cell_by_search():
    places = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 1.98 - .99
    centres = torch.from_numpy(D.cell_centres((3, 5))).flatten(0, 1).float()
    scale = torch.tensor([5., 3.])
    assert torch.equal(M.nearest_cells(places, (3, 5)), ((places[:, None] - centres) * scale).abs().amax(-1).argmin(1))


class Set(list):
    "A list as a set of pairs."

    def name(self, i):
        return self[i].name


def shifted_pair(cells=1, p=8, n=6, seed=0):
    "Noise, and the same noise `cells` patches further left."
    left = np.random.default_rng(seed).integers(0, 255, (n * p, n * p, 3), np.uint8)
    right = np.roll(left, -cells * p, 1)
    disparity = np.full((n * p, n * p), float(cells * p), np.float32)
    return D.MatchPair("shifted", Image.fromarray(left), Image.fromarray(right), partial(D.disparity_warp, disparity))


def test_a_known_translation_is_matched_exactly():
    pair, raw = shifted_pair(), M.PatchPixels(8)
    found = M.find_matches(raw, pair, (48, 48), (0, False), config=M.MatchConfig(temperature=.01))
    warp, valid = map(torch.from_numpy, pair.truth((48, 48)))
    assert valid[:, 8:].all() and not valid[:, :8].any()
    assert ((found - warp).abs()[4:-4, 12:-4] * 24).max() < 1e-3  # interpolation is flat in the outer half patch, and mixes in the patches without a match
    row = M.match(raw, None, None, Set([pair]), M.MatchConfig(img_size=(48, 48), probe=False, norms=(False,), temperature=.01)).rows[0]
    assert row.epe < 2.5 and row.matcher == "cosine" and row.pck[1] > .7 and row.pairs == 1
    assert abs(M.stay_row(Set([pair]), (48, 48)).epe - 8) < 1e-6


@torch.no_grad()
def test_features_of_layers(encoder):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, maps = encoder(images, maps=(1, 2, 3))
    last, first, again = M.patch_features(encoder, images, (-1, 0, 2), norm=False)
    assert torch.equal(last, maps[2][:, 1:]) and torch.equal(first, maps[0][:, 1:]) and torch.equal(again, last)
    assert torch.equal(M.patch_features(encoder, images)[0], tokens[:, 1:])
    alone = M.patch_features(encoder, images[1:])[0]
    torch.testing.assert_close(alone, tokens[1:, 1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="layer 3 is not a block"):
        M.patch_features(encoder, images, (3,))
    with pytest.raises(ValueError, match="layers is empty"):
        M.patch_features(encoder, images, ())


def test_features_of_timm():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0, reg_tokens=2).eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(M.patch_features(vit, images, (1,))[0], vit.forward_features(images)[:, 3:])
    assert M.patch_features(vit, images, (0,), norm=False)[0].shape == (1, 16, 24)
    with pytest.raises(ValueError, match="layers is empty"):
        M.patch_features(vit, images, ())


# probe

def toy_bank(seed=0, pairs=6, noise=3.):
    "Features of which half the numbers say where a patch belongs and the other half are noise."
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(16, generator=g) for _ in range(pairs)])
    place = torch.randn(pairs, 16, 4, generator=g)
    code = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    place = (place @ code)
    b = torch.cat([place, noise * torch.randn(pairs, 16, 8, generator=g)], -1)
    a = torch.cat([place.gather(1, order[..., None].expand(-1, -1, 8)), noise * torch.randn(pairs, 16, 8, generator=g)], -1)
    warp = torch.from_numpy(D.cell_centres((4, 4))).float().flatten(0, 1)[order]
    return M.Bank({(0, True): (a, b)}, order, torch.ones(pairs, 16, dtype=torch.bool), (4, 4), (4, 4), warp.view(pairs, 4, 4, 2), torch.ones(pairs, 4, 4, dtype=torch.bool))


def test_the_probe_learns_what_to_look_at():
    train, chooser, test = toy_bank(0, 24), toy_bank(1), toy_bank(2)
    config = M.MatchConfig(steps=300, lrs=(1e-5, 1e-2), weight_decays=(1e-2,), looks=3)
    found = M.train_heads(train, chooser, (0, True), config)
    cosine, probe = (float(M.summarise(M.measure(test, (0, True), heads)[0])[0]) for heads in (None, found.heads))
    assert found.lr == 1e-2 and probe < .5 * cosine and found.losses.shape == (3, 2) and found.losses[-1, 1] < found.losses[0, 1] - .1


@pytest.mark.parametrize("start", ["random", "identity"])
def test_a_head_of_the_sweep_is_the_head_trained_alone(start):
    train, chooser = toy_bank(0), toy_bank(1)
    settings = dict(steps=12, clip=None, looks=1, batch_size=4, start=start)
    rates, decays = (1e-3, 1e-2), (0., .3)
    heads, rule = M.Heads(16, 4, 0, start), None
    every = [(lr, decay) for lr in rates for decay in decays]
    rule = M.HeadsAdamW(heads, *(torch.tensor(x) for x in zip(*every)))
    order = torch.Generator().manual_seed(0)
    for step in range(12):
        rows = torch.randint(6, (4,), generator=order)
        a, b = (x[rows] for x in train.features[0, True])
        M.match_loss(M.log_probs(heads(a), heads(b)), train.classes[rows], train.valid[rows]).sum().backward()
        rule.step(.1 if step >= .9 * 12 else 1.)
    for i, (lr, decay) in enumerate(every):
        alone = M.train_heads(train, chooser, (0, True), M.MatchConfig(lrs=(lr,), weight_decays=(decay,), **settings))
        torch.testing.assert_close(alone.heads.weight[0], heads.weight[i].detach(), atol=2e-5, rtol=0)
        torch.testing.assert_close(alone.heads.bias[0], heads.bias[i].detach(), atol=2e-5, rtol=0)
    assert (heads.weight[0] - heads.weight[2]).abs().max() > 1e-3


def test_the_step_is_adamw():
    torch.manual_seed(0)
    heads, rates, decays = M.Heads(5, 3), torch.tensor([1e-3, 1e-2, .1]), torch.tensor([0., .1, .5])
    alone = [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in zip(heads.weight.data, heads.bias.data)]
    theirs = [torch.optim.AdamW([dict(params=[w], weight_decay=float(d)), dict(params=[b], weight_decay=0.)], lr=float(lr)) for (w, b), lr, d in zip(alone, rates, decays)]
    rule = M.HeadsAdamW(heads, rates, decays)
    for step in range(6):
        gradients = torch.randn(3, 5, 5), torch.randn(3, 5)
        heads.weight.grad, heads.bias.grad = gradients[0].clone(), gradients[1].clone()
        rule.step(.1 if step > 3 else 1.)
        for i, optimizer in enumerate(theirs):
            alone[i][0].grad, alone[i][1].grad = gradients[0][i].clone(), gradients[1][i].clone()
            for group in optimizer.param_groups:
                group["lr"] = float(rates[i]) * (.1 if step > 3 else 1.)
            optimizer.step()
    for i, (w, b) in enumerate(alone):
        torch.testing.assert_close(heads.weight[i], w, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(heads.bias[i], b, atol=1e-6, rtol=1e-5)


def test_the_joint_clip_couples_heads():
    config = M.MatchConfig(steps=5, lrs=(1e-2,), weight_decays=(0.,), looks=1)
    both = M.train_heads(toy_bank(0), toy_bank(1), (0, True), config).heads.weight
    free = M.train_heads(toy_bank(0), toy_bank(1), (0, True), replace(config, clip=None)).heads.weight
    assert (both - free).abs().max() > 1e-5


def test_the_joint_clip_by_hand():
    "The gradient of the mean loss of all heads, cut to the length .01 of all their numbers together; so cut, a small head takes a smaller step than alone."
    train, settings = toy_bank(0), [(1e-3, 0.), (1e-1, 0.)]
    found = M.train_heads(train, toy_bank(1), (0, True), M.MatchConfig(steps=6, batch_size=4, lrs=(1e-3, 1e-1), weight_decays=(0.,), looks=1, drop=1.))
    heads, order = M.Heads(16, 2), torch.Generator().manual_seed(0)
    rule = M.HeadsAdamW(heads, *(torch.tensor(x) for x in zip(*settings)))
    for _ in range(6):
        rows = torch.randint(6, (4,), generator=order)
        a, b = (x[rows] for x in train.features[0, True])
        M.match_loss(M.log_probs(heads(a), heads(b)), train.classes[rows], train.valid[rows]).mean().backward()
        length = sum(float((p.grad ** 2).sum()) for p in heads.parameters()) ** .5
        assert length > .01
        for p in heads.parameters():
            p.grad *= .01 / length
        rule.step()
    k = [lr for lr, _ in settings].index(found.lr)
    torch.testing.assert_close(found.heads.weight[0], heads.weight[k].detach(), atol=2e-5, rtol=0)


def test_the_best_look_is_kept_not_the_last(monkeypatch):
    epes, config = iter((5., 2., 9.)), M.MatchConfig(steps=9, batch_size=4, lrs=(1e-2,), weight_decays=(0.,), looks=3)
    six = M.train_heads(toy_bank(0), toy_bank(1), (0, True), replace(config, steps=6, looks=1))
    monkeypatch.setattr(M, "measure", lambda *_: torch.tensor([[[1., next(epes), 0, 0, 0, 0, 0, 0]]]))
    found = M.train_heads(toy_bank(0), toy_bank(1), (0, True), config)
    assert (found.step, found.epe) == (6, 2.) and torch.equal(found.heads.weight, six.heads.weight)


@pytest.mark.parametrize("clip", [None, .01])
def test_a_head_that_diverged_is_never_chosen_and_stops_no_other(clip):
    config = M.MatchConfig(steps=60, lrs=(1e-2,), weight_decays=(.1,), looks=2, clip=clip)
    both = M.train_heads(toy_bank(0), toy_bank(1), (0, True), replace(config, lrs=(1e30, 1e-2)))
    assert both.lr == 1e-2 and np.isfinite(both.epe) and both.heads.weight.isfinite().all() and both.losses[:, 1].isfinite().all()
    with pytest.raises(UserError, match="every head of the matching probe diverged: give lower --lrs than 1e\\+30$"):
        M.train_heads(toy_bank(0), toy_bank(1), (0, True), replace(config, lrs=(1e30,)))


def test_only_valid_places_are_learned_from():
    bank, heads = toy_bank(0), M.Heads(16, 1)
    logp = M.log_probs(*(heads(x).detach() for x in bank.features[0, True]))
    valid = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < .5
    loss = M.match_loss(logp, bank.classes, valid)
    wrong = torch.where(valid, bank.classes, 0)
    assert torch.equal(loss, M.match_loss(logp, wrong, valid))
    by_hand = [-float(logp[0, p, bank.classes[p, n], n]) for p in range(6) for n in range(16) if valid[p, n]]
    assert abs(float(loss) - np.mean(by_hand)) < 1e-4 and torch.isfinite(M.match_loss(logp, wrong, valid & False)).all()


# the whole

FAST = M.MatchConfig(img_size=(32, 32), steps=6, lrs=(1e-3,), weight_decays=(.01,), looks=2)


def test_match_and_controls(encoder, splits):
    config = replace(FAST, layers=(), norms=(True, False))
    result = M.compare(encoder, splits, lambda: Encoder(32, 8, 24, 3, 2), config, name="toy")
    assert len(result.rows) == 12 + 12 + 2 + 1 == len(result.trained)
    assert [r.encoder for r in result.rows[11::12]] == ["toy", "untrained"] and result.rows[-1].matcher == "stay"
    assert all(np.isfinite(r.epe) and r.epe_interval[0] <= r.epe <= r.epe_interval[1] and 0 <= r.robustness <= 1 for r in result.rows)
    assert {(r.layer, r.norm, r.matcher) for r in result.rows[:12]} == {(k, n, m) for k in range(3) for n in (True, False) for m in ("cosine", "linear")}
    assert all((r.lr is None) == (r.matcher != "linear") for r in result.rows) and result.best.epe == min(r.epe for r in result.rows)
    table = M.format_table(result.rows)
    assert len(table.splitlines()) == 28 and "stay" in table and "nan" not in table
    again = M.match(encoder, splits.train, splits.val, splits.test, config, name="toy")
    assert again.rows == result.rows[:12]
    single = M.match(encoder, splits.train, splits.val, splits.test, replace(FAST, layers=(1,)), name="toy")
    assert single.rows == tuple(r for r in again.rows if r.layer == 1 and r.norm)


def test_the_set_that_chooses(encoder, splits):
    chosen = {how: M.match(encoder, splits.train, splits.val, splits.test, replace(FAST, select=how, lrs=(1e-4, 1e-2), steps=40)) for how in ("val", "test")}
    linear = {how: r.rows[1] for how, r in chosen.items()}
    assert linear["test"].epe <= linear["val"].epe and abs(chosen["test"].trained[1].epe - linear["test"].epe) < 1e-6
    assert chosen["val"].settings["train_pairs"] == len(splits.train) not in (len(splits.val), len(splits.test))
    assert chosen["val"].settings["chooser_pairs"] == len(splits.val) and chosen["test"].settings["chooser_pairs"] == len(splits.test)
    without = M.match(encoder, splits.train, None, splits.test, replace(FAST, select="test"))
    assert len(without.rows) == 2


def test_bfloat16(encoder, splits):
    found = M.match(encoder, splits.train, splits.val, splits.test, replace(FAST, amp=True))
    full = M.match(encoder, splits.train, splits.val, splits.test, FAST)
    assert abs(found.rows[0].epe - full.rows[0].epe) < .2 * full.rows[0].epe and found.rows[0].epe != full.rows[0].epe


def test_unreadable_pairs_are_left_out(encoder, caplog):
    class Broken(Set):
        def __getitem__(self, i):
            if i == 1:
                raise BrokenImage("b.png", "cut off")
            return super().__getitem__(i)
    pairs = Broken(shifted_pair(p=8, n=4, seed=i) for i in range(3))
    row = M.match(encoder, None, None, pairs, replace(FAST, probe=False)).rows[0]
    assert row.pairs == 2 and row.skipped == 1 and "b.png" in caplog.text and "2 (-1)" in M.format_table([row])
    alone = M.match(encoder, None, None, Set([pairs[0]]), replace(FAST, probe=False)).rows[0]
    assert alone.epe_interval is None and alone.robustness_interval is None and " -  " in M.format_table([alone]) and row.epe_interval[0] < row.epe_interval[1]
    whole = M.match(encoder, None, None, Set([pairs[0], pairs[2]]), replace(FAST, probe=False)).rows[0]
    assert abs(row.epe - whole.epe) < 1e-9


@pytest.mark.parametrize("change, parts, message", [
    (dict(img_size=(30, 32)), "all", "multiple of patch_size 8"), (dict(layers=(7,)), "all", "it has 3"), ({}, "test", "only test pairs"), ({}, "no val", "--select test")])
def test_bad_requests_of_match(encoder, splits, change, parts, message):
    train, val = (None if parts == "test" else splits.train), (splits.val if parts == "all" else None)
    with pytest.raises(UserError, match=message):
        M.match(encoder, train, val, splits.test, replace(FAST, **change))


def test_no_pairs_is_one_line(encoder):
    with pytest.raises(UserError, match="there are no pairs"):
        M.match(encoder, None, None, Set(), replace(FAST, probe=False))


@pytest.mark.parametrize("change", [dict(steps=0), dict(lrs=()), dict(lrs=(-1.,)), dict(lrs=(1e-3, float("nan"))), dict(lrs=(float("inf"),)), dict(weight_decays=(float("nan"),)), dict(temperature=0.),
                                    dict(temperature=float("nan")), dict(norms=()), dict(clip=0.), dict(looks=0), dict(batch_size=0)])
def test_bad_settings(change):
    with pytest.raises(UserError, match=f"^{next(iter(change))} ") as error:
        M.MatchConfig(**change)
    assert "\n" not in str(error.value)


def test_a_size_of_nothing_is_not_the_default(encoder, splits):
    assert M.match_size(encoder, None) == (32, 32)
    with pytest.raises(UserError, match="img_size 0"):
        M.match(encoder, None, None, splits.test, replace(FAST, probe=False, img_size=(0, 0)))


def test_figure(encoder, splits):
    pair = splits.test[0]
    figure = M.match_figure(pair, M.find_matches(encoder, pair, (32, 32)), title="toy")
    assert len(figure.axes) == 4 and figure.axes[0].get_title() == "a  toy"
    perfect = torch.from_numpy(pair.truth((32, 32))[0]).float()
    assert "mean 0.0" in M.match_figure(pair, perfect).axes[2].get_title()
