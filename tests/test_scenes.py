"""Rendered scenes: what they say about themselves must be exact. Independent arithmetic here: nothing below uses the renderer's own poses of things unless it says so."""
import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mae_repro.parts.weights import UserError
from mae_repro.views import layouts, scenes
from mae_repro.views.layouts import LAYOUTS, davis_palette, objects, write_layout
from mae_repro.views.photos import BrokenImage, Pixels
from mae_repro.views.posed import SceneFolders
from mae_repro.views.scenes import FIGURE, JOINTS, PARTS, Scenes, cast, correspondences, make_world, render, warp

T, H, W = 12, 72, 96


@pytest.fixture(scope="module", params=[3, 4])
def scene(request):
    return render((0, request.param), T, (H, W))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_REPRO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scenes"


def grid():
    return np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).astype(float)


def to_world(scene, i):
    "Points of the world (H, W, 3) under the pixels of frame i, from depth, K, R, t alone."
    x = np.concatenate([grid(), np.ones((H, W, 1))], -1) @ np.linalg.inv(scene.K).T * scene.depth[i][..., None].astype(float)
    return (x - scene.t[i]) @ scene.R[i]


def to_image(scene, i, points):
    x = points @ scene.R[i].T + scene.t[i]
    xy = x @ scene.K.T
    return xy[..., :2] / xy[..., 2:], x[..., 2]


def digest(scene):
    arrays = (scene.images, scene.depth, scene.K, scene.R, scene.t, scene.ids, scene.parts, scene.keypoints, scene.visible)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


# what a scene is made of

def test_shapes_and_kinds(scene):
    assert scene.images.shape == (T, 3, H, W) and scene.images.dtype == np.uint8
    assert scene.depth.shape == (T, H, W) and scene.depth.dtype == np.float32
    assert scene.K.shape == (3, 3) and scene.R.shape == (T, 3, 3) and scene.t.shape == (T, 3)
    assert scene.ids.shape == scene.parts.shape == (T, H, W) and scene.ids.dtype == scene.parts.dtype == np.uint8
    assert scene.keypoints.shape == (T, len(JOINTS), 2) == (T, 15, 2) and scene.visible.shape == (T, 15) and scene.visible.dtype == bool
    assert len(scene) == T and scene.frame(0).size == (W, H) and (np.asarray(scene.frame(2)) == scene.images[2].transpose(1, 2, 0)).all()
    assert set(np.unique(scene.ids)) <= set(range(5)) and scene.parts.max() < len(PARTS) <= 20
    assert ((scene.ids == 0) == (scene.parts == 0)).all()
    assert ((scene.ids == 1) == ((scene.parts > 0) & (scene.parts <= len(FIGURE)))).all()
    assert np.allclose(scene.R @ scene.R.swapaxes(1, 2), np.eye(3)) and np.allclose(np.linalg.det(scene.R), 1)
    assert np.isfinite(scene.depth).all() and scene.depth.min() > .2 and scene.depth.max() < 15


def test_every_thing_is_seen_in_most_scenes_and_moves_like_a_film():
    for i in range(8):
        s = render((1, i), 2, 48)
        assert len(np.unique(s.ids)) >= 4, i
        assert .03 < (s.ids > 0).mean() < .6
        assert s.images.std() > 25
        xy, valid = correspondences(s, 0, 1)
        assert valid.mean() > .4  # most of the first frame is still there in the last
        moved = np.linalg.norm(xy - np.stack(np.meshgrid(range(48), range(48)), -1), axis=-1)[valid & (s.ids[0] > 0)] / 48
        assert .03 < np.median(moved) < .6


def test_scenes_differ_and_the_camera_stays_in_the_room():
    worlds = [make_world((2, i), 24) for i in range(20)]
    assert len({w.R.tobytes() for w in worlds}) == len({w.atlas.tobytes() for w in worlds}) == 20
    for w in worlds:
        centre = -np.einsum("tji,tj->ti", w.R, w.t)
        assert (np.abs(centre - w.position[:, 0]) < w.half[0] - .2).all()


