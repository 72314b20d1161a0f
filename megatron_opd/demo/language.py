"""Languages of the tours with generated tasks: a small vocabulary, and tiny Qwen3 models that speak it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.convert.staging import whole_directory
from megatron_opd.errors import UserError
from megatron_opd.hf.model_config import spell_for_all
from megatron_opd.safety.durable import write_file
from megatron_opd.safety.untrusted import read_object

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True)
class Language:
    """Texts are split into the matches of `pattern`, of which those in `vocabulary` (begins with PAD, EOS, UNKNOWN) have a token."""

    vocabulary: tuple[str, ...]
    pattern: str = r"[\s\S]"  # a token a character
    longest: int = 256  # tokens of a sequence

    def pieces(self, text: str) -> list[str]:
        """What a text is split into."""
        return re.findall(self.pattern, text)

    def build_tokenizer(self, directory: str | Path | None = None) -> Any:
        """A transformers fast tokenizer; saved as Hugging Face files if `directory` is given."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(self.vocabulary)}, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(self.pattern), "isolated")
        tokenizer.decoder = decoders.Fuse()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            eos_token=EOS,
            unk_token=UNKNOWN,
            clean_up_tokenization_spaces=False,
            model_max_length=self.longest,
        )
        if directory is not None:
            fast.save_pretrained(str(directory))
        return fast

    def make_model_dir(
        self,
        directory: str | Path,
        *,
        hidden_size: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        ffn: int,
        seed: int,
        rope_theta: float = 30.0,
        initializer_range: float = 0.1,
    ) -> None:
        """Write a Qwen3 model with random fp32 weights as a Hugging Face directory; the directory appears whole. Raises UserError if it exists.

        The defaults are for narrow models and short texts: Qwen's own 1e6 and 0.02 need several times as many steps here.
        """
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        directory = Path(directory)
        if directory.exists():
            raise UserError(f"{directory}: exists already; choose another directory or remove it")
        config = Qwen3Config(
            vocab_size=len(self.vocabulary),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=ffn,
            max_position_embeddings=self.longest,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            tie_word_embeddings=False,
            initializer_range=initializer_range,
            bos_token_id=None,
            eos_token_id=self.vocabulary.index(EOS),
            pad_token_id=self.vocabulary.index(PAD),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(config)
        self.save_model_dir(model, directory)

    def save_model_dir(self, model: Any, directory: str | Path) -> None:
        """Save a transformers model with the tokenizer; the directory appears whole. Raises UserError if it holds something."""
        with whole_directory(Path(directory)) as staging:
            model.save_pretrained(str(staging))
            # transformers 5 writes the RoPE base in `rope_parameters` alone, where version 4 (in many serving containers) doesn't look.
            path = staging / "config.json"
            write_file(path, json.dumps(spell_for_all(read_object(path), str(path)), indent=2, sort_keys=True) + "\n")
            (staging / "model.safetensors").chmod(path.stat().st_mode)  # safetensors writes for the owner alone
            self.build_tokenizer(staging)
