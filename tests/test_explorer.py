"The explorer without a browser: places of tokens against attention computed by hand, state, pictures, and the widgets played by messages."
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.analysis.attention import attention_names, cross_view_maps, record
from mae_repro.analysis.explorer import (Explorer, Instrument, Look, PatientEncoder, as_bytes, as_png, attention_pictures, contribution_pictures, explore, explorer_figure, mask_pictures, panels,
                                         pictures_to_explore, recordable, row_of, run_pass, short_name, token_places)
from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.methods.mum import MuM
from mae_repro.methods.siamese import SiamMAE
from mae_repro.parts.encoder import encode_views
from mae_repro.parts.masking import Masks, RandomMasking
from mae_repro.parts.model import paint
from mae_repro.parts.patches import denormalise
from mae_repro.parts.weights import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
METHODS = {"mae": (MAE, 1), "crossmae": (CrossMAE, 1), "siammae": (SiamMAE, 2), "croco": (CroCo, 2), "cdgmae": (CDGMAE, 4), "mum": (MuM, 3)}
both = pytest.mark.parametrize("kind, v", METHODS.values(), ids=METHODS)


def small(kind=MAE, **more):
    torch.manual_seed(0)
    model = kind(**SMALL | more).build().eval()
    for p in model.parameters():                      # away from the even attention of fresh weights
        p.data += .15 * torch.randn_like(p)
    return model


def pictures(v=1, size=(32, 32)): return torch.randn(v, 3, *size, generator=torch.Generator().manual_seed(1))


def masks_for(v, seed=0, l=16):
    "Every view hides another number of patches, so that each is a role of its own; views after the first predict nothing where a decoder restores view 0 alone."
    hidden = torch.stack([torch.randperm(l, generator=torch.Generator().manual_seed(seed + i)) < 10 - 2 * i for i in range(v)])[None]
    return Masks.given(hidden, hidden & (torch.arange(v) < 1)[:, None])


def rows(model, views, masks, view, patch):
    "What one patch reads in every block where it asks."
    seen = run_pass(model, views, masks)
    return {name: row for name in recordable(model) if (row := row_of(model, seen, name, view, patch)) is not None}


# ---------------------------------------------------------------- who asks, who is read

@both
def test_places_fit_every_call(kind, v):
    model, views, masks, calls = small(kind), pictures(v)[None], masks_for(v), {}

    def compare(name, weights):
        call = calls[name] = calls.get(name, -1) + 1
        found = token_places(model, masks, name, call)
        assert weights.shape == (len(found), weights.shape[1], len(found[0][0]), len(found[0][1]))
        assert all(len(x.unique()) == len(x) and 0 <= x.min() and x.max() < v * (model.encoder.num_prefix_tokens + 16) for pair in found for x in pair)

    with torch.no_grad(), record(model, reduce=compare):
        model.reconstruct(views, masks)
    assert set(calls) == set(attention_names(model))


def test_the_encoder_row_of_a_view_by_hand():
    model, views, masks = small(MuM), pictures(3)[None], masks_for(3)
    for view in range(3):
        ids = masks.visible[view][0, 0]
        rank = len(ids) // 2
        maps = rows(model, views, masks, view, int(ids[rank]))
        with torch.no_grad():
            encoder = model.encoder
            x, turn = encoder.embed(views[:, view], ids[None]), encoder.rotation(views[:, view], ids[None])
            _, slow = encoder.blocks[1].attn(encoder.blocks[1].norm1(encoder.blocks[0](x, turn)), turn, return_weights=True)
        fast = maps["encoder.blocks.1.attn"]
        torch.testing.assert_close(fast[:, view].flatten(1)[:, ids], slow[0, :, 1 + rank, 1:])
        seen = ~fast.isnan().any(0).flatten(1)
        assert torch.equal(seen[view], ~masks.hidden[0, view]) and not np.delete(seen.numpy(), view, axis=0).any()


