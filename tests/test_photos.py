"""Image files of every kind, folders of every layout, and samples that depend on nothing but (seed, epoch, index)."""
import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.parts.weights import UserError
from mae_repro.views import photos, samples
from mae_repro.views.photos import BrokenImage, Crops, EvalCrop, SingleCrop, load_image, open_images, parts_of
from mae_repro.views.samples import EpochBatches, Views, loader

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MAE_REPRO_SHARED", ROOT.parent / "shared"))


def picture(w=40, h=30, seed=0):
    "A smooth colour image, so that lossy formats stay close."
    y, x = np.mgrid[:h, :w]
    shift = np.random.default_rng(seed).integers(0, 100, 3)
    return Image.fromarray(np.stack([x * 3 + shift[0], y * 4 + shift[1], x + y + shift[2]], -1).clip(0, 255).astype(np.uint8))


def near(a, b, tolerance=6):
    a, b = np.asarray(a, dtype=int), np.asarray(b, dtype=int)
    return a.shape == b.shape and np.abs(a - b).mean() < tolerance


def fill(root, names, **kind):
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=k, **kind).save(path)
    return root


# ---------------------------------------------------------------- one file

def test_ordinary_kinds(tmp_path):
    image = picture()
    saved = {"a.JPG": {}, "a.png": {}, "a.webp": {}, "a.bmp": {}, "a.tiff": {}, "a.ppm": {}}
    for name, options in saved.items():
        image.save(tmp_path / name, **options)
        got = load_image(tmp_path / name)
        assert got.mode == "RGB" and near(got, image), name


def test_cmyk(tmp_path):
    picture().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert near(load_image(tmp_path / "a.jpg"), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = picture().transpose(undo[orientation]) if orientation > 1 else picture()
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert near(load_image(tmp_path / "a.jpg"), picture())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    assert near(load_image(tmp_path / "a.jpg"), picture())


def test_transparency_is_put_on_white(tmp_path):
    image = picture().convert("RGBA")
    alpha = np.full((30, 40), 255, np.uint8)
    alpha[:, :20] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "rgba.png")
    image.convert("LA").save(tmp_path / "la.png")
    for name in ("rgba.png", "la.png"):
        got = np.asarray(load_image(tmp_path / name))
        assert (got[:, :20] == 255).all() and (got[:, 20:] < 255).any(), name
    assert np.array_equal(np.asarray(load_image(tmp_path / "rgba.png"))[:, 20:], np.asarray(picture())[:, 20:])


def test_palette_with_and_without_transparency(tmp_path):
    image = picture().quantize(32)
    image.save(tmp_path / "plain.png")
    assert near(load_image(tmp_path / "plain.png"), image.convert("RGB"), 1)
    image.save(tmp_path / "clear.png", transparency=image.getpixel((0, 0)))
    got = load_image(tmp_path / "clear.png")
    assert got.getpixel((0, 0)) == (255, 255, 255) and near(got.getpixel((39, 29)), image.convert("RGB").getpixel((39, 29)), 1)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, name):
    grey = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    got = np.asarray(load_image(tmp_path / name)).astype(int)
    assert (got[..., 0] == got[..., 2]).all() and np.abs(got[..., 0] - np.round(grey / 257)).max() <= 1


def test_floats_and_bilevel(tmp_path):
    Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)).save(tmp_path / "f.tif")
    got = np.asarray(load_image(tmp_path / "f.tif"))
    assert got.min() == 0 and got.max() == 255
    picture().convert("1").save(tmp_path / "b.png")
    assert set(np.unique(np.asarray(load_image(tmp_path / "b.png")))) <= {0, 255}


def test_grey(tmp_path):
    picture().convert("L").save(tmp_path / "a.png")
    assert near(load_image(tmp_path / "a.png"), picture().convert("L").convert("RGB"), 1)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    picture().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (40, 30), "red")] * 2)
    assert near(load_image(tmp_path / name), picture(), 16)


