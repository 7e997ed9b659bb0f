"""Any generative model of Hugging Face as a ``Generator``, with a chat template or without."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from comoe.augment.generator import Generation, Generator, Prompt
from comoe.config.errors import unknown_name
from comoe.data.tokens.vocabulary import tokenizer_problem
from comoe.distributed import choose_device
from comoe.models.encoders.pretrained import Role, Unfit, load_pretrained, quiet, readable_errors
from comoe.starter.registry import PREFIXES, READY_MADE, prepare

GENERATIVE = Role("--model", "a generative model", "kit:smollm2")
"""The model's role, in the words of error messages."""


def load_generator(
    name: str,
    *,
    device: str = "auto",
    max_new_tokens: int = 32,
    temperature: float = 0.7,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> HuggingFaceGenerator:
    """Load a generative model: float32 on a CPU, bfloat16 on a GPU. Its weights are safetensors, never a pickle.

    Args:
        name: folder, hub name or a ready-made one of ``READY_MADE``.
        device: a torch device; auto is the first GPU, or the CPU where there is none.
        max_new_tokens: maximum of tokens per text.
        temperature: of sampling.
        trust_remote_code: let the repository run its own Python code.
        progress: report what is done, and draw bars on a terminal.

    Raises:
        ValueError: no such folder or name, no network, a model that generates no text, missing
            weights, no tokenizer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more.")
    place = choose_device(device)
    if place.type == "cpu":
        # The library imports DeepSpeed when it generates, which else prints that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if name.startswith(PREFIXES) and name not in READY_MADE["--model"]:
        raise unknown_name("ready-made --model", name, READY_MADE["--model"])
    folder = str(prepare([name], progress=progress)[name]) if name.startswith(PREFIXES) else name
    with _no_retry_lines():
        model = load_pretrained(
            folder,
            GENERATIVE,
            trust_remote_code=trust_remote_code,
            prepare=lambda config: (config, {"use_safetensors": True}),
            auto_class=lambda config: _class_for(name, config, remote=trust_remote_code),
            dtype=torch.float32 if place.type == "cpu" else torch.bfloat16,
        )
        with readable_errors(name, GENERATIVE), quiet():
            source = os.path.expanduser(folder)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            if problem := tokenizer_problem(tokenizer, source):
                raise Unfit(f"--model ({name}): {problem}; copy all files of its own tokenizer.")
    return HuggingFaceGenerator(
        model.to(place).eval(),
        tokenizer,
        name=name,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
    )


def _class_for(name: str, config: Any, *, remote: bool) -> Any:
    """The library's class that builds the model."""
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    # BERT and its kin are in both tables, but generate only where they were trained as decoders.
    fills_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not fills_gaps
    if known or (remote and not config.is_encoder_decoder and not fills_gaps):
        return AutoModelForCausalLM
    raise Unfit(
        f"--model ({name}) is a {config.model_type} model, which reads text but generates none; give a generative "
        "model: an encoder-decoder (Flan-T5, BART) or a causal one (Llama, SmolLM, kit:smollm2)."
    )


@contextmanager
def _no_retry_lines() -> Iterator[None]:
    """Inside, the hub's library does not report each attempt to reach the hub: the error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


TOP_K = 50
"""Sampled tokens are among this many most probable ones."""


class HuggingFaceGenerator(Generator):
    """See ``Generator``. Probabilities are those of the model at temperature 1, without any penalty.

    A tokenizer's chat template is used if there is one; else examples and question become one
    text, and the text of a causal model ends with its line.

    Args:
        model: seq2seq or causal, in evaluation mode, on its device.
        tokenizer: its tokenizer.
        name: the user's name for it.
        max_new_tokens: maximum of tokens per text.
        temperature: of sampling, above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        max_new_tokens: int = 32,
        temperature: float = 0.7,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._name, self._max_new_tokens, self._temperature = name, max_new_tokens, temperature
        self._has_decoder = bool(model.config.is_encoder_decoder)
        self._chats = bool(getattr(tokenizer, "chat_template", None))
        self._special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        usual = model.generation_config
        ends = usual.eos_token_id if isinstance(usual.eos_token_id, list) else [usual.eos_token_id]
        lines = []
        if not (self._has_decoder or self._chats):
            tokens = range(len(tokenizer))
            lines = [token for token in tokens if "\n" in tokenizer.decode([token])]
        self._ends = sorted({*ends, tokenizer.eos_token_id, *lines} - {None})
        pads = (tokenizer.pad_token_id, usual.pad_token_id, *self._ends, 0)
        self._pad = next(token for token in pads if token is not None)
        self._settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=self._ends or None,
            pad_token_id=self._pad, bos_token_id=usual.bos_token_id, forced_bos_token_id=usual.forced_bos_token_id,
            decoder_start_token_id=usual.decoder_start_token_id,
        )  # fmt: skip
        # The library fills what is unset from the model's own settings, penalties for repetition
        # among them.
        model.generation_config = self._settings
        self._selects_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def identity(self) -> Mapping[str, str]:
        weight = next(self._model.parameters())
        form = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        model = f"{self._name} ({self._digest()[:12]}, {form})"
        return {"--model": model, "--max-new-tokens": str(self._max_new_tokens)}

    @property
    def limit(self) -> str:
        reserved = f", {self._max_new_tokens} of them reserved for the output (--max-new-tokens)"
        return f"{self._name} reads {self._max_length():,} tokens{'' if self._has_decoder else reserved}"

    def excess(self, prompt: Prompt) -> int:
        new = 0 if self._has_decoder else self._max_new_tokens
        return max(len(self._ids(prompt)) + new - self._max_length(), 0)

    def _max_length(self) -> int:
        names = ("max_position_embeddings", "n_positions")
        limits = [getattr(self._model.config, name, None) for name in names]
        limits.append(self._tokenizer.model_max_length)
        return min(limit for limit in limits if isinstance(limit, int) and limit > 0)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int | None]
    ) -> list[Generation]:
        # Causal models continue behind the last token, so the padding is in front.
        ids_BL, mask_BL = self._padded(
            [self._ids(prompt) for prompt in prompts], in_front=not self._has_decoder
        )
        selector = _TokenSelector(seeds, temperature=self._temperature)
        generated = self._model.generate(
            input_ids=ids_BL, attention_mask=mask_BL, generation_config=self._settings,
            logits_processor=LogitsProcessorList([selector]),
        )  # fmt: skip
        tokens_BN = generated[:, -len(selector.selected) :].tolist()
        logs_BN = torch.stack(selector.log_probabilities, dim=1).tolist()
        return [self._decode(tokens, logs) for tokens, logs in zip(tokens_BN, logs_BN, strict=True)]

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        tokens = [self._choice_tokens(prompt, choices) for prompt in prompts]
        # One pass over a text without its last token gives the probability of all of it: label
        # words of one token each share one.
        rows = dict.fromkeys((at, ids[:-1]) for at, texts in enumerate(tokens) for ids in texts)
        logs = self._log_probabilities(
            [self._ids(prompts[at]) for at, _ in rows], [list(prefix) for _, prefix in rows]
        )
        logs_KV = dict(zip(rows, logs, strict=True))
        shares = []
        for at, texts in enumerate(tokens):
            sums = [
                logs_KV[at, ids[:-1]][range(len(ids)), ids].double().sum().item() for ids in texts
            ]
            shares.append(tuple(torch.tensor(sums, dtype=torch.float64).softmax(dim=0).tolist()))
        return shares

    def _log_probabilities(
        self, prompts: list[list[int]], prefixes: list[list[int]]
    ) -> list[Tensor]:
        """Log probabilities of the token behind the prompt and behind each token of the prefix, per row (K, V)."""
        if self._has_decoder:
            start = [self._settings.decoder_start_token_id, self._settings.forced_bos_token_id]
            start = [token for token in start if token is not None]
            ids_RL, mask_RL = self._padded(prompts)
            decoder_RD, _ = self._padded([[*start, *prefix] for prefix in prefixes])
            firsts, kept = [len(start) - 1] * len(prompts), {"decoder_input_ids": decoder_RD}
        else:
            # Padding behind cannot be seen by what comes before it, so positions need no care.
            ids_RL, mask_RL = self._padded([a + b for a, b in zip(prompts, prefixes, strict=True)])
            firsts, kept = [len(prompt) - 1 for prompt in prompts], {"use_cache": False}
            if self._selects_logits:
                # All logits of a batch of long posts are many times as large as the model.
                spans = zip(firsts, prefixes, strict=True)
                wanted = sorted({at + n for at, prefix in spans for n in range(len(prefix) + 1)})
                kept["logits_to_keep"] = torch.tensor(wanted, device=ids_RL.device)
                firsts = [wanted.index(first) for first in firsts]
        logits = self._model(input_ids=ids_RL, attention_mask=mask_RL, **kept).logits
        return [
            logits[row, first : first + len(prefix) + 1].float().log_softmax(dim=-1)
            for row, (first, prefix) in enumerate(zip(firsts, prefixes, strict=True))
        ]

    def _decode(self, tokens: list[int], logs: list[float]) -> Generation:
        """One text from generated tokens, with whatever follows its end."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        special = set(self._tokenizer.all_special_ids) - set(self._ends)
        counted = [log for token, log in zip(kept, logs, strict=False) if token not in special]
        mean = sum(counted) / len(counted) if counted else -torch.inf
        text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Generation(
            text, float(torch.tensor(mean, dtype=torch.float64).exp()), end is not None
        )

    def _text(self, prompt: Prompt) -> str:
        turns = [(self._harmless(question), text) for question, text in prompt.examples]
        question = self._harmless(prompt.question)
        if not self._chats:
            return "\n\n".join([*(f"{asked} {text}" for asked, text in turns), question])
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": question})
        # Some reasoning models stop thinking aloud when this is off; templates of others do not
        # read it.
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )

    def _harmless(self, text: str) -> str:
        """A post must not end its turn and begin another one by containing the special tokens that do so."""
        for sign in self._special:
            text = text.replace(sign, " ")
        return text

    def _ids(self, prompt: Prompt) -> list[int]:
        return self._tokenize(self._text(prompt))

    def _tokenize(self, text: str) -> list[int]:
        # A chat template writes its special tokens itself. The library would warn of a length that
        # we cut or refuse.
        special = not self._chats
        return self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _choice_tokens(self, prompt: Prompt, choices: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each choice in its place behind the prompt."""
        if self._has_decoder:
            special = set(self._tokenizer.all_special_ids)
            rows = self._tokenizer(text_target=list(choices))["input_ids"]
            return [tuple(token for token in row if token not in special) for row in rows]
        text, gap = self._text(prompt), "" if self._chats else " "
        alone, tokens = self._tokenize(text), []
        for choice in choices:
            whole = self._tokenize(f"{text}{gap}{choice}")
            behind = whole[len(alone) :] if whole[: len(alone)] == alone else []
            # Where the first piece of the word merges with the end of the prompt, it is tokenized
            # separately.
            separate = self._tokenizer(f"{gap}{choice}", add_special_tokens=False)["input_ids"]
            tokens.append(tuple(behind or separate))
        return tokens

    def _padded(self, rows: list[list[int]], *, in_front: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask."""
        longest = max(map(len, rows))

        def padded(values: list[int], fill: int) -> list[int]:
            gap = [fill] * (longest - len(values))
            return gap + values if in_front else values + gap

        device = next(self._model.parameters()).device
        ids = [padded(row, self._pad) for row in rows]
        mask = [padded([1] * len(row), 0) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _digest(self) -> str:
        """Changes with weights, architecture, vocabulary or chat template; some numbers represent each weight."""
        sha256 = hashlib.sha256()
        for name, weight in self._model.state_dict().items():
            flat = weight.detach().reshape(-1)
            some = flat[:: max(flat.numel() // 64, 1)][:64].float().cpu()
            sha256.update(f"{name} {tuple(weight.shape)} {some.tolist()}".encode())
        words = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        sha256.update(repr((words, getattr(self._tokenizer, "chat_template", None))).encode())
        return sha256.hexdigest()


class _TokenSelector(LogitsProcessor):
    """Selects each row's next token, and keeps its probability under the model.

    A row with a seed takes the largest of logits / temperature plus Gumbel noise, which is a sample
    from the softmax of the former, whatever the other rows of the batch.

    Args:
        seeds: per row, None for the most probable token.
        temperature: of sampling.
    """

    def __init__(self, seeds: Sequence[int | None], *, temperature: float) -> None:
        self._random = [
            None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds
        ]
        self._temperature = temperature
        self.selected: list[Tensor] = []
        self.log_probabilities: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs_BV = scores.float().log_softmax(dim=-1)
        selected_B = logs_BV.argmax(dim=-1)
        for row, random in enumerate(self._random):
            if random is not None:
                best = logs_BV[row].topk(min(TOP_K, logs_BV.shape[1]))
                uniform = torch.rand(len(best.values), generator=random).clamp(1e-9, 1 - 1e-7)
                noise = -torch.log(-torch.log(uniform)).to(best.values.device)
                selected_B[row] = best.indices[(best.values / self._temperature + noise).argmax()]
        self.selected.append(selected_B)
        self.log_probabilities.append(logs_BV.gather(1, selected_B[:, None]).squeeze(1))
        # The library takes the largest: nothing else is left.
        return torch.full_like(scores, -torch.inf).scatter(1, selected_B[:, None], 0.0)
