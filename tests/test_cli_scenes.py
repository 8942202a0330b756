"Commands about scenes: matching, pose, pixels, attention, on folders and on what is rendered; good and bad input."
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_repro.cli import run
from mae_repro.views.layouts import write_layout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_layout("scene", root, 6, 4, 48, still=True, supersample=1)
    return root


@pytest.fixture
def said(capsys):
    "Run a command: exit code, standard output, standard error."
    def call(*args):
        code = run(list(map(str, args)))
        out = capsys.readouterr()
        return code, out.out, out.err
    return call


def test_match_with_probe_and_controls(scenes, tmp_path, said):
    code, out, err = said("match", "mum-tiny", "--data.root", scenes, "--data.pairs", 12, 6, 6, "--data.covisibility", .1, 1, "--img-size", 48, 48, "--steps", 20, "--lrs", 1e-3, 5e-3, "--weight-decays", .01,
                          "--controls", "--layer", "1,-1", "--figure", tmp_path / "f.png", "--json", tmp_path / "m.json")
    assert code == 0, err
    found = json.loads((tmp_path / "m.json").read_text())
    rows = found["rows"]
    assert [(r["encoder"], r["matcher"], r["layer"]) for r in rows if r["encoder"] == "mum-tiny"] == [("mum-tiny", m, k) for k in (1, 5) for m in ("cosine", "linear")]
    assert {r["encoder"] for r in rows} == {"mum-tiny", "untrained", "raw pixels", "none"} and all(0 < r["epe"] < 68 and r["pck"]["1"] <= r["pck"]["16"] for r in rows)
    assert "6 test pairs" in out and "12 training pairs" in out and Image.open(tmp_path / "f.png").width > 300


def test_match_without_probe_on_stereo(tmp_path, said):
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (8, 14, 3), dtype=np.uint8)).resize((112, 64), Image.BICUBIC)
    wide.crop((0, 0, 96, 64)).save(tmp_path / "left.png")
    wide.crop((8, 0, 104, 64)).save(tmp_path / "right.png")   # what is at x on the left is at x - 8 here
    np.savez(tmp_path / "disparity.npz", np.full((64, 96), 8., np.float32))
    code, out, err = said("match", "mae-tiny", "--layout", "stereo", "--data.root", tmp_path, "--no-probe", "--img-size", 64, 96, "--layer", "0", "--json", "-")
    assert code == 0, err
    row, = json.loads(out)["rows"]
    assert row["matcher"] == "cosine" and row["epe"] < 5, "a shift by one patch is found"
    np.savez(tmp_path / "disparity.npz", np.full((64, 96), np.inf, np.float32))
    code, out, err = said("match", "mae-tiny", "--layout", "stereo", "--data.root", tmp_path, "--no-probe", "--img-size", 64, 96)
    assert code == 2 and "no pixel" in err and "Traceback" not in err


def test_match_mistakes(scenes, tmp_path, said):
    for args, says in ((("--data.root", tmp_path / "none"), "no such folder"), (("--data.root", scenes, "--layer", "9"), "layer"), (("--data.root", scenes, "--layer", "x"), "--layer"),
                       (("--data.root", scenes, "--img-size", 50, 50), "50"), (("--data.root", scenes, "--steps", 0), "steps"), (("--data.root", scenes, "--no-probe", "--probe-data", "rendered"), "--probe-data"),
                       (("--layout", "stereo"), "root")):
        code, out, err = said("match", "mae-tiny", *args)
        assert code == 2 and says in err and "Traceback" not in err and len(err.strip().splitlines()) <= 2, (args, err)


def test_pose(scenes, tmp_path, said):
    code, out, err = said("pose", "mum-tiny", "--data.root", scenes, "--img-size", 48, "--steps", 6, "--batch-size", 4, "--json", tmp_path / "p.json", "--figure", tmp_path / "p.png")
    assert code == 0, err
    rows = json.loads((tmp_path / "p.json").read_text())
    assert len(rows) >= 3 and (tmp_path / "p.png").is_file() and "6 scenes" in out
    code, out, err = said("pose", "mum-tiny", "--data.limit", 2)
    assert code == 2 and "at least 3 scenes" in err


@pytest.mark.parametrize("task", ["depth", "normals", "segmentation-knn"])
def test_dense(scenes, tmp_path, said, task):
    code, out, err = said("dense", "mum-tiny", "--task", task, "--data.root", scenes, "--frames", 2, "--img-size", 48, "--steps", 4, "--bins", 16, "--feature-dim", 16, "--lrs", .003,
                          "--figure", tmp_path / "d.png", "--json", tmp_path / "d.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "d.json").read_text())
    assert len(rows) == 4 and (tmp_path / "d.png").is_file() and "training" in out
    for args, says in ((("--img-size", 1, 2, 3), "--img-size"), (("--layout", "ade20k"), "ade20k"), (("--layer", 40), "layer")):
        code, out, err = said("dense", "mum-tiny", "--task", task, "--data.root", scenes, *args)
        assert code == 2 and says in err.lower() and "Traceback" not in err, err


def test_attentive_probe(tmp_path, said):
    rng = np.random.default_rng(0)
    for c, name in enumerate(("red", "blue")):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 80, (24, 24, 3), dtype=np.uint8)
            pixels[..., 2 * c] += 150
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    code, out, err = said("probe", "mae-tiny", "--data.root", tmp_path, "--kind", "attentive", "--img-size", 24, "--no-controls", "--json", "-")
    assert code == 0, err
    row, = json.loads(out)
    assert row["kind"] == "attentive" and row["accuracy"] > .7
    code, out, err = said("probe", "mae-tiny", "--data.root", tmp_path, "--kind", "attentive", "--pool", "cls")
    assert code == 2 and "--pool" in err


def test_inspect_writes_one_page(tmp_path, said):
    for name, wanted in (("mum-tiny", "Where one patch looks"), ("mae-tiny", "Who talks to whom")):
        code, out, err = said("inspect", name, "--out", tmp_path / f"{name}.html")
        page = (tmp_path / f"{name}.html").read_text()
        assert code == 0 and wanted in page and "Which block draws what" in page and 'src="http' not in page, err
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "one.png")
    code, out, err = said("inspect", "mum-tiny", tmp_path / "one.png", "--out", tmp_path / "x.html")
    assert code == 2 and "4 views" in err and not (tmp_path / "x.html").exists()


def test_inspect_attention(scenes, tmp_path, said):
    code, out, err = said("inspect", "attention", "mum-tiny", "--data.root", scenes, "--img-size", 48, "--figure", tmp_path / "a.png", "--json", tmp_path / "a.json")
    assert code == 0, err
    assert len(json.loads((tmp_path / "a.json").read_text())) >= 2 and (tmp_path / "a.png").is_file()
    code, out, err = said("inspect", "attention", "mae-tiny", "--img-size", 48, "--json", "-")
    assert code == 0 and json.loads(out), err
    for args, says in (((), "RUN"), (("nothing",), "no such file"), (("attention", "mum-tiny", "--img-size", 7), "--img-size"), (("attention", "mum-tiny", "--data.root", tmp_path / "no"), "no such folder")):
        code, out, err = said("inspect", *args)
        assert code == 2 and says in err and "Traceback" not in err, err
