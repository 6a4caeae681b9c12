"""TRL's supervised step, timed from its own callbacks."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepTimes(TrainerCallback):
    """Seconds from the beginning to the end of each optimizer step."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark()

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def seconds(self) -> list[float]:
        """Of every step, once the device is done."""
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in zip(self.events[::2], self.events[1::2], strict=True)]


def trl_steps(folder: Path, sequences: Tensor, per_micro_batch: int, micro_batches: int, num_steps: int) -> list[float]:
    """Train on all the sequences [n, T] in each of `num_steps` steps, on a GPU; seconds of each."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=per_micro_batch,
            gradient_accumulation_steps=micro_batches,
            max_steps=num_steps,
            max_length=None,
            bf16=True,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": sequences.tolist()}),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.seconds()
