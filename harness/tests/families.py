"""Tiny random models of every family the project claims, and a tokenizer to go with them.

Weights are drawn wide enough that biases, norms and every layer move the logits: a freshly
initialised model has zero biases and unit norms, and hides a forgotten one.
"""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB, HIDDEN, LAYERS, CONTEXT = 288, 32, 5, 64
# Shorter than the windows that the tests run, so that a full mask in its place is noticed.
SLIDING = 8
TEXT = "def add(left, right):\n    return left + right\n\nfor number in range(10):\n    print()\n"

ANY = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SHARED = ANY | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
GATED = SHARED | {"intermediate_size": 48}
GQA = GATED | {"num_key_value_heads": 2}
SIZES = {"n_layer": LAYERS, "n_head": 4}

# family -> (config class of transformers, its arguments)
FAMILIES = {
    "opt": ("OPTConfig", SHARED | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "llama": ("LlamaConfig", GQA),
    "gpt2": ("GPT2Config", ANY | SIZES | {"n_embd": HIDDEN, "n_positions": CONTEXT}),
    "bloom": ("BloomConfig", ANY | SIZES | {"hidden_size": HIDDEN}),
    "falcon": ("FalconConfig", SHARED),
    "falcon-new": (
        "FalconConfig",
        SHARED | {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mistral": ("MistralConfig", GQA | {"sliding_window": SLIDING}),
    "qwen2": (
        "Qwen2Config",
        GQA | {"use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", GQA | {"head_dim": 16}),
    "gemma": ("GemmaConfig", GQA | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", GQA | {"head_dim": 8, "sliding_window": SLIDING}),
    "phi3": ("Phi3Config", GQA),
    "starcoder2": ("Starcoder2Config", GQA | {"sliding_window": SLIDING}),
    "mixtral": ("MixtralConfig", GQA | {"num_local_experts": 4}),
    "neox": ("GPTNeoXConfig", GATED),
}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of ``family`` in eval mode; ``changes`` replace arguments of its config."""
    kind, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**(arguments | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.to(dtype).eval()


def save(family: str, folder, *, tokenizer: bool = False, **arguments):
    """:func:`build` written to ``folder`` as an ordinary checkpoint; returns the model."""
    model = build(family, **arguments)
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return model


def save_tokenizer(folder) -> None:
    """A byte-level BPE of VOCAB entries trained on TEXT."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>"
    ).save_pretrained(folder)


def windows(count: int, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids [count, length]."""
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
