"Sequences of frames: builders against reference vectors and brute force, and every layout read from a miniature written in it."
import gzip
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

from mae_repro.parts.weights import UserError
from mae_repro.views.photos import BrokenImage
from mae_repro.views.scene_data import LAYOUTS, SCENE_LAYOUTS, TABLE_1, ColmapModel, open_scenes, overlap, read_colmap, recognise
from mae_repro.views.sequences import FrameLists, anchor_group, anchor_groups, chunks, frame_lists, overlap_chains, turning_chains

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="module")
def vectors():
    path = SHARED / "golden/evaluation/mum_sequences.safetensors"
    if not path.is_file():
        pytest.skip("needs golden/evaluation/mum_sequences.safetensors of the shared folder (MAE_REPRO_SHARED)")
    return load_file(path)


def picture(path: Path, colour=(9, 99, 199)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)


def folders(found: FrameLists) -> dict[str, list[str]]:
    "{sequence, below the root: its files}"
    return {os.path.relpath(found.name(i), found.root): [os.path.relpath(found.path(i, t), found.root) for t in range(found.length(i))] for i in range(len(found))}


# builders

def test_reference_chunks(vectors):
    for (n, k), sizes in zip(vectors["in/chunk_cases"].tolist(), vectors["out/chunk_sizes"].tolist()):
        assert [len(run) for run in chunks(n, k)] == [size for size in sizes if size]


def test_chunks_keep_every_frame_once():
    for n in range(1, 120):
        for k in (1, 2, 7, 24):
            runs = chunks(n, k)
            assert np.concatenate(runs).tolist() == list(range(n))
            assert len(runs) == 1 or all(len(run) == k for run in runs[:-1]) and k < len(runs[-1]) <= 2 * k
    assert [len(run) for run in chunks(500)] == [500]
    with pytest.raises(ValueError, match="chunk 0"):
        chunks(5, 0)


def test_reference_anchor_groups(vectors):
    for expected in vectors["out/topk_sequences"].tolist():
        assert anchor_group(vectors["in/overlap"], expected[0], 7).tolist() == expected


def test_anchor_groups_take_zero_but_not_minus_one():
    table = np.array([[-1, .5, 0, -1], [.2, -1, .3, .3], [0, 0, -1, -1], [-1, -1, -1, -1]])
    assert anchor_group(table, 0, 2).tolist() == [0, 1, 2] and anchor_group(table, 0, 3) is None
    assert anchor_group(table, 1, 3).tolist() == [1, 2, 3, 0]  # ties by number
    groups = anchor_groups(table, 2, tries=50, seed=1)
    assert {g[0] for g in map(list, groups)} == {0, 1, 2} and len(groups) < 50
    assert [g.tolist() for g in groups] == [g.tolist() for g in anchor_groups(table, 2, tries=50, seed=1)]
    assert [g.tolist() for g in groups] != [g.tolist() for g in anchor_groups(table, 2, tries=50, seed=2)]


def test_reference_turning_chains(vectors):
    sees = vectors["in/visibility"].astype(int)
    R = Rotation.from_quat(np.roll(vectors["in/qvec"], -1, 1)).as_matrix()  # scalar first there
    found = turning_chains(sees @ sees.T / sees.sum(1)[:, None], sees.sum(1), R, min_frames=3)
    assert [chain.tolist() for chain in found] == [[n for n in row if n >= 0] for row in vectors["out/megascenes_chains"].tolist()]


def test_short_chains_set_their_images_free():
    R = Rotation.from_euler("z", [0, 60, 0, 60, 120], degrees=True).as_matrix()
    table = np.zeros((5, 5))
    table[0, 1] = table[2, 1] = table[1, 3] = .5  # 0-1 is as far as the first start comes: 1 and 3 do not turn
    table[1, 4] = .4
    assert [c.tolist() for c in turning_chains(table, np.array([9, 1, 5, 1, 1]), R, min_frames=3)] == [[0, 1, 4]]
    table[1, 4] = 0
    table[2, 4] = .2
    table[4, 1] = .2
    assert [c.tolist() for c in turning_chains(table, np.array([9, 1, 5, 1, 1]), R, min_frames=3)] == []
    table[1, 4] = .05
    assert [c.tolist() for c in turning_chains(table, np.array([9, 1, 5, 1, 1]), R, min_overlap=.01, min_frames=3)] == [[0, 1, 4]]


