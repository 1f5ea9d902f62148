"""The losses of the papers by hand."""

import math

import pytest
import torch

from bigtrain.methods.deep_novelty.equations import branch_losses, membership_loss
from bigtrain.methods.defend.equations import align_to_crops, dense_loss, distillation_loss
from bigtrain.objectives.token_distances import patch_distance

H, W, PATCH = 8, 10, 4


def ramp_map(images=1):
    """An assignment that is linear over the patch grid: prototype 0 tells the row, 1 the column, 2 the image."""
    row, column = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
    maps = [torch.stack([row / 20, column / 20, torch.full_like(row, i / 20), 0 * row], dim=-1) for i in range(images)]
    map_BhwK = torch.stack(maps)
    map_BhwK[..., 3] = 1 - map_BhwK.sum(dim=-1)  # rows sum to 1
    return map_BhwK


def aligned(map_BhwK, boxes, grid):
    """alpha(Q) for boxes given in patches: (B, V, h, w, K) * 20, so that values are row, column and image numbers."""
    boxes = torch.tensor(boxes).float() * PATCH
    return align_to_crops(map_BhwK, boxes, patch_size=PATCH, grid=grid).unflatten(2, grid) * 20


def test_crop_whole_patches():
    """A crop of whole patches gives those patches."""
    ((found_hwK,),) = aligned(ramp_map(), [[[2, 3, 5, 7]]], (3, 4))
    torch.testing.assert_close(found_hwK[..., 0], torch.tensor([2.0, 3.0, 4.0])[:, None].expand(3, 4))
    torch.testing.assert_close(found_hwK[..., 1], torch.tensor([3.0, 4.0, 5.0, 6.0])[None].expand(3, 4))


def test_crop_half_patch_shift():
    """A crop shifted by half a patch gives the means of neighbours."""
    ((found_hwK,),) = aligned(ramp_map(), [[[2.5, 3.5, 4.5, 5.5]]], (2, 2))
    torch.testing.assert_close(found_hwK[..., 0], torch.tensor([[2.5, 2.5], [3.5, 3.5]]))
    torch.testing.assert_close(found_hwK[..., 1], torch.tensor([[3.5, 4.5], [3.5, 4.5]]))


def test_crop_reduced_averages():
    """A crop's patch that covers four patches gets their mean as a soft target, not the nearest one's."""
    map_BhwK = torch.rand(1, H, W, 3, generator=torch.Generator().manual_seed(0))
    ((found_hwK,),) = aligned(map_BhwK, [[[2, 4, 6, 8]]], (2, 2))
    expected_hwK = map_BhwK[0, 2:6, 4:8].reshape(2, 2, 2, 2, 3).mean(dim=(1, 3)) * 20
    torch.testing.assert_close(found_hwK, expected_hwK)


def test_a_crop_enlarged_interpolates():
    # one patch row and column on a 2 x 2 grid: centres a quarter of a patch off the patch's own
    ((found_hwK,),) = aligned(ramp_map(), [[[4, 6, 5, 7]]], (2, 2))
    torch.testing.assert_close(found_hwK[..., 0], torch.tensor([[3.75, 3.75], [4.25, 4.25]]))
    torch.testing.assert_close(found_hwK[..., 1], torch.tensor([[5.75, 6.25], [5.75, 6.25]]))


def test_crop_image_and_box():
    """Each crop uses its own image and its own box."""
    boxes = [[[1, 1, 3, 3], [4, 5, 6, 7]], [[2, 6, 4, 8], [5, 1, 7, 3]], [[3, 3, 5, 5], [1, 4, 3, 6]]]
    found_BVhwK = aligned(ramp_map(images=3), boxes, (2, 2))
    for image in range(3):
        for crop in range(2):
            top, left, *_ = boxes[image][crop]
            corner = found_BVhwK[image, crop, 0, 0, :3]
            assert corner.tolist() == pytest.approx([top, left, image], abs=1e-5)


