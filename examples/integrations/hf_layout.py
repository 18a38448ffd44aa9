"""Shard a small Llama over ranks, save it as Hugging Face reads it, and load it on any other number of ranks.

torchrun --nproc-per-node 2 examples/integrations/hf_layout.py --url s3://bucket/llama save
python examples/integrations/hf_layout.py --url s3://bucket/llama load     # prints the same number
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from cloudckpt import CloudHFReader, CloudHFWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("save", "load"))
    parser.add_argument("--url", required=True, help="folder of the model: a directory, or s3://…, gs://…")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(1 if args.what == "save" else 2)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=200, **sizes)).eval()
    if dist.is_initialized():
        fully_shard(model)
    if args.what == "save":
        writer = CloudHFWriter(args.url, config=[model.config], exists="replace", max_shard_bytes=100_000)
        save(model.state_dict(), storage_writer=writer)
    else:
        state = model.state_dict()
        load(state, storage_reader=CloudHFReader(args.url))
        model.load_state_dict(state)
    with torch.no_grad():
        logits = model(torch.arange(12).view(2, 6)).logits
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{args.what}d: the sum of the logits is {logits.double().sum().item()!r}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
