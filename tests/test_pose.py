"Relative pose: rotations, the essential matrix against projection, the area under the curve by brute force, pairs, controls, learning, equal seeds, errors."
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.evaluation import pose
from mae_repro.evaluation.pair_data import depth_warp, posed_splits
from mae_repro.evaluation.pose import (PoseConfig, PoseHead, compare_pose, epipolar_lines, essential, fit_pose, format_table, judge, overlap, patch_tokens, pose_auc, pose_errors, pose_figure,
                                       pose_loss, pose_scenes, rays_of, read_views, relative_pose, rotation_from_6d)
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.model import initialise_mae
from mae_repro.parts.weights import UserError
from mae_repro.views.photos import BrokenImage
from mae_repro.views.posed import PosedFrame, RenderedScenes, SceneFolders, project

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = PoseConfig(img_size=64, dim=32, depth=1, steps=4, eval_every=2, batch_size=4, val_pairs=5, test_pairs=8, samples=50)


def turn(axis, angle):
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def small_encoder(seed=0):
    torch.manual_seed(seed)
    return initialise_mae(Encoder(64, 16, 32, 1, 2)).eval()


class Moving:
    "Scenes whose pictures are one bright bar, shifted as the camera turns about y: the motion is plain to see. Frame 3 of scene 0 cannot be read if `broken`."

    def __init__(self, num=12, frames=6, broken=False, moves=True):
        rand = np.random.default_rng(0)
        self.angle, self.lost, self.moves = rand.uniform(-.3, .3, (num, frames)), {(0, 3)} if broken else set(), moves

    def __len__(self):
        return len(self.angle)

    def name(self, i):
        return f"scene {i}"

    def length(self, i):
        return self.angle.shape[1]

    def frame(self, i, k):
        if (i, k) in self.lost:
            raise BrokenImage(f"scene {i}, frame {k}", "is not a picture")
        angle, f = self.angle[i, k], 60.
        x = 31.5 + f * np.tan(angle)
        pixels = np.clip(255 - 12 * np.abs(np.arange(64) - x), 0, 255)
        R = turn((0, 1, 0), angle)
        return PosedFrame(Image.fromarray(np.repeat(np.repeat(pixels[None, :, None], 64, 0), 3, 2).astype(np.uint8)), np.array([[f, 0, 31.5], [0, f, 31.5], [0, 0, 1]]),
                          R, -R @ np.array([angle, 0, 0]) * self.moves)


def test_six_numbers_make_rotations():
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    R = rotation_from_6d(x)
    torch.testing.assert_close(R.mT @ R, torch.eye(3, dtype=torch.float64).expand_as(R))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(R[..., 0], x[:, :3] / x[:, :3].norm(dim=1, keepdim=True))   # the first column keeps its direction
    torch.testing.assert_close(rotation_from_6d(R.mT.flatten(1)[:, :6]), R)                # a rotation's own columns give it back


@pytest.mark.parametrize("degrees", [0., 1e-4, 3., 90., 179., 180.])
def test_errors_are_angles(degrees):
    R0, axis = turn((1, 2, 3), .7), (-.3, 1, .2)
    t = np.array([1., 0, 0])
    rotation, translation = pose_errors((R0 @ turn(axis, np.radians(degrees)))[None], 5 * (turn((0, 0, 1), np.radians(degrees)) @ t)[None], R0[None], t[None])
    assert rotation[0] == pytest.approx(degrees, abs=1e-5) and translation[0] == pytest.approx(degrees, abs=1e-5)
    assert pose_errors(R0[None], -t[None], R0[None], t[None], fold=True)[1][0] == pytest.approx(0, abs=1e-5)
    assert pose_errors(R0[None], 0 * t[None], R0[None], t[None])[1][0] == 90


def test_loss_is_the_chord_and_its_slope_is_finite():
    R = torch.tensor(turn((0, 1, 0), .4)[None], dtype=torch.float32)
    t, u = torch.tensor([[1., 0, 0]]), torch.tensor([[0., 1, 0]])
    a, b = pose_loss(R, u, torch.eye(3)[None], t)
    assert a.item() == pytest.approx(2 * np.sin(.2), abs=1e-4) and b.item() == pytest.approx(2 ** .5, abs=1e-4)
    same = torch.eye(3)[None].requires_grad_()
    sum(pose_loss(same, t, torch.eye(3)[None], t)).sum().backward()
    assert torch.isfinite(same.grad).all()


