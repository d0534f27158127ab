"""Vision: transformers and convolutions from configs, and the classical networks written as plain modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case
from tests.zoo.registry import entries

CLASSES = 12


def images(extent: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(BATCH, channels, extent, extent)


def labels() -> torch.Tensor:
    return torch.randint(0, CLASSES, (BATCH,))


def small(**changes: Any) -> dict[str, Any]:
    """Settings of a two-layer vision transformer on 16 x 16 images."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": CLASSES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    } | changes


# -- transformers ------------------------------------------------------------------------------------------------------


def deit() -> Case:
    """Vision transformer with a distillation token."""
    from transformers import DeiTConfig, DeiTForImageClassification

    return Case(DeiTForImageClassification(DeiTConfig(**small())), {"pixel_values": images(), "labels": labels()})


def beit() -> Case:
    """Vision transformer with relative position bias and layer scale."""
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(**small(use_relative_position_bias=True, drop_path_rate=0.0))
    return Case(BeitForImageClassification(config), {"pixel_values": images(), "labels": labels()})


def dinov2() -> Case:
    """Vision transformer with layer scale and a class token beside the mean of the patches."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(**small(mlp_ratio=2))
    return Case(Dinov2ForImageClassification(config), {"pixel_values": images(), "labels": labels()})


def swin() -> Case:
    """Attention in shifted windows, patches merged between stages."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_labels=CLASSES,
    )
    return Case(SwinForImageClassification(config), {"pixel_values": images(32), "labels": labels()})


def convnext() -> Case:
    """Depthwise 7 x 7 convolutions, channels-last norms and layer scale."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2, patch_size=2, hidden_sizes=[16, 32], depths=[2, 2], num_labels=CLASSES, image_size=16
    )
    return Case(ConvNextForImageClassification(config), {"pixel_values": images(), "labels": labels()})


def segformer() -> Case:
    """Hierarchical transformer with reduced keys, depthwise mixing and a segmentation head that upsamples."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    target = torch.randint(0, 4, (BATCH, 16, 16))
    target[torch.rand(target.shape) < 0.2] = 255  # ignored
    return Case(SegformerForSemanticSegmentation(config), {"pixel_values": images(), "labels": target})


def mae() -> Case:
    """Masked autoencoder: the noise that chooses the patches is an input, so tokens are sorted, gathered, restored."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    settings = small(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    config = ViTMAEConfig(**settings, decoder_intermediate_size=32, mask_ratio=0.5)
    return Case(ViTMAEForPreTraining(config), {"pixel_values": images(), "noise": torch.rand(BATCH, 16)})


def mobilenet_v2() -> Case:
    """Inverted residuals with depthwise convolutions and batch normalisation."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        image_size=32,
        depth_multiplier=0.25,
        depth_divisible_by=4,
        min_depth=4,
        classifier_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return Case(MobileNetV2ForImageClassification(config), {"pixel_values": images(32), "labels": labels()})


