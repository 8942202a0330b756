"The diffusion model that paints views: its parts, its training, and its pipeline on disk."
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image

from mae_repro.cli import run
from mae_repro.methods.catalogue import open_encoder, save_model
from mae_repro.methods.croco import CroCo
from mae_repro.methods.diffusion import FrozenEncoder, SelfConditionedLatentDiffusion, build_unet, denoise, open_pipeline, to_latents, to_pixels
from mae_repro.methods.mae import MAE
from mae_repro.methods.mum import MuM
from mae_repro.methods.sldm import SLDM, NoisePrediction, generators
from mae_repro.parts.features import extract
from mae_repro.parts.patches import normalise
from mae_repro.parts.weights import UserError
from mae_repro.training import pretrain as P
from mae_repro.training.config import config_from_dict, config_to_dict, replace_in, validate
from mae_repro.training.optimisation import peak_lr
from mae_repro.training.recipes import RECIPES, VIEW_RECIPES, recipe

SMALL = dict(img_size=16, pool="mean", channels=(8, 16), attention_levels=1, layers=1, head_dim=8, ema_decay=.9, beta_schedule="squaredcos_cap_v2")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory) -> Path:
    "A small MAE on disk, to be told about."
    folder, config = tmp_path_factory.mktemp("encoder"), MAE(16, 4, 16, 2, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    torch.manual_seed(0)
    save_model(folder, config.build(), config)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((24, 20), Image.BILINEAR).save(folder / f"{i:02d}.png")
    return folder


def small(images: Path, encoder: Path, **changes):
    config = recipe("sldm-tiny", VIEW_RECIPES)
    config = replace(config, method=SLDM(encoder=str(encoder), **SMALL), data=replace(config.data, root=images, workers=0, repeats=1),
                     optim=replace(config.optim, batch_size=8, epochs=2, warmup_epochs=.4), train=replace(config.train, device="cpu", log_every=1, save_every=1., figure_every=0.))
    for key, value in changes.items():
        config = replace_in(config, key.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def plain(images, encoder_run, tmp_path_factory) -> Path:
    "An ordinary training: 3 steps an epoch, one process."
    out = tmp_path_factory.mktemp("runs") / "plain"
    P.pretrain(small(images, encoder_run), out, progress=False)
    return out


def weights(run: Path) -> dict:
    state = P.latest_checkpoint(run / "checkpoints")[1]
    return state["model"]


def same(a: dict, b: dict, **tolerance) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **tolerance) if tolerance else torch.equal(a[k], b[k]) for k in a)


# --- recipes --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VIEW_RECIPES)
def test_recipes(name):
    config = recipe(name, VIEW_RECIPES)
    assert config.recipe == name and VIEW_RECIPES[name].__doc__.count("\n") >= 2 and config.optim.scale_lr == "none"
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert all(ok for _, ok, _ in config.method.rules()) and peak_lr(config) == config.optim.lr
    with torch.device("meta"):
        unet = config.method.build_unet(384, AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                                           norm_num_groups=8, latent_channels=4) if config.method.vae else None)
    assert unet.config.sample_size == {"sldm-tiny": 32, "sldm-small": 64, "sldm-imagenet256": 32}[name]


def test_recipe_of_another_command():
    with pytest.raises(UserError, match="mae-repro views train sldm-tiny"):
        recipe("sldm-tiny")
    with pytest.raises(UserError, match="mae-repro pretrain mae-tiny"):
        recipe("mae-tiny", VIEW_RECIPES)
    assert not RECIPES.keys() & VIEW_RECIPES.keys()


@pytest.mark.parametrize("field, value, said", [
    ("method.img_size", 17, "--method.img-size 17 is not a multiple of"), ("method.unshuffle", 0, "--method.unshuffle 0"), ("method.head_dim", 5, "--method.head-dim 5"),
    ("method.channels", (8, 18), "--method.channels 8 18"), ("method.condition_dropout", 1., "--method.condition-dropout"), ("method.ema_decay", 1., "--method.ema-decay"),
    ("method.encoder", "", "--method.encoder"), ("method.encoder_size", 17, "--method"), ("method.encoder_size", -8, "--method.encoder-size -8"), ("method.encoder", "nowhere/at/all", "nowhere/at/all: no such file"), ("method.attention_levels", 3, "--method.attention-levels 3"),
    ("method.vae", "nowhere/at/all", "--method.vae nowhere/at/all"), ("views.source", "video", None)])
