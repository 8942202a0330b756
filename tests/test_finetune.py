"Fine-tuning: the authors' numbers, layer-wise rates, mixing, and that runs are exact: killed, stopped, divided."
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from mae_repro.evaluation import finetune as T
from mae_repro.evaluation.classifier import Classifier, layer_groups, load_published, published_state, tunable
from mae_repro.evaluation.finetune import AugmentConfig, ClassifierConfig, FinetuneConfig, LabelledData, TuneConfig, TuneOptim
from mae_repro.methods.catalogue import open_encoder
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.model import initialise_mae
from mae_repro.parts.positions import GridRotation
from mae_repro.parts.weights import UserError, load_state
from mae_repro.training.optimisation import adamw, cosine_lr, set_lr
from mae_repro.training import pretrain as P
from mae_repro.training.pretrain import TrainingStopped, read_metrics
from mae_repro.views.photos import BrokenImage, open_images

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    "Two classes: pictures of coarse blocks, and of fine ones; 24 of each to train, 10 to test."
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 10)):
        for name, side in (("coarse", 3), ("fine", 16)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((40, 36), Image.NEAREST).save(folder / part / name / f"{i:02d}.png")
    return folder


def encoder() -> Encoder:
    torch.manual_seed(1)
    return initialise_mae(Encoder(32, 8, 32, 2, 2))


def config(**changes) -> FinetuneConfig:
    "Four epochs of 6 steps; everything published is on. `optim={...}` changes fields of a group."
    made = FinetuneConfig("tiny", "small", method=ClassifierConfig(drop_path=.2), augment=AugmentConfig(scale=(.3, 1.)), data=LabelledData(workers=0),
                          optim=TuneOptim(lr=3e-3, batch_size=8, epochs=4, warmup_epochs=1.), train=TuneConfig(device="cpu", precision="fp32", log_every=1))
    return replace(made, **{group: replace(getattr(made, group), **fields) if isinstance(fields, dict) else fields for group, fields in changes.items()})


def run(c: FinetuneConfig, root: Path, folder: Path, model=None) -> dict:
    "The summary of a run."
    T.finetune(c, model or encoder(), open_images(root, "train"), open_images(root, "val"), folder, progress=False)
    return json.loads((folder / "summary.json").read_text())


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


# --- the authors' numbers ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vit_gap_finetune", "vit_cls_finetune"])
def test_features_groups_and_steps_are_the_published_ones(name):
    path = SHARED / f"golden/evaluation/{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"needs golden/evaluation/{name}.safetensors (MAE_REPRO_SHARED)")
    with safe_open(path, "pt") as file:
        about, g = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    sizes, recipe = json.loads(about["config"]), json.loads(about["recipe"])
    model = Classifier(tunable(Encoder(*(sizes[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")))), sizes["num_classes"], "mean" if sizes["global_pool"] else "cls")
    weights = {k.removeprefix("weights/"): v for k, v in g.items() if k.startswith("weights/")}
    load_published(model, weights)
    assert published_state(model).keys() == weights.keys()
    assert torch.allclose(model.features(g["in/images"]), g["out/features"], atol=2e-5) and torch.allclose(model(g["in/images"]), g["out/logits"], atol=2e-5)
    names = {id(p): n.removeprefix("encoder.") for n, p in model.named_parameters()}
    groups = layer_groups(model, recipe["weight_decay"], recipe["layer_decay"])
    told = lambda groups, call: {(round(x["lr_scale"], 12), x["weight_decay"]): sorted(map(call, x["params"])) for x in groups}
    assert told(groups, lambda p: names[id(p)]) == told(json.loads(about["param_groups"]), str) and len(groups) == 10
    optimizer, found = adamw(groups, recipe["lr"], T.TuneOptim().betas), []
    loss = lambda: F.cross_entropy(model(g["in/images"]), g["in/targets"], label_smoothing=recipe["smoothing"])
    for epoch in recipe["step_epochs"]:
        set_lr(optimizer, cosine_lr(epoch, recipe["lr"], recipe["epochs"], recipe["warmup_epochs"], recipe["min_lr"]))
        optimizer.zero_grad()
        found.append(loss())
        found[-1].backward()
        optimizer.step()
    assert torch.allclose(torch.stack([*found, loss()]), g["step/losses"], atol=2e-6)
    for key, value in g.items():
        if key.startswith("step/param/"):
            assert torch.allclose(published_state(model)[key.removeprefix("step/param/")], value, atol=2e-6), key


def test_recipes_are_the_published_ones():
    rows = {"vits16": (5e-4, .65, 100, .1, .25), "vitb16": (5e-4, .65, 100, .1, .25), "vitb16-crossmae-paper": (1e-3, 1., 100, .1, 0.), "vitl16": (1e-3, .75, 50, .2, .25), "vith14": (1e-3, .75, 50, .3, .25)}
    for name, row in rows.items():
        c = T.RECIPES[name]()
        o, a = c.optim, c.augment
        assert (o.base_lr, o.layer_decay, o.epochs, c.method.drop_path, a.erase) == row and c.recipe == name
        assert (o.batch_size, o.weight_decay, o.betas, o.min_lr, o.warmup_epochs) == (1024, .05, (.9, .999), 1e-6, 5)
        assert (a.mixup, a.cutmix, a.smoothing, a.rand_augment, a.scale, c.method.pool) == (.8, 1., .1, "rand-m9-mstd0.5-inc1", (.08, 1.), "mean")
        T.check(c, 1_281_167, 8)
    assert [T.recipe(None, Encoder(32, 16, d, 1, 4)).recipe for d in (384, 768, 1024, 1280, 128)] == ["vits16", "vitb16", "vitl16", "vith14", "tiny"]
    for make in T.RECIPES.values():
        plain = json.loads(json.dumps(T.config_to_dict(make())))
        assert plain.pop("kind") == "finetune" and T.from_plain(FinetuneConfig, plain, {}, "x") == make()


# --- the model --------------------------------------------------------------------------------------------------------------------------

def test_layer_rates_by_hand():
    model = Classifier(tunable(encoder()), 3)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in layer_groups(model, .05, .5) for p in g["params"]}
    by_hand = {"encoder.cls_token": (.125, 0.), "encoder.pos_embed": (.125, 0.), "encoder.patch_embed.proj.weight": (.125, .05), "encoder.patch_embed.proj.bias": (.125, 0.),
               "encoder.blocks.0.attn.qkv.weight": (.25, .05), "encoder.blocks.0.norm1.weight": (.25, 0.), "encoder.blocks.1.mlp.fc2.weight": (.5, .05),
               "encoder.blocks.1.mlp.fc2.bias": (.5, 0.), "fc_norm.weight": (1., 0.), "head.weight": (1., .05), "head.bias": (1., 0.)}
    assert {n: found[n] for n in by_hand} == by_hand and found.keys() == set(names.values())


def test_initial_head_and_drop_path():
    model = Classifier(tunable(encoder()), 50, drop_path=.5)
    assert 1e-5 < model.head.weight.std() < 3e-5 and not model.head.bias.any() and model.fc_norm.eps == 1e-6
    images, source = torch.randn(64, 3, 32, 32), encoder()
    with torch.no_grad():
        assert torch.equal(model.eval().features(images), model.features(images))
        tokens, attn = source(images, maps=(1,))[1][0], []
        model.encoder.blocks[1].attn.register_forward_hook(lambda m, a, out: attn.append(out))
        model.encoder.blocks[0].attn.register_forward_hook(lambda m, a, out: attn.append(out))
        model.train().features(images)
    first, last = ((out == 0).flatten(1).all(1).float().mean().item() for out in attn)
    assert first == 0 and .25 < last < .75 and tokens.shape == (64, 17, 32)   # rate 0 in the first block, .5 in the last


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_positions_of_larger_images(pool):
    model, source = Classifier(tunable(encoder(), 64), 3, pool), encoder()
    grid = source.pos_embed[0, 1:].T.reshape(1, 32, 4, 4)
    wanted = F.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.allclose(model.encoder.pos_embed[0, 1:], wanted, atol=1e-6) and model.encoder.pos_embed.requires_grad and model.encoder.img_size == (64, 64)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and source.pos_embed.shape == (1, 17, 32)


def test_encoders_of_all_kinds(tmp_path):
    "Ours (shipped), timm's at a new size, rotary, without class token; a published file; and what is written can be opened again."
    timm_one = open_encoder("vit_tiny_patch16_224", pretrained=False)
    for source, size in ((open_encoder("mae-tiny"), 48), (open_encoder("crossmae-tiny"), 48), (timm_one, 64), (Encoder(32, 8, 32, 2, 2, rotary=GridRotation()), 48), (Encoder(32, 8, 32, 2, 2, class_token=False), 48)):
        model = Classifier(tunable(source, size), 4, drop_path=.1)
        model(torch.randn(2, 3, size, size)).logsumexp(1).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert timm_one.pos_embed.shape[1] == 197 and timm_one.norm.weight.requires_grad
    cls = Classifier(tunable(open_encoder("crossmae-tiny"), 48), 4, "cls")
    assert isinstance(cls.norm, torch.nn.LayerNorm)   # a CrossMAE has none of its own
    import timm
    ours = Classifier(tunable(open_encoder("mae-tiny")), 4)
    theirs = timm.models.VisionTransformer(img_size=96, patch_size=8, embed_dim=96, depth=6, num_heads=4, num_classes=4, global_pool="avg", fc_norm=True).eval()
    theirs.load_state_dict(published_state(ours))
    images = torch.randn(2, 3, 96, 96)
    assert torch.allclose(theirs(images), ours.eval()(images), atol=1e-6)
    torch.save({"model": published_state(Classifier(tunable(Encoder(32, 8, 384, 2, 6)), 4))}, tmp_path / "published.pth")
    assert open_encoder(tmp_path / "published.pth").embed_dim == 384


# --- images -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"mixup": 0.}, {"cutmix": 0.}, {"mix_mode": "elem"}, {"mix_prob": .5}])
def test_mixed_targets_sum_to_one(changes):
    mix = T.mixer(AugmentConfig(**changes), 7)
    y = torch.tensor([0, 1, 2, 3])
    for seed in range(8):
        with T.seeded(seed):
            images, targets = mix(torch.arange(4.)[:, None, None, None].expand(4, 3, 16, 16).clone(), y)
        assert torch.allclose(targets.sum(1), torch.ones(4)) and targets.min() >= .1 / 7 - 1e-6
        if changes.get("mix_mode") != "elem":   # the mean value of image i is (1 - w) i + w (3 - i), and its target has the weight w too
            w = (targets[0, 3] - .1 / 7) / .9
            assert torch.allclose(images.mean((1, 2, 3)), (1 - w) * torch.arange(4.) + w * torch.arange(3., -1, -1), atol=1e-4)


@pytest.mark.parametrize("mixing", [False, True])
def test_loss_is_timms(mixing):
    from types import SimpleNamespace

    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    c, seen, logits, y = config(augment={} if mixing else dict(mixup=0., cutmix=0.)), [], torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    mix = T.mixer(c.augment, 3)
    tuner = SimpleNamespace(accelerator=SimpleNamespace(device="cpu", process_index=0), config=c, done=3, model=lambda x: logits,
                            mixup=mix and (lambda x, labels: seen.append(mix(x, labels)) or seen[-1]))
    losses = [T.batch_loss(tuner, dict(images=torch.randn(4, 3, 8, 8), label=y), micro) for micro in (1, 1, 2)]
    if mixing:
        assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][1], seen[2][1])   # drawn anew for each micro-batch, and only for that
    wanted = [SoftTargetCrossEntropy()(logits, targets) for _, targets in seen] or [LabelSmoothingCrossEntropy(.1)(logits, y)] * 3
    assert torch.allclose(torch.stack(losses), torch.stack(wanted))


def test_samples_depend_on_seed_epoch_and_index_alone(root):
    images = open_images(root, "train")
    samples = T.TrainImages(images, T.train_transform(AugmentConfig(), 32), 5)
    first = samples[1, 3]["images"]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    assert torch.equal(samples[1, 3]["images"], first) and first.shape == (3, 32, 32) and first.dtype == torch.float32
    ours = torch.rand(()).item(), random.random(), np.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    assert ours == (torch.rand(()).item(), random.random(), np.random.rand())
    others = [samples[2, 3]["images"], samples[1, 4]["images"], T.TrainImages(images, samples.transform, 6)[1, 3]["images"]]
    assert not any(torch.equal(first, other) for other in others)


def test_evaluation_crop():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    for size, edge in ((224, 256), (448, 448)):
        wide = photo.resize((int(500 * edge / 300), edge), Image.BICUBIC)
        left, top = round((wide.width - size) / 2), round((wide.height - size) / 2)
        wanted = np.asarray(wide.crop((left, top, left + size, top + size))).astype(int)
        found = T.eval_crop(size)(photo)[0].permute(1, 2, 0).numpy().astype(int)
        assert found.shape == (size, size, 3) and np.abs(found - wanted).mean() < 1


# --- runs -------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(config(), root, folder)
    return folder


def test_run_folder(whole, root):
    assert {p.name for p in whole.iterdir()} == {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "summary.json", "model.safetensors", "best.safetensors", "lock"}
    summary, lines = json.loads((whole / "summary.json").read_text()), read_metrics(whole)
    assert len(losses(whole)) == 24 and [line["epoch"] for line in lines if "top1" in line] == [1, 2, 3, 4]
    best = max(line["top1"] for line in lines if "top1" in line)
    assert summary["best"]["top1"] == best and summary["tested"] == 20 and summary["top1_interval"][0] < summary["top1"] < summary["top1_interval"][1] or summary["top1"] == 1
    assert "top5" not in summary and T.read_config(whole) == config()
    kept = load_state(whole / "best.safetensors"), load_state(whole / "model.safetensors")
    assert kept[0].keys() == kept[1].keys() and "fc_norm.weight" in kept[0] and "norm.weight" not in kept[0]
    assert run(config(), root, whole) == summary   # nothing to do


SCRIPT = '''
import sys
from pathlib import Path
import torch
from mae_repro.evaluation.finetune import finetune, read_config
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.model import initialise_mae
from mae_repro.views.photos import open_images
if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(1)
    finetune(read_config(sys.argv[1]), initialise_mae(Encoder(32, 8, 32, 2, 2)), open_images(sys.argv[2], "train"), open_images(sys.argv[2], "val"), sys.argv[3], progress=False)
'''


def launch(c: FinetuneConfig, root: Path, folder: Path, *prefix: str) -> subprocess.Popen:
    given = folder.parent / "given"
    given.mkdir()
    (given / "train.py").write_text(SCRIPT)
    T.write_json(given / "config.json", T.config_to_dict(c))
    return subprocess.Popen([sys.executable, *prefix, str(given / "train.py"), str(given), str(root), str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_and_stopped_is_bit_for_bit_the_same(whole, root, tmp_path):
    folder, c = tmp_path / "run", config(data=dict(workers=1), train=dict(save_every=.7))   # neither workers nor the times of saving change anything
    process = launch(c, root, folder)
    try:
        while len(losses(folder)) < 9 and process.poll() is None:
            time.sleep(.005)
    finally:
        process.kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL, said

    def stopping(tuner, batches, update=P.update):
        found = update(tuner, batches)
        if tuner.done >= 16 and not tuner.interrupt.asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return found
    with mock.patch.object(P, "update", stopping), pytest.raises(TrainingStopped, match="of 24; go on with: mae-repro resume"):
        run(config(), root, folder)
    summary = run(config(), root, folder)
    starts = [line["from_step"] for line in json.loads((folder / "environment.json").read_text())]
    assert starts[0] == 0 and 8 <= starts[1] < starts[2] and len(starts) == 3 and not list(folder.rglob("*.tmp-*"))
    assert losses(folder) == losses(whole)
    drop = lambda s: {k: v for k, v in s.items() if k != "seconds"}
    assert drop(summary) == drop(json.loads((whole / "summary.json").read_text()))
    for name in ("model.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_compute_what_one_does(root, tmp_path):
    "Without what is drawn for each process: mixing and drop path."
    c = config(method=dict(drop_path=0.), augment=dict(mixup=0., cutmix=0.), optim=dict(epochs=2))
    process = launch(c, root, tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one = run(c, root, tmp_path / "one")
    try:
        said = process.communicate(timeout=150)[1]
    finally:
        process.kill()
    assert process.returncode == 0, said
    two = json.loads((tmp_path / "two/summary.json").read_text())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert (two["tested"], two["test_loss"]) == (20, pytest.approx(one["test_loss"], abs=1e-4)) and json.loads((tmp_path / "two/environment.json").read_text())[0]["processes"] == 2


def test_accumulation_checkpointing_and_bf16(root, tmp_path):
    plain = dict(method=dict(drop_path=0.), augment=dict(mixup=0., cutmix=0.), optim=dict(epochs=1))
    run(config(**plain), root, tmp_path / "one")
    run(config(**plain, train=dict(accumulate=2, checkpointing=True)), root, tmp_path / "two")
    run(config(**plain, train=dict(precision="bf16")), root, tmp_path / "half")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "one"), abs=.02) and losses(tmp_path / "half") != losses(tmp_path / "one")


def test_learns_two_classes_from_scratch_and_from_others(root, tmp_path):
    weak = dict(augment=AugmentConfig(scale=(.6, 1.), rand_augment=None, erase=0., mixup=0., cutmix=0.), method=dict(drop_path=0.))
    summary = run(config(**weak, optim=dict(epochs=10, lr=5e-3)), root, tmp_path / "scratch")
    assert summary["top1"] >= .9 and summary["loss"] < .4 and math.isclose(losses(tmp_path / "scratch")[0], math.log(2), abs_tol=1e-3)
    timm_one = open_encoder("vit_tiny_patch16_224", pretrained=False)
    for name, model, size in (("timm", timm_one, 32), ("shipped", open_encoder("mae-tiny"), 48), ("CrossMAE, cls", open_encoder("crossmae-tiny"), 48)):
        method = dict(img_size=size, pool="cls" if "cls" in name else "mean")
        assert run(config(method=method, optim=dict(epochs=1, warmup_epochs=.5), train=dict(test_every=0.)), root, tmp_path / name, model)["tested"] == 20
        assert "head.weight" in load_state(tmp_path / name / "model.safetensors")
    again = open_encoder(tmp_path / "shipped/best.safetensors")   # a file like a published one
    assert again.pos_embed.shape[1] == 37 and again.embed_dim == 96


def test_broken_images_are_replaced_or_not_counted(root, tmp_path):
    import shutil
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data/train/fine/03.png").write_bytes(b"no image")
    (tmp_path / "data/val/fine/03.png").write_bytes(b"no image")
    summary = run(config(optim=dict(epochs=1)), tmp_path / "data", tmp_path / "run")
    assert (summary["tested"], summary["unreadable"], summary["skipped"]) == (19, 1, 1)
    assert "fine/03.png" in (tmp_path / "run/skipped.txt").read_text()


@pytest.mark.parametrize("n, said", [(1, "1 image cannot be read, the first is 0.png"), (3, "3 images in a row cannot be read, the first is 0.png")])
def test_images_of_which_none_can_be_read(n, said):
    def load(i):
        raise BrokenImage(f"{i}.png", "empty")
    images = mock.MagicMock(load=load, labels=[0] * n)
    images.__len__.return_value = n
    with pytest.raises(UserError, match=said):
        T.TrainImages(images, None)[0, 0]


# --- mistakes ---------------------------------------------------------------------------------------------------------------------------

BAD = [("method", dict(img_size=30), "--method.img-size 30 is not a multiple of the encoder's patch_size 8"), ("method", dict(drop_path=1.), "--method.drop-path 1.0"),
       ("augment", dict(rand_augment="nonsense"), "--augment.rand-augment nonsense"), ("augment", dict(smoothing=1.), "--augment.smoothing"), ("augment", dict(scale=(.5, .2)), "--augment.scale 0.5 0.2"),
       ("augment", dict(mixup=-1.), "--augment.mixup"), ("augment", dict(color_jitter=.4), "--augment.color-jitter"), ("optim", dict(layer_decay=0.), "--optim.layer-decay 0.0"),
       ("optim", dict(batch_size=7), "even number"), ("optim", dict(batch_size=64), "larger than the data: 48"), ("optim", dict(clip_grad=-1.), "--optim.clip-grad"),
       ("optim", dict(warmup_epochs=9.), "--optim.warmup-epochs"), ("train", dict(accumulate=3), "--optim.batch-size 8 cannot be divided"), ("train", dict(test_every=-1.), "--train.test-every"),
       ("data", dict(workers=-1), "--data.workers"), ("augment", dict(mixup=math.inf), "--augment.mixup inf must be a finite number"), ("augment", dict(scale=(.5, math.nan)), "--augment.scale 0.5 nan must be finite"),
       ("optim", dict(base_lr=math.inf), "--optim.base-lr inf must be a finite number"), ("optim", dict(clip_grad=math.inf), "--optim.clip-grad inf"), ("train", dict(accumulate=3), "among 1 process x")]


@pytest.mark.parametrize("group, fields, said", BAD)
def test_bad_settings_name_the_field(root, tmp_path, group, fields, said):
    with pytest.raises(UserError) as error:
        run(config(**{group: fields}), root, tmp_path / "run")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()   # the same command can be given again


def test_cls_without_class_token_and_other_runs(whole, root, tmp_path):
    with pytest.raises(UserError, match="--method.pool cls"):
        run(config(method=dict(pool="cls")), root, tmp_path / "run", Encoder(32, 8, 32, 2, 2, class_token=False))
    with pytest.raises(UserError, match="other settings .optim.lr 0.003, not 0.001"):
        run(config(optim=dict(lr=1e-3)), root, whole)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(UserError, match="no fine-tuning run"):
        run(config(), root, tmp_path / "full")
    assert T.read_config(tmp_path / "full") is None
    with pytest.raises(UserError, match="unknown; there are vits16"):
        T.recipe("vitg", encoder())


def test_the_same_command_again_leaves_a_running_training_alone(root, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    T.write_json(folder / "config.json", T.config_to_dict(config()))   # no metrics, no checkpoint: it has just begun
    with P.run_lock(folder), pytest.raises(UserError, match="another process"):
        run(config(), root, folder)
    assert T.read_config(folder) == config()


def test_config_that_is_none(tmp_path):
    for content in ("3", "[]", "null"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="config.json.*no fields"):
            T.read_config(tmp_path)


def test_another_encoder_is_refused_on_resume(root, tmp_path):
    def stopping(tuner, batches, update=P.update):
        update(tuner, batches)
        return 1., True
    with mock.patch.object(P, "update", stopping), contextlib.suppress(TrainingStopped):
        run(config(), root, tmp_path / "run")
    with pytest.raises(UserError, match="of another encoder"):
        run(config(), root, tmp_path / "run", initialise_mae(Encoder(32, 8, 32, 3, 2)))


# --- the command ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def cli():
    from mae_repro import cli
    if "finetune" not in cli.COMMANDS:
        pytest.skip("the command line has no finetune yet")
    return cli


def test_command(cli, root, tmp_path, capsys):
    args = ["finetune", "mae-tiny", "--data.root", str(root), "--method.img-size", "32", "--optim.batch-size", "16", "--optim.epochs", "1", "--data.workers", "0", "--train.device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.run([*args, "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "top-1" in said and "best" in said and json.loads((tmp_path / "a.json").read_text())["tested"] == 20
    assert cli.run(args) == 0 and cli.run(["resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("args, said", [(["mae-tiny"], "--data.root"), (["nowhere.pth", "--data.root", "x"], "nowhere.pth"), (["mae-tiny", "--data.root", "ROOT", "--recipe", "vitg"], "--recipe vitg"),
                                        (["mae-tiny", "--data.root", "ROOT", "--optim.layer-decay", "2"], "--optim.layer-decay 2"), ([], "needs an encoder"), (["mae-tiny", "--data.root", "ROOT", "--recipe"], "--recipe")])
def test_bad_commands_say_one_line_and_exit_2(cli, root, capsys, args, said):
    assert cli.run(["finetune", *(str(root) if a == "ROOT" else a for a in args)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.strip().count("\n") <= 1
