"""Tiny Hugging Face models of each supported architecture, made on the spot, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 300
ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8}),
}
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def make_tokenizer(directory: Path, *, extra_token: str = "<extra>") -> None:
    """Ids 0 <pad>, 1 <eos>, 2 an extra token, then the 256 bytes."""
    vocab = {"<pad>": 0, "<eos>": 1, extra_token: 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))


def make_model(
    directory: Path,
    kind: str = "qwen3",
    *,
    seed: int = 0,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    scale: float = 4.0,
    vocab: int = VOCAB,
    **overrides: object,
) -> Path:
    """A random model whose logits are of order 1 (`scale` multiplies the matrices), norms and biases not trivial."""
    config_class, model_class, extra = ARCHITECTURES[kind]
    options = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        **extra,
        **overrides,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(scale)
    model.to(dtype).save_pretrained(str(directory))
    make_tokenizer(directory)
    return directory


def write_prompts(path: Path, count: int = 40) -> Path:
    """Short prompts of different lengths, each with an answer."""
    path.write_text("".join(json.dumps({"prompt": "ab" * (1 + i % 5) + f" {i}", "answer": str(i)}) + "\n" for i in range(count)))
    return path


# Of the shape of the published ChatML models: a turn ends at <|im_end|>, a document at <|endoftext|>, which is a Base model's only end.
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
ENDOFTEXT, IM_END, CHAT_VOCAB = 256, 258, 272
CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_chat_tokenizer(directory: Path, *, eos: str, template: str | None = CHATML) -> None:
    """Ids 0 to 255 the bytes, then CHAT_TOKENS."""
    vocab = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token=eos)
    fast.chat_template = template
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    fast.save_pretrained(str(directory))


def make_base(directory: Path, *, seed: int = 0, template: str | None = CHATML, **options: object) -> Path:
    """A model whose files know of no end but <|endoftext|>, as the published Base models' do."""
    make_model(directory, "qwen3", seed=seed, vocab=CHAT_VOCAB, eos_token_id=ENDOFTEXT, pad_token_id=ENDOFTEXT, **options)
    make_chat_tokenizer(directory, eos="<|endoftext|>", template=template)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDOFTEXT, "max_new_tokens": 2048}))
    return directory


def make_instruct(directory: Path, *, seed: int = 1, share: float = 0.08, template: str | None = CHATML, **options: object) -> Path:
    """A model that ends its turns with <|im_end|>: about `share` of its tokens are it, whatever stands before."""
    make_model(directory, "qwen3", seed=seed, vocab=CHAT_VOCAB, eos_token_id=IM_END, pad_token_id=ENDOFTEXT, scale=2.0, **options)
    model = Qwen3ForCausalLM.from_pretrained(str(directory))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.randn(model.config.hidden_size))  # what all hidden states have in common
        ids = torch.randint(0, 256, (16, 32))
        hidden, logits = model.model(ids).last_hidden_state.reshape(-1, model.config.hidden_size), model(ids).logits.reshape(-1, CHAT_VOCAB)
        common = hidden.mean(0)
        wanted = torch.logsumexp(logits, -1).mean() + torch.logit(torch.tensor(share))
        model.lm_head.weight[IM_END] = common * wanted / common.square().sum()
    model.save_pretrained(str(directory))
    make_chat_tokenizer(directory, eos="<|im_end|>", template=template)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, ENDOFTEXT], "do_sample": True, "top_k": 20}))
    return directory


def write_chats(path: Path, count: int = 40) -> Path:
    """Chat messages, each with an answer."""
    rows = [{"prompt": [{"role": "user", "content": "ab" * (1 + i % 5) + f" {i}"}], "answer": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