def broken_files(folder):
    whole = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(whole, "png")
    jpeg = io.BytesIO()
    noise.save(jpeg, "jpeg")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    files = {
        "empty.jpg": b"", "text.png": b"not an image at all", "truncated.jpg": jpeg.getvalue()[:len(jpeg.getvalue()) // 2],
        "truncated.png": whole.getvalue()[:600], "damaged.png": whole.getvalue()[:60] + b"\0" * 200 + whole.getvalue()[260:],
        "bomb.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    return [*files, "gone.png"]


def test_broken_files(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(BrokenImage) as caught:
            load_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name) and caught.value.reason, name
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.path, again.reason, str(again)) == (caught.value.path, caught.value.reason, str(caught.value))
    with pytest.raises(BrokenImage, match="the file is empty"):
        load_image(b"", "this one")


# ---------------------------------------------------------------- layouts

def test_built_in(monkeypatch):
    images = open_images()
    assert [images.name(i) for i in range(len(images))] == ["astronaut", "chelsea", "coffee", "rocket", "motorcycle_left"]
    assert images.load(1).size == (451, 300) and images.labels is None and len(open_images(None, "train", 2)) == 2
    monkeypatch.setattr(photos, "PHOTOGRAPHS", ("no_such_picture.png",))
    with pytest.raises(UserError, match="no_such_picture.png"):
        open_images()


def test_folder_with_classes(tmp_path):
    fill(tmp_path, ["b/1.png", "a/deep/er/2.JPEG", "a/1.Png", "b/.hidden.png", ".cache/x.png"])
    (tmp_path / "a/notes.txt").write_text("x")
    images = open_images(tmp_path)
    assert [os.path.relpath(images.name(i), tmp_path) for i in range(3)] == [os.path.join("a", "1.Png"), os.path.join("a", "deep", "er", "2.JPEG"), os.path.join("b", "1.png")]
    assert images.labels == [0, 0, 1] and images.class_names == ("a", "b") and len(images) == 3
    assert open_images(tmp_path, "train").labels == images.labels
    with pytest.raises(UserError, match="no test images"):
        open_images(tmp_path, "test")


def test_folder_without_classes_has_no_labels(tmp_path):
    assert open_images(fill(tmp_path, ["a/1.png", "2.png"])).labels is None


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "real", ["1.png"])
    fill(tmp_path / "data", ["a/1.png"])
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/b").symlink_to(tmp_path / "real")
    (tmp_path / "data/c").symlink_to(tmp_path / "real")
    images = open_images(tmp_path / "data")
    assert len(images) == 2 and images.class_names == ("a", "b")


def test_nothing_is_decoded_on_opening(tmp_path, monkeypatch):
    fill(tmp_path, ["a/1.png", "b/1.png"])
    monkeypatch.setattr(photos, "load_image", lambda *_: pytest.fail("decoded"))
    assert len(open_images(tmp_path)) == 2


def test_imagenet_layout(tmp_path):
    fill(tmp_path, ["train/a/1.png", "train/b/1.png", "train/c/1.png", "val/a/9.png", "val/c/9.png", "test/unknown.png", "devkit/readme.png"])
    train, val, test = (open_images(tmp_path, split) for split in ("train", "val", "test"))
    assert len(open_images(tmp_path)) == len(train) == 3 and train.labels == [0, 1, 2]
    assert val.labels == [0, 2] and val.class_names == train.class_names == ("a", "b", "c")
    assert test.names.tolist() == val.names.tolist()  # ImageNet's test folder has no classes


def test_other_classes_in_the_test_part_are_not_renumbered(tmp_path):
    fill(tmp_path, ["train/a/1.png", "train/b/1.png", "val/images/9.png"])
    assert open_images(tmp_path, "val").class_names == ("images",)


def test_a_split_that_is_not_there(tmp_path):
    fill(tmp_path, ["val/a/1.png"])
    assert len(open_images(tmp_path, "test")) == len(open_images(tmp_path)) == 1
    with pytest.raises(UserError, match="no train images"):
        open_images(tmp_path, "train")


def test_a_class_called_train(tmp_path):
    assert open_images(fill(tmp_path, ["train/1.png", "plane/1.png"])).class_names == ("plane", "train")


