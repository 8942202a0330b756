"""Any number of views of a scene: what is drawn, how it is dealt, and that a training on it is exact."""
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mae_repro import cli
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.methods.mum import MuM
from mae_repro.parts.weights import UserError, load_state
from mae_repro.training import pretrain as P
from mae_repro.training.config import Config, config_from_dict, config_to_dict, replace_in, validate
from mae_repro.training.data import DataConfig, ViewsConfig, open_source, open_views
from mae_repro.training.recipes import recipe
from mae_repro.views.mixture import Mixture, SceneViews
from mae_repro.views.pairs import drawn
from mae_repro.views.photos import BrokenImage
from mae_repro.views.samples import GroupBatches, Views, loader
from mae_repro.views.scene_data import TABLE_1
from mae_repro.views.videos import FrameFolders

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).parents[2] / "shared")) / "golden/evaluation/mum_sequences.safetensors"
SIZES = dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
METHODS = {"mum": MuM(**SIZES, num_views=5, min_views=2), "mae": MAE(**SIZES), "crossmae": CrossMAE(**SIZES, prediction_ratio=.25), "croco": CroCo(**SIZES, mask_ratio=.75)}


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    "Six scenes of eight frames, each of one colour of its own (red: scene, green: frame), and one of three frames."
    root = tmp_path_factory.mktemp("frames")
    for i in range(7):
        (root / f"{i:02d}").mkdir()
        for t in range(8 if i < 6 else 3):
            Image.new("RGB", (40, 24), (40 * i, 30 * t, 200)).save(root / f"{i:02d}" / f"{t:05d}.png")
    return root


def config_of(method, root, **changes) -> Config:
    config = recipe("mum-tiny")
    single = .25 if METHODS[method].takes_one_view else 0.
    config = replace(config, method=METHODS[method], views=ViewsConfig("scene", per_batch=10, epoch_steps=3, min_frames=6, single=single), data=DataConfig(root, workers=0),
                     optim=replace(config.optim, batch_size=20, epochs=2, warmup_epochs=.5, base_lr=.05),
                     train=replace(config.train, device="cpu", precision="fp32", log_every=1, save_every=.34, figure_every=0.))
    for name, value in changes.items():
        config = replace_in(config, name.replace("__", "."), value)
    return config


def losses(run):
    return [line["loss"] for line in P.read_metrics(run) if "loss" in line]


def marks(views):
    "Scene and frame of each view, from its colour."
    return [(round(v[0].float().mean().item() / 40), round(v[1].float().mean().item() / 30)) for v in views]


# ---------------------------------------------------------------- what is drawn

def test_frames_of_one_scene_each_once_in_any_order(frames):
    source = SceneViews(FrameFolders(np.array([b"00", b"01", b"02"]), str(frames)), img_size=8)
    orders = set()
    for s in (1, 2, 5, 8):
        for seed in range(40):
            scene, frame = zip(*marks(drawn(source, 1, seed, num_views=s)))
            assert set(scene) == {1} and len(set(frame)) == s
            orders.add(frame)
    assert any(list(f) != sorted(f) for f in orders) and {f[0] for f in orders} == set(range(8))
    with pytest.raises(BrokenImage, match="too short: 8 frames for 9 views"):
        source.draw(0, 9)


def test_whole_frames_and_boxes():
    "The paper's way shows the whole frame, squeezed; the code's way a box of it; joint gives all frames the same one."
    ramp = Image.fromarray(np.stack([np.tile(np.arange(0, 240, 2, dtype=np.uint8), (60, 1))] * 3, -1))

    class Same:
        __len__ = lambda self: 1
        name = lambda self, i: "ramp"
        length = lambda self, i: 4
        frames = lambda self, i, ids: [ramp] * len(ids)
    ends = lambda views: {(int(v[0, :, 0].float().mean()), int(v[0, :, -1].float().mean())) for v in views}
    whole = SceneViews(Same(), 4, 12, flip=False, whole=True)
    assert len(found := ends(drawn(whole, 0))) == 1 and all(a < 20 and b > 218 for a, b in found)
    assert len(ends(drawn(replace(whole, flip=True), 0, seed=3))) == 2, "each frame has a coin of its own"
    assert len(ends(drawn(SceneViews(Same(), 4, 12, flip=False), 0))) == 4 and len(ends(drawn(SceneViews(Same(), 4, 12, joint=True), 0))) == 1


