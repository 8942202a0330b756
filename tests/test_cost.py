"What things cost: published tables to the printed digit, counters against torch's own, memory against what autograd keeps, plans against arithmetic."
import json
from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_repro.analysis.cost import (CONVENTIONS, Step, activation_bytes, count_parameters, forward_gflops, gflops_by_part, measure, record, saved_bytes,
                                     tokens_per_view, training_bytes)
from mae_repro.analysis.plan import (epoch_samples, fitting, measured_throughput, plan_text, plan_training, step_cost, storage, training_steps)
from mae_repro.cli import run
from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE, PUBLISHED_SIZES
from mae_repro.methods.mum import MuM
from mae_repro.parts.weights import UserError
from mae_repro.training.config import replace_in
from mae_repro.training.recipes import RECIPES, recipe
from mae_repro.views.samples import GroupBatches

TINY = dict(img_size=96, patch_size=8, embed_dim=64, depth=3, num_heads=4, decoder_embed_dim=32, decoder_num_heads=2)
PAIR = TINY | dict(decoder_depth=2, decoder_mlp_dim=96)
KINDS = {"mae": MAE(**TINY), "mae, mixing": MAE(**TINY, inter_block=True), "crossmae": CrossMAE(**TINY), "crossmae, mixing some": CrossMAE(**TINY, mix_blocks=(0, 1), mix_input=False),
         "crossmae, everything": CrossMAE(**TINY, self_attention=True, project_maps=True), "cdgmae": CDGMAE(**PAIR, decoder_dropout=0.), "croco v1": CroCo(**TINY),
         "croco v2": CroCo(**TINY, positions="rope"), "mum": MuM(**TINY, num_views=3), "mum, added positions": MuM(**TINY, num_views=3, positions="absolute"),
         "mum, frames meet in the encoder": MuM(**TINY, num_views=3, inter_frame="encoder"), "mum, with reference": MuM(**TINY, num_views=3, reference_view=True)}


@pytest.fixture(autouse=True)
def _quiet(one_thread):
    "Small models."


