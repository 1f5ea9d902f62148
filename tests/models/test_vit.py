"""Our packed forward pass is timm's, the masked one is that of the tokens it kept, and the rest is refused."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from bigtrain.methods.defend.checks import check_pair
from bigtrain.methods.defend.network import masked_student, sincos_positions
from bigtrain.models.architecture import Architecture, check_image_size
from bigtrain.models.vit import ViT

KINDS = {  # model: image and patch size that keep it small
    "vit_tiny_patch16_224": (32, 8),
    "vit_small_patch14_reg4_dinov2": (42, 14),  # registers, layer scale, no position for [CLS]
    "deit3_small_patch16_224": (32, 16),  # layer scale, no position for [CLS]
    "vit_xsmall_patch16_clip_224": (32, 16),  # a norm before the blocks
    "vit_wee_patch16_reg1_gap_256": (32, 16),  # no [CLS], one register, the norm behind pooling
    "vit_medium_patch16_gap_240": (32, 16),  # no prefix at all
    "deit_tiny_distilled_patch16_224": (32, 16),  # a distillation token
}


def images(count=2, height=32, width=32, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def timm_tokens(net, image_B3HW):
    return net.fc_norm(net.forward_features(image_B3HW))


@pytest.mark.parametrize("model", KINDS)
@torch.no_grad()
def test_the_packed_pass_is_timm_s_own(network, model):
    size, patch = KINDS[model]
    net, vit = network(model, size, patch)
    for height, width in ((size, size), (2 * size, size)):  # the second resamples positions
        image_B3HW = images(2, height, width)
        expected = timm_tokens(net, image_B3HW)
        (encoded,) = vit(image_B3HW)
        torch.testing.assert_close(encoded.tokens_BND, expected[:, net.num_prefix_tokens :], rtol=1e-4, atol=1e-4)
        if net.has_class_token:
            torch.testing.assert_close(encoded.class_BD, expected[:, 0], rtol=1e-4, atol=1e-4)
        else:
            assert encoded.class_BD is None
        assert encoded.attention_BN is None
    assert expected.std(dim=1).mean() > 0.03  # tokens differ, so that the comparison says something


@torch.no_grad()
def test_last_blocks(network):
    """The last blocks are those of timm, and more blocks than there are cannot be asked for."""
    net, vit = network(depth=4)
    (encoded,) = vit(images(), last=3)
    blocks = net.get_intermediate_layers(images(), n=3, norm=False)
    assert encoded.blocks_LBND.shape[0] == 3
    for ours, theirs in zip(encoded.blocks_LBND[:2], blocks[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(encoded.tokens_BND, net.norm(blocks[2]))
    with pytest.raises(ValueError, match="last is 5, and the network has 4 blocks: use 1 to 4"):
        vit(images(), last=5)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_packed_views(network, model):
    """One packed pass over views of many sizes equals a pass over each."""
    size, patch = KINDS[model]
    _, vit = network(model, size, patch)
    views = [images(2, size, size), images(5, patch, patch, seed=1), images(1, patch, 4 * patch, seed=2)]
    together = vit(*views, last=2, with_attention=True)
    assert len(together) == 3
    for view, packed in zip(views, together, strict=True):
        (alone,) = vit(view, last=2, with_attention=True)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def half_visible(count=2, patches=16, seed=0):
    order_BN = torch.rand(count, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return torch.zeros(count, patches, dtype=torch.bool).scatter_(1, order_BN[:, : patches // 2], True)


@pytest.mark.parametrize(
    "model", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_xsmall_patch16_clip_224"]
)
@torch.no_grad()
def test_masked_pass(network, model):
    """A masked pass is timm's blocks applied to the kept tokens in their order."""
    patch = KINDS[model][1]
    net, vit = network(model, 4 * patch, patch)
    image_B3HW, visible_BN = images(2, 4 * patch, 4 * patch), half_visible()
    embedded = net._pos_embed(net.patch_embed(image_B3HW))
    prefix = net.num_prefix_tokens
    for one in range(2):
        kept = [embedded[one, t] for t in range(prefix)]
        kept += [embedded[one, prefix + n] for n in range(16) if visible_BN[one, n]]
        expected = net.norm(net.blocks(net.norm_pre(torch.stack(kept)[None])))
        (encoded,) = vit(image_B3HW, visible_BN=visible_BN)
        torch.testing.assert_close(encoded.tokens_BND[one], expected[0, prefix:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoded.class_BD[one], expected[0, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_patches(network):
    """What lies under hidden patches changes no bit, and with none hidden the pass is the plain one."""
    _, vit = network()
    image_B3HW, visible_BN = images(), half_visible()
    hidden_BHW = (~visible_BN).view(2, 4, 4).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    other = torch.where(hidden_BHW[:, None], images(seed=9), image_B3HW)
    one, two = (vit(x, visible_BN=visible_BN)[0] for x in (image_B3HW, other))
    assert torch.equal(one.tokens_BND, two.tokens_BND)
    assert torch.equal(one.class_BD, two.class_BD)
    everything = torch.ones_like(visible_BN)
    assert torch.equal(vit(image_B3HW, visible_BN=everything)[0].tokens_BND, vit(image_B3HW)[0].tokens_BND)


def by_hand(qkv_BTF, heads, prefix):
    """Attention of [CLS] to the patches, mean over heads, in float64 and head by head."""
    q, k, _ = qkv_BTF.double().chunk(3, dim=-1)
    per_head = []
    for q_d, k_Td in zip(q[:, 0].chunk(heads, dim=-1), k.chunk(heads, dim=-1), strict=True):
        per_head.append((torch.einsum("bd,btd->bt", q_d, k_Td) / q_d.shape[-1] ** 0.5).softmax(dim=-1))
    return (sum(per_head) / heads)[:, prefix:].float()


def last_qkv(net):
    seen = []
    net.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, out: seen.append(out))
    return seen


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_cls_attention(network, model):
    """The attention of [CLS] is the softmax of timm's own queries and keys, averaged over heads."""
    size, patch = KINDS[model]
    net, vit = network(model, size, patch)
    seen = last_qkv(net)
    net.forward_features(images(2, size, size))
    expected_BN = by_hand(seen[0], net.blocks[-1].attn.num_heads, net.num_prefix_tokens)
    (encoded,) = vit(images(2, size, size), with_attention=True)
    torch.testing.assert_close(encoded.attention_BN, expected_BN, rtol=1e-4, atol=1e-6)
    assert expected_BN.max() / expected_BN.min() > 1.2


@torch.no_grad()
def test_cls_attention_float32(network):
    """The attention of [CLS] is computed in float32 under autocast."""
    net, vit = network()
    seen = last_qkv(net)
    with torch.autocast("cpu", torch.bfloat16):
        (encoded,) = vit(images(), with_attention=True)
    assert seen[0].dtype == torch.bfloat16
    assert encoded.attention_BN.dtype == torch.float32
    expected_BN = by_hand(seen[0].unflatten(0, (2, 17)), 3, 1)
    torch.testing.assert_close(encoded.attention_BN, expected_BN, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_drop_path(network):
    """Drop path drops whole sequences and scales up those it keeps."""
    net, vit = network(drop_path=0.5)  # 0 in the first block, .5 in the second
    net.norm = nn.Identity()
    net.blocks[1].mlp = nn.Identity()  # leaves only the attention branch
    net.blocks[1].ls2 = nn.Module()
    net.blocks[1].ls2.forward = torch.zeros_like
    views = [images(100), images(100, 16, 16, seed=1)]

    def branch():
        return [e.blocks_LBND[1] - e.blocks_LBND[0] for e in vit(*views, last=2)]

    whole = branch()
    net.train()
    dropped = []
    for kept, of_eval in zip(branch(), whole, strict=True):
        for one, expected in zip(kept, of_eval, strict=True):
            dropped.append(not one.any())
            if not dropped[-1]:
                torch.testing.assert_close(one, 2 * expected, rtol=1e-3, atol=1e-4)
    assert 65 < sum(dropped) < 135  # of 200, five standard deviations
    assert 0 < sum(dropped[:100]) < 100 and 0 < sum(dropped[100:]) < 100


def test_unknown_model():
    """An unknown model is refused, with names that are near it."""
    with pytest.raises(ValueError, match=r"timm has no model 'vit_tiny_patch61_224'; near it: .*vit_tiny_patch16_224"):
        Architecture("vit_tiny_patch61_224").build()


def test_architecture():
    """An architecture is timm's but for the sizes that are named."""
    net = Architecture("vit_tiny_patch16_224", 32, 8, 3).build()
    assert (len(net.blocks), net.patch_embed.patch_size, net.pos_embed.shape[1]) == (3, (8, 8), 17)
    net = Architecture("vit_tiny_patch16_224").build()
    assert (len(net.blocks), net.patch_embed.patch_size, net.pos_embed.shape[1]) == (12, (16, 16), 197)


def test_patch_does_not_divide(network):
    """A picture that the patch does not divide is refused, with the sizes that would do."""
    with pytest.raises(ValueError, match=r"patch size 16 does not divide .* 100 x 100 pixels: use 96 or 112"):
        check_image_size((100, 100), 16)
    with pytest.raises(ValueError, match="use 16 or 32"):
        check_image_size((10, 10), 16)
    with pytest.raises(ValueError, match="patch size 8 does not divide"):
        network()[1](images(1, 32, 30))


def test_sine_cosine_positions_by_hand():
    s, c = math.sin(1), math.cos(1)
    expected = torch.tensor([[0, 1, 0, 1], [0, 1, s, c], [s, c, 0, 1], [s, c, s, c]])
    torch.testing.assert_close(sincos_positions(2, 2, 4), expected)
    # with 8 features there are two frequencies, 1 and 10000^(-1/2)
    row = torch.tensor([math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)])
    torch.testing.assert_close(sincos_positions(3, 1, 8)[2], torch.cat([row, torch.tensor([0.0, 0, 1, 1])]))
    with pytest.raises(ValueError, match="a width that 4 divides"):
        sincos_positions(2, 2, 6)


SMALL = Architecture("vit_tiny_patch16_224", 32, 8, 3)


@pytest.mark.parametrize(
    ("architecture", "prefix"), [(SMALL, 1), (Architecture("deit3_small_patch16_224", 32, 8, 1), 0)]
)
def test_student_positions(architecture, prefix):
    """The student's positions are sines and cosines, and are all that does not learn."""
    net = masked_student(architecture).backbone
    assert not net.pos_embed.requires_grad
    expected = torch.cat([torch.zeros(prefix, net.embed_dim), sincos_positions(4, 4, net.embed_dim)])
    assert torch.equal(net.pos_embed[0], expected)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed"]


def test_student_init():
    """The seed decides the student's weights; linears are Xavier's, drop path rises with depth."""
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(masked_student(SMALL, drop_path=0.2).backbone)
    one, again, other = (net.state_dict() for net in nets)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    for name, (fan_out, fan_in) in {"attn.qkv": (576, 192), "mlp.fc2": (192, 768)}.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5
        weight = one[f"blocks.1.{name}.weight"]
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not one[f"blocks.1.{name}.bias"].any()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in nets[0].blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("model", [*KINDS, "vit_base_patch16_siglip_224"])
def test_student_gradients(model):
    """Every weight of the student that learns has a gradient, as DDP demands."""
    size, patch = KINDS.get(model, (32, 16))
    student = masked_student(Architecture(model, size, patch, 1), drop_path=0.0)
    visible_BN = half_visible(2, (size // patch) ** 2)
    student(images(2, size, size), visible_BN=visible_BN)[0].tokens_BND.square().sum().backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("model", [*KINDS, "vit_base_patch16_siglip_224", "vit_small_patch14_dinov2"])
@torch.no_grad()
def test_student_is_alive(model):
    """At initialisation each block of a student changes its tokens by more than a tenth, LayerScale or not."""
    size, patch = KINDS.get(model, (42, 14 if "patch14" in model else 16))
    torch.manual_seed(0)
    student = masked_student(Architecture(model, size // patch * patch, patch, 3)).eval()
    net = student.backbone
    net.norm, net.fc_norm = nn.Identity(), nn.Identity()  # what the blocks give, as it is
    image_B3HW = images(2, size // patch * patch, size // patch * patch)
    embedded_BND = student._embed(image_B3HW)[0][:, net.num_prefix_tokens :]
    blocks_LBND = student(image_B3HW, last=3)[0].blocks_LBND
    for before, after in pairwise([embedded_BND, *blocks_LBND]):
        assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("model", KINDS)
@torch.no_grad()
def test_completed_by_hand(network, model):
    """A decoder block gets the visible patches in their places, and mask tokens with positions in the others."""
    size, patch = KINDS[model]
    torch.manual_seed(0)
    architecture = Architecture(model, size, patch, 3)
    student = masked_student(architecture, decoder_blocks=2).eval()
    net, patches = student.backbone, (size // patch) ** 2
    image_B3HW, visible_BN = images(2, size, size), half_visible(2, patches)
    (found,) = student(image_B3HW, visible_BN=visible_BN, last=2)
    prefix = net.num_prefix_tokens
    x_BTD = net.norm_pre(net._pos_embed(net.patch_embed(image_B3HW)))
    position_ND = net.pos_embed[0, -patches:]
    expected = []
    for x_TD, visible_N in zip(x_BTD, visible_BN, strict=True):
        seen_TD = torch.cat([x_TD[:prefix], x_TD[prefix:][visible_N]])
        seen_TD = net.blocks[0](seen_TD[None])[0]
        whole_TD = torch.cat([seen_TD[:prefix], student.mask_token_D + position_ND])
        whole_TD[prefix:][visible_N] = seen_TD[prefix:]
        first_TD = net.blocks[1](whole_TD[None])
        last_TD = net.fc_norm(net.norm(net.blocks[2](first_TD)))
        expected.append(torch.cat([first_TD, last_TD])[:, prefix:])
    torch.testing.assert_close(found.blocks_LBND, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-5)


def test_decoder_gradients():
    """With a decoder block every trainable weight gets a gradient, the mask token too; hidden pixels change nothing."""
    student = masked_student(SMALL, drop_path=0.0, decoder_blocks=1)
    image_B3HW, visible_BN = images(2), half_visible(2, 16)
    (found,) = student(image_B3HW, visible_BN=visible_BN)
    found.tokens_BND[~visible_BN].square().sum().backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert student.mask_token_D.grad.abs().sum() > 0
    is_hidden_BHW = (~visible_BN).unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    student.eval()
    with torch.no_grad():
        other = torch.where(is_hidden_BHW[:, None], images(2, seed=1), image_B3HW)
        one, two = (student(x, visible_BN=visible_BN)[0].tokens_BND for x in (image_B3HW, other))
    assert torch.equal(one, two)


@torch.no_grad()
def test_completes_what_is_hidden():
    """With every patch visible a student with decoder blocks is the plain network."""
    torch.manual_seed(0)
    student = masked_student(SMALL, decoder_blocks=2).eval()
    whole, all_visible = student(images())[0], student(images(), visible_BN=torch.ones(2, 16, dtype=torch.bool))[0]
    torch.testing.assert_close(whole.tokens_BND, all_visible.tokens_BND)


def test_too_deep_decoder():
    with pytest.raises(ValueError, match="decoder_blocks is 4, and the network has 3 blocks: use 1 to 3"):
        masked_student(SMALL, decoder_blocks=4)
    with pytest.raises(ValueError, match="the last 2 blocks were asked for at hidden patches"):
        masked_student(SMALL, decoder_blocks=1)(images(), visible_BN=half_visible(2, 16), last=2)


def test_pair_mismatch(network):
    """A student that cannot be compared with its teacher is refused."""
    teacher = network()[1]
    check_pair(teacher, network(depth=3)[1], last=2)
    check_pair(teacher, network("vit_small_patch16_224")[1], last=1)  # a student projects its tokens
    with pytest.raises(ValueError, match="teacher's patch size is 8 and the student's 16"):
        check_pair(teacher, network(patch_size=16)[1], last=1)
    with pytest.raises(ValueError, match=r"--distilled-blocks is 3, and the (teacher|student) has 2 blocks"):
        check_pair(teacher, network(depth=3)[1], last=3)


def test_projected_student():
    """A student of another width gives its last blocks' tokens through linear layers, each block's through its own."""
    teacher = ViT(Architecture("vit_small_patch16_224", 32, 8, 3).build())
    torch.manual_seed(0)
    student = masked_student(SMALL, drop_path=0.0, like=teacher, distilled_blocks=3)
    check_pair(teacher, student, last=3)
    (encoded,) = student(images(), visible_BN=half_visible(2, 16), last=3)
    assert encoded.blocks_LBND.shape == (3, 2, 8, 384)
    (last,) = student(images(), visible_BN=half_visible(2, 16))
    assert torch.equal(last.tokens_BND, encoded.tokens_BND)
    plain = ViT(student.backbone)(images(), visible_BN=half_visible(2, 16), last=3)[0].blocks_LBND
    for number, project in enumerate(student.projections):
        torch.testing.assert_close(encoded.blocks_LBND[number], project(plain[number]))
    encoded.blocks_LBND.sum().backward()
    assert [key for key, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_attention_backend(network):
    """The attention backend that is named is the one that serves, or is refused."""
    net, vit = network()
    dense = ViT(net, attention="dense")(images())[0].tokens_BND
    torch.testing.assert_close(vit(images())[0].tokens_BND, dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="backend xformers was asked for on cpu"):
        ViT(net, attention="xformers")(images())


def gradients(vit, views, *, recompute, **options):
    """A training pass's outputs and gradients."""
    vit.recompute = recompute
    vit.zero_grad()
    torch.manual_seed(7)  # for drop path
    encoded = vit(*views, **options)
    sum(e.blocks_LBND.float().square().mean() for e in encoded).backward()
    return encoded, {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", ["views", "masked", "attention", "last blocks"])
def test_recompute_same_bits(network, case, bf16):
    """Recomputed blocks give the same bits, forward and backward."""
    net, vit = network("vit_small_patch14_reg4_dinov2", 56, 14, depth=4, drop_path=0.5)
    vit.train()
    views, options = {
        "views": ((images(3, 56, 56), images(6, 28, 14, seed=1)), {"last": 2}),
        "masked": ((images(8, 56, 56),), {"visible_BN": half_visible(8)}),
        "attention": ((images(8, 56, 56),), {"with_attention": True, "last": 4}),
        "last blocks": ((images(8, 56, 56),), {"last": 3}),
    }[case]
    if case == "last blocks":
        vit.requires_grad_(False)
        net.blocks[2:].requires_grad_(True)
    sequences = []
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            sequences.append(gradients(vit, views, recompute=recompute, **options))
    (encoded, expected), (again, ours) = sequences
    for one, other in zip(encoded, again, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert (
        set(ours)
        == set(expected)
        == {name for name, p in vit.named_parameters() if p.requires_grad}
        - ({"backbone.norm.weight", "backbone.norm.bias"} if case == "last blocks" else set())
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert any(gradient.any() for gradient in ours.values())


def bytes_kept(vit, views, **options):
    """Bytes that a forward pass keeps for the backward pass, weights aside, each storage once."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in vit.parameters()}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # held, or its address is reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        vit(*views, **options)
    return sum(size for place, (size, _) in kept.items() if place not in weights)


def test_recompute_memory(network):
    """Recomputed blocks keep less than 15% of the memory for the backward pass."""
    _, vit = network(depth=6)
    views = (images(4), images(8, 16, 16))
    kept = bytes_kept(vit, views)
    vit.recompute = True
    assert bytes_kept(vit, views) < 0.15 * kept  # one input of 192 numbers a token, of some 20 such


def test_recompute_frozen_blocks(network):
    """With recomputing, blocks below the first that learns keep nothing and are not run again."""
    net, vit = network(depth=4)
    vit.requires_grad_(False)
    net.blocks[3].requires_grad_(True)
    calls, inputs = [], []

    def note(x_TD, depth):
        calls.append(depth)
        inputs.append(weakref.ref(x_TD))

    for depth, block in enumerate(net.blocks):
        block.norm1.register_forward_pre_hook(lambda _, args, depth=depth: note(*args, depth))
    vit.recompute = True
    (encoded,) = vit(images())
    assert [x() is not None for x in inputs] == [False, False, False, True]
    encoded.tokens_BND.sum().backward()
    assert calls == [0, 1, 2, 3, 3]
    with torch.no_grad():
        vit(images())
    assert calls == [0, 1, 2, 3, 3, 0, 1, 2, 3]


def test_recompute_default(network):
    """Recomputing is off unless set, and is no part of the weights."""
    _, vit = network()
    assert not vit.recompute
    keys = list(vit.state_dict())
    vit.recompute = True
    assert list(vit.state_dict()) == keys


@pytest.mark.slow
def test_compile(network):
    """A compiled network gives the outputs and gradients it gave, with the same names of weights."""
    _, vit = network()
    views, visible_BN = (images(), images(4, 16, 16)), half_visible()

    def outputs():
        with torch.no_grad():
            return [*vit(*views, last=2, with_attention=True), *vit(images(), visible_BN=visible_BN)]

    expected, keys = outputs(), list(vit.state_dict())
    trained = [
        gradients(vit, (images(),), recompute=recompute, visible_BN=visible_BN)[1] for recompute in (False, True)
    ]
    vit.compile()
    torch.testing.assert_close(outputs(), expected, rtol=1e-5, atol=1e-5)
    assert list(vit.state_dict()) == keys
    for recompute, gradient in enumerate(trained):
        _, ours = gradients(vit, (images(),), recompute=bool(recompute), visible_BN=visible_BN)
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4)
