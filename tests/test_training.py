"Training: recipes, schedules, checkpoints, and that runs are exact: killed, divided, accumulated, resumed."
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.parts.weights import UserError, load_state
from mae_repro.training import checkpoints as C
from mae_repro.training import pretrain as P
from mae_repro.training.optimisation import adamw, cosine_lr, parameter_groups, peak_lr, set_lr
from mae_repro.training.config import Config, config_from_dict, config_to_dict, replace_in, validate
from mae_repro.methods.croco import CroCo
from mae_repro.training.data import ViewsConfig
from mae_repro.training.recipes import RECIPES, VIEW_RECIPES, recipe, recipe_table

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    "Forty small pictures with some structure."
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(40):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.BILINEAR).save(folder / f"{i:02d}.png")
    return folder


def small(root: Path | None, name: str = "mae-tiny", **changes) -> Config:
    "A config of 5 steps an epoch on the fixture's images; `optim__epochs=2` changes optim.epochs."
    method = MAE(**SIZES) if name.startswith("mae") else CrossMAE(**SIZES, prediction_ratio=.25)
    config = replace(recipe(name), method=method)
    config = replace(config, data=replace(config.data, root=root, workers=0, repeats=1),
                     optim=replace(config.optim, batch_size=8, epochs=2, warmup_epochs=.4, base_lr=.05),
                     train=replace(config.train, device="cpu", precision="fp32", log_every=1, save_every=1., figure_every=0.))
    for key, value in changes.items():
        config = replace_in(config, key.replace("__", "."), value)
    return config


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in P.read_metrics(run) if "loss" in line]


def train(config: Config, run: Path, **kwargs) -> list[float]:
    P.pretrain(config, run, progress=False, **kwargs)
    return losses(run)


# --- recipes and validation -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_constructs_validates_and_round_trips(name):
    config = recipe(name)
    assert config.recipe == name and RECIPES[name].__doc__.count("\n") >= 2
    validate(config, num_images=1_281_167)
    with torch.device("meta"):
        model = config.method.build()
    assert all(p.is_meta for p in model.parameters())
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_recipes_are_the_published_ones():
    for name in RECIPES:
        if "-vit" in name and name.startswith(("mae", "crossmae")):
            o = recipe(name).optim
            assert (o.batch_size, o.base_lr, o.weight_decay, o.betas) == (4096, 1.5e-4, .05, (.9, .95)) and recipe(name).method.norm_pix_loss
            assert o.warmup_epochs == (40 if o.epochs == 800 else 20)
    assert recipe("crossmae-vitb16").method.decoder_depth == 12 and recipe("mae-vith14").method.patch_size == 14
    assert recipe("crossmae-vitb16-448").method.img_size == 448 and recipe("crossmae-vitb16-448").optim.epochs == 400
    assert {row["recipe"] for row in recipe_table()} == set(RECIPES)


def test_cross_view_recipes_are_the_published_ones():
    "facts of the authors' scripts and of CDG-MAE's Table 8: effective learning rate, length, warm-up, who is hidden, which crops."
    from mae_repro.training.optimisation import peak_lr
    published = {"cropmae-vits16": (8e-4, 400, 20, .985, 1, 0), "cropmae-vits16-cdg": (1.2e-3, 100, 5, .985, 1, 0), "siammae-vits16": (1.2e-3, 2000, 100, .95, 1, 0),
                 "cdgmae-a1": (1.2e-3, 100, 5, .9, 1, 0), "cdgmae-a2": (1.2e-3, 100, 5, .9, 2, .5), "cdgmae-a3": (1.2e-3, 100, 5, .9, 3, .25)}
    for name, (lr, epochs, warmup, hidden, anchors, hidden_anchor) in published.items():
        c = recipe(name)
        assert math.isclose(peak_lr(c), lr) and (c.optim.epochs, c.optim.warmup_epochs, c.optim.batch_size) == (epochs, warmup, 2048)
        m = c.method
        assert (m.mask_ratio, m.num_anchors, m.anchor_mask_ratio, m.decoder_mlp_dim, m.decoder_dropout) == (hidden, anchors, hidden_anchor, 2048, .1)
        assert (m.decoder_embed_dim, m.decoder_depth, m.decoder_num_heads) == (256, 4, 8) and m.norm_pix_loss and not m.decoder_pre_norm
        assert c.views.ratio == (3 / 4, 4 / 3) and (c.views.gap, c.views.together) == ((4, 48), 1)
    assert recipe("cropmae-vits16").views.strategy == "GlobalToLocal" and recipe("cropmae-vits16-cdg").views.strategy == "LocalToGlobal"
    assert recipe("cropmae-vits16-cdg").views.local_scale == (.3, .6) and recipe("cropmae-vits16-cdg").views.scale == (.1, 1.)
    assert [recipe(f"siammae-{s}").views.source for s in ("tiny", "small", "vits16")] == ["video"] * 3
    croco = {"croco-v1": (1.5e-4, 800, 400, 40, 256), "croco-v2-vitb-decbase": (3e-4, 250, 125, 12, 512), "croco-v2-vitl-decbase": (3e-4, 250, 125, 12, 512)}
    for name, (lr, epochs, stop, warmup, batch) in croco.items():
        c = recipe(name)
        assert math.isclose(peak_lr(c), lr) and (c.optim.epochs, c.optim.stop_epochs, c.optim.warmup_epochs, c.optim.batch_size) == (epochs, stop, warmup, batch)
        assert c.views.color_jitter == .4 and not c.views.flip and c.method.mask_ratio == .9


