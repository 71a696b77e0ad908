"""Posts to token ids, by one pinned tokenizer: the adapter folder holds it, and a plain
`AutoTokenizer` gives the same ids from there.

A post is BOS (where the tokenizer names one) and its text, cut at `max_length`. For an encoder it
is `[CLS]`, its text and `[SEP]`, or its tokenizer's names for these, and cutting keeps both. Text
that spells a control token, such as `</s>` or `[INST]`, is encoded letter by letter like any other
text.

Mistral's tokenizer.json on the hub splits words by a wrong pattern
(https://huggingface.co/mistralai/Mistral-Small-3.1-24B-Instruct-2503/discussions/84); the pattern
of its tekken.json replaces it.

Only the `tokenizers` library is loaded, not transformers: a GGUF vocabulary takes 0.6 s instead of
11.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The loader has threads of its own; the library's would clash between the ranks of a node.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from emotion_train.bases.encoders import ENCODERS
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.gguf_file import GgufFile
from emotion_train.data.lengths import Lengths
from emotion_train.edges.bounded import object_file, phrase, require_no_lfs_pointer
from emotion_train.errors import WrongRequest

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Control tokens for tekken.json files that list none (version v3); <SPECIAL_i> up to 999 follow.
_TEKKEN_SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
# first and last token of an encoder's text, where its tokenizer_config.json names none
_ENDS_OF_ENCODERS = (("[CLS]", "[SEP]"), ("<s>", "</s>"))
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_NORMAL, _CONTROL, _OF_AUTHOR = 1, 3, 4  # GGUF's token types
_SPACE = "▁"  # SentencePiece's letter for a space
# control tokens that llama.cpp stores as an author's pieces, like line ends and <table>
_CONTROLS_OF_GEMMA = ("[multimodal]", "<start_of_image>", "<end_of_image>")
_MAX_TEKKEN_BYTES = 256 << 20
_PROBES = (
    "a b  c\n\td",
    "It's DON'T won’t",
    "12345 3.14",
    "😀👍🏽 naïve café",
    "日本語 한국어 العربية",
    "</s><pad>[INST]<|im_start|>",
    "def f(x): return x**2 // 3",
)


class PostTokenizer:
    """Turns texts into ids. Make it with `load`; `save` writes a folder from which `AutoTokenizer`
    gives the same ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        bos_id: int | None,
        pad_id: int,
        end_id: int | None = None,
    ):
        self.max_length = max_length
        self.bos_id = bos_id
        self.pad_id = pad_id
        self.end_id = end_id  # the last token of each post; only encoders have one
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ends = [tokenizer.id_to_token(one) if one is not None else None for one in (bos_id, end_id)]
        bos, end = ends
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(
                [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{end}:0"] if end is not None else [])]
            ),
            special_tokens=[
                (name, id_) for name, id_ in zip(ends, (bos_id, end_id), strict=True) if name is not None
            ],
        )
        self._tokenizer.encode_special_tokens = True  # "</s>" in a post is text

    @classmethod
    def load(cls, base: str | BaseFiles, max_length: int) -> PostTokenizer:
        """The tokenizer of a base: a folder or hub id with tokenizer.json or tekken.json, or a
        .gguf file (or a tokenizer.json beside it).

        Raises `WrongRequest` where there is none, or only one of another kind.
        """
        files = BaseFiles.find(base) if isinstance(base, str) else base
        if (path := files.file("tokenizer.json")) is not None:
            return _from_tokenizer_json(
                path, files.file("tokenizer_config.json"), max_length, _kind_in(files)
            )
        if files.gguf is not None:
            return _from_gguf(GgufFile.open(files.gguf), max_length)
        if (path := files.file("tekken.json")) is not None:
            return _from_tekken(path, max_length)
        raise WrongRequest(
            f"The base {files.name} has neither tokenizer.json nor tekken.json; copy its tokenizer into the"
            " folder."
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The names of the special tokens. A post that spells one has it as letters."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def beyond(self, rows: int) -> tuple[str, int] | None:
        """The token with the largest id, and that id, if a post or padding can give an id outside
        an embedding of `rows` rows; None where all ids are inside.

        No post gives special tokens, except those at its ends and padding.
        """
        size = self.vocab_size
        if size <= rows and all(map(self._tokenizer.id_to_token, range(size))):
            return None  # as many ids as tokens: there is no other, which is soon known
        added = self._tokenizer.get_added_tokens_decoder()
        never = {id_ for id_, token in added.items() if token.special}
        never -= {self.bos_id, self.end_id, self.pad_id}
        given = {id_: token for token, id_ in self._tokenizer.get_vocab(True).items() if id_ not in never}
        largest = max(given, default=0)
        return (given[largest], largest) if largest >= rows else None

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """One array of 1 to `max_length` ids per text; an empty text without BOS becomes one
        padding token.
        """
        return [self.cut(ids) for ids in self.encode_whole(texts)]

    def cut(self, ids_L: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """At most `max_length` of these ids, which keep the last token that closes each post."""
        if self.end_id is None or len(ids_L) <= self.max_length:
            return ids_L[: self.max_length]
        return np.append(ids_L[: self.max_length - 1], np.int32(self.end_id))

    def encode_whole(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids as by `encode`, uncut, in the same time: the library cuts only at the end."""
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        # half an emoji, as JSON's "\ud83d" gives, joins its other half, else becomes U+FFFD
        except TypeError:
            whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
            encoded = self._tokenizer.encode_batch_fast(whole, add_special_tokens=True)
        return [np.asarray(post.ids or [self.pad_id], dtype=np.int32) for post in encoded]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(), encoding="utf-8")
        name = self._tokenizer.id_to_token
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name(self.bos_id) if self.bos_id is not None else None,
            "pad_token": name(self.pad_id),
            **self._named_ends(),
            "padding_side": "right",
            "truncation_side": "right",
            "model_max_length": self.max_length,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def _named_ends(self) -> dict[str, str | None]:
        """The entries of tokenizer_config.json by which `load` knows an encoder's tokenizer."""
        if self.end_id is None or self.bos_id is None:
            return {}
        first, last = (self._tokenizer.id_to_token(one) for one in (self.bos_id, self.end_id))
        return {"cls_token": first, "sep_token": last, "eos_token": last}

    def sha256(self) -> str:
        """The identity of the mapping from text to ids: a hash of vocabulary, BOS, padding and the
        ids of probe texts, without `max_length`.

        It is no hash of the file, whose bytes change with the version of the `tokenizers` library.
        """
        vocabulary = sorted(
            self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]
        )
        probes = [text.ids for text in self._tokenizer.encode_batch(list(_PROBES))]
        content = json.dumps([vocabulary, self.bos_id, self.pad_id, probes], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()


class CountingTokenizer:
    """A `PostTokenizer` that counts the lengths of its posts before they are cut. Several threads
    may use it at once.
    """

    def __init__(self, tokenizer: PostTokenizer) -> None:
        self.max_length = tokenizer.max_length
        self.pad_id = tokenizer.pad_id
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids as by `PostTokenizer.encode`, after noting the uncut lengths."""
        whole = self._tokenizer.encode_whole(texts)
        with self._lock:
            self._counts.update(len(ids) for ids in whole)
        return [self._tokenizer.cut(ids) for ids in whole]

    @property
    def lengths(self) -> Lengths:
        """The uncut lengths of all posts so far, in tokens."""
        with self._lock:
            return Lengths.of_counts(self._counts)


def _kind_in(files: BaseFiles) -> str | None:
    """The kind of the tokenizer's base; None for a tokenizer in an adapter's folder."""
    if files.gguf is not None or files.file("config.json") is None:
        return None
    return str(files.config().get("model_type"))


def _from_tokenizer_json(
    path: Path, config_path: Path | None, max_length: int, kind: str | None
) -> PostTokenizer:
    try:
        with path.open("rb") as file:
            require_no_lfs_pointer(file.read(64))
        tokenizer = Tokenizer.from_file(str(path))
        config: dict[str, Any] = object_file(config_path) if config_path else {}
    except Exception as error:  # the tokenizers library raises bare Exception
        raise WrongRequest(
            f"{path}, or {config_path and config_path.name} beside it, cannot be read as a tokenizer"
            f" ({phrase(error)}); download it again."
        ) from None
    saved_for_encoder = kind is None and bool(config.get("cls_token")) and bool(config.get("sep_token"))
    if kind in ENCODERS or saved_for_encoder:
        return _of_encoder(path, tokenizer, config, max_length)
    if _is_tekken(tokenizer):
        _use_pattern(tokenizer, TEKKEN_PATTERN)
        return PostTokenizer(tokenizer, max_length, bos_id=1, pad_id=11)
    bos_id = _id_of(tokenizer, config.get("bos_token"))
    if bos_id is None and config.get("bos_token") is not None:
        raise WrongRequest(
            f"{config_path} names the bos_token {_name_of(config['bos_token'])} and {path.name} beside it has"
            " no such token; download both again, or make bos_token null where the base was trained without"
            " one."
        )
    return PostTokenizer(
        tokenizer,
        max_length,
        bos_id=bos_id,
        pad_id=_pad_id(tokenizer, bos_id, _id_of(tokenizer, config.get("pad_token"))),
    )


def _of_encoder(path: Path, tokenizer: Tokenizer, config: dict[str, Any], max_length: int) -> PostTokenizer:
    """The tokenizer of an encoder. Raises `WrongRequest` where nothing names the tokens at a text's
    ends, or padding.
    """
    named = [_id_of(tokenizer, config.get(name)) for name in ("cls_token", "sep_token")]
    known = [[tokenizer.token_to_id(name) for name in pair] for pair in _ENDS_OF_ENCODERS]
    ends = next((pair for pair in (named, *known) if None not in pair), None)
    pad_id = _pad_id(tokenizer, None, _id_of(tokenizer, config.get("pad_token")))
    if ends is None or pad_id in ends:
        raise WrongRequest(
            f"{path} names no first, last and padding token of a text, such as [CLS], [SEP] and [PAD]; give"
            " the tokenizer that the base was trained with."
        )
    return PostTokenizer(tokenizer, max_length, bos_id=ends[0], pad_id=pad_id, end_id=ends[1])


def _is_tekken(tokenizer: Tokenizer) -> bool:
    known = all(
        tokenizer.token_to_id(token) == _TEKKEN_SPECIALS.index(token)
        for token in ("<s>", "</s>", "[INST]", "<pad>")
    )
    return known and tokenizer.get_vocab_size() > 100_000


def _name_of(token: Any) -> str:
    """The name of a token in tokenizer_config.json, for a message."""
    return repr(token.get("content") if isinstance(token, dict) else token)[:80]


def _id_of(tokenizer: Tokenizer, token: Any) -> int | None:
    name = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(name) if isinstance(name, str) else None


def _pad_id(tokenizer: Tokenizer, bos_id: int | None, configured: int | None) -> int:
    """An id that no text gives: a token made for padding, else the tokenizer's configured one, else
    BOS or 0.
    """
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for name in _PAD_NAMES:
        pad_id = tokenizer.token_to_id(name)
        if name in special and pad_id is not None and pad_id != bos_id:
            return pad_id
    return configured if configured is not None else (bos_id or 0)


def _use_pattern(tokenizer: Tokenizer, pattern: str) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], specials: Iterable[str], *, whole_words: bool
) -> Tokenizer:
    """A byte-level BPE tokenizer. With `whole_words`, a word in the vocabulary is not divided first
    (tiktoken's rule).
    """
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


# --- tekken.json, Mistral's own format ---


def _from_tekken(path: Path, max_length: int) -> PostTokenizer:
    try:
        content = object_file(path, _MAX_TEKKEN_BYTES)
        config = content["config"]
        special_count = config["default_num_special_tokens"]
        listed = content.get("special_tokens")
        names = (
            [entry["token_str"] for entry in sorted(listed, key=lambda entry: entry["rank"])]
            if listed
            else list(_TEKKEN_SPECIALS)
        )
        names += [f"<SPECIAL_{rank}>" for rank in range(len(names), special_count)]
        words = [
            base64.b64decode(entry["token_bytes"])
            for entry in content["vocab"][: config["default_vocab_size"] - special_count]
        ]
        pattern = config["pattern"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WrongRequest(f"{path} is no tekken tokenizer ({error}); download it again.") from None
    letter = _byte_letters()
    spelled = [word.decode("latin-1").translate(letter) for word in words]
    vocabulary = {name: rank for rank, name in enumerate(names)} | {
        word: rank + special_count for rank, word in enumerate(spelled)
    }
    tokenizer = _byte_level(vocabulary, _merges(spelled), names, whole_words=True)
    _use_pattern(tokenizer, pattern)
    return PostTokenizer(tokenizer, max_length, bos_id=names.index("<s>"), pad_id=names.index("<pad>"))


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding by rank as a list of merges: every split of a word into two words, in the
    order of the joined words.
    """
    rank = {word: position for position, word in enumerate(words)}
    merges: list[tuple[str, str]] = []
    for word in words:
        splits: list[tuple[int, int]] = []
        for cut in range(1, len(word)):
            left = rank.get(word[:cut])
            if left is not None and (right := rank.get(word[cut:])) is not None:
                splits.append((left, right))
        merges += [(words[left], words[right]) for left, right in sorted(splits)]
    return merges


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: itself where printable, else the next free letter
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + place) for place, byte in enumerate(hidden)
    }


# --- GGUF ---


def _from_gguf(gguf: GgufFile, max_length: int) -> PostTokenizer:
    field = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in gguf.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if field.get("model") == "llama" and field.get("add_space_prefix") is False:
        return _from_pieces(gguf, field, max_length)
    kind, style = field.get("model"), field.get("pre", "default")
    beside = "put the model's tokenizer.json beside the file"
    if kind != "gpt2" or "merges" not in field or "tokens" not in field:
        raise WrongRequest(
            f"The base {gguf.path} has a tokenizer of the kind {kind}, and only gpt2's and Gemma's kinds are"
            f" read from GGUF; {beside}."
        )
    tokens: list[str] = field["tokens"]
    types = field.get("token_type", [1] * len(tokens))
    tokenizer = _byte_level(
        {token: rank for rank, token in enumerate(tokens)},
        [(left, right) for left, _, right in (merge.partition(" ") for merge in field["merges"])],
        [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
        whole_words=style in ("tekken", "llama-bpe"),
    )
    if style == "tekken":
        _use_pattern(tokenizer, TEKKEN_PATTERN)
    elif style == "llama-bpe":
        _use_pattern(tokenizer, _LLAMA3_PATTERN)
    elif style in ("gpt-2", "default"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif style == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        raise WrongRequest(
            f"The base {gguf.path} splits words by the pattern {style}, which is not known here; {beside}."
        )
    return _with_ends(gguf, tokenizer, field, max_length)


def _with_ends(gguf: GgufFile, tokenizer: Tokenizer, field: dict[str, Any], max_length: int) -> PostTokenizer:
    bos_id, tokens = field.get("bos_token_id"), len(field["tokens"])
    if bos_id is not None and not (isinstance(bos_id, int) and 0 <= bos_id < tokens):
        raise WrongRequest(
            f"The base {gguf.path} has the bos_token_id {bos_id} and {tokens} tokens; download it again."
        )
    return PostTokenizer(
        tokenizer, max_length, bos_id=bos_id, pad_id=_pad_id(tokenizer, bos_id, field.get("padding_token_id"))
    )


def _from_pieces(gguf: GgufFile, field: dict[str, Any], max_length: int) -> PostTokenizer:
    """SentencePiece's byte-pair encoding as in Gemma: spaces are letters, merges follow the order
    of the pieces, and text that no piece spells becomes bytes.
    """
    tokens: list[str] = field.get("tokens", [])
    scores, types = field.get("scores", []), field.get("token_type", [])
    if not len(tokens) == len(scores) == len(types) or "<unk>" not in tokens:
        raise WrongRequest(f"The base {gguf.path} has no whole vocabulary of pieces; download it again.")
    normal = [place for place, type_ in enumerate(types) if type_ == _NORMAL]
    words = [tokens[place] for place in sorted(normal, key=lambda place: -scores[place])]
    tokenizer = Tokenizer(
        models.BPE(
            {token: rank for rank, token in enumerate(tokens)},
            _merges(words),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    named = [
        (token, type_ == _CONTROL or token in _CONTROLS_OF_GEMMA)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _OF_AUTHOR)
    ]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name, special in named if not special])
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name, special in named if special]
    )
    return _with_ends(gguf, tokenizer, field, max_length)
