"""Bags on the disk: what a kill leaves, what a conversion keeps, what verification finds, and an order that reads shards one after the other and loses no sample."""
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from tqdm import tqdm

from mae_repro.parts.weights import UserError
from mae_repro.views import shards as shards_module
from mae_repro.views.bags import BagViews, OpenFiles, open_bags, open_pictures, read_shard
from mae_repro.views.samples import EpochBatches, ShardOrder, Views, loader, shuffle_buffer
from mae_repro.views.shards import bag_files, convert_bags, format_report, keys_of, open_part, safe_key, verify_bags

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_REPRO_CACHE", str(tmp_path / "cache"))


def jpeg(seed, side=24):
    "A picture that takes 2 to 3 kB."
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=92)
    return buffer.getvalue()


JPEGS = [jpeg(seed) for seed in range(12)]


def bag(i, generated=4):
    "The files of bag i, in no particular order."
    files = {"json": json.dumps({"bag": i}).encode(), **{f"gen_{k}.jpg": JPEGS[(i + k) % 12] for k in range(generated, 0, -1)}}
    return {**files, "real.jpg": JPEGS[i % 12]}


def write(out, kind, n, per=4, generated=4):
    for part in range(-(-n // per)):
        with open_part(out, kind, part) as writer:
            for i in range(part * per, min(n, (part + 1) * per)):
                writer.write(f"n{i % 3}/bag{i:03d}", bag(i, generated))
    return out


def tree(root, hidden=False):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and (hidden or not any(x.startswith(".") for x in p.relative_to(root).parts))}


def keys(bags):
    return [bags.key(i) for i in range(len(bags))]


def headers(path):
    "{member: where its header begins}"
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def spoil(path, offset, content=b"\xff" * 512):
    "Overwrite bytes; the file's time changes as with any damage that the clock sees."
    data = bytearray(path.read_bytes())
    data[offset:offset + len(content)] = content
    path.write_bytes(data)


# ---------------------------------------------------------------- keys

@pytest.mark.parametrize("name, key", [
    ("a.jpg", "a"), ("n01/a.JPEG", "n01/a"), ("/abs/../up/./a.png", "abs/up/a"), ("photo.final.jpg", "photo_final"), ("v1.0/x.y", "v1.0/x_y"), (".hidden/.a.b", "_hidden/_a_b"),
    ("../..", "_"), ("", "_"), ("a\\b:c?.jpg", "a_b_c_"), ("gr\u00fc\u00df.webp", "gr\u00fc\u00df"), ("bad\udcff.jpg", "bad_"), ("no_extension", "no_extension"), ("x.tar", "x_tar"),
])
def test_safe_key(name, key):
    assert safe_key(name) == key and safe_key(key) == key


def test_keys_are_all_different_and_do_not_depend_on_the_order():
    names = ["a.jpg", "a.png", "A.jpg", "b.jpg", "c.x.jpg", "c_x.jpg", "d.jpg", "d/e.jpg", "D/E/f.jpg", "../g.jpg", "g.jpg", "h.jpg"]
    found = dict(zip(names, keys_of(names)))
    assert len({key.lower() for key in found.values()}) == len(names)
    assert found["b.jpg"] == "b" and found["h.jpg"] == "h" and found["a.jpg"].startswith("a-") and found["d.jpg"].startswith("d-") and found["d/e.jpg"] != "d/e"
    assert all(safe_key(key) == key for key in found.values())
    shuffled = random.Random(0).sample(names, len(names))
    assert dict(zip(shuffled, keys_of(shuffled))) == found
    assert len(set(keys_of(["x.jpg"] * 3))) == 3 and keys_of([]) == []
    nasty = ["a.jpg", "a.png", f"{keys_of(['a.jpg', 'a.png'])[0]}.jpg"]
    assert len(set(keys_of(nasty))) == 3


# ---------------------------------------------------------------- writing

def test_a_shard_is_what_webdataset_reads(tmp_path):
    path = write(tmp_path, "shards", 4) / "000000.tar"
    samples = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"n{i % 3}/bag{i:03d}" for i in range(4)]
    for i, sample in enumerate(samples):
        assert {name: content for name, content in sample.items() if not name.startswith("__")} == bag(i)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [m.name.partition(".")[2] for m in members[:6]] == ["real.jpg", "gen_1.jpg", "gen_2.jpg", "gen_3.jpg", "gen_4.jpg", "json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert path.stat().st_size % tarfile.RECORDSIZE == 0 and not list(tmp_path.glob("*.part"))


def test_long_and_foreign_names(tmp_path):
    names = ["x" * 90 + "/" + "y" * 180, "\u8eca/\u00fc", "z"]
    with open_part(tmp_path, "shards", 0) as writer:
        for n, name in enumerate(names):
            writer.write(name, bag(n))
    assert keys(open_bags(tmp_path)) == names
    assert [s["__key__"] for s in wds.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False)] == names
    assert verify_bags(tmp_path, workers=0)["ok"]


@pytest.mark.parametrize("kind", ["shards", "folders"])
def test_what_is_written_is_read(tmp_path, kind):
    bags = open_bags(write(tmp_path, kind, 10))
    assert len(bags) == 10 and sorted(keys(bags)) == sorted(f"n{i % 3}/bag{i:03d}" for i in range(10))
    for i in range(10):
        number = int(keys(bags)[i][-3:])
        assert bag_files(bags, i) == bag(number) and list(bag_files(bags, i)) == ["real.jpg", "gen_1.jpg", "gen_2.jpg", "gen_3.jpg", "gen_4.jpg", "json"]
        assert np.array_equal(bags.frames(i, [2])[0], Image.open(io.BytesIO(bag(number)["gen_2.jpg"])))


