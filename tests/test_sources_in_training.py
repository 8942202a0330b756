"""Every source of views feeds every method through the same loop, exactly resumable, with broken items counted."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.methods.siamese import CropMAE, SiamMAE
from mae_repro.parts.weights import UserError, load_state
from mae_repro.training import data as D
from mae_repro.training import pretrain as P
from mae_repro.training.config import Config, replace_in
from mae_repro.training.data import DataConfig, ViewsConfig, open_source, open_views
from mae_repro.training.recipes import recipe

SIZES = dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
METHODS = {"mae": MAE(**SIZES), "crossmae": CrossMAE(**SIZES, prediction_ratio=.25), "siammae": SiamMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32),
           "cropmae": CropMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32), "croco": CroCo(**SIZES, mask_ratio=.75), "cdgmae": CDGMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    "Sixteen folders of eight frames: a pattern that moves. Read as videos, as bags, and as 128 images."
    root, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for i in range(16):
        wide = Image.fromarray(rng.integers(0, 256, (5, 9, 3), dtype=np.uint8)).resize((80, 24), Image.BILINEAR)
        (root / f"{i:02d}").mkdir()
        for t in range(8):
            wide.crop((4 * t, 0, 4 * t + 32, 24)).save(root / f"{i:02d}" / f"{t:05d}.png")
    return root


def config_of(method, root, source, **changes) -> Config:
    config = recipe("siammae-tiny")
    config = replace(config, method=METHODS[method], views=ViewsConfig(source=source, gap=(1, 4)), data=DataConfig(root, repeats=1, workers=0),
                     optim=replace(config.optim, batch_size=8, epochs=2, warmup_epochs=.5, base_lr=.05),
                     train=replace(config.train, device="cpu", precision="fp32", log_every=1, save_every=.5, figure_every=0.))
    for name, value in changes.items():
        config = replace_in(config, name.replace("__", "."), value)
    return config


def losses(run):
    return [line["loss"] for line in P.read_metrics(run) if "loss" in line]


@pytest.mark.parametrize("source", ["crop-pair", "video", "bag", "random-pair", "neighbour"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_source(frames, method, source, monkeypatch):
    if source == "neighbour":
        monkeypatch.setattr("mae_repro.training.data._embedding", lambda spec: (lambda images: images.float().mean((2, 3)), {"img_size": 16}))
    config = config_of(method, frames, source, views__embed="colours" * (source == "neighbour"))
    views = open_views(config.data, config.views, config.method, 0)
    item = views[3, 5]
    assert item["views"].shape == (config.method.num_views, 3, 16, 16) and item["noise"].shape == (config.method.num_views, 16)
    assert torch.equal(item["views"], open_views(config.data, config.views, config.method, 0)[3, 5]["views"])
    assert not torch.equal(item["views"], views[4, 5]["views"])
    model = config.method.build()
    loss = model(item["views"][None] / 255., noise=item["noise"][None]).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("method, source", [("siammae", "video"), ("cropmae", "crop-pair"), ("croco", "bag"), ("cdgmae", "bag"), ("mae", "video")])
def test_training_runs_and_stops_and_goes_on_exactly(frames, tmp_path, method, source):
    "Dropout included: its seed belongs to the step."
    config = config_of(method, frames, source, data__limit=16 if source == "crop-pair" else None)
    whole = P.pretrain(config, tmp_path / "whole", progress=False)
    count = []

    def stop(encoder):
        count.append(1)
        if len(count) == 1:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGTERM)
        return {}
    with pytest.raises(P.TrainingStopped):
        P.pretrain(replace_in(config, "train.probe_every", .5), tmp_path / "stopped", probe=stop, progress=False)
    P.resume(tmp_path / "stopped", progress=False)
    assert losses(tmp_path / "stopped") == losses(whole) and len(losses(whole)) == 4
    ours, theirs = load_state(tmp_path / "stopped/model.safetensors"), load_state(whole / "model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_workers_and_micro_batches_do_not_matter(frames, tmp_path):
    config = config_of("cdgmae", frames, "bag", method__decoder_dropout=0.)
    one = P.pretrain(config, tmp_path / "one", progress=False)
    two = P.pretrain(replace_in(replace_in(config, "data.workers", 2), "train.accumulate", 2), tmp_path / "two", progress=False)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def test_repeated_sampling_keeps_the_length_of_an_epoch(frames, tmp_path):
    config = config_of("siammae", frames, "video", views__together=4)
    run = P.pretrain(config, tmp_path / "run", progress=False)
    assert len(losses(run)) == 4   # 16 samples an epoch still, of four videos


@pytest.mark.parametrize("source", ["video", "bag"])
def test_broken_items_are_skipped_counted_and_named(tmp_path, source):
    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / f"data/{i}").mkdir(parents=True)
        for t in range(6):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"data/{i}/{t}.png")
    for t in range(6):
        (tmp_path / f"data/3/{t}.png").write_bytes(b"not a picture")
    config = config_of("siammae", tmp_path / "data", source, optim__epochs=3)
    run = P.pretrain(config, tmp_path / "run", progress=False)
    assert json.loads((run / "summary.json").read_text())["skipped"] == 3 and len(losses(run)) == 3
    assert (run / "skipped.txt").read_text().count("/3") >= 3


def test_truncated_video_files(tmp_path):
    av = pytest.importorskip("av")
    for i in range(4):
        (tmp_path / "data").mkdir(exist_ok=True)
        with av.open(str(tmp_path / f"data/{i}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for t in range(12):
                frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * t, dtype=np.uint8), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    path = tmp_path / "data/2.mp4"
    path.write_bytes(path.read_bytes()[:200])
    config = config_of("siammae", tmp_path / "data", "video", optim__batch_size=4)
    run = P.pretrain(config, tmp_path / "run", progress=False)
    assert json.loads((run / "summary.json").read_text())["skipped"] == 2 and "2.mp4" in (run / "skipped.txt").read_text()


@pytest.mark.parametrize("changes, said", [(dict(method__num_anchors=12), "too small"), (dict(data__root=Path("nowhere")), "missing"), (dict(data__limit=0), "limit")])
def test_data_that_cannot_work_fails_before_the_first_step(frames, tmp_path, changes, said):
    config = config_of("cdgmae", frames, "bag", **changes)
    with pytest.raises(UserError, match=said):
        P.pretrain(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_neighbours_of_too_few_images(frames, tmp_path):
    with pytest.raises(UserError, match="different images"):
        open_source(DataConfig(frames, limit=2), ViewsConfig(source="random-pair"), 16, 4)


def test_neighbours_are_sought_where_training_computes(frames, monkeypatch):
    "With the encoder on this process's GPU, and as many workers as the training has."
    asked = []

    def seek(images, embed, k, img_size, workers=0, **others):
        asked.append((embed(torch.zeros(2, 3, img_size, img_size, dtype=torch.uint8)).device.type, workers))
        return np.arange(len(images))[:, None] - 1
    monkeypatch.setattr(D, "nearest_neighbours", seek)
    monkeypatch.setattr(D, "_own_device", lambda: torch.device("meta"))
    open_source(DataConfig(frames, limit=4, workers=3), ViewsConfig(source="neighbour", embed="mae-tiny", neighbours=1), 16, 2)
    assert asked == [("meta", 3)]


@pytest.mark.parametrize("rank, device", [(None, "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")])
def test_the_gpu_of_a_process(monkeypatch, rank, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(D._own_device()) == device


@pytest.mark.parametrize("source", ["video", "bag", "scene"])
def test_built_in_scenes_of_a_size_that_cannot_be(tmp_path, monkeypatch, source):
    with pytest.raises(UserError, match="^--method.img-size 3200: .*4800") as error:
        open_source(DataConfig(), ViewsConfig(source=source), 3200, 2)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("MAE_REPRO_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^rendered scenes cannot be kept"):   # says itself what is wrong
        open_source(DataConfig(limit=1), ViewsConfig(source=source), 16, 2)


def test_colours_are_changed_view_by_view(frames):
    plain = open_source(DataConfig(frames), ViewsConfig(source="bag", flip=False, scale=(1., 1.), ratio=(4 / 3, 4 / 3)), (24, 32), 2)
    jittered = open_source(DataConfig(frames), ViewsConfig(source="bag", flip=False, scale=(1., 1.), ratio=(4 / 3, 4 / 3), color_jitter=.4), (24, 32), 2)
    torch.manual_seed(0)
    a = plain.draw(0)
    torch.manual_seed(0)
    b = jittered.draw(0)
    change = b.float() - a
    assert len(jittered) == len(plain) and jittered.name(0) == plain.name(0) and change.abs().amax((1, 2, 3)).min() > 2
    assert (change[0].mean() - change[1].mean()).abs() > .5


def test_joint_crops_and_parts_are_obeyed_by_every_source(frames, tmp_path, monkeypatch):
    same = Image.open(frames / "00/00000.png")
    for part in ("train", "val"):
        for i in range(3):
            (tmp_path / part / f"{i}").mkdir(parents=True)
            for t in range(4):
                same.save(tmp_path / part / f"{i}/{t}.png")
    torch.manual_seed(0)
    for joint in (True, False):
        draws = open_source(DataConfig(tmp_path), ViewsConfig(source="random-pair", joint=joint), 16, 2).draw(0)
        assert torch.equal(draws[0], draws[1]) == joint
    for split in ("train", "val"):
        bags = open_source(DataConfig(tmp_path, split=split), ViewsConfig(source="bag"), 16, 2)
        assert len(bags) == 3 and all(f"/{split}/" in bags.name(i) for i in range(3))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert len(open_source(DataConfig(Path("~") / tmp_path.name), ViewsConfig(source="bag"), 16, 2)) == 3