def test_bad_configs_name_the_field(images, encoder_run, field, value, said):
    config = replace_in(small(images, encoder_run), field, value)
    if said is None:   # frames are images too
        validate(config)
        return
    with pytest.raises(UserError) as error:
        validate(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_without_class_token(tmp_path):
    config = CroCo(16, 4, 16, 2, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, positions="rope")
    save_model(tmp_path, config.build(), config)
    with pytest.raises(UserError, match="no class token"):
        FrozenEncoder.around(open_encoder(tmp_path), pool="cls")
    frozen, x = FrozenEncoder.around(open_encoder(tmp_path), pool="mean"), torch.randn(2, 3, 16, 16)
    frozen.save_pretrained(tmp_path / "saved")
    again = FrozenEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(x), frozen(x)) and torch.allclose(frozen(x), extract(open_encoder(tmp_path), x), atol=1e-6)


@pytest.mark.parametrize("inter_frame", ["decoder", "encoder"])
def test_an_encoder_with_axial_rotations(tmp_path, inter_frame):
    "MuM's rotations are others than CroCo's; an encoder whose blocks join several views cannot be described."
    config = MuM(16, 4, 16, 2, 2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, inter_frame=inter_frame)
    save_model(tmp_path, config.build(), config)
    if inter_frame == "encoder":
        with pytest.raises(UserError, match="SceneEncoder cannot be saved"):
            FrozenEncoder.around(open_encoder(tmp_path), "a run")
        return
    frozen, x = FrozenEncoder.around(open_encoder(tmp_path), "a run"), torch.randn(2, 3, 16, 16)
    frozen.save_pretrained(tmp_path / "saved")
    again = FrozenEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(x), frozen(x)) and torch.allclose(frozen(x), extract(open_encoder(tmp_path), x, "cls"), atol=1e-6)


def test_a_timm_encoder(tmp_path):
    encoder = open_encoder("vit_tiny_patch16_224", pretrained=False)
    frozen, x = FrozenEncoder.around(encoder, "vit_tiny_patch16_224", 64), torch.randn(1, 3, 64, 64)
    frozen.save_pretrained(tmp_path)
    assert torch.allclose(FrozenEncoder.from_pretrained(tmp_path)(x), encoder.forward_features(x)[:, 0], atol=1e-5)
    with pytest.raises(UserError, match="neither ours nor known"):
        FrozenEncoder.around(encoder)


# --- parts ----------------------------------------------------------------------------------------------------------------------------

def test_calibration(encoder_run):
    frozen = FrozenEncoder.around(open_encoder(encoder_run), pool="mean")
    x = torch.randn(40, 3, 16, 16)
    raw = frozen(x)
    frozen.calibrate(x.split(7))
    assert torch.allclose(frozen(x).mean(0), torch.zeros(16), atol=1e-5) and torch.allclose(frozen(x).std(0), torch.ones(16), atol=1e-4)
    assert torch.allclose(frozen(x), (raw - raw.mean(0)) / raw.std(0), atol=1e-4)
    frozen.calibrate(x.split(7))   # twice is once
    assert torch.allclose(frozen(x), (raw - raw.mean(0)) / raw.std(0), atol=1e-4)
    frozen.calibrate([x[:1]])
    assert frozen(x).isfinite().all()
    frozen.calibrate([x[:1].expand(4, -1, -1, -1)])   # nothing varies
    assert frozen(x).abs().max() < 100
    assert frozen(x).isfinite().all() and not frozen.train().vit.training and not any(p.requires_grad for p in frozen.parameters())