def test_unknown_recipe_suggests():
    with pytest.raises(UserError, match="mae-vitb16"):
        recipe("mae-vitb-16")


BAD = [("method.img_size", 225, "--method.img-size 225 is not a multiple of --method.patch-size 16"), ("method.mask_ratio", 1., "--method.mask-ratio"),
       ("method.mask_ratio", 0., "--method.mask-ratio"), ("method.mask_ratio", .999, "no visible"), ("method.prediction_ratio", .8, "--method.prediction-ratio 0.8"),
       ("method.prediction_ratio", 0., "--method.prediction-ratio"), ("method.num_heads", 7, "--method.embed-dim"), ("method.depth", 0, "--method.depth"),
       ("method.mix_blocks", (0, 99), "--method"), ("optim.warmup_epochs", 900., "--optim.warmup-epochs"), ("optim.batch_size", 0, "--optim.batch-size"),
       ("optim.batch_size", 4095, "--optim.batch-size 4095"), ("optim.batch_size", 2_000_000, "larger than the data"), ("optim.epochs", 0, "--optim.epochs"),
       ("optim.base_lr", math.nan, "--optim.base-lr"), ("optim.lr", -1., "--optim.lr"), ("optim.betas", (.9, 1.), "--optim.betas"),
       ("train.accumulate", 0, "--train.accumulate"), ("train.save_every", 0., "--train.save-every"), ("train.seed", -1, "--train.seed"),
       ("data.workers", -1, "--data.workers"), ("data.repeats", 0, "--data.repeats"), ("views.scale", (.5, .2), "--views.scale"),
       ("views.gap", (9, 9), "--views.gap"), ("views.source", "neighbour", "--views.embed"), ("optim.stop_epochs", 900, "--optim.stop-epochs"),
       ("views.color_jitter", 1., "--views.color-jitter"),
       *[(field, math.inf, f"--{field.replace('_', '-')} inf must be a finite number") for field in ("method.mlp_ratio", "method.norm_eps", "optim.base_lr", "optim.weight_decay", "optim.min_lr", "train.save_every")],
       ("views.ratio", (.75, math.inf), "--views.ratio 0.75 inf must be finite"), ("optim.betas", (.9, math.nan), "--optim.betas 0.9 nan must be finite"),
       ("method.mlp_ratio", .001, "--method.embed-dim 768 is less than 1"), ("method.mlp_ratio", .0019, "--method.decoder-embed-dim 512 is less than 1"),
       ("data.split", "trian", "--data.split trian is unknown: choose train, val, test"), ("views.layout", "dlv", "--views.layout dlv is unknown: choose auto, dl3dv"),
       ("train.accumulate", 3, "2 processes x --train.accumulate 3")]