def cifar(folder, protocol=2, **change):
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for k, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        part = slice(2 * k, 2 * k + 2)
        batch = {b"data": pixels[part].reshape(2, -1), b"labels": [k, 0], b"filenames": [b"x.png", b"y.png"], **change}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog", "frog"]}, protocol=protocol))
    return pixels


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_pickles(tmp_path, protocol):
    pixels = cifar(tmp_path, protocol)
    train, test = open_images(tmp_path), open_images(tmp_path / "cifar-10-batches-py", "val")
    assert train.labels == [0, 0, 1, 0] and test.labels == [2, 0] and test.class_names == ("cat", "dog", "frog")
    assert np.array_equal(np.asarray(train.load(3)), pixels[3].transpose(1, 2, 0)) and np.array_equal(np.asarray(test.load(0)), pixels[4].transpose(1, 2, 0))
    assert train.name(3) == "data_batch_2:y.png"


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_cifar_pickles_run_no_code(tmp_path):
    cifar(tmp_path, extra=Attack())
    with pytest.raises(UserError, match=r"data_batch_1 is not a file of CIFAR-10: it wants to call \w+\.exec"):
        open_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"rubbish", pickle.dumps([1]), pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}), pickle.dumps({b"labels": [1]})])
def test_damaged_cifar(tmp_path, content):
    cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(content)
    with pytest.raises(UserError, match="CIFAR-10"):
        open_images(tmp_path)


def archive(path, classes, seed=0, **change):
    files = []
    for k, _ in enumerate(classes):
        file = io.BytesIO()
        picture(32, 32, seed + k).save(file, "jpeg", quality=95)
        files.append(file.getvalue())
    content = dict(jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=np.cumsum([0, *map(len, files)]), labels=np.array(classes, np.uint8),
                   names=np.array([b"n/%04d" % (seed + k) for k in range(len(classes))]), class_names=np.array(["cat", "dog"]))
    np.savez(path, **{**content, **change})


def test_npz(tmp_path):
    for number in (1, 2, 10):
        archive(tmp_path / f"toy_train_{number}.npz", [0, 1], seed=number)
    archive(tmp_path / "toy_test.npz", [1, 1, 0], seed=50)
    train, test = open_images(tmp_path), open_images(tmp_path, "val")
    assert train.labels == [0, 1] * 3 and test.labels == [1, 1, 0] and train.class_names == ("cat", "dog")
    assert train.name(4) == "toy_train_10.npz:n/0010"  # by number, not by letter
    assert near(train.load(4), picture(32, 32, 10)) and near(test.load(2), picture(32, 32, 52))
    assert open_images(tmp_path, limit=3).labels == [0, 0, 0] and near(open_images(tmp_path, limit=3).load(2), picture(32, 32, 10))


def test_npz_with_one_damaged_image(tmp_path):
    archive(tmp_path / "toy_train.npz", [0, 1], jpeg=np.zeros(10_000, np.uint8))
    with pytest.raises(BrokenImage, match="toy_train.npz:n/0001"):
        open_images(tmp_path).load(1)


@pytest.mark.parametrize("change", [{"offsets": np.array([0, 10])}, {"offsets": np.array([0, 9, 1 << 40])}, {"labels": np.array([0, 7])}, {"names": np.array([b"one"])}, {"names": np.array([Attack()] * 2)}])
def test_damaged_npz(tmp_path, change):
    archive(tmp_path / "toy_train.npz", [0, 1], **change)
    with pytest.raises(UserError, match="toy_train.npz is not an image archive"):
        open_images(tmp_path)


def test_two_archives_in_one_folder(tmp_path):
    archive(tmp_path / "one_train.npz", [0])
    archive(tmp_path / "two_train.npz", [0])
    with pytest.raises(UserError, match="several data sets"):
        open_images(tmp_path)


def test_another_npz_beside_images(tmp_path):
    fill(tmp_path, ["1.png"])
    np.savez(tmp_path / "disparity.npz", np.zeros(3))
    assert len(open_images(tmp_path)) == 1


def test_limit_is_balanced(tmp_path):
    fill(tmp_path, [f"{c}/{i}.png" for c in "abcd" for i in range(5)], w=4, h=4)
    images = open_images(tmp_path, limit=8)
    assert images.labels == [0, 0, 1, 1, 2, 2, 3, 3] and len(open_images(tmp_path, limit=100)) == 20
    assert len({images.name(i) for i in range(8)}) == 8