def test_size_and_number_of_frames_show_the_same_scene():
    small, large = render(5, 3, 32), render(5, 5, 64)
    assert np.allclose(small.R[[0, 1, 2]], large.R[[0, 2, 4]]) and np.allclose(small.keypoints[0] + .5, (large.keypoints[0] + .5) / 2)
    assert (small.ids[0] == large.ids[0][::2, ::2]).mean() > .9
    assert np.abs(small.images[0].astype(float) - large.images[0].reshape(3, 32, 2, 32, 2).mean((2, 4))).mean() < 12
    assert len(np.unique(render(5, 1, 32, num_objects=1).ids)) == 2
    assert render(6, 1, 64, num_objects=12).ids.max() > 5


# exactness

def test_depth_of_the_room_is_that_of_its_planes(scene):
    points = (to_world(scene, 5) - scene.world.position[0, 0]) / scene.world.half[0]
    on_wall = scene.ids[5] == 0
    assert np.abs(np.abs(points[on_wall]).max(-1) - 1).max() < 1e-5


def test_depth_agrees_between_frames(scene):
    "A point of the room seen in a has in b the depth that b measured, where b sees it. Measured by interpolation of 1 / z, which is linear on a plane."
    for a, b in ((0, 6), (11, 3)):
        xy, z = to_image(scene, b, to_world(scene, a))
        whole = np.floor(xy).astype(int)
        x, y = whole.clip(0, [W - 2, H - 2]).transpose(2, 0, 1)
        same = np.all([scene.ids[b][y + j, x + i] == 0 for i in (0, 1) for j in (0, 1)], 0)
        flat = warp(1 / scene.depth[b][None], xy)[0]
        corners = np.stack([1 / scene.depth[b][y + j, x + i] for j in (0, 1) for i in (0, 1)])
        plane = np.abs(corners[0] + corners[3] - corners[1] - corners[2]) < 1e-6 * 3  # not across a corner of the room
        ok = (scene.ids[a] == 0) & same & plane & (whole == np.stack([x, y], -1)).all(-1)
        assert ok.mean() > .3
        close = np.abs(1 / flat - z)[ok] < 1e-3 * z[ok]
        assert close.mean() > .99, close.mean()


def test_correspondences_of_the_room_are_camera_geometry(scene):
    for a, b in ((0, 11), (7, 2)):
        xy, valid = correspondences(scene, a, b)
        expected, _ = to_image(scene, b, to_world(scene, a))
        still = scene.ids[a] == 0
        assert xy.shape == (H, W, 2) and valid.shape == (H, W) and valid.dtype == bool
        assert (valid & still).mean() > .3
        assert np.abs(xy - expected)[valid & still].max() < 1e-6
        inside = ((expected > -.5) & (expected < [W - .5, H - .5])).all(-1)
        assert not valid[still & ~inside].any()


def test_correspondences_of_moving_things_stay_on_the_thing_at_the_same_place(scene):
    "A point keeps its coordinates on the thing it lies on: cast the ray in b and compare with a."
    a, b = 1, 9
    xy, valid = correspondences(scene, a, b)
    from_a = cast(scene.world, a, np.arange(W)[None], np.arange(H)[:, None])
    in_b = cast(scene.world, b, *xy[valid].T)
    moving = scene.ids[a][valid] > 0
    assert moving.sum() > 200
    assert (in_b.thing == from_a.thing[valid])[moving].mean() > .98
    same = in_b.thing == from_a.thing[valid]
    assert np.abs(in_b.local - from_a.local[:, valid])[:, same & moving].max() < .02
    assert np.median(np.abs(in_b.local - from_a.local[:, valid])[:, same & moving]) < 1e-4