def test_calibration_sees_the_whole_data_set(encoder_run):
    "A data set sorted by class: the first half black, the second half white."
    class Sorted:
        def __len__(self): return 2000
        def __getitem__(self, key): return {"views": torch.full((1, 3, 16, 16), 255 * (key[1] >= 1000), dtype=torch.uint8)}
    model = SLDM(encoder=str(encoder_run), **SMALL).build()
    model.before_training(Sorted())
    both = [model.encoder(normalise(torch.full((1, 3, 16, 16), value, dtype=torch.uint8))) for value in (0, 255)]
    assert torch.allclose(both[0], -both[1], atol=1e-3) and both[0].abs().sum() > 1


def test_the_condition_is_the_same_in_mixed_precision(model):
    "What the UNet is told in training, under autocast, is what it is told when it paints, without."
    images = normalise(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    plain = model.encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encoder(images), plain)
        assert torch.equal(model.encoder(images.bfloat16()), model.encoder(images.bfloat16().float()))
    half = FrozenEncoder.around(model.encoder.vit, pool="mean")
    half.vit.bfloat16()
    assert torch.allclose(half(images), FrozenEncoder.around(model.encoder.vit, pool="mean")(images), atol=.1) and half(images).dtype == torch.float32


class Elsewhere(torch.Tensor):
    "A tensor on a device without float64, as Apple's are."
    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_calibration_on_a_device_without_float64(encoder_run, monkeypatch):
    x, frozen = torch.randn(12, 3, 16, 16), [FrozenEncoder.around(open_encoder(encoder_run), pool="mean") for _ in range(2)]
    frozen[0].calibrate(x.split(5))
    monkeypatch.setattr(FrozenEncoder, "forward", lambda self, images, inner=FrozenEncoder.forward: inner(self, images).as_subclass(Elsewhere))
    frozen[1].calibrate(x.split(5))
    assert torch.equal(frozen[0].mean, frozen[1].mean) and torch.equal(frozen[0].scale, frozen[1].scale) and frozen[1].mean.abs().sum() > 0


