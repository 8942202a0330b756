"Data sets of a few small pictures in the layouts in which the real ones come."
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int) -> Image.Image:
    "A picture of coloured blobs."
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_imagenet(root: Path, train: int = 6, val: int = 3) -> None:
    "ImageNet-1k: two of its classes, `train` and `val` pictures of each."
    for label, wnid in enumerate(("n01440764", "n01443537")):
        for part, count, name in (("train", train, f"{wnid}_{{}}.JPEG"), ("val", val, f"ILSVRC2012_val_{label}000000{{}}.JPEG")):
            (root / part / wnid).mkdir(parents=True)
            for i in range(count):
                noise(75, 100, 100 * label + i).save(root / part / wnid / name.format(i), "JPEG")


def write_kinetics(root: Path, num: int = 4, frames: int = 64) -> None:
    "Kinetics-400: training videos of two classes, `num` in all. Needs PyAV."
    import av
    for i in range(num):
        path = root / "train" / ("abseiling", "yoga")[i % 2] / f"{i}_000010_000020.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = np.asarray(noise(80, 160, i))
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
            for t in range(frames):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:, t:t + 96]), format="rgb24")))
            file.mux(stream.encode())


def write_nyu(root: Path, train: int = 1, test: int = 1) -> None:
    "NYU Depth v2: `train` and `test` pictures of a bathroom, half of it 1.5 m away and half 3 m; each list also has a picture without depth."
    (root / "bathroom").mkdir(parents=True)
    depth = np.full((480, 640), 1500, np.uint16)
    depth[:, 320:] = 3000
    for part, numbers in (("train", range(train)), ("test", range(train, train + test))):
        for i in numbers:
            Image.new("RGB", (640, 480), (90, 90, 90)).save(root / f"bathroom/rgb_{i}.jpg")
            Image.fromarray(depth).save(root / f"bathroom/sync_depth_{i}.png")
        lines = [f"/bathroom/rgb_{i}.jpg /bathroom/sync_depth_{i}.png 518.8579\n" for i in numbers]
        (root / f"nyu_{part}.txt").write_text("".join(lines) + "/bathroom/rgb_9.jpg None 518.8579\n")


def write_ade20k(root: Path, n: int = 4) -> None:
    "ADE20K (SceneParse150): `n` pictures for training and as many for the test, of classes 1 or 2 and 150, and of none."
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for i in range(n):
            labels = np.zeros((18, 24), np.uint8)
            labels[:, 12:] = 1 + i % 2
            labels[:4] = 150
            labels[0, 0] = 0
            Image.fromarray(np.repeat((labels * np.uint8(90))[..., None], 3, 2).astype(np.uint8)).save(root / f"images/{part}/ADE_{i}.jpg")
            Image.fromarray(labels).save(root / f"annotations/{part}/ADE_{i}.png")


def _write_scan(folder: Path, scene, ids: dict[int, int]) -> None:
    "A scan of ScanNet: of each number, that frame of a rendered scene."
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    K = np.eye(4)
    K[:3, :3] = scene.K
    np.savetxt(folder / "intrinsic/intrinsic_depth.txt", K)
    for number, k in ids.items():
        scene.frame(k).resize((128, 96)).save(folder / f"color/{number}.jpg")
        Image.fromarray((scene.depth[k] * 1000).round().astype(np.uint16)).save(folder / f"depth/{number}.png")
        camera = np.eye(4)
        camera[:3, :3], camera[:3, 3] = scene.R[k], scene.t[k]
        np.savetxt(folder / f"pose/{number}.txt", np.linalg.inv(camera))


def write_scannet(root: Path, scenes) -> None:
    "ScanNet-1500 with two pairs of one scan, and three other scans; of four rendered scenes with five frames."
    for name, i in (("scannet_test_1500/scene0707_00", 0), ("scans/scene0000_00", 1), ("scans/scene0001_00", 2), ("scans/scene0002_01", 3)):
        _write_scan(root / name, scenes.scene(i), {0: 0, 15: 1, 30: 2, 105: 4})
    np.savez(root / "test.npz", name=np.array([[707, 0, 15, 105], [707, 0, 0, 30]], np.uint16), score=np.ones(2))


def _quaternion(R: np.ndarray) -> tuple:
    w = np.sqrt(max(0, 1 + np.trace(R))) / 2
    return w, *(np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / (4 * w))


def _write_model(root: Path, number: str, scene, model: Path, photos: Path) -> None:
    "Three photographs of a scene: 0 and 1 share both of their points, 2 sees only one of its own. Photograph 3 has no depth."
    import h5py
    dense = root / f"phoenix/S6/zl548/MegaDepth_v1/{number}/dense0/depths"
    for folder in (dense, model, photos):
        folder.mkdir(parents=True)
    (K, (h, w)) = scene.K, scene.depth.shape[1:]
    (model / "cameras.txt").write_text(f"1 PINHOLE {w} {h} {K[0, 0]} {K[1, 1]} {K[0, 2] + .5} {K[1, 2] + .5}\n")
    seen, lines = {0: (1, 2), 1: (1, 2), 2: (3,), 3: (1, 2)}, []
    for k, points in seen.items():
        lines += [" ".join(map(str, (k + 1, *_quaternion(scene.R[k]), *scene.t[k], 1, f"{k}.jpg"))), " ".join(f"{p}.0 {p}.0 {p}" for p in points)]
        scene.frame(k).save(photos / f"{k}.jpg")
        if k < 3:
            with h5py.File(dense / f"{k}.h5", "w") as file:
                file["depth"] = scene.depth[k]
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    (model / "points3D.txt").write_text("".join(f"{p} 0 0 {p} 9 9 9 .1 " + " ".join(f"{k + 1} {points.index(p)}" for k, points in seen.items() if p in points) + "\n" for p in (1, 2, 3)))


def write_megadepth(root: Path, scenes) -> None:
    "MegaDepth: its two test scenes and two others, half of them undistorted; of four rendered scenes. Needs h5py; reading it needs pycolmap."
    for i, number in enumerate(("0001", "0015", "0022", "0300")):
        undistorted = i % 2
        model = root / (f"Undistorted_SfM/{number}/sparse" if undistorted else f"MegaDepth_v1_SfM/{number}/sparse/manhattan/0")
        photos = root / (f"Undistorted_SfM/{number}/images" if undistorted else f"phoenix/S6/zl548/MegaDepth_v1/{number}/dense0/imgs")
        _write_model(root, number, scenes.scene(i), model, photos)