def test_overlap_chains_are_greedy_and_end_without_overlap():
    rng = np.random.default_rng(0)
    table = np.where(rng.random((9, 9)) < .5, rng.random((9, 9)), 0)
    for chain in overlap_chains(table, 20, seed=3):
        used = [chain[0]]
        while True:  # brute force
            left = [n for n in range(9) if n not in used and table[used[-1], n] > 0]
            if not left:
                break
            used.append(max(left, key=lambda n: table[used[-1], n]))
        assert chain.tolist() == used
    assert max(map(len, overlap_chains(table, 20, longest=3, seed=3))) == 3


# sequence sets

def test_frames_come_in_the_order_asked_for(tmp_path):
    for t, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250)]):
        picture(tmp_path / f"a/{t}.png", colour)
    found = frame_lists(tmp_path, [("a", ["0.png", "1.png", "2.png"], [np.array([2, 0]), np.array([0, 1])])])
    assert [image.getpixel((0, 0)) for image in found.frames(0, [1, 0])] == [(250, 0, 0), (0, 0, 250)]
    assert found.name(1) == str(tmp_path / "a [2]") and found.length(1) == 2 and len(found.ends) == 3
    with pytest.raises(IndexError, match="2 frames, and none numbered 2"):
        found.path(0, 2)
    (tmp_path / "a/1.png").write_bytes(b"")
    with pytest.raises(BrokenImage, match="1.png: the file is empty"):
        found.frames(1, [1])


def test_a_source_of_video_frames_can_use_it(tmp_path):
    from mae_repro.views.videos import VideoViews
    for t in range(6):
        picture(tmp_path / f"a/{t}.png", (40 * t, 0, 0))
    found = frame_lists(tmp_path, [("a", [f"{t}.png" for t in range(6)], None)])
    views = VideoViews(found, img_size=8, gap=(1, 4)).draw(0)
    assert views.shape == (2, 3, 8, 8) and 40 <= int(views[0, 0, 4, 4]) - int(views[1, 0, 4, 4]) <= 120


def test_frames_in_no_group_are_not_stored_and_the_rest_survives_take(tmp_path):
    found = frame_lists(tmp_path, [("x", [f"{t}.jpg" for t in range(10)], [np.array([9, 3]), np.array([3])]), ("y", ["später.jpg"], None), ("z", ["0.jpg"] * 5, [])])
    assert len(found.ends) == 3 and len(found) == 3
    some = pickle.loads(pickle.dumps(found.take(np.array([2, 0]))))
    assert folders(some) == {"y": ["y/später.jpg"], "x [1]": ["x/9.jpg", "x/3.jpg"]}


def test_too_short_is_counted_and_logged(caplog):
    found = frame_lists("/data", [(str(n), [f"{t}.jpg" for t in range(n)], None) for n in (3, 30, 24, 23)])
    with caplog.at_level(logging.INFO):
        long = found.at_least(24)
    assert [long.length(i) for i in range(len(long))] == [30, 24] and long.left_out == 2 and "2 of 4 sequences" in caplog.text
    assert long.at_least(25).left_out == 3


def test_twenty_million_frames_fit():
    found = frame_lists("/data", ((f"1K/{i:064x}/images_8", [f"frame_{t:05d}.png" for t in range(300)], None) for i in range(300)))
    per_frame = sum(getattr(found, name).nbytes for name in ("names", "part", "starts", "sizes", "ids", "text", "ends")) / len(found.ids)
    assert per_frame < 40 and all(isinstance(getattr(found, name), np.ndarray) and getattr(found, name).dtype != object for name in ("names", "text", "ids", "ends"))


# layouts: {layout: ({path of a frame or a list: its text, None for a picture}, {sequence: number of frames in train}, {...} in val or None)}

def scene(pattern: str, count: int) -> dict:
    return {pattern.format(t): None for t in range(count)}


HASH, HEX = "0" * 60 + "beef", "00a1b2c3d4e5f607"
HYPERSIM = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name\n" + "".join(
    f"ai_001_00{k},cam_00,{t},True,,{part}\n" for k, part in ((1, "train"), (2, "val"), (3, "test")) for t in range(2))