def test_cross_attention_reads_the_visible_patches_of_the_others_by_hand():
    model, views, masks = small(SiamMAE, decoder_depth=1), pictures(2)[None], masks_for(2)
    asking = int(masks.predicted[0][0, 0, 3])
    maps = rows(model, views, masks, 0, asking)
    with torch.no_grad():
        seen, decoder = encode_views(model.encoder, views, masks), model.decoder
        x, given = decoder.inputs(seen, masks)
        block = decoder.blocks[0]
        assert block.order[0] == "cross" and not block.pre_norm
        _, slow = block.cross_attn(x, block.norm_memory(given["memory"]), return_weights=True)
    row = maps["decoder.blocks.0.cross_attn"]
    torch.testing.assert_close(row[:, 1].flatten(1)[:, masks.visible[1][0, 0]], slow[0, :, 1 + asking, 1:])
    assert row[:, 0].isnan().all() and torch.equal(row[0, 1].isnan().flatten(), masks.hidden[0, 1])


@pytest.mark.parametrize("kind, v", [(SiamMAE, 3), (CroCo, 2), (MuM, 3)])
def test_with_nothing_hidden_rows_are_those_of_cross_view_maps(kind, v):
    model, views = small(kind), pictures(v)
    maps = rows(model, views[None], Masks.given(torch.zeros(1, v, 16, dtype=torch.bool)), 0, 6)
    for name, known in cross_view_maps(model, views, [6]).items():
        torch.testing.assert_close(maps[name].nan_to_num(), known[0], atol=1e-6, rtol=1e-5)


def test_without_class_tokens_a_row_sums_to_one():
    model, masks = small(CroCo), masks_for(2)
    maps = rows(model, pictures(2)[None], masks, 0, int(masks.visible[0][0, 0, 1]))
    assert set(maps) == set(attention_names(model))
    for name, x in maps.items():
        torch.testing.assert_close(x.nan_to_num().sum((1, 2, 3)), torch.ones(len(x)), msg=name)


def test_a_patch_asks_only_where_it_is():
    masks, views = masks_for(1), pictures()[None]
    hidden, visible = int(masks.predicted[0][0, 0, 0]), int(masks.visible[0][0, 0, 0])
    names = lambda kind, patch: {name.split(".")[0] for name in rows(small(kind), views, masks, 0, patch)}
    assert names(MAE, hidden) == {"decoder"} == names(CrossMAE, hidden)
    assert names(MAE, visible) == {"encoder", "decoder"} and names(CrossMAE, visible) == {"encoder"}


def test_an_encoder_that_reads_all_views_at_once_is_left_out():
    model = small(MuM, inter_frame="encoder")
    explorer = Explorer({"x": model}, pictures(3), .5, .5)
    explorer.ask(3, view=0)
    assert {name.split(".")[0] for name in explorer.layers["x"]} == {"decoder"} and explorer.reconstruct("x").isfinite().all()
    assert all(explorer.row("x", name).shape == (4, 3, 4, 4) for name in explorer.layers["x"])
    assert torch.equal(explorer.run("x").result.pred, model(pictures(3)[None], explorer.hidden[None]).pred)


# ---------------------------------------------------------------- state

def test_masks_of_one_seed_are_nested_and_those_of_the_model():
    model = small()
    explorer, before = Explorer({"mae": model}, pictures(), .0, seed=5), torch.zeros(1, 16, dtype=torch.bool)
    for ratio in (.25, .5, .75, .9, .95, 1.):
        explorer.draw(mask_ratio=ratio)
        assert (before <= explorer.hidden).all() and explorer.hidden.sum() == min(15, 16 - int(16 * (1 - ratio)))
        before = explorer.hidden
    explorer.draw(mask_ratio=.75)
    assert torch.equal(explorer.hidden, RandomMasking((.75,))(torch.rand(1, 1, 16, generator=torch.Generator().manual_seed(5)), (4, 4)).hidden[0])
    again = explorer.hidden
    explorer.draw(seed=6)
    assert not torch.equal(again, explorer.hidden)


