"""Tables: what they declare is understood, what they run is run once, and what they say is what was measured."""
import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_repro import cli, ledger
from mae_repro.parts.weights import UserError
from mae_repro.reproduction import results, runner
from mae_repro.reproduction.catalogue import TABLES, estimate
from mae_repro.reproduction.columns import EVALUATIONS, MODELS
from mae_repro.reproduction.tables import DATA, SCALES, Evaluation, Row, Table, config_of, rows_at, table_steps, training_name, training_words
from mae_repro.training.config import validate
from mae_repro.training.pretrain import TrainingStopped

FOLDERS = {name: Path("/data") / name for name in DATA}


def run(*words, cwd=None):
    return subprocess.run([sys.executable, "-m", "mae_repro.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps_of(key, scale="tiny", given=None, home=Path("home"), **options):
    return list(table_steps(TABLES[key], scale, (0,), given or {}, home, MODELS, EVALUATIONS, **options))

# ---------------------------------------------------------------- what is declared

def all_configs():
    "One (table, scale, row, words) for each different training."
    seen = set()
    for t in TABLES.values():
        for scale in SCALES:
            for row in rows_at(t, scale, MODELS):
                words = training_words(row, scale, MODELS)
                if words and (method := repr(config_of(tuple(words)))) not in seen:
                    seen.add(method)
                    yield pytest.param(words, id=f"{t.key}-{scale}-{row.key}")


@pytest.mark.parametrize("words", list(all_configs()))
def test_every_row_at_every_scale_is_a_config_that_can_be_trained(words):
    config = config_of(tuple(words))
    validate(config)  # builds the model without memory
    assert config.recipe == words[0]


def test_a_misspelt_option_of_a_row_is_found():
    with pytest.raises(UserError, match="prediction-ration"):
        config_of(("crossmae-tiny", "--method.prediction-ration", ".5"))


def test_rows_of_a_table_differ_in_what_they_train():
    for t in TABLES.values():
        for scale in SCALES:
            places = {}
            for row, _, _, step in table_steps(t, scale, (0,), FOLDERS, Path("home"), MODELS, EVALUATIONS):
                for before in step.before:
                    if before.kind == "train" and not row.untrained:
                        places.setdefault(before.place, set()).add(row.key)
            double = [rows for rows in places.values() if len(rows) > 1]
            assert not double, f"{t.key} at {scale}: {double} are one training"


def test_every_printed_number_has_its_column():
    for t in TABLES.values():
        assert len({r.key for r in t.rows}) == len(t.rows)
        for row in t.rows:
            assert set(row.paper) <= set(t.columns), (t.key, row.key)
            assert all(key in EVALUATIONS for key in t.columns)


@pytest.mark.parametrize("scale", SCALES)
def test_the_commands_of_all_columns_are_understood(scale, monkeypatch):
    "Each is parsed by the command line itself; what the command would then do is left out."
    kinds = {"probe": cli.ProbeArgs, "propagate": cli.PropagateArgs, "match": cli.MatchArgs, "pose": cli.PoseArgs, "dense": cli.DenseArgs}
    seen = set()
    for t in TABLES.values():
        for *_, step in table_steps(t, scale, (0,), FOLDERS, Path("home"), MODELS, EVALUATIONS):
            command = [w for w in step.command if not w.startswith("home")] if step.command[0] in ("views", "cost") else list(step.command)
            head = tuple(command[:1] + [w for w in command if w.startswith("--")])
            if head in seen:
                continue
            seen.add(head)
            if command[0] in kinds:
                cli.parse(kinds[command[0]], command[1:], command[0])
            elif command[0] == "cost":
                cli._cost_args([w for w in command[1:]])
            elif command[0] == "views":
                from mae_repro.analysis.view_scores import ScoreConfig
                cli.parse(cli.ScoreArgs[ScoreConfig], command[2:], "views score")
            else:
                from mae_repro.evaluation import finetune as tuning
                name, rest = cli._option(command[2:], "--recipe")
                cli.parse(cli.FinetuneArgs[tuning.FinetuneConfig], rest, "finetune", cli.FinetuneArgs(tuning.RECIPES[name or "vitb16"]()))
    assert len(seen) > 5


def test_built_in_pictures_are_enough_for_every_source(capsys):
    "There are five built-in photographs: a source that needs more neighbours than that is found here."
    commands = {row.key: step.command for row, _, _, step in steps_of("cdgmae-1", trial=True) if "{painted}" not in str(row.names)}
    assert "neighbour" in commands and len(commands) == 5
    for key, command in commands.items():
        assert cli.run([*command, "--img-size", "64"]) == 0, (key, capsys.readouterr().err)

# ---------------------------------------------------------------- steps

def test_tables_share_the_training_of_a_row_that_is_the_same():
    quarter = {step.before[0].place for row, *_, step in steps_of("crossmae-3c") if row.key == "25"}
    default = {step.before[0].place for row, *_, step in steps_of("crossmae-3d") if row.key == "all"}
    assert quarter == default and len(quarter) == 1, "--method.prediction-ratio .25 is the default of crossmae-tiny"
    others = {step.before[0].place for row, *_, step in steps_of("crossmae-3c") if row.key == "75"}
    assert not quarter & others


def test_two_columns_of_one_command_are_one_step():
    found = {column: step for row, _, column, step in steps_of("cdgmae-3") if row.key == "90"}
    assert found["jf"].place == found["j"].place != found["miou"].place


def test_seeds_and_data_have_their_own_folders():
    one, two = (list(table_steps(TABLES["crossmae-3c"], "tiny", (s,), {}, Path("h"), MODELS, EVALUATIONS)) for s in (0, 1))
    assert one[0][3].place != two[0][3].place and "--train.seed 1" in two[0][3].before[0].line()


def test_data_that_is_not_given_is_built_in_made_or_asked_for():
    line = {c: s.line() for r, _, c, s in steps_of("cdgmae-3") if r.key == "90"}["jf"]
    made = {s.line() for *_, step in steps_of("cdgmae-3") for s in step.before if s.kind == "data"}
    assert "--data.root home/data/davis" in line and any("views render --layout davis" in m for m in made)
    assert "--data.root" not in next(s.before[0].line() for *_, s in steps_of("cdgmae-3")), "frames of rendered scenes stand for bags"
    assert "/data/davis" in {c: s.line() for r, _, c, s in steps_of("cdgmae-3", given=FOLDERS)}["jf"]
    with pytest.raises(UserError, match="--data.images is missing: scale small needs images with labels"):
        steps_of("crossmae-3c", "small")
    assert [s.command[2] for r, _, c, s in steps_of("cdgmae-1") if c == "gs"][:2] == ["video", "bag:home/data/painted"]


def test_scenes_may_be_a_file_that_lists_a_mixture(tmp_path):
    "Its lines become the mixture of each training that reads scenes; the training's name stays, as it does for folders."
    listed = tmp_path / "parts of a mixture.txt"
    listed.write_text("# weights of Table 1\nframes:some/scenes:3\n\n  co3d:CO 3D\n")
    mixed, folder = (next(s.before[0] for r, _, c, s in steps_of("mum-4", "paper", FOLDERS | {"scenes": path}) if r.key == "mum") for path in (listed, tmp_path))
    at = mixed.command.index("--data.mixture")
    assert mixed.command[at + 1:at + 3] == ("frames:some/scenes:3", "co3d:CO 3D") and "--data.root" not in mixed.command and mixed.place == folder.place
    assert mixed.command[mixed.command.index("--data.images") + 1] == str(FOLDERS["photos"]) and "--data.root" in folder.command
    for text, why in (("", "lists nothing"), ("# only this\n", "lists nothing"), ("frames\n", "--data.mixture frames: write LAYOUT:DIR"), ("frames:a:-1\n", "positive weight")):
        listed.write_text(text)
        with pytest.raises(UserError, match=why):
            steps_of("mum-4", "paper", FOLDERS | {"scenes": listed})
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        steps_of("mum-4", "paper", FOLDERS | {"scenes": listed})


def test_neighbours_are_scored_as_they_are_trained_on():
    "The pairs whose likeness is printed are those of the row's training, whatever backbone looks at them."
    for scale in ("tiny", "small", "paper"):
        for name in ("cdgmae-1", "cdgmae-13"):
            row = TABLES[name].row("neighbour")
            embed = lambda words, option: shlex.split(words)[shlex.split(words).index(option) + 1]
            assert embed(row.names["source"][scale], "--embed") == embed(row.options[scale], "--views.embed")


def test_a_trial_says_so_in_every_command_and_is_kept_apart():
    for *_, step in steps_of("crossmae-3c", "paper", FOLDERS, trial=True):
        assert "--optim.batch-size 2" in step.before[0].line() and step.before[0].place != steps_of("crossmae-3c", "paper", FOLDERS)[0][3].before[0].place
    assert "--views.per-batch 24" in steps_of("mum-11", trial=True)[0][3].before[0].line()

# ---------------------------------------------------------------- running

TOY = Evaluation("toy", {"tiny": "probe {encoder} --seed {seed}"}, lambda found: found["score"])
SECOND = Evaluation("second", {"tiny": "match {encoder}"}, lambda found: found["score"], "lower")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    "A table of two rows whose commands are written down instead of run; `behave` maps a word to an exit code."
    said, behave = [], {}

    def call(words, log, launcher=(), show=False):
        said.append(list(words))
        code = next((code for word, code in behave.items() if word in words), 0)
        log.write_text("first\nwhat went wrong\n" if code else "")
        if code == 0:
            where = Path(words[words.index("--json") + 1])
            where.write_text(json.dumps({"score": len(said)}))
            if words[0] in ("pretrain", "resume"):
                place = Path(words[words.index("--out") + 1]) if words[0] == "pretrain" else Path(words[1])
                place.mkdir(parents=True, exist_ok=True)
                (place / "summary.json").write_text("{}")
        return code, code == 130
    monkeypatch.setattr(runner, "call", call)
    monkeypatch.setattr(runner, "environment", lambda: {"time": "2026-01-02T03:04:05+00:00", "commit": "c" * 40, "gpu": None, "cores": 2, "versions": {"torch": "2"}})
    monkeypatch.setitem(results.EVALUATIONS, "toy", TOY)
    monkeypatch.setitem(results.EVALUATIONS, "second", SECOND)
    monkeypatch.setitem(results.MODELS, "toy", {"tiny": "mae-tiny"})
    t = Table("toy-1", "Toys", "nowhere", "elsewhere", ("toy", "second"), (Row("a", "A", "toy", "--optim.epochs 2", {"toy": 5.}), Row("b", "B", "toy", "--optim.epochs 3")))
    make = lambda seeds=(0,): [s for *_, s in table_steps(t, "tiny", seeds, {}, tmp_path, MODELS, EVALUATIONS)]
    return t, make, said, behave, tmp_path


def test_finished_steps_are_never_run_again(toy):
    t, make, said, _, home = toy
    assert runner.run_steps(make(), home, progress=False) == []
    assert [w[0] for w in said] == ["pretrain", "probe", "match"] * 2
    runner.run_steps(make((0, 1)), home, progress=False)
    assert [w[0] for w in said[6:]] == ["pretrain", "probe", "match"] * 2, "seed 0 is there, seed 1 is new"
    assert all("1" in (w[w.index("--train.seed") + 1:][:1] or ["1"]) if "--train.seed" in w else True for w in said[6:])


def test_a_failed_step_is_marked_and_the_others_go_on(toy):
    t, make, said, behave, home = toy
    behave["match"] = 2
    failed = runner.run_steps(make(), home, progress=False)
    assert len(failed) == 2 and [w[0] for w in said] == ["pretrain", "probe", "match"] * 2
    found = results.collect(t, "tiny", (0,), {}, home)
    assert "what went wrong" in found["rows"][0]["failed"]["second"]["0"] and found["rows"][0]["values"]["toy"] == {"0": 2.}
    assert "| failed |" in results.to_markdown(found)
    behave.clear()
    assert runner.run_steps(make(), home, progress=False) == []
    assert results.collect(t, "tiny", (0,), {}, home)["rows"][0]["failed"] == {}, "a step that succeeds is no longer marked"


def test_what_waits_for_a_failed_training_is_not_tried(toy):
    t, make, said, behave, home = toy
    behave["pretrain"] = 1
    failed = runner.run_steps(make(), home, progress=False)
    assert [w[0] for w in said] == ["pretrain", "pretrain"] and len(failed) == 6
    assert all("what went wrong" in why["0"] for row in results.collect(t, "tiny", (0,), {}, home)["rows"] for why in row["failed"].values())


def test_a_begun_training_is_resumed_and_one_without_checkpoint_begins_anew(toy):
    t, make, said, behave, home = toy
    first = runner.flat(make())[0]
    first.place.mkdir(parents=True)
    (first.place / "config.json").write_text("{}")
    assert runner.command_of(first)[0] == "pretrain"
    (first.place / "checkpoints" / "00000005").mkdir(parents=True)
    assert runner.command_of(first) == ("resume", str(first.place))
    second = runner.flat(make())[3]
    second.place.mkdir(parents=True)
    (second.place / "config.json").write_text("{}")
    runner.run_steps(make(), home, progress=False)
    assert said[0][:2] == ["resume", str(first.place)] and said[3][0] == "pretrain" and not (second.place / "config.json").exists(), "a folder without a checkpoint would be in the way"


def test_a_training_that_outlived_its_reproduce_is_waited_for(toy, capsys):
    "The process that began it was killed; the training itself goes on, and holds its run."
    t, make, said, behave, home = toy
    first = runner.flat(make())[0]
    first.place.mkdir(parents=True)
    code = ("import pathlib, sys, time; from mae_repro.parts.weights import file_lock\nplace = pathlib.Path(sys.argv[1])\n"
            "with file_lock(place / 'lock'):\n    print(1, flush=True); time.sleep(1.5)\n"
            "    (place / 'environment.json').write_text('[{\"time\": \"2026-01-01T00:00:00\", \"commit\": \"dddd-dirty\", \"gpu\": null, \"cores\": 3, \"versions\": {\"torch\": \"2\"}}]')\n"
            "    (place / 'summary.json').write_text('{\"seconds\": 7}')")
    with subprocess.Popen([sys.executable, "-c", code, first.place], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert runner.run_steps(make(), home, progress=False) == []
    assert [w[0] for w in said] == ["probe", "match", "pretrain", "probe", "match"] and "waiting for the process that works in" in capsys.readouterr().err
    made = results.collect(t, "tiny", (0,), {}, home)["made"]
    assert "3 CPU cores" in made["devices"] and made["seconds"] >= 7, "what the training wrote down itself"
    assert "commit cccccccccccc, dddd-dirty" in results.to_markdown(results.collect(t, "tiny", (0,), {}, home))


def test_a_training_that_had_no_lock_yet_is_waited_for(toy, monkeypatch):
    "It was begun seconds before: ours fails, because the folder is taken; what the other makes counts."
    t, make, said, behave, home = toy
    first, before = runner.flat(make())[0], runner.call
    code = ("import pathlib, sys, time; from mae_repro.parts.weights import file_lock\nplace = pathlib.Path(sys.argv[1])\nplace.mkdir(parents=True)\n"
            "with file_lock(place / 'lock'):\n    print(1, flush=True); time.sleep(1)\n    (place / 'summary.json').write_text('{\"seconds\": 7}')")
    others = []

    def call(words, log, launcher=(), show=False):
        if words[0] == "pretrain" and not others:
            others.append(subprocess.Popen([sys.executable, "-c", code, first.place], stdout=subprocess.PIPE))
            others[0].stdout.readline()
            said.append(words)
            log.write_text("not empty")
            return 2, False
        return before(words, log)
    monkeypatch.setattr(runner, "call", call)
    assert runner.run_steps(make(), home, progress=False) == [] and [w[0] for w in said] == ["pretrain", "probe", "match"] * 2
    assert others[0].wait() == 0 and not list(home.rglob("*.failed.json")) and not list(home.rglob("*.tmp-*")) and json.loads((first.place / "summary.json").read_text()) == {"seconds": 7}


def test_seconds_of_all_sessions_are_added(toy, monkeypatch):
    t, make, said, behave, home = toy
    behave["pretrain"] = 130
    first = runner.flat(make())[0]
    with pytest.raises(TrainingStopped):
        runner.run_steps(make(), home, progress=False)
    about = runner.beside(first, "about.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"seconds": 100.}))
    (first.place / "checkpoints" / "00000005").mkdir(parents=True)
    behave.clear()
    runner.run_steps(make(), home, progress=False)
    assert 100 <= json.loads(about.read_text())["seconds"] < 110 and not list(home.glob("*/*.tmp-*"))


def test_being_stopped_stops_everything(toy):
    t, make, said, behave, home = toy
    behave["probe"] = 130
    with pytest.raises(TrainingStopped):
        runner.run_steps(make(), home, progress=False)
    assert [w[0] for w in said] == ["pretrain", "probe"] and not list(home.glob("evaluated/*.failed.json"))


def test_launchers_start_trainings_only(toy, monkeypatch):
    t, make, said, behave, home = toy
    seen, before = [], runner.call
    monkeypatch.setattr(runner, "call", lambda words, log, launcher=(), show=False: seen.append((words[0], launcher)) or before(words, log))
    runner.run_steps(make(), home, ("torchrun",), progress=False)
    assert seen == [("pretrain", ("torchrun",)), ("probe", ()), ("match", ())] * 2


def test_a_folder_keeps_to_its_data(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    out, a, b = tmp_path / "out", {"images": tmp_path / "a", "davis": None}, {"images": tmp_path / "b"}
    runner.check_data(out, a, ["images"])
    runner.check_data(out, b, ["images"])  # a folder that was a mistake: nothing has been made of it
    (out / "evaluated").mkdir()
    (out / "evaluated/probe.about.json").write_text("{}")
    with pytest.raises(UserError, match="was begun with --data.images .*b, now it is .*a"):
        runner.check_data(out, a, ["images"])
    with pytest.raises(UserError, match=r"now it is \(built-in\)"):
        runner.check_data(out, {}, ["images"])
    runner.check_data(out, {}, ["davis"])  # a table that reads no images
    runner.check_data(out, a, ["images", "davis"], moved=True)
    runner.check_data(out, a, ["images", "davis"])
    with pytest.raises(UserError, match=r"--data.davis \(built-in\), now"):
        runner.check_data(out, {**a, "davis": tmp_path / "b"}, ["images", "davis"])
    (out / "data.json").write_text("{")
    with pytest.raises(UserError, match="data.json: cannot be read"):
        runner.check_data(out, a, ["images"])


def test_the_script_runs_each_line_once(tmp_path):
    path = tmp_path / "jobs.sh"
    path.write_text(runner.job_script([f"echo {n} >> '{tmp_path}/said out'" for n in range(3)], "jobs"))
    assert "#SBATCH --array=0-2" in path.read_text()
    subprocess.run(["bash", path], check=True, env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"})
    assert (tmp_path / "said out").read_text() == "1\n"
    (tmp_path / "said out").unlink()
    subprocess.run(["bash", path], check=True, env={k: v for k, v in os.environ.items() if k != "SLURM_ARRAY_TASK_ID"})
    assert (tmp_path / "said out").read_text() == "0\n1\n2\n"
    path.write_text(runner.job_script(["false", f"echo after >> '{tmp_path}/said out'"], "jobs"))
    assert subprocess.run(["bash", path], capture_output=True, env={k: v for k, v in os.environ.items() if k != "SLURM_ARRAY_TASK_ID"}).returncode == 1
    assert (tmp_path / "said out").read_text().endswith("after\n"), "one that fails does not stop the others"

# ---------------------------------------------------------------- results

def test_intervals_are_students(toy):
    mean, half = results.mean_and_half([1., 2., 4.])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.302653 * 1.527525 / 3 ** .5, rel=1e-5)
    assert results.mean_and_half([3.]) == (3., None)
    assert results.paired_difference({"0": 1., "1": 5.}, {"1": 3., "2": 9.}) == (2., None)
    with pytest.raises(UserError, match="share no seed"):
        results.paired_difference({"0": 1.}, {"1": 1.})


def test_a_table_is_written_in_four_ways(toy):
    t, make, said, _, home = toy
    runner.run_steps(make((0, 1)), home, progress=False)
    found = results.collect(t, "tiny", (0, 1), {}, home)
    path = results.write_results(found, home / "tables")
    text = path.read_text()
    assert "ours (scale tiny): mae-tiny (width 128, 4 blocks, 32 px, patch 4)" in text and "paper: elsewhere" in text and "2 seeds" in text
    assert "| A | 5.0 ± 38.1 | 5 |" in text, text
    lines = list(csv.DictReader(io.StringIO((home / "tables/toy-1.csv").read_text())))
    assert len(lines) == 8 and lines[0] == {"table": "toy-1", "scale": "tiny", "row": "a", "column": "toy", "seed": "0", "ours": "2.0", "paper": "5.0"}
    assert json.loads((home / "tables/toy-1.json").read_text()) == json.loads(json.dumps(found))
    assert (home / "tables/toy-1.png").stat().st_size > 5000
    assert found["made"]["commits"] == ["c" * 40] and found["made"]["devices"] == ["2 CPU cores"] and found["command"] == "mae-repro reproduce toy-1 --scale tiny --seeds 2"


def test_the_command_in_a_result_is_that_of_its_numbers(toy):
    "Not of the last call, which may have asked for less."
    t = toy[0]
    command = lambda rows, options=(): results.command_of_table(t, "tiny", {"images": Path("some pictures"), "davis": Path("d")}, rows, options)
    row = lambda key, **values: {"key": key, "values": values}
    full = [row("a", toy={"0": 1.}, second={"0": 1.}), row("b", toy={"0": 1.}, second={"0": 1.})]
    assert command(full) == "mae-repro reproduce toy-1 --scale tiny"
    assert command([row("a", toy={"0": 1., "3": 1.}), row("b")]) == "mae-repro reproduce toy-1 --scale tiny --only a --columns toy --seeds 4"
    assert command(full, ("--optim.epochs", "3")) == "mae-repro reproduce toy-1 --scale tiny '--options=--optim.epochs 3'"
    used = results.command_of_table(TABLES["crossmae-3c"], "tiny", {"images": Path("some pictures"), "davis": Path("d")}, [])
    assert used == "mae-repro reproduce crossmae-3c --scale tiny --data.images 'some pictures'", "data that the table reads"


def test_the_best_is_bold_only_if_no_interval_reaches_it():
    column = {"key": "x", "better": "lower"}
    rows = lambda *pairs: {"rows": [{"key": i, "mean": {"x": m}, "half": {"x": h}} for i, (m, h) in enumerate(pairs)]}
    assert results._best_row(rows((1., .1), (2., .1)), column) == 0
    assert results._best_row(rows((1., .6), (2., .6)), column) is None
    assert results._best_row(rows((1., None), (2., None)), column) is None
    assert results._best_row(rows((1., .1), (2., .1)), column | {"better": "neither"}) is None


def test_a_damaged_result_is_named(toy):
    t, make, said, _, home = toy
    runner.run_steps(make(), home, progress=False)
    step = make()[0]
    step.done.write_text('{"other": 1}')
    found = results.collect(t, "tiny", (0,), {}, home)
    assert f"{step.done.name}: does not hold" in found["rows"][0]["failed"]["toy"]["0"] and found["rows"][1]["values"]["toy"], "the others are not lost"
    for path in home.glob("*/*.about.json"):
        path.write_text("{")
    assert results.collect(t, "tiny", (0,), {}, home)["made"]["commits"] == []


def test_a_table_of_some_rows_asks_for_their_data_only(toy, monkeypatch):
    t, make, said, _, home = toy
    runner.run_steps(make(), home, progress=False)
    needy = Table(t.key, t.title, t.source, t.setting, t.columns, (*t.rows, Row("c", "C", "toy", "--data.root {nyu}")))
    found = results.collect(needy, "tiny", (0,), {}, home)
    assert [bool(r["values"]) for r in found["rows"]] == [True, True, False]
    assert [r["key"] for r in results.collect(needy, "tiny", (0,), {}, home, only=("b",))["rows"]] == ["b"]


def test_options_of_ones_own_have_trainings_and_files_of_their_own(toy):
    t, make, said, _, home = toy
    places = lambda options: {s.before[0].place for *_, s in table_steps(t, "tiny", (0,), {}, home, MODELS, EVALUATIONS, options=options)}
    assert not places(()) & places(("--optim.batch-size", "16")) and len(places(("--optim.epochs", "9"))) == 1
    with pytest.raises(UserError, match="is not understood"):
        places(("--optim.nope", "16"))
    found = results.collect(t, "tiny", (0,), {}, home, options=("--optim.epochs", "9"))
    assert "9 epochs" in found["differs"] and "with --optim.epochs 9" in found["differs"]
    path = results.write_results(found, home / "tables")
    assert path.name.startswith("toy-1-") and ledger.read_results(home / "tables") == [], "the ledger is about the tables as declared"


def test_estimates_count_trainings_once_and_grow_with_their_length():
    one = estimate(TABLES["crossmae-3c"], "tiny", 5e10)
    assert one.trainings == 3 and one.numbers == 6 and one.hours > 0
    assert estimate(TABLES["crossmae-3c"], "tiny", 1e11).hours < one.hours
    assert estimate(TABLES["crossmae-3c"], "paper", 5e10).hours > 1000 * one.hours
    assert estimate(TABLES["crossmae-10"], "tiny", 5e10).trainings == 0

# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("words, said", [
    (["crossmae-3z"], "there is no table 'crossmae-3z'; did you mean"), (["crossmae-3c", "--only", "99"], "has no row '99'; its rows: 15, 25, 75"),
    (["crossmae-3c", "--scale", "paper"], "--data.images is missing"), (["crossmae-3c", "crossmae-3d", "--only", "25"], "name one"),
    (["crossmae-3c", "--seeds", "0"], "--seeds 0 must be at least 1"), (["crossmae-3c", "--columns", "top"], "is not a column of crossmae-3c at scale tiny; there are finetune, linear"),
    (["mum-13", "--only", "dinov3"], "has no row 'dinov3' at scale tiny"), (["crossmae-3c", "--scale", "huge"], "huge"),
    (["cdgmae-6"], "what this table of CDG-MAE holds is not known here; of that paper there are cdgmae-1,"),
    (["crossmae-3c", "--seed", "-1"], "--seed -1 must not be negative"), (["crossmae-3c", "--seeds", "2", "--seed", "2"], "--seed 2 is none of --seeds 2: 0 to 1"),
    (["--only", "25"], "--only needs a TABLE"), (["crossmae-3c", "--launcher", "no-such-launcher"], "there is no such command"), (["crossmae-3c", "--options=--optim.nope 3"], "is not understood by mae-repro pretrain"),
    (["crossmae-3c", "--dry-run", "--data.images", "nowhere-to-be-found"], "nowhere-to-be-found: is missing"),
    (["crossmae-3c", "--data.images", "nowhere-to-be-found"], "nowhere-to-be-found: is missing"),
    (["crossmae-3c", "--data.photos", "."], "crossmae-3c at scale tiny reads no such data; what is read: --data.images"), (["cdgmae-2", "--data.bags", "."], "what are read: --data.photos, --data.videos, --data.painted"),
    (["crossmae-3c", "--options='unclosed"], "--options 'unclosed: is not understood"), (["crossmae-3c", "--launcher", "'x"], "--launcher 'x: is not understood"),
    (["crossmae-3c", "--options=--data.root ."], "--options --data.root: data is given as --data.NAME"), (["crossmae-3c", "--options=--train.seed=3"], "--options --train.seed=3:"),
    (["crossmae-3c", "--dry-run", "--script", "jobs.sh"], "give one of them")])
def test_bad_usage_is_one_clear_line(words, said, capsys, tmp_path):
    assert cli.run(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_launcher_is_found_beside_python(tmp_path, monkeypatch, capsys):
    "The environment need not be active; what is printed and written into scripts stays as it was typed."
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/torchrun-x").write_text("#!/bin/sh\n")
    (tmp_path / "bin/torchrun-x").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = []
    monkeypatch.setattr(runner, "run_steps", lambda steps, home, launcher, progress: seen.append(launcher) or [])
    words = ["reproduce", "crossmae-3c", "--launcher", "torchrun-x --n 2", "--out", str(tmp_path / "out")]
    assert cli.run(words) == 0 and seen == [(str(tmp_path / "bin/torchrun-x"), "--n", "2")]
    assert cli.run([*words, "--script", str(tmp_path / "jobs.sh")]) == 0
    text = (tmp_path / "jobs.sh").read_text()
    assert "torchrun-x --n 2" in text and "bin/torchrun-x" not in text


def test_a_training_that_could_not_begin_is_refused_before_anything_is_done(tmp_path, capsys):
    for extra in (["--dry-run"], ["--script", str(tmp_path / "jobs.sh")], []):
        assert cli.run(["reproduce", "crossmae-3c", "--options=--optim.epochs -20", "--out", str(tmp_path / "out"), *extra]) == 2
        out, err = capsys.readouterr()
        assert "--optim.epochs -20 must be positive" in err.splitlines()[0] and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())
    elsewhere = ["reproduce", "crossmae-3c", "--only", "25", "--columns", "linear", "--options=--train.precision fp16 --train.device cuda", "--out", str(tmp_path / "out")]
    assert cli.run([*elsewhere, "--dry-run"]) == 0   # the machine that runs it may be another


def test_dry_run_prints_commands_and_leaves_nothing(tmp_path, capsys):
    assert cli.run(["reproduce", "crossmae-3c", "--dry-run", "--seeds", "2", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * 3 and all(line.startswith("mae-repro ") for line in lines) and not (tmp_path / "out").exists()


def test_a_script_has_a_job_for_each_row_and_seed(tmp_path, capsys):
    assert cli.run(["reproduce", "crossmae-3c", "--seeds", "2", "--script", str(tmp_path / "jobs.sh"), "--out", str(tmp_path / "out"), "--columns", "linear"]) == 0
    jobs = [line for line in (tmp_path / "jobs.sh").read_text().splitlines() if " reproduce crossmae-3c " in line]
    assert len(jobs) == 6 and "--only 25 --seed 1" in jobs[4] and all("--columns linear" in job for job in jobs) and shlex.split(shlex.split(jobs[4])[0])[:5] == [sys.executable, "-m", "mae_repro.cli", "reproduce", "crossmae-3c"]


def test_a_script_gives_each_table_the_data_that_it_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir(), (tmp_path / "films").mkdir()
    assert cli.run(["reproduce", "crossmae-9", "cdgmae-2", "--script", str(tmp_path / "jobs.sh"), "--data.images=~/pictures", "--data.davis", str(tmp_path / "films")]) == 0
    jobs = [shlex.split(shlex.split(line)[0]) for line in (tmp_path / "jobs.sh").read_text().splitlines() if " reproduce " in line]
    assert all((str(tmp_path / "pictures") in job) == ("crossmae-9" in job) and (str(tmp_path / "films") in job) == ("cdgmae-2" in job) for job in jobs) and len(jobs) == 2 + 7


def test_a_mixture_has_a_training_of_its_own():
    words = training_words(TABLES["mum-10"].row("mum"), "small", MODELS)
    names = {training_name((*words, *more)) for more in ((), ("--data.mixture", "frames:a:1"), ("--data.mixture", "frames:b:1"), ("--data.root", "{scenes}"))}
    assert len(names) == 4


def test_a_table_from_its_command_to_its_page(tmp_path):
    "A trial in separate processes: pretrain, fine-tune, probe. Twice at the same time: everything is done once."
    words = [sys.executable, "-m", "mae_repro.cli", "reproduce", "crossmae-3c", "--only", "25", "--trial", "--out", str(tmp_path)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert all("3 of 3 commands begin as they should" in out for out, _ in said)
    about = [json.loads(p.read_text()) for p in tmp_path.glob("trial-tiny/*/*.about.json")]
    assert sorted(shlex.split(a["command"])[1] for a in about) == ["finetune", "pretrain", "probe"]
    assert all("waiting for another process" in err for _, err in said) or any("waiting" in err for _, err in said)


def test_a_table_that_is_stopped_goes_on(tmp_path):
    "SIGTERM in the middle of a training: its state is saved, the exit code says so, and the same command resumes it."
    words = [sys.executable, "-m", "mae_repro.cli", "reproduce", "crossmae-3c", "--only", "25", "--columns", "linear", "--out", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 240
    while not (lines := [p for p in tmp_path.glob("tiny/trained/*/environment.json")]) and time.time() < deadline and process.poll() is None:
        time.sleep(.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in err, err
    assert lines and list(tmp_path.glob("tiny/trained/*/checkpoints/*")), err
    found = run(*words[3:])
    assert found.returncode == 0 and "| 25 % predicted |" in found.stdout, found.stderr
    launches = json.loads(next(tmp_path.glob("tiny/trained/*/environment.json")).read_text())
    assert len(launches) == 2 and launches[1]["from_step"] > 0
    again = run(*words[3:])
    assert again.returncode == 0 and "[1/" not in again.stderr and (tmp_path / "tiny/tables/crossmae-3c.json").is_file()

# ---------------------------------------------------------------- the ledger

def test_verdicts_follow_the_interval():
    assert ledger.judge(1., .5) == "holds" and ledger.judge(-1., .5) == "does not hold" and ledger.judge(.3, .5) == "undecided"
    assert ledger.judge(5., None) == "undecided", "one seed decides nothing"
    assert ledger.judge(-.3, .5, margin=1.) == "holds" and ledger.judge(-.8, .5, margin=1.) == "undecided" and ledger.judge(-2., .5, margin=1.) == "does not hold"


def test_a_ledger_of_an_empty_folder_says_so(tmp_path, capsys):
    assert cli.run(["ledger", "--results", str(tmp_path)]) == 2 and "holds no table" in capsys.readouterr().err


def table_of(better="higher", **rows):
    "A result in the shape of `collect`."
    return {"t": {"scale": "tiny", "command": "c", "made": {"devices": ["d"], "to": "2026-01-02T00", "commits": ["e" * 40]}, "columns": [{"key": "x", "title": "X", "better": better, "digits": 1}, {"key": "s", "title": "S", "better": "neither", "digits": 1}],
                  "rows": [{"key": k, "values": v} for k, v in rows.items()]}}


def test_a_claim_is_judged_by_pairs_of_seeds():
    three = lambda *numbers: {"x": {str(i): n for i, n in enumerate(numbers)}}
    found = table_of(a=three(5., 6., 9.), b=three(4., 5., 8.))
    assert ledger.compare("t", "x", "a", "b")(found).verdict == "holds", "rows vary more between seeds than from each other"
    assert ledger.compare("t", "x", "b", "a")(found).verdict == "does not hold"
    assert ledger.compare("t", "x", "b", "a")(table_of("lower", a=three(5., 6., 9.), b=three(4., 5., 8.))).verdict == "holds"
    finding = ledger.compare("t", "x", "a", "b")(found)
    assert finding.ours.endswith("better by 1.0 ± 0.0, 3 seeds") and (finding.date, finding.commit) == ("2026-01-02", "e" * 12)
    assert ledger.compare("t", "x", "a", "nobody")(found).verdict == "not run" and ledger.compare("u", "x", "a", "b")(found).verdict == "not run"


def test_what_foretells_is_a_rank_correlation():
    rows = {k: {"s": {"0": s}, "x": {str(i): x + .01 * i for i in range(3)}} for k, s, x in (("a", .9, 50.), ("b", .8, 45.), ("c", .7, 40.))}
    assert ledger.foretells("t", "s", "x", ("a", "b", "c"))(table_of(**rows)).verdict == "holds"
    assert ledger.foretells("t", "s", "x", ("a", "b", "c"))(table_of(**rows | {"a": {"s": {"0": .1}, "x": rows["a"]["x"]}})).verdict != "holds"
    assert ledger.foretells("t", "s", "x", ("a", "b"))(table_of(**rows)).verdict == "not run", "two points lie on a line anyway"


def test_a_claim_of_no_difference_is_judged_both_ways():
    three = lambda *numbers: {"x": {str(i): n for i, n in enumerate(numbers)}}
    found = table_of(a=three(5., 6., 9.), b=three(4.9, 5.8, 8.9), c=three(2., 3., 6.))
    assert ledger.compare("t", "x", "a", "b", 1., either=True)(found).verdict == "holds"
    assert ledger.compare("t", "x", "a", "c", 1.)(found).verdict == "holds" and ledger.compare("t", "x", "a", "c", 1., either=True)(found).verdict == "does not hold"
    one = table_of(a={"x": {"0": 2.}}, b={"x": {"0": 1.}})
    assert ledger.compare("t", "x", "a", "b")(one).verdict == "undecided" and ledger.compare("t", "x", "a", "b", exact=True)(one).verdict == "holds" and ledger.compare("t", "x", "b", "a", exact=True)(one).verdict == "does not hold"


def test_numbers_above_a_bound_and_in_order():
    three = lambda *numbers: {"x": {str(i): n for i, n in enumerate(numbers)}}
    found = table_of(a=three(1.4, 1.5, 1.45), b=three(1.2, 1.6, 1.1))
    assert ledger.exceeds("t", "x", "a", 1.)(found).verdict == "holds" and ledger.exceeds("t", "x", "a", 2.)(found).verdict == "does not hold" and ledger.exceeds("t", "x", "b", 1.)(found).verdict == "undecided"
    found = table_of(a=three(3., 3., 3.), b=three(2., 2., 3.5), c=three(1., 1., 1.))
    verdict = lambda *rows: ledger.ordered("t", "x", rows)(found).verdict
    assert (verdict("a", "c"), verdict("c", "a"), verdict("a", "b", "c"), verdict("a", "nobody")) == ("holds", "does not hold", "undecided", "not run")
    assert ledger.ordered("t", "x", ("a", "b"))(table_of(a={"x": {"0": 2.}}, b={"x": {"0": 1.}})).verdict == "undecided"


def test_each_claim_is_judged_at_the_largest_scale_at_which_it_was_run(tmp_path):
    write = lambda name, scale, **rows: (tmp_path / name).write_text(json.dumps(table_of(**rows)["t"] | {"table": "t", "scale": scale}))
    one, three = {"x": {"0": 1.}}, lambda *numbers: {"x": {str(i): n for i, n in enumerate(numbers)}}
    write("t-small.json", "small", a=one)
    write("t.json", "tiny", a=three(5., 6., 9.), b=three(4., 5., 8.))
    write("t-again.json", "tiny", a=one)
    found = ledger.read_results(tmp_path)
    assert [tables["t"]["scale"] for tables in found] == ["small", "tiny"]
    claims = (ledger.Claim("k", "a beats b", "s", "", ledger.compare("t", "x", "a", "b"), "mind"), ledger.Claim("l", "a is large", "s", "", ledger.exceeds("t", "x", "a", .5)))
    rows = ledger.ledger(found, claims)
    assert [(r["verdict"], r["scale"], r["caveat"]) for r in rows] == [("holds", "tiny", "mind"), ("undecided", "small", "")]
    assert "better by 1.0 ± 0.0, 3 seeds<br>mind" in ledger.ledger_markdown(rows)


def test_what_is_not_a_table_is_said(tmp_path):
    good = table_of(a={"x": {"0": 1.}})["t"] | {"table": "t"}
    for wrong in ({"no": "table"}, {"table": "t", "scale": "tiny"}, good | {"made": {}}, good | {"rows": [{"key": "a", "values": {"x": {"0": None}}}]}, good | {"columns": [{}]}, [1], good | {"rows": [{"values": {}}]},
                  good | {"columns": []}, good | {"columns": [{k: v for k, v in good["columns"][0].items() if k != "title"}]}):
        (tmp_path / "bad.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="bad.json: is not a table"):
            ledger.read_results(tmp_path)


def test_every_claim_asks_for_rows_and_columns_that_exist():
    asked = []

    class Asked(dict):
        def __contains__(self, key):
            asked.append(key)
            return False
    for claim in ledger.CLAIMS:
        closure = dict(zip(claim.test.__code__.co_freevars, (c.cell_contents for c in claim.test.__closure__ or ())))
        if "table" in closure:
            t = TABLES[closure["table"]]
            rows = [closure[k] for k in ("a", "b", "row") if k in closure] or list(closure["rows"])
            assert closure["column"] in t.columns and all(t.row(r) for r in rows), claim.key
            printed = {number for row in t.rows for number in row.paper.values()}
            assert {float(x) for x in re.findall(r"(?<![\w.])\d+\.\d+|\b\d{5}\b", claim.printed)} <= printed, (claim.key, "what the table says that the paper prints")
    assert len({c.key for c in ledger.CLAIMS}) == len(ledger.CLAIMS)
    assert all(r["verdict"] in ("holds", "does not hold", "undecided", "not run") for r in ledger.ledger())
