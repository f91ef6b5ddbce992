"""The GoogLeNet backbone (Szegedy et al., Going Deeper with Convolutions, CVPR 2015), as torchvision has it."""

from __future__ import annotations

from torch import nn
from torchvision.models import GoogLeNet_Weights, googlenet

CROP_SIZE = 227
RESIZE = 256
EMBED_DIM = 512


def build(pretrained: bool, load: bool) -> tuple[nn.Module, int]:
    """GoogLeNet without its auxiliary classifiers and its last layer.

    torchvision's weights were trained on another normalisation than ImageNet's mean and std; the network converts its
    input itself (`transform_input`), and must do so whenever it has such weights, wherever they come from.

    Args:
        pretrained: whether the weights are, or are going to be, the pretrained ones.
        load: whether to load them now, from torchvision.

    Returns:
        The backbone, images `(B, 3, H, W)` to features `(B, 1024)`, and the number of features.
    """
    if load:
        network = googlenet(weights=GoogLeNet_Weights.IMAGENET1K_V1)  # drops the auxiliary classifiers itself
    else:
        network = googlenet(aux_logits=False, init_weights=not pretrained, transform_input=pretrained)
    network.fc = nn.Identity()
    return network, 1024