MINIATURES = {
    "dl3dv": (scene(f"1K/{HASH}/images_8/frame_{{:05d}}.png", 4) | scene(f"1K/{HASH}/images_4/frame_{{:05d}}.png", 9) | scene("2K/abc/nerfstudio/images_8/frame_{:05d}.png", 3)
              | {f"1K/{HASH}/transforms.json": "{}"}, {f"1K/{HASH}/images_8": 4, "2K/abc/nerfstudio/images_8": 3}, None),
    "realestate10k": (scene(f"train/{HEX}/{{}}45979267.png", 4) | scene(f"train/{HEX[::-1]}/{{}}00100.jpg", 2) | scene(f"test/{HEX}/{{}}0.jpg", 3),
                      {f"train/{HEX}": 4, f"train/{HEX[::-1]}": 2}, {f"test/{HEX}": 3}),
    "scannetpp": (scene("data/7b6477cb95/dslr/resized_undistorted_images/DSC{:05d}.JPG", 4) | scene("data/7b6477cb95/dslr/resized_undistorted_masks/DSC{:05d}.png", 4)
                  | scene("data/c50d2d1d42/dslr/resized_undistorted_images/DSC{:05d}.JPG", 2) | {"splits/nvs_sem_train.txt": "7b6477cb95\n", "splits/nvs_sem_val.txt": "c50d2d1d42\n"},
                  {"data/7b6477cb95/dslr/resized_undistorted_images": 4}, {"data/c50d2d1d42/dslr/resized_undistorted_images": 2}),
    "blendedmvs": (scene("5a3ca9cb270f0e3f14d0eddb/blended_images/{:08d}.jpg", 3) | scene("5a3ca9cb270f0e3f14d0eddb/blended_images/{:08d}_masked.jpg", 3)
                   | scene("5b7a3890fc8fcf6781e2593a/blended_images/{:08d}.jpg", 2) | {"BlendedMVS_training.txt": "5a3ca9cb270f0e3f14d0eddb\r\n", "validation_list.txt": "5b7a3890fc8fcf6781e2593a"},
                   {"5a3ca9cb270f0e3f14d0eddb/blended_images": 3}, {"5b7a3890fc8fcf6781e2593a/blended_images": 2}),
    "arkitscenes": (scene("raw/Training/40753679/lowres_wide/40753679_679{}.123.png", 3) | scene("raw/Training/40753679/lowres_depth/40753679_679{}.123.png", 3)
                    | scene("raw/Validation/41069021/lowres_wide/41069021_35{}.000.png", 2), {"raw/Training/40753679/lowres_wide": 3}, {"raw/Validation/41069021/lowres_wide": 2}),
    "hypersim": (scene("ai_001_001/images/scene_cam_00_final_preview/frame.{:04d}.color.jpg", 3) | scene("ai_001_001/images/scene_cam_00_final_preview/frame.{:04d}.tonemap.jpg", 3)
                 | scene("ai_001_001/images/scene_cam_01_final_preview/frame.{:04d}.color.jpg", 3) | scene("ai_001_002/images/scene_cam_00_final_preview/frame.{:04d}.color.jpg", 2)
                 | {"metadata_images_split_scene_v1.csv": HYPERSIM}, {"ai_001_001/images/scene_cam_00_final_preview": 3}, {"ai_001_002/images/scene_cam_00_final_preview": 2}),
    "wildrgbd": (scene("apple/scenes/scene_000/rgb/{:05d}.png", 3) | scene("apple/scenes/scene_000/depth/{:05d}.png", 3) | scene("apple/scenes/scene_000/masks/{:05d}.png", 3)
                 | {"apple/types.json": "{}"}, {"apple/scenes/scene_000/rgb": 3}, None),
    "streetview": (scene("0001/0001_{:09d}_0000004_0000123.jpg", 3) | {"0001/0001_000000000_0000004_0000123.txt": "d 1"}, {"0001": 3}, None),
    "frames": (scene("trips/rome/day_1/IMG_{}.JPG", 3) | scene("trips/oslo/images/{}.png", 3) | scene("trips/oslo/depth/{}.png", 3) | scene("trips/oslo/masks/{}.png", 3)
               | {"trips/oslo/preview.png": None, "trips/oslo/cameras.json": "{}", "trips/.hidden/0.png": None}, {"trips/rome/day_1": 3, "trips/oslo/images": 3}, None),
}


def write(root: Path, files: dict) -> Path:
    for path, text in files.items():
        if text is None:
            picture(root / path)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    return root


