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
from safetensors import SafetensorError
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

from comoe.augment.generator import Answer, Generator, Prompt
from comoe.config.errors import unknown_name
from comoe.models.encoders.pretrained import Role, quiet, read_config
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
        max_new_tokens: tokens of an answer.
        temperature: of drawn answers.
        trust_remote_code: let the repository run its own Python code.
        progress: report what is done, and draw bars on a terminal.

    Raises:
        ValueError: no such folder or name, no network, a model that does not write text, missing
            weights, no tokenizer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more.")
    place = _place(device)
    if place.type == "cpu":
        # The library imports DeepSpeed when it generates, which else prints that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if name.startswith(PREFIXES) and name not in READY_MADE["--model"]:
        raise unknown_name("ready-made --model", name, READY_MADE["--model"])
    folder = str(prepare([name], progress=progress)[name]) if name.startswith(PREFIXES) else name
    with _no_retry_lines():
        source, config = read_config(folder, GENERATIVE, trust_remote_code=trust_remote_code)
    auto = _class_for(name, config, trust_remote_code=trust_remote_code)
    with _readable_errors(name), quiet(), _no_retry_lines():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, report = auto.from_pretrained(
            source, config=config, dtype=torch.float32 if place.type == "cpu" else torch.bfloat16, use_safetensors=True,
            trust_remote_code=trust_remote_code, output_loading_info=True,
        )  # fmt: skip
    if report["missing_keys"]:
        # The library would fill them with random numbers and go on.
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"--model ({name}) has no weights for {', '.join(missing[:3])} ({len(missing)} in all), so it cannot "
            "write; give a whole generative model."
        )
    return HuggingFaceGenerator(
        model.to(place).eval(),
        tokenizer,
        name=name,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
    )


def _place(device: str) -> torch.device:
    try:
        place = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--device {device} cannot be used here ({reason}); name another one, or auto."
        ) from error
    return place


def _class_for(name: str, config: Any, *, trust_remote_code: bool) -> Any:
    """The library's class that builds the model."""
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    # BERT and its kin are in both tables, but write only where they were trained as decoders.
    fills_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not fills_gaps
    if known or (trust_remote_code and not config.is_encoder_decoder and not fills_gaps):
        return AutoModelForCausalLM
    raise ValueError(
        f"--model ({name}) is a {config.model_type} model, which reads text but does not write any; give a generative "
        "model: an encoder-decoder (Flan-T5, BART) or a causal one (Llama, SmolLM, kit:smollm2)."
    )


