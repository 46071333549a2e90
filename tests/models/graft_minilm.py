"""One side of two MiniLMs, a good one and a broken one, between which tensors are grafted: see docs/grafter.md.

    SGLCOMM_GRAFTER_ROLE=baseline torchrun --nproc-per-node 2 --master-port 29601 tests/models/graft_minilm.py
    SGLCOMM_GRAFTER_ROLE=target torchrun --nproc-per-node 3 --master-port 29602 tests/models/graft_minilm.py --break 3

Everything else about the grafter is in the environment too. Prints this side's embeddings of a sentence.
"""

from __future__ import annotations

import argparse
import dataclasses

import minilm
import torch
import torch.distributed as dist

import sgl_comm
from sgl_comm.grafter import Grafter

SENTENCE = "The telescope recorded the faint light of a galaxy."


def broken(model: minilm.MiniLM, index: int) -> minilm.MiniLM:
    """The same with an eps of 0.01, instead of 1e-12, in the norm at the end of a layer."""
    layer = model.layers[index]
    norm = dataclasses.replace(layer.output.norm, eps=1e-2)
    model.layers[index] = dataclasses.replace(layer, output=dataclasses.replace(layer.output, norm=norm))
    return model


def main() -> None:
    """Embeds the sentence on this side's ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--break", dest="broken_layer", type=int, metavar="LAYER", help="break this layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = minilm.model_folder()
    with torch.inference_mode(), sgl_comm.init() as comm, Grafter() as grafter:
        model = minilm.MiniLM(folder, comm.rank, comm.world_size, comm.group_name)
        if args.broken_layer is not None:
            model = broken(model, args.broken_layer)
        embeddings = model.embed(minilm.tokenize(folder, [SENTENCE]), grafter.dump)
        if comm.rank == 0:
            print(" ".join(f"{value:.6f}" for value in embeddings[0, :4].tolist()), grafter.counts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
