"""The names that other training tools give our config keys, so that a message can suggest our key
for a name known from there.

Where their value may mean something else, the suggestion says what ours is. The names come from
transformers' TrainingArguments, PEFT, TRL, Axolotl, torchtune, LLaMA-Factory, LitGPT and Lightning.
"""

from __future__ import annotations

_BATCH = "posts of one optimizer step over all GPUs; the posts of one GPU and the accumulation are derived"
_WARMUP = "a share of all steps, not their number"
_FORMAT = "nf4, bf16, fp8 or fp32"

# our key, the meaning of its value where that may differ, and the names of other tools
_KEYS: tuple[tuple[str, str, str], ...] = (
    ("train.learning_rate", "", "lr learning_rates max_lr peak_lr base_lr initial_lr lr_max"),
    (
        "train.global_batch_size",
        _BATCH,
        "batch_size train_batch_size per_device_train_batch_size per_device_batch_size micro_batch_size"
        " per_gpu_train_batch_size gradient_accumulation_steps gradient_accumulation accumulate_grad_batches"
        " accumulation_steps grad_accum total_batch_size effective_batch_size batchsize bs",
    ),
    (
        "train.method",
        "auto, lora or full",
        "finetuning_type finetune_type tuning use_lora use_peft full_finetune",
    ),
    ("train.epochs", "", "num_epochs num_train_epochs n_epochs max_epochs nb_epochs epoch train_epochs"),
    (
        "train.warmup_ratio",
        _WARMUP,
        "warmup warmup_steps num_warmup_steps lr_warmup_steps warmup_fraction lr_warmup_ratio",
    ),
    ("train.weight_decay", "", "wd decay"),
    (
        "train.max_grad_norm",
        "",
        "gradient_clip_val gradient_clipping grad_clip clip_grad_norm clip_grad max_norm grad_norm clip"
        " gradient_clip gradient_clip_norm",
    ),
    (
        "train.gradient_checkpointing",
        "",
        "use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing recompute",
    ),
    (
        "train.tokens_per_microbatch",
        "tokens of one forward pass on one GPU, or auto",
        "max_tokens tokens_per_batch max_tokens_per_batch micro_batch_tokens",
    ),
    (
        "data.max_length",
        "",
        "max_seq_length max_seq_len max_sequence_length seq_length seq_len sequence_length sequence_len"
        " max_len maxlen cutoff_len model_max_length block_size context_length max_input_length"
        " max_source_length",
    ),
    (
        "data.url",
        "what `emotion-train prepare` wrote",
        "dataset datasets dataset_name dataset_path dataset_dir data_path data_dir data_url train_file"
        " train_data training_data train_dataset data_files dataset_id",
    ),
    (
        "model.base",
        "",
        "base_model model_name model_name_or_path pretrained_model_name_or_path pretrained_model model_id"
        " model_path checkpoint_path base_model_name_or_path llm backbone pretrained",
    ),
    (
        "model.layers",
        "the first blocks of the base, or a share of them",
        "num_hidden_layers n_layers num_layers n_layer max_layers",
    ),
    (
        "model.precision",
        _FORMAT,
        "load_in_4bit load_in_8bit bf16 fp16 fp8 quantization quantize quant bits dtype torch_dtype"
        " mixed_precision bnb_4bit_quant_type half use_bf16",
    ),
    (
        "model.decoder",
        "fused or stock",
        "attn_implementation use_flash_attention_2 flash_attention use_liger",
    ),
    ("lora.r", "", "lora_r lora_rank rank peft_r adapter_rank lora_dim"),
    ("lora.alpha", "", "lora_alpha scaling lora_scale lora_scaling"),
    ("lora.dropout", "", "lora_dropout peft_dropout adapter_dropout"),
    (
        "lora.targets",
        "names of layers, or all-linear",
        "lora_target_modules target_modules lora_target lora_modules lora_targets modules_to_train"
        " lora_attn_modules",
    ),
    ("loss.class_weights", "balanced, none or a power", "class_weight label_weights loss_weights weights"),
    ("run.output_url", "", "output_dir output output_path out_dir save_dir output_folder default_root_dir"),
    ("run.id", "", "run_name run_id name experiment_name job_name experiment exp_name"),
    ("run.seed", "", "random_seed random_state data_seed seeds manual_seed"),
    ("run.trackers", "a list", "report_to logger loggers log_with tracker tracking use_wandb wandb_project"),
    (
        "checkpoint.every_steps",
        "",
        "save_steps save_every checkpoint_every save_interval save_every_n_steps every_n_train_steps"
        " checkpoint_interval",
    ),
    ("checkpoint.keep_every", "", "save_total_limit keep_checkpoints keep_last_n_checkpoints"),
    (
        "evaluation.every_steps",
        "",
        "eval_steps eval_every val_check_interval eval_interval evaluation_steps validate_every eval_freq",
    ),
    ("distributed.timeout_s", "seconds", "ddp_timeout nccl_timeout process_group_timeout"),
)
NAMES = {name: (key, what) for key, what, names in _KEYS for name in names.split()}


def key_meant(name: str) -> str | None:
    """Our key for another tool's name, with the meaning of its value where that may differ; None
    for a name that none of them has.

    >>> key_meant("warmup-steps")
    'train.warmup_ratio (a share of all steps, not their number)'
    """
    key, what = NAMES.get(name.lower().replace("-", "_"), ("", ""))
    return (f"{key} ({what})" if what else key) or None
