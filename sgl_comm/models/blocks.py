"""What a decoder layer computes on one rank: weights and arithmetic, no communication.

Every block holds all of its weights, or by ``part`` those of one rank. No shape depends on the data, the host never
waits, and sums are made in one order, so that a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from sgl_comm.layers import Norm


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder in the manner of Step 3.5; ``llama`` has that of a plain dense one.

    Raises:
        ValueError: sizes that do not go together.
    """

    layers: str = "DMM"
    """D for a dense layer, M for a mixture of experts with a shared one."""
    vocab_size: int = 96
    hidden_size: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    dense_size: int = 16
    """Inner units of a dense MLP; below those of an expert and of the shared one."""
    expert_size: int = 8
    shared_size: int = 16
    experts: int = 4
    experts_per_token: int = 2
    qk_norm: bool = True
    """Whether queries and keys are normalised, a head at a time."""
    head_gate: bool = True
    """Whether each head's result is multiplied by a gate of its own."""
    norm_weight_offset: float = 1.0
    eps: float = 1e-6
    rope_base: float = 10000.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.layers or set(self.layers) - {"D", "M"}:
            raise ValueError(f"ModelConfig: got layers={self.layers!r}; expected D and M, one a layer")
        if self.heads % self.kv_heads:
            raise ValueError(f"ModelConfig: got {self.heads} heads; expected a multiple of kv_heads={self.kv_heads}")

    @classmethod
    def llama(cls, num_layers: int, **changes: object) -> ModelConfig:
        """Dense layers of the shape of Llama 3 8B, which has 32 of them."""
        shape: dict[str, object] = {
            "layers": "D" * num_layers, "vocab_size": 128256, "hidden_size": 4096, "heads": 32, "kv_heads": 8,
            "head_size": 128, "dense_size": 14336, "rope_base": 500000.0, "dtype": torch.bfloat16,
        }  # fmt: skip
        plain: dict[str, object] = {"qk_norm": False, "head_gate": False, "norm_weight_offset": 0.0}
        return cls(**{**shape, **plain, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of sequences of one length. All on the device, so that a captured step can change it."""

    keys: Tensor
    """[layers, sequences, max_tokens, kv_heads, head_size], as are the values."""
    values: Tensor
    length: Tensor
    """How many tokens each sequence has so far: int64, no dimension."""

    @classmethod
    def make(cls, config: ModelConfig, kv_heads: int, sequences: int, max_tokens: int, device: torch.device) -> Cache:
        shape = (len(config.layers), sequences, max_tokens, kv_heads, config.head_size)
        keys, values = (torch.zeros(shape, dtype=config.dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.zeros((), dtype=torch.int64, device=device))


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """The positions of a forward pass's new tokens in their sequences, and what attention derives from them."""

    positions: Tensor
    """[new]"""
    cos: Tensor
    """[new, 1, head_size / 2], as is the sine: the angles of the rotary embedding."""
    sin: Tensor
    future: Tensor
    """[new, max_tokens]: the causal mask, true at what a token must not attend to."""

    @classmethod
    def after(cls, cache: Cache, new: int, config: ModelConfig) -> TokenPositions:
        """Those of the next ``new`` tokens of each sequence in the cache."""
        device = cache.length.device
        positions = cache.length + torch.arange(new, device=device)
        frequencies = config.rope_base ** (-torch.arange(0, config.head_size, 2, device=device) / config.head_size)
        angles = (positions[:, None] * frequencies)[:, None]
        future = torch.arange(cache.keys.size(2), device=device) > positions[:, None]
        return cls(positions, angles.cos().to(config.dtype), angles.sin().to(config.dtype), future)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """The package's RMSNorm by torch alone; the last bits may differ."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps)
    return (values * (norm.weight.float() + norm.weight_offset)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention with rotary positions, whose heads share keys and values in groups."""

    heads: int
    kv_heads: int
    head_size: int
    inputs: Tensor
    """[rows, hidden]: the rows of queries, keys, values, and one a head of the gate if there is one."""
    out: Tensor
    """[hidden, heads * head_size]"""
    qk_norms: tuple[Norm, Norm] | None

    @property
    def _rows(self) -> list[int]:
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return [query, key, key, self.inputs.size(0) - query - 2 * key]

    def part(self, rank: int, world: int) -> Attention:
        """The heads of one of ``world`` ranks: its outputs are addends of the undivided attention's.

        Raises:
            ValueError: heads that cannot be divided so.
        """
        if self.heads % world or (self.kv_heads % world and world % self.kv_heads):
            raise ValueError(f"Attention: got {self.heads} heads on {self.kv_heads} kv_heads for {world} ranks")
        size, heads, kv_heads = self.head_size, self.heads // world, max(1, self.kv_heads // world)
        first, first_kv = rank * heads, rank * self.kv_heads // world
        query, key, value, gate = self.inputs.split(self._rows)
        own_kv = slice(first_kv * size, (first_kv + kv_heads) * size)
        own = slice(first * size, (first + heads) * size)
        inputs = torch.cat([query[own], key[own_kv], value[own_kv], gate[first : first + heads]])
        return dataclasses.replace(
            self, heads=heads, kv_heads=kv_heads, inputs=inputs, out=self.out[:, own].contiguous()
        )

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, tokens: TokenPositions) -> Tensor:
        """Of [sequences * new, hidden], with one layer of a cache, which gets the new tokens."""
        shape = (keys.size(0), tokens.positions.size(0), self.inputs.size(0))
        query, key, value, gate = (x @ self.inputs.mT).view(shape).split(self._rows, -1)
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in (query, key, value))
        if self.qk_norms is not None:
            query, key = rms_norm(query, self.qk_norms[0]), rms_norm(key, self.qk_norms[1])
        keys.index_copy_(1, tokens.positions, _rotated(key, tokens))
        values.index_copy_(1, tokens.positions, value)
        query = _rotated(query, tokens).unflatten(2, (self.kv_heads, -1))
        scores = torch.einsum("bskgh,btkh->bkgst", query, keys) * self.head_size**-0.5
        weights = scores.masked_fill(tokens.future, -torch.inf).softmax(-1, dtype=torch.float32).to(x.dtype)
        heads = torch.einsum("bkgst,btkh->bskgh", weights, values).flatten(2, 3)
        if gate.size(-1):
            heads = heads * gate.sigmoid()[..., None]
        return heads.reshape(x.size(0), self.out.size(1)) @ self.out.mT