def test_half_precision_leaves_the_encoder_alone(plain):
    exact, half = open_pipeline(plain), open_pipeline(plain, torch.bfloat16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    assert half.unet.dtype == torch.bfloat16 and torch.equal(half.embed(image), exact.embed(image))
    assert half(image, 1, 2, output_type="pt").images.isfinite().all()


def test_pixels_and_latents_and_back():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(to_pixels(to_latents(x, None, 4), None, 4), x) and to_latents(x, None, 4).shape == (2, 48, 4, 4)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=.5).eval()
    with torch.no_grad():
        z = to_latents(x, vae, generator=torch.Generator().manual_seed(1))
        mean, std = vae.encode(x).latent_dist.mean, vae.encode(x).latent_dist.std
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(z, .5 * (mean + std * noise), atol=1e-5)
        assert torch.allclose(to_pixels(z, vae), vae.decode(z / .5).sample.clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("condition", ["cross-attention", "class-embedding"])
def test_the_unet_listens(condition):
    torch.manual_seed(0)
    unet = build_unet(8, 3, 16, condition, (8, 16), 1, 1, 8)
    x, t, e = torch.randn(2, 3, 8, 8), torch.tensor([3, 400]), torch.randn(2, 16)
    out = denoise(unet, x, t, e)
    assert out.shape == x.shape and not torch.allclose(out, denoise(unet, x, t, torch.zeros_like(e)), atol=1e-4)
    assert torch.allclose(out[1:], denoise(unet, x[1:], t[1:], e[1:]), atol=1e-5)


@pytest.fixture(scope="module")
def model(encoder_run) -> NoisePrediction:
    torch.manual_seed(0)
    return SLDM(encoder=str(encoder_run), **SMALL).build()


def test_loss_is_the_equation(model):
    "mean |eps - eps_theta(sqrt(a_t) x + sqrt(1 - a_t) eps, t, e)|^2 with the t, eps and dropping that the sample's own noise seeds."
    views, noise = normalise(torch.randint(0, 256, (6, 1, 3, 16, 16), dtype=torch.uint8)), torch.rand(6, 1, 4)
    model.condition_dropout = .5
    with torch.no_grad():
        found = model(views, noise=noise)
        for i, g in enumerate(generators(noise)):
            t = torch.randint(1000, (), generator=g)
            dropped = torch.rand((), generator=g) < .5
            eps = torch.randn(3, 16, 16, generator=g)
            a = model.scheduler.alphas_cumprod[t]
            x = views[i, 0] * torch.tensor([.229, .224, .225]).view(3, 1, 1) + torch.tensor([.485, .456, .406]).view(3, 1, 1)
            e = torch.zeros(1, 16) if dropped else model.encoder(views[i])
            predicted = denoise(model.unet, (a.sqrt() * (2 * x - 1) + (1 - a).sqrt() * eps)[None], t[None], e)
            assert (found.timesteps[i], found.dropped[i]) == (t, dropped) and torch.allclose(found.sample_loss[i], (predicted - eps).square().mean(), atol=1e-5)
        one = model(views[2:3], noise=noise[2:3])   # a sample is the same in any batch
        assert torch.allclose(one.sample_loss, found.sample_loss[2:3], atol=1e-6) and found.dropped.any() and not found.dropped.all()
    model.condition_dropout = .1


def test_sampling_is_ddim_with_guidance(model):
    "Against a loop written from the DDIM paper (eta 0): x0 estimate, then the deterministic step; guidance mixes two predictions."
    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = SelfConditionedLatentDiffusion(model.encoder, model.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    e, x = torch.randn(2, 16), torch.randn(2, 3, 16, 16)
    found = pipe(embeddings=e, latents=x.clone(), num_inference_steps=10, guidance_scale=3., output_type="pt").images
    a = scheduler.alphas_cumprod
    with torch.no_grad():
        for t in range(901, 0, -100):
            eps0, eps1 = (denoise(model.unet, x, torch.full((2,), t), told) for told in (torch.zeros_like(e), e))
            eps = eps0 + 3 * (eps1 - eps0)
            clean = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
            before = a[t - 100] if t > 100 else a[0]
            x = before.sqrt() * clean + (1 - before).sqrt() * eps
    assert torch.allclose(found, x.clamp(-1, 1) / 2 + .5, atol=1e-4)


def test_a_view_does_not_depend_on_its_company(model):
    pipe, draws = model.pipeline(), lambda seeds: [torch.Generator().manual_seed(s) for s in seeds]
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 20, 3), dtype=np.uint8)) for i in range(3)]
    many = pipe(images, 2, 4, generator=draws([1, 2, 3, 4, 5, 6]), output_type="pt").images
    alone = pipe(images[1], 1, 4, generator=draws([4]), output_type="pt").images
    assert many.shape == (6, 3, 16, 16) and torch.allclose(many[3], alone[0], atol=1e-4) and not torch.allclose(many[2], many[3], atol=1e-2)
    assert torch.allclose(pipe(embeddings=pipe.embed(images), num_images_per_prompt=2, num_inference_steps=4, generator=draws([1, 2, 3, 4, 5, 6]), output_type="pt").images, many, atol=1e-5)
    for wrong in (dict(), dict(image=images, embeddings=torch.zeros(3, 16)), dict(image=images, generator=draws([1, 2])), dict(image=images[0], output_type="np", num_inference_steps=1)):
        with pytest.raises(ValueError):
            pipe(**wrong)


def test_average_of_weights(model):
    made = NoisePrediction(model.encoder, build_unet(8, 3, 16, channels=(8, 16), attention_levels=1, layers=1, head_dim=8), model.scheduler, ema_decay=.75)
    first, expected = made.unet.conv_in.weight, None
    for n in range(6):
        with torch.no_grad():
            first += 1
        made.after_step()
        decay = min(.75, (1 + n) / (10 + n))
        expected = first.clone() if n == 0 else decay * expected + (1 - decay) * first
        assert torch.allclose(made.ema.module.conv_in.weight, expected, atol=1e-5)
    assert not any(p.requires_grad for p in made.ema.parameters()) and made.train().unet.training and not made.ema.training


# --- training with the common loop ---------------------------------------------------------------------------------------------------