BAD_ANCHORS = [("views", ViewsConfig(source="neighbour", neighbours=2, embed="x"), "--views.neighbours 2"), ("method.num_anchors", 0, "--method.num-anchors"), ("method.anchor_mask_ratio", 1., "--method.anchor-mask-ratio"), ("method.decoder_dropout", 1., "--method.decoder-dropout"),
               ("views.source", "crop", "this method needs 4"), ("method.decoder_order", ("cross", "cross"), "--method"), ("method.decoder_mlp_dim", 0, "--method.decoder-mlp-dim"),
               ("method.decoder_order", ("mlp", "self"), "never reads the anchors"), ("views", ViewsConfig(source="video", gap=(1, 3)), "too few gaps"),
               ("method", CroCo(embed_dim=64, num_heads=32, positions="rope"), "multiple of 4"), ("method", CroCo(img_size=16, patch_size=8, mask_ratio=.1), "--method")]


@pytest.mark.parametrize("field, value, said", BAD_ANCHORS)
def test_bad_cross_view_configs_name_the_field(field, value, said):
    with pytest.raises(UserError) as error:
        config = replace_in(recipe("cdgmae-a3"), field, value)
        validate(replace_in(config, "views.source", "bag") if field == "method" else config)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field, value, said", BAD)
def test_bad_configs_name_the_field(field, value, said):
    with pytest.raises(UserError) as error:
        validate(replace_in(recipe("crossmae-vitb16"), field, value), 1_281_167, processes=2)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without GPU lacks")
@pytest.mark.parametrize("field, value", [("train.precision", "fp16"), ("train.device", "cuda")])
def test_what_needs_a_gpu(field, value):
    with pytest.raises(UserError, match=value):
        validate(replace_in(recipe("mae-tiny"), field, value))


@pytest.mark.parametrize("change, said", [({"optim": {"epoch": 3}}, "epoch"), ({"optim": {"epochs": "many"}}, "many"), ({"method_name": "mea"}, "mea"),
                                          ({"train": {"precision": "fp8"}}, "fp8")])