@pytest.mark.parametrize("layout", MINIATURES)
def test_miniature(tmp_path, layout):
    files, train, val = MINIATURES[layout]
    write(tmp_path, files)
    assert recognise(str(tmp_path)) == layout
    found = open_scenes(tmp_path, min_frames=2)
    assert {name: len(paths) for name, paths in folders(found).items()} == train
    assert folders(found) == folders(open_scenes(tmp_path, layout, min_frames=2))
    for paths in folders(found).values():
        assert all(files[path] is None for path in paths) and paths == sorted(paths)
    assert len(found.frames(0, list(range(found.length(0))))) == found.length(0)
    if val:
        assert {name: len(paths) for name, paths in folders(open_scenes(tmp_path, split="val", min_frames=2)).items()} == val
    else:
        with pytest.raises(UserError, match="val"):
            open_scenes(tmp_path, split="val", min_frames=2)


def test_every_layout_has_a_miniature_and_the_mixture_is_the_papers():
    assert set(MINIATURES) == {*SCENE_LAYOUTS, "frames"} and set(LAYOUTS) - set(MINIATURES) == {"megadepth", "megascenes", "co3d"}
    assert set(TABLE_1) == set(LAYOUTS) - {"frames"} and sum(TABLE_1.values()) == 90


def test_arkitscenes_3dod_and_zipped_hypersim(tmp_path):
    write(tmp_path / "a", scene("3dod/Training/4/4_frames/lowres_wide/4_{}.0.png", 2))
    write(tmp_path / "h", scene("ai_001_001/ai_001_001/images/scene_cam_00_final_preview/frame.{:04d}.color.jpg", 2))
    assert [*folders(open_scenes(tmp_path / "a", min_frames=2))] == ["3dod/Training/4/4_frames/lowres_wide"]
    assert len(open_scenes(tmp_path / "h", "hypersim", min_frames=2)) == 1  # no list: all there is, in training
    with pytest.raises(UserError, match="no list of test scenes.*metadata_images_split"):
        open_scenes(tmp_path / "h", "hypersim", split="test", min_frames=2)


def test_chunks_of_the_code_and_of_the_paper(tmp_path):
    picture(tmp_path / "one.jpg")
    for pid, count in (("a", 201), ("b", 99)):
        (tmp_path / pid / "blended_images").mkdir(parents=True)
        for t in range(count):
            os.link(tmp_path / "one.jpg", tmp_path / pid / f"blended_images/{t:08d}.jpg")

    def sizes(**options):
        return open_scenes(tmp_path, "blendedmvs", **options).sizes.tolist()

    assert sizes() == [201, 99] and sizes(as_paper=True) == sizes(chunk=100) == [100, 101, 99]
    assert sizes(chunk=60) == [60, 60, 81, 99] and sizes(chunk=60, limit=2) == [60, 81]
    (tmp_path / "data").mkdir()
    (tmp_path / "a").rename(tmp_path / "data/a")
    (tmp_path / "data/a/dslr").mkdir()
    (tmp_path / "data/a/blended_images").rename(tmp_path / "data/a/dslr/resized_undistorted_images")
    for path in (tmp_path / "data/a/dslr/resized_undistorted_images").iterdir():
        path.rename(path.with_suffix(".JPG"))
    assert open_scenes(tmp_path, "scannetpp").sizes.tolist() == [100, 101] and open_scenes(tmp_path, "scannetpp", chunk=0).sizes.tolist() == [201]


def test_frames_natural_order_links_and_parts(tmp_path):
    write(tmp_path / "x", scene("clip/frame{}.png", 12) | {"test/0.png": None, "test/1.png": None})
    found = folders(open_scenes(tmp_path / "x", min_frames=2))  # a scene may be called test
    assert [*found] == ["clip", "test"] and found["clip"][-1] == "clip/frame11.png" and found["clip"][2] == "clip/frame2.png"
    write(tmp_path / "y", scene("train/clip/{}.png", 2) | scene("val/clop/{}.png", 3))
    assert [*folders(open_scenes(tmp_path / "y", min_frames=2))] == ["train/clip"] and [*folders(open_scenes(tmp_path / "y", split="test", min_frames=2))] == ["val/clop"]
    (tmp_path / "y/train/clip/loop").symlink_to(tmp_path / "y/train")
    assert len(open_scenes(tmp_path / "y", min_frames=2)) == 1
    assert [*folders(open_scenes(tmp_path / "y/train/clip", min_frames=2))] == ["."]
    write(tmp_path / "d", scene("JPEGImages/480p/bear/{}.jpg", 2) | scene("Annotations/480p/bear/{}.png", 2))
    assert [*folders(open_scenes(tmp_path / "d", min_frames=2))] == ["JPEGImages/480p/bear"]