def _rotated(x: Tensor, tokens: TokenPositions) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * tokens.cos - second * tokens.sin, second * tokens.cos + first * tokens.sin], -1)


@dataclass(frozen=True, eq=False)
class Mlp:
    """Gated MLPs side by side, the experts of a mixture, or a single one: ``down(silu(gate(x)) * up(x))``."""

    gate_up: Tensor
    """[2, experts, units, hidden]"""
    down: Tensor
    """[hidden, experts, units]"""

    def part(self, rank: int, world: int) -> Mlp:
        """Some units of every expert: the outputs are addends of the undivided MLP's."""
        return Mlp(_share(self.gate_up, 2, rank, world), _share(self.down, 2, rank, world))

    def some_experts(self, rank: int, world: int) -> Mlp:
        """Undivided experts, as many on every rank."""
        return Mlp(_share(self.gate_up, 1, rank, world), _share(self.down, 1, rank, world))

    def __call__(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of all experts' outputs, each multiplied by the token's weight for it ([tokens, experts]), if given.

        Every expert computes every token: that is wasteful where most weights are zero, but alike for all data.
        """
        gate, up = (x @ self.gate_up.flatten(0, 2).mT).chunk(2, -1)
        inner = silu(gate) * up
        if weights is not None:
            inner = (inner.unflatten(-1, self.down.shape[1:]) * weights[..., None]).flatten(1)
        return inner @ self.down.flatten(1).mT


def _share(tensor: Tensor, dim: int, rank: int, world: int) -> Tensor:
    if tensor.size(dim) % world:
        raise ValueError(f"Mlp: got {tensor.size(dim)} units or experts for {world} ranks; expected a multiple")
    return tensor.chunk(world, dim)[rank].contiguous()


@dataclass(frozen=True, eq=False)
class Router:
    """Chooses the experts of a token by independent scores; the weights of those chosen add up to one."""

    weight: Tensor
    """[experts, hidden]"""
    experts_per_token: int

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of each token's experts, [tokens, experts_per_token] both."""
        scores, numbers = (x @ self.weight.mT).float().sigmoid().topk(self.experts_per_token)
        return (scores / scores.sum(-1, keepdim=True)).to(x.dtype), numbers

    def __call__(self, x: Tensor) -> Tensor:
        """Weights of all experts, [tokens, experts], zero where one is not chosen."""
        weights, numbers = self.choose(x)
        return weights.new_zeros(x.size(0), self.weight.size(0)).scatter(1, numbers, weights)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; ``router`` and ``shared`` where it is a mixture of experts."""

    attention: Attention
    mlp: Mlp
    router: Router | None
    shared: Mlp | None
    norms: tuple[Norm, Norm]

    @classmethod
    def make(cls, config: ModelConfig, number: int, device: torch.device) -> LayerWeights:
        """Random, and alike on all devices of a kind."""
        draw = _RandomWeights(config, number, device)
        hidden, size, sparse = config.hidden_size, config.head_size, config.layers[number] == "M"
        rows = (config.heads + 2 * config.kv_heads) * size + config.heads * config.head_gate

        def mlp(experts: int, units: int) -> Mlp:
            return Mlp(draw.matrix(2, experts, units, hidden), draw.matrix(hidden, experts, units, inputs=units))

        return cls(
            attention=Attention(
                config.heads,
                config.kv_heads,
                size,
                inputs=draw.matrix(rows, hidden),
                out=draw.matrix(hidden, config.heads * size),
                qk_norms=(draw.norm(size), draw.norm(size)) if config.qk_norm else None,
            ),
            mlp=mlp(config.experts, config.expert_size) if sparse else mlp(1, config.dense_size),
            router=Router(draw.matrix(config.experts, hidden), config.experts_per_token) if sparse else None,
            shared=mlp(1, config.shared_size) if sparse else None,
            norms=(draw.norm(hidden), draw.norm(hidden)),
        )


@dataclass(frozen=True, eq=False)
class OuterWeights:
    """The weights before and after the layers."""

    embedding: Tensor
    """[vocab, hidden], as is the head."""
    norm: Norm
    head: Tensor

    @classmethod
    def make(cls, config: ModelConfig, device: torch.device) -> OuterWeights:
        """Random, and alike on all devices of a kind."""
        draw = _RandomWeights(config, len(config.layers), device)
        shape = (config.vocab_size, config.hidden_size)
        return cls(draw.matrix(*shape, inputs=1), draw.norm(config.hidden_size), draw.matrix(*shape))


class _RandomWeights:
    def __init__(self, config: ModelConfig, number: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.generator = torch.Generator(device).manual_seed(config.seed << 16 | number)

    def matrix(self, *shape: int, inputs: int | None = None) -> Tensor:
        """Normal values over the root of how many inputs are added up, so that outputs are about as large as inputs."""
        values = torch.randn(shape, generator=self.generator, device=self.device) / (inputs or shape[-1]) ** 0.5
        return values.to(self.config.dtype)

    def norm(self, size: int) -> Norm:
        offset = self.config.norm_weight_offset
        weight = 1 - offset + 0.1 * torch.randn(size, generator=self.generator, device=self.device)
        return Norm(weight.to(self.config.dtype), eps=self.config.eps, weight_offset=offset)
