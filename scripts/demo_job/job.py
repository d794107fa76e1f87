"""The job itself, the same file for one process and for many:

python -m demo_job.job MODEL OUTPUT
torchrun --standalone --nproc_per_node 2 -m demo_job.job MODEL OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from byte_llama import encode, text_bytes
from demo_job.capture import capture
from demo_job.probe import STEPS, train_probe
from demo_job.steering import steer

PROMPT = (
    "A class definition defines a class object. The class name is bound in the local namespace."
)


class Announcer:
    """Counts the job's steps; rank 0 prints each as `done/total what`, the others are quiet."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0

    def __call__(self, what: str) -> None:
        self.done += 1
        if _rank() == 0:
            print(f"{self.done}/{self.total} {what}", flush=True)


def main(folder: Path, output: Path) -> None:
    """Runs every part on the model in `folder`; rank 0 writes what came of it into `output`."""
    announce = Announcer(total=3 + STEPS)
    model = _load(folder)
    announce("capturing")
    activations, local_shapes = capture(model, encode(PROMPT))
    announce("steering")
    texts = steer(model)
    announce("training the probe")
    losses = []
    for loss in train_probe(model, text_bytes()[0]):
        losses.append(loss)
        announce("training the probe")
    if _rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        save_file(activations, output / "activations.safetensors")
        results = {"local_shapes": local_shapes, "texts": texts, "probe_losses": losses}
        (output / "results.json").write_text(json.dumps(results, indent=2))


def _load(folder: Path) -> LlamaForCausalLM:
    """The whole model on one process; on more, this rank's shard of it by the model's own plan."""
    logging.disable_progress_bar()
    sharded = DistributedConfig(tp_plan="auto") if dist.is_initialized() else None
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=sharded).eval()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