def cost(capsys, *args) -> list[dict]:
    assert run(["cost", *args, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- published tables

@pytest.mark.parametrize("recipe_name, overrides, printed", [
    ("cdgmae-a1", "", 6.0), ("cdgmae-a2", "--method.anchor-mask-ratio 0", 10.4), ("cdgmae-a2", "--method.anchor-mask-ratio 0.25", 8.3), ("cdgmae-a2", "", 6.1),
    ("cdgmae-a3", "", 11.6), ("cdgmae-a3", "--method.anchor-mask-ratio 0.5", 8.3), ("cdgmae-a1", "--method.num-anchors 4 --method.anchor-mask-ratio 0.25", 14.9),
    ("cdgmae-a1", "--method.num-anchors 4 --method.anchor-mask-ratio 0.5", 10.6), ("cropmae-vits16", "", 5.7), ("siammae-vits16", "", 5.8)])
def test_tables_5_and_7_of_cdgmae(recipe_name, overrides, printed, capsys):
    (row,) = cost(capsys, recipe_name, *overrides.split())
    assert row["convention"] == "mac-linear" and round(row["gflops"], 1) == printed
    assert (row["params_total"], row["params_trainable"], row["params_encoder"]) == (28_327_808, 28_201_728, 21_590_016)


PARAMETERS = {  # total, trainable, encoder, decoder; CrossMAE with 8 and 12 blocks
    "S": ((28_330_880, 28_204_800, 21_590_016, 6_614_784), (28_762_088, 28_636_008, 21_589_248, 7_046_760), (32_186_396, 32_060_316, 21_589_248, 10_471_068)),
    "B": ((111_907_840, 111_655_680, 85_647_360, 26_008_320), (113_622_120, 113_369_960, 85_645_824, 27_724_136), (127_286_428, 127_034_268, 85_645_824, 41_388_444)),
    "L": ((329_541_888, 329_239_296, 303_099_904, 26_139_392), (333_225_928, 332_923_336, 303_097_856, 29_825_480), (347_940_908, 347_638_316, 303_097_856, 44_540_460)),
    "H": ((657_074_508, 656_613_964, 630_435_840, 26_178_124), (662_728_276, 662_267_732, 630_433_280, 31_834_452), (678_493_912, 678_033_368, 630_433_280, 47_600_088))}
GFLOPS = {  # encoder (patch embedding and blocks); total and decoder blocks of MAE, of CrossMAE with 8 blocks (1/4, 3/4 predicted), with 12
    "S": ("2.285", ("5.169", "2.797"), ("3.000", "0.691"), ("4.106", "1.759"), ("3.347", "1.037"), ("4.987", "2.638")),
    "B": ("8.817", ("19.562", "10.551"), ("11.588", "2.725"), ("15.856", "6.915"), ("12.954", "4.087"), ("19.317", "10.373")),
    "L": ("30.753", ("41.512", "10.551"), ("33.746", "2.934"), ("38.014", "7.125"), ("35.224", "4.401"), ("41.587", "10.687")),
    "H": ("82.867", ("97.124", "14.017"), ("87.065", "4.116"), ("92.647", "9.621"), ("89.144", "6.174"), ("97.479", "14.431"))}


def printed(gflops: float) -> str:
    "Three decimals, rounded by way of four: 2.724495 to 2.7245 to 2.725. Three of the 44 numbers were printed so; for the others it makes no difference."
    return str(Decimal(f"{gflops:.4f}").quantize(Decimal("0.001"), ROUND_HALF_UP))


def test_three_numbers_were_rounded_twice():
    "The way of rounding above is needed for three numbers only: nothing else hides behind it."
    plain = {}
    for size, (_, *rows) in GFLOPS.items():
        for cell, (share, depth) in zip(rows[1:], ((.25, 8), (.75, 8), (.25, 12), (.75, 12))):
            parts = gflops_by_part(CrossMAE(**PUBLISHED_SIZES[size], decoder_depth=depth, prediction_ratio=share))
            plain |= {(size, share, depth, i): abs(n - float(p)) for i, (n, p) in enumerate(zip((sum(parts.values()), parts["decoder_blocks"]), cell))}
    assert sum(off > .0005 for off in plain.values()) == 3 and max(plain.values()) < .00053


@pytest.mark.parametrize("size", "SBLH")
def test_sizes_of_mae_and_crossmae(size):
    configs = [MAE(**PUBLISHED_SIZES[size]), *(CrossMAE(**PUBLISHED_SIZES[size], decoder_depth=d, prediction_ratio=r) for d in (8, 12) for r in (.25, .75))]
    for config, expected in zip((configs[0], configs[1], configs[3]), PARAMETERS[size]):
        assert tuple(count_parameters(config).values()) == expected
    encoder, *rows = GFLOPS[size]
    for config, row in zip(configs, rows):
        parts = gflops_by_part(config, "flop-all")
        assert (printed(sum(parts.values())), printed(parts["decoder_blocks"])) == row
        assert printed(parts["patch_embed"] + parts["encoder_blocks"]) == encoder


def test_crossmae_on_the_command_line(capsys):
    rows = cost(capsys, "mae-vitb16", "crossmae-vitb16", "--method.decoder-depth", "8", "--method.prediction-ratio", ".25")
    assert [r["recipe"] for r in rows] == ["mae-vitb16", "crossmae-vitb16"]
    assert round(rows[0]["gflops_decoder"] / rows[1]["gflops_decoder"], 1) == 3.7
    rows = cost(capsys, "mae-vitb16", "crossmae-vitb16", "--convention", "flop-all")
    assert [(printed(r["gflops"]), printed(r["gflops_decoder"])) for r in rows] == [("19.562", "10.551"), ("19.317", "10.373")]
    assert [(r["params_total"], r["params_trainable"], r["params_encoder"]) for r in rows] == [PARAMETERS["B"][0][:3], PARAMETERS["B"][2][:3]]


def test_mum(capsys):
    (row,) = cost(capsys, "mum-large", "--method.num-views", "2")
    assert row["params_total"] == row["params_trainable"] == 389_534_464 and row["params_encoder"] == 303_099_904
    assert row["tokens"] == [{"patches": 256, "visible": 64, "cls": 1, "predicted": 192}] * 2


@pytest.mark.parametrize("name, trainable", [("mum-base", 111_655_680), ("mum-huge", 935_077_632), ("croco-v1", 120_076_288), ("croco-v2-vitb-decsmall", 120_076_288),
                                             ("croco-v2-vitb-decbase", 200_269_824), ("croco-v2-vitl-decbase", 417_918_720)])
def test_published_parameters(name, trainable):
    assert count_parameters(recipe(name).method)["trainable"] == trainable


# ---------------------------------------------------------------- counters

@pytest.mark.parametrize("name", KINDS)
def test_against_the_counter_of_torch(name):
    config = KINDS[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config.build()(torch.empty(1, config.num_views, 3, 96, 96))
    found = forward_gflops(config)
    assert round(1e9 * found["total"]) == counter.get_total_flops() == round(1e9 * sum(gflops_by_part(config, "flop-all", as_built=True).values()))
    assert found["encoder"] + found["decoder"] == pytest.approx(found["total"])


def test_conventions_by_hand():
    "One block of an encoder of one patch and cls, and of a decoder: every product written out."
    config = MAE(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1, mask_ratio=.75)
    block = lambda t, d: (12 * t * d * d, 2 * t * t * d, 5 * 2 * t * d)  # linear, attention, norms
    linear = {"patch_embed": 4 * 48 * 8, "encoder_blocks": block(2, 8)[0], "decoder_embed": 2 * 8 * 4, "decoder_blocks": block(5, 4)[0], "head": 5 * 4 * 48}
    attention = {"encoder_blocks": block(2, 8)[1], "decoder_blocks": block(5, 4)[1]}
    norms = {"encoder_blocks": block(2, 8)[2], "decoder_blocks": block(5, 4)[2], "norms": 5 * (2 * 8 + 5 * 4)}
    for convention, weights in CONVENTIONS.items():
        found = gflops_by_part(config, convention)
        for part in found:
            expected = sum(weights[kind] * counts.get(part, 0) for kind, counts in (("linear", linear), ("attention", attention), ("norm", norms)))
            assert round(1e9 * found[part]) == expected, (convention, part)
    built = gflops_by_part(config, "mac-linear", as_built=True)
    assert round(1e9 * built["patch_embed"]) == 48 * 8 and round(1e9 * built["head"]) == 3 * 4 * 48  # one visible patch, three predicted


def test_blocks_that_nobody_reads_run_in_the_authors_code():
    "CrossMAE that mixes the first two of three blocks: ours leaves the third one out."
    some, full = KINDS["crossmae, mixing some"], KINDS["crossmae"]
    blocks = lambda config, built: gflops_by_part(config, "flop-all", built)["encoder_blocks"]
    assert blocks(some, False) == pytest.approx(blocks(full, False)) and blocks(some, True) == pytest.approx(blocks(full, True) * 2 / 3)


def test_operations_of_scenes_are_a_quadratic_in_their_views():
    each = [sum(gflops_by_part(KINDS["mum"], num_views=s).values()) for s in (1, 2, 3, 4)]
    second = [each[i + 2] - 2 * each[i + 1] + each[i] for i in (0, 1)]
    assert second[0] == pytest.approx(second[1], rel=1e-6) and second[0] > 0


# ---------------------------------------------------------------- memory

@pytest.mark.parametrize("name", KINDS)
def test_memory_against_what_autograd_keeps(name):
    config = KINDS[name]
    torch.manual_seed(0)
    counted = saved_bytes(config.build(), torch.randn(2, config.num_views, 3, 96, 96)) / 2
    assert activation_bytes(config) == pytest.approx(counted, rel=.05)


@pytest.mark.parametrize("name", ["mae", "crossmae", "cdgmae", "croco v1", "mum"])
def test_memory_in_mixed_precision(name):
    "The difference between two batches, because autograd also keeps one half-precision copy of the weights."
    config = KINDS[name]
    torch.manual_seed(0)
    model = config.build()
    with torch.autocast("cpu", torch.bfloat16):
        few, more = (saved_bytes(model, torch.randn(b, config.num_views, 3, 96, 96)) for b in (1, 3))
    assert activation_bytes(config, half=True) == pytest.approx((more - few) / 2, rel=.15)


def test_checkpointing_keeps_less_and_dropout_more():
    config = KINDS["cdgmae"]
    assert activation_bytes(config, checkpointing=True) < .5 * activation_bytes(config)
    assert activation_bytes(CDGMAE(**PAIR)) > activation_bytes(config)
    assert training_bytes(config, 3) - training_bytes(config, 2) == activation_bytes(config, half=True)


def test_recording_leaves_no_hooks():
    config = KINDS["mae"]
    seen = record(config)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen.model.modules())


def test_measure():
    found = measure({"a": KINDS["mae"], "b": KINDS["mae"]}, 2, rounds=3)
    step = Step(KINDS["mae"], 2)
    assert found["a"]["samples_per_s"] > 0 and found["a"]["peak_bytes"] == found["b"]["peak_bytes"] == 16 * count_parameters(KINDS["mae"])["trainable"] + saved_bytes(step.model, step.views)
    (middle, low, high), own = found["b"]["speedup"], found["a"]["speedup"]
    assert own == (1., 1., 1.) and 0 < low <= middle <= high


# ---------------------------------------------------------------- plans

def test_a_plan_by_hand():
    plan = plan_training(recipe("cropmae-vits16"), gpus=16, gpu="a100", images_per_s=500)
    steps = 400 * (1_281_167 // 2048)
    assert plan["steps"] == steps and plan["hours"] == pytest.approx(steps * 2048 / (16 * 500 * 3600)) and plan["speed_is"] == "given"
    assert plan["gpu_hours"] == pytest.approx(16 * plan["hours"]) and plan["hours_of_eight"] == pytest.approx(2 * plan["hours"])
    estimated = plan_training(recipe("cropmae-vits16"), gpus=16, gpu="a100", utilisation=.35)
    operations = 1e9 * forward_gflops(recipe("cropmae-vits16").method)["total"]
    assert estimated["images_per_s_a_gpu"] == pytest.approx(.35 * 312e12 / (3 * operations))
    assert "16 A100" in plan_text(plan) and "500 samples/s" in plan_text(plan)


def test_checkpointing_computes_blocks_again():
    config = recipe("cropmae-vits16")
    again = replace_in(config, "train.checkpointing", True)
    assert plan_training(again)["hours"] == pytest.approx(4 / 3 * plan_training(config)["hours"]) and plan_training(again)["memory_bytes"] < plan_training(config)["memory_bytes"]


def test_reported_hours():
    "CrossMAE's minutes an epoch of four GPUs, and of two for all patches; only for what was timed."
    mae, cross = recipe("mae-vitb16"), replace_in(recipe("crossmae-vitb16"), "method.prediction_ratio", .25)
    reported = [plan_training(c)["reported"] for c in (mae, cross, recipe("crossmae-vitb16"), recipe("crossmae-vitl16"))]
    assert [round(r[0]["gpu_hours"] / gpus / 800 * 60, 2) for r, gpus in zip(reported, (4, 4, 2))] == [5.19, 3.38, 8.41] and not reported[3]
    assert plan_training(mae)["gpu_hours"] / plan_training(cross)["gpu_hours"] == pytest.approx(5.19 / 3.38, rel=.05)


def test_expectation_over_the_views_of_scenes():
    "Against steps that the sampler of the training draws."
    config = recipe("mum-tiny")
    operations, views = step_cost(config)
    order = GroupBatches(1, config.optim.batch_size, config.views.per_batch, config.method.view_range, config.views.single, seed=1)
    counts = {s: 1e9 * sum(gflops_by_part(config.method, "flop-all", True, s).values()) for s in range(1, 9)}
    drawn = [max(order.count(step, group), 1) for step in range(3000) for group in (0, 1)]   # 0: a single image
    per_step = lambda value: 2 * sum(config.views.per_batch // s * value(s) for s in drawn) / len(drawn)
    assert operations == pytest.approx(per_step(counts.get), rel=.01) and views == pytest.approx(per_step(lambda s: s), rel=.01)
    assert training_steps(config) == 20 * 50


@pytest.mark.parametrize("name", ["mae-tiny", "crossmae-small", "siammae-tiny", "croco-tiny", "cdgmae-small", "mum-small", "cropmae-vits16-cdg-synthetic"])
def test_recipes_can_be_planned(name):
    plan = plan_training(recipe(name), 1, "h200")
    assert plan["hours"] > 0 and plan["fits"] and plan["read_bytes"] > 0 and name in plan_text(plan)


def test_samples_of_an_epoch():
    expected = {"mae-vitb16": 1_281_167, "cropmae-vits16-cdg-synthetic": 5 * 1_281_167, "siammae-vits16": 240_000, "mae-small": 50_000, "mae-tiny": 2000, "croco-tiny": 2000}
    assert {name: epoch_samples(recipe(name)) for name in expected} == expected
    assert epoch_samples(recipe("croco-v1"), 7) == 7
    assert epoch_samples(replace_in(replace_in(recipe("mae-vitb16"), "data.limit", 1000), "data.repeats", 3)) == 3000
    with pytest.raises(UserError, match="--samples"):
        epoch_samples(recipe("croco-v1"))
    with pytest.raises(UserError, match="larger than an epoch of 100"):
        training_steps(recipe("mae-vitb16"), 100)


def test_memory_decides_how_many_micro_batches():
    config = replace_in(recipe("mae-tiny"), "optim.batch_size", 64)
    micro, parts, held = fitting(config, 2, 1e12)
    assert (micro, parts) == (32, 1)
    smaller, more, less = fitting(config, 2, held - 1)
    assert smaller * more == 32 and more > 1 and less <= .95 * (held - 1)
    assert fitting(config, 2, 0)[:2] == (1, 32)


def test_storage():
    config = recipe("mae-vitb16")  # 800 epochs, one kept every 200
    assert storage(config)["checkpoints"] == 4 and storage(config)["checkpoint_bytes"] == 4 * 111_907_840 + 8 * 111_655_680
    assert storage(config)["storage_bytes"] == 5 * storage(config)["checkpoint_bytes"] + 4 * 111_907_840
    assert storage(replace_in(config, "train.keep_every", 0.))["checkpoints"] == 1


def test_measured_speed_goes_before_the_estimate(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    (results / "speed.json").write_text(json.dumps({"throughput": [{"recipe": "mae-small", "gpu": "h100", "images_per_s": 4321.}]}))
    (results / "other.json").write_text("[]")
    assert measured_throughput("mae-small", "h100", results) == (4321., "speed.json") and measured_throughput("mae-small", "a100", results) is None
    monkeypatch.setattr("mae_repro.analysis.plan.data_dir", lambda: tmp_path)
    speed = lambda config, **given: plan_training(config, 1, "h100", **given)["speed_is"]
    assert speed(recipe("mae-small")) == "speed.json" and speed(recipe("mae-small"), images_per_s=1.) == "given"
    assert "of the peak" in speed(replace_in(recipe("mae-small"), "method.decoder_depth", 2)) and "of the peak" in speed(recipe("crossmae-small"))


# ---------------------------------------------------------------- command line

def test_keys_and_text(capsys, tmp_path):
    assert run(["cost", "mae-tiny", "--as-built", "--measure", "--batch-size", "2", "--device", "cpu", "--json", str(tmp_path / "c.json")]) == 0
    text, (row,) = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert list(row)[:4] == ["recipe", "params_total", "params_trainable", "params_encoder"] and {"gflops", "gflops_decoder", "convention", "tokens", "measured"} <= set(row)
    assert row["as_built"] and row["measured"]["device"] == "cpu" and row["measured"]["samples_per_s"] > 0
    assert "as built" in text and "16 visible + 1 cls, 48 predicted" in text and "samples/s" in text
    assert tokens_per_view(recipe("mae-tiny").method) == row["tokens"]


def test_plan_on_the_command_line(capsys):
    rows = cost(capsys, "--plan", "cdgmae-a1", "cdgmae-a3", "--gpus", "8", "--gpu", "h100")
    assert [r["plan"]["gpu"] for r in rows] == ["h100", "h100"] and rows[1]["plan"]["hours"] > rows[0]["plan"]["hours"]
    (given,) = cost(capsys, "croco-v1", "--plan", "--gpus", "4", "--samples", "1000", "--images-per-s", "100")
    assert given["plan"]["steps"] == 400 * 3 and given["plan"]["hours"] == pytest.approx(400 * 3 * 256 / 400 / 3600)


def test_fields_go_to_the_recipes_that_have_them(capsys):
    rows = cost(capsys, "mae-tiny", "crossmae-tiny", "cdgmae-tiny", "--method.prediction-ratio=.5", "--method.num-anchors", "2", "--method.no-norm-pix-loss", "--method.decoder-depth", "6")
    assert [len(r["tokens"]) for r in rows] == [1, 1, 3] and [r["tokens"][0]["predicted"] for r in rows] == [48, 32, 58]
    assert rows[0]["params_total"] == count_parameters(replace_in(recipe("mae-tiny").method, "decoder_depth", 6))["total"]


def test_help(capsys):
    assert run(["cost", "--help"]) == 0 and "A field holds for every recipe that has it" in capsys.readouterr().out
    assert run(["cost", "mae-tiny", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--convention" in out and "--method.mask-ratio" in out and "--utilisation" in out


@pytest.mark.parametrize("args, said", [
    ([], "needs the name of a recipe"), (["--convention", "flop-all"], "needs recipes before its options"), (["mae-vitb17"], "did you mean"),
    (["sldm-tiny"], "views train"), (["mae-tiny", "--method.num-anchors", "2"], "--method.num-anchors"), (["mae-tiny", "--method.mask-ratio", "2"], "--method.mask-ratio 2.0"),
    (["mae-tiny", "--convention", "flops"], "--convention"), (["mae-tiny", "--plan", "--gpus", "0"], "--gpus 0"), (["mae-tiny", "--plan", "--gpu", "k80"], "--gpu"),
    (["mae-tiny", "--plan", "--gpus", "3"], "--optim.batch-size 256"), (["croco-v1", "--plan"], "--samples"), (["mae-tiny", "--plan", "--utilisation", "2"], "--utilisation 2"),
    (["mae-tiny", "--plan", "--samples", "10"], "an epoch of 10 samples"), (["mum-tiny", "--plan", "--gpus", "2", "--samples", "10"], "--views.epoch-steps 50"), (["mae-tiny", "--images-per-s", "nan"], "--images-per-s nan"), (["mae-tiny", "--batch-size", "0"], "--batch-size 0"),
    (["mae-tiny", "--json", "."], "is a folder")])
def test_bad_input(args, said, capsys):
    assert run(["cost", *args]) == 2
    out = capsys.readouterr()
    assert said in out.err.splitlines()[0] and "Traceback" not in out.err and not out.out


def test_every_method_has_a_cost(capsys):
    for row in cost(capsys, *(name for name in RECIPES if name.endswith("-tiny"))):
        assert row["gflops"] > row["gflops_decoder"] > 0 and row["params_total"] >= row["params_trainable"] > row["params_encoder"]


@pytest.mark.parametrize("option, value, said", [("--method.mlp-ratio", "inf", "--method.mlp-ratio inf must be a finite number"), ("--method.mlp-ratio", ".001", "nothing is left of the MLPs"),
                                                 ("--method.norm-eps", "nan", "--method.norm-eps nan must be a finite number"), ("--views.layout", "dlv", "--views.layout dlv is unknown")])
def test_what_cannot_be_trained_has_no_cost(capsys, option, value, said):
    assert run(["cost", "mae-tiny", "crossmae-tiny", option, value]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