def test_config_from_another_version_is_refused(change, said):
    plain = config_to_dict(recipe("mae-tiny"))
    for key, value in change.items():
        plain[key] = {**plain[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=said):
        config_from_dict(plain)


def test_command_line_names():
    tyro = pytest.importorskip("tyro")
    config = tyro.cli(Config[CrossMAE], default=recipe("crossmae-tiny"), args=["--method.mask-ratio", "0.5", "--data.root", "x", "--optim.base-lr", "1e-3",
                      "--views.scale", "0.5", "1", "--train.precision", "fp32"])
    assert (config.method.mask_ratio, config.data.root, config.optim.base_lr, config.views.scale) == (.5, Path("x"), 1e-3, (.5, 1.))


# --- optimisation ---------------------------------------------------------------------------------------------------------------------

def test_learning_rate_scaling():
    config = recipe("crossmae-vitb16")
    assert math.isclose(peak_lr(config), 2.4e-3) and math.isclose(peak_lr(recipe("mae-vitl16")), 2.4e-3)
    quarter = replace_in(config, "method.prediction_ratio", .25)
    for rule, lr in (("prediction/mask", 8e-4), ("mask/prediction", 7.2e-3), ("none", 2.4e-3)):
        assert math.isclose(peak_lr(replace_in(quarter, "optim.scale_lr", rule)), lr)
    assert peak_lr(replace_in(quarter, "optim.lr", 1e-2)) == 1e-2


PRETRAIN = [(0, 0.), (.001, 6e-08), (1.25, 7.5e-05), (19.999, 0.0011999399999999998), (40, .0024), (40.01, 0.002399999998974764),
            (123.4, 0.002329392592613246), (400, 0.001299095214566799), (799.99, 1.0252358961793105e-12)]
FINETUNE = [(.1, [4e-05, 2.6e-05, 1.478882356407486e-07]), (7.7, [0.0019960185219851097, 0.0012974120392903214, 7.379691438065816e-06]),
            (99.9, [1.0054651859329189e-06, 6.535523708563973e-07, 3.717411808645415e-09])]


def test_schedule_is_the_published_one():
    for epoch, lr in PRETRAIN:
        assert math.isclose(cosine_lr(epoch, 2.4e-3, 800, 40), lr, rel_tol=1e-9, abs_tol=1e-18)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": s} for s in (1., .65, 0.003697205891018715)], lr=1.)
    for epoch, rates in FINETUNE:
        set_lr(optimizer, cosine_lr(epoch, .002, 100, 5, 1e-6))
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(rates, rel=1e-9)
    assert cosine_lr(0, 1., 10, 2) == 0 and cosine_lr(10, 1., 10, 2, .1) == pytest.approx(.1) and cosine_lr(2, 1., 2, 2) == 1


def test_schedule_vectors():
    path = SHARED / "golden/evaluation/lr_sched.json"
    if not path.is_file():
        pytest.skip("needs golden/evaluation/lr_sched.json (MAE_REPRO_SHARED)")
    for part in ("pretrain", "finetune"):
        g = json.loads(path.read_text())[part]
        for epoch, lr, groups in g["rows"]:
            ours = cosine_lr(epoch, g["lr"], g["epochs"], g["warmup_epochs"], g["min_lr"])
            assert math.isclose(ours, lr, rel_tol=1e-9, abs_tol=1e-18)
            assert [ours * (s or 1.) for s in g["lr_scales"]] == pytest.approx(groups, rel=1e-9, abs=1e-18)


def test_weight_decay_groups():
    model = CrossMAE(**SIZES, prediction_ratio=.25).build()
    model.encoder.patch_embed.proj.weight.requires_grad_(False)
    names = {id(p): (n, p) for n, p in model.named_parameters()}
    plain, decayed = ([names[id(p)] for p in g["params"]] for g in parameter_groups(model, .05))
    assert [g["weight_decay"] for g in parameter_groups(model, .05)] == [0., .05]
    assert all(p.ndim <= 1 or n.endswith(".bias") for n, p in plain) and all(p.ndim > 1 and not n.endswith(".bias") for n, p in decayed)
    found = {n for n, _ in decayed}
    assert "encoder.cls_token" in found and any("mask_token" in n for n in found) and any("mix" in n for n in found)
    assert "encoder.patch_embed.proj.weight" not in found and len(plain) + len(decayed) == sum(p.requires_grad for p in model.parameters())


def test_first_step_at_rate_zero_moves_nothing_and_fused_agrees():
    def run(fused, lr):
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        before = layer.weight.detach().clone()
        optimizer = adamw(parameter_groups(layer, .05), lr, fused=fused)
        assert optimizer.defaults["betas"] == (.9, .95) and optimizer.defaults["eps"] == 1e-8
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 6)).square().sum().backward()
            optimizer.step()
        return layer.weight.detach(), before
    assert torch.equal(*run(None, 0.)) and torch.allclose(run(True, .01)[0], run(False, .01)[0], atol=1e-6)
    assert not torch.equal(*run(True, .01))


# --- checkpoints ----------------------------------------------------------------------------------------------------------------------

def state(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((3000,), float(step))}, "window": [.5, 1.]}


def test_checkpoints_last_and_milestones(tmp_path):
    assert C.latest_checkpoint(tmp_path / "none") is None
    for step in range(2, 25, 2):
        C.save_checkpoint(tmp_path, step, state(step), keep_every=10)
    assert [int(p.name) for p in C.list_checkpoints(tmp_path)] == [10, 20, 24]
    assert C.latest_checkpoint(tmp_path)[1]["step"] == 24
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000020", "00000024"]


@pytest.mark.parametrize("cut", [0, .3, .98])
def test_unreadable_checkpoint_falls_back_and_is_replaced(tmp_path, cut, capsys):
    for step in (1, 2):
        C.save_checkpoint(tmp_path, step, state(step), keep_every=1)
    file = tmp_path / "00000002" / C.STATE
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * cut)])
    (tmp_path / "00000003.tmp-1").mkdir()
    (tmp_path / "00000004").mkdir()
    assert C.latest_checkpoint(tmp_path)[1]["step"] == 1
    assert "00000002" in capsys.readouterr().err
    C.save_checkpoint(tmp_path, 2, state(2), keep_every=1)
    assert C.load_checkpoint(tmp_path / "00000002")["step"] == 2


