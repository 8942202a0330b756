"""Pairs, videos and bags: each rule against brute force, the exact frame whatever the file, and broken items that say which and why."""
import io
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.parts.weights import UserError
from mae_repro.training.data import DataConfig, ViewsConfig, open_source
from mae_repro.views import bags as bags_module
from mae_repro.views.bags import BagViews, bag_order, open_bags, open_pictures, smallest
from mae_repro.views.pairs import Crop, CropViews, NeighbourViews, RandomPartners, distinct, drawn, nearest_neighbours, show_source
from mae_repro.views.photos import BrokenImage, Pixels, open_images
from mae_repro.views.samples import EpochBatches, Views, loader
from mae_repro.views.videos import Video, VideoViews, open_videos

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MAE_REPRO_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_REPRO_CACHE", str(tmp_path / "cache"))


def coordinates(h=120, w=160):
    "An image that says of each pixel where it lies: red = x, green = y, as shares of 255."
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 / (w - 1), y * 255 / (h - 1), np.full((h, w), 128)], -1).round().astype(np.uint8)


def pixels(n=6, h=40, w=56):
    "Images of one colour each; the red channel says which."
    grey = np.arange(n, dtype=np.uint8) * (250 // n)
    return Pixels(np.array([f"image{i}".encode() for i in range(n)]), pixels=np.broadcast_to(grey[:, None, None, None], (n, h, w, 3)).copy())


def which(view, n=6):
    return round(view.float().mean().item() / (250 // n))


def extent(view):
    "The part of a coordinate image that a view shows: left, right, top, bottom in 0..1, unmirrored."
    x, y = view[0].float().mean(0) / 255, view[1].float().mean(1) / 255
    return min(x[0], x[-1]).item(), max(x[0], x[-1]).item(), y[0].item(), y[-1].item()


def mirrored(view):
    return bool(view[0, 0, 0] > view[0, 0, -1])


def every_source(tmp_path):
    "One of each kind, on small data."
    fill_bags(tmp_path / "bags", 3, 4)
    fill_frames(tmp_path / "frames", [60, 20])
    images = pixels()
    ring = np.array([[(i + d) % 6 for d in (1, 2, 3)] for i in range(6)])
    photos = Pixels(np.array([b"a", b"b"]), pixels=np.stack([coordinates(), coordinates()[::-1]]))
    crops = {s: CropViews(photos, 3, 32, s) for s in ("GlobalToLocal", "LocalToGlobal", "RandomViews", "SameViews")}
    return {**crops, "random": RandomPartners(images, 3, 32), "neighbours": NeighbourViews(images, 3, 32, neighbours=ring),
            "videos": VideoViews(open_videos(tmp_path / "frames"), 3, 32), "bags": BagViews(open_bags(tmp_path / "bags"), 3, 32)}


# ---------------------------------------------------------------- the contract of a source

def test_every_source_keeps_the_contract(tmp_path):
    for kind, source in every_source(tmp_path).items():
        views = drawn(source, 1, seed=3)
        assert views.shape == (3, 3, 32, 32) and views.dtype == torch.uint8, kind
        assert source.name(1) and len(source) > 1
        again = pickle.loads(pickle.dumps(source))
        assert torch.equal(drawn(again, 1, seed=3), views), f"{kind}: a pickled copy draws something else"
        assert any(not torch.equal(drawn(source, 1, seed), views) for seed in range(4, 9)), f"{kind}: the seed does nothing"


def test_global_generator_is_the_only_chance(tmp_path):
    for kind, source in every_source(tmp_path).items():
        torch.manual_seed(5)
        np.random.seed(1)
        a, after = source.draw(1), torch.rand(())
        torch.manual_seed(5)
        np.random.seed(2)
        assert torch.equal(source.draw(1), a) and torch.rand(()) == after, kind


def test_drawn_leaves_the_generator_alone_and_is_what_training_sees(tmp_path):
    source = every_source(tmp_path)["random"]
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    views = drawn(source, 2, seed=7, epoch=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(Views(source, 16, seed=7)[3, 2]["views"], views)


def test_one_view_is_the_target_alone_and_sizes_may_be_oblong(tmp_path):
    from dataclasses import replace
    for kind, source in every_source(tmp_path).items():
        one = replace(source, num_views=1, img_size=(24, 40))
        assert drawn(one, 0).shape == (1, 3, 24, 40), kind
        with pytest.raises(ValueError, match="num_views 0"):
            replace(source, num_views=0)


def test_workers_do_not_change_a_sample(tmp_path):
    for name in "ab":
        write_video(tmp_path / f"files/{name}.mp4", 60)
    sources = {**every_source(tmp_path), "files": VideoViews(open_videos(tmp_path / "files"), 3, 32)}
    for kind in ("files", "videos", "bags", "GlobalToLocal"):
        views = Views(sources[kind], 16, seed=1, repeats=4)
        batches = EpochBatches(len(views), 2, epochs=1)
        here, there = (torch.cat([b["views"] for b in loader(views, batches, workers=w)]) for w in (0, 2))
        assert torch.equal(here, there), kind


# ---------------------------------------------------------------- crops

def test_distinct_is_uniform():
    torch.manual_seed(0)
    counts = Counter(tuple(distinct(5, 2, exclude=3)) for _ in range(6000))
    assert set(counts) == set(itertools.permutations((0, 1, 2, 4), 2)) and min(counts.values()) > 400 and max(counts.values()) < 600
    assert sorted(distinct(4, 4)) == [0, 1, 2, 3] and distinct(3, 0) == []
    with pytest.raises(ValueError, match="3 distinct integers"):
        distinct(3, 3, exclude=0)


def test_joint_crop_of_equal_images_gives_equal_views():
    image = Image.fromarray(coordinates())
    crop = Crop(48)
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = crop([image, image.copy()], joint=True)
        assert torch.equal(a, b)
    torch.manual_seed(0)
    a, b = crop([image, image])
    assert not torch.equal(a, b)


def test_joint_crop_of_unequal_sizes_shows_the_same_part():
    small, large = Image.fromarray(coordinates(60, 80)), Image.fromarray(coordinates(240, 320))
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = Crop(64)([small, large], joint=True)
        assert np.allclose(extent(a), extent(b), atol=.03) and mirrored(a) == mirrored(b)


def test_crop_is_torchvisions():
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 77, 3), dtype=np.uint8))
    for seed in range(30):
        torch.manual_seed(seed)
        ours = Crop((32, 48), (.1, 1.), (.5, 2.), flip=False)([image])[0]
        torch.manual_seed(seed)
        theirs = F.pil_to_tensor(v2.RandomResizedCrop((32, 48), (.1, 1.), (.5, 2.), antialias=True)(image))
        assert torch.equal(ours, theirs)


def test_tiny_and_narrow_images():
    for size in ((1, 1), (3, 200), (200, 3)):
        assert Crop(16)([Image.new("RGB", size), Image.new("RGB", (9, 9))], joint=True).shape == (2, 3, 16, 16)


def test_local_lies_inside_global():
    images = Pixels(np.array([b"a"]), pixels=coordinates(300, 400)[None])
    inside, touching = 0, 0
    for seed in range(60):
        target, anchor = drawn(CropViews(images, 2, 96), 0, seed)
        (l, r, t, b), (gl, gr, gt, gb) = extent(target), extent(anchor)
        assert l > gl - .01 and r < gr + .01 and t > gt - .01 and b < gb + .01
        share = (r - l) * (b - t) / ((gr - gl) * (gb - gt))
        assert .25 < share < .66
        inside += share < .5
        target, anchor = drawn(CropViews(images, 2, 96, "RandomViews"), 0, seed)
        (l, r, t, b), (gl, gr, gt, gb) = extent(target), extent(anchor)
        touching += not (l > gl - .01 and r < gr + .01 and t > gt - .01 and b < gb + .01)
    assert 10 < inside < 50 and touching > 20


def test_local_is_cut_from_the_enlarged_global_view():
    images = Pixels(np.array([b"a"]), pixels=np.random.default_rng(0).integers(0, 255, (1, 90, 120, 3), dtype=np.uint8))
    source = CropViews(images, 2, 64, flip=False)
    torch.manual_seed(3)
    target, anchor = source.draw(0)
    torch.manual_seed(3)
    wide, near = Crop(64, (.1, 1.), flip=False), Crop(64, (.3, .6), flip=False)
    wide.box(images.load(0))
    again = Image.fromarray(anchor.permute(1, 2, 0).numpy())
    assert torch.equal(near([again])[0], target)


def test_strategies():
    images = Pixels(np.array([b"a"]), pixels=coordinates()[None])
    for seed in range(10):
        g2l, l2g = (drawn(CropViews(images, 2, 64, s, flip=False), 0, seed) for s in ("GlobalToLocal", "LocalToGlobal"))
        assert torch.equal(g2l.flip(0), l2g)
        same = drawn(CropViews(images, 3, 64, "SameViews"), 0, seed)
        assert (same == same[0]).all()
    with pytest.raises(ValueError, match="strategy 'globaltolocal' is unknown"):
        CropViews(images, strategy="globaltolocal")


def test_more_views_leave_the_earlier_ones():
    images = Pixels(np.array([b"a"]), pixels=coordinates()[None])
    for strategy in ("GlobalToLocal", "LocalToGlobal", "RandomViews", "SameViews"):
        views = [drawn(CropViews(images, v, 32, strategy), 0, 5) for v in (1, 2, 4)]
        assert torch.equal(views[0], views[1][:1]) and torch.equal(views[1], views[2][:2])


def test_mirroring():
    images = Pixels(np.array([b"a"]), pixels=coordinates()[None])
    def table(**options):
        return Counter(tuple(mirrored(v) for v in drawn(CropViews(images, 2, 32, **options), 0, seed)) for seed in range(200))
    apart, joint, never = table(), table(joint_flip=True), table(flip=False)
    assert len(apart) == 4 and min(apart.values()) > 30
    assert set(joint) == {(True, True), (False, False)} and min(joint.values()) > 70
    assert set(never) == {(False, False)}


def test_an_image_is_decoded_once_a_draw():
    class Counting(Pixels):
        loads = 0
        def load(self, i):
            type(self).loads += 1
            return super().load(i)
    images = Counting(np.array([b"a"]), pixels=coordinates()[None])
    for k, strategy in enumerate(("GlobalToLocal", "LocalToGlobal", "RandomViews", "SameViews"), 1):
        drawn(CropViews(images, 4, 32, strategy), 0)
        assert Counting.loads == k


# ---------------------------------------------------------------- partners and neighbours

def test_random_partners_are_other_images():
    source = RandomPartners(pixels(), 3, 32)
    seen = Counter()
    for seed in range(300):
        target, *anchors = map(which, drawn(source, 2, seed))
        assert target == 2 and 2 not in anchors and len(set(anchors)) == 2
        seen.update(anchors)
    assert set(seen) == {0, 1, 3, 4, 5} and min(seen.values()) > 80
    with pytest.raises(UserError, match="there are 6 images"):
        RandomPartners(pixels(), 7)


def colours(n=40, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (n, 1, 1, 3)).astype(np.uint8)
    return Pixels(np.array([f"c{i}".encode() for i in range(n)]), pixels=np.broadcast_to(x, (n, 8, 8, 3)).copy())


def mean_colour(x):
    return x.float().mean((2, 3)) - 127


def test_neighbours_against_brute_force():
    images = colours()
    found = nearest_neighbours(images, mean_colour, k=4, img_size=8, batch_size=7)
    x = images.pixels[:, 0, 0].astype(float) - 127
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T - 9 * np.eye(len(x))
    for i, row in enumerate(found):
        assert i not in row and len(set(row)) == 4
        assert np.allclose(similarity[i][row], np.sort(similarity[i])[::-1][:4], atol=1e-5)


def test_neighbours_in_pieces(monkeypatch):
    images = colours()
    whole = nearest_neighbours(images, mean_colour, img_size=8)
    real = torch.Tensor.__matmul__
    shapes = []
    monkeypatch.setattr("mae_repro.views.pairs.TABLE", 40 * 7)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append(a.shape[0]) or real(a, b))
    assert np.array_equal(nearest_neighbours(images, mean_colour, img_size=8), whole)
    assert shapes == [7] * 5 + [5]