def test_a_click_is_undone_by_a_second_one_and_changes_the_reconstruction():
    explorer = Explorer({"mae": small()}, pictures(), .5)
    before, painted, loss = explorer.hidden, explorer.reconstruct("mae"), explorer.loss("mae")
    explorer.toggle(5)
    assert (before ^ explorer.hidden).nonzero().tolist() == [[0, 5]]
    assert not torch.equal(explorer.reconstruct("mae"), painted) and explorer.loss("mae") != loss
    explorer.toggle(5)
    assert torch.equal(explorer.hidden, before) and torch.equal(explorer.reconstruct("mae"), painted) and explorer.loss("mae") == loss


@both
def test_reconstruction_and_loss_are_those_of_the_model(kind, v):
    model, views = small(kind), pictures(v)
    explorer = Explorer({"x": model}, views, .75, .25, seed=2)
    predict = explorer.hidden.clone()
    if kind is not MuM:
        predict[1:] = False
    result = model(views[None], explorer.hidden[None], predict[None])
    assert explorer.loss("x") == pytest.approx(result.loss.item(), abs=1e-6)
    torch.testing.assert_close(explorer.reconstruct("x"), paint(views[None], result, 8, True)[0])
    torch.testing.assert_close(explorer.reconstruct("x", "true"), paint(views[None], result, 8, True, "true")[0])
    names, parts = explorer.contributions("x")
    assert len(names) == len(parts) > 3
    torch.testing.assert_close(parts.sum(0).clamp(0, 1), explorer.reconstruct("x"), atol=1e-5, rtol=0)
    torch.testing.assert_close(explorer.contributions("x", "true")[1].sum(0).clamp(0, 1), explorer.reconstruct("x", "true"), atol=1e-5, rtol=0)


def test_two_models_share_the_mask_and_a_single_view_model_gets_the_first():
    explorer = Explorer({"mae": small(), "siammae": small(SiamMAE)}, pictures(2, (32, 48)), .75)
    assert explorer.hidden.shape == (2, 24) and explorer.run("mae").views.shape[1] == 1 and explorer.run("siammae").views.shape[1] == 2
    mae, siam = (explorer.run(name).result for name in ("mae", "siammae"))
    assert torch.equal(mae.predict[:, 0], siam.predict[:, 0]) and torch.equal(mae.predict[0, 0], explorer.hidden[0]) and not siam.predict[:, 1].any()
    assert torch.equal(explorer.reconstruct("siammae")[1], denormalise(pictures(2, (32, 48)))[1])   # the anchor, seen whole
    before = explorer.hidden
    explorer.show(models={"crossmae": small(CrossMAE)})
    assert torch.equal(explorer.hidden, before) and explorer.loss("crossmae") > 0
    explorer.show(views=pictures(1))
    assert explorer.hidden.shape == (1, 16)


def test_nothing_hidden_gives_the_pictures_back():
    for kind, v in METHODS.values():
        explorer = Explorer({"x": small(kind)}, pictures(v), 0.)
        assert torch.equal(explorer.reconstruct("x"), denormalise(pictures(v))) and np.isnan(explorer.loss("x"))
        assert contribution_pictures(explorer, "x", 3)[0] == "given"


def test_bad_input_is_one_line_and_changes_nothing():
    explorer = Explorer({"siammae": small(SiamMAE)}, pictures(), 1.)
    hidden = explorer.hidden
    cases = {"choose a scene": lambda: explorer.reconstruct("siammae"), "last visible one of view 0": lambda: explorer.toggle(int(hidden[0].int().argmin())),
             "mask_ratio 1.5": lambda: explorer.draw(mask_ratio=1.5), "patch_size 4": lambda: explorer.show({"a": small(), "b": small(patch_size=4)}),
             "img_size 20 is not a multiple": lambda: explorer.show(views=pictures(1, (20, 20))), "there is none": lambda: explorer.show({})}
    for words, wrong in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            wrong()
        assert "\n" not in str(caught.value) and torch.equal(explorer.hidden, hidden) and list(explorer.models) == ["siammae"] and explorer.mask_ratio == 1 and explorer.grid == (4, 4)
    for wrong in (lambda: explorer.toggle(16), lambda: explorer.ask(0, view=1)):
        with pytest.raises(ValueError, match="there are 1 views of 16 patches"):
            wrong()


