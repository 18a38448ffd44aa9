"""Train, and write one plain file with `torch.save` after each step; started again, go on from it.

python examples/integrations/torch_save.py --url s3://bucket/run/last.pt --steps 100    # kill it when you like
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import cloudckpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the file: a path, or s3://…, gs://…")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(1)
    model = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    done = 0
    try:
        with cloudckpt.open(args.url) as file:
            saved = torch.load(file)
    except FileNotFoundError:
        print("a fresh start", flush=True)
    else:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
        print(f"goes on after step {done}", flush=True)
    for step in range(done + 1, args.steps + 1):
        batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with cloudckpt.open(args.url, "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file)
        print("step", step, loss.item().hex(), flush=True)


if __name__ == "__main__":
    main()