def test_a_run_leaves_a_pipeline(plain):
    pipe = open_pipeline(plain)
    state = weights(plain)
    assert all(torch.equal(v, state[f"ema.module.{k}"]) for k, v in pipe.unet.state_dict().items())
    assert not same({k: state[f"unet.{k}"] for k in pipe.unet.state_dict()}, pipe.unet.state_dict())
    assert torch.equal(pipe.encoder.mean, state["encoder.mean"]) and pipe.encoder.mean.abs().sum() > 0   # calibrated on the data
    assert pipe.img_size == 16 and open_pipeline(plain / "pipeline").img_size == 16
    about = json.loads((plain / "model.json").read_text())
    assert (about["method"], about["recipe"], about["step"]) == ("sldm", "sldm-tiny", 6) and about["config"]["channels"] == [8, 16]
    assert not list(plain.rglob("*.bin")) and len(P.read_metrics(plain)) == 6 and P.is_finished(plain)


def test_resume_is_exact(images, encoder_run, plain, tmp_path):
    class Stop(Exception):
        pass

    def figure(model, views, path):
        raise Stop
    config = small(images, encoder_run, train__figure_every=1.)
    with pytest.raises(Stop):   # after the third step, before the checkpoint of that epoch: starts again from nothing
        P.pretrain(config, tmp_path / "a", figure=figure, progress=False)
    P.resume(tmp_path / "a", progress=False)
    assert same(weights(tmp_path / "a"), weights(plain))
    calls = []
    with pytest.raises(Stop):   # after the sixth step: from the checkpoint of the first epoch
        P.pretrain(config, tmp_path / "b", figure=lambda *a: figure(*a) if calls else calls.append(1), progress=False)
    assert len(list((tmp_path / "b/checkpoints").iterdir())) == 1
    P.resume(tmp_path / "b", progress=False)
    assert same(weights(tmp_path / "b"), weights(plain))


def test_accumulation_changes_nothing(images, encoder_run, plain, tmp_path):
    "Losses agree to rounding (weights need not: Adam's first steps are signs, and some gradients are zero but for rounding)."
    P.pretrain(small(images, encoder_run, train__accumulate=4), tmp_path / "run", progress=False)
    ours, theirs = ([line["loss"] for line in P.read_metrics(run)] for run in (tmp_path / "run", plain))
    assert ours == pytest.approx(theirs, rel=1e-3) and len(set(theirs)) == 6


