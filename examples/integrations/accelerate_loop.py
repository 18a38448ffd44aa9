"""Train in a loop of one's own with accelerate, whose checkpoints go to a URL; start it again after a kill.

python examples/integrations/accelerate_loop.py --url s3://bucket/run-7
torchrun --standalone --nproc-per-node 2 examples/integrations/accelerate_loop.py --url s3://bucket/run-7
"""

from __future__ import annotations

import argparse
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cloudckpt import CheckpointManager, KeepLast
from cloudckpt.integrations.accelerate import load_state, save_state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--fsdp", action="store_true", help="shard the model (FSDP2)")
    parser.add_argument("--stateful", action="store_true", help="a StatefulDataLoader, which knows where it stands")
    chosen = parser.parse_args()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(
            use_stateful_dataloader=chosen.stateful,
            use_seedable_sampler=True,  # so that an epoch has its order again
        ),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2) if chosen.fsdp else None,
    )
    set_seed(1)
    inputs = torch.randn(160, 16)
    model = nn.Sequential(
        nn.Linear(16, chosen.width),
        nn.ReLU(),
        nn.Dropout(0.1),  # so that the generators count
        nn.Linear(chosen.width, chosen.width),
        nn.Linear(chosen.width, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.9)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    with CheckpointManager(
        chosen.url, save_every_steps=chosen.save_steps, retention=KeepLast(3), preemption=True
    ) as manager:
        resumed = load_state(accelerator, manager)
        step = resumed.step
        for epoch in range(step // len(loader), chosen.epochs):
            loader.set_epoch(epoch)
            for x, y in resumed.batches(loader, skip=step - epoch * len(loader)):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
                losses = accelerator.gather(loss.detach())
                if accelerator.is_main_process:
                    print("step", step, *(float(one).hex() for one in losses.flatten()), flush=True)
                if manager.should_save(step):
                    save_state(accelerator, manager, step, in_background=True)
                if manager.preempted:
                    manager.wait()
                    sys.exit(manager.exit_code)
        save_state(accelerator, manager, step, exists="skip")
    accelerator.end_training()


if __name__ == "__main__":
    main()
