"""Every command of a table at scale paper finds its data in the layout in which it comes, begins, and gives a number.

Networks are narrower than published, and data sets are miniatures; pixels, patches, options and layouts are the published ones."""
import contextlib
import json
import math
import traceback
from pathlib import Path

import pytest
import timm

from mae_repro import cli
from mae_repro.reproduction import runner
from mae_repro.reproduction.catalogue import TABLES
from mae_repro.reproduction.columns import EVALUATIONS, MODELS
from mae_repro.reproduction.tables import DATA, data_names, evaluations_of, rows_at, table_steps, training_words
from mae_repro.views.bags import open_bags
from mae_repro.views.layouts import write_layout
from mae_repro.views.posed import RenderedScenes
from mae_repro.views.shards import convert_bags
from miniatures import write_ade20k, write_imagenet, write_kinetics, write_megadepth, write_nyu, write_scannet

pytestmark = pytest.mark.usefixtures("one_thread", "in_this_process", "first_weights")

_DECODER = "--method.decoder-embed-dim 32 --method.decoder-depth 2 --method.decoder-num-heads 2"
NARROW = f"--method.embed-dim 48 --method.depth 4 --method.num-heads 3 {_DECODER}"  # four blocks, which the head of normals reads
SHALLOW = f"--method.depth 1 {_DECODER}"  # the recipe of fine-tuning is that of the published width
AS_PUBLISHED = ""
SOURCES = ["video", "generated", "crops", "neighbour", "random", "same"]

# (table, rows, columns, options of the trainings)
COLUMNS = [
    ("crossmae-3c", ["25"], ["finetune"], SHALLOW),
    ("crossmae-3c", ["25"], ["linear"], NARROW),
    ("crossmae-time", ["scratch"], ["finetune", "linear"], NARROW),
    ("crossmae-10", ["crossmae"], ["speed", "speedup", "minutes", "memory"], NARROW),
    ("crossmae-runtime", ["crossmae-25"], ["minutes-2"], NARROW),
    ("cdgmae-1", SOURCES, ["gs", "ls", "nps"], AS_PUBLISHED),
    ("cdgmae-13", ["generated", "neighbour"], ["gs-dinov2", "ls-dinov2", "nps-dinov2"], AS_PUBLISHED),
    ("cdgmae-5", ["3-25"], ["gmacs"], AS_PUBLISHED),
    ("cdgmae-5", ["3-25"], ["jf", "j", "f"], NARROW),
    ("cdgmae-5", ["3-25"], ["miou"], NARROW),
    ("cdgmae-5", ["3-25"], ["pck1", "pck2"], NARROW),
    ("mum-4", ["mum"], ["epe", "robustness"], NARROW),
    ("mum-4", ["mum"], ["epe-scannet"], NARROW),
    ("mum-13", ["mum", "mae-imagenet", "dinov3"], ["epe-cosine"], NARROW),
    ("mum-13", ["mum"], ["epe-cosine-scannet"], NARROW),
    ("mum-6", ["mum"], ["auc5", "auc10", "auc20"], NARROW),
    ("mum-7", ["mum", "mae-imagenet", "dinov3"], ["depth-rmse", "depth-delta"], NARROW),
    ("mum-8", ["mum", "dinov3"], ["normals", "normals-11"], NARROW),
    ("mum-9", ["mum", "dinov3"], ["attentive"], NARROW),
    ("mum-9", ["mum", "dinov3"], ["segmentation", "segmentation-knn"], NARROW),
]


def write_shards(root, num_frames, seed):
    "Bags as `mae-repro views make` writes them by default."
    write_layout("bag", root.with_name(f"{root.name}-folders"), 4, num_frames, 64, seed)
    convert_bags(open_bags(root.with_name(f"{root.name}-folders")), root, "shards")


