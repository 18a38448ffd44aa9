"""Train a LoRA adapter in a loop of one's own; checkpoints hold the adapter alone. Start it again after a kill.

python examples/integrations/peft_lora.py --url s3://bucket/run-7
"""

from __future__ import annotations

import argparse
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from cloudckpt import CheckpointManager, KeepLast, Trainable
from cloudckpt.integrations.peft import Adapter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-steps", type=int, default=4)
    chosen = parser.parse_args()
    torch.manual_seed(1)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=2))
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True))
    model.add_adapter("fixed", LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    model.set_adapter("default")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 256, (chosen.steps + 1, 4, 32))
    # What is trained, under the names that the optimizer wants; and an adapter that is not, which `model` leaves out.
    state = {"model": Trainable(model), "fixed": Adapter(model, "fixed"), "optimizer": optimizer}

    with CheckpointManager(
        chosen.url, save_every_steps=chosen.save_steps, retention=KeepLast(3), preemption=True
    ) as manager:
        restored = manager.restore(state)
        for step in range(restored.step + 1 if restored else 1, chosen.steps + 1):
            loss = model(input_ids=tokens[step], labels=tokens[step]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print("step", step, float(loss).hex(), flush=True)
            if manager.should_save(step):
                manager.async_save(step, state)
            if manager.preempted:
                manager.wait()
                sys.exit(manager.exit_code)
        manager.save(chosen.steps, state, exists="skip")


if __name__ == "__main__":
    main()