def test_twins_are_neighbours_but_nobody_is_its_own():
    images = colours()
    images.pixels[7] = images.pixels[3]
    found = nearest_neighbours(images, mean_colour, k=1, img_size=8)
    assert found[3] == 7 and found[7] == 3


def test_neighbour_index_is_kept(tmp_path, caplog):
    images, calls = colours(), []
    def embed(x):
        calls.append(len(x))
        return mean_colour(x)
    def ask(images=images, **options):
        calls.clear()
        return nearest_neighbours(images, embed, **{"img_size": 8, "name": "mean colour", **options}), len(calls)
    first, n = ask()
    assert n
    kept, n = ask()
    assert n == 0 and np.array_equal(kept, first)
    assert ask(name="other")[1] and ask(k=3)[1] and ask(images=colours(seed=1))[1] and ask(images=images.take(np.arange(30)))[1]
    assert ask(name=None)[1] and ask(name=None)[1], "without a name nothing may be kept"
    folder = tmp_path / "cache/neighbours"
    assert len(list(folder.glob("*.npy"))) == 5 and not list(folder.glob("*tmp*"))
    for file in folder.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    again, n = ask()
    assert n and np.array_equal(again, first) and "is damaged" in caplog.text
    assert ask()[1] == 0
    assert ask(cache=tmp_path / "elsewhere/deep")[1] and ask(cache=tmp_path / "elsewhere/deep")[1] == 0