BUILDERS = {
    "images": write_imagenet, "photos": write_imagenet, "videos": write_kinetics, "nyu": lambda root: write_nyu(root, 4, 2), "ade20k": write_ade20k,
    "bags": lambda root: write_layout("bag", root, 4, 5, 64, seed=1), "bags8": lambda root: write_shards(root, 9, seed=2),
    "scenes": lambda root: write_layout("scene", root, 2, 24, 64, seed=3), "posed": lambda root: write_layout("scene", root, 4, 3, 64, seed=4, still=True),
    "davis": lambda root: write_layout("davis", root, 1, 3, (60, 104), seed=5), "vip": lambda root: write_layout("vip", root, 1, 3, (60, 104), seed=6),
    "jhmdb": lambda root: write_layout("jhmdb", root, 1, 3, (60, 80), seed=7),
    "megadepth": lambda root: write_megadepth(root, RenderedScenes(4, 5, (48, 64), seed=1)), "scannet": lambda root: write_scannet(root, RenderedScenes(4, 5, (48, 64), seed=1)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Data sets and results of all tests here: a training that two of them need is run once."
    return tmp_path_factory.mktemp("paper")


@pytest.fixture
def in_this_process(monkeypatch):
    "Commands of a table are run here instead of in processes of their own, which would take seconds each to begin."
    def call(words, log, launcher=(), show=False):
        narrow = ["--feature-dim", "16"] if "normals" in words else []  # the published head, 256 wide, takes a minute
        with open(log, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = cli.run([*words, *narrow])
            except Exception:
                traceback.print_exc()
                code = 1
        return code, False
    monkeypatch.setattr(runner, "call", call)


@pytest.fixture
def first_weights(monkeypatch):
    "Backbones of the hub as timm builds them, but narrow and with their first weights: nothing is downloaded."
    create = timm.create_model

    def narrow(name, pretrained=False, **options):
        return create(name, pretrained=False, embed_dim=48, depth=4, num_heads=3, **options)
    monkeypatch.setattr(timm, "create_model", narrow)
    monkeypatch.setattr("mae_repro.methods.catalogue.impatient_hub", contextlib.nullcontext)


def steps_of(folder, table, rows, columns=(), options=""):
    "(row, column, step) of some numbers of a table; the data they read is made below `folder`, if it is not there yet."
    given = {name: folder / "data" / name for name in DATA}
    found = [(row, column, step) for row, _, column, step in table_steps(TABLES[table], "paper", (0,), given, folder / "out/trial-paper", MODELS, EVALUATIONS, tuple(rows), True, tuple(columns), tuple(options.split()))]
    for name in data_of(found):
        if name == "megadepth":
            pytest.importorskip("h5py"), pytest.importorskip("pycolmap")
        if not given[name].is_dir():
            BUILDERS[name](given[name])
    return found


def data_of(found):
    "Names of the data that these steps read, and those before them."
    return sorted({name for *_, step in found for one in runner.flat([step]) for name in one.data})


def said(steps):
    "The commands that failed, and what they said."
    return "\n".join(f"{step.line()}\n{runner.beside(step, 'log').read_text()}" for step in runner.flat(steps) if runner.failure(step))


def reproduce(folder, table, rows, columns, options, out):
    "The exit code of the command that tries these numbers."
    data = [word for name in data_of(steps_of(folder, table, rows, columns, options)) for word in (f"--data.{name}", str(folder / "data" / name))]
    return cli.run(["reproduce", table, "--scale", "paper", "--trial", "--only", *rows, "--columns", *columns, f"--options={options}", *data, "--out", str(out)])


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("table, rows, columns, options", [pytest.param(*case, id=f"{case[0]}-{case[2][0]}") for case in COLUMNS])
def test_a_column_gives_numbers(table, rows, columns, options, folder):
    found = steps_of(folder, table, rows, columns, options)
    assert reproduce(folder, table, rows, columns, options, folder / "out") == 0, said(step for *_, step in found)
    assert len(found) == len(rows) * len(columns)
    for row, column, step in found:
        number = EVALUATIONS[column].read(json.loads(step.done.read_text()))
        assert math.isfinite(number), f"{row.key}, {column}: {number}"


def test_no_column_and_no_data_set_is_left_out():
    assert {column for _, _, columns, _ in COLUMNS for column in columns} == {key for key, evaluation in EVALUATIONS.items() if "paper" in evaluation.commands}
    tested = {table.row(key).encoder["paper"] for table, keys in ((TABLES[t], rows) for t, rows, _, _ in COLUMNS) for key in keys if table.row(key).encoder}
    assert tested == {row.encoder["paper"] for table in TABLES.values() for row in table.rows if row.encoder}, "encoders that somebody else has trained"
    assert set(BUILDERS) == {name for table in TABLES.values() for name in data_names(table, "paper", MODELS, EVALUATIONS)}


def test_a_backbone_that_cannot_be_downloaded_is_one_line(folder, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **options):
        raise OSError("we couldn't connect to the hub\nand a long story")
    monkeypatch.setattr(timm, "create_model", unreachable)
    assert reproduce(folder, "cdgmae-1", ["same"], ["gs"], AS_PUBLISHED, tmp_path) == 1
    assert "vit_base_patch16_224.mae: timm could not load these weights (OSError: we couldn't connect to the hub)" in capsys.readouterr().err
    failed = [json.loads(path.read_text()) for path in tmp_path.rglob("*.failed.json")]
    assert [f["code"] for f in failed] == [2] and len(Path(failed[0]["log"]).read_text().splitlines()) == 1


# ---------------------------------------------------------------- trainings

def trainings():
    "(table, row) of each training that is of another model than those before it, or reads other data or reads it otherwise."
    seen = set()
    for table in TABLES.values():
        for row in rows_at(table, "paper", MODELS):
            words = training_words(row, "paper", MODELS)
            if words and any(EVALUATIONS[key].trains for key in evaluations_of(table, "paper", EVALUATIONS)):
                kind = (row.model, *(word for word in words if word.startswith("{")), *(after for word, after in zip(words, words[1:]) if word.startswith("--views.")))
                if kind not in seen:
                    seen.add(kind)
                    yield table.key, row.key


def training_of(found):
    "The first training of some numbers of a table."
    return next(step for *_, last in found for step in runner.flat([last]) if step.kind == "train")


@pytest.mark.parametrize("table, row", [pytest.param(*pair, id="-".join(pair)) for pair in trainings()])
def test_a_training_begins(table, row, folder):
    step = training_of(steps_of(folder, table, [row], options=NARROW))
    assert runner.run_step(step, folder / "out/trial-paper"), said([step])
    assert math.isfinite(json.loads((step.place / "summary.json").read_text())["loss"])


def test_pictures_of_bags_are_found_in_shards_too(tmp_path):
    "One folder of bags is given for all rows, and shards are what `mae-repro views make` writes."
    write_shards(tmp_path / "data/bags", 5, seed=1)
    step = training_of(steps_of(tmp_path, "cdgmae-10", ["both"], options=NARROW))
    assert runner.run_step(step, tmp_path / "out"), said([step])


def test_a_trial_embeds_few_pictures(folder):
    "To find nearest neighbours every picture is embedded, and ImageNet has a million."
    lines = [step.line() for *_, last in steps_of(folder, "cdgmae-4", ["neighbour"]) for step in runner.flat([last]) if "neighbour" in step.line()]
    assert len(lines) > 1 and all("limit" in line for line in lines), lines
