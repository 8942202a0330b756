"The page about a model: every kind of decoder has its attention on it, pictures are all used or refused, numbers are those of the model."
import numpy as np
import pytest
import torch
from PIL import Image

from mae_repro.analysis.anatomy import anatomise, losses_so_far
from mae_repro.analysis.explorer import Explorer, attention_pictures
from mae_repro.analysis.inspection import anatomy_section, built_in_pictures, hidden_patch_figure, inspect_run, own_pictures, reconstruction_section
from mae_repro.methods.catalogue import save_model
from mae_repro.methods.cdgmae import CDGMAE
from mae_repro.methods.croco import CroCo
from mae_repro.methods.crossmae import CrossMAE
from mae_repro.methods.mae import MAE
from mae_repro.methods.mum import MuM
from mae_repro.methods.siamese import SiamMAE
from mae_repro.parts.weights import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
OTHER_VIEWS, TALK, OWN_VIEW = "Where one patch looks in the other views", "Who talks to whom", "What a hidden patch reads"
CASES = {"mae": (MAE(**SMALL), TALK), "crossmae": (CrossMAE(**SMALL), OWN_VIEW), "siammae": (SiamMAE(**SMALL), OTHER_VIEWS), "croco": (CroCo(**SMALL), OTHER_VIEWS),
         "cdgmae": (CDGMAE(**SMALL | dict(mask_ratio=.8)), OTHER_VIEWS), "mum": (MuM(**SMALL, num_views=3), OTHER_VIEWS), "mum, one view": (MuM(**SMALL, num_views=1, min_views=1), OWN_VIEW),
         "mum, views meet in the encoder": (MuM(**SMALL, num_views=3, inter_frame="encoder"), OWN_VIEW)}


@pytest.mark.parametrize("config, attention", CASES.values(), ids=CASES)
def test_every_model_has_reconstructions_attention_anatomy_and_cost(config, attention, tmp_path):
    save_model(tmp_path, config.build(), config)
    page = inspect_run(tmp_path).read_text()
    headings = [part.split("</h2>")[0] for part in page.split("<h2>")[1:]]
    assert headings[:3] == ["What was hidden, and what came back", attention, "Which block draws what"] and headings[-1] == "What it costs"


def test_a_negative_seed_is_said_not_swallowed(tmp_path):
    with pytest.raises(UserError, match="seed -1"):
        inspect_run("mae-tiny", out=tmp_path / "x.html", seed=-1)
    assert not (tmp_path / "x.html").exists()


def test_pictures_make_whole_samples_or_are_refused(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.new("RGB", (40, 50), (50 * i, 0, 0)).save(file)
    config = SiamMAE(**SMALL)
    found = own_pictures(files, config)
    assert found.views.shape == (2, 2, 3, 32, 32) and found.names == ("0", "2")
    assert found.views[:, :, 0].mean((2, 3)).flatten().diff().min() > 0           # in the order given
    with pytest.raises(UserError, match="3 pictures given.*give 2, or a multiple"):
        own_pictures(files[:3], config)


def test_other_views_have_rows_of_their_own():
    config = CDGMAE(**SMALL | dict(mask_ratio=.8, num_anchors=3))
    body = reconstruction_section(config.build().eval(), built_in_pictures(config)).body
    assert body.count('class="grid"') == 2 and body.index("reconstruction</div>") < body.index("anchor 1</div>")
    alone = reconstruction_section(MAE(**SMALL).build().eval(), built_in_pictures(MAE(**SMALL))).body
    assert alone.count('class="grid"') == 1 and "The other views" not in alone


def test_the_loss_before_the_first_block_is_that_of_what_enters_it():
    config = MAE(**SMALL)
    torch.manual_seed(0)
    model, pictures = config.build().eval(), built_in_pictures(config)
    torch.nn.init.normal_(model.decoder.mask_token)
    losses = losses_so_far(model, anatomise(model, pictures.views[:1]))
    assert f"{losses[1]:.2f}" != f"{losses[0]:.2f}"
    assert f"Loss before the first block {losses[1]:.2f}, after the last {losses[-1]:.2f}." in anatomy_section(model, pictures).body


def test_the_hidden_patch_is_hidden_and_its_rows_are_the_explorers():
    model, views = CrossMAE(**SMALL).build().eval(), built_in_pictures(CrossMAE(**SMALL)).views[0]
    figure = hidden_patch_figure(model, views, .75, seed=2)
    assert [axis.get_title() for axis in figure.axes] == ["visible", "0 cross", "1 cross"]
    explorer = Explorer({"": model}, views, .75, seed=2)
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes[1:]]
    asked = [i for i in explorer.hidden[0].nonzero()[:, 0].tolist() if (explorer.ask(i), np.allclose(attention_pictures(explorer, "", "decoder.blocks.1.cross_attn")[0] / 255, shown[1], atol=.01))[1]]
    assert len(asked) == 1
