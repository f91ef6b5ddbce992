"""The GoogLeNet backbone (Szegedy et al., Going Deeper with Convolutions, CVPR 2015), torchvision's version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from netlib import Weights

CROP_SIZE = 227
RESIZE = 256
EMBED_DIM = 512


def build(weights: Weights) -> tuple[nn.Module, int]:
    """GoogLeNet without its auxiliary classifiers and its last layer.

    torchvision's weights were trained with another normalization than ImageNet's mean and std. The network converts
    its input itself (`transform_input`), and must do so whenever its weights are these, wherever they come from.

    Returns:
        The backbone, images `(B, 3, H, W)` to features `(B, 1024)`, and the number of features.
    """
    from torchvision.models import GoogLeNet_Weights, googlenet

    if weights.are_downloaded:
        network = googlenet(weights=GoogLeNet_Weights.IMAGENET1K_V1)  # removes the auxiliary classifiers itself
    else:
        network = googlenet(
            aux_logits=False, init_weights=not weights.are_pretrained, transform_input=weights.are_pretrained
        )
    network.fc = nn.Identity()
    return network, 1024
