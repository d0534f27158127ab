"""Audio: transformers on waveforms and spectrograms, and plain one-dimensional convolutions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case, ragged_labels, tokens
from tests.zoo.registry import entries

_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "final_dropout": 0.0,
    "apply_spec_augment": False,
    "num_labels": 6,
    "classifier_proj_size": 16,
}


def _clips() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(BATCH, 160), "labels": torch.randint(0, 6, (BATCH,))}


def wav2vec2() -> Case:
    """Convolutions on the waveform, positional convolution (weight norm), transformer; pooled classifier."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    return Case(Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**_SPEECH)), _clips())


def hubert() -> Case:
    """As wav2vec 2.0 with layer norms in the feature extractor and pre-norm layers."""
    from transformers import HubertConfig, HubertForSequenceClassification

    config = HubertConfig(**_SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True)
    return Case(HubertForSequenceClassification(config), _clips())


class Transcriber(nn.Module):
    """A wav2vec 2.0 encoder with connectionist temporal classification over its frames; own loss."""

    def __init__(self, encoder: nn.Module, width: int, letters: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, letters)
        self.loss = nn.CTCLoss(zero_infinity=True)

    def forward(self, wave: torch.Tensor, letters: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """wave: [batch, samples]; letters: [batch, longest] int64, of which lengths [batch] count -> scalar."""
        frames = self.head(self.encoder(wave)[0]).log_softmax(-1).transpose(0, 1)
        seen = torch.full((wave.shape[0],), frames.shape[0])
        return self.loss(frames, letters, seen, lengths)


def wav2vec2_ctc() -> Case:
    """Transcription with letters of uneven lengths."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    batch = {
        "wave": torch.randn(BATCH, 160),
        "letters": tokens(32, BATCH, 4),
        "lengths": torch.randint(2, 5, (BATCH,)),
    }
    return Case(Transcriber(Wav2Vec2Model(Wav2Vec2Config(**_SPEECH)), 32, 32), batch)


def whisper() -> Case:
    """Encoder-decoder on log-mel frames; own loss."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=16,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    labels = ragged_labels(tokens(96, BATCH, 12))
    return Case(
        WhisperForConditionalGeneration(config), {"input_features": torch.randn(BATCH, 8, 32), "labels": labels}
    )


def ast() -> Case:
    """Audio spectrogram transformer."""
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=16,
        num_mel_bins=16,
        num_labels=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = {"input_values": torch.randn(BATCH, 16, 16), "labels": torch.randint(0, 6, (BATCH,))}
    return Case(ASTForAudioClassification(config), batch)


class WaveBlock(nn.Module):
    """Gated dilated causal convolution with a residual and a skip output."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = dilation
        self.gates = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.residual = nn.Conv1d(width, width, 1)
        self.skip = nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, width, time] -> (next, skip) of the same shape."""
        a, b = self.gates(F.pad(x, (self.pad, 0))).chunk(2, 1)
        y = torch.tanh(a) * torch.sigmoid(b)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """Autoregressive model of quantised samples: embeddings, dilated blocks, summed skips."""

    def __init__(self, levels: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(levels, width)
        self.blocks = nn.ModuleList(WaveBlock(width, 2**i) for i in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, levels, 1))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """samples: [batch, time] int64 -> logits [batch, levels, time]."""
        x = self.embed(samples).transpose(1, 2)
        skips = 0
        for block in self.blocks:
            x, skip = block(x)
            skips = skips + skip
        return self.head(skips)


def wavenet() -> Case:
    """Dilated causal convolutions with gates and summed skips over quantised samples."""
    samples = torch.randint(0, 32, (BATCH, 24))
    return Case(WaveNet(), {"samples": samples, "target": samples.roll(-1, 1)}, F.cross_entropy)


class SpectrogramNet(nn.Module):
    """Short-time Fourier transform inside the model, log power, depthwise-separable convolutions and statistics
    pooling (mean and standard deviation over time), as in speaker verification."""

    def __init__(self, bins: int = 17, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.depth = nn.Conv1d(bins, bins, 3, padding=1, groups=bins)
        self.point = nn.Conv1d(bins, width, 1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(2 * width, 6)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """wave: [batch, samples] -> [batch, 6]."""
        frames = wave.unfold(1, 32, 16) * self.window
        power = torch.fft.rfft(frames).abs().square().transpose(1, 2)
        x = F.relu(self.norm(self.point(self.depth((power + 1e-5).log()))))
        return self.head(torch.cat([x.mean(-1), x.std(-1)], -1))


def spectrogram_net() -> Case:
    """Short-time Fourier transform, separable convolutions, pooling of means and deviations; batch normalisation."""
    batch = {"wave": torch.randn(BATCH, 160), "target": torch.randint(0, 6, (BATCH,))}
    return Case(SpectrogramNet(), batch, F.cross_entropy)


ENTRIES = (
    *entries("audio", wav2vec2, hubert, wav2vec2_ctc, whisper, ast, transformers=True),
    *entries("audio", wavenet, spectrogram_net),
)
