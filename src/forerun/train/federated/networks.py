"""Encoders of images and texts, and a pair of them. Parties need agree on nothing but the width of what comes out.

An architecture is a word: conv:32x64x128 is convolutions of these widths, gru:64 a recurrent reader of that width,
bag:32 the mean of word vectors of that width.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forerun.errors import CheckpointError, TrainingError
from forerun.files import whole_folder
from forerun.train.federated.public import IMAGE, TEXT

BUCKETS = 64
"""Vectors that words share which are not in the public texts."""
LONGEST = 48
"""Words of a text that are read."""
EMBEDDING = 32
CORNERS = 2
"""The last convolution's output is averaged into so many rows and columns: where something is stays visible."""


class Words:
    """Texts as numbers. 0 is nothing; then the known words, and the rest by their hash."""

    def __init__(self, known: Sequence[str]):
        self.known = tuple(known)
        self._numbers = {word: 1 + number for number, word in enumerate(self.known)}

    @classmethod
    def of(cls, texts: Iterable[str], most: int = 10_000) -> Words:
        """The most frequent words of these texts, which everybody may see."""
        counts = Counter(word for text in texts for word in split(text))
        ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
        return cls([word for word, _ in ranked[:most]])

    def __len__(self) -> int:
        return 1 + len(self.known) + BUCKETS

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), words of the longest], with zeros behind shorter ones."""
        rows = [torch.tensor([self._number(word) for word in split(text)[:LONGEST]] or [0]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.long)

    def _number(self, word: str) -> int:
        return self._numbers.get(word) or 1 + len(self.known) + zlib.crc32(word.encode()) % BUCKETS


def split(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Convolutions(nn.Module):
    """Images [B, 3, H, W] of bytes, halved by every convolution."""

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__()
        pairs = zip((3, *widths), widths, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(max(1, after // 8), after) for after in widths)
        self.out = nn.Linear(widths[-1] * CORNERS**2, width)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.float() / 127.5 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.relu(norm(convolution(hidden)))
        out: Tensor = self.out(F.adaptive_avg_pool2d(hidden, CORNERS).flatten(1))
        return out


class Reader(nn.Module):
    """Texts [B, L] of word numbers; the mean of what the reader knows at every word."""

    def __init__(self, words: int, hidden: int, width: int, is_recurrent: bool):
        super().__init__()
        self.embedding = nn.Embedding(words, EMBEDDING if is_recurrent else hidden, padding_idx=0)
        self.reader = nn.GRU(EMBEDDING, hidden, batch_first=True) if is_recurrent else None
        self.out = nn.Linear(hidden, width)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        if self.reader is not None:
            hidden, _ = self.reader(hidden)
        is_word = (words > 0).unsqueeze(-1)
        out: Tensor = self.out((hidden * is_word).sum(1) / is_word.sum(1).clamp_min(1))
        return out


def encoder(architecture: str, width: int, words: Words) -> nn.Module:
    """TrainingError for a word that is no architecture."""
    kind, _, sizes = architecture.partition(":")
    numbers = [int(size) for size in sizes.split("x") if size.isdigit() and int(size)]
    if kind == "conv" and numbers and len(numbers) == len(sizes.split("x")):
        return Convolutions(numbers, width)
    if kind in ("gru", "bag") and len(numbers) == 1 and sizes.isdigit():
        return Reader(len(words), numbers[0], width, kind == "gru")
    raise TrainingError(f"{architecture!r} is no architecture: write conv:32x64x128, gru:64 or bag:32")


def modality_of(architecture: str) -> str:
    return IMAGE if architecture.startswith("conv") else TEXT


class Towers(nn.Module):
    """An encoder for each modality that somebody has. Rows that come out have length 1.

    architectures: by modality. seed: of the first weights.
    """

    def __init__(self, architectures: Mapping[str, str], width: int, words: Words, seed: int = 0):
        super().__init__()
        self.architectures, self.width, self.words = dict(architectures), width, words
        for name, architecture in architectures.items():
            if modality_of(architecture) != name:
                raise TrainingError(f"{architecture!r} reads no {name}s: conv reads images, gru and bag read texts")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoders = nn.ModuleDict({name: encoder(one, width, words) for name, one in architectures.items()})

    def forward(self, modality: str, inputs: Tensor) -> Tensor:
        return F.normalize(self.encoders[modality](inputs), dim=-1)

    @torch.no_grad()
    def embed(self, modality: str, inputs: Tensor, rows: int = 256) -> Tensor:
        """The same for any number of inputs, without gradients."""
        parts = [self(modality, inputs[first : first + rows]) for first in range(0, len(inputs), rows)]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def embed_images(self, images: Tensor) -> Tensor:
        """Bytes [N, 3, H, W]; unit rows [N, D]."""
        return self.embed(IMAGE, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self.embed(TEXT, self.words.encode(texts))

    def save(self, folder: Path) -> None:
        """A folder that `load` reads. Raises OSError."""
        about = {"architectures": self.architectures, "width": self.width, "words": self.words.known}
        with whole_folder(folder) as beside:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, beside / WEIGHTS)
            (beside / CONFIG).write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Towers:
        """CheckpointError for a folder that holds none."""
        try:
            about = json.loads((folder / CONFIG).read_text())
            towers = cls(about["architectures"], about["width"], Words(about["words"]))
            towers.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} holds no towers that can be read ({error}): name what forerun federated run has left"
            ) from None
        return towers


WEIGHTS, CONFIG = "towers.safetensors", "towers.json"