def test_errors_of_opening(tmp_path):
    with pytest.raises(UserError, match="missing"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file, not a folder"):
        open_images(tmp_path / "file")
    with pytest.raises(UserError, match=r"no images in .*\.jpeg.* saw 1 other files"):
        open_images(tmp_path)
    for limit in (0, -3):
        with pytest.raises(UserError, match=f"data.limit {limit}"):
            open_images(None, limit=limit)
    with pytest.raises(UserError, match="'dev' is unknown"):
        open_images(None, "dev")
    with pytest.raises(UserError, match="no test images in the built-in"):
        open_images(None, "test")


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr(photos.os, "scandir", refuse)
    for look in (open_images, parts_of):
        with pytest.raises(UserError, match=f"cannot read {tmp_path}: Permission denied"):
            look(tmp_path)


def test_parts(tmp_path):
    "Whether a part can be read does not matter to the question whether it is there."
    fill(tmp_path / "folders", ["train/a/1.png"])
    (tmp_path / "folders/valid").mkdir()
    cifar(tmp_path / "cifar")
    (tmp_path / "cifar/cifar-10-batches-py/test_batch").write_bytes(b"")
    (tmp_path / "npz").mkdir()
    for part in ("train", "test"):
        (tmp_path / f"npz/toy_{part}.npz").write_bytes(b"")
    found = {name: parts_of(tmp_path / name) for name in ("folders", "cifar", "npz", "folders/train")}
    assert found == {"folders": {"train", "val"}, "cifar": {"train", "test"}, "npz": {"train", "test"}, "folders/train": {"all"}} and parts_of("digits") == {"train", "test"}
    with pytest.raises(UserError, match="missing"):
        parts_of(tmp_path / "nowhere")


@pytest.mark.skipif(not (SHARED / "data/cifar10").is_dir(), reason="needs data/cifar10 of the shared folder (MAE_REPRO_SHARED)")
def test_real_cifar():
    train, test = open_images(SHARED / "data/cifar10", "train", 10_000), open_images(SHARED / "data/cifar10", "test")
    assert len(train) == len(test) == 10_000 and (np.bincount(train.labels) == 1000).all() and train.class_names == test.class_names
    x = np.stack([np.asarray(train.load(i)) for i in range(0, 10_000, 10)]) / 255
    assert np.abs(x.mean((0, 1, 2)) - (.4913, .4821, .4465)).max() < .02


# ---------------------------------------------------------------- crops

def test_single_crop():
    image, crop = open_images().load(0), SingleCrop(32)
    assert crop(image).shape == (1, 3, 32, 32) and crop(image).dtype == torch.uint8 and SingleCrop((32, 48))(image).shape == (1, 3, 32, 48)
    whole = SingleCrop(64, scale=(1., 1.), ratio=(1., 1.), flip=False)(image)
    assert np.abs(whole[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))).max() <= 1
    mirrored = {SingleCrop(8, (1., 1.), (1., 1.))(image).numpy().tobytes() for _ in range(20)}
    assert len(mirrored) == 2
    assert len({SingleCrop(8, (1., 1.), (1., 1.), flip=False)(image).numpy().tobytes() for _ in range(5)}) == 1
    assert SingleCrop(16)(picture(1, 500)).shape == (1, 3, 16, 16)
    assert torch.equal(*(_seeded(pickle.loads(pickle.dumps(crop)) if k else crop, image) for k in (0, 1)))


def _seeded(crop, image):
    torch.manual_seed(0)
    return crop(image)


def test_eval_crop():
    from torchvision.transforms import v2
    for size, image in ((224, picture(500, 375)), (224, picture(333, 501)), (96, picture(97, 96))):
        theirs = v2.Compose([v2.Resize(int(size * 256 / 224), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])(image)
        assert torch.equal(EvalCrop(size)(image)[0], theirs)
    same = picture(32, 32)
    assert np.array_equal(EvalCrop(32)(same)[0].permute(1, 2, 0), np.asarray(same))
    for image in (picture(500, 90), picture(90, 500), picture(7, 5)):
        assert EvalCrop((32, 64))(image).shape == (1, 3, 32, 64)


# ---------------------------------------------------------------- samples under a seed

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return open_images(fill(tmp_path_factory.mktemp("toy"), [f"{i:02}.png" for i in range(7)]))


def fetch(views, batches, workers=0):
    found = {}
    for batch in loader(views, batches, workers):
        for i, x, n in zip(batch["index"].tolist(), batch["views"], batch["noise"]):
            found[i] = x, n
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for i in a for x, y in zip(a[i], b[i]))


