"""A decode step of a tensor-parallel decoder: with this package, and the same model on NCCL or gloo.

Run alone it starts its own ranks; under torchrun it is one of them. In CUDA graphs on GPUs. Weights are random. What is
compared is the sums: the model on NCCL or gloo has this package's norm, in a kernel of its own.

    python benchmarks/bench_decode.py --world 2
    torchrun --nproc-per-node 8 benchmarks/bench_decode.py --model llama --layers 8 --batch 1 8 --json out.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgl_comm import ops
from sgl_comm.layers import LayerGroups, ParallelConfig
from sgl_comm.models import ModelConfig, Step3p5, Unsharded, greedy
from sgl_comm.models.greedy import best
from sgl_comm.testing import RankContext, wrong_elements
from sgl_comm.tools import bench, command_line, report, timing
from sgl_comm.tools.contenders import Contender, peer_group
from sgl_comm.tools.timing import Timing

CHECKED_STEPS = 4
GRAPH_STEPS = 20
BUDGET_S = 10.0

BOUNDS = {torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.25}
"""How far logits may be from the undivided model's, as a part of the largest. Wide where rounding may choose other
experts; a sum that is missing changes them by more."""

SMALL: dict[str, dict[str, int]] = {
    "step3p5": {
        "hidden_size": 256, "heads": 8, "kv_heads": 4, "head_size": 32, "vocab_size": 1024, "dense_size": 768,
        "expert_size": 64, "shared_size": 64, "experts": 8, "experts_per_token": 2,
    },
    "llama": {"hidden_size": 256, "heads": 8, "kv_heads": 2, "head_size": 32, "vocab_size": 1024, "dense_size": 896},
}  # fmt: skip
"""Sizes on the CPU."""

LARGE: dict[str, dict[str, int]] = {
    "step3p5": {
        "hidden_size": 4096, "heads": 64, "kv_heads": 8, "head_size": 128, "vocab_size": 16384, "dense_size": 11264,
        "expert_size": 1280, "shared_size": 1280, "experts": 16, "experts_per_token": 4,
    },
    "llama": {"vocab_size": 16384},
}  # fmt: skip
"""Sizes on GPUs. Every rank has the whole head, by default as large as an eighth of Llama's."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure: steps of so many sequences of so many tokens."""

    batches: Sequence[int]
    context: int
    samples: int
    graphs: bool
    compiled: bool


@dataclasses.dataclass(frozen=True)
class Figures:
    """One contender's step of ``batch`` sequences; ``ratio``: its time over that of the first one."""

    name: str
    batch: int
    step_us: float
    p99_us: float
    tokens_per_s: float
    ratio: float
    wrong: int
    samples: int

    @classmethod
    def make(cls, name: str, batch: int, timed: Timing, first: Timing, wrong: int) -> Figures:
        step, p99, ratio = timed.median_us, timed.p99_us, timed.median_us / first.median_us
        figures = [report.significant(value, 4) for value in (step, p99, batch / step * 1e6, ratio)]
        return cls(name, batch, *figures, wrong, timed.samples)


class Decode(Contender):
    """A model's last step before its cache is full, again and again, each from the token of the one before.

    ``exact``: whether its logits must have the bits of the first contender's.
    """

    def __init__(self, name: str, model: Step3p5, batch: int, context: int, exact: bool = False) -> None:
        super().__init__()
        self.name, self.model, self.exact = name, model, exact
        self.cache = model.make_cache(batch, context)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def setup(self, x: Tensor, num_buffers: int) -> None:
        """Nothing: every step works on what its cache has."""

    def run(self) -> Tensor:
        self.cache.length.fill_(self.cache.keys.size(2) - 1)
        logits = self.model(self.ids, self.cache)
        self.ids.copy_(best(logits))
        return logits