def efficientnet() -> Case:
    """Squeeze-and-excitation gates on depthwise convolutions."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=32,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        depth_divisor=4,
        kernel_sizes=[3, 5],
        in_channels=[32, 16],
        out_channels=[16, 24],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 2],
        depthwise_padding=[],
        hidden_dim=1280,  # the width of the top convolution, which the config does not scale
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        num_labels=CLASSES,
    )
    return Case(EfficientNetForImageClassification(config), {"pixel_values": images(32), "labels": labels()})


# -- plain modules -----------------------------------------------------------------------------------------------------


class VGG(nn.Module):
    """Stacked 3 x 3 convolutions and pools, then a wide classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels in (8, 8, -1, 16, 16, -1):
            if channels < 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(16 * 16, 64), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, 12)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, 16, 16] -> [batch, classes]."""
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg() -> Case:
    """Stacked 3 x 3 convolutions, pools, a wide classifier."""
    return Case(VGG(), {"x": images(), "target": labels()}, F.cross_entropy)


class AlexNet(nn.Module):
    """Large kernels with strides, local response normalisation, overlapping and adaptive pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.norm = nn.LocalResponseNorm(3)
        self.second = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.third = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(16 * 4, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, 16, 16] -> [batch, classes]."""
        x = F.max_pool2d(self.norm(F.relu(self.first(x))), 3, 1, padding=1)
        x = F.relu(self.third(F.relu(self.second(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def alexnet() -> Case:
    """Strided and grouped convolutions, local response normalisation, overlapping pools."""
    return Case(AlexNet(), {"x": images(), "target": labels()}, F.cross_entropy)


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it; transitions halve the channels."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        width = 16
        for _ in range(2):
            block = nn.ModuleList()
            for _ in range(3):
                block.append(
                    nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1, bias=False))
                )
                width += growth
            self.blocks.append(block)
            self.transitions.append(nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)))
            width //= 2
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, 16, 16] -> [batch, classes]."""
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            found = [x]
            for layer in block:  # type: ignore[union-attr]
                found.append(layer(torch.cat(found, 1)))
            x = transition(torch.cat(found, 1))
        return self.head(x.mean((2, 3)))


def densenet() -> Case:
    """Every layer reads the concatenation of all before it; batch normalisation."""
    return Case(DenseNet(), {"x": images(), "target": labels()}, F.cross_entropy)


class UNet(nn.Module):
    """Encoder and decoder over scales with skips, group norms and transposed convolutions; logits per pixel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def double(inner: int, outer: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inner, outer, 3, padding=1),
                nn.GroupNorm(2, outer),
                nn.SiLU(),
                nn.Conv2d(outer, outer, 3, padding=1),
                nn.SiLU(),
            )

        self.down1, self.down2 = double(3, width), double(width, 2 * width)
        self.middle = double(2 * width, 4 * width)
        self.up2, self.up1 = (nn.ConvTranspose2d(n * width, n * width // 2, 2, stride=2) for n in (4, 2))
        self.out2, self.out1 = double(4 * width, 2 * width), double(2 * width, width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, 16, 16] -> [batch, 4, 16, 16]."""
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = self.out2(torch.cat([self.up2(c), b], 1))
        c = self.out1(torch.cat([self.up1(c), a], 1))
        return self.head(c)


def dice_and_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean pixel cross entropy plus one minus the mean dice coefficient per sample and class."""
    probabilities = logits.softmax(1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    overlap = 2 * (probabilities * truth).sum((2, 3)) + 1
    total = probabilities.sum((2, 3)) + truth.sum((2, 3)) + 1
    return F.cross_entropy(logits, target) + 1 - (overlap / total).mean()


def unet_segmentation() -> Case:
    """U-Net with two loss terms."""
    batch = {"x": images(), "target": torch.randint(0, 4, (BATCH, 16, 16))}
    return Case(UNet(), batch, dice_and_cross_entropy)


class Detector(nn.Module):
    """Set prediction: a small convolutional backbone, a transformer encoder, and learned queries that decode boxes."""

    def __init__(self, width: int = 32, queries: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, width, 3, stride=2, padding=1)
        )
        self.rows = nn.Parameter(torch.randn(4, width // 2))
        self.columns = nn.Parameter(torch.randn(4, width // 2))
        self.queries = nn.Embedding(queries, width)
        self.transformer = nn.Transformer(width, 4, 1, 2, 64, dropout=0.0, batch_first=True)
        self.classes = nn.Linear(width, classes + 1)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 3, 16, 16] -> logits [batch, queries, classes + 1], boxes [batch, queries, 4] in 0..1."""
        features = self.backbone(x)
        height, width = features.shape[-2:]
        columns = self.columns[:width].unsqueeze(0).repeat(height, 1, 1)
        rows = self.rows[:height].unsqueeze(1).repeat(1, width, 1)
        position = torch.cat([columns, rows], -1)
        tokens = features.flatten(2).transpose(1, 2) + position.flatten(0, 1)
        queries = self.queries.weight.unsqueeze(0).expand(x.shape[0], -1, -1)
        decoded = self.transformer(tokens, queries)
        return {"logits": self.classes(decoded), "boxes": self.boxes(decoded).sigmoid()}