def test_one_looks_for_neighbours_and_the_others_wait(tmp_path):
    started, go, calls, found = threading.Event(), threading.Event(), [], {}

    def ask(who):
        def embed(x):
            calls.append(who)
            started.set()
            assert go.wait(20)
            return mean_colour(x)
        found[who] = nearest_neighbours(colours(), embed, img_size=8, name="mean colour")
    first, second = (threading.Thread(target=ask, args=(who,)) for who in ("first", "second"))
    first.start()
    assert started.wait(20)
    second.start()
    time.sleep(.3)
    go.set()
    first.join()
    second.join()
    assert calls == ["first"] and np.array_equal(found["first"], found["second"])


def test_neighbours_where_nothing_can_be_kept(tmp_path, caplog):
    (tmp_path / "file").touch()
    found = nearest_neighbours(colours(), mean_colour, img_size=8, name="mean colour", cache=tmp_path / "file/deep")
    assert np.array_equal(found, nearest_neighbours(colours(), mean_colour, img_size=8))
    assert [record.message for record in caplog.records] == [f"the neighbours cannot be kept in {tmp_path / 'file/deep'}: Not a directory"]


def test_unreadable_images_are_nobodys_neighbours(tmp_path, caplog):
    for i, image in enumerate(colours(8).pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"nothing")
    images = open_images(tmp_path)
    found = nearest_neighbours(images, mean_colour, k=6, img_size=8, batch_size=3)
    assert (found[3] == -1).all() and 3 not in found[[0, 1, 2, 4, 5, 6, 7]] and (np.delete(found, 3, 0) >= 0).all()
    assert "1 of 8 images" in caplog.text and str(tmp_path / "3.png") in caplog.text
    source = NeighbourViews(images, 2, 16, neighbours=found)
    with pytest.raises(BrokenImage, match="3.png: has no neighbours"):
        drawn(source, 3)
    with pytest.raises(UserError, match="7 of 8 images can be read, too few for 7"):
        nearest_neighbours(images, mean_colour, k=7, img_size=8)


def test_neighbour_views():
    ring = np.array([[(i + d) % 6 for d in (1, 2, 3)] for i in range(6)])
    source = NeighbourViews(pixels(), 3, 32, neighbours=ring)
    seen = Counter()
    for seed in range(200):
        target, *anchors = map(which, drawn(source, 4, seed))
        assert target == 4 and len(set(anchors)) == 2
        seen.update(anchors)
    assert set(seen) == {5, 0, 1} and min(seen.values()) > 90
    with pytest.raises(UserError, match="4 anchors were asked for"):
        NeighbourViews(pixels(), 5, neighbours=ring)
    with pytest.raises(ValueError, match="one row an image"):
        NeighbourViews(pixels(), 2, neighbours=ring[:3])


def test_show_source(tmp_path):
    fill_frames(tmp_path, [20, 2, 20])
    figure = show_source(VideoViews(open_videos(tmp_path), 3, 32), rows=3)
    axes = figure.axes
    assert len(axes) == 9 and [a.get_title() for a in axes[:3]] == ["target", "anchor 1", "anchor 2"]
    assert [axes[k].texts[0].get_text() for k in (0, 3, 6)] == ["v0", "broken: v1", "v2"]
    assert len(show_source(RandomPartners(pixels(), 2, 32), rows=8, titles=["t", "a"]).axes) == 16


# ---------------------------------------------------------------- videos: the exact frame

def coded(t, h=48, w=64):
    "A frame that says which it is: its number in eight light or dark blocks, over a pattern that moves."
    y, x = np.mgrid[:h, :w]
    frame = np.stack([(x * 3 + 5 * t) % 90 + 80, (y * 4 + 3 * t) % 90 + 80, (x + y + t) % 90 + 80], -1).astype(np.uint8)
    for bit in range(8):
        frame[4:20, bit * 8:bit * 8 + 8] = 235 if t >> bit & 1 else 20
    return frame