def test_mixture_by_weight_and_images_for_single_views(frames):
    a, b = (SceneViews(FrameFolders(np.array(names), str(frames)), img_size=8) for names in ([b"00", b"01"], [b"03", b"04", b"05"]))
    single = SceneViews(FrameFolders(np.array([b"02"]), str(frames)), num_views=1, img_size=8)
    mix = Mixture((a, b), (1., 3.), single)
    scenes = Counter(marks(drawn(mix, i, num_views=2))[0][0] for i in range(1200))
    assert all(abs(scenes[k] - n) < 4 * n ** .5 for k, n in {0: 150, 1: 150, 3: 300, 4: 300, 5: 300}.items()) and sum(scenes.values()) == 1200
    assert {marks(drawn(mix, i, num_views=0))[0][0] for i in range(20)} == {2}
    for source, n in ((mix, 1), (Mixture((a, b), (1., 3.)), 0)):
        assert {marks(drawn(source, i, num_views=n))[0][0] for i in range(60)} == {0, 1, 3, 4, 5}, "one view of a scene is no image, and without images single views are frames"
        assert drawn(source, 0, num_views=n).shape[0] == 1
    for weights in ((1.,), (1., 0.), (1., float("nan"))):
        with pytest.raises(UserError, match="positive weight"):
            Mixture((a, b), weights)