def by_hand(errors, threshold):
    "As SuperGlue's evaluation describes it, by quadrature over the line through (e_i, i / n)."
    e = np.sort(errors)
    xs, ys = np.r_[0, e], np.arange(len(e) + 1) / len(e)
    last = (e < threshold).sum()
    xs, ys = np.r_[xs[:last + 1], threshold], np.r_[ys[:last + 1], ys[last]]
    return sum((xs[i + 1] - xs[i]) * (ys[i] + ys[i + 1]) / 2 for i in range(len(xs) - 1)) / threshold


@pytest.mark.parametrize("n", [1, 2, 37])
def test_area_by_brute_force(n):
    errors = np.random.default_rng(n).gamma(1.5, 6, (5, n))
    expected = [[by_hand(row, t) for t in (5, 10, 20)] for row in errors]
    np.testing.assert_allclose(pose_auc(errors), expected, atol=1e-12)
    grid = (np.arange(200_000) + .5) / 1e4                                       # the staircase, integrated number by number
    many = np.random.default_rng(0).gamma(1.5, 6, 4000)
    assert pose_auc(many, (20,))[0] == pytest.approx(np.searchsorted(np.sort(many), grid).mean() / 4000, abs=2e-4)
    assert pose_auc(np.zeros(3)).tolist() == [1, 1, 1] and pose_auc(np.full(3, 90.)).tolist() == [0, 0, 0]


def test_essential_matrix_and_lines_agree_with_projection():
    scenes = RenderedScenes(1, 6, (48, 64), seed=3)
    a, b = scenes.frame(0, 0), scenes.frame(0, 5).resized((96, 80))             # two cameras
    y, x = (g.ravel() for g in np.mgrid[0:48:5, 0:64:5])
    there, _ = project(a, b, x.astype(float), y.astype(float), a.depth[y, x].astype(float))
    R, t = relative_pose(a, b)
    one, two = (np.column_stack([p, np.ones(len(p))]) @ np.linalg.inv(f.K).T for p, f in ((np.column_stack([x, y]), a), (there, b)))
    assert np.abs(np.einsum("ni,ij,nj->n", two, essential(R, t), one)).max() < 1e-10
    lines = epipolar_lines(a, b, R, 7 * t, np.column_stack([x, y]).astype(float))
    away = np.abs((lines[:, :2] * there).sum(1) + lines[:, 2]) / np.linalg.norm(lines[:, :2], axis=1)
    assert away.max() < 1e-6                                                      # pixels
    off = epipolar_lines(a, b, R, turn((0, 0, 1), .3) @ t, np.column_stack([x, y]).astype(float))
    assert np.median(np.abs((off[:, :2] * there).sum(1) + off[:, 2]) / np.linalg.norm(off[:, :2], axis=1)) > .5


def test_rays_look_through_the_middle_of_patches():
    K = np.array([[50., 0, 31.5], [0, 40, 23.5], [0, 0, 1]])
    rays = rays_of(K, (48, 64), 16)
    assert rays.shape == (12, 2)
    pixel = K @ [*rays[1 * 4 + 2], 1]                                             # row 1, column 2
    np.testing.assert_allclose(pixel, [2 * 16 + 7.5, 1 * 16 + 7.5, 1])


def test_displacements_of_a_shifted_picture():
    "Tokens moved by one column: the matches say so wherever there is one."
    head, gh, gw = PoseHead(64, 32), 4, 8
    tokens = torch.randn(1, gh, gw, 64, generator=torch.Generator().manual_seed(0)) * 30
    pair = torch.stack([tokens, tokens.roll(1, dims=2)], dim=1).flatten(2, 3)
    rays = torch.tensor(rays_of(np.array([[64., 0, 63.5], [0, 64, 31.5], [0, 0, 1]]), (64, 128), 16), dtype=torch.float32).expand(1, 2, -1, -1)
    with torch.no_grad():
        head.log_sharpness.fill_(np.log(100))
    moved = head.displacements(head.norm(pair), rays)[0, 0].unflatten(0, (gh, gw))
    torch.testing.assert_close(moved[:, :-1, 0], torch.full((gh, gw - 1), .25), atol=1e-3, rtol=0)
    torch.testing.assert_close(moved[:, :-1, 1], torch.zeros(gh, gw - 1), atol=1e-3, rtol=0)
    wide = torch.stack([rays[:, 0], 2 * rays[:, 1]], dim=1)                        # the second camera has half the focal length
    moved, own = head.displacements(head.norm(pair), wide)[0, 0].unflatten(0, (gh, gw)), rays[0, 0].unflatten(0, (gh, gw))
    torch.testing.assert_close(moved[:, :-1, :2], 2 * own[:, 1:] - own[:, :-1], atol=3e-3, rtol=0)