def read_code(image):
    x = np.asarray(image, dtype=int).mean(-1)
    return sum(int(x[7:17, bit * 8 + 2:bit * 8 + 6].mean() > 127) << bit for bit in range(8))


def write_video(path, n, codec="libx264", options=None, stamps=None, container_options=None, format=None):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format, options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(n):
            frame = av.VideoFrame.from_ndarray(coded(t))
            frame.pts = t if stamps is None else stamps[t]
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


KINDS = {
    "b_frames.mp4": dict(options={"bf": "4", "g": "12", "b-pyramid": "normal"}),
    "open_gop.mp4": dict(options={"bf": "3", "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0"}),
    "intra.mp4": dict(options={"g": "1"}),
    "short_gop.mov": dict(options={"bf": "2", "g": "3"}),
    "one_gop.mkv": dict(options={"bf": "8", "g": "250"}),
    "fragments.mp4": dict(options={"bf": "3", "g": "10"}, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "stream.m2ts": dict(options={"bf": "3", "g": "10"}, format="mpegts"),
    "h264.avi": dict(options={"bf": "3", "g": "10"}),
    "old.avi": dict(codec="mpeg4", options={"g": "7"}),
    "old_b.avi": dict(codec="mpeg4", options={"g": "12", "bf": "2"}),
    "old_b.mp4": dict(codec="mpeg4", options={"g": "12", "bf": "2"}),
    "hidden.webm": dict(codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20", "arnr-maxframes": "5", "b": "200k"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20", "cpu-used": "8", "b": "200k"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "bframes=3:keyint=12:log-level=none"}),
    "jpeg.avi": dict(codec="mjpeg", options={"strict": "-1"}),
    "mpeg2.mpg": dict(codec="mpeg2video", options={"bf": "2", "g": "12"}),
    "varying.mkv": dict(options={"bf": "3", "g": "15"}, stamps=[t + 3 * (t // 5) + 20 * (t > 30) for t in range(50)]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_of_every_kind(tmp_path, name):
    video = Video(str(write_video(tmp_path / name, 50, **KINDS[name])))
    assert video.length == 50 and video.index.counted == (name == "h264.avi"), "only H.264 in AVI has no usable time stamps"
    alone = [read_code(video.frames([t])[0]) for t in range(50)]
    assert alone == list(range(50)), "asked for one by one"
    order = np.random.default_rng(0).permutation(50)
    assert [read_code(image) for image in video.frames(order)] == order.tolist(), "asked for all at once"
    assert [read_code(image) for image in video.frames([49, 0, 49, 17])] == [49, 0, 49, 17]
    one = np.asarray(video.frames([23])[0])
    assert np.array_equal(one, np.asarray(Video(video.path).frames(range(50))[23])), "the same bytes whichever way it is reached"


def test_decoding_starts_at_the_key_frame_before(tmp_path, monkeypatch):
    runs, decoded, real = [], [], Video._decoded
    monkeypatch.setattr(Video, "_decoded", lambda self, *args: runs.append(1) or (decoded.append(1) or frame for frame in real(self, *args)))
    for name in ("b_frames.mp4", "one_gop.mkv"):
        video = Video(str(write_video(tmp_path / name, 50, options={"bf": "2", "g": "10", "sc_threshold": "0"})))
        runs.clear(), decoded.clear()
        for t in range(50):
            video.frames([t])
        assert len(runs) == 50 and len(decoded) < 50 * 7
        runs.clear()
        video.frames([41, 48])
        video.frames([3, 41, 48])
        assert len(runs) == 3, "one run for each key frame"


def test_without_time_stamps_frames_are_counted(tmp_path):
    import av
    raw = tmp_path / "raw.mp4"
    write_video(raw, 30, options={"bf": "3", "g": "10"}, format="h264")
    assert av.open(str(raw)).format.name == "h264"
    video = Video(str(raw))
    assert video.index.counted and video.length == 30
    assert [read_code(image) for image in video.frames([29, 3, 0, 12])] == [29, 3, 0, 12]


def test_hidden_frames_do_not_count(tmp_path):
    "VP8 can code a picture that is never shown. One is made by hand: the bit `show_frame` of packet 20 is cleared, in a stream where nothing refers to the last of each ten."
    import av
    path = write_video(tmp_path / "a.webm", 40, "libvpx", options={"g": "10", "b": "400k"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packet = bytes([p for p in file.demux(video=0) if p.size][19])
    at = data.find(packet)
    assert data.count(packet) == 1 and data[at] & 16
    data[at] &= ~16
    path.write_bytes(data)
    video = Video(str(path))
    assert video.length == 39 and not video.index.counted
    shown = [t for t in range(40) if t != 19]
    assert [read_code(video.frames([t])[0]) for t in range(39)] == shown


def test_edit_list(tmp_path):
    "Frames that the file says are not shown do not count. The edit list is put into the file by hand: its media time is moved on by ten frames."
    path = write_video(tmp_path / "a.mp4", 40, options={"bf": "2", "g": "20"})
    data = bytearray(path.read_bytes())
    at = data.find(b"elst")
    assert at > 0 and struct.unpack(">I", data[at + 8:at + 12])[0] == 1
    scale = struct.unpack(">I", data[data.find(b"mdhd") + 16:data.find(b"mdhd") + 20])[0]
    start, = struct.unpack(">i", data[at + 16:at + 20])
    data[at + 16:at + 20] = struct.pack(">i", start + 10 * scale // 25)
    path.write_bytes(data)
    video = Video(str(path))
    assert [read_code(image) for image in video.frames(range(video.length))] == list(range(10, 40))


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation(tmp_path, turn):
    path = write_video(tmp_path / "a.mp4", 3)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    c, s = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    data[at:at + 36] = struct.pack(">9i", c << 16, s << 16, 0, -s << 16, c << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    image = Video(str(path)).frames([1])[0]  # stored so that it must be turned clockwise by `turn`
    upright = np.rot90(coded(1), -turn // 90).astype(int)
    assert np.asarray(image).shape == upright.shape and np.abs(np.asarray(image) - upright).mean() < 12


def test_cut_off_video_keeps_its_whole_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "12", "bf": "2", "crf": "10"}, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    for share in (.9, .6, .4):
        path.write_bytes(data[:int(len(data) * share)])
        video = Video(str(path))
        assert 5 < video.length < 60
        for t in range(video.length):
            try:
                assert read_code(video.frames([t])[0]) == t
            except BrokenImage as error:
                assert "cannot be decoded" in error.reason and t > video.length - 5
    path.write_bytes(data[:500])
    with pytest.raises(BrokenImage, match="a.mp4: "):
        Video(str(path))


def test_damaged_in_the_middle(tmp_path):
    path = write_video(tmp_path / "a.mkv", 60, options={"g": "12", "bf": "2"})
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    outcomes = Counter()
    video = Video(str(path))
    for t in range(video.length):
        try:
            outcomes[video.frames([t])[0].size] += 1
        except BrokenImage as error:
            outcomes["broken"] += 1
            assert error.path == str(path)
    assert outcomes[(64, 48)] > 20


def test_silent_and_clear_about_files_that_are_no_videos(tmp_path, capfd):
    av = pytest.importorskip("av")
    import wave
    good = write_video(tmp_path / "good.mp4", 20)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 500)
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "half.mp4").write_bytes(good.read_bytes()[:2000])
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000), sound.writeframes(bytes(8000))
    (tmp_path / "sound.wav").rename(tmp_path / "sound.avi")
    videos = open_videos(tmp_path)
    source = VideoViews(videos, 2, 32)
    reasons = {}
    for i in range(len(videos)):
        try:
            assert drawn(source, i).shape == (2, 3, 32, 32)
            reasons[Path(source.name(i)).name] = None
        except BrokenImage as error:
            assert error.path == source.name(i)
            reasons[Path(error.path).name] = error.reason
    assert reasons.pop("good.mp4") is None and len(reasons) == 5 and all(reasons.values())
    assert reasons["empty.mp4"] == "the file is empty" and reasons["broken.mp4"] == "a broken link" and reasons["sound.avi"] == "no video in it"
    sys.stderr.flush()
    assert capfd.readouterr() == ("", "")
    item = Views(source, 16)[0, [Path(source.name(i)).name for i in range(len(videos))].index("empty.mp4")]
    assert item["broken"].endswith("empty.mp4")
    del av


def test_short_videos(tmp_path):
    for n in (1, 2, 3, 5):
        write_video(tmp_path / f"{n}.mp4", n)
    videos = open_videos(tmp_path)
    assert [videos.length(i) for i in range(4)] == [1, 2, 3, 5]
    with pytest.raises(BrokenImage, match=r"1.mp4: too short: 1 frame for 2 views"):
        drawn(VideoViews(videos, 2, 32), 0)
    assert drawn(VideoViews(videos, 2, 32), 1).shape == (2, 3, 32, 32)
    assert drawn(VideoViews(videos, 1, 32), 0).shape == (1, 3, 32, 32)
    with pytest.raises(IndexError, match="none numbered 3"):
        videos.frames(2, [3])


def test_the_last_video_stays_open(tmp_path, monkeypatch):
    opened = []
    real = Video.__init__
    monkeypatch.setattr(Video, "__init__", lambda self, path: opened.append(path) or real(self, path))
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", 20)
    source = VideoViews(open_videos(tmp_path), 2, 32)
    for i in (0, 0, 0, 1, 1, 0):
        drawn(source, i)
    assert len(opened) == 3
    write_video(tmp_path / "a.mp4", 10)
    os.utime(tmp_path / "a.mp4", (1, 1))
    assert source.videos.length(0) == 10, "a file that was replaced is opened again"


def test_pyav_missing_is_said_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        open_videos(tmp_path).length(0)


def test_heavy_packages_are_imported_late():
    code = "import sys, mae_repro.views.bags; sys.exit(bool({'av', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- videos: which frames

def test_gap_follows_the_authors_rule():
    "Against a literal transcription: gap in [min(4, n - 1), min(48, n)), first in [0, n - gap - 1], every pair weighted by its probability."
    torch.manual_seed(0)
    source = VideoViews(None)
    for n in (2, 3, 4, 5, 6, 20, 60):
        gaps = range(min(4, n - 1), min(48, n))
        wanted = {(first + gap, first): 1 / len(gaps) / (n - gap) for gap in gaps for first in range(n - gap)}
        draws = 60 * len(wanted)
        seen = Counter(tuple(source.choose(n)) for _ in range(min(draws, 8000)))
        assert set(seen) <= set(wanted), n
        if draws <= 8000:
            assert set(seen) == set(wanted)
        by_gap = Counter()
        for (target, anchor), count in seen.items():
            by_gap[target - anchor] += count
        expected = sum(seen.values()) / len(gaps)
        assert set(by_gap) == set(gaps) and all(abs(by_gap[g] - expected) < 6 * expected ** .5 for g in gaps)
    assert max(VideoViews(None).choose(1000)) < 1000
    assert {a - b for a, b in (source.choose(300) for _ in range(2000))} == set(range(4, 48))


def test_several_anchors_are_distinct_and_earlier():
    torch.manual_seed(0)
    source = VideoViews(None, num_views=4)
    for n in (4, 5, 7, 8, 30, 100):
        for _ in range(200):
            target, *anchors = source.choose(n)
            assert len(set(anchors)) == 3 and 0 <= min(anchors) and max(anchors) < target < n
            if n > 7:
                assert all(4 <= target - a < 48 for a in anchors)
    assert set(source.choose(4)) == {0, 1, 2, 3} and source.choose(4)[0] == 3
    with pytest.raises(ValueError, match="too short"):
        source.choose(3)
    assert {VideoViews(None, num_views=1).choose(3)[0] for _ in range(50)} == {0, 1, 2}
    for gap in ((0, 4), (5, 5), (9, 3)):
        with pytest.raises(ValueError, match="least, end"):
            VideoViews(None, gap=gap)
    with pytest.raises(ValueError, match="has 3 gaps at most, too few for 4 anchors"):
        VideoViews(None, num_views=5, gap=(1, 4))


class Film:
    "Sequences of one coordinate image over and over."
    def __len__(self): return 2
    def name(self, i): return f"film {i}"
    def length(self, i): return 60
    def frames(self, i, ids): return [Image.fromarray(coordinates()) for _ in ids]


def test_joint_crop_of_a_still_film():
    for seed in range(20):
        joint = drawn(VideoViews(Film(), 3, 48), 0, seed)
        assert torch.equal(joint[0], joint[1]) and torch.equal(joint[0], joint[2])
    apart = drawn(VideoViews(Film(), 2, 48, joint=False), 0)
    assert not torch.equal(*apart)


def test_target_is_the_later_frame(tmp_path):
    write_video(tmp_path / "a.mp4", 60)
    source = VideoViews(open_videos(tmp_path), 2, (48, 64), scale=(1., 1.), ratio=(4 / 3, 4 / 3), flip=False)
    for seed in range(10):
        target, anchor = (read_code(v.permute(1, 2, 0).numpy()) for v in drawn(source, 0, seed))
        assert 4 <= target - anchor < 48


# ---------------------------------------------------------------- videos: what lies in a folder

def fill_frames(root, lengths, pattern="{}.png"):
    for k, n in enumerate(lengths):
        (root / f"v{k}").mkdir(parents=True, exist_ok=True)
        for t in range(n):
            Image.fromarray(coded(t)).save(root / f"v{k}" / pattern.format(t))
    return root


def names(sequences):
    return [os.path.relpath(sequences.name(i), sequences.root) for i in range(len(sequences))]


def test_frame_folders_in_natural_order(tmp_path):
    fill_frames(tmp_path / "a/b", [12, 3], "frame{}.png")
    fill_frames(tmp_path / "lonely", [1])
    (tmp_path / "a/b/v0/.hidden.png").touch()
    (tmp_path / "a/b/v0/notes.txt").touch()
    videos = open_videos(tmp_path)
    assert names(videos) == ["a/b/v0", "a/b/v1"] and videos.length(0) == 12
    assert [read_code(image) for image in videos.frames(0, [11, 2, 10])] == [11, 2, 10]
    one = open_videos(tmp_path / "a/b/v0")
    assert len(one) == 1 and one.length(0) == 12 and one.name(0) == str(tmp_path / "a/b/v0")
    (tmp_path / "a/b/v0/frame5.png").write_bytes(b"no")
    with pytest.raises(BrokenImage, match="frame5.png"):
        videos.frames(0, [5])


def test_layouts(tmp_path):
    for name in ("train/run/b.MP4", "train/run/a10.mp4", "train/run/a9.webm", "train/jump/c.mkv", "val/run/d.avi", "train/run/cover.jpg", "train/run/cover2.jpg", "train/run/._a.mp4"):
        (tmp_path / "k400" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "k400" / name).touch()
    root = tmp_path / "k400"
    assert names(open_videos(root)) == ["jump/c.mkv", "run/a9.webm", "run/a10.mp4", "run/b.MP4"]
    assert names(open_videos(root, split="test")) == names(open_videos(root, split="val")) == ["run/d.avi"]
    assert names(open_videos(root, limit=2)) == ["jump/c.mkv", "run/a10.mp4"]
    assert names(open_videos(root / "train")) == names(open_videos(root))
    davis = tmp_path / "davis"
    fill_frames(davis / "JPEGImages/480p", [3, 3])
    fill_frames(davis / "Annotations/480p", [3, 3])
    assert names(open_videos(davis)) == ["v0", "v1"] and "JPEGImages" in open_videos(davis).name(0)
    (tmp_path / "loop").symlink_to(tmp_path)
    fill_frames(tmp_path / "loops", [2])
    (tmp_path / "loops/again").symlink_to(tmp_path / "loops")
    assert len(open_videos(tmp_path / "loops")) == 1


@pytest.mark.parametrize("given, said", [
    (dict(root="nowhere"), "is missing"), (dict(root="file"), "is a file, not a folder"), (dict(root="empty"), "no videos in"),
    (dict(root="photos"), "no videos in"), (dict(root="ok", limit=0), "data.limit 0"), (dict(root="ok", split="dev"), "data.split 'dev'"),
    (dict(root="ok", split="val"), "no val videos"), (dict(root="only", split="train"), "no train videos"),
])
def test_roots_that_cannot_be(tmp_path, given, said):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for n in range(3):
        (tmp_path / "photos" / str(n)).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"photos/{n}/a.png")
    fill_frames(tmp_path / "ok", [2])
    fill_frames(tmp_path / "only/val", [2])
    with pytest.raises(UserError, match=said) as error:
        open_videos(**{**given, "root": tmp_path / given["root"]})
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- bags

def picture(number, size=(32, 24)):
    return Image.new("RGB", size, (number * 20, 128, 255 - number * 20))


def number(view):
    return round(view[0].float().mean().item() / 20)


def fill_bags(root, n, generated, real="real.png", pattern="gen_{}.png"):
    for b in range(n):
        (root / f"bag{b}").mkdir(parents=True, exist_ok=True)
        picture(0, (50, 40)).save(root / f"bag{b}" / real)
        for k in range(1, generated + 1):
            picture(k).save(root / f"bag{b}" / pattern.format(k))
    return root


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, bags, generated=4, pattern="gen_{}.png", real="real.png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for key in bags:
            for k in range(generated, 0, -1):
                add(f"{key}.{pattern.format(k)}", encoded(picture(k)))
            add(f"{key}.{real}", encoded(picture(0)))
            add(f"{key}.json", json.dumps({"key": key}).encode())
    return path


def test_order_in_a_bag():
    assert bag_order(["gen_10.png", "gen_2.png", "source.png"]) == ["source.png", "gen_2.png", "gen_10.png"]
    assert bag_order(["1.jpg", "0.jpg", "real.jpg"]) == ["real.jpg", "0.jpg", "1.jpg"]
    assert bag_order(["2.jpg", "0.jpg", "10.jpg"]) == ["0.jpg", "2.jpg", "10.jpg"]
    assert bag_order(["gen_1.png", "a.png"]) == ["a.png", "gen_1.png"]
    assert bag_order(["gen_1.png", "gen_2.png"]) is None and bag_order([]) is None


@pytest.mark.parametrize("target, targets", [("real", {0}), ("generated", {1, 2, 3, 4}), ("either", {0, 1, 2, 3, 4})])
def test_bag_rules(tmp_path, target, targets):
    source = BagViews(open_bags(fill_bags(tmp_path, 2, 4)), 3, 16, target)
    seen, anchors = Counter(), Counter()
    for seed in range(300):
        first, *others = map(number, drawn(source, 1, seed))
        assert len({first, *others}) == 3
        seen[first] += 1
        anchors.update(others)
    assert set(seen) == targets and min(seen.values()) > 200 / len(targets)
    assert set(anchors) == {0, 1, 2, 3, 4} - (targets if len(targets) == 1 else set()), "the real image may be an anchor"


def test_bag_of_unequal_sizes_and_joint(tmp_path):
    root = tmp_path / "b"
    root.mkdir()
    Image.fromarray(coordinates(200, 300)).save(root / "real.png")
    Image.fromarray(coordinates(64, 64)).save(root / "gen_1.png")
    bags = open_bags(root)
    for seed in range(10):
        a, b = drawn(BagViews(bags, 2, 64, joint=True), 0, seed)
        assert np.allclose(extent(a), extent(b), atol=.04) and mirrored(a) == mirrored(b)
    a, b = drawn(BagViews(bags, 2, 64), 0)
    assert not np.allclose(extent(a), extent(b), atol=.04)


def test_too_small_bags_stop_before_the_first_step(tmp_path):
    fill_bags(tmp_path, 3, 4)
    (tmp_path / "bag1/gen_4.png").unlink()
    bags = open_bags(tmp_path)
    assert smallest(bags) == (1, 4)
    with pytest.raises(UserError, match=r"bag1 has 4 pictures, but 5 views with target either need 5 \(1 of 3 bags"):
        BagViews(bags, 5)
    fill_bags(tmp_path / "c", 1, 0)
    with pytest.raises(UserError, match="has 1 picture, but 1 views with target generated need 2"):
        BagViews(open_bags(tmp_path / "c"), 1, target="generated")
    with pytest.raises(ValueError, match="target 'fake'"):
        BagViews(bags, target="fake")
    fill_frames(tmp_path / "f", [3, 2])
    with pytest.raises(BrokenImage, match="v1: too small: 2 pictures, 3 needed"):
        drawn(BagViews(open_videos(tmp_path / "f"), 3, 16), 1)


def test_bag_folders(tmp_path, caplog):
    fill_bags(tmp_path / "x/y", 2, 3, real="source.jpg", pattern="{}.png")
    fill_bags(tmp_path / "x/z", 1, 3, real="gen_0.png")
    bags = open_bags(tmp_path)
    assert names(bags) == ["x/y/bag0", "x/y/bag1"] and bags.length(0) == 4 and "x/z/bag0" in caplog.text
    assert len(open_bags(tmp_path, limit=1)) == 1 and open_bags(tmp_path, limit=1).length(0) == 4
    assert len(open_bags(tmp_path / "x/y/bag1")) == 1
    (tmp_path / "x/y/bag0/2.png").write_bytes(b"")
    with pytest.raises(BrokenImage, match="2.png: the file is empty"):
        bags.frames(0, [2])
    (tmp_path / "x/y/bag0/2.png").unlink()
    with pytest.raises(BrokenImage, match="bag0: had 4 pictures when it was opened, and has 3 now"):
        bags.frames(0, [3])


def test_parts_of_bags(tmp_path, monkeypatch):
    fill_bags(tmp_path / "b/train", 3, 2)
    fill_bags(tmp_path / "b/val", 2, 2)
    write_shard(tmp_path / "s/train/0.tar", ["x", "y"])
    write_shard(tmp_path / "s/val/0.tar", ["z"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [len(open_bags("~/b", split=part)) for part in ("train", "val", "test", None)] == [3, 2, 5, 5]
    assert names(open_bags("~/b", 1, "val")) == ["bag0"]
    assert [len(open_pictures("~/s", part)) for part in ("train", "val", "test")] == [10, 5, 15]
    assert len(open_bags("~/s/val/0.tar", split="val")) == 1


def test_shards_hold_the_same_bags(tmp_path):
    write_shard(tmp_path / "a/0.tar", ["n01/x", "n01/y"])
    write_shard(tmp_path / "a/1.tar", ["z.w"], 2, "{}.png", "png")  # the key ends at the first dot: z, with w.1.png ... of it
    write_shard(tmp_path / "a/2.tar", ["u"], 2, "{}.png", "png")
    bags = open_bags(tmp_path)
    assert names(bags)[:2] == ["a/0.tar/n01/x", "a/0.tar/n01/y"] and names(bags)[3] == "a/2.tar/u"
    assert bags.sizes.tolist() == [5, 5, 3, 3]
    assert [np.asarray(image)[0, 0, 0] // 20 for image in bags.frames(1, [0, 4, 2])] == [0, 4, 2]
    assert [np.asarray(image)[0, 0, 0] // 20 for image in bags.frames(3, [0, 1, 2])] == [0, 1, 2]
    with pytest.raises(IndexError, match="has 3 pictures, and none numbered 3"):
        bags.frames(3, [3])
    last = bags.take(np.array([3, 0]))
    assert np.asarray(last.frames(0, [1])[0])[0, 0, 0] == 20 and names(last) == ["a/2.tar/u", "a/0.tar/n01/x"]
    assert drawn(BagViews(bags, 3, 16), 1).shape == (3, 3, 16, 16)
    assert len(open_bags(tmp_path / "a/0.tar")) == 2


def test_shard_index_is_kept(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s/0.tar", ["x", "y"])
    first = open_bags(tmp_path / "s")
    reads = []
    real = bags_module._read_shard
    monkeypatch.setattr(bags_module, "_read_shard", lambda path: reads.append(path) or real(path))
    again = open_bags(tmp_path / "s")
    assert not reads and np.array_equal(first.spans, again.spans) and names(first) == names(again)
    kept, = (tmp_path / "cache/shards").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert len(open_bags(tmp_path / "s")) == 2 and len(reads) == 1
    write_shard(path, ["x", "y", "z"])
    assert len(open_bags(tmp_path / "s")) == 3 and len(reads) == 2


def test_folders_of_pictures_that_nothing_marks_are_named(tmp_path, caplog):
    "The classes of a data set look like bags, frames and scenes: one line says what they were read as."
    fill_frames(tmp_path / "classes", [3, 4, 5])
    fill_bags(tmp_path / "bags", 2, 3)
    said = lambda: [record.getMessage() for record in caplog.records]
    for root, source, how in (("classes", "bag", "3 folders of pictures read as bags"), ("classes", "video", "3 folders of pictures read as videos"), ("bags", "bag", None), ("classes", "crop-pair", None),
                              ("classes", "scene", "3 folders of pictures read as scenes"), ("classes/v0", "video", "1 folder of pictures read as videos")):
        caplog.clear()
        open_source(DataConfig(tmp_path / root), ViewsConfig(source=source, min_frames=2), 16, 2)
        assert len(said()) == (how is not None) and (how is None or f"{tmp_path / root}: {how}" in said()[0])
    caplog.clear()
    open_source(DataConfig(tmp_path / "classes"), ViewsConfig(source="scene", layout="frames", min_frames=2), 16, 2)
    assert not said(), "asked for in so many words"


def test_small_bags_name_options(tmp_path):
    with pytest.raises(UserError, match="lower --method.num-anchors .MuM: --method.num-views., or generate more views") as error:
        open_source(DataConfig(fill_bags(tmp_path, 2, 2)), ViewsConfig(source="bag"), 16, 5)
    assert "num_views" not in str(error.value)
    with pytest.raises(UserError, match=".2 of 2 bags are too small.: generate more views"):
        open_source(DataConfig(fill_bags(tmp_path / "alone", 2, 0)), ViewsConfig(source="bag"), 16, 2)


def test_cut_off_shard(tmp_path, caplog):
    path = write_shard(tmp_path / "s/0.tar", list("abcdef"))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {m.name: m.offset_data + -(-m.size // 512) * 512 for m in tar}
    cuts = [ends["c.gen_2.png"], ends["c.gen_2.png"] + 100, ends["c.gen_2.png"] + 512 + 7, ends["c.gen_2.png"] + 700]
    for cut in cuts:  # between two files, within a header, within the next file
        path.write_bytes(data[:cut])
        caplog.clear()
        bags = open_bags(tmp_path / "s")
        assert names(bags) == ["0.tar/a", "0.tar/b"] and bags.sizes.tolist() == [5, 5], cut
        assert "1 of 3 bags" in caplog.text and str(path) in caplog.text
        assert np.asarray(bags.frames(1, [4])[0])[0, 0, 0] == 80
    path.write_bytes(data)
    assert len(open_bags(tmp_path / "s")) == 6
    path.write_bytes(data[:max(ends.values())])  # all files, but not the zeros that end an archive
    assert len(open_bags(tmp_path / "s")) == 5
    path.write_bytes(data)
    bags = open_bags(tmp_path / "s")
    path.write_bytes(data[:3000])
    with pytest.raises(BrokenImage, match="0.tar/f, picture 2"):
        bags.frames(5, [2])


@pytest.mark.parametrize("given, said", [
    (dict(root="nowhere"), "is missing"), (dict(root="file"), "is a file, not a folder"), (dict(root="empty"), "no bags in"), (dict(root="text"), "not a tar file"),
    (dict(root="plain"), "no bags in the 1 tar files"), (dict(root="gen"), "no bags in"), (dict(root="ok", limit=0), "data.limit 0"), (dict(root="no.tar"), "no.tar"),
])
def test_roots_without_bags(tmp_path, given, said):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.tar").write_text("hello" * 1000)
    (tmp_path / "plain").mkdir()
    with tarfile.open(tmp_path / "plain/a.tar", "w") as tar:
        tar.add(tmp_path / "text/a.tar", "readme.txt")
    fill_bags(tmp_path / "gen", 1, 2, real="gen_0.png")
    fill_bags(tmp_path / "ok", 1, 2)
    with pytest.raises(UserError, match=said) as error:
        open_bags(**{**given, "root": tmp_path / given["root"]})
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- real data, where it is

def test_shared_clips_and_bags():
    if not (SHARED / "data/rcdm_generated_views").is_dir():
        pytest.skip("the shared data are not here (MAE_REPRO_SHARED)")
    bags = open_bags(SHARED / "data/rcdm_generated_views")
    assert names(bags)[:2] == ["bag1", "bag2"] and bags.sizes[:2].tolist() == [9, 9]
    assert drawn(BagViews(bags, 4, 64), 0).shape == (4, 3, 64, 64)
    clips = open_videos(SHARED / "data/video_clips")
    assert all(clips.length(i) >= 60 for i in range(len(clips)))
    assert drawn(VideoViews(clips, 2, 64), 1).shape == (2, 3, 64, 64)
    davis = open_videos(SHARED / "data/davis2016_480p")
    assert len(davis) == 4
