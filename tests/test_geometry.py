"The DPT head: the recorded output of the published one, names both ways, shapes, gradients, errors, and that it can learn."
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mae_repro.evaluation.geometry import DPTHead, Fusion, binocular_hooks, double, dpt_to_ours, dpt_to_published, monocular_hooks
from mae_repro.methods.croco import CroCo, binocular_features, monocular_features

SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
VECTOR = SHARED / "golden/evaluation/croco_misc.safetensors"
SMALL = dict(layer_dims=(4, 6, 8, 10), feature_dim=8, last_dim=4)


def tokens(dims, l, b=2):
    return [torch.randn(b, l, d, generator=torch.Generator().manual_seed(i)) for i, d in enumerate(dims)]


@pytest.fixture
def recorded():
    if not VECTOR.is_file():
        pytest.skip("needs golden/evaluation/croco_misc.safetensors of the shared folder (MAE_REPRO_SHARED)")
    with safe_open(VECTOR, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        return tensors, json.loads(file.metadata()["config"])["dpt"]


def test_head_as_published(recorded):
    t, c = recorded
    state = {k.removeprefix("weights/dpt."): v for k, v in t.items() if k.startswith("weights/dpt.")}
    head = DPTHead(c["dim_tokens_enc"], c["hooks"], c["patch_size"], c["layer_dims"], c["feature_dim"], c["last_dim"], c["num_channels"])
    head.load_state_dict(dpt_to_ours(state))
    pred = head([t[f"in/dpt_tokens{i}"] for i in range(4)], (2, 4))
    torch.testing.assert_close(pred, t["out/dpt"], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):  # that was no accident: tokens one place on give other numbers
        torch.testing.assert_close(head([t[f"in/dpt_tokens{i}"].roll(1, 1) for i in range(4)], (2, 4)), t["out/dpt"], atol=1e-5, rtol=0)
    back = dpt_to_published(head.state_dict())
    assert back.keys() == state.keys()
    different = [k for k in state if not torch.equal(back[k], state[k])]
    assert different and all(k.startswith("scratch.refinenet4.resConfUnit1.") and back[k].abs().max() == 0 for k in different)


def test_names_travel_both_ways():
    head = DPTHead((8, 8, 6, 6), (0, 1, 2, 3), **SMALL)
    published = dpt_to_published(head.state_dict())
    assert torch.equal(published["act_3_postprocess.0.weight"], published["act_postprocess.2.0.weight"])
    assert torch.equal(published["scratch.layer4_rn.weight"], head.narrow[3].weight)
    ours = dpt_to_ours(published)
    assert ours.keys() == head.state_dict().keys() and all(torch.equal(v, ours[k]) for k, v in head.state_dict().items())
    with pytest.raises(KeyError, match="scratch.layer_rm"):
        dpt_to_ours(published | {"scratch.layer_rm.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("patch_size, grid", [(16, (2, 4)), (8, (4, 2)), (14, (2, 2))])
def test_shapes(patch_size, grid):
    head = DPTHead((8, 8, 6, 6), (0, 1, 3, 4), patch_size, num_channels=3, **SMALL)
    layers = tokens((8, 8, 1, 6, 6), grid[0] * grid[1])
    assert [tuple(m.shape[-2:]) for m in head.maps(layers, grid)] == [tuple(int(s * g) for g in grid) for s in (4, 2, 1, .5)]
    assert head(layers, grid).shape == (2, 3, grid[0] * patch_size, grid[1] * patch_size)
    assert head(layers, grid)[1:].allclose(head([x[1:] for x in layers], grid), atol=1e-5)


def test_default_sizes():
    with torch.device("meta"):
        head = DPTHead((1024, 768, 768, 768), binocular_hooks(24, 12))
    assert [tuple(p.weight.shape[:2]) for p in head.project] == [(96, 1024), (192, 768), (384, 768), (768, 768)]
    assert tuple(head.reduce.weight.shape) == (128, 256, 3, 3) and head.head[-1].weight.shape == (1, 128, 1, 1)


def test_gradient_reaches_every_weight_and_every_layer():
    head, layers = DPTHead((8, 8, 6, 6), (0, 1, 2, 3), **SMALL), [x.requires_grad_() for x in tokens((8, 8, 6, 6), 8)]
    head(layers, (2, 4)).square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert all(x.grad.abs().max() > 0 for x in layers)


def test_fusion_by_hand():
    torch.manual_seed(0)
    deepest, stage = Fusion(4, deepest=True), Fusion(4)
    assert deepest.side is None
    low, high = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 6, 6)
    unit = lambda u, x: x + u.conv2(u.conv1(x.relu()).relu())
    first = deepest.out(double(unit(deepest.refine, low)))
    torch.testing.assert_close(deepest(low), first, atol=1e-5, rtol=0)
    torch.testing.assert_close(stage(high, first), stage.out(double(unit(stage.refine, first + unit(stage.side, high)))), atol=1e-5, rtol=0)


def test_hooks():
    assert binocular_hooks(24, 12) == (23, 27, 31, 35) and binocular_hooks(12, 12) == (11, 15, 19, 23) and binocular_hooks(12, 8) == (10, 13, 16, 19)
    assert monocular_hooks(12) == (2, 5, 8, 11) and monocular_hooks(24) == (5, 11, 17, 23) and monocular_hooks(4) == (0, 1, 2, 3)
    for depth in range(4, 33):
        hooks = monocular_hooks(depth)
        assert len(set(hooks)) == 4 and hooks[-1] == depth - 1 and max(b - a for a, b in zip(hooks, hooks[1:])) - min(b - a for a, b in zip(hooks, hooks[1:])) <= 1
    for bad in (lambda: monocular_hooks(3), lambda: binocular_hooks(12, 0), lambda: binocular_hooks(1, 2), lambda: binocular_hooks(0, 3)):
        with pytest.raises(ValueError, match="depth"):
            bad()


@pytest.mark.parametrize("change, word", [(dict(grid=(1, 8)), "odd side"), (dict(grid=(8, 1)), "8 x 1"), (dict(layers=3), "hook 3"), (dict(grid=(2, 2)), "layer 0"),
                                          (dict(dims=(8, 8, 6, 7)), "layer 3")])
def test_errors(change, word):
    layers = tokens(change.get("dims", (8, 8, 6, 6)), 8)
    with pytest.raises(ValueError, match=word):
        DPTHead((8, 8, 6, 6), (0, 1, 2, 3), **SMALL)(layers[:change.get("layers", 4)], change.get("grid", (2, 4)))


@pytest.mark.parametrize("name, change", [("dim_tokens", dict(dim_tokens=(8,))), ("hooks", dict(hooks=(0, 1))), ("layer_dims", dict(layer_dims=(4, 4, 4)))])
def test_four_of_each(name, change):
    with pytest.raises(ValueError, match=name):
        DPTHead(**dict(dim_tokens=(8, 8, 6, 6), hooks=(0, 1, 2, 3)) | SMALL | change)


def test_on_croco():
    "The lists of CroCo's taps fit the head: both views, and the encoder alone."
    model = CroCo(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, decoder_embed_dim=8, decoder_depth=3, decoder_num_heads=2, positions="rope").build().eval()
    first, second = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = DPTHead((16, 8, 8, 8), binocular_hooks(4, 3), 8, **SMALL)
    assert both(binocular_features(model, first, second), (4, 4)).shape == (2, 1, 32, 32)
    assert both.hooks == (3, 4, 5, 6)
    alone = DPTHead((16,) * 4, monocular_hooks(4), 8, **SMALL)
    assert alone(monocular_features(model, first), (4, 4)).shape == (2, 1, 32, 32)


def test_learns_a_picture():
    torch.manual_seed(0)
    head, layers = DPTHead((8, 8, 6, 6), (0, 1, 2, 3), 8, **SMALL), tokens((8, 8, 6, 6), 16)
    truth = torch.linspace(-1, 1, 32).expand(2, 1, 32, 32) * torch.tensor([1., -1.]).view(2, 1, 1, 1)
    optimiser, losses = torch.optim.Adam(head.parameters(), 1e-2), []
    for _ in range(40):
        loss = (head(layers, (4, 4)) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < .3 * losses[0]