def test_warping_b_gives_a(scene):
    for a, b in ((0, 4), (6, 11)):
        xy, valid = correspondences(scene, a, b)
        error = np.abs(warp(scene.images[b], xy) - scene.images[a]).mean(0)
        unmoved = np.abs(scene.images[b].astype(float) - scene.images[a]).mean(0)
        assert np.median(error[valid]) < 5 and error[valid].mean() < .4 * unmoved[valid].mean()
        things = valid & (scene.ids[a] > 0)
        assert error[things].mean() < .5 * unmoved[things].mean()
        assert error[~valid].mean() > 2 * error[valid].mean()  # what is hidden cannot be had


def test_there_and_back_again(scene):
    for a, b in ((0, 5), (2, 11)):
        xy, valid = correspondences(scene, a, b)
        back, returned = correspondences(scene, b, a)
        whole = np.round(xy).astype(int).clip(0, [W - 1, H - 1])
        y, x = whole[..., 1], whole[..., 0]
        same = valid & (scene.things[a] == scene.things[b][y, x]) & returned[y, x]
        assert same.mean() > .4
        # a pixel of b is up to half a pixel beside the place, which is stretched on the way back: bounded by the local Jacobian
        stretch = np.abs(np.gradient(back, axis=0)).max(-1) + np.abs(np.gradient(back, axis=1)).max(-1)
        off = np.abs(back[y, x] - grid()).max(-1)
        assert (off <= .5 * stretch[y, x] + .3)[same].mean() > .97
        assert np.median(off[same]) < .5
        exact, all_seen = correspondences(scene, a, a)
        assert np.abs(exact - grid()).max() < 1e-6 and all_seen.all()