# ---------------------------------------------------------------- what is not done again

@both
def test_what_is_remembered_changes_no_bit(kind, v):
    "After each of a series of clicks the explorer says what the model says from scratch, and its rows are those that `record` sees."
    model, explorer = small(kind), Explorer({"x": small(kind)}, pictures(v), .5, .25, seed=4)
    for view, patch in ((0, 3), (0, 7), (v - 1, 2), (0, 3), (v - 1, 2), (v - 1, 5)):
        explorer.toggle(patch, view)
        seen = explorer.run("x")
        with torch.no_grad(), record(model) as maps:
            plain = model(seen.views, seen.masks.hidden, seen.masks.predict)
        for one, other in zip(seen.result, plain):
            assert torch.equal(one, other)
        for asking in range(16):
            explorer.ask(asking, v - 1)
            for name in explorer.layers["x"]:
                row, all_calls = explorer.row("x", name), [(i, call) for call in range(len(maps[name])) for i in range(len(maps[name][call]))]
                whole = None
                for i, call in all_calls:
                    queries, keys = token_places(model, seen.masks, name, call)[i]
                    at = (queries == (v - 1) * (model.encoder.num_prefix_tokens + 16) + model.encoder.num_prefix_tokens + asking).nonzero()
                    if len(at) and whole is None:
                        whole = torch.full((maps[name][call].shape[1], v * (model.encoder.num_prefix_tokens + 16)), torch.nan)
                        whole[:, keys] = maps[name][call][i, :, at[0, 0]]
                assert (row is None) == (whole is None)
                if row is not None:
                    whole = whole.unflatten(1, (v, -1))[:, :, model.encoder.num_prefix_tokens:].unflatten(2, (4, 4))
                    torch.testing.assert_close(row, whole, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in explorer.models["x"].modules())


def counted(module):
    "A list that grows by one number, the size of the batch, with each call of a module."
    calls = []
    module.register_forward_hook(lambda m, given, out: calls.append(len(given[0])))
    return calls


def test_an_encoder_is_asked_only_about_views_that_changed():
    model = small(MuM)
    explorer, encoded, decoded = Explorer({"x": model}, pictures(3), .75), counted(model.encoder), counted(model.decoder.norm)
    did = lambda: (explorer.run("x"), encoded.copy(), len(decoded), encoded.clear(), decoded.clear())[1:3]
    assert did() == ([1, 2], 1)                  # view 0, and two whole views
    explorer.toggle(3)
    assert did() == ([1], 1)
    explorer.ask(3)
    explorer.row("x", explorer.layers["x"][0]), explorer.contributions("x"), explorer.reconstruct("x", "true")
    assert did() == ([], 0)                      # looking costs no pass
    explorer.toggle(5, view=2)
    assert did() == ([1, 1], 1)                  # whole views 1 and 2 no longer go together
    explorer.toggle(6, view=2)
    assert did() == ([1], 1)
    explorer.show(views=pictures(3) + 1)
    assert did() == ([1, 1, 1], 1)
    said = PatientEncoder(model.encoder)
    with torch.no_grad():
        for images, ids, calls in ((pictures(2), None, 1), (pictures(2), None, 0), (pictures(2), torch.arange(4).expand(2, 4), 1), (pictures(2), torch.arange(4).expand(2, 4) + 1, 1), (pictures(2) + 1, None, 1)):
            encoded.clear()
            said.next_pass()
            answer = said(images, ids, ())[0]
            assert len(encoded) == calls and torch.equal(answer, model.encoder(images, ids)[0])
        said.next_pass()
        assert len(said(pictures(2) + 1, None, (1, 2))[1]) == 2          # other feature maps are another question