def full_after(count: int):
    "Patch for `open`: files in checkpoints take `count` bytes and then there is no space left."
    real = open

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if "b" not in mode or "w" not in mode:
            return file
        write, room = file.write, [count]

        def limited(data):
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data)
        wrapped = mock.MagicMock(wraps=file, write=limited)
        wrapped.__enter__.return_value, wrapped.__exit__.side_effect = wrapped, lambda *_: file.close()
        return wrapped
    return mock.patch.object(C, "open", opened, create=True)


@pytest.mark.parametrize("count", [0, 5000])
def test_full_disk_leaves_the_last_good_one(tmp_path, count):
    C.save_checkpoint(tmp_path, 1, state(1))
    before = (tmp_path / "00000001" / C.STATE).read_bytes()
    with full_after(count), pytest.raises(OSError) as error:
        C.save_checkpoint(tmp_path, 2, state(2))
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"] and (tmp_path / "00000001" / C.STATE).read_bytes() == before


def test_loading_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    (tmp_path / "00000001").mkdir()
    torch.save({"step": Evil()}, tmp_path / "00000001" / C.STATE)
    assert C.latest_checkpoint(tmp_path) is None and not (tmp_path / "evil").exists()


# --- the loop -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> Path:
    "An ordinary run: one process, no workers, no accumulation."
    run = tmp_path_factory.mktemp("runs") / "plain"
    train(small(images), run)
    return run


def test_run_folder(plain, images):
    assert {"config.json", "environment.json", "metrics.jsonl", "summary.json", "model.safetensors", "model.json", "checkpoints", "tensorboard"} <= {p.name for p in plain.iterdir()}
    assert not list(plain.rglob("*.tmp-*")) and list(plain.rglob("events.out.tfevents*"))
    assert P.read_config(plain) == small(images) and P.is_finished(plain)
    lines = P.read_metrics(plain)
    assert [line["step"] for line in lines] == list(range(1, 11)) and lines[-1]["epoch"] == 2 and lines[0]["lr"] == 0
    assert all({"loss", "lr", "images_per_s", "seconds", "skipped"} <= set(line) for line in lines)
    launch, = json.loads((plain / "environment.json").read_text())
    assert launch["versions"]["torch"] == torch.__version__ and launch["from_step"] == 0
    assert json.loads((plain / "summary.json").read_text())["images"] == 80
    assert {"encoder.cls_token"} <= set(load_state(plain / "model.safetensors"))


@pytest.mark.parametrize("name", ["mae-tiny", "crossmae-tiny"])
def test_training_learns(images, tmp_path, name):
    found = train(small(images, name, optim__epochs=16, train__log_every=5), tmp_path / "run")
    assert found[-1] < .95 * found[0]


@pytest.mark.parametrize("change", [dict(train__accumulate=4), dict(data__workers=2), dict(train__checkpointing=True)])
def test_same_losses(images, plain, tmp_path, change):
    assert train(small(images, **change), tmp_path / "run") == pytest.approx(losses(plain), abs=1e-6)


def test_seed_matters(images, plain, tmp_path):
    other = train(small(images, train__seed=1), tmp_path / "run")
    assert all(abs(a - b) > 1e-6 for a, b in zip(other, losses(plain)))


def test_finished_run_is_left_alone(plain, capsys):
    before = {p: p.stat().st_mtime_ns for p in plain.rglob("*") if p.is_file()}
    assert P.resume(plain) == plain and "finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in plain.rglob("*") if p.is_file()} == before


def test_a_new_run_never_overwrites(plain, images, tmp_path):
    with pytest.raises(UserError, match="resume"):
        P.pretrain(small(images), plain)
    made = {P.new_run_dir("mae-tiny", tmp_path) for _ in range(3)}
    assert len(made) == 3


def test_resume_of_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        P.resume(tmp_path / "nothing")
    for content, said in ((b"{", "JSON"), (b"\xff\xfe", "JSON"), (b"3", "no fields"), (b"[]", "no fields"), (b"null", "no fields")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=f"config.json.*{said}"):
            P.resume(tmp_path)