def test_rendered_scenes_and_the_real_ones_are_read(tmp_path):
    from mae_repro.views.layouts import write_layout
    write_layout("scene", tmp_path / "r", num=2, num_frames=3, size=32)
    assert [len(paths) for paths in folders(open_scenes(tmp_path / "r", min_frames=3)).values()] == [3, 3]
    if not (SHARED / "data/multiview").is_dir():
        pytest.skip("needs data/multiview of the shared folder (MAE_REPRO_SHARED)")
    found = folders(open_scenes(SHARED / "data/multiview", min_frames=2))
    assert len(found) == 8 and len(found["slambook_rgbd/images"]) == 5 and len(found["ngp_fox/images"]) == 25


@pytest.mark.parametrize("options, message", [
    (dict(root="nowhere"), "missing"), (dict(layout="scannet"), "choose auto, dl3dv"), (dict(split="dev"), "choose train, val or test"), (dict(limit=0), "limit 0 must be at least 1"),
    (dict(chunk=-1), "chunk -1"), (dict(min_frames=0), "min_frames 0"), (dict(), "no sequence of 24 frames .* the longest of 2 has 3. Lower --views.min-frames"),
    (dict(layout="dl3dv"), "read as dl3dv: looked for images_8/frame"), (dict(layout="co3d"), "CATEGORY_train.jgz"), (dict(layout="megadepth"), "sparse/manhattan/0"),
    (dict(layout="megascenes", chunk=3), "no order to cut"), (dict(layout="scannetpp", split="val"), "put splits/nvs_sem_val.txt there")])
def test_bad_input(tmp_path, options, message):
    root = write(tmp_path / "data", MINIATURES["frames"][0])
    with pytest.raises(UserError, match=message):
        open_scenes(tmp_path / options.pop("root", root), **options)


def test_nothing_there_and_a_list_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no train scenes .* looked for pictures"):
        open_scenes(tmp_path)
    files, _, _ = MINIATURES["hypersim"]
    write(tmp_path, files | {"metadata_images_split_scene_v1.csv": "a,b\n1,2\n"})
    with pytest.raises(UserError, match="metadata_images_split_scene_v1.csv is no list of scenes"):
        open_scenes(tmp_path)


# CO3D

