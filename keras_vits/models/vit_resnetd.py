"""Hybrid Vision Transformer on a ResNet-D.

    image -> stem -> stages (bottlenecks) -> embed -> as in vit.py from the tokens on

Paper    Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1; the backbone: He et al., Bag
         of Tricks, arXiv 1812.01187, figure 2, with batch normalisation.
Code     timm/models/vision_transformer_hybrid.py and resnet.py (Apache-2.0), whose variant names these are.
Differs  As in vit_hybrid.py, with batch normalisation of epsilon 1e-5.
"""

from keras_vits.models._registry import register
from keras_vits.models.vit import BASE, NAMES
from keras_vits.models.vit_hybrid import HybridViT

SMALL = dict(width=768, depth=8, heads=8, mlp_hidden=2304)  # of timm's hybrids alone


@register
class ResNetDViT(HybridViT):
    """The hybrid whose backbone is a ResNet-D with batch normalisation. Its checkpoints name the backbone otherwise."""

    names = {
        "timm": {
            "stem/unit1/conv": "patch_embed.backbone.conv1.0",
            "stem/unit1/bn": "patch_embed.backbone.conv1.1",
            "stem/unit2/conv": "patch_embed.backbone.conv1.3",
            "stem/unit2/bn": "patch_embed.backbone.conv1.4",
            "stem/unit3/conv": "patch_embed.backbone.conv1.6",
            "stem/unit3/bn": "patch_embed.backbone.bn1",
            **{
                f"stage_{s}_block_{{i}}/{ours}": f"patch_embed.backbone.layer{s + 1}.{{i}}.{theirs}"
                for s in range(4)
                for ours, theirs in {
                    "unit{j}/conv": "conv{j}",
                    "unit{j}/bn": "bn{j}",
                    "shortcut/conv": "downsample.1",
                    "shortcut/bn": "downsample.2",
                }.items()
            },
            "embed": "patch_embed.proj",
            **NAMES,
        }
    }
    variants = {
        "vit_small_resnet26d_224": dict(**SMALL, backbone="resnetd", stages=(2, 2, 2, 2)),
        "vit_small_resnet50d_s16_224": dict(**SMALL, backbone="resnetd", stages=(3, 4, 6)),
        "vit_base_resnet26d_224": dict(**BASE, backbone="resnetd", stages=(2, 2, 2, 2)),
        "vit_base_resnet50d_224": dict(**BASE, backbone="resnetd", stages=(3, 4, 6, 3)),
    }