def test_overlap_of_frames():
    scenes = RenderedScenes(1, 6, 48, seed=2)
    a, b, c = (scenes.frame(0, k) for k in (0, 1, 5))
    assert overlap(a, a) > .9 and overlap(a, b) == overlap(b, a) and 1 > overlap(a, b) > overlap(a, c) > .3
    assert overlap(a, c, 10) == min(depth_warp(a, c, (10, 10))[1].mean(), depth_warp(c, a, (10, 10))[1].mean()) != max(depth_warp(a, c, (10, 10))[1].mean(), depth_warp(c, a, (10, 10))[1].mean())
    with pytest.raises(UserError, match="min_overlap"):
        overlap(a, replace(b, depth=None))


def test_pairs_motion_and_draws():
    scenes = RenderedScenes(3, 5, 32, seed=1)
    config = replace(CONFIG, img_size=32, max_frames=3)
    views = read_views(scenes, [2, 0], 16, config, progress=False)
    assert views.pixels.shape == (6, 3, 32, 32) and views.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]
    R, t = views.motion(np.array([[3, 5], [5, 3]]))
    true_R, true_t = relative_pose(scenes.frame(0, 0), scenes.frame(0, 4))
    np.testing.assert_allclose(R[0], true_R)
    np.testing.assert_allclose(t[0], true_t / np.linalg.norm(true_t))
    np.testing.assert_allclose(R[1], R[0].T, atol=1e-12)
    np.testing.assert_allclose(t[1], -R[0].T @ t[0], atol=1e-12)
    drawn = views.draw(6, np.random.default_rng(0))
    assert sorted(map(tuple, np.sort(drawn, 1))) == sorted(map(tuple, views.pairs))
    frames = [scenes.frame(0, k) for k in (0, 2, 4)]
    shares = {(j, k): overlap(frames[j], frames[k]) for j, k in ((0, 1), (0, 2), (1, 2))}
    middle = sorted(shares.values())[1]
    chosen = read_views(scenes, [0], 16, replace(config, min_overlap=middle), progress=False).pairs
    assert sorted(map(tuple, chosen.tolist())) == sorted(pair for pair, share in shares.items() if share >= middle)
    with pytest.raises(UserError, match="min_overlap"):
        read_views(scenes, [0], 16, replace(config, min_overlap=1.), progress=False)
    with pytest.raises(UserError, match="moved"):
        read_views(Moving(2, moves=False), [0], 16, CONFIG, progress=False)


def test_pairs_are_drawn_both_ways_round():
    views = read_views(Moving(3), range(3), 16, CONFIG, progress=False)
    drawn = views.draw(1000, np.random.default_rng(0))
    assert .4 < (drawn[:, 0] < drawn[:, 1]).mean() < .6
    small = views.draw(len(views.pairs), np.random.default_rng(1))                # without replacement too
    assert .2 < (small[:, 0] < small[:, 1]).mean() < .8 and len({tuple(sorted(pair)) for pair in small.tolist()}) == len(views.pairs)


def test_unreadable_pictures_are_skipped_wherever_they_are(caplog):
    views = read_views(Moving(2, broken=True), [0], 16, CONFIG, progress=False)
    assert len(views.pixels) == 5 and "frame 3" in caplog.text and views.scene.tolist() == [0] * 5
    scenes, test = Moving(4), Moving(2)
    test.lost = {(0, 0), (0, 5)}                                                  # the ends of the first test scene
    found = compare_pose(small_encoder(), scenes, test, config=CONFIG, progress=False)
    a, b = found.example
    for frame, k in ((a, 1), (b, 4)):
        assert np.array_equal(np.array(frame.image), np.array(test.frame(0, k).image))
        np.testing.assert_allclose(np.r_[frame.R.ravel(), frame.t, frame.K.ravel()], np.r_[test.frame(0, k).R.ravel(), test.frame(0, k).t, test.frame(0, k).K.ravel()])
    assert len(pose_figure(found.rows, (a, b, *found.reader(a, b))).axes) == 3


