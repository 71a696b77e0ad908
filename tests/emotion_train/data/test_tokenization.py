from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from emotion_train.bases.gguf_file import GgufFile
from emotion_train.data.lengths import Lengths
from emotion_train.data.tokenization import CountingTokenizer, PostTokenizer
from emotion_train.errors import WrongRequest
from tests.helpers.tiny_models import gguf_base, write_tokenizer

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
HUB_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSTS = (
    "Hello World",
    "it's DON'T we'll I'VE they'd'VE won’t",
    "  spaces   and\ttabs\n\n\nnew lines \r\n x  ",
    "😀👍🏽 ❤️‍🔥 family 👨‍👩‍👧‍👦",
    "日本語のテキスト 한국어 中文字符 العربية हिन्दी ไทย",
    "1234567 3.14 2024-01-01 ½ ²³ Ⅷ",
    "def f(x):\n    return x**2 // 3  # code\n",
    "ALLCAPS camelCase XMLHttpRequest iPhone McDonald",
    "</s><pad>[INST] hi [/INST]<s><unk>[IMG]<SPECIAL_20>",
    "",
    "naïve café coöperate ﬁ ÀÉ ǅ ʰ",
    "http://x.y/z?a=b&c=d //comment\n/path",
    " \u00a0\u200b\u3000x",
    "soooooo goooood!!!!! ...... ??!?",
    "a" * 400,
)


def random_posts(count: int) -> list[str]:
    draw = random.Random(0)
    letters = [(32, 127), (0x80, 0x2FFF), (0x3040, 0x9FFF), (0x1F300, 0x1F6FF), (32, 33), (9, 14)]
    return ["".join(chr(draw.randrange(*draw.choice(letters))) for _ in range(60)) for _ in range(count)]


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> PostTokenizer:
    folder = tmp_path_factory.mktemp("tekken")
    shutil.copy(TEKKEN, folder / "tekken.json")
    return PostTokenizer.load(str(folder), 8192)


