"The command line on good and bad input: what is printed, where, and with which exit code."
import argparse
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mae_repro.cli import COMMANDS, WELCOME, _labelled, _next, run
from mae_repro.methods.catalogue import open_encoder, open_model, save_model
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.parts.weights import UserError, data_dir, load_state

SIZES = dict(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
TINY = [f"--method.{k.replace('_', '-')}={v}" for k, v in SIZES.items()] + ["--optim.batch-size", "8", "--optim.epochs", "2",
        "--optim.warmup-epochs", "0", "--data.workers", "0", "--data.repeats", "1", "--train.device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two classes of ten pictures that a probe can tell apart, red and blue noise."
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c, name in enumerate(("red", "blue")):
        (root / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 80, (20, 24, 3), dtype=np.uint8)
            pixels[..., 2 * c] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(["pretrain", "crossmae-tiny", "--data.root", str(folder), "--out", str(out), *TINY, "--train.figure-every", "1", "--train.probe-every", "1"]) == 0
    return out


def test_without_arguments(capsys):
    assert run([]) == 0
    out = capsys.readouterr().out
    assert out.strip() == WELCOME and sum(line.startswith("  mae-repro") for line in out.splitlines()) == 11


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert f"mae-repro {command}" in capsys.readouterr().out


def test_entry_points():
    env = dict(os.environ, PYTHONWARNINGS="ignore")
    for start in ([sys.executable, "-m", "mae_repro.cli"],):
        done = subprocess.run([*start, "pretrain", "mae-tinny"], capture_output=True, text=True, env=env)
        assert done.returncode == 2 and "mae-tiny" in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("args, says", [
    (["pretran"], "did you mean pretrain"),
    (["pretrain"], "needs the name of a recipe"),
    (["pretrain", "mae-tinny"], "did you mean mae-tiny"),
    (["pretrain", "mae-tiny", "--method.img-size", "225"], "--method.img-size 225 is not a multiple"),
    (["pretrain", "mae-tiny", "--method.img-sise", "32"], "--method.img-sise"),
    (["pretrain", "mae-tiny", "--optim.epochs", "many"], "--optim.epochs"),
    (["pretrain", "crossmae-tiny", "--method.prediction-ratio", "0.8"], "--method.prediction-ratio 0.8"),
    (["pretrain", "mae-tiny", "--data.root", "/nowhere/at/all"], "/nowhere/at/all"),
    (["pretrain", "mae-tiny", "--optim.batch-size", "100000"], "--optim.batch-size 100000 is larger than the data"),
    (["resume", "/nowhere/at/all"], "/nowhere/at/all"),
    (["resume"], "run"),
    (["probe", "/nowhere/at/all", "--data.root", "."], "/nowhere/at/all"),
    (["probe", "vit_bas_patch16_224.mae"], "--data.root"),
    (["probe", "mae-tiny", "--data.root", "digits", "--augment"], "--augment: goes with --kind linear --optimizer lars"),
    (["probe", "mae-tiny", "--data.root", "digits", "--epochs", "3"], "--epochs 3: must be at least 1, and is of --kind linear"),
    (["probe", "mae-tiny", "--data.root", "digits", "--kind", "linear", "--epochs", "0"], "--epochs 0"),
    (["probe", "mae-tiny", "--data.root", "digits", "--seed", "-3"], "--seed -3 must not be negative"),
    (["inspect", "mae-tiny", "."], "is a folder; give the pictures themselves"),
    (["demo", "--epochs", "0"], "mae-repro demo: --epochs 0 must be at least 1"),
    (["parity", "/nowhere/at/all.safetensors"], "no such file"),
    (["export", "/nowhere/at/all", "--to", "timm", "--out", "x"], "/nowhere/at/all"),
    (["export", "x", "--to", "onnx", "--out", "x"], "onnx"),
    (["benchmark"], "recipe"),
    (["benchmark", "mae-tiny", "--rounds", "0"], "--rounds 0"),
    (["recipes", "mae-vitb"], "mae-vitb16"),
])
def test_mistakes_get_one_clear_line_and_code_2(args, says, capsys):
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert says in err.splitlines()[0] or says in err, err
    assert err.startswith("mae-repro") and "Traceback" not in err and not out


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_first_line_says_what_is_wrong_however_narrow_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert run(["views", "render", "--layout", "kitti", "--out", "x"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("mae-repro views render: ") and "'kitti'" in said[0] and said[0].endswith("('davis', 'vip', 'jhmdb', 'bag', 'scene').")
    assert run(["pretrain", "mae-tiny", "--optim.epoch", "3"]) == 2   # what stands below stays in lines
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("Unrecognized options: --optim.epoch, 3") and "    --optim.epochs INT" in said


def test_a_terminal_without_utf8(folder, tmp_path):
    "Messages are the same, and names that cannot be printed do not end a command."
    (tmp_path / "bücher").symlink_to(folder)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONWARNINGS": "ignore"}
    start = lambda *words: subprocess.run([sys.executable, "-m", "mae_repro.cli", *words], capture_output=True, text=True, env=env)
    assert start("resume").stderr == "mae-repro resume: PATH is missing: the run's folder. See mae-repro resume --help\n"
    done = start("probe", "mae-tiny", "--data.root", str(tmp_path / "bücher"), "--no-controls")
    assert done.returncode == 0 and r"b\xfccher" in done.stdout and "Traceback" not in done.stderr


def test_a_hint_can_be_copied_whatever_the_folder_is_called(tmp_path):
    run_dir = tmp_path / "my run's ü"
    for paints in (False, True):
        (run_dir / "pipeline").mkdir(parents=True) if paints else None
        assert str(run_dir) in shlex.split(_next(run_dir))


def test_parity_command(tmp_path, capsys):
    files = sorted((data_dir() / "parity").glob("*.safetensors"))
    assert run(["parity", *map(str, files[:2]), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [v["ok"] for v in json.loads(out)] == [True, True] and "2 of 2" in err
    from safetensors import safe_open
    with safe_open(files[0], "pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    tensors["weights/blocks.1.mlp.fc1.weight"][3, 5] += 1e-2
    save_file(tensors, tmp_path / "damaged.safetensors", meta)
    assert run(["parity", str(files[1]), str(tmp_path / "damaged.safetensors"), "--json", str(tmp_path / "out" / "v.json")]) == 1
    assert [v["ok"] for v in json.loads((tmp_path / "out" / "v.json").read_text())] == [True, False]
    assert "FAILED" in capsys.readouterr().out
    save_file(tensors, tmp_path / "other.safetensors", meta | {"family": "another"})
    assert run(["parity", str(tmp_path / "other.safetensors")]) == 1
    assert "not supported yet" in capsys.readouterr().out


def test_recipes(capsys):
    assert run(["recipes", "--json", "-"]) == 0
    assert {"mae-tiny", "crossmae-vitb16-448"} <= {r["recipe"] for r in json.loads(capsys.readouterr().out)}
    assert run(["recipes", "crossmae-vitb16"]) == 0
    assert "Table 6" in capsys.readouterr().out


def test_pretrain_leaves_a_whole_run(trained):
    found = {p.name for p in trained.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "model.safetensors", "model.json", "figures"} <= found
    assert list((trained / "figures").glob("*.png"))
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert any("probe/knn" in line or "knn" in line for line in lines)


def test_resume_of_a_finished_run(trained, capsys):
    before = (trained / "model.safetensors").read_bytes()
    assert run(["resume", str(trained)]) == 0
    assert (trained / "model.safetensors").read_bytes() == before and "finished" in "".join(capsys.readouterr())


def test_a_run_is_never_overwritten(trained, folder, capsys):
    assert run(["pretrain", "crossmae-tiny", "--data.root", str(folder), "--out", str(trained), *TINY]) == 2
    assert "resume" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probe(trained, folder, kind, capsys):
    assert run(["probe", str(trained), "--data.root", str(folder), "--kind", kind, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 and {"untrained" in r["encoder"] for r in rows} == {True, False} and "raw pixels" in {r["encoder"] for r in rows}
    assert all(r["low"] <= r["accuracy"] <= r["high"] and r["tested"] == 4 for r in rows)
    assert rows[-1]["accuracy"] == 1  # red against blue needs no network


def test_probe_without_labels(trained, tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    assert run(["probe", str(trained), "--data.root", str(tmp_path)]) == 2
    assert "labels" in capsys.readouterr().err


def archive(path, count):
    "An archive of `count` pictures of two classes."
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "jpeg")
    jpeg = np.frombuffer(buffer.getvalue(), np.uint8)
    np.savez(path, jpeg=np.tile(jpeg, count), offsets=np.arange(count + 1) * len(jpeg), labels=np.arange(count) % 2, names=np.array([b"x"] * count), class_names=np.array(["a", "b"]))


def damaged(root, kind):
    "Data whose training part is good, large enough to be divided, and whose test part is there and cannot be read."
    if kind == "npz":
        archive(root / "x_train.npz", 20)
        (root / "x_val.npz").write_bytes(b"damaged")
    elif kind == "cifar":
        (root / "data_batch_1").write_bytes(pickle.dumps({"data": np.zeros((20, 3072), np.uint8), "labels": [i % 2 for i in range(20)]}))
        (root / "test_batch").write_bytes(b"")
    else:
        shutil.copytree(kind, root / "train")
        (root / "val").mkdir()


@pytest.mark.parametrize("kind, says", [("npz", "x_val.npz is not an image archive"), ("cifar", "test_batch is not a file of CIFAR-10"), ("folders", "no images in")])
def test_a_test_part_that_cannot_be_read_is_no_reason_to_divide_the_training_part(folder, tmp_path, capsys, kind, says):
    damaged(tmp_path, folder if kind == "folders" else kind)
    assert run(["probe", "mae-tiny", "--data.root", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert says in err and not out


def test_data_without_a_test_part_is_divided(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    for root in (folder, tmp_path):
        train, test = _labelled(root)
        assert (len(train), len(test)) == (16, 4) and not {*train.names} & {*test.names} and test.labels == [0, 0, 1, 1]
    (tmp_path / "train").rename(tmp_path / "val")   # a test part alone is divided, too
    assert [len(part) for part in _labelled(tmp_path)] == [16, 4]
    shutil.copytree(folder, tmp_path / "train")
    assert [len(part) for part in _labelled(tmp_path, 8, 6)] == [8, 6]
    for limits, says in (((0, None), "--data.limit 0"), ((None, 0), "--data.test-limit 0")):
        for root in (folder, tmp_path):
            with pytest.raises(UserError, match=says):
                _labelled(root, *limits)


@pytest.mark.parametrize("change, says", [({"depth": "4"}, "config, depth: '4' is not of type int"), ({"img_size": ["16", 16]}, "config, img_size: '16' is not"), ({"norm_pix_loss": 1}, "config, norm_pix_loss: 1 is not of type bool"),
                                          ({"mix_blocks": 3}, "config, mix_blocks: 3 is not"), ({"dept": 4}, "config: unknown field 'dept'"), (None, "config must hold fields")])
def test_a_model_json_that_was_changed(tmp_path, capsys, change, says):
    path, out = tmp_path / "run/model.json", tmp_path / "x.pth"
    save_model(tmp_path / "run", MAE(**SIZES).build(), MAE(**SIZES))
    assert run(["export", str(tmp_path / "run"), "--to", "official", "--out", str(out)]) == 0
    about = json.loads(path.read_text())
    about["config"] = None if change is None else about["config"] | change
    path.write_text(json.dumps(about))
    capsys.readouterr()
    assert run(["probe", str(tmp_path / "run"), "--data.root", "digits"]) == 2
    assert (said := capsys.readouterr().err).startswith(f"mae-repro probe: {path}, {says}") and "Traceback" not in said
    torch.save(torch.load(out, weights_only=True) | {"mae_repro": json.dumps(about)}, out)   # what an exported file says about itself is read likewise
    with pytest.raises(UserError) as error:
        open_model(out)
    assert str(error.value).startswith(f"{out}, {says}")


@pytest.mark.parametrize("content, says", [(b"[]", "method None is not one of mae, "), (b'{"method": ["mae"]}', "is not one of mae, "), (b"{", "is damaged"), (b"\xff", "is damaged")])
def test_a_model_json_that_is_none(tmp_path, content, says):
    save_model(tmp_path, MAE(**SIZES).build(), MAE(**SIZES))
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(UserError, match="model.json: ") as error:
        open_model(tmp_path)
    assert says in str(error.value)


def test_export_to_timm(trained, tmp_path, capsys):
    import timm
    out = tmp_path / "encoder.safetensors"
    assert run(["export", str(trained), "--to", "timm", "--out", str(out)]) == 0
    code = capsys.readouterr().out
    scope = {"timm": timm}
    exec(code, scope)  # the three lines that the command prints must work as they are
    images = torch.randn(2, 3, 16, 16)
    ours = open_model(trained)[0].encoder
    torch.testing.assert_close(scope["encoder"].eval().forward_features(images), ours.forward_features(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(open_encoder(out).forward_features(images), ours.forward_features(images), atol=1e-6, rtol=0)
    assert run(["export", str(trained), "--to", "timm", "--out", str(out)]) == 2 and "exists" in capsys.readouterr().err
    with pytest.raises(UserError, match="encoder only"):
        open_model(out)


@pytest.mark.parametrize("config", [MAE(**SIZES), CrossMAE(**SIZES, prediction_ratio=.25), CrossMAE(**SIZES, mix_input=False),
                                    CrossMAE(**SIZES, inter_block=False), CrossMAE(**SIZES, self_attention=True), MAE(**SIZES, inter_block=True),
                                    CrossMAE(**SIZES, mix_blocks=(0,)), MAE(**SIZES | dict(img_size=(16, 16)), masking="block", mask_ratio=.5)])
def test_export_official_round_trip(config, tmp_path):
    torch.manual_seed(0)
    model = config.build().eval()
    save_model(tmp_path / "run", model, config)
    assert run(["export", str(tmp_path / "run"), "--to", "official", "--out", str(tmp_path / "x.pth")]) == 0
    again, found = open_model(tmp_path / "x.pth")
    views, hidden = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 16).argsort(-1) >= 4
    torch.testing.assert_close(again(views, hidden).pred, model(views, hidden).pred, atol=1e-5, rtol=0)
    assert found == config


def test_heads_are_never_guessed(tmp_path):
    torch.save({"model": MAE.published_keys.to_published(MAE(**SIZES).build().state_dict())}, tmp_path / "x.pth")
    for load in (open_model, open_encoder):
        with pytest.raises(UserError, match="number of heads"):
            load(tmp_path / "x.pth")


def test_export_half(trained, tmp_path):
    assert run(["export", str(trained), "--to", "half", "--out", str(tmp_path / "small")]) == 0
    (a, _), (b, _) = open_model(trained), open_model(tmp_path / "small")
    assert load_file(tmp_path / "small/model.safetensors")["encoder.cls_token"].dtype == torch.float16
    views, hidden = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 16).argsort(-1) >= 4
    torch.testing.assert_close(a(views, hidden).pred, b(views, hidden).pred, atol=2e-2, rtol=0)


def test_published_checkpoints(tmp_path, capsys):
    model = MAE(**SIZES | dict(embed_dim=192, num_heads=3, decoder_embed_dim=256, decoder_num_heads=8)).build()
    names = MAE.published_keys.to_published(model.state_dict())
    torch.save({"model": names, "optimizer": {}, "epoch": 799, "args": argparse.Namespace(blr=1.5e-4)}, tmp_path / "full.pth")
    encoder = {k: v for k, v in names.items() if not k.startswith(("decoder", "mask"))}
    torch.save({"model": encoder | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}}, tmp_path / "encoder.pth")
    torch.save({"model": {k: v for k, v in names.items() if k != "decoder_blocks.0.norm1.weight"}}, tmp_path / "lacking.pth")
    torch.save({"model": names | {"surplus": torch.zeros(1)}}, tmp_path / "surplus.pth")
    assert open_model(tmp_path / "full.pth")[1].decoder_embed_dim == 256
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(open_encoder(tmp_path / "encoder.pth").forward_features(images), model.encoder.eval().forward_features(images))
    for name, says in (("encoder.pth", "encoder only"), ("lacking.pth", "decoder.blocks.0.norm_self.weight"), ("surplus.pth", "surplus")):
        with pytest.raises(UserError, match=says):
            open_model(tmp_path / name)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap-was-executed",)


def test_loading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(1)}, "args": Trap()}, "trap.pth")
    with pytest.raises(UserError, match="could run code"):
        load_state("trap.pth")
    assert not (tmp_path / "trap-was-executed").exists()
    torch.load("trap.pth", weights_only=False)
    assert (tmp_path / "trap-was-executed").exists()  # the trap works, so the assertion above means something


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_damaged_files(tmp_path, content):
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_state(path)


def test_timm_names(monkeypatch):
    with pytest.raises(UserError, match="did you mean"):
        open_encoder("vit_bas_patch16_224.mae")
    untrained = open_encoder("vit_tiny_patch16_224", pretrained=False)
    assert untrained.forward_features(torch.randn(1, 3, 224, 224)).shape == (1, 197, 192)
    import timm

    def unreachable(*args, **kwargs):
        raise OSError("we couldn't connect to the hub")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match="could not load these weights"):
        open_encoder("vit_base_patch16_224.mae")


def test_cost_says_what_it_counts(capsys):
    for convention, unit in (("mac-linear", "GMACs"), ("flop-all", "GFLOPs")):
        assert run(["cost", "mae-tiny", "--convention", convention, "--json", "-"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)[0]["unit"] == unit and f"{unit} by part" in err


def test_benchmark(capsys):
    assert run(["benchmark", "mae-tiny", "crossmae-tiny", "--rounds", "2", "--batch-size", "2", "--json", "-", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["recipe"] for r in rows] == ["mae-tiny", "crossmae-tiny"] and rows[0]["speedup"] == 1 and all(r["images_per_s"] > 0 for r in rows)


# ---------------------------------------------------------------- views and propagate

@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "The three labelled layouts, two small scenes each."
    root = tmp_path_factory.mktemp("rendered")
    for layout in ("davis", "vip", "jhmdb"):
        assert run(["views", "render", "--layout", layout, "--out", str(root / layout), "--num", "2", "--frames", "5", "--img-size", "48", "64"]) == 0
    return root


def test_render_says_what_it_wrote(tmp_path, capsys):
    assert run(["views", "render", "--layout", "bag", "--out", str(tmp_path / "b"), "--num", "2", "--frames", "3", "--img-size", "32", "32", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["frames"] == 6 and "2 sequences" in captured.err
    assert len(list((tmp_path / "b").rglob("*.png"))) == 6


@pytest.mark.parametrize("task, score", [("davis", "J&F"), ("vip", "mIoU"), ("jhmdb", "PCK")])
def test_propagate(trained, rendered, tmp_path, capsys, task, score):
    args = ["propagate", str(trained), "--task", task, "--data.root", str(rendered / task), "--img-size", "32", "48", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run([*args, "--json", str(tmp_path / "x.json")]) == 0
    first, numbers = capsys.readouterr(), json.loads((tmp_path / "x.json").read_text())
    assert score in first.out and any(k.startswith(score) for k in numbers["scores"]) and numbers["videos"] == 2
    assert list((tmp_path / "out").rglob("*.csv")) and list((tmp_path / "out").rglob("*.png"))
    assert run([*args, "--json", "-"]) == 0   # nothing is done twice
    assert json.loads(capsys.readouterr().out)["scores"] == numbers["scores"]
    assert run([*args, "--topk", "3"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_propagate_controls(trained, rendered, tmp_path, capsys):
    for name, extra in (("copy-first", []), (str(trained), ["--untrained", "--protocol", "dino", "--img-size", "32"])):
        assert run(["propagate", name, "--task", "davis", "--data.root", str(rendered / "davis"), "--data.limit", "1", "--out", str(tmp_path / f"o{len(extra)}"), *extra]) == 0
    assert "untrained" in capsys.readouterr().out


def test_propagate_keeps_its_results_with_the_run(trained, rendered, capsys):
    assert run(["propagate", str(trained), "--task", "davis", "--data.root", str(rendered / "davis"), "--data.limit", "1", "--img-size", "32", "32"]) == 0
    assert str(trained / "propagate-davis-cropmae") in capsys.readouterr().out and (trained / "propagate-davis-cropmae").is_dir()


def test_show_draws_what_a_recipe_sees(folder, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert run(["views", "show", "cropmae-tiny", "--data.root", str(folder), "--rows", "2", "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 100 and str(out) in capsys.readouterr().out


@pytest.mark.parametrize("args, says", [
    (["views"], "render, show"), (["views", "paint"], "render, show"), (["views", "makee"], "mae-repro views: there is no command 'makee'; did you mean make?"), (["views", "show", "mea"], "mae-repro views show: unknown"),
    (["inspect", "attention", "nowhere"], "mae-repro inspect attention: "), (["views", "render", "--layout", "davis"], "--out"),
    (["views", "render", "--layout", "kitti", "--out", "x"], "kitti"), (["views", "show"], "name of a recipe"), (["views", "show", "mea"], "unknown recipe"),
    (["views", "show", "siammae-tiny", "--data.root", "nowhere"], "nowhere"), (["views", "show", "cropmae-tiny", "--rows", "0"], "--rows"),
    (["propagate", "x"], "--task"), (["propagate", "x", "--task", "davis"], "--data.root"), (["propagate", "x.pth", "--task", "davis", "--data.root", "."], "x.pth"),
    (["propagate", "copy-first", "--task", "davis", "--data.root", "nowhere"], "nowhere"), (["propagate", "copy-first", "--task", "davis", "--data.root", ".", "--topk", "0"], "topk"),
    (["pretrain", "siammae-tiny", "--views.source", "crop"], "this method needs 2"), (["pretrain", "cdgmae-tiny", "--views.source", "neighbour"], "--views.embed")])
def test_mistakes_with_views_and_videos(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(args) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not list(tmp_path.iterdir()) or {p.name for p in tmp_path.iterdir()} <= {"runs"}


def test_an_encoder_without_class_token_says_so(folder, tmp_path, capsys):
    from mae_repro.methods.croco import CroCo
    config = CroCo(**SIZES, mask_ratio=.75)
    save_model(tmp_path, config.build(), config)
    assert run(["probe", str(tmp_path), "--data.root", str(folder), "--pool", "cls"]) == 2
    assert "no class token" in capsys.readouterr().err


def test_propagate_after_a_mistake_and_for_more_pictures(trained, rendered, tmp_path, capsys):
    "A run that finished nothing binds nobody; asking for more to be saved does the work again."
    args = ["propagate", str(trained), "--task", "davis", "--data.root", str(rendered / "davis"), "--data.limit", "1", "--out", str(tmp_path / "o"), "--device", "cpu"]
    assert run([*args, "--img-size", "33", "50"]) == 2
    assert run([*args, "--img-size", "32", "48"]) == 0 and not list((tmp_path / "o").rglob("*.gif"))
    assert run([*args, "--img-size", "32", "48", "--save", "gif", "strip"]) == 0 and list((tmp_path / "o").rglob("*.gif"))
    assert run(["propagate", "copy-first", "--task", "davis", "--data.root", str(rendered / "davis"), "--untrained", "--out", str(tmp_path / "p")]) == 2


def test_probe_of_first_weights(capsys, tmp_path):
    "--untrained takes the encoder's first weights: another accuracy, the one that the controls give."
    found = {}
    for flags in ((), ("--untrained",)):
        assert run(["probe", "mae-tiny", "--kind", "knn", "--data.root", "digits", "--data.limit", "100", "--data.test-limit", "60", "--json", str(tmp_path / "out.json"), *flags]) == 0
        found[flags] = {row["encoder"]: row["accuracy"] for row in json.loads((tmp_path / "out.json").read_text())}
    first, trained = found[("--untrained",)], found[()]
    assert first["encoder"] == first["untrained"] == trained["untrained"] != trained["encoder"]
    assert "first weights" in capsys.readouterr().out