def test_aligned_rows_still_sum_to_one():
    map_BhwK = torch.randn(2, H, W, 5, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    boxes = torch.tensor([[[0.0, 0, 32, 40], [1.3, 7.9, 20.1, 30.5]], [[20, 30, 32, 40], [0, 0, 3, 3]]])
    target_BVMK = align_to_crops(map_BhwK, boxes, patch_size=PATCH, grid=(3, 2))
    assert target_BVMK.shape == (2, 2, 6, 5)
    torch.testing.assert_close(target_BVMK.sum(dim=-1), torch.ones(2, 2, 6))


def test_dense_loss_by_hand():
    # softmax([.1, 0] / .1) = [e, 1] / (e + 1), so cross-entropy log(1 + e) - q_0; of equal logits it is log 2
    logits_BVMK = torch.tensor([[[[0.1, 0.0]], [[0.3, 0.3]]], [[[0.0, 0.1]], [[0.0, 0.0]]]], requires_grad=True)
    target_BVMK = torch.tensor([[[[0.75, 0.25]], [[1.0, 0.0]]], [[[1.0, 0.0]], [[0.5, 0.5]]]], requires_grad=True)
    loss_B = dense_loss(logits_BVMK, target_BVMK)
    expected = [(math.log(1 + math.e) - 0.75 + math.log(2)) / 2, (math.log(1 + math.e) + math.log(2)) / 2]
    assert loss_B.tolist() == pytest.approx(expected)
    loss_B.sum().backward()
    assert target_BVMK.grad is None
    assert logits_BVMK.grad.abs().sum() > 0
    assert dense_loss(logits_BVMK, target_BVMK, temperature=1.0)[1].item() == pytest.approx(
        (math.log(1 + math.exp(0.1)) + math.log(2)) / 2
    )


def tokens(*rows):
    """One block, one image, tokens of two features."""
    return torch.tensor([[rows]]).float()


def test_distillation_loss_by_hand():
    predicted, target = tokens([3, 0], [0, 2]), tokens([0, 5], [0, 7])
    # unit vectors at a right angle: 2; parallel: 0
    assert distillation_loss(predicted, target).tolist() == [1.0]
    assert distillation_loss(predicted, -target).tolist() == [3.0]  # opposite: 4
    # plain: 9 + 25 and 25
    assert distillation_loss(predicted, target, normalisation="none").tolist() == [(34 + 25) / 2]
    # the teacher alone on the sphere: [3, 0] to [0, 1] is 10, [0, 2] to [0, 1] is 1
    assert distillation_loss(predicted, target, normalise_student=False).tolist() == [5.5]


def test_layer_normalisation_by_hand():
    # [1, 3] -> [-1, 1], [6, 2] -> [1, -1]: 4 + 4
    loss_B = distillation_loss(tokens([1, 3]), tokens([6, 2]), normalisation="layer")
    assert loss_B.item() == pytest.approx(8, abs=1e-3)


def test_smooth_l1_by_hand():
    # differences 3 and .5: (3 - .5) + .5 * .25
    loss_B = distillation_loss(tokens([3, 0.5]), tokens([0, 0]), normalisation="none", distance="smooth_l1")
    assert loss_B.item() == pytest.approx(2.5 + 0.125)


def test_distillation_blocks():
    """Blocks and patches are averaged, and images are kept apart."""
    predicted_LBND = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 1)  # block b is off by b + 1
    target_LBND = torch.zeros(2, 3, 4, 1).contiguous()
    target_LBND[:, 2] = predicted_LBND[:, 2]  # the third image agrees
    target_LBND[:, 1, :2] = predicted_LBND[:, 1, :2]  # the second in half of its patches
    loss_B = distillation_loss(predicted_LBND, target_LBND, normalisation="none")
    assert loss_B.tolist() == [2.5, 1.25, 0.0]  # (1 + 4) / 2
    assert patch_distance(predicted_LBND, target_LBND, normalisation="none")[1].tolist() == [0, 0, 2.5, 2.5]


def test_distillation_visible():
    """The student is compared with the teacher at the patches it saw, in their order."""
    target_LBND = torch.arange(1, 9).float().view(1, 2, 4, 1)
    visible_BN = torch.tensor([[True, False, False, True], [False, True, True, False]])
    predicted_LBnD = torch.tensor([[[1.0], [4.0]], [[6.0], [7.0]]])[None]
    assert distillation_loss(predicted_LBnD, target_LBND, visible_BN, normalisation="none").tolist() == [0, 0]
    swapped = predicted_LBnD.flip(2)
    assert distillation_loss(swapped, target_LBND, visible_BN, normalisation="none").tolist() == [9, 1]


def test_distillation_gradient():
    """The gradient reaches the student alone."""
    predicted = torch.randn(1, 2, 3, 4, requires_grad=True)
    target = torch.randn(1, 2, 3, 4, requires_grad=True)
    distillation_loss(predicted, target).sum().backward()
    assert target.grad is None
    assert predicted.grad.abs().sum() > 0


@pytest.mark.parametrize("normalisation", ["l2", "layer", "none"])
def test_distillation_float32(normalisation):
    """The loss is computed in float32, from bf16 inputs too."""
    predicted, target = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 3, 8).bfloat16()
    found = distillation_loss(predicted, target, normalisation=normalisation)
    assert found.dtype == torch.float32
    assert torch.equal(found, distillation_loss(predicted.float(), target.float(), normalisation=normalisation))


def test_predicted_patches_by_hand():
    """The loss is on the patches that are seen, on those that are hidden, or on all of them."""
    target = tokens([3, 0], [0, 2], [1, 0], [-1, 0])  # to the answers below: 2, 0, 0, 4
    answers = tokens([0, 5], [0, 7], [1, 0], [4, 0])
    visible_BN = torch.tensor([[True, False, True, False]])
    seen = answers[:, :, visible_BN[0]]
    assert distillation_loss(seen, target, visible_BN).tolist() == [1.0]
    assert distillation_loss(answers, target, visible_BN, predict="hidden").tolist() == [2.0]
    assert distillation_loss(answers, target, visible_BN, predict="all").tolist() == [1.5]
    assert distillation_loss(answers, target).tolist() == [1.5]


