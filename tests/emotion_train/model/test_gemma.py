"""Gemma 3: its multimodal checkpoints and its GGUF files against transformers' own model, and the
pieces of its vocabulary against SentencePiece's rule, written down plainly.
"""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotion_train.bases.architecture import text_model, text_name
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.gemma import GGUF_NAMES
from emotion_train.bases.gguf_file import GgufFile
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.exporting.export import export
from emotion_train.model.load import (
    _configuration,
    load_base,
    open_checkpoint,
    parameters_of,
    read_config,
    skeleton,
)
from emotion_train.model.trainable import require_trainable_base
from emotion_train.sizing.shape import Shape
from tests.emotion_train.test_export import adapter_on, piped, predicted
from tests.helpers.tiny_models import (
    causal_checkpoint,
    gemma_base,
    hidden,
    multimodal_checkpoint,
    text_config,
)

gguf = pytest.importorskip("gguf")


# --- checkpoints ---


@pytest.mark.parametrize("layout", ["hub", "current"])
def test_the_text_part_computes_what_the_multimodal_model_computes(tmp_path: Path, layout: str) -> None:
    folder, whole = multimodal_checkpoint(tmp_path / "base", layout, "gemma3_text")
    found = require_trainable_base(str(folder), "fp32", 512)
    model, info = load_base(str(folder), "fp32", 5, "cpu")
    torch.testing.assert_close(hidden(model.model), hidden(whole.model.language_model), rtol=0, atol=1e-5)
    assert (info.layout, info.architecture, found.model.kind) == ("multimodal", "gemma3_text", "gemma3_text")
    assert info.parameters == sum(p.numel() for p in whole.model.language_model.parameters())


def test_the_names_that_transformers_writes_are_those_that_are_read(tmp_path: Path) -> None:
    """Layouts of the multimodal model and of both classifiers."""
    from transformers import AutoModelForSequenceClassification, Gemma3ForSequenceClassification

    _, whole = multimodal_checkpoint(tmp_path / "base", kind="gemma3_text")
    classifier = Gemma3ForSequenceClassification(whole.config)
    text = AutoModelForSequenceClassification.from_config(text_config("gemma3_text"), trust_remote_code=False)
    wanted = set(text_model(BaseFiles.find(str(tmp_path / "base"))).tensors())
    for number, model in enumerate((whole, classifier, text)):
        model.save_pretrained(tmp_path / str(number))
        files = BaseFiles.find(str(tmp_path / str(number)))
        assert text_model(files).kind == "gemma3_text"
        found = read_config(files)
        assert open_checkpoint(found, skeleton(found.text, 2)).shapes.keys() == wanted