def stop_at(step: int, number: int = signal.SIGTERM):
    "A probe that asks this process to stop, as a queue would."
    count = []

    def probe(encoder):
        count.append(1)
        if len(count) == step:
            os.kill(os.getpid(), number)
        return {"calls": len(count)}
    return probe


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_then_resumed_is_the_same_run(images, plain, tmp_path, number):
    run, before = tmp_path / "run", signal.getsignal(number)
    config = small(images, train__probe_every=.2, train__save_every=1.2)
    with pytest.raises(P.TrainingStopped, match="mae-repro resume") as stopped:
        P.pretrain(config, run, probe=stop_at(3, number), progress=False)
    assert stopped.value.exit_code == 130 and signal.getsignal(number) == before and not P.is_finished(run)
    assert C.latest_checkpoint(run / "checkpoints")[1]["step"] == 4
    P.resume(run, progress=False, workers=1)
    assert losses(run) == losses(plain) and (run / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert len(json.loads((run / "environment.json").read_text())) == 2


def test_resume_without_checkpoint_starts_from_the_beginning(images, plain, tmp_path):
    run = tmp_path / "run"
    P._found_run(small(images), run, tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n{"step": 2, "lo')
    P.resume(run, progress=False)
    assert losses(run) == losses(plain)


def test_changed_config_is_refused(images, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(P.TrainingStopped):
        P.pretrain(small(images, train__probe_every=.2), run, probe=stop_at(2), progress=False)
    plain = json.loads((run / "config.json").read_text())
    plain["optim"]["weight_decay"] = .1
    (run / "config.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="changed after"):
        P.resume(run, progress=False)


def test_loss_that_is_not_finite(images, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(P.TrainingFailed) as error:
        P.pretrain(small(images, optim__lr=1e18, optim__warmup_epochs=0., optim__epochs=20), run, progress=False)
    assert error.value.exit_code == 1 and "step" in str(error.value) and not P.is_finished(run)
    folder, = (run / "nonfinite").iterdir()
    names = (folder / "images.txt").read_text().split()
    assert len(names) == 8 and all(name.endswith(".png") for name in names) and str(folder) in str(error.value)
    assert C.load_checkpoint(folder)["step"] == int(folder.name) == len(losses(run))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(images, tmp_path):
    run = tmp_path / "run"

    def poison(encoder):
        with torch.no_grad():
            encoder.cls_token.fill_(math.nan)
        return {}
    with pytest.raises(P.TrainingFailed, match="weights are not finite|loss is nan"):
        P.pretrain(small(images, optim__epochs=3, train__probe_every=2.), run, probe=poison, progress=False)
    assert C.latest_checkpoint(run / "checkpoints")[1]["step"] == 5


def test_full_disk_during_training(images, plain, tmp_path):
    run, real, calls = tmp_path / "run", C._save_synced, []

    def second_fails(path, state):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, state)
    with mock.patch.object(C, "_save_synced", second_fails), pytest.raises(P.TrainingFailed, match="no space left") as error:
        P.pretrain(small(images), run, progress=False)
    assert "resume" in str(error.value) and C.latest_checkpoint(run / "checkpoints")[1]["step"] == 5
    P.resume(run, progress=False)
    assert (run / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_broken_images_are_named_and_counted(images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(images.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    train(small(folder), tmp_path / "run")
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert lines and all("07.png" in line for line in lines)
    assert P.read_metrics(tmp_path / "run")[-1]["skipped"] == len(lines)


def test_figures_and_probe(images, plain, tmp_path):
    seen = []

    def figure(model, views, path):
        torch.rand(3)
        seen.append((tuple(views.shape), model.training, path))
        path.write_bytes(b"")
    run = tmp_path / "run"
    found = train(small(images, train__figure_every=1., train__probe_every=1.), run, figure=figure, probe=lambda encoder: {"width": encoder.embed_dim})
    assert [s[:2] for s in seen] == [((4, 1, 3, 32, 32), False)] * 2 and len(list((run / "figures").iterdir())) == 2
    assert found == losses(plain)
    assert [line["probe/width"] for line in P.read_metrics(run) if "probe/width" in line] == [32, 32]
    assert json.loads((run / "summary.json").read_text())["probe/width"] == 32


def test_batch_larger_than_data_and_missing_data(images, tmp_path):
    for config, said in ((small(images, optim__batch_size=64), "larger than the data"), (small(tmp_path / "nowhere"), "nowhere")):
        with pytest.raises(UserError, match=said):
            P.pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("samples, repeats, batch, said", [(5, None, 256, "5 samples in an epoch; take a smaller batch, or --data.repeats 52 or more"), (15, 3, 256, "--data.repeats 52 "),
                                                           (1, 1, 8, "1 sample in an epoch"), (5, None, 10, "--data.repeats 2 ")])
def test_small_folders_say_how_many_repeats_they_need(tmp_path, samples, repeats, batch, said):
    config = small(tmp_path, optim__batch_size=batch, data__repeats=repeats)
    with pytest.raises(UserError) as error:
        validate(config, samples)
    assert said in str(error.value)
    needed = int(str(error.value).split("--data.repeats ")[1].split()[0])
    validate(replace_in(config, "data.repeats", needed), samples // (repeats or 1) * needed)
    with pytest.raises(UserError, match="larger than the data"):
        validate(replace_in(config, "data.repeats", needed - 1 or None), samples // (repeats or 1) * (needed - 1))


def test_split_of_bags_may_be_a_folder(tmp_path):
    config = replace_in(replace_in(replace_in(recipe("cdgmae-tiny"), "data.root", tmp_path), "data.split", "mine"), "views.source", "bag")
    with pytest.raises(UserError, match="--data.split mine is unknown.*or a folder in --data.root"):
        validate(config)
    (tmp_path / "mine").mkdir()
    validate(config)
    with pytest.raises(UserError, match="--data.split mine"):
        validate(replace_in(config, "views.source", "video"))


@pytest.mark.parametrize("changes, said", [(dict(), "has 10 steps in all, of 8 images each: to learn more, raise --data.repeats or --optim.epochs"),
                                           (dict(optim__stop_epochs=1), "has 5 steps in all, of 8 images each: to learn more, raise --data.repeats or --optim.stop-epochs"), (dict(data__repeats=10), None)])
def test_a_short_training_says_so_once(images, tmp_path, caplog, monkeypatch, changes, said):
    def stop(trainer, *_):
        raise P.TrainingStopped
    monkeypatch.setattr(P, "fit", stop)   # the line comes before
    config = small(images, **changes)
    for progress in (True, False):
        caplog.clear()
        with pytest.raises(P.TrainingStopped):
            P.pretrain(config, tmp_path / str(progress), progress=progress)
        found = [record.getMessage() for record in caplog.records if record.name == P.__name__]
        assert len(found) == int(progress and said is not None) and all(said in line for line in found)


def test_only_a_folder_made_by_this_call_is_removed(images, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "Trainer", mock.Mock(side_effect=UserError("it cannot be made")))
    (tmp_path / "there").mkdir()
    for folder in ("new", "there"):
        with pytest.raises(UserError, match="cannot be made"):
            P.pretrain(small(images), tmp_path / folder, progress=False)
    assert not (tmp_path / "new").exists() and (tmp_path / "there").exists()
    for made, main, name, left in ((True, True, "config.json", False), (False, True, "config.json", True), (True, False, "config.json", True), (True, True, "metrics.jsonl", True)):
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / name).touch()
        with pytest.raises(UserError), P.made_here(tmp_path / "new", made, SimpleNamespace(is_main_process=main)):
            raise UserError
        assert (tmp_path / "new" / name).exists() == left


def test_bf16_that_is_only_emulated_is_not_taken(monkeypatch):
    config, native = small(None, train__precision="auto", train__device="auto"), False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert P._precision(config) == "fp16"   # a T4, a V100
    native = True
    assert P._precision(config) == "bf16" and P._precision(replace_in(config, "train.device", "cpu")) == "no"


def test_one_process_at_a_time(images, tmp_path):
    run, made = P._found_run(small(images), tmp_path / "run", tmp_path)
    assert made
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)",
                               str(run / "lock")], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another process"):
            P.resume(run, progress=False)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with P.run_lock(run):
        pass


@pytest.mark.parametrize("tty", [False, True])
def test_progress(images, tmp_path, capsys, tty):
    with mock.patch.object(sys.stderr, "isatty", lambda: tty):
        P.pretrain(small(images), tmp_path / "run")
    said = capsys.readouterr().err
    assert "10/10" in said and "loss" in said and "images/s" in said


# --- several processes ----------------------------------------------------------------------------------------------------------------

SCRIPT = '''
import json, sys
from pathlib import Path
from mae_repro.training.pretrain import pretrain, resume
from mae_repro.training.config import config_from_dict
if __name__ == "__main__":
    run, config = Path(sys.argv[1]), Path(sys.argv[2])
    resume(run, progress=False) if (run / "config.json").is_file() else pretrain(config_from_dict(json.loads(config.read_text())), run, progress=False)
'''


def launch(run: Path, config: Config, *prefix: str) -> subprocess.Popen:
    script, plain = run.parent / "train.py", run.parent / "train.json"
    script.write_text(SCRIPT)
    plain.write_text(json.dumps(config_to_dict(config)))
    return subprocess.Popen([sys.executable, *prefix, str(script), str(run), str(plain)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen, timeout: float = 150.) -> tuple[int, str]:
    "Exit status and stderr; a process that hangs is killed and fails the test."
    try:
        said = process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = "TIMEOUT " + process.communicate()[1]
    return process.returncode, said


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def test_killed_three_times_is_bit_for_bit_the_same(images, tmp_path):
    config = small(images, "crossmae-tiny", optim__epochs=24, train__save_every=1.4, data__workers=1)
    whole, run = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = launch(whole, config)
    rng, kills, wait = random.Random(0), 0, 0
    while kills < 3:
        process = launch(run, config)
        wait += rng.randint(3, 30)
        while lines_of(run) < wait and process.poll() is None:
            time.sleep(.002)
        time.sleep(rng.random() * .02)
        process.kill()
        status, said = ends(process)
        assert status == -signal.SIGKILL, said
        kills += 1
    for process in (launch(run, config), uninterrupted):
        status, said = ends(process)
        assert status == 0, said
    assert len(json.loads((run / "environment.json").read_text())) == 4 and not list(run.rglob("*.tmp-*"))
    assert losses(run) == losses(whole) and len(losses(run)) == 120
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_two_processes_compute_what_one_does(images, plain, tmp_path):
    run = tmp_path / "run"
    process = launch(run, small(images, train__accumulate=2), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, said = ends(process)
    assert status == 0, said
    assert losses(run) == pytest.approx(losses(plain), abs=1e-6)
    assert json.loads((run / "environment.json").read_text())[0]["processes"] == 2
    ours, theirs = load_state(run / "model.safetensors"), load_state(plain / "model.safetensors")
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours) < 1e-3


def test_two_processes_with_anchors(images, tmp_path):
    "A target and three anchors from one folder read as a bag: two processes train what one does."
    from mae_repro.methods.cdgmae import CDGMAE
    for i in range(16):
        (tmp_path / f"bags/{i:02d}").mkdir(parents=True)
        for k in range(5):
            shutil.copy(images / f"{(i + 5 * k) % 40:02d}.png", tmp_path / f"bags/{i:02d}/{k}.png")
    config = replace(small(tmp_path / "bags"), method=CDGMAE(**SIZES, mask_ratio=.75, decoder_mlp_dim=32, decoder_dropout=0.), views=ViewsConfig(source="bag"))
    one = train(config, tmp_path / "one")
    process = launch(tmp_path / "two", config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, said = ends(process)
    assert status == 0, said
    assert losses(tmp_path / "two") == pytest.approx(one, abs=1e-5) and len(one) == 4


def test_two_processes_fail_together(images, tmp_path):
    run = tmp_path / "run"
    process = launch(run, small(images, optim__lr=1e18, optim__warmup_epochs=0., optim__epochs=20), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, said = ends(process)
    assert status == 1 and "TrainingFailed: loss is" in said, said
    folder, = (run / "nonfinite").iterdir()
    assert len((folder / "images.txt").read_text().split()) == 8


@pytest.mark.parametrize("name", [*RECIPES, *VIEW_RECIPES])
def test_a_recipe_that_was_written_down_is_the_same_training(name):
    "A recipe may say 1 where JSON, read back, says 1.0: its checkpoints must fit all the same, or no run of it could be resumed."
    config = recipe(name, RECIPES | VIEW_RECIPES)
    assert P.fingerprint(config_from_dict(json.loads(json.dumps(config_to_dict(config))))) == P.fingerprint(config)
    assert P.fingerprint(replace_in(config, "optim.warmup_epochs", config.optim.warmup_epochs + .5)) != P.fingerprint(config)