def test_occlusion_agrees_with_the_masks(scene):
    "A point of the room that lands well inside a thing of b is hidden; one that lands well inside the room is not. Every pixel of a thing that is seen lands on its mask."
    a, b = 0, 8
    xy, valid = correspondences(scene, a, b)
    expected, _ = to_image(scene, b, to_world(scene, a))
    x, y = np.round(np.nan_to_num(expected)).astype(int).transpose(2, 0, 1)
    inside = (x > 0) & (x < W - 1) & (y > 0) & (y < H - 1)
    x, y = x.clip(1, W - 2), y.clip(1, H - 2)
    around = np.stack([scene.ids[b][y + j, x + i] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    room = (scene.ids[a] == 0) & inside
    hidden, free = room & (around > 0).all(0), room & (around == 0).all(0)
    assert hidden.sum() > 50 and free.sum() > 1000
    assert not valid[hidden].any() and valid[free].mean() > .995
    whole = np.round(xy[valid]).astype(int)
    wrong = scene.ids[b][whole[:, 1].clip(0, H - 1), whole[:, 0].clip(0, W - 1)] != scene.ids[a][valid]
    assert wrong.mean() < .03  # only where rounding crosses an edge


def test_joints_lie_on_the_puppet(scene):
    assert scene.visible.mean() > .3
    for t in range(T):
        for j in np.flatnonzero(scene.visible[t]):
            x, y = np.round(scene.keypoints[t, j]).astype(int)
            near = scene.ids[t][max(0, y - 1):y + 2, max(0, x - 1):x + 2]
            assert (near == 1).any(), (t, JOINTS[j][0])
            hit = cast(scene.world, t, *scene.keypoints[t, j][:, None])
            assert scene.world.instance[hit.thing[0]] == 1 and PARTS[scene.world.part[hit.thing[0]]] in [FIGURE[p][0] for p in JOINTS[j][3]]
    outside = ((scene.keypoints < -.5) | (scene.keypoints >= [W - .5, H - .5])).any(-1)
    assert not scene.visible[outside].any()


def test_limbs_hang_together():
    "The end of an upper limb and the start of the lower one are the same place, and bones keep their length."
    w = make_world(3, 16)
    ends = {name: w.position[:, 1 + p] + sign * .92 * w.half[1 + p, 1] * w.rotation[:, 1 + p, :, 1] for p, (name, *_) in enumerate(FIGURE) for sign in [1 if "upper" in name else -1]}
    for side in ("left", "right"):
        for limb in ("arm", "leg"):
            assert np.abs(ends[f"{side} upper {limb}"] - ends[f"{side} lower {limb}"]).max() < 1e-9


def test_supersampling_only_changes_seams_and_converges():
    one, two, four = (render(9, 1, 64, supersample=n).images[0].astype(float) for n in (1, 2, 5))
    changed = (one != two).any(0)
    assert .02 < changed.mean() < .5
    assert np.abs(two - four)[:, changed].mean() < np.abs(one - four)[:, changed].mean()


# the same bytes for everybody

def test_deterministic_here_and_in_another_process():
    code = ("import hashlib, sys; sys.path.insert(0, sys.argv[1]); import test_scenes as t; from mae_repro.views.scenes import render; import numpy as np; np.random.seed(5); "
            "print(t.digest(render((4, 2), 3, (32, 40))))")
    first = digest(render((4, 2), 3, (32, 40)))
    np.random.seed(1)
    assert digest(render((4, 2), 3, (32, 40))) == first
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], env=env, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert out.stdout.split()[-1] == first
    assert digest(render((4, 3), 3, (32, 40))) != first


def test_images_of_others_and_broken_ones():
    grey = Pixels(np.array([b"a", b"b"]), pixels=np.full((2, 20, 30, 3), 128, np.uint8))
    assert render(0, 1, 32, images=grey).images.std() < 40 < render(0, 1, 32).images.std()
    with pytest.raises(ValueError, match="images is empty"):
        render(0, 1, 32, images=Pixels(np.array([], dtype=bytes), pixels=np.zeros((0, 8, 8, 3), np.uint8)))

    class Broken:
        def __len__(self):
            return 3

        def name(self, i):
            return f"image {i}"

        def load(self, i):
            from mae_repro.views.photos import BrokenImage
            if i < 2 or self.all:
                raise BrokenImage(f"image {i}", "torn")
            return Image.new("RGB", (50, 40), "red")

    images = Broken()
    images.all = False
    assert render(0, 1, 16, images=images).images.shape == (1, 3, 16, 16)
    images.all = True
    with pytest.raises(UserError, match="cannot be read"):
        render(0, 1, 16, images=images)


@pytest.mark.parametrize("wrong, message", [
    (dict(size=4), "size"), (dict(size=(16, 5000)), "size"), (dict(size=(16, 16, 16)), "size"), (dict(num_frames=0), "num_frames"), (dict(num_objects=0), "num_objects"),
    (dict(num_objects=300), "num_objects"), (dict(supersample=0), "supersample"), (dict(seed=-1), "seed"), (dict(seed=(0, -2)), "seed")])
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        render(**{"seed": 0, "num_frames": 1, "size": 16, **wrong})


def test_no_such_frame(scene):
    for a, b in ((-1, 0), (0, T), (99, 0)):
        with pytest.raises(ValueError, match="not a frame"):
            correspondences(scene, a, b)


# the cache

SMALL = dict(num=3, num_frames=4, size=24, seed=7)


def pixels(s):
    return np.stack([np.stack([np.asarray(f) for f in s.frames(i, list(range(s.length(i))))]) for i in range(len(s))])


def test_scenes_are_sequences_kept_in_one_file(cache, monkeypatch):
    s = Scenes(**SMALL)
    assert len(s) == 3 and s.length(1) == 4 and "scene 1" in s.name(1)
    picture, = s.frames(2, [3])
    assert picture.mode == "RGB" and picture.size == (24, 24) and (np.asarray(picture) == render((7, 2), 4, 24).images[3].transpose(1, 2, 0)).all()
    assert [np.asarray(f).tolist() for f in s.frames(1, [2, 0])] == [pixels(s)[1][k].tolist() for k in (2, 0)]
    assert (s.scene(1).images.transpose(0, 2, 3, 1) == pixels(s)[1]).all()
    assert [p.suffix for p in sorted(cache.iterdir())] == [".frames", ".lock"]
    for wrong in (lambda: s.frames(0, [4]), lambda: s.frames(0, [-1]), lambda: s.frames(3, [0]), lambda: s.name(3), lambda: s.scene(-1)):
        with pytest.raises(IndexError):
            wrong()
    monkeypatch.setattr(scenes, "render", None)  # the second time nothing is rendered
    assert (pixels(Scenes(**SMALL)) == pixels(s)).all()
    twin = pickle.loads(pickle.dumps(s))
    assert len(pickle.dumps(s)) < 2000 and (pixels(twin) == pixels(s)).all()


def test_every_setting_has_a_file_of_its_own(cache):
    files = {Scenes(**{**SMALL, **change}).path for change in ({}, {"num": 2}, {"num_frames": 3}, {"size": (24, 16)}, {"seed": 8}, {"num_objects": 2}, {"supersample": 1})}
    photos = Pixels(np.array([b"a"]), pixels=np.zeros((1, 8, 8, 3), np.uint8))
    files.add(Scenes(**SMALL, images=photos).path)
    assert len(files) == 8


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b[:-3] + b"abc", lambda b: b + b"x"])
def test_a_damaged_file_is_made_again(cache, damage):
    s = Scenes(**SMALL)
    good = s.path.read_bytes()
    s.path.unlink()
    s.path.write_bytes(damage(good))
    (cache / f"{s.path.name}.tmp-1").write_bytes(b"left by a process that was killed")
    assert Scenes(**SMALL).path.read_bytes() == good
    assert not list(cache.glob("*.tmp-*"))