def jgz(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump(content, file)


def co3d_frames(root: Path, category: str, sequence: str, count: int) -> list[dict]:
    "The pictures of a sequence, and what frame_annotations.jgz says of them: frame numbers and file numbers differ."
    frames = []
    for k in range(count):
        path = f"{category}/{sequence}/images/frame{k + 1:06d}.jpg"
        picture(root / path)
        picture(root / path.replace("images", "masks").replace("jpg", "png"))
        frames.append(dict(sequence_name=sequence, frame_number=100 - k, frame_timestamp=.1, image=dict(path=path, size=[4, 6]), meta=dict(frame_type="train_known")))
    return frames


def test_co3d_official(tmp_path):
    apples = co3d_frames(tmp_path, "apple", "110_1", 4) + co3d_frames(tmp_path, "apple", "189_2", 3)
    jgz(tmp_path / "apple/frame_annotations.jgz", apples)
    jgz(tmp_path / "bench/frame_annotations.jgz", co3d_frames(tmp_path, "bench", "7", 2))
    assert recognise(str(tmp_path)) == "co3d"
    found = folders(open_scenes(tmp_path, min_frames=2))
    assert {name: len(files) for name, files in found.items()} == {"apple/110_1/images": 4, "apple/189_2/images": 3, "bench/7/images": 2}
    assert found["apple/110_1/images"][0] == "apple/110_1/images/frame000004.jpg"  # by frame number, not by name
    lists = dict(train=[["110_1", 100 - k, f"apple/110_1/images/frame{k + 1:06d}.jpg"] for k in range(3)], val=[], test=[["189_2", 100 - k, f"apple/189_2/images/frame{k + 1:06d}.jpg"] for k in range(3)])
    (tmp_path / "apple/set_lists").mkdir()
    (tmp_path / "apple/set_lists/set_lists_fewview_dev.json").write_text(json.dumps(lists))
    assert {name: len(files) for name, files in folders(open_scenes(tmp_path, min_frames=2)).items()} == {"apple/110_1/images": 3, "bench/7/images": 2}
    assert "apple/189_2/images" in folders(open_scenes(tmp_path, split="test", min_frames=2))


def test_co3d_annotations_of_vggt(tmp_path):
    for count, name in ((4, "110_1"), (3, "189_2")):
        co3d_frames(tmp_path, "apple", name, count)
    pose = dict(extri=np.eye(4)[:3].tolist(), intri=np.eye(3).tolist())
    jgz(tmp_path / "annotations/apple_train.jgz", {"110_1": [dict(filepath=f"apple/110_1/images/frame{k:06d}.jpg", **pose) for k in (3, 1, 2)]})
    jgz(tmp_path / "annotations/apple_test.jgz", {"189_2": [dict(filepath=f"apple/189_2/images/frame{k:06d}.jpg", **pose) for k in (1, 2)]})
    found = open_scenes(tmp_path, min_frames=2)
    assert folders(found) == {"apple/110_1/images": [f"apple/110_1/images/frame{k:06d}.jpg" for k in (3, 1, 2)]} and len(found.frames(0, [0, 2])) == 2
    assert folders(open_scenes(tmp_path, split="val", min_frames=2)) == {"apple/189_2/images": [f"apple/189_2/images/frame{k:06d}.jpg" for k in (1, 2)]}
    (tmp_path / "annotations/apple_train.jgz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="apple_train.jgz: no JSON"):
        open_scenes(tmp_path)
    jgz(tmp_path / "annotations/apple_train.jgz", {"110_1": [dict(path="x")]})
    with pytest.raises(UserError, match="no annotations of CO3D or VGGT.*filepath"):
        open_scenes(tmp_path)


# COLMAP, MegaDepth, MegaScenes

def colmap(folder: Path, names: list[str], seed: int = 0, text: bool = False, model: str = "SIMPLE_RADIAL", old: bool = False):
    "A model written by COLMAP itself; what each image sees (N, P), its rotation (N, 3, 3) and translation (N, 3)."
    pycolmap = pytest.importorskip("pycolmap")
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(seed), pycolmap.Reconstruction()
    written.add_camera_with_trivial_rig(pycolmap.Camera.create_from_model_name(7, model, 50., 64, 48))
    sees = rng.random((len(names), 40)) < .5
    R, t = Rotation.random(len(names), random_state=seed).as_matrix(), rng.normal(size=(len(names), 3))
    for i, name in enumerate(names):
        image = pycolmap.Image(name=name, camera_id=7, image_id=3 * i + 1)
        image.points2D = [pycolmap.Point2D(rng.random(2)) for _ in range(sees[i].sum() + 2)]  # two that belong to no point
        written.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(R[i]), t[i]))
    used = np.zeros(len(names), int)
    for column in sees.T:
        track = pycolmap.Track()
        for i in np.flatnonzero(column):
            track.add_element(int(3 * i + 1), int(used[i]))
            used[i] += 1
        written.add_point3D(rng.normal(size=3), track)
    (written.write_text if text else written.write_binary)(str(folder))
    if old:  # before version 3.12 there were no rigs
        for path in [*folder.glob("rigs.*"), *folder.glob("frames.*")]:
            path.unlink()
    return sees, R, t


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_colmap_models(tmp_path, text, old):
    sees, R, t = colmap(tmp_path / "m", ["b.jpg", "sub/a.jpg", "c.jpg"], text=text, old=old)
    model = read_colmap(tmp_path / "m")
    assert model.names == ("b.jpg", "sub/a.jpg", "c.jpg") and model.sizes.tolist() == [[48, 64]] * 3 and model.distorted.all()
    assert np.allclose(model.K, [[[50, 0, 31.5], [0, 50, 23.5], [0, 0, 1]]] * 3) and np.allclose(model.R, R) and np.allclose(model.t, t)
    assert model.points.dtype == bool and (model.points.toarray() == sees).all()
    seen = [set(np.flatnonzero(row)) for row in sees]
    assert np.allclose(overlap(model), [[len(a & b) / len(a) for b in seen] for a in seen])