def logits_of(model: Step3p5 | Unsharded, prompt: Tensor, added: Tensor) -> Tensor:
    """Of the prompt's last token and of those put behind it."""
    cache = model.make_cache(len(prompt), prompt.size(1) + added.size(1))
    model.expect_tokens(prompt.numel())
    found = [model(prompt, cache)[:, -1:]]
    model.expect_tokens(len(prompt))
    return torch.cat(found + [model(ids, cache) for ids in added.split(1, 1)], 1)


def models_of(ctx: RankContext, config: ModelConfig, groups: LayerGroups, compiled: bool) -> dict[str, Step3p5]:
    """The same model by each contender's means, with the same weights."""
    fused = Step3p5(config, groups, compiled=compiled)
    separate = functools.partial(Step3p5, config, groups, weights_of=fused, compiled=compiled)
    models = {"sgl_comm fused": fused, "sgl_comm separate": separate(all_reduce=ops.all_reduce)}
    peer = peer_group(ctx.group, ctx.device)
    if peer is not None:
        name, group = peer

        def all_reduce(x: Tensor, _: str) -> Tensor:
            dist.all_reduce(x, group=group)
            return x

        models[name] = separate(all_reduce=all_reduce)
    return models


def measure(ctx: RankContext, config: ModelConfig, plan: Plan) -> list[Figures]:
    """Checks, times and checks again; collective. Every rank returns the same."""
    figures = []
    with LayerGroups(ParallelConfig(ctx.world), ctx.group, ctx.device) as groups, torch.no_grad():
        whole = Unsharded(config, ctx.device)
        checks = [expected_of(whole, batch, plan.context) for batch in plan.batches]
        del whole  # the models need the memory
        models = models_of(ctx, config, groups, plan.compiled)
        for batch, check in zip(plan.batches, checks, strict=True):
            everyone = [
                Decode(name, model, batch, plan.context, exact=name.startswith("sgl_comm"))
                for name, model in models.items()
            ]
            before = count_wrong(ctx, everyone, *check, plan.graphs)
            groups.exchange_num_tokens(batch)
            timings = time(ctx, groups, everyone, plan)
            after = count_wrong(ctx, everyone, *check, plan.graphs)
            figures += [
                Figures.make(each.name, batch, timed, timings[0], sum(wrong))
                for each, timed, *wrong in zip(everyone, timings, before, after, strict=True)
            ]
        groups.tp.check()
    return figures


def time(ctx: RankContext, groups: LayerGroups, everyone: Sequence[Decode], plan: Plan) -> list[Timing]:
    """Of a step of each contender."""
    unused = torch.zeros(1, device=ctx.device)
    capture = groups.capture if plan.graphs else None
    return timing.time_calls(everyone, unused, ctx.group, plan.samples, BUDGET_S, capture, GRAPH_STEPS)