def test_broken_scene_is_replaced_within_its_data_set(frames, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        for t in range(6):
            Image.new("RGB", (20, 20), (40 * i, 30 * t, 0)).save(tmp_path / f"{i}/{t}.png")
    for t in range(6):
        (tmp_path / f"1/{t}.png").write_bytes(b"no picture")
    source = SceneViews(FrameFolders(np.array([b"0", b"1", b"2"]), str(tmp_path)), img_size=8)
    views = Views(Mixture((source,), (1.,)), 4)
    found = [views[0, i, 3] for i in range(60)]
    broken = [item for item in found if item["broken"]]
    assert 8 < len(broken) < 35 and all("/1" in item["broken"] and marks(item["views"])[0][0] == 2 for item in broken)


# ---------------------------------------------------------------- how it is dealt

@pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference vectors are not beside this checkout")
def test_as_many_scenes_as_fit_like_the_authors():
    golden = load_file(GOLDEN)
    expected = dict(zip(golden["in/num_frames"].tolist(), golden["out/batch_size_96"].tolist()))
    assert len(expected) > 20 and set(expected) == set(range(2, 25))
    seen = {}
    for batch in GroupBatches(40, 960, single=0.):
        assert len({s for *_, s in batch}) == 1
        seen.setdefault(batch[0][2], set()).add(len(batch))
    assert seen == {s: {n} for s, n in expected.items()}


def test_views_are_uniform_and_one_in_ten_is_single():
    order = GroupBatches(100, 960)
    found = Counter(order.count(step, group) for step in range(400) for group in range(10))
    assert abs(found[0] - 400) < 4 * 400 ** .5 and set(found) == {0, *range(2, 25)}
    assert all(abs(found[s] - 3600 / 23) < 4.5 * (3600 / 23) ** .5 for s in range(2, 25))
    assert [order.count(3, g) for g in range(10)] == [GroupBatches(7, 960, start_step=5, world=2).count(3, g) for g in range(10)]
    assert any(order.count(3, g) != replace(order, seed=1).count(3, g) for g in range(10))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_groups(world):
    settings = dict(steps_per_epoch=5, batch_size=80, group=20, views=(2, 6), epochs=3, seed=4)
    whole = list(GroupBatches(**settings))
    ranks = [list(GroupBatches(**settings, rank=r, world=world)) for r in range(world)]
    m = 4 // world
    together = [group for step in range(15) for rank in ranks for group in rank[step * m:(step + 1) * m]]
    assert together == whole and len(whole) == len(GroupBatches(**settings)) == 60 and all(len(r) == len(GroupBatches(**settings, world=world)) for r in ranks)
    assert list(GroupBatches(**settings, start_step=7)) == whole[28:]
    names = [(e, i) for group in whole for e, i, _ in group]
    assert len(set(names)) == len(names), "no two samples share a seed"
    assert {e for e, _ in names} == {0, 1, 2} and all(len(g) == 20 // max(g[0][2], 1) for g in whole)


def test_batches_that_cannot_be_made():
    for wrong, says in ((dict(batch_size=100, group=96), "micro-batches of 96"), (dict(batch_size=96, world=2), "2 processes"), (dict(batch_size=96, group=12), "24 views")):
        with pytest.raises(UserError, match=says):
            GroupBatches(1, **wrong)


def test_workers_bring_the_same_batches(frames):
    config = config_of("mum", frames)
    views = open_views(config.data, config.views, config.method, 0)
    order = GroupBatches(3, 20, 10, (2, 5), .25)
    alone, helped = (list(loader(views, order, workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 6 and all(torch.equal(a["views"], b["views"]) and torch.equal(a["noise"], b["noise"]) for a, b in zip(alone, helped))
    assert {tuple(batch["views"].shape[:2]) for batch in alone} == {(10 // max(s, 1), max(s, 1)) for s in {g[0][2] for g in order}}


# ---------------------------------------------------------------- training

@pytest.mark.parametrize("method", METHODS)
def test_training_stops_and_goes_on_exactly(frames, tmp_path, method):
    config = config_of(method, frames)
    whole = P.pretrain(config, tmp_path / "whole", progress=False)
    count = []

    def stop(encoder):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}
    with pytest.raises(P.TrainingStopped):
        P.pretrain(replace_in(config, "train.probe_every", .34), tmp_path / "stopped", probe=stop, progress=False)
    assert len(losses(tmp_path / "stopped")) < 6
    P.resume(tmp_path / "stopped", progress=False)
    assert losses(tmp_path / "stopped") == losses(whole) and len(losses(whole)) == 6
    ours, theirs = load_state(tmp_path / "stopped/model.safetensors"), load_state(whole / "model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_two_processes_take_the_steps_of_one(frames, tmp_path):
    "Different numbers of views on different ranks; the same losses as when one process accumulates the micro-batches."
    config = config_of("mum", frames, views__single=0., optim__batch_size=40)
    assert any(len({GroupBatches(3, 40, 10, (2, 5), 0.).count(step, g) for g in range(4)}) > 1 for step in range(6))
    one = P.pretrain(config, tmp_path / "one", progress=False)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    script = tmp_path / "train.py"
    script.write_text("import json, sys, torch\nfrom mae_repro.training import pretrain as P\nfrom mae_repro.training.config import config_from_dict\ntorch.set_num_threads(1)\n"
                      f"P.pretrain(config_from_dict(json.load(open({str(tmp_path / 'config.json')!r}))), {str(tmp_path / 'two')!r}, progress=False)\n")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), str(script)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


def test_single_views_come_from_images(frames, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (30, 30), (0, 0, 0)).save(tmp_path / f"images/{i}.png")
    config = config_of("mum", frames, data__images=tmp_path / "images")
    views = open_views(config.data, config.views, config.method, 0)
    assert views[0, 5, 0]["views"].shape[0] == 1 and views[0, 5, 0]["views"].float().mean() == 0 and views[0, 5, 3]["views"].float().mean() > 50
    assert views[0, 5, 1]["views"].shape[0] == 1 and views[0, 5, 1]["views"].float().mean() > 50, "MAE on scenes sees frames of scenes"
    config = replace_in(config, "views.single", 0.)
    assert open_views(config.data, config.views, config.method, 0)[0, 5, 0]["views"].float().mean() > 50
    counts = Counter(GroupBatches(50, 40, 10, (1, 1), .25).count(step, group) for step in range(50) for group in range(4))
    assert set(counts) == {0, 1} and abs(counts[0] - 50) < 30


def test_short_scenes_are_left_out_and_mixtures_weighted(frames, tmp_path):
    config = config_of("mum", frames)
    assert [len(s) for s in open_source(config.data, config.views, 16, 5).sources] == [6], "the scene of three frames is too short"
    mixed = replace(config.data, root=None, mixture=(f"frames:{frames}", f"frames:{frames}:2.5"))
    source = open_source(mixed, config.views, 16, 5)
    assert source.weights == (10., 2.5) and [len(s) for s in source.sources] == [6, 6]
    for entry in ("frames", "frames:", f"frames:{frames}:-1", f"frames:{frames}:0"):
        with pytest.raises(UserError, match="data.mixture"):
            open_source(replace(mixed, mixture=(entry,)), config.views, 16, 5)


def test_built_in_scenes():
    config = recipe("mum-tiny")
    source = open_source(replace(config.data, limit=2), config.views, (16, 24), 8)
    assert drawn(source, 0, num_views=8).shape == (8, 3, 16, 24) and drawn(source, 0, num_views=0).shape == (1, 3, 16, 24)


def test_frames_are_resized_as_published(frames):
    source = SceneViews(FrameFolders(np.array([b"00"]), str(frames)), img_size=8)
    assert source._crop.interpolation == "bicubic" and source._crop._crop.interpolation.value == "bicubic"


def test_sequences_are_cut_as_the_config_says(tmp_path, caplog):
    for i in range(2):
        (tmp_path / f"PID{i}/blended_images").mkdir(parents=True)
        for t in range(230):
            (tmp_path / f"PID{i}/blended_images/{t:08d}.jpg").touch()
    (tmp_path / "BlendedMVS_training.txt").write_text("PID0\nPID1\n")
    config = config_of("mum", tmp_path, views__min_frames=24)
    sizes = lambda **changes: sorted(open_source(config.data, replace(config.views, **changes), 16, 5).sources[0].sequences.sizes.tolist())
    assert sizes() == [230, 230] and sizes(sequences="paper") == [100, 100, 130, 130] and sizes(chunk=60) == [60, 60, 60, 60, 110, 110]
    caplog.clear()
    assert sizes(chunk=60, min_frames=100) == [110, 110] and "4 of 6 sequences" in caplog.text, "what is left out is said"


def test_weights_of_table_1_unless_given(frames, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"CO3D/{name}/scenes/scene_000/rgb").mkdir(parents=True)
        for t in range(8):
            Image.new("RGB", (20, 20)).save(tmp_path / f"CO3D/{name}/scenes/scene_000/rgb/{t:05d}.png")
    config = config_of("mum", None, data__mixture=(f"wildrgbd:{tmp_path / 'CO3D'}", f"frames:{frames}:3", f"frames:{frames}"))
    assert open_source(config.data, config.views, 16, 5).weights == (TABLE_1["wildrgbd"], 3., 10.)
    monkey = TABLE_1["wildrgbd"]
    try:
        TABLE_1["wildrgbd"] = 7.5
        assert open_source(config.data, config.views, 16, 5).weights[0] == 7.5
    finally:
        TABLE_1["wildrgbd"] = monkey


def test_nothing_but_the_camera_moves_in_built_in_scenes():
    config = recipe("mum-tiny")
    scenes = open_source(replace(config.data, limit=1), config.views, 16, 8).sources[0].sequences
    world = scenes.scene(0).world
    assert scenes.still and (world.position == world.position[:1]).all() and (world.rotation == world.rotation[:1]).all() and not (world.R == world.R[:1]).all()


def test_own_scenes_without_images_give_single_frames(frames):
    config = config_of("mum", frames)
    assert open_source(config.data, config.views, 16, 5).single is None
    assert open_source(replace(config.data, root=None, limit=1), config.views, 16, 5).single is not None


def test_data_may_move_between_stop_and_resume(frames, tmp_path):
    mixture = lambda root, weight="": (f"frames:{root}{weight}",)
    a, b = (config_of("mum", None, data__mixture=mixture(root)) for root in (frames, tmp_path))
    assert P.fingerprint(a) == P.fingerprint(b) != P.fingerprint(config_of("mum", None, data__mixture=mixture(frames, ":3")))
    run = P.pretrain(replace_in(a, "optim.stop_epochs", 1), tmp_path / "run", progress=False)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="missing"):
        P.resume(run, progress=False, mixture=mixture(tmp_path / "nowhere"))
    P.resume(run, progress=False, mixture=mixture(frames))
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("changes, says", [
    (dict(views__per_batch=4), "per-batch 4 is too small for a sample of 5 views"), (dict(views__single=1.5), "single 1.5"), (dict(views__epoch_steps=0), "epoch-steps 0 must be positive"),
    (dict(optim__batch_size=25), "--optim.batch-size 25 is not made of micro-batches of --views.per-batch 10 views"), (dict(train__accumulate=2), "accumulate 2 is not for scenes"),
    (dict(data__repeats=3), "epoch-steps"), (dict(data__mixture=("frames:x",)), "two answers"), (dict(method__min_views=9), "min-views 9 must lie between 1 and"),
    (dict(method__reference_view=True), "views.single"), (dict(views__source="bag", data__mixture=("frames:x",)), "views.source scene")])
def test_mistakes_are_named_in_one_line(frames, changes, says):
    with pytest.raises(UserError, match=says) as error:
        validate(config_of("mum", frames, **changes))
    assert "\n" not in str(error.value)


def test_methods_that_need_two_views_refuse_single_ones(frames):
    validate(config_of("croco", frames))
    with pytest.raises(UserError, match="views.single 0.1 gives batches of single views"):
        validate(config_of("croco", frames, views__single=.1))


def test_configs_travel(frames):
    config = config_of("mum", frames, data__mixture=("frames:a", "co3d:b:2"))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("name, views, per_batch, batch, steps, warmup", [("mum-base", (2, 12), 128, 4096, 100_000, 6_250), ("mum-large", (2, 24), 96, 6144, 500_000, 25_000),
                                                                          ("mum-huge", (2, 24), 96, 6144, 500_000, 25_000), ("mum-small", (2, 24), 96, 384, 40_000, 2_000)])
def test_recipes_as_published(name, views, per_batch, batch, steps, warmup):
    c = recipe(name)
    assert c.method.view_range == views and c.views.per_batch == per_batch and c.optim.batch_size == batch and c.views.single == .1 and not c.views.whole and c.views.joint is None
    assert c.optim.epochs * c.views.epoch_steps == steps and c.optim.warmup_epochs * c.views.epoch_steps == warmup
    if name != "mum-small":
        assert c.optim.base_lr == (1.5e-4 if name == "mum-base" else 1e-4) and c.views.scale == (.2, 1.) and c.train.precision == "bf16"
        validate(c, processes=batch // per_batch)


def test_command_line(frames, tmp_path, capsys):
    done = cli.run(["pretrain", "mum-tiny", "--data.root", str(frames), "--data.workers", "0", "--views.min-frames", "6", "--method.num-views", "4", "--views.per-batch", "8", "--optim.batch-size", "8",
                    "--views.epoch-steps", "2", "--optim.epochs", "1", "--method.depth", "1", "--train.device", "cpu", "--out", str(tmp_path / "run")])
    assert done == 0 and (tmp_path / "run/summary.json").is_file() and list((tmp_path / "run/figures").glob("*.png"))
    capsys.readouterr()
    assert cli.run(["pretrain", "mum-tiny", "--data.root", str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr().err.strip()
    assert "nothing" in said.splitlines()[0] and "Traceback" not in said
    assert cli.run(["pretrain", "mum-tiny", "--data.mixture", "frames"]) == 2 and "LAYOUT:DIR" in capsys.readouterr().err