@pytest.mark.parametrize("options", [{}, {"normalisation": "layer"}, {"distance": "smooth_l1"}])
def test_distance_zero(options):
    """A student that is the teacher is at a distance of exactly zero."""
    same = torch.randn(3, 2, 5, 7)
    assert not patch_distance(same, same.clone(), **options).any()


def test_membership_loss_by_hand():
    # s = [.5, .5, .5], true class 0:  5 (1 - .5)^2 + (.5^2 + .5^2) / 2 = 1.25 + 0.25
    assert membership_loss(torch.zeros(1, 3), torch.tensor([0])).item() == pytest.approx(1.5)
    # s = [.8, .5], true class 1:  2 (1 - .5)^2 + .8^2 = 0.5 + 0.64; and the mean of both
    logits_BC = torch.tensor([[math.log(4), 0.0], [math.log(4), 0.0]])
    found = membership_loss(logits_BC, torch.tensor([1, 0]), true_class_weight=2.0)
    assert found.tolist() == pytest.approx([1.14, 2 * 0.04 + 0.25])


def test_wrong_class_weight():
    """The wrong classes can be weighted in place of the true one, as in the authors' code."""
    found_B = membership_loss(torch.zeros(1, 3), torch.tensor([0]), true_class_weight=1.0, wrong_class_weight=5.0)
    assert found_B.tolist() == pytest.approx([0.25 + 5 * 0.25])


def test_branch_losses_by_hand():
    """Eq. 4: weighted cross-entropy and membership loss of known images, cross-entropy of every other branch's."""
    logits, class_B = torch.tensor([[0.0, math.log(3)]]), {"known": torch.tensor([1]), "birds": torch.tensor([0])}
    found = branch_losses({"known": logits, "birds": logits}, class_B, ce_weight=2.0, membership_weight=0.5)
    # softmax 1/4, 3/4; sigmoid 1/2, 3/4: membership 5 (1/4)^2 + (1/2)^2
    assert found["known"].item() == pytest.approx(2 * math.log(4 / 3) + 0.5 * (5 / 16 + 1 / 4))
    assert found["birds"].item() == pytest.approx(math.log(4))


def test_joint_branch_losses():
    """With one softmax over all branches, each branch's true class is offset by its first class."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    of_branch = dict.fromkeys(("known", "birds", "letters"), logits)
    class_B, first_class = dict.fromkeys(of_branch, torch.tensor([0])), {"known": 0, "birds": 2, "letters": 3}
    found = branch_losses(of_branch, class_B, ce_weight=1.0, membership_weight=0.0, first_class=first_class)
    minus_log_4 = -logits.log_softmax(dim=1)[0]
    for name, loss_B in found.items():
        assert loss_B.item() == pytest.approx(minus_log_4[first_class[name]].item())


def test_membership_gradient():
    """The membership loss has the gradient of the paper and of finite differences."""
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    class_B = torch.tensor([0, 4, 2, 2])
    membership_loss(logits_BC, class_B, true_class_weight=3.0).mean().backward()
    s = logits_BC.detach().sigmoid()
    slope = s * (1 - s)
    by_hand = 2 / 4 * s * slope  # 2/(c-1) s s' for i != y
    rows = torch.arange(4)
    by_hand[rows, class_B] = (-2 * 3.0 * (1 - s) * slope)[rows, class_B]
    torch.testing.assert_close(logits_BC.grad, by_hand / 4, atol=1e-6, rtol=1e-5)
    step = 1e-2  # the loss is computed in float32
    for row, column in ((0, 0), (1, 2), (3, 2)):
        moved = [logits_BC.detach().clone() for _ in range(2)]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        above, below = (membership_loss(m, class_B, true_class_weight=3.0).mean().item() for m in moved)
        assert (above - below) / (2 * step) == pytest.approx(logits_BC.grad[row, column].item(), abs=1e-4)


def test_one_class_has_no_wrong_ones():
    with pytest.raises(ValueError, match="name two at least"):
        membership_loss(torch.zeros(2, 1), torch.tensor([0, 0]))


def test_dense_loss_sums_prototypes():
    """Equal logits of three prototypes cost log 3 whatever the target, with any number of crops and patches."""
    target_BVMK = torch.rand(1, 2, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    assert dense_loss(torch.zeros(1, 2, 4, 3), target_BVMK).tolist() == pytest.approx([math.log(3)])


def test_patch_distance_by_hand():
    """Each token on its own unit sphere, by default: [.6, .8] to [1, 0] is .16 + .64, [0, 1] to [0, 1] nothing."""
    one, other = torch.tensor([[[[3.0, 4.0], [0.0, 2.0]]]]), torch.tensor([[[[5.0, 0.0], [0.0, 7.0]]]])
    assert patch_distance(one, other)[0].tolist() == pytest.approx([0.8, 0])
