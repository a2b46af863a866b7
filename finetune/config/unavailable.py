"""What other tools or the papers offer and this version does not: named, so that nobody hunts for the spelling."""

from __future__ import annotations

VALUES: dict[str, frozenset[str]] = {
    "quantization.method": frozenset(
        {"gptq", "awq", "hqq", "aqlm", "eetq", "int4", "int2", "nf2", "nf3", "fp8", "mxfp4", "nvfp4", "torchao"}
    ),
    "tuning.method": frozenset(
        {"p-tuning", "adapter-fusion", "loha", "lokr", "oft", "boft", "freeze", "badam", "lisa", "reft", "llama-pro", "fourierft", "vblora"}
    ),
    "tuning.init.method": frozenset({"corda", "lora-ga", "mica"}),
    "optimizer.method": frozenset(
        {"sgd", "adagrad", "sophia", "shampoo", "lamb", "apollo", "schedule-free", "rmsprop", "came", "ademamix", "dion", "soap"}
    ),
    "schedule.method": frozenset({"polynomial", "inverse-sqrt", "cosine-with-restarts", "wsd", "rex"}),
    "data.train.0.format": frozenset({"preference", "dpo", "tool", "image", "multimodal"}),
    "train.precision": frozenset({"fp16", "float16", "half", "fp8", "16"}),
    "quantization.compute_dtype": frozenset({"fp16", "float16", "fp8"}),
    "evaluation.tasks.0.task": frozenset({"judge", "arena", "human-eval"}),
    "distributed.strategy": frozenset({"tensor-parallel", "pipeline"}),
}
"""Path -> values that mean something elsewhere."""

KEYS: frozenset[str] = frozenset(
    {
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "use_llama_pro",
        "freeze_trainable_layers",
        "unfrozen_parameters",
        "packing",
        "sample_packing",
    }
    | {
        "pad_to_sequence_len",
        "neftune_noise_alpha",
        "flash_attention",
        "flash_attn",
        "attn_implementation",
        "use_liger_kernel",
    }
    | {
        "trust_remote_code",
        "push_to_hub",
        "hub_model_id",
        "comet",
        "special_tokens",
    }
    | {
        "chat_template",
        "layers_to_transform",
        "lora_layers_to_transform",
        "bias",
        "lora_bias",
        "use_qalora",
    }
    | {"rl", "dpo", "optim_target_modules", "group_by_length", "streaming", "multipack_real_batches", "plugins", "tf32"}
)
"""Keys that mean something elsewhere."""

REASONS: dict[str, str] = {
    "packing": "examples are laid end to end where the model allows it (train.kernels: auto), elsewhere sorted by length",
    "sample_packing": "examples are laid end to end where the model allows it (train.kernels: auto), elsewhere sorted by length",
    "group_by_length": "examples of a step are always sorted by length; the gradient does not depend on it",
    "trust_remote_code": "models that bring their own code are not run; use one that transformers knows",
    "deepspeed": "`distributed: {strategy: fsdp}` spreads the frozen weights, as ZeRO-3 does",
    "fsdp": "set `distributed: {strategy: fsdp}`; its only other key is `offload`",
    "fsdp_config": "set `distributed: {strategy: fsdp}`; its only other key is `offload`",
    "comet": "tracking knows `tensorboard`, `wandb`, `mlflow` and `trackio`; metrics.jsonl is always written",
    "streaming": "data is prepared before the first step, so that the order of a run can be repeated",
    "chat_template": "the tokenizer's own template is used",
    "special_tokens": "the model's own special tokens stay; `model.new_tokens` adds others",
    "unfrozen_parameters": "`tuning: {method: full, targets: {spectrum: 0.5}}` trains the linear weights of the best half of the layers",
    "freeze_trainable_layers": "`tuning.targets: {regex: ...}` chooses the layers that get an adapter",
    "layers_to_transform": "`tuning.targets: {regex: ...}` chooses the layers that get an adapter",
    "lora_layers_to_transform": "`tuning.targets: {regex: ...}` chooses the layers that get an adapter",
    "optim_target_modules": "GaLore projects every hidden matrix with both sides above `optimizer.galore.rank`",
    "bias": "`tuning: {method: bitfit}` trains biases",
    "push_to_hub": "`finetune merge` writes a directory; upload it with `hf upload`",
    "hub_model_id": "`finetune merge` writes a directory; upload it with `hf upload`",
}
"""What to do instead."""