# ---------------------------------------------------------------- pictures

def test_the_mask_is_grey_where_hidden_and_the_picture_elsewhere():
    explorer = Explorer({"mae": small()}, pictures(2), .5, .25)
    shown, truth = mask_pictures(explorer), as_bytes(denormalise(explorer.views))
    where = explorer.hidden.view(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    assert (shown[where] == 153).all() and np.array_equal(shown[~where], truth[~where])


def test_attention_is_brightest_at_its_largest_weight_and_dark_where_nothing_is_read():
    explorer = Explorer({"x": small(CrossMAE)}, torch.zeros(1, 3, 32, 32), .5)
    hidden = explorer.hidden[0].nonzero()[:, 0].tolist()
    explorer.ask(hidden[0])
    layer = "decoder.blocks.1.cross_attn"
    for head in (None, 2):
        shown = attention_pictures(explorer, "x", layer, head)[0].astype(int).sum(-1)
        patches = shown.reshape(4, 8, 4, 8).mean((1, 3)).ravel()
        row = explorer.row("x", layer)
        row = (row.mean(0) if head is None else row[head]).flatten()
        assert patches[~explorer.hidden[0].numpy()].argmax() == row[~explorer.hidden[0]].argmax()
        assert np.ptp(patches[hidden[1:]]) == 0 and patches[hidden[1:]].max() < patches[~explorer.hidden[0].numpy()].max()
        row, col = divmod(hidden[0], 4)
        assert shown[row * 8, col * 8] == 3 * 255 and shown[row * 8 + 4, col * 8 + 4] < 3 * 255        # the frame of the query
    explorer.ask(int(explorer.hidden[0].int().argmin()))
    assert panels(explorer, {"x": Look(layer=layer)})["detail 0"][0] == "decoder 1 cross: asks nothing"


def test_parts_add_up_to_the_reconstruction_and_the_twin_shows_every_panel():
    explorer = Explorer({"mum": small(MuM), "mae": small()}, pictures(3), .5, .5)
    looks = {"mum": Look("blocks", part=99), "mae": Look("blocks", part=1, alone=True)}
    shown = panels(explorer, looks)
    assert list(shown) == ["mask", "reconstruction 0", "detail 0", "reconstruction 1", "detail 1"]
    np.testing.assert_allclose(shown["detail 0"][1].astype(int), shown["reconstruction 0"][1], atol=1)
    assert shown["detail 1"][0].endswith("alone") and [len(p) for _, p in shown.values()] == [3, 3, 3, 1, 1]
    figure = explorer_figure(explorer, looks)
    assert len(figure.axes) == 15 and sum(len(axis.images) for axis in figure.axes) == 11
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(as_png(shown["mask"][1][0])))), shown["mask"][1][0])


@pytest.mark.parametrize("layer, short", [("encoder.blocks.11.attn", "encoder 11"), ("decoder.blocks.0.cross_attn", "decoder 0 cross"), ("decoder.global_blocks.1.attn", "decoder global 1")])
def test_short_names(layer, short): assert short_name(layer) == short


# ---------------------------------------------------------------- widgets, played as the front end would

@pytest.fixture
def panel():
    return Instrument({"mae": small(), "siammae": small(SiamMAE), "other": small(patch_size=4)}, {"photo": pictures(), "scene": pictures(2)}, second="siammae")


def click(widget, patch): widget._handle_custom_msg({"patch": patch}, [])


def png(panel, key, view=0): return panel.board.shown[key, view].png


