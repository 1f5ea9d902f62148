"""Every family of timm's ViTs: timm's own forward pass is the oracle, whole and with patches hidden."""

import pytest
import timm
import torch
import torch.nn.functional as F

from bigtrain.methods.defend.network import masked_student
from bigtrain.models.architecture import Architecture, timm_module
from bigtrain.models.families import MODULES, family_of
from bigtrain.models.vit import ViT

GUIDES = {  # a network of each kind, whose attention guides a mask
    "vit_tiny_patch16_224": "[CLS]",
    "vit_small_patch14_reg4_dinov2": "[CLS]",
    "vit_base_patch32_clip_224": "[CLS]",
    "vit_base_patch16_siglip_224": "the pooling query",
    "vit_base_patch16_siglip_gap_224": "the mean token",
    "vit_pwee_patch16_reg1_gap_256": "the mean token",  # attention and MLP side by side
    "vit_small_patch16_18x2_224": "[CLS]",  # two attentions side by side
    "vit_base_patch16_rpn_224": "the mean token",  # norms behind the branches
    "vit_dwee_patch16_reg1_gap_256": "the mean token",  # differential attention
    "vit_dpwee_patch16_reg1_gap_256": "the mean token",  # both
    "vit_small_patch16_dinov3": "[CLS]",
    "vit_small_plus_patch16_dinov3": "[CLS]",
    "vit_tiny_patch16_dinov3_qkvb": "[CLS]",
    "eva02_tiny_patch14_224": "[CLS]",
    "eva02_base_patch16_clip_224": "[CLS]",
    "vit_pe_core_tiny_patch16_384": "[CLS]",
    "vit_pe_spatial_tiny_patch16_512": "[CLS]",
    "vit_small_patch16_rope_224": "[CLS]",
    "vit_small_patch16_rope_mixed_224": "[CLS]",  # rotations of each block and head
    "vit_small_patch16_rope_ape_224": "[CLS]",
    "vit_medium_patch16_rope_reg1_gap_256": "the mean token",
    "vit_small_patch16_lingbot": "[CLS]",
    "naflexvit_base_patch16_siglip": "the pooling query",
    "naflexvit_base_patch16_parfac_gap": "the mean token",  # positions of rows and of columns
    "naflexvit_so150m2_patch16_reg1_gap": "the mean token",
    "beit_base_patch16_224": "[CLS]",
    "beitv2_base_patch16_224": "[CLS]",
    "vit_relpos_small_patch16_224": "the mean token",
    "vit_relpos_base_patch16_cls_224": "[CLS]",
    "vit_srelpos_small_patch16_224": "the mean token",  # one bias for all blocks
    "vit_relpos_base_patch16_rpn_224": "the mean token",
    "test_vit_relpos": "the mean token",
    "vit_tiny_r_s16_p8_224": "[CLS]",
    "vit_base_mci_224": "[CLS]",
    "samvit_base_patch16": "the mean token",
}
UNMASKED = ("vit_tiny_r_s16_p8_224", "vit_base_mci_224", "samvit_base_patch16")


@pytest.fixture
def built():
    """A network of two blocks whose weights, biases and tables are all random, and our `ViT` of it."""

    def build(name, image_size=0):
        torch.manual_seed(0)
        # SAM's third block is its first that attends to the whole grid
        net = Architecture(name, image_size, depth=3 if name.startswith("sam") else 2).build().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return net, ViT(net).eval()

    return build


def sizes(vit):
    """Two sizes that a network takes, one of them not square."""
    if vit.family.has_fixed_size:
        return [tuple(side * vit.patch_size for side in vit.grid_size)]
    return [(5 * vit.patch_size, 4 * vit.patch_size), (6 * vit.patch_size, 6 * vit.patch_size)]


def timm_tokens(net, vit, image_B3HW, hidden_BN=None):
    """Patch tokens of timm's own pass; hidden patches cannot be attended to."""
    if hasattr(net, "neck"):  # SAM's last block, before its neck
        (map_BDhw,) = net.forward_intermediates(image_B3HW, indices=[len(net.blocks) - 1], intermediates_only=True)
        return map_BDhw.flatten(2).transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        if hidden_BN is not None:
            hidden_BT = F.pad(hidden_BN, (vit.prefix_tokens, 0))
            original = F.scaled_dot_product_attention

            def masked(q, k, v, attn_mask=None, **options):
                bias_BHTT = torch.zeros(1, 1, 1, 1) if attn_mask is None else attn_mask
                return original(
                    q, k, v, attn_mask=bias_BHTT.masked_fill(hidden_BT[:, None, None], -torch.inf), **options
                )

            patch.setattr(F, "scaled_dot_product_attention", masked)
        tokens_BTD = net.forward_features(image_B3HW)
    norm = getattr(net, "fc_norm", None)
    return (tokens_BTD if norm is None else norm(tokens_BTD))[:, vit.prefix_tokens :]