@contextmanager
def _no_retry_lines() -> Iterator[None]:
    """Inside, the hub's library does not tell each time that it cannot reach the hub: the error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"--model ({name}) could not be loaded: {reason} Give a folder with safetensors and a tokenizer, a hub "
            "name that this machine can reach, or kit:smollm2."
        ) from error


DRAWN_FROM = 50
"""Drawn tokens are among the so many most probable ones."""


class HuggingFaceGenerator(Generator):
    """See ``Generator``. Probabilities are those of the model at temperature 1, with no penalty of any kind.

    A tokenizer's chat template is used where there is one; else examples and question become one
    text, and an answer of a causal model ends with its line.

    Args:
        model: seq2seq or causal, in evaluation, on its device.
        tokenizer: its tokenizer.
        name: what the user calls it.
        max_new_tokens: tokens of an answer.
        temperature: of drawn answers, above 0.
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
        self._decodes = bool(model.config.is_encoder_decoder)
        self._chats = bool(getattr(tokenizer, "chat_template", None))
        self._special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        usual = model.generation_config
        ends = [usual.eos_token_id, tokenizer.eos_token_id]
        flat = [
            end
            for item in ends
            for end in (item if isinstance(item, list) else [item])
            if end is not None
        ]
        self._ends = sorted({*flat, *(() if self._decodes or self._chats else self._line_ends())})
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
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def identity(self) -> Mapping[str, str]:
        weight = next(self._model.parameters())
        form = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        return {
            "--model": f"{self._name} ({self._digest()[:12]}, {form})", "--max-new-tokens": str(self._max_new_tokens)
        }  # fmt: skip

    @property
    def limit(self) -> str:
        answer = (
            ""
            if self._decodes
            else f", {self._max_new_tokens} of them kept for the answer (--max-new-tokens)"
        )
        return f"{self._name} reads {self._most():,} tokens{answer}"

    def _most(self) -> int:
        """Tokens that the model reads."""
        config = self._model.config
        limits = [
            getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")
        ]
        limits.append(self._tokenizer.model_max_length)
        return min(limit for limit in limits if isinstance(limit, int) and limit > 0)

    def excess(self, prompt: Prompt) -> int:
        return max(
            len(self._ids(prompt)) + (0 if self._decodes else self._max_new_tokens) - self._most(),
            0,
        )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], *, draws: Sequence[int | None]) -> list[Answer]:
        # Causal models go on behind the last token, so the padding is in front.
        ids_BL, mask_BL = self._padded(
            [self._ids(prompt) for prompt in prompts], in_front=not self._decodes
        )
        chooser = _Chooser(draws, temperature=self._temperature)
        written = self._model.generate(
            input_ids=ids_BL, attention_mask=mask_BL, generation_config=self._settings,
            logits_processor=LogitsProcessorList([chooser]),
        )  # fmt: skip
        tokens_BN = written[:, -len(chooser.chosen) :].tolist()
        probabilities_BN = torch.stack(chooser.log_probabilities, dim=1).tolist()
        return [
            self._read(tokens, logs)
            for tokens, logs in zip(tokens_BN, probabilities_BN, strict=True)
        ]

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        answers = [self._choices(prompt, choices) for prompt in prompts]
        # One pass over an answer without its last token gives the probability of all of it: label
        # words of one token each share one.
        rows = dict.fromkeys((at, ids[:-1]) for at, found in enumerate(answers) for ids in found)
        logs = self._log_probabilities(
            [self._ids(prompts[at]) for at, _ in rows], [list(begin) for _, begin in rows]
        )
        logs_KV = dict(zip(rows, logs, strict=True))
        shares = []
        for at, found in enumerate(answers):
            sums = [
                logs_KV[at, ids[:-1]][range(len(ids)), ids].double().sum().item() for ids in found
            ]
            shares.append(tuple(torch.tensor(sums, dtype=torch.float64).softmax(dim=0).tolist()))
        return shares

    def _log_probabilities(self, prompts: list[list[int]], begins: list[list[int]]) -> list[Tensor]:
        """Log probabilities of the token behind the prompt and behind each token of ``begins``, per row (K, V)."""
        if self._decodes:
            ids_RL, mask_RL = self._padded(prompts, in_front=False)
            started = [[*self._decoder_start(), *begin] for begin in begins]
            decoder_RD, _ = self._padded(started, in_front=False)
            logits = self._model(
                input_ids=ids_RL, attention_mask=mask_RL, decoder_input_ids=decoder_RD
            ).logits
            firsts = [
                len(start) - len(begin) - 1 for start, begin in zip(started, begins, strict=True)
            ]
        else:
            # Padding behind cannot be seen by what comes before it, so positions need no care.
            ids_RL, mask_RL = self._padded(
                [a + b for a, b in zip(prompts, begins, strict=True)], in_front=False
            )
            firsts = [len(prompt) - 1 for prompt in prompts]
            spans = zip(firsts, begins, strict=True)
            wanted = sorted(
                {first + step for first, begin in spans for step in range(len(begin) + 1)}
            )
            # All logits of a batch of long posts are many times as large as the model.
            some = (
                {"logits_to_keep": torch.tensor(wanted, device=ids_RL.device)}
                if self._keeps_some
                else {}
            )
            logits = self._model(
                input_ids=ids_RL, attention_mask=mask_RL, use_cache=False, **some
            ).logits
            firsts = [wanted.index(first) for first in firsts] if some else firsts
        return [
            logits[row, first : first + len(begin) + 1].float().log_softmax(dim=-1)
            for row, (first, begin) in enumerate(zip(firsts, begins, strict=True))
        ]

    def _read(self, tokens: list[int], logs: list[float]) -> Answer:
        """One answer out of the tokens that were written, with whatever follows its end."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        special = set(self._tokenizer.all_special_ids) - set(self._ends)
        counted = [log for token, log in zip(kept, logs, strict=False) if token not in special]
        mean = sum(counted) / len(counted) if counted else -torch.inf
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(
            text.strip(), float(torch.tensor(mean, dtype=torch.float64).exp()), end is not None
        )

    def _text(self, prompt: Prompt) -> str:
        turns = [(self._harmless(question), answer) for question, answer in prompt.examples]
        question = self._harmless(prompt.question)
        if not self._chats:
            return "\n\n".join([*(f"{asked} {answer}" for asked, answer in turns), question])
        messages = [
            message
            for asked, answer in turns
            for message in (
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            )
        ]
        messages.append({"role": "user", "content": question})
        # Of the models that think aloud, some leave it when told so; templates of others do not
        # read this.
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )

    def _harmless(self, text: str) -> str:
        """A post must not end its turn and begin another one by writing the signs that do so."""
        for sign in self._special:
            text = text.replace(sign, " ")
        return text

    def _ids(self, prompt: Prompt) -> list[int]:
        # A chat template writes its special tokens itself.
        # The library would warn of what is too long, which is cut or refused by us.
        return self._tokenizer(
            self._text(prompt), add_special_tokens=not self._chats, verbose=False
        )["input_ids"]

    def _choices(self, prompt: Prompt, choices: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each choice where it stands, behind the prompt."""
        if self._decodes:
            special = set(self._tokenizer.all_special_ids)
            rows = self._tokenizer(text_target=list(choices))["input_ids"]
            return [tuple(token for token in row if token not in special) for row in rows]
        text, gap = self._text(prompt), "" if self._chats else " "
        alone = self._ids(prompt)
        found = []
        for choice in choices:
            asked = f"{text}{gap}{choice}"
            whole = self._tokenizer(asked, add_special_tokens=not self._chats, verbose=False)[
                "input_ids"
            ]
            # Where the first piece of the word grows together with the end of the prompt, it is cut
            # by itself.
            behind = whole[len(alone) :] if whole[: len(alone)] == alone else None
            found.append(
                tuple(
                    behind
                    or self._tokenizer(f"{gap}{choice}", add_special_tokens=False)["input_ids"]
                )
            )
        return found

    def _decoder_start(self) -> list[int]:
        first = [self._settings.decoder_start_token_id, self._settings.forced_bos_token_id]
        return [token for token in first if token is not None]

    def _padded(self, rows: list[list[int]], *, in_front: bool) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        filled = [
            [self._pad] * gap + row if in_front else row + [self._pad] * gap
            for gap, row in zip(gaps, rows, strict=True)
        ]
        seen = [
            [0] * gap + [1] * len(row) if in_front else [1] * len(row) + [0] * gap
            for gap, row in zip(gaps, rows, strict=True)
        ]
        device = next(self._model.parameters()).device
        return torch.tensor(filled, device=device), torch.tensor(seen, device=device)

    def _line_ends(self) -> Iterator[int]:
        """Tokens that end a line."""
        for token in range(len(self._tokenizer)):
            if "\n" in self._tokenizer.decode([token]):
                yield token

    def _digest(self) -> str:
        """Changes with weights, architecture, vocabulary or chat template: some numbers of each weight stand for it."""
        sha256 = hashlib.sha256()
        for name, weight in self._model.state_dict().items():
            flat = weight.detach().reshape(-1)
            some = flat[:: max(flat.numel() // 64, 1)][:64].float().cpu()
            sha256.update(f"{name} {tuple(weight.shape)} {some.tolist()}".encode())
        words = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        sha256.update(repr((words, getattr(self._tokenizer, "chat_template", None))).encode())
        return sha256.hexdigest()


class _Chooser(LogitsProcessor):
    """Chooses each row's next token, and keeps its probability under the model.

    A row with a seed takes the largest of logits / temperature plus Gumbel noise, which is a draw
    from the softmax of the former, whatever the rows beside it.

    Args:
        draws: seed per row, None for the most probable token.
        temperature: of the draws.
    """

    def __init__(self, draws: Sequence[int | None], *, temperature: float) -> None:
        self._random = [
            None if seed is None else torch.Generator().manual_seed(seed) for seed in draws
        ]
        self._temperature = temperature
        self.chosen: list[Tensor] = []
        self.log_probabilities: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs_BV = scores.float().log_softmax(dim=-1)
        chosen_B = logs_BV.argmax(dim=-1)
        for row, random in enumerate(self._random):
            if random is not None:
                best = logs_BV[row].topk(min(DRAWN_FROM, logs_BV.shape[1]))
                noise = -torch.log(
                    -torch.log(torch.rand(len(best.values), generator=random).clamp(1e-9, 1 - 1e-7))
                )
                chosen_B[row] = best.indices[
                    (best.values / self._temperature + noise.to(best.values.device)).argmax()
                ]
        self.chosen.append(chosen_B)
        self.log_probabilities.append(logs_BV.gather(1, chosen_B[:, None]).squeeze(1))
        # The library takes the largest: nothing else is left.
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)