def test_a_point_seen_twice_counts_once_and_an_image_without_points_overlaps_with_none(tmp_path):
    from scipy.sparse import csr_array
    pycolmap = pytest.importorskip("pycolmap")
    colmap(tmp_path / "m", ["a.jpg", "b.jpg"], model="PINHOLE")
    written = pycolmap.Reconstruction(str(tmp_path / "m"))
    free = next(k for k, point in enumerate(written.images[1].points2D) if not point.has_point3D())
    number = next(i for i, point in written.points3D.items() if any(e.image_id == 1 for e in point.track.elements))
    before = read_colmap(tmp_path / "m")
    written.add_observation(number, pycolmap.TrackElement(1, free))
    written.write_binary(str(tmp_path / "m"))
    assert np.array_equal(overlap(read_colmap(tmp_path / "m")), overlap(before)) and not before.distorted.any()
    nothing = ColmapModel(("a", "b"), *[None] * 4, csr_array(np.array([[0, 0], [1, 1]], bool)), None)
    assert overlap(nothing).tolist() == [[0, 0], [0, 1]]


def test_damaged_models_and_no_pycolmap(tmp_path, monkeypatch):
    colmap(tmp_path / "m", ["a.jpg", "b.jpg"])
    with pytest.raises(UserError, match="holds no COLMAP model: cameras, images and points3D"):
        read_colmap(tmp_path)
    for name in ("images", "points3D"):  # COLMAP reads on after the end of the file and may ask for all memory
        whole = (tmp_path / f"m/{name}.bin").read_bytes()
        for damaged in (b"", whole[:5], whole[:60], whole[:-1], whole[:-16], whole + b"1", b"\xff" * 8 + whole[8:]):
            (tmp_path / f"m/{name}.bin").write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name}.bin is damaged or cut off"):
                read_colmap(tmp_path / "m")
        (tmp_path / f"m/{name}.bin").write_bytes(whole)
    whole = (tmp_path / "m/cameras.bin").read_bytes()
    (tmp_path / "m/cameras.bin").write_bytes(whole[:20])
    with pytest.raises(UserError, match="cameras.bin is damaged or cut off"):
        read_colmap(tmp_path / "m")
    (tmp_path / "m/cameras.bin").write_bytes(whole)
    pycolmap = pytest.importorskip("pycolmap")
    (tmp_path / "empty").mkdir()
    pycolmap.Reconstruction().write_text(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="has no images"):
        read_colmap(tmp_path / "empty")
    colmap(tmp_path / "t", ["a.jpg", "b.jpg"], text=True)
    lines = (tmp_path / "t/points3D.txt").read_text().splitlines()
    (tmp_path / "t/points3D.txt").write_text("\n".join([*lines, "9999 0 0 0 1 2 3 0.5 99 0"]))  # no image has the number 99
    with pytest.raises(UserError, match="no COLMAP model that can be read"):
        read_colmap(tmp_path / "t")
    monkeypatch.setitem(__import__("sys").modules, "pycolmap", None)
    with pytest.raises(UserError, match="pip install pycolmap"):
        read_colmap(tmp_path / "m")


@pytest.fixture
def megadepth(tmp_path):
    for number, (scene, text) in enumerate((("0001", False), ("0022", True))):
        names = [f"{k}_o.jpg" for k in range(6)]
        colmap(tmp_path / f"MegaDepth_v1_SfM/{scene}/sparse/manhattan/0", [*names, "gone.jpg"], seed=number, text=text, old=True)
        write(tmp_path / f"MegaDepth_v1_SfM/{scene}/images", dict.fromkeys(names) | {"not_in_the_model.jpg": None})
    return tmp_path