def test_a_stop_in_the_middle_leaves_nothing(cache, monkeypatch):
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(*args, **kwargs)
    monkeypatch.setattr(scenes, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        Scenes(**SMALL)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def _open_and_hash(_):
    return hashlib.sha256(pixels(Scenes(**{**SMALL, "num": 6})).tobytes()).hexdigest()


def test_several_processes_at_once(cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(_open_and_hash, range(4), chunksize=1))) == 1
    assert len(list(cache.glob("*.frames"))) == 1 and not list(cache.glob("*.tmp-*"))


@pytest.mark.parametrize("wrong", [dict(num=0), dict(num_frames=0), dict(size=2), dict(seed=-1), dict(num_objects=0), dict(supersample=9)])
def test_bad_sets(cache, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Scenes(**{**SMALL, **wrong})


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAE_REPRO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="MAE_REPRO_CACHE"):
        Scenes(**SMALL)


# layouts on disk

SHORT = dict(num=2, num_frames=3, size=(48, 64), seed=5, supersample=1)
FILES = {
    "davis": ["ImageSets/2017/val.txt", *[f"{kind}/480p/scene-00{i}/0000{t}.{end}" for kind, end in (("JPEGImages", "jpg"), ("Annotations", "png")) for i in (0, 1) for t in range(3)]],
    "vip": ["lists/val_videos.txt", *[f"{kind}/videos{i}/{t:012d}.{end}" for kind, end in (("Images", "jpg"), ("Annotations/Category_ids", "png")) for i in (1, 2) for t in (1, 2, 3)]],
    "jhmdb": ["splits/walk_test_split1.txt", *[f"joint_positions/walk/scene_00{i}/joint_positions.mat" for i in (0, 1)], *[f"Rename_Images/walk/scene_00{i}/0000{t}.png" for i in (0, 1) for t in (1, 2, 3)]],
    "bag": [f"bag-000{i}/{name}.png" for i in (0, 1) for name in ("real", "gen_1", "gen_2")],
    "scene": [f"scene-00{i}/{name}" for i in (0, 1) for name in ["cameras.json", *[f"{kind}/0000{t}.png" for kind in ("images", "depth", "masks") for t in range(3)]]],
}


def tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def truth(i):
    return render((5, i), 3, (48, 64), supersample=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    return {layout: (root / layout, write_layout(layout, root / layout, **SHORT)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_summary_and_same_bytes_again(layout, written, tmp_path):
    out, summary = written[layout]
    assert sorted(tree(out)) == sorted(FILES[layout])
    listing = LAYOUTS[layout].listing
    assert summary == dict(layout=layout, out=str(out), sequences=2, frames=6, size=[48, 64], list=str(out / listing) if listing else None)
    json.dumps(summary)
    (tmp_path / "empty").mkdir()
    write_layout(layout, str(tmp_path / "empty"), **SHORT)
    assert tree(tmp_path / "empty") == tree(out)


def test_davis(written):
    out, _ = written["davis"]
    assert (out / "ImageSets/2017/val.txt").read_text() == "scene-000\nscene-001\n"
    assert davis_palette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] and davis_palette()[3 * 8:3 * 9] == [64, 0, 0] and davis_palette()[-3:] == [224, 224, 192]
    for i in (0, 1):
        s = truth(i)
        masks = [Image.open(out / f"Annotations/480p/scene-00{i}/0000{t}.png") for t in range(3)]
        assert all(m.mode == "P" and m.getpalette()[:24] == davis_palette()[:24] for m in masks)
        ids = np.stack([np.asarray(m) for m in masks])
        assert (ids == objects(s)).all()
        assert np.unique(ids[0]).tolist() == list(range(ids.max() + 1)) and ids.max() >= 3
        assert all(len(np.unique(s.ids[ids == k])) == 1 for k in range(1, ids.max() + 1))
        image = np.asarray(Image.open(out / f"JPEGImages/480p/scene-00{i}/00002.jpg")).astype(float)
        assert np.abs(image - s.images[2].transpose(1, 2, 0)).mean() < 9  # chroma is halved, and there is much of it in a small picture


def test_things_that_enter_later_are_background():
    s = render((5, 0), 2, 32)
    ids = np.array(s.ids)
    ids[0][ids[0] == 2] = 0
    ids[0, 0, 0] = 2
    masks = objects(scenes.Scene(**{**s.__dict__, "ids": ids}))
    assert not masks[1][ids[1] == 2].any() and set(np.unique(masks)) == set(range(masks.max() + 1))


def test_vip(written):
    out, _ = written["vip"]
    assert (out / "lists/val_videos.txt").read_text() == "videos1\nvideos2\n"
    label = Image.open(out / "Annotations/Category_ids/videos2/000000000003.png")
    assert label.mode == "L" and (np.asarray(label) == truth(1).parts[2]).all() and np.asarray(label).max() < 20
    assert sorted(p.stem for p in (out / "Images/videos1").iterdir()) == sorted(p.stem for p in (out / "Annotations/Category_ids/videos1").iterdir())


def test_jhmdb(written):
    out, _ = written["jhmdb"]
    pos = scipy.io.loadmat(out / "joint_positions/walk/scene_001/joint_positions.mat")["pos_img"]
    assert pos.shape == (2, 15, 3) and pos.dtype == np.float64
    assert np.allclose(pos.transpose(2, 1, 0) - 1, truth(1).keypoints)
    assert (np.asarray(Image.open(out / "Rename_Images/walk/scene_001/00003.png")) == truth(1).images[2].transpose(1, 2, 0)).all()
    assert [name for name, *_ in JOINTS] == ["neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow", "left elbow", "right knee",
                                             "left knee", "right wrist", "left wrist", "right ankle", "left ankle"]


def test_bag(written):
    out, _ = written["bag"]
    found = [np.asarray(Image.open(out / f"bag-0000/{name}.png")) for name in ("gen_1", "real", "gen_2")]
    assert (np.stack(found) == truth(0).images.transpose(0, 2, 3, 1)).all()


def test_scene(written):
    out, _ = written["scene"]
    s, about = truth(1), json.loads((out / "scene-001/cameras.json").read_text())
    assert {"scene", "convention", "units", "depth_scale", "pose_source", "views"} == set(about) and "OpenCV" in about["convention"] and "/ 1000" in about["depth_scale"]
    for t, view in enumerate(about["views"]):
        assert (view["width"], view["height"]) == (64, 48)
        assert np.array_equal(view["K"], s.K) and np.array_equal(view["R"], s.R[t]) and np.array_equal(view["t"], s.t[t])
        depth = Image.open(out / "scene-001" / view["depth"])
        assert depth.mode.startswith("I") and np.abs(np.asarray(depth) / 1000 - s.depth[t]).max() < 6e-4
        assert (np.asarray(Image.open(out / "scene-001" / view["mask"])) == s.ids[t]).all()
        assert (np.asarray(Image.open(out / "scene-001" / view["file"])) == s.images[t].transpose(1, 2, 0)).all()


def test_masks_of_sixteen_bits(tmp_path):
    "Numbers up to 255 are read whatever the file's depth; 257 is refused, and does not become 1."
    write_layout("scene", tmp_path, 1, 2, 24)
    scenes = SceneFolders(tmp_path)
    path = scenes.folders[0] / scenes.views[0][1]["mask"]
    numbers = np.asarray(Image.open(path)).astype(np.uint16)
    Image.fromarray(numbers).save(path)
    assert (scenes.frame(0, 1).mask == numbers).all() and scenes.frame(0, 1).mask.dtype == np.uint8
    numbers[0, 0] = 257
    Image.fromarray(numbers).save(path)
    with pytest.raises(BrokenImage, match=f"{path.name}: holds numbers above 255"):
        scenes.frame(0, 1)


def test_nothing_of_the_users_is_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for out, message in ((tmp_path, "not empty"), (tmp_path / "mine", "a file")):
        with pytest.raises(UserError, match=message):
            write_layout("davis", out, **SHORT)
    assert tree(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize("wrong, message", [(dict(layout="coco"), "choose one of davis, vip"), (dict(num=0), "num 0"), (dict(num_frames=0), "num_frames 0"), (dict(size=2), "size"),
                                            (dict(seed=-3), "seed -3"), (dict(layout="bag", num_frames=1), "2 frames or more")])
def test_bad_layouts(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        write_layout(**{"layout": "davis", "out": tmp_path / "out", **SHORT, **wrong})
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_stop_leaves_whole_sequences_only(tmp_path, monkeypatch):
    real, written = Path.write_bytes, []

    def full(path, data):
        written.append(path)
        if len(written) == 9:  # in the second sequence of three
            raise OSError(28, "No space left on device", str(path))
        return real(path, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left") as error:
        write_layout("davis", tmp_path / "out", **{**SHORT, "num": 3})
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert sorted(tree(tmp_path / "out")) == sorted(f for f in FILES["davis"] if "scene-001" not in f)
    assert (tmp_path / "out/ImageSets/2017/val.txt").read_text() == "scene-000\n"


def test_a_kill_between_the_two_folders_of_a_sequence_is_not_listed(tmp_path, monkeypatch):
    real, moved = os.replace, []

    def stop(source, target):
        moved.append(target)
        if len(moved) == 5:  # the second sequence's pictures
            raise KeyboardInterrupt
        real(source, target)
    monkeypatch.setattr(layouts.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_layout("davis", tmp_path / "out", **SHORT)
    assert (tmp_path / "out/ImageSets/2017/val.txt").read_text() == "scene-000\n" and not (tmp_path / "out/JPEGImages/480p/scene-001").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_layout("vip", tmp_path / "file" / "below", **SHORT)