def expected_of(whole: Unsharded, batch: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt, the tokens that the undivided model puts behind it, and all logits from the prompt's last token on."""
    shape, random_bits = (batch, context - CHECKED_STEPS), torch.Generator().manual_seed(batch)
    prompt = torch.randint(whole.config.vocab_size, shape, generator=random_bits).to(whole.device)
    added = greedy(whole, prompt, CHECKED_STEPS)
    return prompt, added, logits_of(whole, prompt, added)


def count_wrong(
    ctx: RankContext, everyone: Sequence[Decode], prompt: Tensor, added: Tensor, expected: Tensor, graphs: bool
) -> list[int]:
    """Wrong logits of each contender over all ranks, and tokens of the exact ones that are others in a CUDA graph."""
    found = [logits_of(each.model, prompt, added) for each in everyone]
    bound = BOUNDS[expected.dtype] * expected.float().abs().max()
    counts = []
    for each, logits in zip(everyone, found, strict=True):
        wrong = ~((logits.float() - expected.float()).abs() <= bound)
        if each.exact:
            wrong |= wrong_elements(logits, found[0])
        count = int(wrong.sum())
        if graphs and each.exact:  # another library may choose another algorithm in a graph
            eager, captured = (greedy(each.model, prompt, CHECKED_STEPS, graph=graph) for graph in (False, True))
            count += int((eager != captured).sum())
        counts.append(bench.sum_over_ranks(ctx, count))
    return counts


def print_table(figures: Sequence[Figures]) -> None:
    """All figures, a line each, and whether all was right."""
    heads, units = ("step", "p99", "tokens/s", "ratio", "#wrong"), ("(us)", "(us)", "", "(x)", "")
    print("# step, p99: over samples, each the slowest rank's mean; #wrong: logits, over all ranks")
    for cells in (("batch", "contender", *heads), ("", "", *units)):
        print(f"#{cells[0]:>6} {cells[1]:<18}" + "".join(f"{cell:>11}" for cell in cells[2:]).rstrip())
    for each in figures:
        cells = [report.rounded(value) for value in (each.step_us, each.p99_us, each.tokens_per_s, each.ratio)]
        print(f"{each.batch:>7} {each.name:<18}" + "".join(f"{cell:>11}" for cell in (*cells, each.wrong)))
    wrong = sum(each.wrong for each in figures)
    print(f"# wrong logits: {wrong}" + (" FAILED" if wrong else " OK"))


def config_of(args: argparse.Namespace, device: str) -> ModelConfig:
    """The model that the arguments ask for."""
    large = device == "cuda"
    dtype = bench.DTYPES[args.dtype or ("bfloat16" if large else "float32")]
    sizes: dict[str, Any] = {**(LARGE if large else SMALL)[args.model], **dict(args.set), "dtype": dtype}
    if args.model == "llama":
        return ModelConfig.llama(args.layers, **sizes)
    return ModelConfig("D" + "M" * (args.layers - 1), **sizes)


def parse_size(text: str) -> tuple[str, int]:
    """Name and value of a size of ``ModelConfig``."""
    name, _, number = text.partition("=")
    sizes = [field.name for field in dataclasses.fields(ModelConfig) if field.type == "int"]
    if name not in sizes or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=NUMBER with one of {', '.join(sizes)}")
    return name, int(number)


def main() -> int:
    """Runs the benchmark; 0 if all logits were right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_common_arguments(parser)
    parser.add_argument("--model", choices=list(SMALL), default="step3p5", help="step3p5: a dense layer, then MoE")
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences; several are measured in turn")
    parser.add_argument("--compile", action="store_true", help="compile what a layer computes, as serving engines do")
    parser.add_argument("--context", type=int, help="tokens a sequence has (default 128; 1024 on GPUs)")
    parser.add_argument("--dtype", choices=list(bench.DTYPES), help="default float32; bfloat16 on GPUs")
    parser.add_argument("--set", type=parse_size, nargs="+", default=[], metavar="NAME=NUMBER", help="sizes")
    args = parser.parse_args()
    bench.check_common_arguments(args, parser)
    if args.layers < 1 or min(args.batch) < 1:
        parser.error("--layers and --batch must be at least 1")
    with bench.ranks_of(args) as ranks:
        context = args.context or (1024 if ranks.device == "cuda" else 128)
        if context <= CHECKED_STEPS:
            parser.error(f"--context must be above {CHECKED_STEPS}")
        config, setting = config_of(args, ranks.device), bench.setting_of(ranks)
        graphs = bench.in_graphs(ranks.device, setting["backend"])
        with report.progress(ranks.leads, "measuring"):
            figures = ranks.measure(measure, config, Plan(args.batch, context, args.iters, graphs, args.compile))
        setting |= {
            "form": f"CUDA graphs of {GRAPH_STEPS} steps" if graphs else "eager",
            "model": args.model, "compiled": args.compile, "context": context, **dataclasses.asdict(config),
            "dtype": str(config.dtype),
        }  # fmt: skip
    if ranks.leads:
        report.print_setting(setting)
        print_table(figures)
        report.write_json(args.json, setting, [dataclasses.asdict(each) for each in figures])
    return int(any(each.wrong for each in figures))


if __name__ == "__main__":
    raise SystemExit(command_line.run(main))