def test_megadepth(megadepth, caplog):
    assert recognise(str(megadepth)) == recognise(str(megadepth / "MegaDepth_v1_SfM")) == "megadepth"
    with pytest.raises(UserError, match="no train scenes .* group_size pictures"):
        open_scenes(megadepth)  # 256 images at least, as the code
    with caplog.at_level(logging.INFO):
        found = open_scenes(megadepth, group_size=4, tries=10, min_frames=2)
    assert len(found) == 20 and set(found.sizes.tolist()) == {4} and len(found.ends) <= 12 and "1 of 7 images" in caplog.text
    model = read_colmap(megadepth / "MegaDepth_v1_SfM/0001/sparse/manhattan/0")
    table = overlap(model)[:6, :6]
    for files in [*folders(found).values()][:10]:
        rows = [model.names.index(os.path.basename(file)) for file in files]
        assert rows == [rows[0], *sorted(set(range(6)) - {rows[0]}, key=lambda n: (-table[rows[0], n], n))[:3]]
    again = open_scenes(megadepth, group_size=4, tries=10, min_frames=2, seed=1)
    assert folders(again) != folders(found) == folders(open_scenes(megadepth, group_size=4, tries=10, min_frames=2))
    chains = open_scenes(megadepth, group_size=4, tries=10, min_frames=2, as_paper=True)
    first = [model.names.index(os.path.basename(file)) for file in folders(chains)[os.path.relpath(chains.name(0), megadepth)]]
    assert first[2] == max(set(range(6)) - set(first[:2]), key=lambda n: (table[first[1], n], -n))
    assert len(open_scenes(megadepth, group_size=4, tries=1, min_frames=2).frames(0, [0, 3])) == 2


def test_megadepth_lists_undistorted_and_damaged(megadepth, caplog):
    (megadepth / "train_scenes.txt").write_text("0001\n")
    (megadepth / "valid_scenes.txt").write_text("0022\n")
    for split, scene in (("train", "0001"), ("val", "0022")):
        found = open_scenes(megadepth, split=split, group_size=4, tries=3, min_frames=2)
        assert len(found) == 3 and f"MegaDepth_v1_SfM/{scene}/images" in found.name(0)
    (megadepth / "MegaDepth_v1_SfM/0001/sparse/manhattan/0/points3D.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="no train scenes"):
        open_scenes(megadepth, group_size=4, tries=3, min_frames=2)
    assert "left out" in caplog.text
    shutil.move(megadepth / "MegaDepth_v1_SfM/0022/sparse/manhattan/0", megadepth / "Undistorted_SfM/0022/sparse")
    shutil.move(megadepth / "MegaDepth_v1_SfM/0022/images", megadepth / "Undistorted_SfM/0022/images")
    assert "Undistorted_SfM/0022/images" in open_scenes(megadepth, split="val", group_size=4, tries=3, min_frames=2).name(0)


@pytest.mark.parametrize("kind", ["colmap", "sparses"])
def test_megascenes(tmp_path, kind):
    names = [f"commons/Old_town/0/pictures/P {k}.jpg" for k in range(6)]
    sees, R, _ = colmap(tmp_path / f"reconstruct/001/234/{kind}/0", names, seed=9)  # in which the image that sees most is not the first
    colmap(tmp_path / f"reconstruct/001/234/{kind}/1", names[:3], seed=6)
    colmap(tmp_path / f"reconstruct/001/235/{kind}/0", names, seed=7)  # whose pictures were not fetched
    write(tmp_path / "images/001/234", dict.fromkeys(names))
    assert recognise(str(tmp_path)) == "megascenes"
    found = open_scenes(tmp_path, min_frames=2)
    assert found.sizes.tolist() == [6, 3] and folders(found)["images/001/234"][0].startswith("images/001/234/commons/Old_town/0/pictures/P ")
    chains = open_scenes(tmp_path, min_frames=3, as_paper=True)
    sees = sees.astype(int)
    expected = turning_chains(sees @ sees.T / sees.sum(1)[:, None], sees.sum(1), R, min_frames=3)
    got = [[names.index(os.path.relpath(chains.path(i, t), tmp_path / "images/001/234")) for t in range(chains.length(i))] for i in range(len(chains))]
    assert expected and [chain.tolist() for chain in expected] == got[:len(expected)]
    with pytest.raises(UserError, match="one part"):
        open_scenes(tmp_path, split="val")


def test_a_hundred_thousand_folders_need_one_look_each(tmp_path, monkeypatch):
    picture(tmp_path / "one.png")
    for i in range(200):
        folder = tmp_path / f"1K/{i:08x}/images_8"
        folder.mkdir(parents=True)
        for t in range(3):
            os.link(tmp_path / "one.png", folder / f"frame_{t:05d}.png")
    looks, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looks.append(path), scandir(path))[1])
    found = open_scenes(tmp_path, "dl3dv", min_frames=3)
    assert len(found) == 200 and len(looks) <= 205 and found.take(np.arange(5)).length(4) == 3
    looks.clear()
    assert recognise(str(tmp_path / "1K")) == "frames" and len(looks) < 100  # however many folders there are
    assert len(open_scenes(tmp_path, min_frames=3, limit=7)) == 7