def test_item(toy):
    views = Views(Crops(toy, SingleCrop((16, 32))), patch_size=8, seed=3, repeats=2)
    item = views[4, 9]
    assert len(views) == 14 and item["views"].shape == (1, 3, 16, 32) and item["views"].dtype == torch.uint8 and item["index"] == 9 and item["broken"] == ""
    assert item["noise"].shape == (1, 8) and item["noise"].dtype == torch.float32 and 0 <= item["noise"].min() and item["noise"].max() < 1
    assert views.name(9) == toy.name(2)


def test_batch(toy):
    batch = next(iter(loader(Views(Crops(toy, SingleCrop(16)), 8), EpochBatches(7, 5))))
    assert batch["views"].shape == (5, 1, 3, 16, 16) and batch["noise"].shape == (5, 1, 4) and batch["index"].dtype == torch.int64 and batch["broken"] == [""] * 5


def test_every_number_of_the_key_counts(toy):
    base = Views(Crops(toy, SingleCrop(16)), 8, seed=3, repeats=2)[4, 2]
    for other in (Views(Crops(toy, SingleCrop(16)), 8, seed=4, repeats=2)[4, 2], Views(Crops(toy, SingleCrop(16)), 8, seed=3, repeats=2)[5, 2], Views(Crops(toy, SingleCrop(16)), 8, seed=3, repeats=2)[4, 9]):
        assert not torch.equal(base["views"], other["views"]) and not torch.equal(base["noise"], other["noise"])


KNOWN_SEEDS = [1443989023426359380, 2370115784609367361]
KNOWN_NOISE = [0.9780107, 0.5640650, 0.6453055, 0.7587816]
KNOWN_ORDER = [5, 9, 0, 6, 4, 8, 7, 1, 3, 2]


def test_known_values(toy):
    "Written down once: the draws may not change between versions of this project, or old runs could not be resumed."
    assert np.random.SeedSequence((3, 4, 2)).generate_state(2, np.uint64).tolist() == KNOWN_SEEDS
    noise = Views(Crops(toy, SingleCrop(16)), 8, seed=3)[4, 2]["noise"][0]
    assert torch.allclose(noise, torch.tensor(KNOWN_NOISE), atol=1e-4)
    assert EpochBatches(10, 10, seed=3).order(4).tolist() == KNOWN_ORDER


def test_the_global_generator_is_left_alone_and_does_not_matter(toy):
    views = Views(Crops(toy, SingleCrop(16)), 8)
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), views[0, 3]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    views[0, 5]
    again = views[0, 3]
    assert torch.equal(first["views"], again["views"]) and torch.equal(first["noise"], again["noise"])
    state = torch.get_rng_state()
    list(loader(views, EpochBatches(7, 7)))
    assert torch.equal(state, torch.get_rng_state())


def test_workers_batches_and_ranks_do_not_matter(toy):
    views = Views(Crops(toy, SingleCrop(16)), 8, seed=1, repeats=4)
    reference = fetch(views, [[(2, i)] for i in range(28)])
    assert equal(reference, fetch(views, [[(2, i) for i in reversed(range(28))]]))
    for workers in (0, 2):
        for batches in (EpochBatches(28, 14, epochs=1), EpochBatches(28, 4, epochs=1, accumulate=2)):
            shifted = [[(2, i) for _, i in batch] for batch in batches]
            assert equal(reference, fetch(views, shifted, workers))
    ranks = [fetch(views, [[(2, i) for _, i in batch] for batch in EpochBatches(28, 14, rank=rank, world=2)], rank) for rank in (0, 1)]
    assert equal(reference, ranks[0] | ranks[1]) and not ranks[0].keys() & ranks[1].keys()


def test_a_loader_can_be_passed_through_twice(toy):
    twice = loader(Views(Crops(toy, SingleCrop(16)), 8), EpochBatches(7, 3), workers=1)
    assert [b["index"].tolist() for b in twice] == [b["index"].tolist() for b in twice] and len(twice) == 2


# ---------------------------------------------------------------- broken images in a set