@pytest.fixture(scope="module")
def saved(tekken: PostTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tekken.save(folder)
    return folder


@pytest.fixture(scope="module")
def short(saved: Path) -> PostTokenizer:
    """The saved one, that keeps eight tokens of a post."""
    return PostTokenizer.load(str(saved), 8)


def lists(tokenizer: PostTokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode(texts)]


# --- Tekken, the tokenizer of Mistral Small 3.1 ---


def test_tekken_ids_are_those_of_mistral_common(tekken: PostTokenizer) -> None:
    texts = [*POSTS, *random_posts(200)]
    reference = Tekkenizer.from_file(str(TEKKEN))
    assert lists(tekken, texts) == [reference.encode(text, bos=True, eos=False) for text in texts]
    assert (tekken.bos_id, tekken.pad_id, tekken.vocab_size) == (1, 11, 131_072)


def test_the_hub_files_wrong_pattern_is_replaced(tekken: PostTokenizer, saved: Path, tmp_path: Path) -> None:
    content = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": HUB_PATTERN}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    from tokenizers import Tokenizer

    texts = [*POSTS]
    wrong = [one.ids for one in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(texts)]
    assert wrong != lists(tekken, texts)
    assert lists(PostTokenizer.load(str(tmp_path), 8192), texts) == lists(tekken, texts)


def test_auto_tokenizer_gives_the_same_ids_from_the_saved_folder(tekken: PostTokenizer, saved: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
    texts = [*POSTS, *random_posts(50)]
    assert plain(texts).input_ids == lists(tekken, texts)
    assert (plain.bos_token_id, plain.pad_token, plain.pad_token_id, plain.padding_side) == (
        1,
        "<pad>",
        11,
        "right",
    )
    padded = plain(["a", "</s> and <pad>"], padding=True)
    assert padded.input_ids[0][2:] == [11] * (len(padded.input_ids[1]) - 2)
    assert 11 not in padded.input_ids[1]


def test_saving_and_loading_keeps_the_identity(
    tekken: PostTokenizer, short: PostTokenizer, tmp_path: Path
) -> None:
    assert short.sha256() == tekken.sha256()
    assert lists(short, ["hello there"]) == lists(tekken, ["hello there"])
    write_tokenizer(tmp_path)
    assert PostTokenizer.load(str(tmp_path), 64).sha256() != tekken.sha256()


def test_identity_notices_other_word_splitting(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    before = PostTokenizer.load(str(tmp_path), 16)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert PostTokenizer.load(str(tmp_path), 16).sha256() != before.sha256()


# --- any tokenizer ---


def test_posts_are_cut_at_max_length_counting_the_bos_token(
    short: PostTokenizer, tekken: PostTokenizer
) -> None:
    ids = short.encode(["one two three four five six seven eight nine ten", "hi"])
    assert [len(one) for one in ids] == [8, 2]
    assert all(one.dtype == np.int32 for one in ids)
    assert ids[0].tolist() == lists(tekken, ["one two three four five six seven eight nine ten"])[0][:8]


def test_what_is_kept_of_a_post_is_its_beginning_and_the_count_is_of_all_of_it(
    short: PostTokenizer, tekken: PostTokenizer
) -> None:
    texts = [*POSTS, *random_posts(50)]
    whole = lists(tekken, texts)
    for max_length in (4, 8, 31):
        tokenizer = copy.copy(short)  # to load it takes a second
        tokenizer.max_length = max_length
        counting = CountingTokenizer(tokenizer)
        halves = counting.encode(texts[:20]) + counting.encode(texts[20:])
        assert [ids.tolist() for ids in halves] == [ids[:max_length] for ids in whole]
        expected = Lengths.of(len(ids) for ids in whole)
        assert counting.lengths.lengths_U.tolist() == expected.lengths_U.tolist()
        assert counting.lengths.counts_U.tolist() == expected.counts_U.tolist()


def test_no_post_is_ever_empty(tmp_path: Path, tekken: PostTokenizer) -> None:
    assert lists(tekken, [""]) == [[1]]
    write_tokenizer(tmp_path, bos=False)
    without_bos = PostTokenizer.load(str(tmp_path), 16)
    assert without_bos.bos_id is None
    assert lists(without_bos, ["", "a"]) == [[without_bos.pad_id], [without_bos.encode(["a"])[0][0]]]
    assert without_bos.encode([]) == []


def test_half_an_emoji_does_not_stop_the_rest(tekken: PostTokenizer) -> None:
    assert lists(tekken, ["so \ud83d\ude00", "so \ud83d", "fine"]) == lists(
        tekken, ["so 😀", "so \ufffd", "fine"]
    )


def test_a_tokenizer_without_bos_stays_so_in_auto_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "base", bos=False)
    tokenizer = PostTokenizer.load(str(tmp_path / "base"), 16)
    tokenizer.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)(
        ["ab </s>"]
    ).input_ids == lists(tokenizer, ["ab </s>"])


def test_a_longest_text_that_nobody_named_is_no_reason_to_refuse_a_tokenizer(tmp_path: Path) -> None:
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = json.loads(path.read_text()) | {"model_max_length": VERY_LARGE_INTEGER}
    path.write_text(json.dumps(named))
    assert "000000019884624838656" in path.read_text()
    assert PostTokenizer.load(str(tmp_path), 16).bos_id == 1


def test_quoting_a_control_token_yields_no_control_token(tekken: PostTokenizer) -> None:
    for text in ("</s>", "<pad>", "[INST]", "<s>", "[IMG]", "<unk>", "<SPECIAL_999>"):
        (ids,) = lists(tekken, [text])
        assert ids[0] == 1
        assert min(ids[1:]) >= 1000


def test_a_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match=r"neither tokenizer\.json nor tekken\.json"):
        PostTokenizer.load(str(tmp_path), 16)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(WrongRequest, match="is no tekken tokenizer"):
        PostTokenizer.load(str(tmp_path), 16)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WrongRequest, match="cannot be read as a tokenizer"):
        PostTokenizer.load(str(tmp_path), 16)