def test_each_picture_of_shards_is_an_image_too(tmp_path):
    "CropMAE on real and generated images reads what CDG-MAE reads."
    write(tmp_path / "shards/train", "shards", 3, per=2)
    found = open_pictures(tmp_path / "shards", "train")
    assert len(found) == 15 and found.name(7).endswith(", picture 2") and len({found.name(i) for i in range(15)}) == 15 and found.labels is None
    bags = open_bags(tmp_path / "shards/train")
    for i in range(15):
        assert np.array_equal(found.load(i), bags.frames(i // 5, [i % 5])[0]), i
    few = open_pictures(tmp_path / "shards/train", "train", 4)
    assert len(few) == 4 and few.file(1)[0] == ".png" and few.name(1) == found.name(3).replace("train/", "")
    (tmp_path / "cat.png").write_bytes(JPEGS[0])
    assert len(open_pictures(tmp_path, "train")) == 1, "where there are images, archives beside them are left alone: ImageNet's lie there"
    with pytest.raises(UserError, match="leaves no images"):
        open_pictures(tmp_path / "shards", "train", 0)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no images in"):
        open_pictures(tmp_path / "nothing", "train")


def test_the_same_bags_give_the_same_bytes(tmp_path):
    assert tree(write(tmp_path / "a", "shards", 6)) == tree(write(tmp_path / "b", "shards", 6))


def ask(said, out):
    with open_part(out, "shards", 0) as writer:
        os.write(said, str(writer).encode())


def test_finished_and_held_parts(tmp_path):
    with open_part(tmp_path, "shards", 0) as writer:
        writer.write("a", bag(0))
        with open_part(tmp_path, "shards", 0) as second:
            assert second is None
        with open_part(tmp_path, "shards", 1) as other:
            assert other is not None
            other.write("b", bag(1))
        if hasattr(os, "fork"):
            number, said = child(ask, tmp_path)
            with said:
                assert said.read() == "None"
            os.waitpid(number, 0)
        writer.write("c", bag(2))
    with open_part(tmp_path, "shards", 0) as writer:
        assert writer is None
    assert keys(open_bags(tmp_path)) == ["a", "c", "b"]
    with open_part(tmp_path / "f", "folders", 0) as writer:
        with open_part(tmp_path / "f", "folders", 0) as second:
            assert second is None


@pytest.mark.parametrize("kind", ["shards", "folders"])
def test_an_error_loses_one_bag_at_most(tmp_path, kind):
    with pytest.raises(RuntimeError):
        with open_part(tmp_path, kind, 0) as writer:
            writer.write("a", bag(0))
            writer.write("b", bag(1))
            raise RuntimeError
    assert not (tmp_path / "000000.tar").exists()
    with open_part(tmp_path, kind, 0) as writer:
        assert "a" in writer and "b" in writer and "c" not in writer
        writer.write("c", bag(2))
        with pytest.raises(ValueError, match="'a' is in"):
            writer.write("a", bag(0))
    with open_part(tmp_path / "whole", kind, 0) as writer:
        for i, key in enumerate("abc"):
            writer.write(key, bag(i))
    assert tree(tmp_path / "whole") == {name: content for name, content in tree(tmp_path).items() if not name.startswith("whole")}


def test_every_cut_is_resumed_behind_the_last_whole_bag(tmp_path):
    whole = (write(tmp_path / "whole", "shards", 3) / "000000.tar").read_bytes()
    ends = sorted(offset for name, offset in headers(tmp_path / "whole/000000.tar").items() if name.endswith("real.jpg"))[1:] + [len(whole)]
    cuts = [0, 1, 100, 512, 513, *(end + d for end in ends[:2] for d in (-1024, -513, -512, -511, -1, 0, 1, 511, 512, 513, 1024)), len(whole) - 1, len(whole)]
    for n, cut in enumerate(cuts):
        out = tmp_path / f"cut{n}"
        out.mkdir()
        (out / "000000.tar.part").write_bytes(whole[:cut])
        with open_part(out, "shards", 0) as writer:
            have = [i for i in range(3) if f"n{i}/bag{i:03d}" in writer]
            assert len(have) >= sum(end <= cut for end in ends[:2]) and have == list(range(len(have))), cut
            for i in range(len(have), 3):
                writer.write(f"n{i}/bag{i:03d}", bag(i))
        assert (out / "000000.tar").read_bytes() == whole and tree(out) == tree(tmp_path / "whole"), cut


def test_a_bag_without_json_is_whole_when_another_follows(tmp_path):
    files = {"real.jpg": JPEGS[0], "gen_1.jpg": JPEGS[1]}
    with contextlib.suppress(RuntimeError):
        with open_part(tmp_path, "shards", 0) as writer:
            writer.write("a", files)
            writer.write("b", files)
            raise RuntimeError
    with open_part(tmp_path, "shards", 0) as writer:
        assert "a" in writer and "b" not in writer
        writer.write("b", files)
    assert open_bags(tmp_path).sizes.tolist() == [2, 2]


def test_damage_in_an_unfinished_part(tmp_path):
    whole = write(tmp_path / "whole", "shards", 4) / "000000.tar"
    out = tmp_path / "out"
    out.mkdir()
    (out / "000000.tar.part").write_bytes(whole.read_bytes())
    spoil(out / "000000.tar.part", headers(whole)["n1/bag001.gen_2.jpg"])
    with open_part(out, "shards", 0) as writer:
        assert [f"n{i % 3}/bag{i:03d}" in writer for i in range(4)] == [True, False, False, False]
        for i in range(1, 4):
            writer.write(f"n{i % 3}/bag{i:03d}", bag(i))
    assert (out / "000000.tar").read_bytes() == whole.read_bytes()


def test_a_full_disk_leaves_whole_bags(tmp_path):
    class Full:
        "A file that takes 4000 bytes more."

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if len(content) > 4000:
                return self.file.write(content[:4000])
            raise OSError(28, "No space left on device")

    with open_part(tmp_path, "shards", 0) as writer:
        writer.write("a", bag(0))
        writer.file = Full(real := writer.file)
        with pytest.raises(UserError, match="No space left on device") as error:
            writer.write("b", bag(1))
        assert len(str(error.value).splitlines()) == 1 and "000000.tar.part" in str(error.value) and "b" not in writer
        writer.file = real  # somebody made room
        writer.write("b", bag(1))
    assert len(open_bags(tmp_path)) == 2 and verify_bags(tmp_path, workers=0)["ok"]


@pytest.mark.parametrize("kind", ["shards", "folders"])
def test_errors_of_writing(tmp_path, kind):
    with open_part(tmp_path, kind, 0) as writer:
        for key in ("a.b", "../a", "/a", "a//b", ""):
            with pytest.raises(ValueError, match="is no key of a bag"):
                writer.write(key, bag(0))
        for files in ({"gen_1.jpg": b""}, {"json": b""}, {**bag(0), "x/y.jpg": b""}, {}):
            with pytest.raises(ValueError, match="no real picture"):
                writer.write("a", files)
        writer.write("a", bag(0))
    with pytest.raises(ValueError, match="kind 'zip'"):
        open_part(tmp_path, "zip", 0).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        open_part(tmp_path / "file", kind, 0).__enter__()


def child(work, *arguments):
    "Run a function in another process: its number, and where what it writes to a file descriptor can be read."
    read, write = os.pipe()
    if number := os.fork():
        os.close(write)
        return number, os.fdopen(read)
    code = 1
    try:
        os.close(read)
        tqdm.set_lock(threading.RLock())  # its own is one of all processes, and would stay locked if one is killed
        work(write, *arguments)
        code = 0
    finally:
        os._exit(code)


def slow_work(said, out, kind):
    "Three parts of 30 bags; says which bag it is about to write."
    os.write(said, b"begun\n")
    for part in range(3):
        with open_part(out, kind, part) as writer:
            for i in range(part * 30, part * 30 + 30) if writer else ():
                if (key := f"n{i % 3}/bag{i:03d}") not in writer:
                    os.write(said, f"{key}\n".encode())
                    time.sleep(.001)
                    writer.write(key, bag(i))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")
@pytest.mark.parametrize("kind", ["shards", "folders"])
def test_kills_at_random_moments(tmp_path, kind):
    "What was written when the process was killed is not made again, but for the one bag it was at; the result is that of a run that was not killed."
    chance, out, made, kills, code = random.Random(kind), tmp_path / "out", [], 0, None
    while code != 0:
        number, said = child(slow_work, out, kind)
        with said:
            said.readline()
            if kills < 25:
                for _ in range(chance.randrange(6)):  # dies within the next bag, or the end of a part
                    made += [line.strip() for line in [said.readline()] if line]
                time.sleep(chance.uniform(0, .003))
                os.kill(number, signal.SIGKILL)
            made += [line.strip() for line in said]
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 5 and len(set(made)) == 90 and len(made) <= 90 + kills
    number, said = child(slow_work, tmp_path / "want", kind)
    with said:
        assert len(said.readlines()) == 91
    assert os.waitpid(number, 0)[1] == 0
    assert tree(out) == tree(tmp_path / "want") and verify_bags(out, workers=0)["ok"] and len(open_bags(out)) == 90


# ---------------------------------------------------------------- converting

def test_there_and_back(tmp_path):
    folders = write(tmp_path / "a", "folders", 7, generated=3)
    (folders / "n0/bag000/notes.txt").write_text("by hand")
    bags = open_bags(folders)
    done = convert_bags(bags, tmp_path / "b", "shards", per_shard=3, progress=False)
    assert done == dict(out=str(tmp_path / "b"), kind="shards", bags=7, pictures=28, dropped=0, parts=3, elsewhere=0)
    assert keys(open_bags(tmp_path / "b")) == keys(bags) and verify_bags(tmp_path / "b", workers=0)["per_bag"] == {4: 7}
    convert_bags(open_bags(tmp_path / "b"), tmp_path / "c", "folders", progress=False)
    assert tree(tmp_path / "c") == tree(folders) and len(tree(folders)) == 7 * 5 + 1
    convert_bags(open_bags(tmp_path / "c"), tmp_path / "d", "shards", per_shard=3, progress=False)
    assert tree(tmp_path / "d") == tree(tmp_path / "b")


def test_bags_of_others(tmp_path):
    "No JSON, names with dots, no common names for the real picture, shards of sizes of their own with a key twice."
    for name in ("v1.0/a.b", "v1.0/a_b", "c"):
        (tmp_path / "f" / name).mkdir(parents=True)
        for k, picture in enumerate(("0.png", "1.jpg", "10.jpg", "2.jpg")):
            (tmp_path / "f" / name / picture).write_bytes(JPEGS[k])
    bags = open_bags(tmp_path / "f")
    convert_bags(bags, tmp_path / "s", "shards", per_shard=2, progress=False)
    shards = open_bags(tmp_path / "s")
    assert shards.sizes.tolist() == [4, 4, 4] and sorted(key[:8] for key in keys(shards)) == ["c", "v1.0/a_b", "v1.0/a_b"] and len(set(keys(shards))) == 3
    assert [bag_files(shards, i) for i in range(3)] == [bag_files(bags, i) for i in range(3)]
    for n in range(2):
        with tarfile.open(tmp_path / f"t/{n}.tar" if (tmp_path / "t").mkdir(exist_ok=True) is None else "", "w") as tar:
            for name in ("k.jpg", "k.gen_1.jpg"):
                info = tarfile.TarInfo(name)
                info.size = len(JPEGS[n])
                tar.addfile(info, io.BytesIO(JPEGS[n]))
    convert_bags(open_bags(tmp_path / "t"), tmp_path / "u", "folders", progress=False)
    assert {name.split("/")[1] for name in tree(tmp_path / "u")} == {"real.jpg", "gen_1.jpg"} and len(tree(tmp_path / "u")) == 4


@pytest.mark.parametrize("kind", ["shards", "folders"])
def test_keep(tmp_path, kind):
    bags = open_bags(write(tmp_path / "a", "shards", 5))
    done = convert_bags(bags, tmp_path / "b", kind, keep=[[0, 1, 4], [0], [], [3], [0, 1, 2, 3, 4]], progress=False)
    assert done["bags"] == 3 and done["dropped"] == 2 and done["pictures"] == 3 + 2 + 5
    kept = open_bags(tmp_path / "b")
    found = {key: [name for name in bag_files(kept, i)] for i, key in enumerate(keys(kept))}
    assert found == {"n0/bag000": ["real.jpg", "gen_1.jpg", "gen_4.jpg", "json"], "n0/bag003": ["real.jpg", "gen_3.jpg", "json"],
                     "n1/bag004": ["real.jpg", "gen_1.jpg", "gen_2.jpg", "gen_3.jpg", "gen_4.jpg", "json"]}
    for i, key in enumerate(keys(kept)):
        assert all(bag(int(key[-3:]))[name] == content for name, content in bag_files(kept, i).items())


def test_errors_of_converting(tmp_path, monkeypatch):
    bags, out = open_bags(write(tmp_path / "a", "shards", 8)), tmp_path / "b"
    with pytest.raises(UserError, match="per_shard 0"):
        convert_bags(bags, out, "folders", per_shard=0)
    with pytest.raises(UserError, match="none of the 8 bags"):
        convert_bags(bags, out, "folders", keep=[[0]] * 8)
    for keep in ([[0]], [[0, 5]] * 8, [[-1]] * 8):
        with pytest.raises(ValueError, match="keep"):
            convert_bags(bags, out, "folders", keep=keep)
    with pytest.raises(UserError, match="lies within the bags"):
        convert_bags(bags, tmp_path / "a/inside", "folders")
    assert not out.exists() and not (tmp_path / "a/inside").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        convert_bags(bags, tmp_path / "other", "folders")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]
    convert_bags(bags, out, "folders", per_shard=4, progress=False)
    before = tree(out)
    for change in (dict(kind="shards"), dict(per_shard=5), dict(keep=[[0, 1]] * 8), dict(bags=bags.take(np.arange(5)))):
        with pytest.raises(UserError, match="holds a conversion of other bags"):
            convert_bags(**{**dict(bags=bags, out=out, kind="folders", per_shard=4, progress=False), **change})
    assert convert_bags(bags, out, "folders", per_shard=4, progress=False)["bags"] == 8 and tree(out) == before
    (tmp_path / "a/000001.tar").write_bytes((tmp_path / "a/000001.tar").read_bytes()[:9000])
    with pytest.raises(UserError, match="not what it was|shorter") as error:
        convert_bags(bags, tmp_path / "c", "folders", progress=False)
    assert len(str(error.value).splitlines()) == 1


def test_an_interrupted_conversion_makes_nothing_twice(tmp_path, monkeypatch):
    bags = open_bags(write(tmp_path / "a", "folders", 10))
    real, seen = shards_module.bag_files, []

    def breaking(bags, i):
        seen.append(i)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return real(bags, i)

    monkeypatch.setattr(shards_module, "bag_files", breaking)
    with pytest.raises(KeyboardInterrupt):
        convert_bags(bags, tmp_path / "b", "shards", per_shard=4, progress=False)
    assert sorted(p.name for p in (tmp_path / "b").glob("0*")) == ["000000.tar", "000000.tar.json", "000001.tar.part"]
    with contextlib.suppress(RuntimeError):
        with open_part(tmp_path / "b", "shards", 2):
            assert convert_bags(bags, tmp_path / "b", "shards", per_shard=4, progress=False)["elsewhere"] == 1
            raise RuntimeError
    assert convert_bags(bags, tmp_path / "b", "shards", per_shard=4, progress=False)["elsewhere"] == 0
    assert seen == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    monkeypatch.undo()
    convert_bags(bags, tmp_path / "c", "shards", per_shard=4, progress=False)
    assert tree(tmp_path / "b") == tree(tmp_path / "c")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")
def test_a_killed_conversion(tmp_path):
    bags, kills, code = open_bags(write(tmp_path / "a", "folders", 60, per=30)), 0, None
    while code != 0:
        number, said = child(lambda said: convert_bags(bags, tmp_path / "b", "shards", per_shard=25, progress=False))
        if kills < 12:
            time.sleep(random.Random(kills).uniform(0, .02))
            os.kill(number, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        said.close()
        kills += code != 0
    convert_bags(bags, tmp_path / "c", "shards", per_shard=25, progress=False)
    assert tree(tmp_path / "b") == tree(tmp_path / "c")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_several_processes_share_a_conversion(tmp_path):
    bags = open_bags(write(tmp_path / "a", "folders", 60, per=30))

    def work(said):
        done = convert_bags(bags, tmp_path / "b", "shards", per_shard=5, progress=False)
        os.write(said, f"{done['elsewhere']}\n".encode())

    for number, said in [child(work) for _ in range(3)]:
        with said:
            assert 0 <= int(said.read()) <= 2  # of twelve parts, one at most in each other process
        assert os.waitpid(number, 0)[1] == 0
    assert convert_bags(bags, tmp_path / "b", "shards", per_shard=5, progress=False)["elsewhere"] == 0
    convert_bags(bags, tmp_path / "c", "shards", per_shard=5, progress=False)
    assert tree(tmp_path / "b") == tree(tmp_path / "c") and verify_bags(tmp_path / "b", workers=0)["ok"]


# ---------------------------------------------------------------- damage

def spans_of(path):
    "{member: (offset, size) of its content}"
    with tarfile.open(path) as tar:
        return {m.name: (m.offset_data, m.size) for m in tar}


FF, ZEROS = b"\xff" * 512, bytes(512)


@pytest.mark.parametrize("filling", [FF, ZEROS], ids=["bytes", "zeros"])
@pytest.mark.parametrize("first, last, lost", [
    ("n2/bag002.gen_2.jpg", None, {2}), ("n2/bag002.real.jpg", None, {2}), ("n2/bag002.json", None, {2}), ("n0/bag000.real.jpg", None, {0}), ("n0/bag000.json", None, {0}),
    ("n2/bag005.gen_4.jpg", None, {5}), ("n2/bag005.json", None, {5}), ("n2/bag002.gen_3.jpg", "n0/bag003.gen_1.jpg", {2, 3}), ("n2/bag002.real.jpg", "n2/bag002.json", {2}),
    ("n1/bag001.gen_4.jpg", "n1/bag004.gen_4.jpg", {1, 2, 3, 4}),
])
def test_damage_in_the_middle_costs_the_bags_around_it(tmp_path, caplog, first, last, lost, filling):
    path = write(tmp_path / "s", "shards", 6, per=6) / "000000.tar"
    where = headers(path)
    end = sum(spans_of(path)[last]) if last else where[first] + 512
    spoil(path, where[first], filling * (-(-(end - where[first]) // 512)))
    if filling == ZEROS and first == "n2/bag005.json":  # the archive seems to end there: only the sums tell
        assert len(open_bags(tmp_path / "s")) == 6 and verify_bags(tmp_path / "s", workers=0)["problems"]["checksum"]["count"] == 1
        return
    bags = open_bags(tmp_path / "s")
    assert {int(key[-3:]) for key in keys(bags)} == set(range(6)) - lost and bags.sizes.tolist() == [5] * (6 - len(lost))
    assert f"of {6 - len(lost) + max(1, len(read_shard(str(path)).bags) - 6 + len(lost))} bags are cut off, damaged" in caplog.text
    for i, key in enumerate(keys(bags)):
        assert bag_files(bags, i) == bag(int(key[-3:]))
    report = verify_bags(tmp_path / "s", workers=0)
    assert not report["ok"] and report["bags"] == len(bags) and report["problems"]["checksum"]["count"] == 1
    assert "n2/bag005" in first or report["problems"]["damaged"]["count"] == 1
    assert {int(name[-3:]) for name in report["problems"]["cut"]["first"]} <= lost


def test_damage_in_a_shard_of_others(tmp_path):
    "In WebDataset's own order the JSON is in the middle, so that neither neighbour of a damage is known to be whole."
    (tmp_path / "s").mkdir()
    with wds.TarWriter(str(tmp_path / "s/0.tar"), encoder=False, mtime=0) as writer:
        for i in range(6):
            writer.write({"__key__": f"bag{i}", **bag(i)})
    path = tmp_path / "s/0.tar"
    assert len(open_bags(path)) == 6
    spoil(path, headers(path)["bag3.gen_1.jpg"])
    assert keys(open_bags(path)) == ["bag0", "bag1", "bag4", "bag5"]


@pytest.mark.parametrize("back", [512, 1024, 1536])
@pytest.mark.parametrize("rest", ["real.jpg", "gen_2.jpg", "json"])
def test_damage_in_a_long_name(tmp_path, rest, back):
    "A long name is a file of its own before the file: a header, the name, and then the usual header. Each of the three may be hit."
    names = [f"bag{i}" + "y" * 120 for i in range(4)]
    with open_part(tmp_path, "shards", 0) as writer:
        for i, name in enumerate(names):
            writer.write(name, bag(i))
    offset, _ = spans_of(tmp_path / "000000.tar")[f"{names[1]}.{rest}"]
    spoil(tmp_path / "000000.tar", offset - back)
    bags = open_bags(tmp_path)
    if back != 1024 or rest == "real.jpg":
        assert keys(bags) == [names[0], *names[2:]] and bags.sizes.tolist() == [5, 5, 5]
    else:  # the name says something else, and every header is sound: only the sums tell
        assert keys(bags) == names and verify_bags(tmp_path, workers=0)["problems"]["no_real"]["count"] == 1
    assert verify_bags(tmp_path, workers=0)["problems"]["checksum"]["count"] == 1


def test_cut_at_every_block(tmp_path):
    "Whatever is missing at the end: bags that are given are whole, and few are given up."
    path = write(tmp_path / "s", "shards", 3, per=3, generated=2) / "000000.tar"
    whole = path.read_bytes()
    starts = [offset for name, offset in headers(path).items() if name.endswith("real.jpg")]
    for cut in range(512, len(whole), 512):
        path.write_bytes(whole[:cut])
        try:
            bags = open_bags(path)
        except UserError:
            assert cut <= starts[1] + 512
            continue
        assert len(bags) >= sum(start < cut for start in starts) - 1, cut
        assert all(bag_files(bags, i) == bag(i, 2) for i in range(len(bags))), cut


def test_training_goes_on_without_a_damaged_picture(tmp_path):
    path = write(tmp_path / "s", "shards", 4) / "000000.tar"
    views = Views(BagViews(open_bags(tmp_path / "s"), 5, 16), 8)
    whole = [views[0, i] for i in range(4)]
    offset, _ = spans_of(path)["n1/bag001.gen_3.jpg"]
    spoil(path, offset, b"\x00" * 64)
    for workers in (0, 2):
        views = Views(BagViews(open_bags(tmp_path / "s"), 5, 16), 8)
        batch = next(iter(loader(views, [[(0, i) for i in range(4)]], workers)))
        assert [bool(name) for name in batch["broken"]] == [False, True, False, False] and "n1/bag001, picture 3" in batch["broken"][1]
        assert all(torch.equal(batch["views"][i], whole[i]["views"]) for i in (0, 2, 3))
    report = verify_bags(tmp_path / "s", workers=0)
    assert report["problems"]["undecodable"]["count"] == 1 and "n1/bag001.gen_3.jpg" in report["problems"]["undecodable"]["first"][0] and report["bags"] == 4


def test_files_stay_open_and_are_not_shared_with_copies(tmp_path):
    bags = open_bags(write(tmp_path / "s", "shards", 8, per=2))
    before = [np.asarray(bags.frames(i, [1])[0]) for i in range(8)]
    assert sorted(map(os.path.basename, bags.disk.opened)) == [f"{n:06d}.tar" for n in range(4)]
    again = pickle.loads(pickle.dumps(bags))
    assert not again.disk.opened and np.array_equal(again.frames(3, [1])[0], before[3])
    path = tmp_path / "s/000000.tar"
    os.replace(write(tmp_path / "t", "shards", 1, generated=1) / "000000.tar", path)  # another shard takes its place
    assert np.array_equal(bags.frames(1, [1])[0], before[1])  # the one that was opened is read on
    fresh = open_bags(tmp_path / "s")
    assert len(fresh) == 7 and fresh.sizes[0] == 2 and bag_files(fresh, 0) == bag(0, 1)
    files, paths = OpenFiles(), [tmp_path / f"{n}.bin" for n in range(100)]
    for n, file in enumerate(paths):
        file.write_bytes(bytes([n] * 4))
    assert all(files.read(str(file), 1, 2) == bytes([n, n]) for _ in range(2) for n, file in enumerate(paths)) and len(files.opened) == 64


# ---------------------------------------------------------------- verification

def test_all_is_well(tmp_path):
    for kind in ("shards", "folders"):
        write(tmp_path / kind, kind, 10)
        for workers in (0, 2):
            report = verify_bags(tmp_path / kind, workers=workers)
            assert report["ok"] and report["bags"] == 10 and report["pictures"] == 50 and report["per_bag"] == {5: 10} and report["unchecked"] == 0, report
            assert json.loads(json.dumps(report))["ok"] and not any(found["count"] for found in report["problems"].values())
        assert "nothing is wrong" in format_report(report) and "10 whole bags of 50 pictures" in format_report(report)
    assert verify_bags(tmp_path / "shards/000001.tar")["bags"] == 4 and verify_bags(tmp_path / "folders/n0/bag000")["bags"] == 1


def flip(path):
    "Change one byte of a picture, in a place where a decoder does not mind."
    offset, _ = spans_of(path)["n1/bag001.gen_2.jpg"]
    spoil(path, offset + 16, b"\x01")


TROUBLE = {
    "checksum": (lambda root: flip(root / "000000.tar"), "000000.tar: other contents"),
    "checksum of a shard cut off": (lambda root: (root / "000000.tar").write_bytes((root / "000000.tar").read_bytes()[:-512]), "bytes, and"),
    "checksum unreadable": (lambda root: (root / "000001.tar.json").write_text("{"), "cannot be read"),
    "cut": (lambda root: (root / "000000.tar").write_bytes((root / "000000.tar").read_bytes()[:20000]), "000000.tar/"),
    "damaged": (lambda root: spoil(root / "000001.tar", headers(root / "000001.tar")["n2/bag005.gen_1.jpg"]), "000001.tar at byte"),
    "unreadable": (lambda root: (root / "000001.tar").write_bytes(b"hello" * 1000), "000001.tar: "),
    "undecodable": (lambda root: spoil(root / "000000.tar", spans_of(root / "000000.tar")["n1/bag001.gen_2.jpg"][0], b"\x00" * 9), "n1/bag001.gen_2.jpg"),
    "missing": (lambda root: (root / "000001.tar").rename(root / "gone"), "000001.tar"),
    "missing first": (lambda root: [(root / name).rename(root / f"{name}.gone") for name in ("000000.tar", "000000.tar.json")], "000000.tar"),
    "missing last, its sums are there": (lambda root: (root / "000002.tar").unlink(), "000002.tar"),
    "unfinished": (lambda root: (root / "000003.tar.part").touch(), "000003.tar.part"),
    "duplicate": (lambda root: (root / "000003.tar").write_bytes((root / "000000.tar").read_bytes()), "n1/bag001"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_in_shards(tmp_path, name):
    harm, words = TROUBLE[name]
    write(tmp_path, "shards", 10)
    harm(tmp_path)
    report = verify_bags(tmp_path, workers=0)
    found = report["problems"][name.split()[0]]
    assert not report["ok"] and found["count"] >= 1 and any(words in text for text in found["first"]), report
    assert "NOT in order" in format_report(report) and words in format_report(report)
    assert len(format_report(report).splitlines()) >= 6
    if name in ("undecodable", "checksum"):  # one bag is harmed, none is lost
        assert report["bags"] == 10


def test_decode_can_be_left_out(tmp_path):
    write(tmp_path, "shards", 3)
    spoil(tmp_path / "000000.tar", spans_of(tmp_path / "000000.tar")["n1/bag001.gen_2.jpg"][0], b"\x00" * 9)
    report = verify_bags(tmp_path, decode=False, workers=0)
    assert report["problems"]["undecodable"]["count"] == 0 and report["problems"]["checksum"]["count"] == 1 and "not decoded" in format_report(report)


def test_trouble_in_folders(tmp_path):
    write(tmp_path, "folders", 30)
    for i in range(25):
        (tmp_path / f"n{i % 3}/bag{i:03d}/gen_2.jpg").write_bytes(b"")
    (tmp_path / "n0/bag027/real.jpg").unlink()
    (tmp_path / "n1/bag028/gen_1.jpg").unlink()
    (tmp_path / ".unfinished/000007").mkdir()
    report = verify_bags(tmp_path)
    problems = report["problems"]
    assert problems["undecodable"]["count"] == 25 and len(problems["undecodable"]["first"]) == 20 and "gen_2.jpg: the file is empty" in problems["undecodable"]["first"][0]
    assert problems["no_real"]["first"] == ["n0/bag027"] and problems["unfinished"]["first"] == [".unfinished/000007"]
    assert report["per_bag"] == {4: 1, 5: 28} and "and 5 more" in format_report(report)


def test_shards_of_others_are_verified_too(tmp_path):
    for n in (3, 4, 6):
        with wds.TarWriter(str(tmp_path / f"train-{n:04d}.tar"), encoder=False) as writer:
            writer.write({"__key__": f"bag{n}", **bag(n)})
    with wds.TarWriter(str(tmp_path / "train-0007.tar"), encoder=False) as writer:
        writer.write({"__key__": "x", "gen_1.jpg": JPEGS[0]})
        writer.write({"__key__": "y", **bag(1)})
    report = verify_bags(tmp_path, workers=0)
    assert report["problems"]["missing"]["first"] == ["train-0005.tar"] and report["unchecked"] == 4 and report["problems"]["no_real"]["first"] == ["train-0007.tar/x"]
    assert report["bags"] == 4 and "4 have none" in format_report(report)


def test_nothing_to_verify(tmp_path):
    for root in (tmp_path, tmp_path / "none", tmp_path / "none.tar"):
        with pytest.raises(UserError) as error:
            verify_bags(root)
        assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- an order for shards

def naive_buffer(n, buffer, rng):
    buffer = min(buffer, n)
    slots, rest = rng.integers(buffer, size=n - buffer), rng.permutation(buffer)
    held, out = list(range(buffer)), []
    for t, slot in enumerate(slots):
        out.append(held[slot])
        held[slot] = buffer + t
    return out + [held[k] for k in rest]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 50, 400])
@pytest.mark.parametrize("buffer", [1, 2, 5, 49, 1000])
def test_the_buffer_is_that_of_a_loop(n, buffer):
    for seed in range(3):
        assert shuffle_buffer(n, buffer, np.random.default_rng(seed)).tolist() == naive_buffer(n, buffer, np.random.default_rng(seed))


def naive_order(shard, buffer, streams, repeats, batch_size, rng):
    "Plain lists: shards by chance, equal parts, each through its buffer, dealt in turn."
    shards = [[i for i in range(len(shard)) if shard[i] == s] for s in dict.fromkeys(shard.tolist())]
    items = [i for n in rng.permutation(len(shards)) for i in shards[n]]
    samples, n = [i + k * len(items) for i in items for k in range(repeats)], len(items)
    sizes = [len(samples) // streams + (s < len(samples) % streams) for s in range(streams)]
    parts, start = [], 0
    for size in sizes:
        part = sorted(samples[start:start + size], key=lambda j: j // n)
        parts.append([part[t] for t in naive_buffer(size, buffer, rng)])
        start += size
    per, out = batch_size // streams, []
    for step in range(len(samples) // batch_size):
        for part in parts:
            out += part[step * per:(step + 1) * per]
    return out + [j for part in parts for j in part[len(samples) // batch_size * per:]]


@pytest.mark.parametrize("sizes, buffer, streams, repeats, batch_size", [
    ([10, 10, 10, 10], 4, 4, 1, 8), ([10, 3, 1, 17], 1, 1, 1, 5), ([10, 3, 1, 17], 5, 3, 2, 6), ([1] * 17, 3, 16, 16, 16), ([5], 100, 2, 3, 4), ([40, 2], 7, 8, 1, 8), ([3], 2, 5, 5, 15)])
def test_order_by_shards_is_that_of_lists(sizes, buffer, streams, repeats, batch_size):
    shard = np.repeat([7, 3, 9, 1, *range(20, 40)][:len(sizes)], sizes)
    order, length = ShardOrder(shard, buffer, streams), len(shard) * repeats
    for seed in range(3):
        got = order.order(length, batch_size, np.random.default_rng(seed))
        assert got.tolist() == naive_order(shard, buffer, streams, repeats, batch_size, np.random.default_rng(seed))
        assert np.array_equal(np.sort(got), np.arange(length))


def test_buffer_1_reads_in_the_order_of_the_file():
    order = ShardOrder(np.repeat(np.arange(8), 5), buffer=1, streams=1).order(40, 8, np.random.default_rng(0))
    assert all(np.array_equal(run, run[0] + np.arange(5)) for run in order.reshape(8, 5)) and not np.array_equal(order, np.arange(40))


def test_a_buffer_of_everything_is_a_permutation():
    counts = np.zeros((6, 6))
    for seed in range(6000):
        counts[np.arange(6), ShardOrder(np.zeros(6), 6, 1).order(6, 6, np.random.default_rng(seed))] += 1
    assert abs(counts - 1000).max() < 130


def test_parts_of_ranks_lie_in_shards_of_their_own():
    shard = np.repeat(np.arange(16), 12)
    settings = dict(length=192, batch_size=24, seed=3, epochs=2, shuffle=ShardOrder(shard, 10, 8))
    whole = list(EpochBatches(**settings))
    for world, accumulate in ((1, 1), (2, 1), (4, 1), (8, 3), (2, 3)):
        ranks = [list(EpochBatches(**settings, rank=rank, world=world, accumulate=accumulate)) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert sum([part for r in ranks for part in r[step * accumulate:(step + 1) * accumulate]], []) == batch
        for epoch in (0, 1):
            seen = [{int(shard[i]) for batch in r for e, i in batch if e == epoch} for r in ranks]
            assert [len(s) for s in seen] == [16 // world] * world and len(set.union(*seen)) == 16
    for epoch in (0, 1):
        assert sorted(i for batch in whole for e, i in batch if e == epoch) == list(range(192))
    assert whole[0] != [(0, i) for _, i in whole[8]]


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 16])
def test_resuming_by_shards(start):
    settings = dict(length=195, batch_size=24, seed=1, epochs=2, rank=1, world=2, accumulate=2, shuffle=ShardOrder(np.repeat(np.arange(15), 13), 20, 4))
    assert list(EpochBatches(**settings, start_step=start)) == list(EpochBatches(**settings))[2 * start:]


def test_without_it_nothing_changed():
    "The order of a permutation is that of before (see test_known_values in test_photos)."
    assert EpochBatches(10, 10, seed=3).order(4).tolist() == [5, 9, 0, 6, 4, 8, 7, 1, 3, 2] and EpochBatches(10, 10).shuffle is None


def test_errors_of_orders():
    shard = np.repeat(np.arange(4), 10)
    for wrong in (dict(buffer=0), dict(streams=0), dict(shard=np.array([0, 1, 0])), dict(shard=np.array([]))):
        with pytest.raises(ValueError):
            ShardOrder(**{**dict(shard=shard), **wrong})
    with pytest.raises(UserError, match="batch_size 8 is not a multiple of streams 3"):
        EpochBatches(40, 8, shuffle=ShardOrder(shard, 10, 3))
    with pytest.raises(UserError, match="together 2"):
        EpochBatches(40, 8, together=2, shuffle=ShardOrder(shard, 10, 4))
    with pytest.raises(ValueError, match="length 41"):
        EpochBatches(41, 8, shuffle=ShardOrder(shard, 10, 4))


READER = """
import hashlib, json, os, sys
root, rank, log = sys.argv[1], int(sys.argv[2]), os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith(".tar") and os.write(log, f"{os.getpid()} {os.path.basename(str(args[0]))}\\n".encode()))
import torch
from mae_repro.views.bags import BagViews, open_bags
from mae_repro.views.samples import EpochBatches, ShardOrder, Views, loader
bags = open_bags(root)
views = Views(BagViews(bags, 2, 16), 8, seed=5)
for start in (0, 7):
    order = EpochBatches(len(views), 8, seed=5, rank=rank, world=2, start_step=start, shuffle=ShardOrder(bags.shard, 10, 4))
    batches = [(b["index"].tolist(), [hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in b["views"]]) for b in loader(views, order, workers=2)]
    print(json.dumps(batches))
"""


def test_two_processes_with_two_workers_each(tmp_path):
    bags = open_bags(write(tmp_path / "s", "shards", 96, per=12))  # which also leaves their index in the cache
    views = Views(BagViews(bags, 2, 16), 8, seed=5)
    order = ShardOrder(bags.shard, 10, 4)
    alone = [b for b in loader(views, EpochBatches(96, 8, seed=5, shuffle=order))]
    assert sorted(i for b in alone for i in b["index"].tolist()) == list(range(96))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", READER, str(tmp_path / "s"), str(rank), str(tmp_path / f"log{rank}")], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [[json.loads(line) for line in work.communicate()[0].splitlines()] for work in running]
    assert [work.returncode for work in running] == [0, 0]
    for step, batch in enumerate(alone):
        (left, left_views), (right, right_views) = (ranks[0][step] for ranks in said)
        assert left + right == batch["index"].tolist()
        assert left_views + right_views == [hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in batch["views"]]
    seen = [{i for indices, _ in ranks[0] for i in indices} for ranks in said]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(96))
    assert all(resumed == full[7:] and len(full) == 12 for full, resumed in said)
    opened = [[line.split() for line in (tmp_path / f"log{rank}").read_text().splitlines()] for rank in (0, 1)]
    files = [{name for _, name in lines} for lines in opened]
    assert not files[0] & files[1] and len(files[0]) == len(files[1]) == 4
    assert files[0] == {f"{int(bags.shard[i]):06d}.tar" for i in seen[0]}
    assert all(len({number for number, _ in lines}) >= min(2, os.cpu_count()) for lines in opened), "the workers read, not one process"


# ---------------------------------------------------------------- in training

def test_training_reads_shards_in_order(tmp_path):
    "Every bag once an epoch, shard by shard, resumed in the middle to the same weights; a source without shards is refused before anything is written."
    from dataclasses import replace

    from mae_repro.methods.siamese import SiamMAE
    from mae_repro.training import pretrain as P
    from mae_repro.training.config import replace_in
    from mae_repro.training.data import DataConfig
    from mae_repro.training.recipes import recipe
    write(tmp_path / "bags", "shards", 24, per=6, generated=1)
    config = recipe("cdgmae-tiny")
    method = SiamMAE(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, mask_ratio=.5, decoder_mlp_dim=16, decoder_dropout=0.)
    config = replace(config, method=method, data=DataConfig(tmp_path / "bags", workers=0, repeats=1), optim=replace(config.optim, batch_size=4, epochs=2, warmup_epochs=0.),
                     views=replace(config.views, order="sequential", buffer=2, streams=2), train=replace(config.train, device="cpu", figure_every=0., log_every=1))
    P.pretrain(config, tmp_path / "whole", progress=False)
    asked = []

    def stop(encoder):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt):
        P.pretrain(replace(config, train=replace(config.train, probe_every=.5, save_every=.5)), tmp_path / "cut", probe=stop, progress=False)
    P.resume(tmp_path / "cut", progress=False)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    other = P.pretrain(replace_in(config, "views.order", "shuffled"), tmp_path / "shuffled", progress=False)
    assert (other / "model.safetensors").read_bytes() != (tmp_path / "whole/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--views.streams 3 does not divide"):
        P.pretrain(replace_in(config, "views.streams", 3), tmp_path / "no", progress=False)
    with pytest.raises(UserError, match="for bags in shards"):
        P.pretrain(replace(config, data=DataConfig(repeats=1, limit=8, workers=0)), tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()


def test_one_unreadable_shard_costs_its_own_bags_and_no_folder_is_written_into_itself(tmp_path, caplog):
    write(tmp_path / "bags", "shards", 12)
    (tmp_path / "bags/000001.tar").write_bytes(b"")
    assert len(open_bags(tmp_path / "bags")) == 8 and "000001.tar" in caplog.text
    for name in ("000000.tar", "000002.tar"):
        (tmp_path / "bags" / name).write_bytes(b"")
    with pytest.raises(UserError, match="000000.tar"):
        open_bags(tmp_path / "bags")
    write(tmp_path / "one", "shards", 3)
    with pytest.raises(UserError, match="lies within the bags"):
        convert_bags(open_bags(tmp_path / "one"), tmp_path / "one/sub", "folders")
    assert convert_bags(open_bags(tmp_path / "one/000000.tar"), tmp_path / "one/sub", "folders")["bags"] == 3   # a file that was named