@pytest.mark.parametrize("name", GUIDES)
@torch.no_grad()
def test_tokens_are_timms(built, name):
    """Tokens are timm's at two sizes, alone and beside views of another size; the guide is what it is called."""
    net, vit = built(name)
    assert vit.guide == GUIDES[name]
    for height, width in sizes(vit):
        image_B3HW = torch.randn(2, 3, height, width)
        expected_BND = timm_tokens(net, vit, image_B3HW)
        (alone,) = vit(image_B3HW, with_attention=True)
        assert alone.attention_BN.shape == expected_BND.shape[:2]
        assert alone.attention_BN.min() >= 0 and 0 < alone.attention_BN.sum(1).max() <= 1 + 1e-5
        other = (height, width) if vit.family.has_fixed_size else (2 * vit.patch_size, 3 * vit.patch_size)
        beside, _ = vit(image_B3HW, torch.randn(3, 3, *other))
        for tokens_BND in (alone.tokens_BND, beside.tokens_BND):
            torch.testing.assert_close(tokens_BND, expected_BND, rtol=1e-4, atol=1e-4)
    assert expected_BND.std(dim=1).mean() > 0.03  # tokens differ, so that the comparison says something


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in UNMASKED])
@torch.no_grad()
def test_hidden_patches(built, name):
    """The visible patches' tokens are those of timm's pass in which nothing attends to the hidden ones."""
    net, vit = built(name)
    image_B3HW = torch.randn(2, 3, *sizes(vit)[0])
    patches = vit(image_B3HW)[0].tokens_BND.shape[1]
    order_BN = torch.rand(2, patches).argsort(dim=1)
    visible_BN = order_BN < patches // 2  # other patches in each image
    expected_BND = timm_tokens(net, vit, image_B3HW, ~visible_BN)
    (seen,) = vit(image_B3HW, visible_BN=visible_BN, with_attention=True)
    expected_BnD = expected_BND[visible_BN].unflatten(0, (2, -1))
    torch.testing.assert_close(seen.tokens_BND, expected_BnD, rtol=1e-4, atol=1e-4)
    assert seen.attention_BN.shape == expected_BnD.shape[:2]
    assert (expected_BND - vit(image_B3HW)[0].tokens_BND).abs().max() > 1e-3  # the mask matters


@pytest.mark.parametrize("name", UNMASKED)
def test_cannot_be_masked(built, name):
    """Where a patch's token sees others before the blocks, or blocks need the grid, masks are refused, and why."""
    _, vit = built(name)
    image_B3HW = torch.randn(1, 3, 2 * vit.patch_size, 2 * vit.patch_size)
    with pytest.raises(ValueError, match=r"can be hidden: its (convolutions|windows) .* Take another --student"):
        vit(image_B3HW, visible_BN=torch.tensor([[True, True, False, False]]))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_relative_positions_size(built, name):
    """Relative positions belong to one size, which may be any when the network is built."""
    _, vit = built(name, 64)
    assert vit(torch.randn(1, 3, 64, 64))[0].tokens_BND.shape[1] == 16
    with pytest.raises(ValueError, match=r"belong to pictures of 64 x 64 pixels, and .* of 32 x 32 were given"):
        vit(torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224",
     "vit_relpos_base_patch16_rpn_224", "naflexvit_base_patch16_parfac_gap", "naflexvit_base_patch16_siglip",
     "vit_dpwee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256"],
)  # fmt: skip
@pytest.mark.parametrize("decoder_blocks", [0, 1])
def test_students(name, decoder_blocks):
    """Students of every family are alive, complete hidden patches, and have a gradient for every weight."""
    torch.manual_seed(0)
    side = 3 * (14 if "patch14" in name else 16)
    student = masked_student(Architecture(name, side, depth=2), drop_path=0.0, decoder_blocks=decoder_blocks).train()
    image_B3HW = torch.randn(2, 3, side, side)
    visible_BN = (torch.arange(9) % 2 == 0).expand(2, -1)
    (encoded,) = student(image_B3HW, visible_BN=visible_BN, last=1 + (not decoder_blocks))
    assert encoded.tokens_BND.shape[1] == (9 if decoder_blocks else 5)
    encoded.tokens_BND.square().sum().backward()
    assert [key for key, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
    if not decoder_blocks:
        first_BND, last_BND = encoded.blocks_LBND.detach()
        assert (last_BND - first_BND).norm() > 0.1 * first_BND.norm()


def test_every_name_has_a_family():
    """Every network that timm defines among its vision transformers is taken."""
    names = [name for name in timm.list_models() if timm_module(name) in MODULES]
    assert len(names) > 290
    for name in names:
        with torch.device("meta"):
            net = Architecture(name, depth=0 if "sapiens2" in name else 1).build()  # their heads are listed by block
        assert family_of(net) is not None, name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin_tiny_patch4_window7_224", "merges patches from stage to stage"),
        ("hiera_tiny_224", "merges patches"),
        ("cait_xxs24_224", "brings its class token in at the end"),
        ("resnet18", "is not a vision transformer whose blocks map tokens to tokens"),
    ],
)
def test_other_kinds(name, why):
    """What is no such ViT is refused by its kind, with what would serve."""
    with pytest.raises(ValueError, match=rf"{name} {why}.* recipes/panda.py or recipes/baselines.py"):
        Architecture(name).build()