def test_tokenizing_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, emotion_train.data.tokenization; sys.exit(bool({'torch', 'transformers'} &"
        " set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- GGUF ---


def test_gguf_tokenizer_is_read_as_its_file_says() -> None:
    tokenizer = PostTokenizer.load(gguf_base(), 128)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, 49_152)
    words = GgufFile.open(gguf_base()).metadata["tokenizer.ggml.tokens"]
    (ids,) = lists(tokenizer, ["I can't wait for 2025"])
    assert [words[i] for i in ids] == [
        "<|im_start|>",
        "I",
        "Ġcan",
        "'t",
        "Ġwait",
        "Ġfor",
        "Ġ",
        "2",
        "0",
        "2",
        "5",
    ]
    assert not set(lists(tokenizer, ["<|im_end|><|endoftext|>"])[0][1:]) & set(range(17))


def test_gguf_tokenizer_saved_gives_the_same_ids_in_auto_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = PostTokenizer.load(gguf_base(), 8192)
    tokenizer.save(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert plain([*POSTS]).input_ids == lists(tokenizer, [*POSTS])
    assert (plain.pad_token, plain.pad_token_id, plain.padding_side) == ("<|endoftext|>", 0, "right")
    assert PostTokenizer.load(str(tmp_path), 8192).sha256() == tokenizer.sha256()


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"other" * 20):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(WrongRequest, match="is not a whole GGUF file"):
            PostTokenizer.load(str(tmp_path / "x.gguf"), 16)
    with open(gguf_base(), "rb") as file:
        (tmp_path / "x.gguf").write_bytes(file.read(2_000_000))
    with pytest.raises(WrongRequest, match="is not a whole GGUF file"):
        PostTokenizer.load(str(tmp_path / "x.gguf"), 16)


# --- encoders ---

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mess", "##y", "love", "##ly", "[", "]", "sep")


def write_wordpiece(folder: Path, **config: object) -> str:
    """A small BERT tokenizer; the tokenizer_config.json of the first ones was as short."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens([AddedToken(piece, special=True) for piece in PIECES[:5]])
    made.enable_truncation(3)  # as some checkpoints have it
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(folder)


@pytest.mark.parametrize("config", [{}, {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}}])
def test_an_encoder_s_posts_have_both_ends_and_keep_them_when_cut(
    tmp_path: Path, config: dict[str, object]
) -> None:
    tokenizer = PostTokenizer.load(write_wordpiece(tmp_path, **config), 5)
    texts = ["A lovely mess", "messy lovely messy", "", "[SEP] a"]
    whole = [[2, 5, 8, 9, 6, 3], [2, 6, 7, 8, 9, 6, 7, 3], [2, 3], [2, 10, 12, 11, 5, 3]]
    assert [ids.tolist() for ids in tokenizer.encode_whole(texts)] == whole
    cut = [ids if len(ids) <= 5 else [*ids[:4], 3] for ids in whole]
    assert lists(tokenizer, texts) == cut
    assert (tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id) == (2, 3, 0)
    counting = CountingTokenizer(tokenizer)
    assert [ids.tolist() for ids in counting.encode(texts)] == cut
    assert (counting.lengths.total, counting.lengths.longer_than(5)) == (6 + 8 + 2 + 6, 3)


def test_an_encoder_s_tokenizer_is_saved_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = PostTokenizer.load(write_wordpiece(tmp_path), 5)
    tokenizer.save(tmp_path / "saved")
    again = PostTokenizer.load(str(tmp_path / "saved"), 5)
    assert (again.end_id, again.sha256()) == (3, tokenizer.sha256())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    texts = ["A lovely mess", "messy lovely messy", "", "[SEP] a"]
    assert theirs(texts, truncation=True, max_length=5)["input_ids"] == lists(again, texts)


def test_a_tokenizer_without_the_ends_of_an_encoder_is_refused(tmp_path: Path) -> None:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modernbert"}))
    with pytest.raises(WrongRequest, match="names no first, last and padding token of a text") as caught:
        PostTokenizer.load(str(tmp_path), 8)
    assert "\n" not in str(caught.value)
