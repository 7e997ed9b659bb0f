"""Tiny models with random weights and their tokenizers, as ``smoke:encoder`` and ``smoke:t5``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from comoe.starter.implied_posts import implied_words
from comoe.starter.synthetic_images import SIZE as DRAWN_SIZE
from comoe.starter.synthetic_text import vocabulary

PAD, END, UNKNOWN, START = "<pad>", "</s>", "<unk>", "<s>"
"""Signs of the tokenizers; T5 begins an answer with the padding sign and has no START."""


PROMPT_WORDS = tuple(
    "about aspect classify does emotion feel feeling how in is label of opinion or polarity post rate reason review "
    "say sentiment target text that think topic towards what which why word words writer yes not irony hate offensive "
    "anger joy sadness optimism".split()
)
"""Words of prompts and labels in a vocabulary, beside those of the generated posts."""


def build_smoke_t5(folder: Path) -> None:
    """A tiny T5 (gated GELU, tied word embeddings, 2 + 2 layers, width 64) with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    words = decoder_vocabulary([PAD, END, UNKNOWN])
    config = T5Config(
        vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=16, relative_attention_max_distance=64, feed_forward_proj="gated-gelu",
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    _save(T5ForConditionalGeneration, config, folder)
    _save_tokenizer(words, folder, single=f"$A {END}", pair=f"$A {END} $B {END}")


def build_smoke_bart(folder: Path) -> None:
    """A tiny BART (tied word embeddings, 2 + 2 layers, width 64) with random weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    words = decoder_vocabulary([START, PAD, END, UNKNOWN])
    config = BartConfig(
        vocab_size=len(words), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=160,
        tie_word_embeddings=True, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2, architectures=["BartForConditionalGeneration"],
    )  # fmt: skip
    _save(BartForConditionalGeneration, config, folder)
    single = f"{START} $A {END}"
    _save_tokenizer(words, folder, single=single, pair=f"{single} {END} $B {END}", start=START)


def build_smoke_llama(folder: Path) -> None:
    """A tiny Llama (4 layers, width 64, half as many key heads, tied word embeddings) with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = decoder_vocabulary([PAD, END, UNKNOWN, START])
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=3, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    _save(LlamaForCausalLM, config, folder)
    pair = f"{START} $A $B"
    _save_tokenizer(words, folder, single=f"{START} $A", pair=pair, start=START, stands=False)


def decoder_vocabulary(special: Sequence[str]) -> list[str]:
    """WordPiece vocabulary: the signs, then the words of all generated posts and of prompts, then letters."""
    whole, pieces = [], []
    for word in vocabulary():
        if not (word.startswith("[") and word.endswith("]")):  # BERT's own signs
            (pieces if word.startswith("##") else whole).append(word)
    return list(dict.fromkeys([*special, *whole, *implied_words(), *PROMPT_WORDS, *pieces]))


def _save(model_class: Any, config: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    # The caller's random numbers must not depend on whether this folder existed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    config.save_pretrained(folder)
    # Tied weights once, as in published folders.
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _save_tokenizer(
    words: Sequence[str],
    folder: Path,
    *,
    single: str,
    pair: str,
    start: str | None = None,
    stands: bool = True,
) -> None:
    """``stands``: the first token stands for the text, and the end is put behind it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.WordPiece(numbers, unk_token=UNKNOWN, max_input_chars_per_word=100)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    signs = [(sign, numbers[sign]) for sign in (END, START) if sign in numbers]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=signs
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD, eos_token=END, bos_token=start,
        cls_token=start if stands else None, sep_token=END if start is not None and stands else None,
        model_max_length=160,
    ).save_pretrained(folder)  # fmt: skip


def build_smoke_encoder(folder: Path) -> None:
    """A tiny random BERT (4 layers, width 64) with a vocabulary of the generated words."""
    # Here, not above: runs with real encoders and --help need neither.
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = vocabulary()
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=160, architectures=["BertModel"],
    )  # fmt: skip
    # The caller's random numbers must not depend on whether this folder existed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder, model_max_length=160).save_pretrained(folder)


def build_smoke_vilt(folder: Path) -> None:
    """A tiny random ViLT (4 layers, width 64, 36 patches of an image) with the words of ``smoke:encoder``."""
    from transformers import BertTokenizerFast, ViltConfig, ViltModel, ViTImageProcessorPil

    words = vocabulary()
    config = ViltConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=160, image_size=DRAWN_SIZE, patch_size=8, architectures=["ViltModel"],
    )  # fmt: skip
    _save(partial(ViltModel, add_pooling_layer=False), config, folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder, model_max_length=160).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": DRAWN_SIZE, "width": DRAWN_SIZE}).save_pretrained(folder)


def build_smoke_vision(folder: Path) -> None:
    """A tiny ResNet with random weights (3 stages, 9 image tokens of width 64) for images of 48 x 48 pixels."""
    import torch
    from safetensors.torch import save_file
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    # Learns the drawn shapes from scratch in a few passes; a ViT of this size needs many times as
    # many.
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 48, 64], depths=[1, 1, 1], layer_type="basic", image_size=DRAWN_SIZE,
        architectures=["ResNetModel"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetModel(config)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    ViTImageProcessorPil(size={"height": DRAWN_SIZE, "width": DRAWN_SIZE}).save_pretrained(folder)
