"""ResNet-18 and DenseNet-121 through MONAI, with GroupNorm and nothing in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.resnet import ResNet, ResNetBlock
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from hospitium_common.study.schema import DeepCnn

GROUPS = 16
NORM: tuple[str, dict[str, Any]] = ("group", {"num_groups": GROUPS})
ACTIVATION: tuple[str, dict[str, Any]] = ("relu", {"inplace": False})
SMALLEST_FOR_DENSENET = 64
SMALL_IMAGE = 64


class ResidualBlock(ResNetBlock):
    """MONAI's basic block without its work in place, which Opacus's hooks cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, channel, height, width]``."""
        beside = x if self.downsample is None else self.downsample(x)
        inside = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(inside + beside)


def deep_cnn(options: DeepCnn, *, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Build the network for images of ``size``; small ones are not shrunk at the entrance.

    ResNet-18 on images up to 64×64 starts with a 3×3 convolution and no pooling (He et al. 2016
    do so for CIFAR). DenseNet-121 halves five times, so smaller images are first enlarged.
    """
    small = min(size) <= SMALL_IMAGE
    if options.name == "resnet18":
        network: nn.Module = ResNet(
            block=ResidualBlock,
            layers=[2, 2, 2, 2],
            block_inplanes=[64, 128, 256, 512],
            spatial_dims=2,
            n_input_channels=channels,
            num_classes=classes,
            conv1_t_size=3 if small else 7,
            conv1_t_stride=1 if small else 2,
            no_max_pool=small,
            norm=NORM,
            act=ACTIVATION,
        )
        return _with_group_norm(network)
    network = DenseNet(
        spatial_dims=2, in_channels=channels, out_channels=classes, norm=NORM, act=ACTIVATION
    )
    if min(size) >= SMALLEST_FOR_DENSENET:
        return network
    enlarge = nn.Upsample(size=(SMALLEST_FOR_DENSENET,) * 2, mode="bilinear", align_corners=False)
    return nn.Sequential(enlarge, network)


def _with_group_norm(network: nn.Module) -> nn.Module:
    """Replace what MONAI's ResNet builds with BatchNorm inside its blocks, whatever norm is asked.

    MONAI 1.6 hands ``norm`` to the entrance of the network only.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            owner, _, attribute = name.rpartition(".")
            setattr(
                network.get_submodule(owner), attribute, nn.GroupNorm(GROUPS, layer.num_features)
            )
    return network
