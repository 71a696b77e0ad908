"""The stock recipe that speed.py compares with: transformers' Trainer, nf4 QLoRA, posts padded to
128 tokens, batches of 8, checkpointing.

    python benchmarks/stock_recipe.py --base FOLDER --posts train.parquet

Prints one line of JSON: posts/s and real tokens/s of the steps after the first five, and the peak
of the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import pyarrow.parquet as pq
import torch
from goemotions import LABELS
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from emotion_train.data.tokenization import PostTokenizer

LENGTH, BATCH, WARM_UP = 128, 8, 5


class Clock(TrainerCallback):  # type: ignore[misc]
    """When the step after so many of warm-up began, and when the last one ended."""

    def __init__(self, warm_up: int = WARM_UP) -> None:
        self.warm_up = warm_up
        self.began = self.ended = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.warm_up:
            wait_for_gpu()
            self.began = time.perf_counter()

    def on_train_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_gpu()
        self.ended = time.perf_counter()


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--posts", required=True)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table = pq.read_table(arguments.posts).slice(0, BATCH * arguments.steps)
    tokenizer = PostTokenizer.load(arguments.base, LENGTH)
    tokens = tokenizer.encode(table["text"].to_pylist())
    rows = [
        {
            "input_ids": [*ids.tolist(), *[tokenizer.pad_id] * (LENGTH - len(ids))],
            "attention_mask": [1] * len(ids) + [0] * (LENGTH - len(ids)),
            "labels": LABELS.index(label),
        }
        for ids, label in zip(tokens, table["label"].to_pylist(), strict=True)
    ]
    clock = Clock()
    trainer = Trainer(
        model=recipe(arguments.base, tokenizer.pad_id),
        args=TrainingArguments(
            output_dir="stock-recipe",
            per_device_train_batch_size=BATCH,
            max_steps=arguments.steps,
            learning_rate=2e-4,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_num_workers=2,
        ),
        train_dataset=rows,
        callbacks=[clock],
    )
    trainer.train()
    timed = range(WARM_UP * BATCH, arguments.steps * BATCH)
    print(
        json.dumps(
            {
                "posts_per_second": len(timed) / clock.seconds,
                "tokens_per_second": sum(len(tokens[at]) for at in timed) / clock.seconds,
                "tokens_a_microbatch": BATCH * LENGTH,
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            }
        )
    )


def recipe(base: str, pad_id: int) -> Any:
    network = base_model(base, pad_id, "nf4", "cuda")
    return adapted(
        prepare_model_for_kbit_training(network, gradient_checkpointing_kwargs={"use_reentrant": False})
    )


def base_model(base: str, pad_id: int, precision: str, device: str) -> Any:
    """The classifier with transformers' own modules and sdpa attention, on one device; `precision`
    is nf4, bf16 or fp32.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    config.num_labels, config.pad_token_id, config.use_cache = len(LABELS), pad_id, False
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        config=config,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        trust_remote_code=False,
        device_map={"": 0 if device == "cuda" else "cpu"},
        attn_implementation="sdpa",
        quantization_config=quantised if precision == "nf4" else None,
        key_mapping={r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."},
    )


def adapted(network: Any) -> Any:
    """The same with LoRA on q, k, v, o and a trained head."""
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    return get_peft_model(network, lora)


if __name__ == "__main__":
    main()
