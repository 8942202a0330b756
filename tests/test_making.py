"Generators of views, and bags made with them: the same whatever the batch, interrupted or not, alone or together."
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.cli import run
from mae_repro.parts.weights import UserError, data_dir
from mae_repro.views import generators as G
from mae_repro.views.bags import BagViews, open_bags
from mae_repro.views.making import MakeConfig, make_views, view_seeds
from mae_repro.views.photos import BrokenImage, open_images
from mae_repro.views.shards import verify_bags
from mae_repro.views.videos import open_videos


def picture(seed: int, size=(24, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.BILINEAR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Eleven images in nested folders, JPEG and PNG, two of which would have the same key."
    root = tmp_path_factory.mktemp("images")
    (root / "a/b").mkdir(parents=True)
    for i in range(9):
        picture(i).save(root / ("a" if i % 2 else "a/b") / f"{i}.v.jpg", quality=95)
    picture(9).save(root / "same.png")
    picture(10).save(root / "same.jpg")
    return root


class Painter:
    "Views that show their seed, and count how often they were asked for."
    about = dict(generator="painter")

    def __init__(self, broken: tuple[str, ...] = (), pause: float = 0.):
        self.calls, self.broken, self.pause = [], broken, pause

    def __call__(self, pictures, num_views, seeds):
        for p in pictures:
            if p.name in self.broken:
                raise BrokenImage(p.name, "has no views")
        self.calls += [p.name for p in pictures]
        time.sleep(self.pause)
        return [[picture(int(s), (16, 16)) for s in row[:num_views]] for row in seeds]


def contents(root: Path) -> dict[str, list[bytes]]:
    "Key -> pictures of the bags below a folder, as bytes of their pixels."
    bags = open_bags(root)
    return {bags.key(i): [np.asarray(p).tobytes() for p in bags.frames(i, range(bags.length(i)))] for i in range(len(bags))}


# --- seeds ----------------------------------------------------------------------------------------------------------------------------

def test_seeds_belong_to_the_image_and_the_view():
    assert view_seeds(0, "a/b.jpg", 4)[:2] == view_seeds(0, "a/b.jpg", 2) == [9003602506158608717, 3749166364513262819]  # for ever: other numbers would be other views
    every = {s for seed in range(3) for name in ("a.jpg", "b.jpg", "c/a.jpg") for s in view_seeds(seed, name, 50)}
    assert len(every) == 450 and all(0 <= s < 2 ** 63 for s in every)
    torch.Generator().manual_seed(max(every))


# --- generators -----------------------------------------------------------------------------------------------------------------------

def pictures(folder: Path, rows=range(3)) -> list[G.Picture]:
    images = open_images(folder)
    return [G.Picture(images.key(i), images.load(i)) for i in rows]


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_crops(folder):
    crops, p = G.CropGenerator(16), pictures(folder)
    state = torch.get_rng_state()
    views = crops(p, 2, np.array([[1, 2], [3, 4], [1, 2]]))
    assert torch.equal(torch.get_rng_state(), state)
    assert [[v.size for v in row] for row in views] == [[(16, 16)] * 2] * 3 and same(crops(p[1:2], 1, np.array([[3]]))[0][0], views[1][0]) and not same(views[1][0], views[1][1])


def test_video_frames(tmp_path):
    for v, n in enumerate((60, 12, 4)):
        (tmp_path / f"clip{v}").mkdir()
        for t in range(n):
            Image.new("RGB", (8, 8), (t, v, 0)).save(tmp_path / f"clip{v}/{t}.png")
    images, frames = G.open_frames(tmp_path)
    p = [G.Picture(images.key(i), images.load(i)) for i in range(3)]
    assert [one.image.getpixel((0, 0)) for one in p] == [(30, 0, 0), (6, 1, 0), (2, 2, 0)] and images.name(1) == open_videos(tmp_path).name(1)
    seen = set()
    for seed in range(200):
        views = frames(p, 3, np.full((3, 3), seed))
        t = [[v.getpixel((0, 0))[0] for v in row] for row in views]
        assert all(len({*row}) == 3 for row in t) and all(v.getpixel((0, 0))[1] == i for i, row in enumerate(views) for v in row)
        assert all(abs(k - 30) >= 4 for k in t[0]) and all(abs(k - 6) >= 4 for k in t[1]) and 2 not in t[2]
        seen |= {*t[0]}
    assert len(seen) > 45
    with pytest.raises(BrokenImage, match="clip2: too short"):
        frames(p, 4, np.zeros((3, 4)))
    assert images.take(np.array([1])).load(0).getpixel((0, 0)) == (6, 1, 0)


def test_somebody_elses_views(folder, tmp_path):
    p = pictures(folder, [0, 9, 10])
    names = [one.name for one in p]
    inside = tmp_path / os.path.splitext(names[0])[0]
    inside.mkdir(parents=True)
    for k in (10, 2, 1):
        picture(100 + k).save(inside / f"view{k}.png")
        picture(200 + k).save(tmp_path / f"same_{k}.png")
    generator = G.FolderGenerator(tmp_path)
    views = generator(p[:2], 2, np.zeros((2, 2)))
    assert same(views[0][0], picture(101)) and same(views[0][1], picture(102)) and same(views[1][0], picture(201))
    picture(0).save(tmp_path / "same_1_1.png")   # a view of same_1, not of same
    assert len(generator.paths("same.jpg")) == len(G.FolderGenerator(tmp_path).paths("same.jpg")) == 3
    with pytest.raises(BrokenImage, match="has 3 views"):
        generator(p, 4, np.zeros((3, 4)))
    with pytest.raises(UserError, match="no images"):
        (tmp_path / "empty").mkdir()
        G.FolderGenerator(tmp_path / "empty")(p, 1, np.zeros((3, 1)))


# --- pipelines of diffusers, in miniature, saved and opened as the real ones are ---------------------------------------------------------

@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Path:
    "Random weights in the layouts of Stable unCLIP, image variations, and Stable Diffusion with an IP-Adapter."
    import diffusers as D
    import transformers as T
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from safetensors.torch import save_file
    out = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    (out / "words").mkdir()
    (out / "words/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(("<|startoftext|>", "<|endoftext|>", "a", "a</w>"))}))
    (out / "words/merges.txt").write_text("#version: 0.2\n")

    def parts(**unet):
        return dict(vae=D.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4),
                    unet=D.UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16, norm_num_groups=4,
                                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, **unet),
                    scheduler=D.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1), feature_extractor=T.CLIPImageProcessor(size=16, crop_size=16))

    def eye():
        return T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16))

    def words():
        return dict(tokenizer=T.CLIPTokenizer(str(out / "words/vocab.json"), str(out / "words/merges.txt"), model_max_length=8), text_encoder=T.CLIPTextModel(T.CLIPTextConfig(
            vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)))
    D.StableUnCLIPImg2ImgPipeline(**parts(class_embed_type="projection", projection_class_embeddings_input_dim=32), **words(), image_encoder=eye(), image_normalizer=StableUnCLIPImageNormalizer(16),
                                  image_noising_scheduler=D.DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(out / "unclip")
    D.StableDiffusionImageVariationPipeline(**parts(), image_encoder=eye(), safety_checker=None, requires_safety_checker=False).save_pretrained(out / "variations")
    D.StableDiffusionPipeline(**parts(), **words(), safety_checker=None, requires_safety_checker=False).save_pretrained(out / "ip-adapter/model")
    adapter, width = {"image_proj.proj.weight": torch.randn(64, 16), "image_proj.proj.bias": torch.zeros(64), "image_proj.norm.weight": torch.ones(16), "image_proj.norm.bias": torch.zeros(16)}, 16
    for k in range(4):   # one for each cross-attention: one down, two up, one in the middle
        adapter |= {f"ip_adapter.{2 * k + 1}.to_{x}_ip.weight": torch.randn(width, 16) for x in "kv"}
    (out / "ip-adapter/adapter/models").mkdir(parents=True)
    save_file(adapter, out / "ip-adapter/adapter/models/ip-adapter_sd15.safetensors")
    eye().save_pretrained(out / "ip-adapter/adapter/models/image_encoder")
    return out


@pytest.mark.parametrize("kind", G.DIFFUSERS)
def test_pipelines_of_diffusers(pipelines, folder, kind):
    generator = G.DIFFUSERS[kind](str(pipelines / kind), 2, 4.)
    p = pictures(folder, range(2))
    views = generator(p, 2, np.array([[1, 2], [3, 4]]))
    assert [len(row) for row in views] == [2, 2] and all(v.mode == "RGB" and v.size == (16, 16) for row in views for v in row)
    assert same(generator(p[1:], 1, np.array([[3]]))[0][0], views[1][0]) and not same(views[1][0], views[1][1])
    other = generator([p[0]], 1, np.array([[3]]))[0][0]   # the same noise, another image
    assert not same(other, views[1][0])
    assert len(generator.weights) == 16 and generator.about == dict(generator=kind, model=str(pipelines / kind), weights=generator.weights, precision="float32", steps=2, guidance=4.)


@pytest.mark.parametrize("spec", ["unclip:nobody/nothing-of-this-name", "variations:nobody/nothing-of-this-name", "ip-adapter:nobody/a+nobody/b"])
def test_a_hub_that_cannot_be_reached(folder, tmp_path, capsys, monkeypatch, spec):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["views", "make", "--generator", spec, "--images", str(folder), "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "cannot be loaded" in said and "give its path" in said and "Traceback" not in said and not (tmp_path / "x").exists()


# --- making ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bags"
    done = make_views(open_images(folder), Painter(), out, MakeConfig(3, per_shard=4, batch_size=3), progress=False)
    assert (done["images"], done["made"], done["skipped"], done["finished"]) == (11, 11, 0, True)
    return out


def test_what_is_on_disk(made, folder):
    images, found = open_images(folder), contents(made)
    assert sorted(p.name for p in made.glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"] and len(found) == 11
    assert verify_bags(made)["ok"] and all(len(p) == 4 for p in found.values())
    reals = sorted(p[0] for p in found.values())
    assert reals == sorted(np.asarray(images.load(i)).tobytes() for i in range(11))   # the original files, untouched
    manifest = json.loads((made / "make.json").read_text())
    assert manifest["generator"] == Painter.about and (manifest["images"], manifest["num_views"], manifest["seed"]) == (11, 3, 0)
    bags = open_bags(made)
    files = bags.files(0)
    about = json.loads(files["json"])
    assert about["generator"] == Painter.about and list(about["views"].values()) == view_seeds(0, about["image"], 3) and set(about["views"]) | {"real.jpg", "json"} == set(files)
    assert BagViews(bags, 4, 16).draw(3).shape == (4, 3, 16, 16)


@pytest.mark.parametrize("config", [MakeConfig(3, batch_size=1), MakeConfig(3, batch_size=100, per_shard=2), MakeConfig(3, format="folders", per_shard=3)])
def test_neither_batch_nor_format_change_a_view(made, folder, tmp_path, config):
    make_views(open_images(folder), Painter(), tmp_path / "bags", config, progress=False)
    assert contents(tmp_path / "bags") == contents(made)


def test_another_set_of_images_gives_the_same_views(made, folder, tmp_path):
    make_views(open_images(folder, limit=4), Painter(), tmp_path / "bags", MakeConfig(3), progress=False)
    few, all_of_them = contents(tmp_path / "bags"), contents(made)
    assert len(few) == 4 and all(pictures in all_of_them.values() for pictures in few.values())


@pytest.mark.parametrize("format", ["shards", "folders"])
def test_interrupted_work_goes_on(made, folder, tmp_path, format):
    class Tired(Painter):
        def __call__(self, pictures, num_views, seeds):
            if len(self.calls) >= 5:
                raise KeyboardInterrupt
            return super().__call__(pictures, num_views, seeds)
    config, first, second = MakeConfig(3, per_shard=4, batch_size=1, format=format), Tired(), Painter()
    with pytest.raises(KeyboardInterrupt):
        make_views(open_images(folder), first, tmp_path / "bags", config, progress=False)
    done = make_views(open_images(folder), second, tmp_path / "bags", config, progress=False)
    assert len(first.calls) == 5 and not set(first.calls) & set(second.calls) and done["made"] == len(second.calls) == 6
    assert contents(tmp_path / "bags") == contents(made)
    third = Painter()
    assert make_views(open_images(folder), third, tmp_path / "bags", config, progress=False)["made"] == 0 and not third.calls


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_making import MakeConfig, Painter, make_views, open_images
make_views(open_images(sys.argv[2]), Painter(pause=.05), sys.argv[3], MakeConfig(3, per_shard=2, batch_size=1), rank=int(sys.argv[4]), progress=False)
"""


def start(folder: Path, out: Path, rank: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(folder), str(out), str(rank)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_work_goes_on(made, folder, tmp_path):
    out, kills = tmp_path / "bags", 0
    for _ in range(3):
        worker = start(folder, out, 0)
        before = sum(f.stat().st_size for f in out.glob("*.tar*")) if out.exists() else 0
        while worker.poll() is None and (not out.exists() or sum(f.stat().st_size for f in out.glob("*.tar*")) < before + 5000):
            time.sleep(.01)
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            kills += 1
        worker.wait()
    assert kills
    make_views(open_images(folder), Painter(), out, MakeConfig(3, per_shard=2, batch_size=1), progress=False)
    assert contents(out) == contents(made) and verify_bags(out)["ok"] and not list(out.glob("*.part"))


def test_two_processes_share_the_work(made, folder, tmp_path):
    workers = [start(folder, tmp_path / "bags", rank) for rank in range(2)]
    assert [w.wait(120) for w in workers] == [0, 0]
    assert contents(tmp_path / "bags") == contents(made) and verify_bags(tmp_path / "bags")["ok"]


def test_what_cannot_be_read_or_painted_is_left_out(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/broken.jpg").write_bytes(b"no image")
    done = make_views(open_images(tmp_path / "images"), Painter(broken=("same.png",)), tmp_path / "bags", MakeConfig(2), progress=False)
    assert (done["images"], done["made"], done["skipped"]) == (12, 10, 2) and len(contents(tmp_path / "bags")) == 10
    assert {line.partition(":")[0].rpartition("/")[2] for line in (tmp_path / "bags/skipped.txt").read_text().splitlines()} == {"broken.jpg", "same.png"}


def test_real_images_may_be_shrunk(folder, tmp_path):
    make_views(open_images(folder), Painter(), tmp_path / "bags", MakeConfig(1, real_size=10, quality=100), progress=False)
    bags = open_bags(tmp_path / "bags")
    assert bags.frames(0, [0])[0].size == (12, 10) and {os.path.splitext(n)[1] for n in bags.files(0) if n.startswith("gen")} == {".png"}


def test_left_out_images_are_noted_once_and_nothing_at_all_is_an_error(folder, tmp_path):
    names, config = [open_images(folder).key(i) for i in range(11)], MakeConfig(1, format="folders")
    for _ in range(2):
        done = make_views(open_images(folder), Painter(broken=(names[3],)), tmp_path / "bags", config, progress=False)
        assert done["skipped"] == 1 and len((tmp_path / "bags/skipped.txt").read_text().splitlines()) == 1
    with pytest.raises(UserError, match="not one of 11 images gave views"):
        make_views(open_images(folder), Painter(broken=tuple(names)), tmp_path / "none", MakeConfig(1), progress=False)


def test_beginnings_that_were_killed_or_raced(made, folder, tmp_path, monkeypatch):
    from mae_repro.views import making
    (tmp_path / "bags").mkdir()
    (tmp_path / "bags/make.json.tmp-123").write_text("{")   # killed while it was written
    assert make_views(open_images(folder), Painter(), tmp_path / "bags", MakeConfig(3, per_shard=4), progress=False)["made"] == 11
    out, real = tmp_path / "race", making.os.scandir

    def late(path):   # another process writes the settings between the look for them and the look around
        if Path(path) == out and not (out / "make.json").exists():
            (out / "make.json").write_bytes((made / "make.json").read_bytes())
        return real(path)
    out.mkdir()
    monkeypatch.setattr(making.os, "scandir", late)
    assert make_views(open_images(folder), Painter(), out, MakeConfig(3, per_shard=4), progress=False)["made"] == 11


def test_the_record_names_what_differs(folder, tmp_path):
    class Model(Painter):
        def __init__(self, **about):
            super().__init__()
            self.about = dict(generator="sldm", model="run", weights="abc", steps=50) | about
    images = open_images(folder, limit=2)
    make_views(images, Model(), tmp_path / "bags", MakeConfig(1), progress=False)
    assert make_views(images, Model(model="./run"), tmp_path / "bags", MakeConfig(1), progress=False)["made"] == 0   # the same weights
    for change, said in ((dict(steps=9), "steps 50 there, 9 now"), (dict(weights="xyz"), 'weights "abc" there, "xyz" now')):
        with pytest.raises(UserError, match=said):
            make_views(images, Model(**change), tmp_path / "bags", MakeConfig(1), progress=False)
    assert set(json.loads((tmp_path / "bags/make.json").read_text())["versions"]) == {"mae_repro", "torch", "diffusers"}


@pytest.mark.parametrize("change, said", [(dict(num_views=2), "num-views 3 there, 2 now"), (dict(seed=1), "seed 0 there, 1 now"), (dict(per_shard=5), "per-shard")])
def test_other_settings_need_another_folder(made, folder, change, said):
    config = MakeConfig(**{"num_views": 3, "per_shard": 4, **change})
    with pytest.raises(UserError, match=said):
        make_views(open_images(folder), Painter(), made, config, progress=False)


def test_bad_input(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    images = open_images(folder)
    with pytest.raises(UserError, match="not empty"):
        make_views(images, Painter(), tmp_path / "full", progress=False)
    with pytest.raises(UserError, match="lies within the images"):
        make_views(images, Painter(), folder / "bags", progress=False)
    assert not (folder / "bags").exists()
    with pytest.raises(UserError, match="images 11 there, 2 now"):
        make_views(images, Painter(), tmp_path / "ok", MakeConfig(1), progress=False)
        make_views(open_images(folder, limit=2), Painter(), tmp_path / "ok", MakeConfig(1), progress=False)
    for wrong in (dict(num_views=0), dict(batch_size=0), dict(quality=0), dict(quality=101), dict(seed=-1), dict(real_size=0), dict(per_shard=0)):
        with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
            make_views(images, Painter(), tmp_path / "y", MakeConfig(**wrong), progress=False)
    assert not (tmp_path / "y").exists()


# --- the command ----------------------------------------------------------------------------------------------------------------------

def test_command_line(folder, tmp_path, capsys):
    out = tmp_path / "bags"
    make = ["views", "make", "--generator", "crops", "--images", str(folder), "--img-size", "16", "--num-views", "2", "--device", "cpu"]
    assert run([*make, "--out", str(out), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["made"] == 11 and "mae-repro pretrain cdgmae-tiny --data.root" in said.err
    assert run(["views", "verify", str(out)]) == 0 and "nothing is wrong" in capsys.readouterr().out
    assert run(["views", "convert", str(out), "--to", "folders", "--out", str(tmp_path / "folders")]) == 0 and contents(tmp_path / "folders") == contents(out)
    assert run([*make, "--out", str(tmp_path / "together"), "--processes", "2", "--per-shard", "3"]) == 0 and contents(tmp_path / "together") == contents(out)
    tar = next(out.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:3000])
    assert run(["views", "verify", str(out)]) == 1
    capsys.readouterr()
    for args, said in ((["--generator", "nowhere/at/all"], "nowhere/at/all: neither a folder, nor one of crops"), (["--generator", "folder:nowhere"], "no such folder"), (["--generator", "crops", "--steps", "0"], "--steps 0"),
                       (["--generator", "video"], "needs videos"), (["--generator", "crops", "--images", "nowhere/at/all"], "nowhere/at/all"), (["--generator", str(folder)], "holds no diffusion pipeline"),
                       (["--generator", "crops", "--processes", "-1"], "--processes"), (["--generator", "crops", "--processes", "0"], "--processes"), (["--generator", "crops", "--guidance", "nan"], "--guidance nan"),
                       (["--generator", "sldm-tiny", "--steps", "1001"], "--steps 1001"), (["--generator", f"folder:{folder}", "--images", str(folder)], "the images themselves"),
                       (["--generator", str(data_dir() / "pretrained/mae-tiny")], "a run of something else"), (["--generator", "crops", "--img-size", "0"], "--img-size 0")):
        assert run(["views", "make", *args, "--out", str(tmp_path / "z")]) == 2 and said in (found := capsys.readouterr().err) and "Traceback" not in found
    assert run(["views", "make", "--generator", "video", "--images", str(folder), "--out", str(tmp_path / "v"), "--num-views", "2"]) == 0


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("args, said", [(["--images", "nowhere"], "(--images DIR)"), (["--images", "nowhere", "--generator", "video"], "(--images DIR)"), (["--limit", "0"], "--limit 0 leaves no images"),
                                        (["--split", "dev"], "--split 'dev' is unknown"), (["--generator", "video"], "give --images DIR")])
def test_mistakes_name_the_options_of_this_command(tmp_path, capsys, monkeypatch, processes, args, said):
    monkeypatch.chdir(tmp_path)
    assert run(["views", "make", "--generator", "crops", *args, "--out", "x", "--device", "cpu", "--processes", processes]) == 2
    assert said in (found := capsys.readouterr().err) and "data." not in found and "Traceback" not in found


@pytest.mark.parametrize("device, precision, native, found", [("cpu", "auto", False, torch.float32), ("cuda:0", "auto", True, torch.bfloat16), ("cuda:0", "auto", False, torch.float16),
                                                              ("cuda:0", "bf16", False, torch.bfloat16), ("cuda:0", "fp32", True, torch.float32)])
def test_precision_of_a_painter(tmp_path, monkeypatch, device, precision, native, found):
    "bfloat16 by itself only where the GPU computes in it: PyTorch calls an emulation support, unless asked."
    from mae_repro.cli import MakeArgs, _generator
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setitem(G.DIFFUSERS, "unclip", lambda model, steps, guidance, device, dtype: dtype)
    assert _generator(MakeArgs("unclip:model", tmp_path, MakeConfig(), precision=precision), device)[1] == found


def test_what_to_do_next_can_be_copied_whatever_the_folder_is_called(folder, tmp_path, capsys):
    out = tmp_path / "b ü"
    assert run(["views", "make", "--generator", "crops", "--images", str(folder), "--img-size", "16", "--num-views", "1", "--out", str(out)]) == 0
    score, _, train = capsys.readouterr().out.partition("next: ")[2].partition(", ")
    assert shlex.split(score)[-1] == f"bag:{out}" and shlex.split(train)[-1] == str(out)


def test_scores_and_filter_from_the_command_line(folder, tmp_path, capsys):
    bags, images = tmp_path / "bags", str(folder)
    assert run(["views", "make", "--generator", "crops", "--images", images, "--img-size", "64", "--num-views", "3", "--out", str(bags)]) == 0
    score = ["views", "score", f"identical:{images}", f"bag:{bags}", f"random-pair:{images}", "--pairs", "22", "--backbone", "siammae-tiny"]
    assert run([*score, "--json", str(tmp_path / "s.json"), "--figures", str(tmp_path / "figures")]) == 0
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [r["source"].partition(":")[0] for r in rows] == ["identical", "bag", "random-pair"] and rows[0]["scores"]["nps"] > .999 and len(list((tmp_path / "figures").glob("*.png"))) == 3
    assert run([*score, "--untrained", "1", "--json", str(tmp_path / "u.json")]) == 0
    assert json.loads((tmp_path / "u.json").read_text())[1]["scores"] != rows[1]["scores"]
    keep = ["views", "filter", str(bags), "--backbone", "siammae-tiny", "--best", "2"]
    assert run([*keep, "--json", str(tmp_path / "k.json")]) == 0 and "nothing was written" in capsys.readouterr().out
    kept = json.loads((tmp_path / "k.json").read_text())
    assert kept["report"]["kept"] == 22 and all(len(k) == 3 and k[0] == 0 for k in kept["kept"])
    assert run([*keep, "--out", str(tmp_path / "fewer"), "--figure", str(tmp_path / "f.png")]) == 0 and verify_bags(tmp_path / "fewer")["pictures"] == 33
    few, every = contents(tmp_path / "fewer"), contents(bags)
    assert all(set(pictures) <= set(every[key.replace("fewer", "bags")]) and pictures[0] == every[key][0] for key, pictures in few.items())
    for args, said in ((["score", "bags:x"], "there is no kind 'bags'"), (["score", f"bag:{bags}", "--layer", "99"], "layer 99"), (["score", "random-pair", "--workers", "-1"], "--workers -1"),
                       (["score", "random-pair", "--seed", "-1"], "--seed"), (["filter", str(bags)], "nothing says which"), (["filter", str(bags), "--at-least", "2"], "no view would be kept"),
                       (["filter", str(bags), "--best", "1", "--out", str(bags / "x")], "lies within"), (["filter", str(bags), "--best", "1", "--batch-size", "0"], "--batch-size 0"),
                       (["filter", str(bags), "--best", "1", "--figure", str(tmp_path)], "--figure"), (["filter", str(bags), "--classifier", "resnet_of_nobody"], "no model of timm"), (["convert", str(bags), "--out", str(folder)], "not empty")):
        assert run(["views", *args]) == 2 and said in (found := capsys.readouterr().err) and "Traceback" not in found