def set_loss(output: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted cross entropy (the last class means "nothing"), and box distance and overlap where there is an object,
    over the number of objects in the batch. target: classes [batch, queries], boxes [batch, queries, 4]."""
    logits, boxes = output["logits"], output["boxes"]
    weight = torch.ones(logits.shape[-1], dtype=logits.dtype)
    weight[-1] = 0.1
    entropy = F.cross_entropy(logits.transpose(1, 2), target["classes"], weight)
    present = (target["classes"] < logits.shape[-1] - 1).to(logits.dtype)
    count = present.sum().clamp(min=1)
    distance = ((boxes - target["boxes"]).abs().sum(-1) * present).sum() / count
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    true_low = target["boxes"][..., :2] - target["boxes"][..., 2:] / 2
    true_high = target["boxes"][..., :2] + target["boxes"][..., 2:] / 2
    shared = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp(min=0).prod(-1)
    union = (high - low).prod(-1) + (true_high - true_low).prod(-1) - shared
    overlap = ((1 - shared / (union + 1e-6)) * present).sum() / count
    return entropy + 5 * distance + 2 * overlap


def detr() -> Case:
    """Detection with targets already matched to the queries."""
    target = {"classes": torch.randint(0, 6, (BATCH, 8)), "boxes": torch.rand(BATCH, 8, 4)}
    return Case(Detector(), {"x": images(), "target": target}, set_loss)


class GroupedBlock(nn.Module):
    """ResNeXt bottleneck (grouped convolution), channels shuffled as ShuffleNet does."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.reduce = nn.Conv2d(width, width, 1, groups=groups, bias=False)
        self.middle = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.expand = nn.Conv2d(width, width, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, width, h, w] -> the same shape."""
        y = F.channel_shuffle(F.relu(self.reduce(x)), self.groups)
        return x + F.relu6(self.norm(self.expand(self.middle(y))))


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(GroupedBlock(16, 4) for _ in range(2)))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, 16, 16] -> [batch, classes]."""
        return self.head(F.adaptive_max_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def shufflenet() -> Case:
    """Grouped and depthwise convolutions with shuffled channels; batch normalisation."""
    return Case(ShuffleNet(), {"x": images(), "target": labels()}, F.cross_entropy)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, tokens, width] -> the same shape."""
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on unfolded patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 32)
        self.blocks = nn.Sequential(*(MixerBlock(16, 32) for _ in range(2)))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, 16, 16] -> [batch, classes]."""
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)
        return self.head(self.blocks(self.embed(patches)).mean(1))


def mlp_mixer() -> Case:
    """Linears over tokens and over channels, patches by unfolding."""
    return Case(Mixer(), {"x": images(), "target": labels()}, F.cross_entropy)


class SpatialTransformer(nn.Module):
    """A localisation network that warps its own input (affine grid, bilinear sampling)."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.theta = nn.Linear(32, 6)
        self.register_buffer("start", torch.tensor([1.0, 0, 0, 0, 1, 0]))
        self.read = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 1, 16, 16] -> [batch, classes]."""
        theta = (self.theta(self.locate(x)) * 0.1 + self.start).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(self.read(F.grid_sample(x, grid, align_corners=False)))


def spatial_transformer() -> Case:
    """An image warped by a grid that a network chose, sampled bilinearly."""
    return Case(SpatialTransformer(), {"x": images(16, 1), "target": labels()}, F.cross_entropy)


ENTRIES = (
    *entries("vision", deit, beit, dinov2, swin, segformer, mae, detr, transformers=True),
    *entries(
        "vision",
        convnext,
        mobilenet_v2,
        efficientnet,
        vgg,
        alexnet,
        densenet,
        unet_segmentation,
        shufflenet,
        mlp_mixer,
        spatial_transformer,
    ),
)
