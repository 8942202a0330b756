"Label propagation and the three video tasks: recorded vectors, brute force, identities, tiny data sets in the real layouts, interruptions, errors."
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from scipy.io import savemat

from mae_repro.evaluation.propagation import (PatchPixels, Propagator, at_size, boundary, class_iou, confusion, contour_accuracy, davis_statistics, frame_features,
                                              frame_scores, mean_iou, pck, pck_counts, pixel_labels, propagate, region_similarity)
from mae_repro.evaluation.video_data import (Truth, input_size, joint_maps, joint_places, nearest, open_videos, prepare_frame, prepare_labels, read_frame, read_ids,
                                             read_joints, to_pixels)
from mae_repro.evaluation.video_tasks import TaskConfig, colour_table, copy_first, fingerprint, format_table, predict_masks, run_task, score_davis_predictions
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.weights import UserError, load_into

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


# ---- recorded from the published implementations

def vector(name):
    "(tensors, configuration) of one recorded file."
    path = SHARED / "golden/evaluation" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"needs golden/evaluation/{name}.safetensors of the shared folder (MAE_REPRO_SHARED)")
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata().get("config", "{}"))


def test_features_at_any_size():
    v, c = vector("evalfeat_a")
    encoder = Encoder(img_size=c["img_size"], patch_size=c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"]).eval()
    assert load_into(encoder, {k.removeprefix("weights/"): t for k, t in v.items() if k.startswith("weights/")})
    for i, size in enumerate(c["sizes"]):
        sized = at_size(encoder, size)
        assert (sized is encoder) == (size == [32, 32])
        torch.testing.assert_close(sized.pos_embed, v[f"out/{i}/pos_embed"], atol=2e-5, rtol=0)
        torch.testing.assert_close(sized.forward_features(v[f"in/{i}/img"]).detach(), v[f"out/{i}/tokens"], atol=2e-5, rtol=0)
        torch.testing.assert_close(frame_features(encoder, v[f"in/{i}/img"]), v[f"out/{i}/feat_l2"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["labelprop_a", "labelprop_b_onehot"])
def test_propagation_as_published(name):
    v, c = vector(name)
    features = F.normalize(v["in/feats"], dim=1)
    for i, case in enumerate(c["cases"]):
        for chunk in (2**28, 4000):
            soft = propagate(features, v["in/labels0"], **case, chunk_bytes=chunk)
            torch.testing.assert_close(soft, v[f"out/{i}/soft"], atol=1e-6, rtol=0)
        hard = torch.stack([pixel_labels(s, [n * c["upsample_factor"] for n in s.shape[:2]]) for s in soft])
        valid = v[f"out/{i}/hard_valid"].bool()
        assert valid.float().mean() > .9 and (hard == v[f"out/{i}/hard"])[valid].all()


def test_dino_protocol_as_published():
    v, c = vector("dino_labelprop")
    features, labels = F.normalize(v["in/feats"], dim=1), v["in/seg0"][0].permute(1, 2, 0)
    for i, case in enumerate(c["cases"]):
        soft = propagate(features, labels, case["topk"], case["neighborhood"], case["n_last_frames"], 0.1, "dino")[1:]
        torch.testing.assert_close(soft.permute(0, 3, 1, 2), v[f"out/{i}/soft"], atol=1e-6, rtol=0)
        hard = torch.stack([pixel_labels(s, v[f"out/{i}/hard"].shape[1:], stretch=True) for s in soft])
        assert (hard == v[f"out/{i}/hard"]).float().mean() > .999


def test_poses_as_published():
    v, c = vector("pose_a")
    labels = torch.from_numpy(joint_maps(v["in/points_xy_grid"].numpy(), v["in/labels0"].shape[:2], c["sigma"]))
    torch.testing.assert_close(labels, v["in/labels0"], atol=1e-6, rtol=0)
    soft = propagate(F.normalize(v["in/feats"], dim=1), labels, c["topk"], c["radius"], c["queue"], c["temperature"])
    torch.testing.assert_close(soft, v["out/soft"], atol=1e-6, rtol=0)
    places = torch.stack([joint_places(s, c["coord_topk"]) for s in soft], dim=2)
    valid = v["out/coords_valid"].bool()
    assert valid.float().mean() > .5
    torch.testing.assert_close(places[:, valid], v["out/coords"][:, valid], atol=1e-5, rtol=0)


def test_joint_maps_as_published():
    v, c = vector("jhmdbdata_a")
    size, grid = c["img_size"], v["out/lbls_resize"].shape[1:3]
    for t, expected in enumerate(v["out/lbls_resize"]):
        points = (v["in/pos_img"][:, :, t].numpy() - 1) * [[size[1] / c["width"]], [size[0] / c["height"]]] / c["patch_size"]
        np.testing.assert_allclose(joint_maps(points, grid, c["sigma"]), expected, atol=1e-6)


def test_pck_as_published():
    v, c = vector("pck_a")
    grid = c["feat_res_xy"][::-1]
    preds = [to_pixels(v[f"in/{i}/pred_grid_xy"].numpy(), grid, v["in/sizes_hw"][i].tolist()) for i in range(c["n"])]
    found = pck(preds, [v[f"in/{i}/pos_img"].numpy() - 1 for i in range(c["n"])], c["thresholds"])
    np.testing.assert_allclose(np.array(found) * 100, v["out/pck"], atol=1e-6)


def test_region_and_contour_as_published():
    v, c = vector("jf_pairs")
    for i in range(len(c["pairs"])):
        h, w = v["in/shape"][i].tolist()
        pred, truth = (np.unpackbits(v[f"in/{k}/{i}"].numpy())[:h * w].reshape(h, w).astype(bool) for k in ("pred", "gt"))
        assert abs(region_similarity(pred, truth) - v["out/J"][i].item()) < 1e-9, c["pairs"][i]
        assert math.ceil(0.008 * math.hypot(h, w)) == v["out/tolerance_px"][i]
        assert abs(contour_accuracy(pred, truth) - v["out/F"][i].item()) < 1e-9, c["pairs"][i]


def test_davis_statistics_as_published():
    v, c = vector("davis_seq")
    found = {"J": [], "F": []}
    for name in c["sequences"]:
        truth, pred = v[f"in/{name}/gt"].numpy(), v[f"in/{name}/pred"].numpy()
        truth = np.where(truth == 255, 0, truth)
        scores = zip(*(frame_scores(p, t, truth[0].max()) for p, t in zip(pred[1:-1], truth[1:-1])))
        for key, rows in zip("JF", scores):
            rows = np.stack(rows, axis=1)
            np.testing.assert_allclose(rows, v[f"out/{name}/{key}_per_frame"], atol=1e-9)
            found[key].append(davis_statistics(rows))
    for key, parts in found.items():
        for letter, stat in (("M", "mean"), ("R", "recall"), ("D", "decay")):
            np.testing.assert_allclose(np.concatenate([p[stat] for p in parts]), v[f"out/{key}_{letter}_per_object"], atol=1e-9)
    mean = np.mean([np.concatenate([p["mean"] for p in parts]).mean() for parts in found.values()])
    assert abs(mean - v["out/JF_mean"].item()) < 1e-9


def test_mean_iou_as_published():
    v, c = vector("miou_a")
    preds, truths = ([v[f"in/{i}/{k}"].numpy() for i in range(c["n"])] for k in ("pred", "gt"))
    assert (sum(confusion(p, t, c["classes"]) for p, t in zip(preds, truths)) == v["out/hist"].numpy()).all()
    mean, iou = mean_iou(preds, truths, c["classes"])
    assert abs(mean - v["out/miou"].item()) < 1e-9
    np.testing.assert_allclose(iou, v["out/iou"], atol=1e-9, equal_nan=True)


def recorded_frames(name, folder, indexed):
    "The recorded frames and ids as a video on disk, with its Truth."
    v, c = vector(name)
    images, masks = folder / "JPEGImages/480p/one", folder / "Annotations/480p/one"
    images.mkdir(parents=True), masks.mkdir(parents=True)
    for t, (frame, ids) in enumerate(zip(v["in/frames"], v["in/label_ids"])):
        Image.fromarray(frame.numpy()).save(images / f"{t:05d}.png")
        mask = Image.fromarray(ids.numpy())
        if indexed:
            mask.putpalette(v["in/palette_rgb"].numpy().ravel().tolist())
        mask.save(masks / f"{t:05d}.png")
    return v, c, open_videos("davis", folder)[0]


@pytest.mark.parametrize("name", ["vosdata_davis", "vosdata_vip"])
def test_frames_and_labels_as_published(name, tmp_path):
    v, c, video = recorded_frames(name, tmp_path, indexed=name == "vosdata_davis")
    size = input_size(tuple(c["img_size"]), v["in/frames"].shape[1:3])
    assert size == tuple(v["out/imgs"].shape[2:])
    truth = Truth(video)
    for t in range(len(video.frames)):
        torch.testing.assert_close(prepare_frame(read_frame(video, t), size), v["out/imgs"][t], atol=2e-5, rtol=0)
        assert (truth[t] == v["in/label_ids"][t].numpy()).all()
    labels, classes = prepare_labels(truth[0], truth.colours, size, c["patch_size"])
    torch.testing.assert_close(labels, v["out/lbls_resize"][0], atol=1e-6, rtol=0)
    if name == "vosdata_davis":
        assert (truth.colours[classes][:, ::-1] == v["out/lblset"].numpy()).all()


# ---- the algorithm

def unit(t=6, c=6, gh=5, gw=7, seed=0):
    return F.normalize(torch.randn(t, c, gh, gw, generator=torch.Generator().manual_seed(seed)), dim=1)


def soft_start(gh=5, gw=7, k=3, seed=1):
    return torch.rand(gh, gw, k, generator=torch.Generator().manual_seed(seed))


def propagate_loop(features, labels, topk, radius, queue, temperature, protocol="cropmae"):
    "Word for word: every slot, every place; a padded list of frames."
    t_all, _, gh, gw = features.shape
    out = [labels]
    for t in range(1, t_all):
        padded = [0] * queue + list(range(t))
        slots = [0] + padded[len(padded) - queue:] if protocol == "cropmae" else [0] + list(range(max(1, t - queue), t))
        now = torch.zeros_like(labels)
        for i in range(gh):
            for j in range(gw):
                scores, found = [], []
                for n, s in enumerate(slots):
                    for a in range(gh):
                        for b in range(gw):
                            near = math.hypot(i - a, j - b) < radius or n == 0 if protocol == "cropmae" else max(abs(i - a), abs(j - b)) <= radius
                            if near:
                                scores.append((features[t, :, i, j] * features[s, :, a, b]).sum())
                                found.append(out[s][a, b])
                best, where = torch.stack(scores).topk(min(topk, len(scores)))
                now[i, j] = (best / temperature).softmax(0) @ torch.stack(found)[where]
        out.append(now)
    return torch.stack(out)


@pytest.mark.parametrize("case", [dict(topk=7, radius=2.5, queue=3), dict(topk=4, radius=1, queue=0), dict(topk=30, radius=1, queue=2), dict(topk=1, radius=20, queue=6),
                                  dict(topk=60, radius=1.5, queue=1), dict(topk=5, radius=math.inf, queue=2)])
@pytest.mark.parametrize("chunk", [2**28, 1])
def test_fast_equals_loop(case, chunk):
    features, labels = unit(), soft_start()
    for temperature in (0.7, 0.05):
        torch.testing.assert_close(propagate(features, labels, **case, temperature=temperature, chunk_bytes=chunk), propagate_loop(features, labels, **case, temperature=temperature),
                                   atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", [dict(topk=5, radius=1, queue=2), dict(topk=50, radius=1, queue=1), dict(topk=3, radius=9, queue=9)])
def test_dino_equals_loop(case):
    features, labels = unit(), soft_start()
    for chunk in (2**28, 1):
        torch.testing.assert_close(propagate(features, labels, **case, temperature=0.1, protocol="dino", chunk_bytes=chunk),
                                   propagate_loop(features, labels, **case, temperature=0.1, protocol="dino"), atol=2e-6, rtol=0)


def test_tiles_do_not_matter_on_a_large_grid():
    features, labels = unit(4, 8, 26, 31), soft_start(26, 31)
    whole = propagate(features, labels, radius=6, queue=2)
    assert len(Propagator(features[0], labels, radius=6, queue=2).tiles) > 4
    for chunk in (10**6, 10**5, 1):
        torch.testing.assert_close(propagate(features, labels, radius=6, queue=2, chunk_bytes=chunk), whole, atol=1e-6, rtol=0)


def test_identical_frames_copy_the_labels():
    labels = soft_start()
    still = unit(1).expand(5, -1, -1, -1)
    for kwargs in (dict(topk=1), dict(topk=1, radius=1, queue=2), dict(topk=7, queue=20, radius=1), dict(topk=1, protocol="dino", radius=3)):
        result = propagate(still, labels, **kwargs)
        torch.testing.assert_close(result[1] if kwargs["topk"] == 7 else result, labels if kwargs["topk"] == 7 else labels.expand(5, -1, -1, -1), atol=1e-6, rtol=0)


def test_streaming_keeps_only_the_ring_and_leaves_its_input_alone():
    features, labels = unit(12), soft_start()
    before = features.clone(), labels.clone()
    video = Propagator(features[0], labels, queue=3, radius=2)
    steps = [video.step(f) for f in features[1:]]
    assert video.keys.shape[0] == 4
    torch.testing.assert_close(torch.stack(steps), propagate(features, labels, queue=3, radius=2)[1:], atol=0, rtol=0)
    assert (features == before[0]).all() and (labels == before[1]).all()
    later = [s.clone() for s in steps]
    video.step(features[3])
    assert all((a == b).all() for a, b in zip(steps, later))    # what was handed out is not overwritten


@pytest.mark.parametrize("name, change", [("topk", dict(topk=0)), ("temperature", dict(temperature=0)), ("radius", dict(radius=0)), ("queue", dict(queue=-1)), ("protocol", dict(protocol="x")),
                                          ("labels", dict(labels=torch.rand(5, 6, 2))), ("features", dict(features=torch.rand(3, 4, 5)))])
def test_bad_arguments_are_named(name, change):
    with pytest.raises(ValueError, match=name):
        propagate(**(dict(features=unit(), labels=soft_start()) | change))
    with pytest.raises(ValueError, match="features"):
        Propagator(unit()[0], soft_start()).step(torch.rand(6, 5, 8))


# ---- features

def test_features_of_timm_and_of_encoders_without_positions():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0).eval()
    ours = Encoder(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    assert load_into(ours, {k: t.detach() for k, t in vit.state_dict().items()})
    images, before = torch.randn(2, 3, 40, 64), vit.pos_embed.clone()
    found = frame_features(vit, images)
    assert found.shape == (2, 24, 5, 8) and found.norm(dim=1).sub(1).abs().max() < 1e-5
    torch.testing.assert_close(found, frame_features(ours, images), atol=2e-5, rtol=0)
    assert vit.pos_embed.shape == (1, 17, 24) and (vit.pos_embed == before).all() and tuple(vit.patch_embed.img_size) == (32, 32)
    assert at_size(vit, (40, 64)).blocks[0].attn.qkv.weight is vit.blocks[0].attn.qkv.weight
    bare = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=0, class_token=False,
                             pos_embed="none", global_pool="avg").eval()
    assert frame_features(bare, images).shape == (2, 24, 5, 8)
    pixels = frame_features(PatchPixels(8), images)
    assert pixels.shape == (2, 192, 5, 8)
    with pytest.raises(ValueError, match="41"):
        frame_features(PatchPixels(8), torch.zeros(1, 3, 41, 64))
    with pytest.raises(ValueError, match="patch tokens"):
        shorter = PatchPixels(8)
        shorter.forward_features = lambda x: x.flatten(2)[:, :, :5]
        frame_features(shorter, images)


# ---- scores

def disc(radius=9, dx=0, dy=0, h=40, w=60):
    y, x = np.ogrid[:h, :w]
    return (y - h // 2 - dy) ** 2 + (x - w // 2 - dx) ** 2 < radius ** 2


def test_identities_of_region_and_contour():
    mask, empty, full = disc(), np.zeros((40, 60), bool), np.ones((40, 60), bool)
    assert region_similarity(mask, mask) == contour_accuracy(mask, mask) == 1
    assert contour_accuracy(mask, ~mask) == 1 and region_similarity(mask, ~mask) == 0
    assert region_similarity(empty, empty) == contour_accuracy(empty, empty) == contour_accuracy(empty, full) == 1
    assert region_similarity(mask, empty) == contour_accuracy(mask, empty) == contour_accuracy(empty, mask) == 0
    assert contour_accuracy(disc(3, -25), disc(3, 25)) == 0
    assert region_similarity(torch.from_numpy(mask), torch.from_numpy(disc(9, 3))) == region_similarity(mask, disc(9, 3))


def test_contour_equals_loop():
    rand = np.random.default_rng(0)
    for pred, truth in [(disc(), disc(9, 2)), (disc(5), disc(6)), (rand.random((40, 60)) < .02, disc()), (rand.random((40, 60)) < .5, disc(12, 3, 2))]:
        a, b = (np.argwhere(boundary(m)) for m in (pred, truth))
        apart = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1)) <= math.ceil(.008 * math.hypot(40, 60))
        p, r = apart.any(1).mean(), apart.any(0).mean()
        assert abs(contour_accuracy(pred, truth) - 2 * p * r / (p + r)) < 1e-12


def test_bad_masks_are_named():
    mask = disc()
    for pred, truth, name in ((mask.astype(int), mask, "pred"), (mask, mask[None], "truth"), (mask, mask[:-1], "one shape")):
        for score in (region_similarity, contour_accuracy):
            with pytest.raises(ValueError, match=name):
                score(pred, truth)


def test_statistics_of_davis():
    still = davis_statistics(np.full((2, 8), .7))
    assert np.allclose(still["mean"], .7) and (still["recall"] == 1).all() and np.allclose(still["decay"], 0)
    falling = davis_statistics(np.linspace(1, 0, 300)[None])
    assert falling["decay"][0] > .7 and abs(falling["recall"][0] - .5) < .01      # no wrap beyond 256 frames
    assert davis_statistics(np.array([[.4]]))["decay"] == 0
    with pytest.raises(ValueError, match="frames"):
        davis_statistics(np.zeros((2, 0)))


def test_mean_iou_identities_and_errors():
    truth = np.arange(400).reshape(20, 20) // 80
    mean, iou = mean_iou([truth, truth], [truth, np.where(truth == 4, 255, truth)])
    assert mean == 1 and np.isfinite(iou).sum() == 5
    assert math.isclose(mean_iou([np.zeros_like(truth)], [truth])[0], .2 / 5)
    for preds, truths, name in (([truth], [], "truths"), ([truth + 20], [truth], "pred"), ([truth[0]], [truth], "pred")):
        with pytest.raises(ValueError, match=name):
            mean_iou(preds, truths)


def test_joints_there_and_back():
    points = np.array([[5., 9, 30], [4, 7, 3]])
    maps = joint_maps(points, (12, 16))
    assert maps.shape == (12, 16, 4) and not maps[..., 3].any() and maps[4, 5, 1] == 1 and np.isclose(maps[4, 6, 1], math.exp(-2))
    assert ((maps[..., 1:].sum(-1) == 0) == maps[..., 0]).all()
    back = joint_places(torch.from_numpy(maps)).numpy()
    assert np.abs(back - points)[:, :2].max() < .2 and (back[:, 2] == -1).all()
    with pytest.raises(ValueError, match="points"):
        joint_maps(np.zeros((3, 4)), (4, 4))


def test_pck_by_hand():
    truth = np.zeros((2, 3, 3))
    truth[:, 1, :] = [[30], [40]]                           # a box of diagonal 50, unit 30
    truth[:, 2, :] = [[30], [0]]
    pred = truth.copy()
    pred[0, 0, 1:] = [2.9, 3.1]                             # of joint 0: one within .1 of the unit, one not
    pred[:, 2, 1] = -1                                      # joint 2 has no prediction in frame 1: left out
    found, judged = pck_counts(pred, truth)
    assert judged.tolist() == [2, 2, 1] and found.tolist() == [[1, 2, 1], [2, 2, 1]]
    assert np.allclose(pck([pred, truth], [truth, truth]), [(3 / 4 + 1 + 1) / 3, 1])
    assert math.isnan(pck([np.full_like(truth, -1)], [truth])[0])
    with pytest.raises(ValueError, match="joints"):
        pck_counts(pred[:, :2], truth)
    with pytest.raises(ValueError, match="videos"):
        pck([], [])


def test_counts_pool_over_videos():
    a, b = np.array([[0, 1]]), np.array([[1, 1]])
    assert np.allclose(class_iou(confusion(a, b, 2) + confusion(b, b, 2)), [0, 3 / 4])


# ---- tiny data sets in the three layouts

SEQUENCES = ("cats", "dogs-2", "dogs-10")


def moving(t, n, h=64, w=96):
    "Frame t of a small film: noise with one or two bright objects that move; (RGB, ids)."
    rand = np.random.default_rng(n)
    frame = rand.integers(0, 60, (h, w, 3))
    y, x = np.mgrid[:h, :w]
    ids = np.zeros((h, w), np.uint8)
    ids[(y - 30) ** 2 + (x - 30 - 4 * t) ** 2 < 200] = 1
    if n:
        ids[48:62, 60 - 3 * t:76 - 3 * t] = 2
    frame[ids == 1], frame[ids == 2] = (230, 60, 40), (40, 90, 230)
    return frame.astype(np.uint8), ids


def films(root, frames, truth, pattern, count=4, names=SEQUENCES, white=False):
    for n, name in enumerate(names):
        (root / frames / name).mkdir(parents=True), (root / truth / name).mkdir(parents=True)
        for t in range(count):
            image, ids = moving(t, n)
            Image.fromarray(image).save(root / frames / name / (pattern % t + ".jpg"), quality=95)
            mask = Image.fromarray(np.where(ids == 1, 255, 0).astype(np.uint8) if white else ids)
            if not white:
                mask.putpalette(colour_table().ravel().tolist())
            mask.save(root / truth / name / (pattern % t + ".png"))
    return root


def davis(root, **kwargs):
    films(root, "JPEGImages/480p", "Annotations/480p", "%05d", **kwargs)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("\n".join(SEQUENCES) + "\n")
    return root


def vip(root):
    return films(root, "Images", "Annotations/Category_ids", "%012d", names=("videos2", "videos10"))


def jhmdb(root, count=4):
    for n, name in enumerate(("catch/one", "wave/two")):
        folder = root / "Rename_Images" / name
        folder.mkdir(parents=True), (root / "joint_positions" / name).mkdir(parents=True)
        for t in range(count):
            Image.fromarray(moving(t, n)[0]).save(folder / f"{t + 1:05d}.png")
        joints = np.stack([np.linspace(20, 70, 15)[:, None] + 2 * np.arange(count), np.linspace(10, 50, 15)[:, None] + 0 * np.arange(count)]) + 1
        savemat(root / "joint_positions" / name / "joint_positions.mat", {"pos_img": joints})
    return root


SMALL = TaskConfig(img_size=(64, 96), radius=4, queue=3)
quiet = dict(progress=False)


def test_davis_end_to_end(tmp_path):
    root, out = davis(tmp_path / "davis"), tmp_path / "run"
    result = run_task(PatchPixels(8), "davis", root, out, replace(SMALL, save=("strip", "gif", "predictions")), **quiet)
    assert [(r["video"], r["object"]) for r in result.rows] == [("cats", 1), ("dogs-2", 1), ("dogs-2", 2), ("dogs-10", 1), ("dogs-10", 2)]
    assert 0.5 < result.scores["J&F"] <= 1 and result.videos == 3 and result.frames == 12
    low, high = result.intervals["J&F"]
    assert low <= result.scores["J&F"] <= high
    assert math.isclose(result.scores["J_mean"], np.mean([r["J_mean"] for r in result.rows]))
    assert result.scores["J&F"] > copy_first("davis", root, config=replace(SMALL, save=()), **quiet).scores["J&F"]
    for path in ("settings.json", "finished.json", "scores.csv", "result.json", "table.txt", "strips/cats.png", "gifs/dogs-2.gif", "predictions/dogs-10/00003.png"):
        assert (out / path).stat().st_size, path
    assert json.loads((out / "result.json").read_text())["scores"] == result.scores == json.loads(json.dumps(asdict(result)))["scores"]
    table = format_table(result)
    assert "dogs-10" in table and "J&F" in table and "input size" in table and len((out / "scores.csv").read_text().splitlines()) == 6
    # what was written is what was scored: somebody else's judge would find the same
    again = score_davis_predictions(out / "predictions", root, config=replace(SMALL, scored_at="input", save=()), **quiet)
    assert again.scores == result.scores
    native = run_task(PatchPixels(8), "davis", root, None, replace(SMALL, scored_at="native"), **quiet)
    assert "given masks" in format_table(native)


def test_davis_scores_equal_the_steps_by_hand(tmp_path):
    root = davis(tmp_path)
    video = open_videos("davis", root)[1]
    frames = [prepare_frame(read_frame(video, t), (64, 96)) for t in range(4)]
    ids = [read_ids(p)[0] for p in video.truth]
    labels, classes = prepare_labels(ids[0], colour_table(), (64, 96), 8)
    soft = propagate(frame_features(PatchPixels(8), torch.stack(frames)), labels, 7, 4, 3)
    preds = [np.array(classes)[pixel_labels(s, (64, 96)).numpy()] for s in soft]
    j = np.mean([frame_scores(preds[t], ids[t], 2)[0] for t in (1, 2)], axis=0)
    result = run_task(PatchPixels(8), "davis", root, None, SMALL, sequences=["dogs-2"], **quiet)
    np.testing.assert_allclose([r["J_mean"] for r in result.rows], j, atol=1e-9)


def test_dino_predictions_equal_the_steps_by_hand(tmp_path):
    video = open_videos("davis", davis(tmp_path))[1]
    config, truth = TaskConfig("dino", img_size=(64, 96)).resolve("davis"), Truth(video)
    frames = torch.stack([prepare_frame(read_frame(video, t), (64, 96), "dino") for t in range(4)])
    labels, classes = prepare_labels(truth[0], truth.colours, (64, 96), 8, "dino")
    soft = propagate(frame_features(PatchPixels(8), frames), labels, 5, 12, 7, 0.1, "dino")
    found = np.stack(list(predict_masks(PatchPixels(8), video, truth, config)))
    by_hand, unstretched = (np.stack([np.array(classes)[pixel_labels(s, (64, 96), stretch).numpy()] for s in soft]) for stretch in (True, False))
    assert (found == by_hand).all() and (by_hand != unstretched).any()


class Watching(PatchPixels):
    "Remembers what it was given."
    def forward_features(self, images):
        self.seen = images
        return super().forward_features(images)


def test_frames_are_resized_as_scored_at_says(tmp_path):
    root, config, encoder = davis(tmp_path), TaskConfig(img_size=(48, 88), radius=4, save=()), Watching(8)
    last = Image.open(root / "JPEGImages/480p/cats/00003.jpg").convert("RGB")
    expected = dict(input=prepare_frame(last.resize((88, 48), Image.Resampling.NEAREST), (48, 88)), native=prepare_frame(last, (48, 88)))
    assert (expected["input"] - expected["native"]).abs().max() > .1
    for scored_at, image in expected.items():
        result = run_task(encoder, "davis", root, None, replace(config, scored_at=scored_at), limit=1, **quiet)
        torch.testing.assert_close(encoder.seen[0], image, atol=1e-6, rtol=0)
        assert 0 < result.scores["J_mean"] < 1


def test_davis_2016_lists_white_masks_and_folders_without_lists(tmp_path):
    root = davis(tmp_path, white=True)
    (root / "ImageSets/2017/val.txt").unlink()
    assert [v.name for v in open_videos("davis", root)] == list(SEQUENCES)       # 2 before 10
    (root / "ImageSets/480p").mkdir()
    (root / "ImageSets/480p/val.txt").write_text("".join(f"/JPEGImages/480p/{s}/{t:05d}.jpg /Annotations/480p/{s}/{t:05d}.png\n" for s in SEQUENCES[:2] for t in range(4)))
    videos = open_videos("davis", root)
    assert [v.name for v in videos] == list(SEQUENCES[:2]) and set(np.unique(Truth(videos[0])[0])) == {0, 1}
    result = run_task(PatchPixels(8), "davis", root, None, SMALL, **quiet)
    assert all(r["object"] == 1 for r in result.rows) and result.scores["J_mean"] > .4


def test_void_is_background_where_there_are_several_objects(tmp_path):
    video = open_videos("davis", davis(tmp_path))[1]
    ids, _ = read_ids(video.truth[0])
    ids[:4] = 255
    Image.fromarray(ids).save(video.truth[0])
    assert set(np.unique(Truth(video)[0])) == {0, 1, 2}


def test_vip_end_to_end(tmp_path):
    root = vip(tmp_path / "vip")
    assert [v.name for v in open_videos("vip", root)] == ["videos2", "videos10"]
    (root / "lists").mkdir()
    (root / "lists/val_videos.txt").write_text("videos10\n")
    assert [v.name for v in open_videos("vip", root)] == ["videos10"]
    (root / "lists/val_videos.txt").unlink()
    result = run_task(PatchPixels(8), "vip", root, tmp_path / "run", replace(SMALL, img_size=(128,)), **quiet)
    assert input_size((128,), (64, 96)) == (64, 128) and 0 < result.scores["mIoU"] <= 1 and result.settings["config"]["topk"] == 10
    truths = [Truth(v)[t] for v in open_videos("vip", root) for t in range(4)]
    copied = copy_first("vip", root, **quiet)
    assert math.isclose(copied.scores["mIoU"], mean_iou([Truth(v)[0] for v in open_videos("vip", root) for _ in range(4)], truths)[0])
    assert "mIoU" in format_table(result)


def test_jhmdb_end_to_end(tmp_path):
    root = jhmdb(tmp_path / "jhmdb")
    result = run_task(PatchPixels(8), "jhmdb", root, tmp_path / "run", replace(SMALL, save=("strip", "gif", "predictions")), **quiet)
    assert [r["video"] for r in result.rows] == ["catch/one", "wave/two"] and 0 <= result.scores["PCK@0.1"] <= result.scores["PCK@0.2"] <= 1
    assert np.load(tmp_path / "run/predictions/catch__one/joints.npy").shape == (2, 15, 4) and (tmp_path / "run/strips/wave__two.png").exists()
    still = copy_first("jhmdb", root, **quiet).scores
    assert still["PCK@0.2"] == 1 and still["PCK@0.1"] < 1                        # joints move 2, 4, 6 pixels; the unit is 38
    (root / "splits").mkdir()
    (root / "splits/catch_test_split1.txt").write_text("one.avi 1\n")
    (root / "splits/wave_test_split1.txt").write_text("two.avi 2\n")
    assert [v.name for v in open_videos("jhmdb", root)] == ["wave/two"]


def test_nearest_takes_the_pixel_under_the_centre():
    ramp = Image.fromarray(np.arange(60, dtype=np.uint8)[None].repeat(5, 0))
    for w in (60, 44, 97):
        assert np.asarray(nearest(ramp, (5, w)))[0].tolist() == [int((i + .5) * 60 / w) for i in range(w)]


def test_joints_are_counted_from_zero(tmp_path):
    joints = read_joints(open_videos("jhmdb", jhmdb(tmp_path))[0])
    assert joints.shape == (2, 15, 4) and np.allclose(joints[:, 0, 0], (20, 10)) and np.allclose(joints[0, -1], (70, 72, 74, 76))


def test_dino_protocol_end_to_end(tmp_path):
    root = davis(tmp_path)
    result = run_task(PatchPixels(8), "davis", root, None, TaskConfig("dino", img_size=(64,)), **quiet)
    config = result.settings["config"]
    assert (config["topk"], config["radius"], config["queue"], config["temperature"], config["scored_at"]) == (5, 12, 7, .1, "native")
    assert input_size((64,), (64, 96), "dino") == (64, 64) and input_size((480,), (480, 854), "dino") == (480, 832) and result.scores["J_mean"] > .3
    labels, classes = prepare_labels(moving(0, 1)[1], colour_table(), (64, 64), 8, "dino")
    assert labels.shape == (8, 8, 3) and set(labels.unique().tolist()) == {0, 1}


class Interrupted(PatchPixels):
    "An encoder that breaks down after some frames."
    def __init__(self, frames):
        super().__init__(8)
        self.left = [frames]

    def forward_features(self, images):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt
        return super().forward_features(images)


Interrupted.__name__ = "PatchPixels"       # the same encoder, as far as its fingerprint tells


def test_an_interrupted_run_continues(tmp_path):
    root, out = davis(tmp_path / "davis"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_task(Interrupted(6), "davis", root, out, SMALL, **quiet)             # in the middle of the second video
    assert list(json.loads((out / "finished.json").read_text())) == ["cats"] and not list(out.glob("*.tmp*"))
    counting = Interrupted(10**6)
    result = run_task(counting, "davis", root, out, SMALL, **quiet)
    assert 10**6 - counting.left[0] == 8                                         # two videos of four frames
    assert result.scores == run_task(PatchPixels(8), "davis", root, None, SMALL, **quiet).scores
    one = run_task(PatchPixels(8), "davis", root, out, SMALL, limit=1, **quiet)  # a smaller choice of a finished run
    assert one.videos == 1 and one.scores["J&F"] != result.scores["J&F"]


def test_other_settings_or_another_encoder_in_one_folder(tmp_path):
    root, out = davis(tmp_path / "davis", names=SEQUENCES[:1]), tmp_path / "run"
    run = lambda encoder, config=SMALL: run_task(encoder, "davis", root, out, config, sequences=["cats"], **quiet)  # noqa: E731
    torch.manual_seed(0)
    encoder = Encoder(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    run(encoder)
    run(encoder, replace(SMALL, save=()))                                        # what is written may differ
    with pytest.raises(UserError, match="topk 7, not 3"):
        run(encoder, replace(SMALL, topk=3))
    before = fingerprint(encoder)
    with torch.no_grad():
        encoder.blocks[0].mlp.fc1.bias[0] += 1e-3
    assert fingerprint(encoder) != before
    with pytest.raises(UserError, match="another encoder"):
        run(encoder)
    (out / "settings.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run(encoder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run_task(PatchPixels(8), "davis", root, tmp_path / "file", SMALL, sequences=["cats"], **quiet)


def test_folders_that_are_wrong(tmp_path):
    for task in ("davis", "vip", "jhmdb"):
        with pytest.raises(UserError, match="nowhere"):
            open_videos(task, tmp_path / "nowhere")
        (tmp_path / task).mkdir()
        with pytest.raises(UserError, match=task):
            open_videos(task, tmp_path / task)
    with pytest.raises(UserError, match="unknown"):
        open_videos("kitti", tmp_path)
    for folder in ("JPEGImages/480p", "Annotations/480p"):
        (tmp_path / "davis" / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="no videos"):
        open_videos("davis", tmp_path / "davis")
    (tmp_path / "davis/JPEGImages/480p/empty").mkdir()
    with pytest.raises(UserError, match="empty holds no frames"):
        open_videos("davis", tmp_path / "davis")
    root = davis(tmp_path / "good")
    with pytest.raises(UserError, match="horse"):
        open_videos("davis", root, sequences=["horse"])
    for t in (1, 2, 3):
        (root / f"Annotations/480p/dogs-2/{t:05d}.png").unlink()
    with pytest.raises(UserError, match="dogs-2: 3 of its 4 annotations are missing.*not for the first alone"):
        open_videos("davis", root)
    (root / "ImageSets/2017/val.txt").write_text("")
    with pytest.raises(UserError, match="val.txt: the list is empty"):
        open_videos("davis", root)


def test_files_that_are_damaged(tmp_path):
    root, out = davis(tmp_path / "davis"), tmp_path / "run"
    frame = root / "JPEGImages/480p/dogs-2/00002.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="video dogs-2: .*00002.jpg"):
        run_task(PatchPixels(8), "davis", root, out, SMALL, **quiet)
    frame.write_bytes(whole)
    mask = root / "Annotations/480p/dogs-10/00001.png"
    good = mask.read_bytes()
    mask.write_bytes(good[:60])
    with pytest.raises(UserError, match="video dogs-10: .*00001.png"):
        run_task(PatchPixels(8), "davis", root, out, SMALL, **quiet)
    Image.new("RGB", (96, 64)).save(mask)
    with pytest.raises(UserError, match="00001.png.*mode RGB"):
        run_task(PatchPixels(8), "davis", root, out, SMALL, **quiet)
    mask.write_bytes(good)
    assert list(json.loads((out / "finished.json").read_text())) == ["cats", "dogs-2"]
    assert run_task(PatchPixels(8), "davis", root, out, SMALL, **quiet).videos == 3
    Image.new("L", (96, 64)).save(root / "Annotations/480p/cats/00000.png")
    with pytest.raises(UserError, match="no object"):
        run_task(PatchPixels(8), "davis", root, None, SMALL, **quiet)
    (tmp_path / "preds/cats").mkdir(parents=True)
    with pytest.raises(UserError, match="00000.png"):
        score_davis_predictions(tmp_path / "preds", root, sequences=["dogs-2"], **quiet)
    positions = jhmdb(tmp_path / "jhmdb") / "joint_positions/catch/one/joint_positions.mat"
    positions.write_bytes(b"no")
    with pytest.raises(UserError, match="catch/one: .*joint_positions.mat"):
        run_task(PatchPixels(8), "jhmdb", tmp_path / "jhmdb", None, SMALL, **quiet)
    savemat(positions, {"pos_img": np.zeros((2, 15, 9))})
    with pytest.raises(UserError, match="4 frames"):
        run_task(PatchPixels(8), "jhmdb", tmp_path / "jhmdb", None, SMALL, **quiet)


@pytest.mark.parametrize("change, words", [(dict(topk=0), "topk"), (dict(temperature=0), "temperature"), (dict(protocol="other"), "protocol"), (dict(img_size=()), "img_size"),
                                           (dict(img_size=(60, 96)), "60 x 96 pixels.*for example 64 96"), (dict(save=("film",)), "film")])
def test_settings_that_cannot_work(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        run_task(PatchPixels(8), "davis", davis(tmp_path), None, replace(SMALL, **change), **quiet)
    with pytest.raises(UserError, match="limit 0"):
        run_task(PatchPixels(8), "davis", tmp_path, None, SMALL, limit=0, **quiet)
    with pytest.raises(UserError, match="davis only"):
        TaskConfig(scored_at="input").resolve("vip")


def test_table_9_is_the_default():
    keys = ("topk", "radius", "queue", "temperature", "img_size")
    assert [tuple(getattr(TaskConfig().resolve(task), k) for k in keys) for task in ("davis", "vip", "jhmdb")] == [
        (7, 20, 20, .7, (480, 880)), (10, 20, 20, .7, (880,)), (7, 20, 20, .7, (320, 320))]
    assert [input_size((880,), size) for size in ((1080, 1920), (1920, 1080), (500, 500))] == [(448, 880), (880, 448), (880, 832)]


def test_rendered_scenes_can_be_read(tmp_path):
    from mae_repro.views.layouts import write_layout
    for task in ("davis", "vip", "jhmdb"):
        write_layout(task, tmp_path / task, num=2, num_frames=3, size=(64, 96))
        result = run_task(PatchPixels(8), task, tmp_path / task, None, SMALL, **quiet)
        assert result.videos == 2 and result.frames == 6 and all(math.isfinite(s) for s in result.scores.values())
        assert "no propagation" in format_table(copy_first(task, tmp_path / task, config=replace(SMALL, save=()), **quiet))


# ---- real videos

def davis_2016():
    if not (root := SHARED / "data/davis2016_480p").is_dir():
        pytest.skip("needs data/davis2016_480p of the shared folder (MAE_REPRO_SHARED)")
    return root


def test_measured_scores_of_davis_2016():
    root, native = davis_2016(), TaskConfig(scored_at="native", save=())
    copied = copy_first("davis", root, config=native, **quiet)
    assert [round(r["J_mean"], 4) for r in copied.rows] == [.5450, .1413, .1333, .1537]
    osvos = score_davis_predictions(root / "osvos_predictions", root, union=True, **quiet)
    assert [round(r["J_mean"], 4) for r in osvos.rows] == [.9430, .7744, .5981, .8156]
    with pytest.raises(UserError, match="union of ids"):
        score_davis_predictions(root / "osvos_predictions", root, sequences=["kite-surf"], **quiet)


def test_a_real_clip_of_jhmdb(tmp_path):
    if not (root := SHARED / "data/jhmdb_clip").is_dir():
        pytest.skip("needs data/jhmdb_clip of the shared folder (MAE_REPRO_SHARED)")
    result = run_task(PatchPixels(16), "jhmdb", root, tmp_path, **quiet)
    assert result.frames == 40 and result.rows[0]["joints"] > 500 and 0 <= result.scores["PCK@0.1"] <= result.scores["PCK@0.2"] <= 1
