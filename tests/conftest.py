"""One thread a test process: as quick for models of this size, and they may run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)

# Keys of the config.json of a model that takes no time, for the embedded model's tokenizer.
SMALL = {
    "vocab_size": 640,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def load_base(folder, dtype="float32"):
    """A model folder -> its model in eval mode, and its tokenizer."""
    import eval

    config, tokenizer = eval.load_config(folder)
    return eval.load_model(folder, config, dtype), tokenizer
