"""Train a small GPT-2 with Hugging Face's Trainer, whose checkpoints go to a URL; start it again after a kill.

python examples/integrations/hf_trainer.py --url s3://bucket/run-7
torchrun --standalone --nproc-per-node 2 examples/integrations/hf_trainer.py --url s3://bucket/run-7
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from cloudckpt.integrations.transformers import CloudCheckpoints


class CloudTrainer(CloudCheckpoints, Trainer):
    """The line: checkpoints go to a URL."""


class PrintLosses(TrainerCallback):
    """Print every loss with all of its bits."""

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict[str, Any], **kwargs: object
    ) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print("step", state.global_step, float(logs["loss"]).hex(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--fsdp", action="store_true", help="shard the model (FSDP2)")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter alone")
    chosen = parser.parse_args()
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=chosen.width, n_layer=2, n_head=2)
    model: torch.nn.Module = GPT2LMHeadModel(config)  # with dropout, so that the generators count
    if chosen.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True))
    tokens = torch.randint(0, 256, (96, 32), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    with tempfile.TemporaryDirectory() as output_dir:
        args = TrainingArguments(
            output_dir,
            max_steps=chosen.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=chosen.save_steps,
            save_total_limit=3,
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            seed=3,
            **({"fsdp": True, "fsdp_config": {"fsdp_version": 2}} if chosen.fsdp else {}),
        )
        trainer = CloudTrainer(
            model=model, args=args, train_dataset=data, callbacks=[PrintLosses()], checkpoints=chosen.url
        )
        trainer.train(resume_from_checkpoint=True)


if __name__ == "__main__":
    main()