def test_scenes_are_split_without_meeting():
    for count in (3, 4, 10, 57):
        parts = pose_scenes(count, 0)
        assert sorted(sum(parts, [])) == list(range(count)) and all(parts)
    assert pose_scenes(10, 0) == pose_scenes(10, 0) != pose_scenes(10, 1)
    for count in (2, 3, 10):
        train, val, test = pose_scenes(count, 0, test=False)
        assert sorted(train + val) == list(range(count)) and train and val and test == []
    with pytest.raises(UserError, match="at least 3"):
        pose_scenes(2, 0)
    scenes = RenderedScenes(10, 2, 32, seed=1)                                    # match and pose ask about the same scenes
    for seed in range(3):
        asked = {i for i, _, _ in posed_splits(scenes, (0, 0, 4), (.01, 1.), seed).test.index}
        assert asked and asked <= set(pose_scenes(10, seed)[2])


def test_training_validation_and_test_see_different_scenes(monkeypatch):
    fit, judged = [], []
    monkeypatch.setattr(pose, "fit_pose", lambda encoder, train, val, *more: fit.append((train, val)) or fit_pose(encoder, train, val, *more))
    monkeypatch.setattr(pose, "judge", lambda name, said, truth, scene, *more: judged.append(scene) or judge(name, said, truth, scene, *more))
    compare_pose(small_encoder(), Moving(10), config=CONFIG, progress=False)
    train, val = (set(views.scene.tolist()) for views in fit[0])
    test = set(np.concatenate(judged).tolist())
    assert (sorted(train), sorted(val)) == pose_scenes(10, 0)[:2] and test and not train & val and not (train | val) & test
    fit.clear()
    compare_pose(small_encoder(), Moving(10), Moving(2), config=CONFIG, progress=False)
    train, val = (set(views.scene.tolist()) for views in fit[0])
    assert train | val == set(range(10)) and not train & val


def test_the_best_head_is_kept_not_the_last():
    encoder, scenes = small_encoder(), Moving(6)
    train = read_views(scenes, range(6), 16, CONFIG, progress=False)
    val = replace(train, R=train.R.swapaxes(1, 2), t=-train.t)                    # what training teaches is wrong here: the error must grow
    for tune in (False, True):
        config = replace(CONFIG, steps=30, eval_every=1, lr=3e-3, val_pairs=20, tune=tune)
        reader, history = fit_pose(encoder, train, val, config, progress=False)
        errors = [h["val"] for h in history]
        assert errors[-1] > min(errors) + 1                                       # else last and best cannot be told apart
        pairs = val.draw(config.val_pairs, np.random.default_rng((config.seed, 2)))
        assert np.median(np.maximum(*pose_errors(*reader.read(val, pairs), *val.motion(pairs)))) == pytest.approx(min(errors), abs=1e-3)


@pytest.mark.parametrize("tune, said", [(False, "a lower lr than 1e\\+30$"), (True, "a lower lr than 1e\\+30, or a lower encoder_lr than 1e\\+30, or leave out --tune$")])
def test_a_head_that_diverges_is_one_line(tune, said):
    views = read_views(Moving(2), range(2), 16, CONFIG, progress=False)
    with pytest.raises(UserError, match="the pose head diverged: give " + said):
        fit_pose(small_encoder(), views, views, replace(CONFIG, tune=tune, lr=1e30, encoder_lr=1e30), progress=False)


def test_same_seed_same_head_and_the_encoder_is_left_alone():
    encoder, scenes = small_encoder(), Moving(4)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    views = read_views(scenes, range(4), 16, CONFIG, progress=False)
    for tune in (False, True):
        runs = []
        for noise in (1, 2):
            torch.manual_seed(noise)                                              # what else was drawn does not matter
            runs.append(fit_pose(encoder, views, views, replace(CONFIG, tune=tune), progress=False))
        (one, h1), (two, h2) = runs
        assert h1 == h2 and all(torch.equal(x, y) for x, y in zip(one.head.state_dict().values(), two.head.state_dict().values()))
        changed = any(not torch.equal(v, before[k]) for k, v in one.encoder.state_dict().items())
        assert changed == tune and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    other = fit_pose(encoder, views, views, replace(CONFIG, seed=1), progress=False)[1]
    assert other != fit_pose(encoder, views, views, CONFIG, progress=False)[1]


def test_it_learns_what_can_be_seen():
    "A turn that shows as a shift: the reader is far better than no motion and than the mean motion, on scenes that it never saw."
    config = replace(CONFIG, steps=150, eval_every=50, batch_size=16, depth=1, lr=3e-3, test_pairs=60)
    found = compare_pose(small_encoder(), Moving(30), config=config, progress=False)
    by = {r.encoder: r for r in found.rows}
    assert list(by) == ["encoder", "mean motion", "same camera"] and by["same camera"].translation[0] == 90
    assert by["encoder"].rotation[0] < .5 * by["same camera"].rotation[0] and by["encoder"].error[0] < .5 * by["mean motion"].error[0]
    R, t = found.reader(*found.example)
    assert R.shape == (3, 3) and np.linalg.norm(t) == pytest.approx(1, abs=1e-5)


