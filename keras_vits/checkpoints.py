"""Which published checkpoint exists for which variant. The one file that touches the network."""

import dataclasses
import pathlib
import re

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.pth)(?<!\.pt)")  # owner/name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights published on the Hugging Face hub.

    Attributes:
        variant: the name that `keras_vits.create` builds them with.
        tag: how they were trained.
        top1: accuracy in percent on ImageNet-1k's validation set as timm reports it; `None` if unknown or no such head.
        license: SPDX identifier, the publisher's own name of a licence, or `None` where the publisher names none.
    """

    variant: str
    tag: str
    top1: float | None
    license: str | None

    @property
    def hub_id(self):
        return f"timm/{self.variant}.{self.tag}"


APACHE, APPLE, NON_COMMERCIAL = "Apache-2.0", "cvnets-license", "CC-BY-NC-4.0"

PUBLISHED = {  # name on the hub below timm/ -> top-1 in percent, licence
    "vit_tiny_patch16_224.augreg_in21k": (None, APACHE),
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": (75.452, APACHE),
    "vit_tiny_patch16_384.augreg_in21k_ft_in1k": (78.438, APACHE),
    "vit_small_patch8_224.dino": (None, APACHE),
    "vit_small_patch16_224.augreg_in1k": (78.842, APACHE),
    "vit_small_patch16_224.augreg_in21k": (None, APACHE),
    "vit_small_patch16_224.augreg_in21k_ft_in1k": (81.402, APACHE),
    "vit_small_patch16_224.dino": (None, APACHE),
    "vit_small_patch16_384.augreg_in1k": (81.13, APACHE),
    "vit_small_patch16_384.augreg_in21k_ft_in1k": (83.814, APACHE),
    "vit_small_patch32_224.augreg_in21k": (None, APACHE),
    "vit_small_patch32_224.augreg_in21k_ft_in1k": (76.01, APACHE),
    "vit_small_patch32_384.augreg_in21k_ft_in1k": (80.476, APACHE),
    "vit_base_patch8_224.augreg2_in21k_ft_in1k": (86.252, APACHE),
    "vit_base_patch8_224.augreg_in21k": (None, APACHE),
    "vit_base_patch8_224.augreg_in21k_ft_in1k": (85.838, APACHE),
    "vit_base_patch8_224.dino": (None, APACHE),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": (85.108, APACHE),
    "vit_base_patch16_224.augreg_in1k": (79.154, APACHE),
    "vit_base_patch16_224.augreg_in21k": (None, APACHE),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": (84.534, APACHE),
    "vit_base_patch16_224.bamboo": (None, None),
    "vit_base_patch16_224.dino": (None, APACHE),
    "vit_base_patch16_224.mae": (None, NON_COMMERCIAL),
    "vit_base_patch16_224.orig_in21k": (None, APACHE),
    "vit_base_patch16_224.orig_in21k_ft_in1k": (81.782, APACHE),
    "vit_base_patch16_224.sam_in1k": (80.246, APACHE),
    "vit_base_patch16_384.augreg_in1k": (81.102, APACHE),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": (86.01, APACHE),
    "vit_base_patch16_384.orig_in21k_ft_in1k": (84.212, APACHE),
    "vit_base_patch32_224.augreg_in1k": (74.908, APACHE),
    "vit_base_patch32_224.augreg_in21k": (None, APACHE),
    "vit_base_patch32_224.augreg_in21k_ft_in1k": (80.732, APACHE),
    "vit_base_patch32_224.orig_in21k": (None, APACHE),
    "vit_base_patch32_224.sam_in1k": (73.704, APACHE),
    "vit_base_patch32_384.augreg_in1k": (78.75, APACHE),
    "vit_base_patch32_384.augreg_in21k_ft_in1k": (83.358, APACHE),
    "vit_large_patch16_224.augreg_in21k": (None, APACHE),
    "vit_large_patch16_224.augreg_in21k_ft_in1k": (85.856, APACHE),
    "vit_large_patch16_224.mae": (None, NON_COMMERCIAL),
    "vit_large_patch16_224.orig_in21k": (None, APACHE),
    "vit_large_patch16_384.augreg_in21k_ft_in1k": (87.096, APACHE),
    "vit_large_patch32_224.orig_in21k": (None, APACHE),
    "vit_large_patch32_384.orig_in21k_ft_in1k": (81.508, APACHE),
    "vit_huge_patch14_224.mae": (None, NON_COMMERCIAL),
    "vit_huge_patch14_224.orig_in21k": (None, APACHE),
    "mobilevit_s.cvnets_in1k": (78.298, APPLE),
    "mobilevit_xs.cvnets_in1k": (74.618, APPLE),
    "mobilevit_xxs.cvnets_in1k": (68.936, APPLE),
    "mobilevitv2_050.cvnets_in1k": (70.156, APPLE),
    "mobilevitv2_075.cvnets_in1k": (75.612, APPLE),
    "mobilevitv2_100.cvnets_in1k": (78.088, APPLE),
    "mobilevitv2_125.cvnets_in1k": (79.682, APPLE),
    "mobilevitv2_150.cvnets_in1k": (80.38, APPLE),
    "mobilevitv2_150.cvnets_in22k_ft_in1k": (81.466, APPLE),
    "mobilevitv2_150.cvnets_in22k_ft_in1k_384": (82.606, APPLE),
    "mobilevitv2_175.cvnets_in1k": (80.87, APPLE),
    "mobilevitv2_175.cvnets_in22k_ft_in1k": (81.95, APPLE),
    "mobilevitv2_175.cvnets_in22k_ft_in1k_384": (82.92, APPLE),
    "mobilevitv2_200.cvnets_in1k": (81.148, APPLE),
    "mobilevitv2_200.cvnets_in22k_ft_in1k": (82.32, APPLE),
    "mobilevitv2_200.cvnets_in22k_ft_in1k_384": (83.43, APPLE),
    "mixer_b16_224.goog_in21k": (None, APACHE),
    "mixer_b16_224.goog_in21k_ft_in1k": (76.616, APACHE),
    "mixer_b16_224.miil_in21k": (None, APACHE),
    "mixer_b16_224.miil_in21k_ft_in1k": (82.314, APACHE),
    "mixer_l16_224.goog_in21k": (None, APACHE),
    "mixer_l16_224.goog_in21k_ft_in1k": (72.084, APACHE),
}


def published(variant):
    """The checkpoints of a variant.

    Args:
        variant: one of `keras_vits.list_models()`.

    Returns:
        A tuple of `Checkpoint`, empty if nobody published one.
    """
    return tuple(
        Checkpoint(variant=variant, tag=name.partition(".")[2], top1=top1, license=license)
        for name, (top1, license) in PUBLISHED.items()
        if name.partition(".")[0] == variant
    )


def download(hub_id):
    """Fetches a checkpoint from the Hugging Face hub, once: later calls find it in the hub's local cache.

    Args:
        hub_id: `"owner/name"`.

    Returns:
        Path of the local folder, which holds `config.json` and `model.safetensors`.

    Raises:
        ValueError: there is no such repository or file, or no network.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise ImportError('Downloading weights needs: pip install "keras-vits[hub]"') from None
    try:
        files = [hf_hub_download(hub_id, name) for name in ("config.json", "model.safetensors")]
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as e:
        missing = (
            "repository" if isinstance(e, errors.RepositoryNotFoundError) else "config.json or model.safetensors in it"
        )
        raise ValueError(f"{hub_id} is not a local folder, and on huggingface.co there is no such {missing}.") from None
    except (OSError, errors.HfHubHTTPError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(
            f"{hub_id} could not be downloaded from huggingface.co ({reason}). Without a network, give a local "
            "folder with config.json and model.safetensors."
        ) from None
    return pathlib.Path(files[0]).parent