def test_a_sparse_configuration_means_what_transformers_takes_it_for(tmp_path: Path) -> None:
    """The hub's config.json of the 4B leaves out what its family shares."""
    published = {
        "model_type": "gemma3",
        "text_config": {
            **{"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34},
            **{"model_type": "gemma3_text", "sliding_window": 1024},
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    files = BaseFiles.find(str(tmp_path))
    ours, theirs = text_model(files), read_config(files).text
    assert Shape.of(ours.values) == Shape.of(theirs.to_dict())
    counted = sum(prod(shape) for shape in parameters_of(skeleton(theirs, 2)).values())
    assert Shape.of(ours.values).parameters == counted
    assert theirs.layer_types.count("full_attention") == 5
    assert theirs.rope_parameters["full_attention"]["factor"] == 8.0
    assert ours.positions == theirs.max_position_embeddings


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sliding_window": None}, "its sliding_window is 'None'"),
    ({"query_pre_attn_scalar": 0}, "its query_pre_attn_scalar is '0'"),
    ({"layer_types": None, "sliding_window_pattern": 0}, "its sliding_window_pattern is '0'"),
    ({"layer_types": ["full_attention", "chunked"]}, "its layer_types have 'chunked'"),
    ({"hidden_activation": "gelly"}, "its hidden_activation 'gelly' is not known"),
    ({"rope_parameters": {"full_attention": "default"}}, "no object of objects"),
    ({"rope_parameters": {"full_attention": {"rope_type": "ropey"}}}, "its rope_type 'ropey'"),
    ({"num_attention_heads": 6}, "64 is no multiple of its num_attention_heads 6"),
    ({"head_dim": None}, "its head_dim is 'None'"),
]
# which transformers takes: not causal, or with values that it leaves unread
OURS_ALONE: list[tuple[dict[str, Any], str]] = [
    ({"use_bidirectional_attention": True}, "its use_bidirectional_attention is True"),
    ({"attn_logit_softcapping": 50.0}, "its attn_logit_softcapping is 50.0"),
    ({"rope_parameters": {"rope_type": "default"}}, "no object of objects"),
]


@pytest.mark.parametrize(("changes", "words"), [*REFUSED, *OURS_ALONE])
def test_a_configuration_that_makes_no_causal_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**text_config("gemma3_text").to_dict(), **changes}))
    with pytest.raises(WrongRequest, match=words) as caught:
        text_model(BaseFiles.find(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [changes for changes, _ in REFUSED])
def test_transformers_cannot_compute_what_is_refused(changes: dict[str, Any]) -> None:
    from transformers import AutoModel

    document = {**text_config("gemma3_text").to_dict(), **changes}

    def compute() -> None:
        hidden(AutoModel.from_config(_configuration("base", document), trust_remote_code=False))

    with pytest.raises((WrongRequest, ValueError, KeyError, TypeError, ZeroDivisionError)):
        compute()


# --- GGUF ---

PIECES = {  # with the scores of their merges
    **{"▁": -50.0, "h": -51.0, "a": -52.0, "p": -53.0, "y": -54.0, "s": -55.0, "d": -56.0, "t": -57.0},
    **{"ap": -1.0, "hap": -2.0, "py": -3.0, "happy": -4.0, "pp": -5.0, "▁s": -6.0, "ad": -7.0, "▁sad": -8.0},
    **{"sa": -9.0, "▁h": -10.0, "▁happy": -11.0, "at": -12.0},
}
CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CHOSEN = ("\n", "\n\n", "  ", "   ", "<b>", "</s>", "<start_of_image>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
TOKENS = (*CONTROLS, *CHOSEN, *BYTES, *PIECES)


def gguf_of(path: Path, folder: Path) -> Path:
    """What llama.cpp makes of the checkpoint in the folder, and a small vocabulary of pieces."""
    found = read_config(str(folder))
    weights = open_checkpoint(found, skeleton(found.text, 2))
    text, writer = found.text, gguf.GGUFWriter(path, "gemma3")
    for name, number in {
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.sliding_window": text.sliding_window,
    }.items():
        writer.add_uint32(f"gemma3.{name}", number)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", text.rms_norm_eps)
    writer.add_float32("gemma3.rope.freq_base", 1_000_000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    of_pieces = len(TOKENS) - len(PIECES)
    writer.add_token_scores([-1000.0] * of_pieces + list(PIECES.values()))
    types = [3] * len(CONTROLS) + [4] * len(CHOSEN) + [6] * len(BYTES) + [1] * len(PIECES)
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    theirs = {ours: name for name, ours in GGUF_NAMES.items()}
    for name in weights.shapes:
        parts = name.split(".")
        layer = theirs.get(".".join(parts[3:-1]))
        key = f"blk.{parts[2]}.{layer}.{parts[-1]}" if layer else {"embed_tokens": "token_embd"}.get(parts[1])
        tensor = weights.read(name).float().numpy()
        writer.add_tensor(
            key if layer else f"{key or 'output_norm'}.weight",
            tensor + 1 if name.endswith("norm.weight") else tensor,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint of seven layers, of which one sees the whole post, and its GGUF file."""
    folder = tmp_path_factory.mktemp("gemma")
    changes: dict[str, Any] = {"sliding_window_pattern": 6, "query_pre_attn_scalar": 16}
    whole = causal_checkpoint(
        folder / "base", "gemma3_text", vocab_size=len(TOKENS), num_hidden_layers=7, **changes
    )
    return str(whole), str(gguf_of(folder / "base.gguf", whole))


def test_a_gguf_file_computes_what_its_checkpoint_computes(pair: tuple[str, str]) -> None:
    whole, _ = load_base(pair[0], "fp32", 2, "cpu")
    found = require_trainable_base(pair[1], "fp32", 64)
    model, info = load_base(pair[1], "fp32", 2, "cpu")
    assert torch.equal(hidden(model.model), hidden(whole.model))
    assert (info.layout, info.architecture) == ("gguf", "gemma3_text")
    assert Shape.of(found.model.values) == Shape.of(model.config.to_dict())
    assert model.config.layer_types == whole.config.layer_types
    cut, _ = load_base(read_config(BaseFiles.find(pair[1], 3)), "fp32", 2, "cpu")
    assert len(cut.model.layers) == 3


def test_rows_of_a_gguf_file_are_those_of_the_whole_tensor(pair: tuple[str, str]) -> None:
    found = read_config(pair[1])
    weights = open_checkpoint(found, skeleton(found.text, 2))
    for name in ("model.norm.weight", "model.layers.3.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights.read_rows(name, 2, 5), weights.read(name)[2:5])


def test_the_27b_scales_its_queries_otherwise_and_larger_ones_stretch_their_positions() -> None:
    sizes = {"embedding_length": 5376, "attention.head_count": 32, "attention.key_length": 128}
    header: dict[str, Any] = {
        **{**sizes, "block_count": 62, "feed_forward_length": 21_504, "context_length": 131_072},
        **{"attention.sliding_window": 1024, "attention.layer_norm_rms_epsilon": 1e-6},
        **{"vocab_size": 9, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    }
    metadata = {f"gemma3.{name}": value for name, value in header.items()}
    config = GgufFile(Path("x.gguf"), {"general.architecture": "gemma3", **metadata}, {}).config()
    assert config["query_pre_attn_scalar"] == 168
    assert config["rope_parameters"]["full_attention"] == {
        **{"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
    }
    metadata["gemma3.rope.scaling.type"] = "yarn"
    with pytest.raises(WrongRequest, match="scales its positions"):
        GgufFile(Path("x.gguf"), {"general.architecture": "gemma3", **metadata}, {}).config()


def test_an_export_of_a_gguf_file_answers_as_its_adapter(pair: tuple[str, str], tmp_path: Path) -> None:
    adapter = adapter_on(pair[1], tmp_path / "adapter")
    export(adapter, tmp_path / "out", dtype="fp32")
    np.testing.assert_allclose(piped(tmp_path / "out"), predicted(adapter), atol=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert written["layer_types"].count("full_attention") == 1
    named = '--hf-overrides \'{"architectures": ["Gemma3ForSequenceClassification"]}\''
    assert named in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")  # a name that vLLM has


def by_sentencepiece(text: str) -> list[str]:
    """Byte-pair encoding as SentencePiece does it: the best-scored neighbours are joined, over and
    over, the left ones first; a letter of no piece becomes its bytes.
    """
    parts = list(text.replace(" ", "▁"))
    while True:
        scores = [PIECES.get(left + right, -np.inf) for left, right in pairwise(parts)]
        if not scores or max(scores) == -np.inf:
            break
        at = int(np.argmax(scores))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in PIECES else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("happy", " happy sad", "happysad happyhappy", "sappy paphap at saat", "tapapappypy y s"),
        *("", " ", "naïve 🙂", "sadx\x00", "<bos>happy<pad>", "<start_of_image>", "<0x41>"),
    ],
)
def test_pieces_of_a_vocabulary_are_joined_as_sentencepiece_does(pair: tuple[str, str], text: str) -> None:
    tokenizer = PostTokenizer.load(pair[1], 64)
    (ids,) = tokenizer.encode([text])
    assert [TOKENS[number] for number in ids] == ["<bos>", *by_sentencepiece(text)]


def test_pieces_that_the_author_chose_are_never_taken_apart(pair: tuple[str, str]) -> None:
    tokenizer = PostTokenizer.load(pair[1], 64)
    (ids,) = tokenizer.encode(["sad\n\n\nhappy   at  <b>s</s>"])
    wanted = ["<bos>", "s", "ad", "\n\n", "\n", "happy", "   ", "at", "  ", "<b>", "s", "</s>"]
    assert [TOKENS[number] for number in ids] == wanted
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.beyond(len(TOKENS))) == (2, 0, None)


def test_a_saved_vocabulary_of_pieces_gives_the_same_ids(pair: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = PostTokenizer.load(pair[1], 64)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    texts = ["happy  sad\n\n<bos> ünö", "</s> at <b>", "<start_of_image> s"]
    assert [list(ids) for ids in ours.encode(texts)] == theirs(texts).input_ids
    again = PostTokenizer.load(str(tmp_path), 64)
    assert again.sha256() == ours.sha256()


def test_a_vocabulary_without_scores_is_refused(pair: tuple[str, str]) -> None:
    from emotion_train.data.tokenization import _from_gguf

    whole = GgufFile.open(pair[1])
    part = {name: value for name, value in whole.metadata.items() if not name.endswith("scores")}
    with pytest.raises(WrongRequest, match="has no whole vocabulary of pieces"):
        _from_gguf(GgufFile(whole.path, part, {}), 64)
    prefixed = {**whole.metadata, "tokenizer.ggml.add_space_prefix": True}
    with pytest.raises(WrongRequest, match="of the kind llama, and only gpt2's and Gemma's kinds are read"):
        _from_gguf(GgufFile(whole.path, prefixed, {}), 64)


@pytest.mark.slow
def test_the_real_270m_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoModel

    path = gemma_base(tmp_path)
    tokenizer = require_trainable_base(path, "fp32", 64).tokenizer
    (ids,) = tokenizer.encode(["I am so happy today! 😀👍🏽"])
    # what transformers' own reader of this file makes of it, in half a minute
    assert ids.tolist() == [2, 236777, 1006, 834, 5293, 3124, 236888, 163543, 240493, 242713]
    (spaced,) = tokenizer.encode(["a b  c   d\n\n\te"])
    assert spaced.tolist() == [2, 236746, 518, 138, 236755, 139, 236753, 108, 255968, 236744]
    tokens_1T = torch.from_numpy(ids).long()[None]
    ours, info = load_base(path, "fp32", 3, "cpu")
    assert info.parameters == 268_098_176
    theirs = AutoModel.from_pretrained(
        tmp_path, gguf_file=Path(path).name, dtype=torch.float32, trust_remote_code=False
    ).eval()
    torch.testing.assert_close(hidden(ours.model, tokens_1T), hidden(theirs, tokens_1T), rtol=0, atol=1e-5)


def test_names_of_text_tensors() -> None:
    own = "layers.0.pre_feedforward_layernorm.weight"
    assert text_name(f"language_model.model.{own}", "gemma3_text") == f"model.{own}"
    for other in ("multi_modal_projector.mm_soft_emb_norm.weight", "vision_tower.vision_model.head.probe"):
        assert text_name(other, "gemma3_text") is None