def test_clicks_arrive_and_the_layout_stays(panel, monkeypatch):
    panel.picture.value = "scene"
    before, columns, packed = {key: widget.png for key, widget in panel.board.shown.items()}, panel.board.children, []
    monkeypatch.setattr("mae_repro.analysis.explorer.as_png", lambda picture: packed.append(picture) or as_png(picture))
    click(panel.board.shown["mask", 1], 7)
    assert panel.explorer.hidden[1, 7] and 7 in panel.board.shown["mask", 1].marked
    changed = {key for key, widget in panel.board.shown.items() if widget.png != before[key]}
    assert len(packed) == len(changed)
    assert {("mask", 1), ("reconstruction 1", 0)} <= changed and ("mask", 0) not in changed and ("reconstruction 0", 0) not in changed     # MAE does not read view 1
    click(panel.board.shown["detail 1", 0], 9)
    assert panel.explorer.query == (0, 9) and panel.board.shown["detail 1", 0].marked == [9] and panel.board.shown["detail 1", 0].word == "asks"
    assert panel.board.children is columns                      # or the picture would lose the focus of the keyboard
    assert panel.board.shown["reconstruction 0", 0].grid == [0, 0] and panel.board.shown["mask", 0].grid == [4, 4]


def test_controls_change_what_they_name(panel):
    panel.picture.value = "scene"
    panel.ratio.value = .25
    assert panel.explorer.hidden.sum(1).tolist() == [4, 0]
    panel.other.value = .5
    assert panel.explorer.hidden.sum(1).tolist() == [4, 8]
    before = png(panel, "mask")
    panel.seed.value = 3
    assert png(panel, "mask") != before
    sight, before = panel.sights[1], png(panel, "detail 1", 1)
    sight.layer.value = "decoder.blocks.0.cross_attn"
    mean = png(panel, "detail 1", 1)
    sight.head.value = 1
    assert len({before, mean, png(panel, "detail 1", 1)}) == 3 and panel.board.shown["detail 1", 0].title == "decoder 0 cross, head 1"
    sight.detail.value = "blocks"
    sight.part.value = 1
    blocks = png(panel, "detail 1")
    sight.part.value = sight.part.max
    assert png(panel, "detail 1") != blocks and sight.part.max == len(panel.explorer.contributions("siammae")[0]) - 1
    assert abs(np.asarray(Image.open(io.BytesIO(png(panel, "detail 1")))).astype(int) - np.asarray(Image.open(io.BytesIO(png(panel, "reconstruction 1")))).astype(int)).max() <= 1
    before = png(panel, "reconstruction 0")
    panel.true.value = True
    assert png(panel, "reconstruction 0") != before
    panel.sights[1].model.value = ""
    assert len(panel.board.children) == 3 and list(panel.explorer.models) == ["mae"]


def test_a_mistake_is_a_line_and_the_next_choice_mends_it(panel):
    assert "choose a scene" in panel.status.value and len(panel.board.children) == 1
    panel.sights[1].model.value = "other"
    assert "patch_size 4" in panel.status.value and list(panel.explorer.models) == ["mae", "siammae"]
    panel.sights[1].model.value = "siammae"
    panel.picture.value = "scene"
    assert "patches hidden" in panel.status.value and len(panel.board.children) == 5


def test_the_same_model_twice_is_shown_once(panel):
    panel.sights[1].model.value = "mae"
    panel.sights[1].detail.value = "blocks"
    assert len(panel.board.children) == 3 and panel.board.shown["detail 0", 0].title.startswith("decoder 1")


def test_explore_opens_models_and_pictures(tmp_path):
    panel = explore(["mae-tiny", "mum-tiny"], second="mum-tiny")
    assert "patches hidden" in panel.status.value and len(panel.board.children) == 5 and panel.picture.options[0] == "astronaut"
    Image.new("RGB", (40, 50), "red").save(tmp_path / "mine.png")
    assert list(pictures_to_explore(32, tmp_path, scenes=1)) == ["mine", "scene 0, 3 views"]
    for wrong in (lambda: explore([]), lambda: explore(["mae-tiny"], second="x"), lambda: explore(["no/such/run"]), lambda: pictures_to_explore(32, tmp_path / "none")):
        with pytest.raises(UserError):
            wrong()
