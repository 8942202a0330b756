"Parity with the published code: the vectors that ship, the command's verdicts, and mistakes that must be caught."
import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import mae_repro.parts.attention as attention
from mae_repro.methods.catalogue import METHODS
from mae_repro.parity import read_reference, replay
from mae_repro.parts.decoders import DecoderBlock, MapMix, ReadoutDecoder, RestoreDecoder
from mae_repro.parts.encoder import Encoder
from mae_repro.parts.model import ModelConfig, PixelTarget
from mae_repro.parts.positions import GridRotation, interpolate_positions, sincos_positions
from mae_repro.parts.weights import UserError, data_dir

FILES = sorted((data_dir() / "parity").glob("*.safetensors"))
SHARED = Path(os.environ.get("MAE_REPRO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def test_vectors_ship_for_every_method():
    assert {read_reference(f).family for f in FILES} >= METHODS.keys() - {"siammae"}   # CropMAE's code trains both


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_vector(path):
    verdict = replay(read_reference(path))
    assert verdict.ok, verdict


@pytest.mark.skipif(not (SHARED / "golden/parity").is_dir(), reason="the full set of reference vectors is not beside this checkout")
def test_full_set_of_vectors():
    verdicts = [replay(read_reference(f)) for f in sorted((SHARED / "golden/parity").glob("*.safetensors"))]
    built = [v for v in verdicts if v.family in METHODS]
    assert len(built) >= 22 and all(v.ok for v in built), [v for v in built if not v.ok]
    assert all(not v.ok and "not supported yet" in v.problems[0] for v in verdicts if v.family not in METHODS)


@pytest.mark.parametrize("key", ["weights/blocks.0.attn.qkv.weight", "weights/decoder_pred.bias", "out/pred", "out/loss"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_damaged_vector_fails(path, key):
    reference = read_reference(path)
    tensors = {k: v.clone() for k, v in reference.tensors.items()}
    names = {"weights/blocks.0.attn.qkv.weight": "weights/enc_blocks.0.attn.qkv.weight", "weights/decoder_pred.bias": "weights/prediction_head.bias"}
    flat = tensors[names.get(key, key) if reference.family == "croco" else key].view(-1)
    flat[flat.numel() // 3] += 1e-2
    assert not replay(dataclasses.replace(reference, tensors=tensors)).ok


@pytest.mark.parametrize("change", [lambda t: t.pop(next(k for k in t if k.startswith("weights/") and "norm" in k)),
                                    lambda t: t.update({"weights/blocks.9.norm1.weight": torch.ones(32)}),
                                    lambda t: t.update({"weights/head.weight": torch.ones(2, 32)})])
@pytest.mark.parametrize("path", FILES[::3], ids=lambda p: p.stem)
def test_missing_and_unexpected_keys_fail(path, change):
    reference = read_reference(path)
    tensors = dict(reference.tensors)
    change(tensors)
    verdict = replay(dataclasses.replace(reference, tensors=tensors))
    assert not verdict.ok and verdict.problems


def test_nan_never_passes():
    reference = read_reference(FILES[0])
    tensors = reference.tensors | {"out/pred": reference.tensors["out/pred"] * torch.nan}
    assert not replay(dataclasses.replace(reference, tensors=tensors)).ok


# Mistakes that are easy to make. Each must be caught by at least one of the vectors that ship.

def _biased(self, views, masks, original=PixelTarget.forward):
    m = 3 * self.patch_size ** 2
    return original(self, views, masks) * (m / (m - 1)) ** .5 if self.norm_pix_loss else original(self, views, masks)


def _channel_first(self, views, masks, original=PixelTarget.forward):
    p = self.patch_size
    return original(self, views, masks).unflatten(-1, (p, p, 3)).movedim(-1, -3).flatten(-3)


def _interleaved(self, x, rotation=None):
    return tuple(self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4))


def _without_cls(self, seen, original=ReadoutDecoder.memories):
    return [m[:, 1:] for m in original(self, seen)]


def _swapped(dim, grid, prefix):
    table = sincos_positions(dim, grid, prefix)
    return torch.cat([table[:, dim // 2:], table[:, :dim // 2]], dim=1)


def _recompute_positions(self, *args, original=Encoder.embed):
    if self.pos_embed is not None:
        self.pos_embed.copy_(_swapped(self.embed_dim, self.grid, self.num_prefix_tokens)[None])
    return original(self, *args)


def _reversed_maps(self, maps, original=MapMix.forward):
    return original(self, maps[::-1])


def _loose_eps(self, original=ModelConfig.decoder_sizes):
    return original(self) | {"norm_eps": 1e-5}


def _extra_norm(self, x, memory=None, *rotations, original=DecoderBlock.forward, **more):
    return original(self, x, memory if memory is None else F.layer_norm(memory, memory.shape[-1:]), *rotations, **more)


def _other_block(change, original=DecoderBlock.__init__):
    def init(self, dim, heads, order, mlp_dim, memory_dim=None, norm_eps=1e-6, pre_norm=True, norm_memory=False, dropout=0.):
        given = dict(order=order, pre_norm=pre_norm)
        given = {k: change[k](v) if k in change else v for k, v in given.items()}
        original(self, dim, heads, given["order"], mlp_dim, memory_dim, norm_eps, given["pre_norm"], norm_memory, dropout)
    return init


def _anchors_without_cls(self, seen, masks, original=RestoreDecoder.inputs):
    x, given = original(self, seen, masks)
    return x, given | ({"memory": given["memory"][:, 1:]} if seen.prefix and self.reads else {})


def _anchors_with_positions(self, seen, masks, original=RestoreDecoder.inputs):
    was, self.memory_positions = self.memory_positions, True
    try:
        return original(self, seen, masks)
    finally:
        self.memory_positions = was


def _turned_axes(self, where, head_dim, original=GridRotation.at):
    return original(self, where.flip(-1), head_dim)


def _turned_queries_only(self, seen, masks, original=RestoreDecoder.inputs):
    x, given = original(self, seen, masks)
    return x, given | ({"memory_rotation": None} if "memory_rotation" in given else {})


MISTAKES = {
    "tanh GELU": [patch.object(F, "gelu", lambda x, f=F.gelu: f(x, approximate="tanh"))],
    "LayerNorm eps 1e-5": [patch.object(ModelConfig, "decoder_sizes", _loose_eps),
                           patch.object(ModelConfig, "build_encoder", lambda self, final_norm=True: Encoder(
                               self.img_size, self.patch_size, self.embed_dim, self.depth, self.num_heads, self.mlp_ratio, 1e-5, final_norm))],
    "biased target variance": [patch.object(PixelTarget, "forward", _biased)],
    "channel-first patches": [patch.object(PixelTarget, "forward", _channel_first)],
    "interleaved qkv": [patch.object(attention.Attention, "project", _interleaved)],
    "cls missing from the keys": [patch.object(ReadoutDecoder, "memories", _without_cls)],
    "feature maps in the wrong order": [patch.object(MapMix, "forward", _reversed_maps)],
    "extra norm of the memory": [patch.object(DecoderBlock, "forward", _extra_norm)],
    "pre-norm instead of post-norm": [patch.object(DecoderBlock, "__init__", _other_block({"pre_norm": lambda _: True}))],
    "self before cross": [patch.object(DecoderBlock, "__init__", _other_block({"order": lambda order: tuple(sorted(order, key=("self", "cross", "mlp").index))}))],
    "MLP before self": [patch.object(DecoderBlock, "__init__", _other_block({"order": lambda order: tuple(sorted(order, key=("cross", "self", "mlp").index))}))],
    "cls of the anchors missing": [patch.object(RestoreDecoder, "inputs", _anchors_without_cls)],
    "decoder positions for anchors": [patch.object(RestoreDecoder, "inputs", _anchors_with_positions)],
    "rows and columns turned the wrong way": [patch.object(GridRotation, "at", _turned_axes)],
    "keys of the reference not turned": [patch.object(RestoreDecoder, "inputs", _turned_queries_only)],
    "x and y swapped": [patch.object(Encoder, "embed", _recompute_positions)],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(mistake):
    references = [read_reference(f) for f in FILES]
    with ExitStack() as stack:
        for change in MISTAKES[mistake]:
            stack.enter_context(change)
        verdicts = [replay(r) for r in references]
    assert not all(v.ok for v in verdicts), f"no vector catches: {mistake}"
    assert all(replay(r).ok for r in references), "the mistake leaked out of its test"


@pytest.mark.parametrize("content, says", [(b"not safetensors", "cannot be read"), (None, "no such file"), ("schema", "schema"), ("lacks", "lacks")])
def test_unreadable_files_are_user_errors(tmp_path, content, says):
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file({"a": torch.ones(1)}, path, {"schema": "other" if content == "schema" else "parity-1", "family": "mae", "config": "{}"})
    with pytest.raises(UserError, match=says):
        read_reference(path)


@pytest.mark.skipif(not (SHARED / "golden/evaluation/pos_embed.safetensors").is_file(), reason="reference vectors are not beside this checkout")
def test_position_tables():
    from safetensors.torch import load_file
    tables = load_file(SHARED / "golden/evaluation/pos_embed.safetensors")
    for key, table in tables.items():
        if key.startswith("mae/"):
            dim, grid = (int(part[1:]) for part in key[4:].split("_"))
            torch.testing.assert_close(sincos_positions(dim, (grid, grid)), table, atol=1e-7, rtol=0)
    for name, old, new in (("D16_4to6", 4, 6), ("D16_7to4", 7, 4)):
        ours = interpolate_positions(tables[f"interp/{name}/in"], (old, old), (new, new))
        torch.testing.assert_close(ours, tables[f"interp/{name}/out"], atol=1e-6, rtol=0)


def test_positions_known_rows():
    table = sincos_positions(8, (2, 3))
    assert table[0].abs().max() == 0
    expected = torch.tensor([2., .02, 1., .01])  # row 1, column 2
    torch.testing.assert_close(table[1 + 5], torch.cat([expected[:2].sin(), expected[:2].cos(), expected[2:].sin(), expected[2:].cos()]))
