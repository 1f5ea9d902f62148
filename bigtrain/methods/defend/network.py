"""The networks of DEFEND: what is trained in dense tuning (3.1), and the masked student (3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.choices import Backend
from bigtrain.models.architecture import Architecture, check_blocks
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT


class ProjectionHead(nn.Sequential):
    """Three linear layers with GELU between them (DEFEND 4.2: hidden 2048, output 256); its output is L2-normalised."""

    def __init__(self, width: int, hidden: int = 2048, output: int = 256) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, output)
        )

    def forward(self, tokens_TD: Tensor) -> Tensor:
        return F.normalize(super().forward(tokens_TD), dim=-1)


def unit_rows(weight_KD: Tensor) -> Tensor:
    """Prototypes put back on the sphere; after each update."""
    return F.normalize(weight_KD, dim=1)


class Prototypes(nn.Module):
    """K learnable unit vectors; gives the cosine of each projected token with each of them (DEFEND 3.1)."""

    def __init__(self, count: int, width: int = 256) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(unit_rows(torch.randn(count, width)))

    def forward(self, projected_TD: Tensor) -> Tensor:
        return F.linear(projected_TD, self.weight_KD)


class DenseTuner(nn.Module):
    """The trained part of dense tuning (DEFEND 3.1) as one module: a trunk, the projection head g, the prototypes p.

    Only the last `tuned_blocks` blocks of the trunk learn, beside head and prototypes. The others are the same for all
    views and for a moving average: `frozen=True` runs them once for all.
    """

    def __init__(self, vit: ViT, prototypes: int, tuned_blocks: int) -> None:
        super().__init__()
        check_blocks("tuned_blocks", tuned_blocks, vit.backbone)
        self.vit, self.head, self.prototypes = vit, ProjectionHead(vit.width), Prototypes(prototypes)
        self.frozen_blocks = len(vit.backbone.blocks) - tuned_blocks
        vit.requires_grad_(False)
        vit.backbone.blocks[-tuned_blocks:].requires_grad_(True)

    def forward(self, *views: Any, frozen: bool = False) -> Any:
        """Project patch tokens and compare them with the prototypes; all views are encoded in one packed pass.

        Args:
            views: whole images (B, 3, H, W), or kinds of crops of them (B V, 3, h, w); or what `frozen` has given for
                them. A single view with two axes is one of projected tokens, z_TD, to be compared only.
            frozen: run the frozen blocks only, without a graph.

        Returns:
            z of each view, (B, N, D), and the cosines z' p, (B, N, K); with `frozen` a `vit.Packed`, which may be cut
            into views.
        """
        if frozen:
            return self.vit.begin(*views, blocks=self.frozen_blocks)
        is_projected = isinstance(views[0], Tensor) and views[0].ndim == 2
        z = list(views) if is_projected else [self.head(view.tokens_BND) for view in self.vit(*views)]
        return z, [self.prototypes(z_TD) for z_TD in z]


class TokenQueue(nn.Module):
    """The newest projected tokens of all ranks, the same on each: it steadies Sinkhorn where a batch has few tokens."""

    def __init__(self, length: int, width: int = 256) -> None:
        super().__init__()
        self.z_QD: Tensor
        self.filled: Tensor
        self.register_buffer("z_QD", torch.zeros(length, width))
        self.register_buffer("filled", torch.tensor(0))

    def full(self) -> bool:
        return int(self.filled) == len(self.z_QD)

    def share(self, rank: int, world_size: int) -> Tensor:
        """This rank's part, so that the parts of all ranks are the queue once."""
        return self.z_QD.tensor_split(world_size)[rank]

    def push(self, z_TD: Tensor) -> None:
        """Append the tokens of all ranks, in their order; the oldest leave."""
        newest = torch.cat([self.z_QD, z_TD.float()])[-len(self.z_QD) :]
        self.z_QD.copy_(newest)
        self.filled.fill_(min(len(self.z_QD), int(self.filled) + len(z_TD)))


def masked_student(
    architecture: Architecture,
    *,
    drop_path: float = 0.1,
    attention: Backend = "auto",
    decoder_blocks: int = 0,
    like: ViT | None = None,
    distilled_blocks: int = 1,
) -> ViT:
    """A student of DEFEND 3.2: random weights, xavier linears, fixed sine-cosine positions, drop path 0 -> `drop_path`.

    The initialisation is the authors' code's (that of masked autoencoders, He et al. 2022); the paper says "randomly
    initialized". LayerScale, and the norm at the end of a branch, start at 1: timm's 1e-5 of DINOv2 and 1e-6 of
    DeiT-III are for networks whose weights are loaded, and blocks scaled so would leave a student's tokens as they are.
    Draws from torch's global generator.

    Args:
        decoder_blocks: how many of the last blocks complete the hidden patches; 0: hidden patches are dropped.
        like: the teacher; the tokens of a student of another width are projected to its width.
        distilled_blocks: how many blocks' tokens are.
    """
    net: Any = architecture.build(drop_path=drop_path)
    net.attn_pool = None  # no use for it, and DDP wants a gradient for every weight
    for module in net.modules():
        for name in ("gamma", "gamma_1", "gamma_2"):
            if isinstance(scale := getattr(module, name, None), nn.Parameter):
                nn.init.ones_(scale)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    width = 0 if like is None or like.width == net.embed_dim else like.width
    student = ViT(
        net, attention=attention, decoder_blocks=decoder_blocks, projected_blocks=distilled_blocks if width else 0,
        projected_width=width,
    )  # fmt: skip
    stem = student.family.stem(net)
    nn.init.xavier_uniform_(stem.proj.weight.view(net.embed_dim, -1))
    holder = stem if hasattr(stem, "cls_token") else net  # NaFlexViT's stem has the tokens and the positions
    for name in ("cls_token", "reg_token"):
        if getattr(holder, name, None) is not None:
            nn.init.normal_(getattr(holder, name), std=0.02)
    position = getattr(holder, "pos_embed", None)
    if position is not None:
        grid_ND = sincos_positions(*student.grid_size, net.embed_dim)
        if position.ndim == 3:  # of the prefix tokens too, where there are more than patches
            grid_ND = torch.cat([torch.zeros(position.shape[1] - len(grid_ND), net.embed_dim), grid_ND])
        position.data = grid_ND.reshape(position.shape)
        position.requires_grad_(False)
    if student.mask_token_D is not None:
        nn.init.normal_(student.mask_token_D, std=0.02)
    return student


def student_network(teacher: Network, architecture: Architecture, drop_path: float, **further: Any) -> Network:
    """A new student that sees its images as the teacher does, and gives tokens as wide as the teacher's.

    Args:
        further: of `masked_student`.
    """
    student = masked_student(architecture, drop_path=drop_path, like=teacher.vit, **further)
    return Network(student, architecture, teacher.mean, teacher.std)


def sincos_positions(height: int, width: int, features: int) -> Tensor:
    """Fixed positions (h w, D): half of the features for the row, half for the column; sines, then cosines.

    Frequencies 10000^(-i / (D/4)), as in Vaswani et al. 2017, 3.5, for each axis.
    """
    if features % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, and {features} was given.")
    frequency = 10000.0 ** (-torch.arange(features // 4, dtype=torch.float64) / (features // 4))
    row, column = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    parts = []
    for place in (row, column):
        angle = place.flatten()[:, None] * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