def test_two_processes_train_what_one_does(images, encoder_run, plain, tmp_path):
    "Noise, time steps and dropping belong to the sample: with torchrun the losses are those of one process, to rounding."
    import socket
    import subprocess
    import sys
    config = small(images, encoder_run)
    P.write_json(tmp_path / "config.json", config_to_dict(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "train.py"
    script.write_text(f"import json\nfrom mae_repro.training.config import config_from_dict\nfrom mae_repro.training.pretrain import pretrain\n"
                      f"pretrain(config_from_dict(json.load(open({str(tmp_path / 'config.json')!r}))), {str(tmp_path / 'run')!r}, progress=False)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = ([line["loss"] for line in P.read_metrics(run)] for run in (tmp_path / "run", plain))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_latents_of_an_autoencoder(images, encoder_run, tmp_path):
    "The published form, in miniature: AutoencoderKL from a folder, class embedding, checkpointing."
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4).save_pretrained(tmp_path / "vae")
    config = small(images, encoder_run, method__vae=str(tmp_path / "vae"), method__condition="class-embedding", method__beta_schedule="scaled_linear", optim__epochs=1, train__checkpointing=True)
    P.pretrain(config, tmp_path / "run", progress=False)
    pipe = open_pipeline(tmp_path / "run")
    assert pipe.vae is not None and pipe.img_size == 16 and pipe.unet.config.in_channels == 4
    assert pipe([Image.new("RGB", (20, 20))], 2, 2).images[1].size == (16, 16)


@pytest.mark.parametrize("damage, said", [(lambda f: (f / "model_index.json").unlink(), "holds no diffusion pipeline"), (lambda f: (f / "unet/config.json").write_text("{"), "damaged"),
                                          (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x"), "damaged")])
def test_damaged_pipelines(plain, tmp_path, damage, said):
    import shutil
    shutil.copytree(plain / "pipeline", tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(UserError, match=said):
        open_pipeline(tmp_path / "p")


def test_weights_are_never_unpickled(plain, tmp_path):
    import shutil
    shutil.copytree(plain / "pipeline", tmp_path / "p")
    (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return Path(tmp_path / "evil").mkdir, ()
    torch.save(Evil(), tmp_path / "p/unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError):
        open_pipeline(tmp_path / "p")
    assert not (tmp_path / "evil").exists()


def test_bags_painted_by_a_run(plain, images, tmp_path, capsys):
    "Batch size changes nothing but roundings; the record says what painted; a retrained model does not go on with the bags of another."
    import shutil

    from mae_repro.views.bags import open_bags
    make = ["views", "make", "--generator", str(tmp_path / "painter"), "--images", str(images), "--limit", "6", "--num-views", "2", "--steps", "4", "--quality", "100", "--device", "cpu"]
    shutil.copytree(plain / "pipeline", tmp_path / "painter")
    for size in ("1", "4"):
        assert run([*make, "--batch-size", size, "--out", str(tmp_path / size)]) == 0
    a, b = (open_bags(tmp_path / size) for size in ("1", "4"))
    pixels = [np.stack([np.asarray(p, int) for i in range(6) for p in bags.frames(i, [1, 2])]) for bags in (a, b)]
    assert pixels[0].shape == (12, 16, 16, 3) and np.abs(pixels[0] - pixels[1]).max() <= 1 and (pixels[0] == pixels[1]).mean() > .99 and pixels[0].std() > 1
    made = json.loads(a.files(0)["json"])
    by = made["generator"]
    assert (by["generator"], by["steps"], by["guidance"], by["precision"], made["seed"]) == ("sldm", 4, 6., "float32", 0) and len(by["weights"]) == 16 and len(made["views"]) == 2
    capsys.readouterr()
    pipe = open_pipeline(tmp_path / "painter")
    pipe.unet.conv_out.bias.data += 1
    pipe.save_pretrained(tmp_path / "painter")
    (tmp_path / "4/000000.tar").unlink()
    assert run([*make, "--out", str(tmp_path / "4")]) == 2 and "was begun with other settings: weights" in capsys.readouterr().err


def test_command_line(images, encoder_run, tmp_path, capsys):
    small = ["--method.encoder", str(encoder_run), "--method.img-size", "16", "--method.unshuffle", "1", "--method.channels", "8", "16", "--method.head-dim", "8"]
    small += ["--data.root", str(images), "--data.workers", "0", "--data.repeats", "1", "--optim.batch-size", "8", "--optim.epochs", "1", "--train.device", "cpu", "--train.figure-every", "1"]
    assert run(["views", "train", "sldm-tiny", *small, "--out", str(tmp_path / "run")]) == 0
    assert f"mae-repro views make --generator {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(list((tmp_path / "run/figures").glob("*.png"))) == 1
    assert run(["export", str(tmp_path / "run"), "--to", "timm"]) == 2 and "--to half only" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "run"), "--to", "half", "--out", str(tmp_path / "half")]) == 0
    exact, half = (open_pipeline(tmp_path / name).unet.state_dict() for name in ("run", "half"))
    assert all(torch.equal(half[k], v.half().float()) for k, v in exact.items()) and (tmp_path / "half/model.json").is_file()
    capsys.readouterr()
    assert run(["resume", str(tmp_path / "run")]) == 0 and "nothing to do" in capsys.readouterr().err
    for args, said in ((["train"], "needs the name of a recipe"), (["train", "sldm-tinny"], "did you mean sldm-tiny"), (["train", "mae-tiny"], "another command"),
                       (["train", "sldm-tiny", "--train.probe-every", "1"], "probes an encoder"), (["train", "sldm-tiny", "--method.head-dim", "7"], "--method.head-dim 7")):
        assert run(["views", *args]) == 2 and said in capsys.readouterr().err
    assert run(["pretrain", "sldm-tiny"]) == 2 and "views train" in capsys.readouterr().err
    assert run(["views", "train", "sldm-tiny", "--help"]) == 0 and "--method.condition-dropout" in capsys.readouterr().out
    assert run(["recipes", "sldm-tiny"]) == 0 and "--method.head-dim 16" in capsys.readouterr().out
