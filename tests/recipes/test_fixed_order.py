"""Training on a GPU is deterministic: no recipe uses operations without a deterministic kernel (torch would raise)."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recipes import defend, pretrain

# of the list in torch.use_deterministic_algorithms, by the names that such operations have when they run
WITHOUT_FORM = (
    "upsample",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool3d",
    "fractional_max_pool",
    "max_pool3d",
    "max_unpool",
    "reflection_pad",
    "replication_pad",
    "grid_sampler",
    "embedding_bag",
    "ctc_loss",
    "roi_align",
)  # fmt: skip: those whose backward pass has none
WITHOUT_FORM_EITHER = ("aten.put_", "aten.histc", "aten.bincount", "aten.kthvalue", "aten.median.dim", "nll_loss2d")


class Seen(TorchDispatchMode):
    """The operations that have run."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))

    def without_form(self):
        backward = {name for name in self.names if "backward" in name and any(part in name for part in WITHOUT_FORM)}
        return backward | {name for name in self.names if any(part in name for part in WITHOUT_FORM_EITHER)}


FURTHER = "--tune-epochs 4 --ema-teacher --ema-student 0.9 --queue 64 --global-crops 1 --clip 1 --accumulate 2"


@pytest.mark.parametrize("flags", [f"{FURTHER} --recompute", "--keep random --distance smooth_l1", "--mask-ratio 0"])
def test_of_defend(small, tmp_path, flags):
    with Seen() as seen:
        defend.main([*small, *flags.split(), "--out", str(tmp_path / "run")])
    assert "torchvision.roi_align.default" in seen.names and "aten.native_layer_norm_backward.default" in seen.names
    assert not seen.without_form()


def test_of_pretrain(shards, tmp_path):
    sizes = "--model vit_tiny_patch16_224 --image-size 32 --patch-size 8 --depth 1 --epochs 1 --batch 100 --pool both"
    with Seen() as seen:
        pretrain.main(["--train", str(shards / "test"), *sizes.split(), "--out", str(tmp_path / "run")])
    assert "aten.nll_loss_backward.default" in seen.names and not seen.without_form()


def test_would_be_seen():
    """An operation without a deterministic form would be seen."""
    image = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with Seen() as seen:
        F.interpolate(image, size=(8, 8), mode="bilinear").sum().backward()
    assert seen.without_form() == {"aten.upsample_bilinear2d_backward.default"}