def test_rendered_scenes_end_to_end():
    found = compare_pose(small_encoder(), RenderedScenes(5, 4, 64, seed=1), RenderedScenes(2, 4, 64, seed=9), lambda: small_encoder(1), CONFIG, progress=False)
    assert [r.encoder for r in found.rows] == ["encoder", "untrained", "mean motion", "same camera"] and all(r.pairs == 8 for r in found.rows)
    assert found.rows[0].trained_pairs == 4 * 6 and len(found.rows[0].errors) == 8
    assert "AUC@20" in format_table(found.rows) and json.loads(json.dumps(asdict(found.rows[0])))["encoder"] == "encoder"
    figure = pose_figure(found.rows, (*found.example, *found.reader(*found.example)))
    assert len(figure.axes) == 3
    views = read_views(RenderedScenes(2, 4, 64, seed=9), [0], 16, CONFIG, progress=False)
    kept = found.reader.read(views, np.array([[0, 3]]), patch_tokens(found.reader.encoder, views.pixels))
    for said, expected in zip(found.reader(*found.example), kept):
        np.testing.assert_allclose(said, expected[0], atol=1e-5)


def test_intervals_come_from_scenes():
    rand, scene = np.random.default_rng(0), np.repeat(np.arange(20), 10)
    angles = rand.gamma(3, .03, 20)[scene] + rand.gamma(1, .01, 200)              # pairs of one scene are alike
    truth = np.stack([np.eye(3)] * 200), np.tile([1., 0, 0], (200, 1))
    said = np.stack([turn((0, 1, 0), a) for a in angles]), truth[1]
    config = replace(CONFIG, samples=400)
    row = judge("x", said, truth, scene, config)
    for value, low, high in (*row.auc, row.rotation, row.error):
        assert low < value < high
    assert row.translation == pytest.approx((0, 0, 0), abs=1e-5) and row.auc[2][0] == pytest.approx(by_hand(row.errors, 20), abs=1e-4) and (row.pairs, row.scenes) == (200, 20)
    assert row.error[0] == pytest.approx(np.degrees(np.median(angles)), abs=1e-6)
    alone = judge("x", said, truth, np.arange(200), config)                       # as if each pair had a scene of its own: too narrow
    assert row.auc[2][2] - row.auc[2][1] > 2 * (alone.auc[2][2] - alone.auc[2][1])
    means = [np.mean(1 - np.degrees(np.concatenate([angles[10 * i:10 * i + 10] for i in rand.integers(20, size=20)])).clip(0, 20) / 20) for _ in range(2000)]
    np.testing.assert_allclose(row.auc[2][1:], np.quantile(means, (.025, .975)), atol=.03)
    single = judge("x", said, truth, np.zeros(200, int), config)
    assert np.isnan(single.auc[0][1:]).all() and np.isnan(single.error[1:]).all() and single.error[0] == row.error[0]
    said = format_table([single])
    assert f"{row.error[0]:.1f} -" in said and "[" not in said and "nan" not in said and "200 pairs of 1 scene;" in said


@pytest.mark.parametrize("change, said", [(dict(img_size=60), "img_size 60 is not a multiple"), (dict(steps=0), "at least 1"), (dict(batch_size=0), "at least 1"),
                                          (dict(img_size=0), "img_size 0 is not"), (dict(seed=-1), "seed -1 must not be negative"), (dict(dim=30, num_heads=4), "dim 30")])
def test_bad_settings(change, said):
    with pytest.raises(UserError, match=said):
        compare_pose(small_encoder(), Moving(4), config=replace(CONFIG, **change), progress=False)


def test_folders_of_scenes(tmp_path):
    for name, i in (("one", 0), ("two", 1), ("three", 2)):
        scene, folder = Moving(3, 3), tmp_path / name
        folder.mkdir()
        frames = [scene.frame(i, k) for k in range(3)]
        for k, frame in enumerate(frames):
            frame.image.save(folder / f"{k}.png")
        (folder / "cameras.json").write_text(json.dumps({"views": [{"file": f"{k}.png", "K": f.K.tolist(), "R": f.R.tolist(), "t": f.t.tolist()} for k, f in enumerate(frames)]}))
    rows = compare_pose(small_encoder(), SceneFolders(tmp_path), config=CONFIG, progress=False).rows
    assert rows[0].trained_pairs == 3 and rows[0].pairs == 3
