from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24", reason="make integrations installs the frameworks")
pytest.importorskip("accelerate", minversion="1.15", reason="make integrations installs the frameworks")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

import cloudckpt
from cloudckpt.errors import OptionsError
from cloudckpt.integrations.transformers import CloudCheckpoints
from raw_access import FreshPrefix
from tests.integrations.interrupted import assert_a_run_goes_on_from_a_bucket

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [(1, ()), (2, ()), (2, ("--fsdp",)), (1, ("--lora",))],
    ids=["alone", "ddp", "fsdp2", "lora"],
)
def test_a_trainer_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int, arguments: tuple[str, ...]
) -> None:
    assert_a_run_goes_on_from_a_bucket("hf_trainer.py", s3_url, *arguments, ranks=ranks)


class Told(CloudCheckpoints, Trainer):
    pass


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.found[state.global_step] = logs["loss"]


def tiny_model() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def rows(seed: int, count: int = 24) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": 9,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": [],
            "use_cpu": True,
            "learning_rate": 0.01,
            **more,
        },
    )


def trained(folder: Path, *, cls: Any = Told, resume: Any = None, model: Any = None, **more: Any) -> Any:
    losses = Losses()
    checkpoints = more.pop("checkpoints", folder / "root")
    trainer = cls(
        model=model or tiny_model(),
        args=arguments(folder / "out", **more),
        train_dataset=rows(2),
        eval_dataset=rows(3, 8),
        callbacks=[losses],
        checkpoints=checkpoints,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.losses = losses.found
    return trainer


def test_no_checkpoint_is_written_into_output_dir(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert trainer.checkpoints.all_steps() == [2, 4, 6, 8, 9]
    assert not list(tmp_path.glob("out/*"))


def test_a_checkpoint_has_the_files_that_make_its_weights_a_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.checkpoints.restore_files(tmp_path / "files")
    cloudckpt.export(
        trainer.checkpoints.url,
        tmp_path / "hf",
        to="huggingface",
        prefix="model.",
        config=tmp_path / "files/model",
    )
    twin = GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    tokens = rows(4, 2)[0]["input_ids"][None]
    assert torch.equal(twin.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_checkpoint_has_what_was_logged_at_its_step(tmp_path: Path) -> None:
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=2)
    for checkpoint in trainer.checkpoints.checkpoints()[:-1]:
        assert checkpoint.metrics["loss"] == trainer.losses[checkpoint.step]
        assert checkpoint.metrics["eval_loss"] > 0


def test_save_total_limit_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    # Worse with every step: the first evaluation is the best.
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trained(tmp_path, save_total_limit=2, learning_rate=0.1, **best)
    metrics = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.checkpoints.all_steps() == sorted({max(metrics, key=lambda step: metrics[step]), 9})


@pytest.mark.parametrize("limit", [1, 3])
def test_save_total_limit_without_a_best_keeps_so_many_of_the_newest(tmp_path: Path, limit: int) -> None:
    assert trained(tmp_path, save_total_limit=limit).checkpoints.all_steps() == [6, 8, 9][-limit:]


def test_the_best_model_is_loaded_at_the_end_also_after_it_was_trained_by_an_earlier_process(tmp_path: Path) -> None:
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "save_total_limit": 1,
    }
    alone = trained(tmp_path / "a", **best)
    told = trained(tmp_path / "b", max_steps=9, **best)
    step = alone.state.best_global_step
    kept = cloudckpt.read(alone.state.best_model_checkpoint, keys="model")["model"]
    assert torch.equal(alone.model.lm_head.weight, kept["transformer.wte.weight"])
    resumed = trained(tmp_path / "b", resume=True, **{**best, "max_steps": 11, "load_best_model_at_end": True})
    assert resumed.state.best_global_step == told.state.best_global_step == step
    assert resumed.state.best_model_checkpoint == told.state.best_model_checkpoint
    assert torch.equal(resumed.model.lm_head.weight, told.model.lm_head.weight)


def test_a_step_an_older_checkpoint_and_a_url_are_gone_on_from(tmp_path: Path) -> None:
    alone = trained(tmp_path)
    url = alone.checkpoints.checkpoints()[1].url
    again, by_url = trained(tmp_path, resume=6), trained(tmp_path, resume=url)
    assert again.losses == {step: alone.losses[step] for step in (7, 8, 9)}
    assert by_url.losses == {step: alone.losses[step] for step in (5, 6, 7, 8, 9)}


def test_the_next_older_checkpoint_is_taken_where_the_newest_is_corrupt(tmp_path: Path) -> None:
    alone = trained(tmp_path, neftune_noise_alpha=5.0)
    for shard in tmp_path.glob("root/step-0000000009-*/*/*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    resumed = trained(tmp_path, resume=True, neftune_noise_alpha=5.0)
    assert resumed.losses == {9: alone.losses[9]}


def test_a_folder_of_the_trainer_itself_is_gone_on_from(tmp_path: Path) -> None:
    losses = Losses()
    stock = Trainer(model=tiny_model(), args=arguments(tmp_path / "stock"), train_dataset=rows(2), callbacks=[losses])
    stock.train()
    resumed = trained(tmp_path, resume=str(tmp_path / "stock/checkpoint-6"))
    assert resumed.losses == {step: losses.found[step] for step in (7, 8, 9)}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "learning_rate": 0.1,
}


@pytest.mark.parametrize("interval", [4, 2])
def test_a_second_training_of_a_trainer_is_a_run_of_its_own(tmp_path: Path, interval: int) -> None:
    trainer = trained(tmp_path, max_steps=4, **{**BEST, "save_steps": interval, "eval_steps": interval})
    first = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    trainer.checkpoints.wait()
    steps = list(range(interval, 5, interval))
    assert [one.order for one in trainer.checkpoints.checkpoints()] == [(e, step) for e in (1, 2) for step in steps]
    best = trainer.state.best_model_checkpoint
    assert best.endswith(f"step-{trainer.state.best_global_step:010d}-e0002")
    kept = cloudckpt.read(best, keys="model")["model"]["transformer.wte.weight"]
    assert torch.equal(trainer.model.lm_head.weight, kept)
    assert not torch.equal(kept, first)


class Worse(Trainer):
    """It is the worse the longer it was trained."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_age": float(self.state.global_step)}


class ToldWorse(CloudCheckpoints, Worse):
    pass


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_of_a_folder_that_is_gone_on_from_is_loaded_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    worse = {**BEST, "metric_for_best_model": "age", "greater_is_better": False}
    stock = Worse(
        model=tiny_model(),
        args=arguments(tmp_path / "out", **{**worse, "max_steps": 8}),
        train_dataset=rows(2),
        eval_dataset=rows(3, 8),
    )
    stock.train()
    best = str(tmp_path / "out/checkpoint-4")
    assert stock.state.best_model_checkpoint == best
    onward = {**worse, "max_steps": 12, "save_total_limit": limit}
    for resume in (str(tmp_path / "out/checkpoint-8"), True):
        resumed = trained(tmp_path, cls=ToldWorse, resume=resume, **onward)
        assert resumed.state.best_model_checkpoint == best
        assert torch.equal(resumed.model.lm_head.weight, stock.model.lm_head.weight)
    assert sorted(one.name for one in tmp_path.glob("out/checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    shutil.rmtree(best)
    with caplog.at_level("WARNING", "cloudckpt"):
        trained(tmp_path, cls=ToldWorse, resume=True, **{**onward, "max_steps": 13})
    assert "the best model, of step 4, is not loaded" in caplog.text


def test_save_only_model_saves_no_optimizer_and_says_so_when_it_is_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(tmp_path, save_only_model=True)
    assert not [name for name in first.checkpoints.contents().names if "optimizer" in name or "scheduler" in name]
    with caplog.at_level("WARNING", "cloudckpt"):
        resumed = trained(tmp_path, resume=6, save_only_model=True)
    assert "save_only_model: optimizer" in caplog.text
    assert min(resumed.losses) == 7


def test_states_of_callbacks_come_back(tmp_path: Path) -> None:
    class Counting(TrainerCallback, ExportableState):
        def __init__(self, count: int = 0) -> None:
            self.count = count

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.count += 1

        def state(self) -> dict[str, Any]:
            return {"args": {"count": self.count}, "attributes": {}}

    class Counted(Told):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Counting())

    trained(tmp_path, cls=Counted)
    resumed = trained(tmp_path, cls=Counted, resume=6, restore_callback_states_from_checkpoint=True)
    (counting,) = [one for one in resumed.callback_handler.callbacks if isinstance(one, Counting)]
    assert counting.count == 9


def test_more_state_of_ones_own_is_saved_and_restored(tmp_path: Path) -> None:
    class Averaged(Told):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.seen: dict[str, int] = {"count": 0}

        def checkpoint_state(self) -> dict[str, object]:
            return {**super().checkpoint_state(), "seen": self.seen}

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.seen["count"] += 1
            return super().training_step(*args, **kwargs)

    trained(tmp_path, cls=Averaged)
    assert trained(tmp_path, cls=Averaged, resume=6).seen == {"count": 9}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output_dir": "s3://bucket/run"}, "checkpoints="),
        ({"push_to_hub": True}, "hub_strategy='end'"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
    ],
)
def test_what_would_save_elsewhere_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)  # which asks the network
    args = arguments(tmp_path / "out")
    for name, value in more.items():
        setattr(args, name, value)
    with pytest.raises(OptionsError, match=message):
        Told(model=tiny_model(), args=args, train_dataset=rows(2), checkpoints=tmp_path / "root")


def test_a_limit_beside_a_manager_and_an_unknown_checkpoint_are_refused(tmp_path: Path) -> None:
    with cloudckpt.CheckpointManager(tmp_path / "root") as manager:
        with pytest.raises(OptionsError, match="retention="):
            trained(tmp_path, checkpoints=manager, save_total_limit=2)
        trained(tmp_path, checkpoints=manager)
        with pytest.raises(OptionsError, match="is no checkpoint of"):
            trained(tmp_path, checkpoints=manager, resume="s3://elsewhere/step-0000000009-e0001")


def test_true_begins_anew_where_nothing_was_ever_committed(tmp_path: Path) -> None:
    assert min(trained(tmp_path, resume=True).losses) == 1


def test_adapters_that_transformers_itself_has_put_into_a_model_come_back_and_nothing_else_is_saved(
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft", minversion="0.22", reason="transformers asks for it there")
    from peft import LoraConfig

    def adapted() -> GPT2LMHeadModel:
        model = tiny_model()
        for name in ("idle", "trained"):
            model.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False), name)
        model.set_adapter("trained")
        return model

    alone = trained(tmp_path, model=adapted())
    torch.manual_seed(9)
    other = adapted()
    resumed = trained(tmp_path, model=other, resume=6)
    assert resumed.losses == {step: alone.losses[step] for step in (7, 8, 9)}
    assert all("lora" in name for name in alone.checkpoints.contents().tensors if name.startswith("model."))


@pytest.mark.filterwarnings("default")  # TRL uses what transformers advises against
@pytest.mark.parametrize("is_lora", [False, True])
def test_a_trainer_of_trl_goes_on_with_the_same_losses(tmp_path: Path, *, is_lora: bool) -> None:
    trl = pytest.importorskip("trl", reason="make integrations installs the frameworks")
    datasets = pytest.importorskip("datasets", reason="make integrations installs the frameworks")
    tokenizers = pytest.importorskip("tokenizers", reason="make integrations installs the frameworks")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    data = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].remainder(12).tolist() for row in rows(2)]})

    class Tuned(CloudCheckpoints, trl.SFTTrainer):
        pass

    def tuned(resume: int | None) -> dict[int, float]:
        losses = Losses()
        args = trl.SFTConfig(
            str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=4,
            save_steps=2,
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=8,
        )
        lora = None
        if is_lora:
            from peft import LoraConfig

            lora = LoraConfig(target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
        Tuned(
            model=tiny_model(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[losses],
            checkpoints=tmp_path / "root",
        ).train(resume_from_checkpoint=resume)
        return losses.found

    alone = tuned(None)
    assert tuned(4) == {step: alone[step] for step in (5, 6)}
    with cloudckpt.CheckpointManager(tmp_path / "root") as manager:
        files = manager.restore_files(tmp_path / "files")
    assert {"model/config.json", "model/tokenizer.json"} <= set(files)
    assert ("model/adapter_config.json" in files) == is_lora
