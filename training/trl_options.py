"""Which options of TRL's `SFTConfig` and `ModelConfig` `elm sft` refuses, and why; it honours all others.

What the trainer and its data do with an option is not the same for an ELM as for a language model: its chats become batches in
`ELMCollator`, where the ECGs are. An option that would change nothing there, or something else than it says, is an error."""

_CUT = "a chat is not cut, as that could go through its ECG. --packing_strategy bfd packs whole chats"
_SHARED = (
    "training shares nothing. When it is done, `elm push FOLDER --repo_id OWNER/NAME` shares model, card and scores"
)
_SCORED = "training measures the loss on the split validation. `elm evaluate` scores the answers"
_COLUMNS = "rows have the columns messages and ecg, which `elm data build` makes"
_REBALANCE = "it knows no ECGs. group_by_length makes batches of like lengths, for all processes at once"
_TEMPLATE = "the answers are learnt, each with its end of turn. A template of --chat_template_path that has {% generation %} marks what is learnt"
_PADDING = "padding is not learnt, whatever its token is. Leave the option out"
_LIGER = "its kernels are for other models than an ELM. --torch_compile and --attn_implementation make training faster"
_STARTED = "`elm sft` always trains, and with --eval_strategy evaluates. `elm evaluate` scores the answers"

# option -> why any value but its default is refused, and what to use instead
REFUSED: dict[str, str] = {
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"), _SHARED),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _SHARED),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "prediction_loss_only"), _SCORED),
    **dict.fromkeys(("eval_do_concat_batches", "label_names"), _SCORED),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "remove_unused_columns"), _COLUMNS),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), _TEMPLATE),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _STARTED),
    "eval_packing": "chats are packed in training alone. The loss of --eval_strategy is the same without",
    "hub_token": "it would be saved with the model. Set the environment variable HF_TOKEN, or run `hf auth login`",
    "lora_task_type": "an ELM is a causal language model. Leave the option out",
    "length_column_name": "the lengths are those of the chats with their ECGs, which --train_sampling_strategy group_by_length finds",
    "local_rank": "`accelerate launch` and `torchrun` tell each process its number. Start with one of them",
    "model_init_kwargs": "--dtype, --attn_implementation and --model_revision say how the language model is loaded",
    "pad_token": _PADDING,
    "parallelism_config": "a chat is not cut between devices. `accelerate launch` with a file of accelerate_configs uses several",
    "shuffle_dataset": "each epoch has a new order already, by --seed or --data_seed. --train_sampling_strategy sequential keeps one",
    "truncation_mode": "a longer chat than --max_length is an error, as a cut could go through its ECG",
    "use_cache": "training keeps no cache. `elm evaluate` and `elm chat` use one",
}
# option -> some of its values, and why they are refused
REFUSED_VALUES: dict[str, dict[str, str]] = {
    "packing_strategy": dict.fromkeys(("bfd_split", "wrapped"), _CUT),
    "train_sampling_strategy": {"batch_rebalance": _REBALANCE},
    "train_phase": {"rl": "reinforcement learning has other options. Use `elm rl` on what this command has trained"},
}
_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters")
_OF_EVALUATION = ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "eval_accumulation_steps")
_OF_WORKERS = tuple(
    f"dataloader_{name}" for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")
)
# option -> another, without which it changes nothing
NEEDED: dict[str, str] = {
    **dict.fromkeys((*_OF_LORA, "lora_modules_to_save", "use_rslora", "use_dora"), "use_peft"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "use_peft"),  # quantized weights cannot be trained
    **dict.fromkeys(("use_bnb_nested_quant", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"), "load_in_4bit"),
    **dict.fromkeys((*_OF_EVALUATION, "eval_use_gather_object"), "eval_strategy"),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "eval_strategy"),
    **dict.fromkeys(_OF_WORKERS, "dataloader_num_workers"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), "optim"),
    "shuffle_buffer": "streaming",
}
# what transformers is about to call otherwise -> its new name
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