@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_reported(tmp_path, workers):
    fill(tmp_path, ["0.png", "3.png"])
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    views = Views(Crops(open_images(tmp_path), SingleCrop(16)), 8)
    broken, x = {}, {}
    for batch in loader(views, [[(0, 0), (0, 1)], [(0, 2), (0, 3)]], workers):
        broken |= dict(zip(batch["index"].tolist(), batch["broken"]))
        x |= dict(zip(batch["index"].tolist(), batch["views"]))
    assert broken == {0: "", 1: str(tmp_path / "1.png"), 2: str(tmp_path / "2.png"), 3: ""}
    whole = fill(tmp_path / "whole", ["0.png"])
    picture(seed=1).save(whole / "1.png")  # what 3.png shows
    assert torch.equal(x[1], Views(Crops(open_images(whole), SingleCrop(16)), 8)[0, 1]["views"])  # sample 1's draws, image 3


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images(tmp_path, workers):
    broken_files(tmp_path)
    with pytest.raises(UserError) as caught:
        list(loader(Views(Crops(open_images(tmp_path), SingleCrop(16)), 8), EpochBatches(7, 2), workers))
    assert str(caught.value).startswith("7 items in a row cannot be read") and "\n" not in str(caught.value)


def test_patience_is_limited(tmp_path, monkeypatch):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    picture().save(tmp_path / "9.png")
    views = Views(Crops(open_images(tmp_path), SingleCrop(16)), 8)
    assert views[0, 0]["broken"].endswith("0.png")
    monkeypatch.setattr(samples, "PATIENCE", 3)
    with pytest.raises(UserError, match="3 items in a row"):
        views[0, 0]


def test_errors_of_views(toy):
    with pytest.raises(ValueError, match="seed -1"):
        Views(Crops(toy, SingleCrop(16)), 8, seed=-1)
    with pytest.raises(ValueError, match="repeats 0"):
        Views(Crops(toy, SingleCrop(16)), 8, repeats=0)
    with pytest.raises(ValueError, match="patch_size 5"):
        Views(Crops(toy, SingleCrop(16)), 5)[0, 0]
    with pytest.raises(IndexError):
        Views(Crops(toy, SingleCrop(16)), 8)[0, 7]


# ---------------------------------------------------------------- global batches

@pytest.mark.parametrize("world,accumulate", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_parts_partition_the_global_batch(world, accumulate):
    settings = dict(length=100, batch_size=24, seed=5, epochs=3)
    whole = list(EpochBatches(**settings))
    ranks = [list(EpochBatches(**settings, rank=rank, world=world, accumulate=accumulate)) for rank in range(world)]
    assert len(whole) == len(EpochBatches(**settings)) == 12 and all(len(r) == 12 * accumulate for r in ranks)
    for step, batch in enumerate(whole):
        parts = [part for r in ranks for part in r[step * accumulate:(step + 1) * accumulate]]
        assert {len(p) for p in parts} == {24 // (world * accumulate)} and sum(parts, []) == batch


def test_an_epoch_is_a_permutation_of_its_own():
    batches = list(EpochBatches(50, 10, seed=1, epochs=3))
    epochs = [sum(batches[5 * e:5 * e + 5], []) for e in range(3)]
    assert all({k for k, _ in epoch} == {e} and sorted(i for _, i in epoch) == list(range(50)) for e, epoch in enumerate(epochs))
    assert len({tuple(i for _, i in epoch) for epoch in epochs}) == 3
    assert [i for _, i in epochs[0]] != [i for batch in EpochBatches(50, 10, seed=2) for _, i in batch]


def test_the_rest_of_an_epoch_is_dropped():
    assert [len(b) for b in EpochBatches(11, 4, epochs=2)] == [4] * 4 and EpochBatches(11, 4).steps_per_epoch == 2


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 8, 99])
def test_resuming_continues_exactly(start):
    settings = dict(length=33, batch_size=8, epochs=2, rank=1, world=2, accumulate=2)
    resumed = EpochBatches(**settings, start_step=start)
    assert list(resumed) == list(EpochBatches(**settings))[2 * start:] and len(resumed) == max(0, 2 * (8 - start))


def test_errors_of_batches():
    with pytest.raises(UserError, match="batch_size 8 is larger than the data .5 samples"):
        EpochBatches(5, 8)
    with pytest.raises(UserError, match="2 processes x 3 micro-batches"):
        EpochBatches(100, 8, world=2, accumulate=3)
    for wrong in (dict(batch_size=0), dict(batch_size=4, rank=2, world=2), dict(batch_size=4, accumulate=0)):
        with pytest.raises(ValueError):
            EpochBatches(10, **wrong)
