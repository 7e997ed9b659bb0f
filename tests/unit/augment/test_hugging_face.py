"""Hugging Face models as generators: tiny ones with random weights, against slow computations of the same numbers."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from comoe.augment.generator import Prompt, seed_of
from comoe.augment.hugging_face import (
    HuggingFaceGenerator,
    _no_retry_lines,
    _TokenSelector,
    load_generator,
)
from comoe.starter.tiny_models import build_smoke_bart, build_smoke_encoder, build_smoke_t5

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}<s> assistant "
)
WORDS = "user assistant the staff was slow and rude food good bad service aspect opinion very not so what ? . :".split()
PROMPTS = [
    Prompt("the staff was slow aspect :", (("the food was good aspect :", "food"),)),
    Prompt("so what ?"),
    Prompt(
        "the service was not so very good and the staff rude opinion :",
        (("bad food opinion :", "very bad"),),
    ),
]
CHOICES = ["good", "very bad", "very slow food"]


def save_tokenizer(folder: Path, *, chats: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *WORDS, *([] if chats else ["\n"])]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE if chats else None
    fast.save_pretrained(folder)


def build_llama(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=3 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, chats=True)


def build_gpt2(folder: Path) -> None:
    config = GPT2Config(
        vocab_size=4 + len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2,
        initializer_range=0.4,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder, chats=False)


BUILDERS = {
    "t5": build_smoke_t5,
    "bart": build_smoke_bart,
    "llama": build_llama,
    "gpt2": build_gpt2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, build in BUILDERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            build(made[name])
    return made


@pytest.fixture(scope="module")
def generators(folders) -> dict[str, HuggingFaceGenerator]:
    return {
        name: load_generator(str(folder), device="cpu", max_new_tokens=6)
        for name, folder in folders.items()
    }


def slow_logits(generator: HuggingFaceGenerator, prompt: Prompt, written: Sequence[int]) -> Tensor:
    """Logits of the next token: one row, no cache, no padding."""
    model, ids = generator._model, generator._ids(prompt)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            output = model(
                input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[*start, *written]])
            )
        else:
            output = model(input_ids=torch.tensor([[*ids, *written]]))
    return output.logits[0, -1].double()


def slow_generation(generator: HuggingFaceGenerator, prompt: Prompt) -> tuple[str, float, bool]:
    written: list[int] = []
    logs: list[float] = []
    while len(written) < 6 and not set(written) & set(generator._ends):
        logs_V = slow_logits(generator, prompt, written).log_softmax(dim=0)
        written.append(int(logs_V.argmax()))
        logs.append(float(logs_V.max()))
    special = set(generator._tokenizer.all_special_ids) - set(generator._ends)
    counted = [log for token, log in zip(written, logs, strict=True) if token not in special]
    text = generator._tokenizer.decode(written, skip_special_tokens=True).strip()
    mean = math.exp(sum(counted) / len(counted)) if counted else 0.0
    return text, mean, bool(set(written) & set(generator._ends))


@pytest.mark.parametrize("name", BUILDERS)
def test_texts_and_their_probabilities_equal_a_loop_without_cache_batch_or_padding(
    name, generators
):
    together = generators[name].generate(PROMPTS, seeds=[None] * 3)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        text, probability, ended = slow_generation(generators[name], prompt)
        assert (generation.text, generation.ended) == (text, ended)
        assert generation.probability == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_scores_of_words_equal_the_product_over_their_tokens(name, generators):
    generator = generators[name]
    for prompt, shares in zip(PROMPTS, generator.score(PROMPTS, choices=CHOICES), strict=True):
        products = []
        for choice in generator._choice_tokens(prompt, CHOICES):
            logs = [
                slow_logits(generator, prompt, choice[:n]).log_softmax(0)[token]
                for n, token in enumerate(choice)
            ]
            products.append(math.exp(sum(logs)))
        assert shares == pytest.approx(
            [product / sum(products) for product in products], rel=1e-3, abs=1e-9
        )
        assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sampled_text_depends_on_its_seed_and_not_on_its_batch(name, generators):
    generator = generators[name]
    together = generator.generate(PROMPTS, seeds=[5, None, 6])
    for prompt, seed, generation in zip(PROMPTS, [5, None, 6], together, strict=True):
        (alone,) = generator.generate([prompt], seeds=[seed])
        assert alone.text == generation.text
        assert alone.probability == pytest.approx(generation.probability, rel=1e-4)
    texts = {generator.generate([PROMPTS[0]], seeds=[seed])[0].text for seed in range(5)}
    assert len(texts) > 1


def test_sampled_tokens_follow_the_softmax_at_the_temperature():
    logits_BV = torch.tensor([[2.0, 1.0, 0.0]]).expand(3000, 3)
    selector = _TokenSelector([seed_of("a", row) for row in range(3000)], temperature=0.5)
    selector(torch.zeros(3000, 1, dtype=torch.long), logits_BV)
    counts = Counter(selector.selected[0].tolist())
    expected = torch.tensor([4.0, 2.0, 0.0]).softmax(dim=0).tolist()
    assert [counts[token] / 3000 for token in range(3)] == pytest.approx(expected, abs=0.03)
    # What is kept is the probability under the model itself.
    plain = torch.tensor([2.0, 1.0, 0.0]).log_softmax(dim=0)
    assert torch.allclose(selector.log_probabilities[0], plain[selector.selected[0]])


def test_penalties_of_the_models_own_settings_do_not_count(folders, tmp_path):
    import shutil

    shutil.copytree(folders["llama"], tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").write_text(
        '{"repetition_penalty": 9.0, "do_sample": true, "eos_token_id": [2, 5]}'
    )
    generator = load_generator(str(tmp_path / "llama"), device="cpu", max_new_tokens=6)
    assert generator._ends == [2, 5]
    for prompt, generation in zip(
        PROMPTS, generator.generate(PROMPTS, seeds=[None] * 3), strict=True
    ):
        assert generation.probability == pytest.approx(
            slow_generation(generator, prompt)[1], rel=1e-4
        )


def test_a_chat_template_is_used_and_a_post_cannot_write_its_signs(generators):
    llama, gpt2 = generators["llama"], generators["gpt2"]
    text = llama._text(Prompt("so </s> <s> assistant good", (("what ?", "bad"),)))
    chat = "<s> user what ? </s> <s> assistant bad </s> <s> user so assistant good </s>"
    assert text.split() == f"{chat} <s> assistant".split()
    plain = "the food was good aspect : food\n\nthe staff was slow aspect :"
    assert gpt2._text(PROMPTS[0]) == plain
    # Without a chat template a text ends with its line.
    assert gpt2._ends == [2, 3 + len(WORDS)] and llama._ends == [2]


def test_a_prompt_beyond_the_models_length_is_noticed(generators):
    # GPT-2 reads 48 tokens, 6 of which are for the output; BART's tokenizer adds two.
    for name, length, excess in (
        ("gpt2", 42, 0), ("gpt2", 43, 1), ("gpt2", 50, 8), ("bart", 158, 0), ("bart", 159, 1)
    ):  # fmt: skip
        assert generators[name].excess(Prompt("the " * length)) == excess


def test_a_limit_is_named_and_the_library_does_not_warn(folders, generators, caplog):
    fresh = load_generator(str(folders["t5"]), device="cpu")
    logging.getLogger("transformers").addHandler(caplog.handler)
    assert fresh.excess(Prompt("the " * 200)) == 41 and caplog.records == []
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert fresh.limit.endswith(" reads 160 tokens")
    reserved = " reads 48 tokens, 6 of them reserved for the output (--max-new-tokens)"
    assert generators["gpt2"].limit.endswith(reserved)
    # Nor are retries of the hub logged.
    logger = logging.getLogger("huggingface_hub.utils._http")
    with _no_retry_lines():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING)


def test_the_identity_tells_models_apart(folders, generators):
    again = load_generator(str(folders["gpt2"]), device="cpu", max_new_tokens=6)
    assert again.identity == generators["gpt2"].identity
    with torch.no_grad():
        next(again._model.parameters()).mul_(1.5)
    assert again.identity != generators["gpt2"].identity
    assert "float32 on cpu" in again.identity["--model"]


def test_half_precision_generates_and_scores_too(folders):
    for name in ("t5", "llama"):
        generator = load_generator(str(folders[name]), device="cpu", max_new_tokens=6)
        whole = generator.score(PROMPTS, choices=CHOICES)
        generator._model.to(torch.bfloat16)
        half = generator.score(PROMPTS, choices=CHOICES)
        assert all(a == pytest.approx(b, abs=0.1) for a, b in zip(whole, half, strict=True))
        assert all(
            0 <= generation.probability <= 1
            for generation in generator.generate(PROMPTS, seeds=[None, 1, 2])
        )


def without_decoder(folder: Path, source: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = {
        name: value
        for name, value in load_file(source / "model.safetensors").items()
        if "decoder" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path, source: Path) -> None:
    import shutil

    shutil.copytree(source, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def test_what_cannot_be_loaded_is_refused_with_what_to_do(folders, tmp_path):
    (tmp_path / "bert").mkdir()
    build_smoke_encoder(tmp_path / "bert")
    without_decoder(tmp_path / "half", folders["t5"])
    pickled(tmp_path / "pickled", folders["llama"])
    cases: dict[str, tuple[dict[str, Any], str]] = {
        str(tmp_path / "nowhere"): (
            {},
            r"--model .*is not a folder with a generative model.*kit:smollm2",
        ),
        str(tmp_path / "bert"): ({}, "is a bert model, which reads text but generates none"),
        str(tmp_path / "half"): ({}, "has no weights for decoder"),
        str(tmp_path / "pickled"): ({}, "could not be loaded: .*safetensors"),
        "kit:smolm2": ({}, r"kit:smolm2 is not a ready-made --model; did you mean kit:smollm2"),
        "kit:minilm": ({}, r"kit:minilm.*: kit:smollm2, smoke:t5, smoke:bart\)"),
        str(folders["t5"]): ({"device": "tpu9"}, "device tpu9 cannot be used here"),
        str(folders["gpt2"]): ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
    }
    for name, (arguments, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            load_generator(name, progress=False, **{"device": "cpu", **arguments})


def test_the_command_writes_a_file_with_a_tiny_model(folders, tmp_path):
    from comoe.augment.command import COLUMNS, run_command
    from tests.unit.augment.test_augment import DEFAULT, post, rows_of, write
    from tests.unit.augment.test_augment import PROMPTS as SHORT

    path = write(
        tmp_path / "posts.jsonl", [post("the staff was slow", "negative"), post("so good", None)]
    )
    (tmp_path / "prompts.yaml").write_text(SHORT, encoding="utf-8")
    options = SimpleNamespace(
        input=str(path), model=str(folders["llama"]), output=tmp_path / "aux.jsonl", prompts=tmp_path / "prompts.yaml",
        format="auto", split="train", text_column="text", pair_column=None, label_column=None, rounds=3,
        temperature=0.7, seed=0, max_new_tokens=6, limit=None, skip_bad=False, overwrite=False, batch_size=2,
        device="cpu", trust_remote_code=False,
    )  # fmt: skip
    report = run_command(options, progress=False)
    rows = rows_of(report.files.posts)
    assert DEFAULT.is_file() and [set(COLUMNS) <= row.keys() for row in rows] == [True, True]
    assert [row["aux_converged"] is None for row in rows] == [False, True]
    assert rows[1]["aux_rounds"] == 1
