"""What is different where the base is an encoder: attention in both directions, positions, pooling,
and the base's own dropout.

transformers' modules compute it. A post is pooled as its family is used, by the position of its
tokens and never by their ids: BERT's pooler and RoBERTa's head read the first token, ModernBERT's
head that token or the mean of all. These layers and the head compute in float32.

The dropout that config.json names is drawn as the adapter's is (dropout.py), so that an update does
not depend on packing; that on attention's probabilities is left out, which the kernels of attention
do not know. The price: on a CPU drawing it takes a tenth of a step.

Letters: T tokens of a pack, N posts, C classes, H hidden size.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from emotion_train.bases.encoders import ENCODERS
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import Counters, Current, PostDropout

# products of LoRA have numbers below that; those of the base's own dropout begin there
_FIRST_NUMBER = 1 << 20
_PLACES = {"query": 0, "key": 0, "value": 0, "Wqkv": 0}
_LATER = {"attention.output.dense": 1, "attn.Wo": 1, "intermediate.dense": 2, "mlp.Wi": 2}
# the linear layers of an encoder's block by the names that `lora.targets` has for a decoder's
_TARGETS = {
    "q_proj": (r"attention\.self\.query", r"attn\.Wqkv"),
    "k_proj": (r"attention\.self\.key", r"attn\.Wqkv"),
    "v_proj": (r"attention\.self\.value", r"attn\.Wqkv"),
    "o_proj": (r"attention\.output\.dense", r"attn\.Wo"),
    "gate_proj": (r"mlp\.Wi",),
    "up_proj": (r"\d+\.intermediate\.dense", r"mlp\.Wi"),
    "down_proj": (r"\d+\.output\.dense", r"mlp\.Wo"),
}


def is_encoder(config: Any) -> bool:
    """Whether transformers' configuration belongs to an encoder."""
    return config.model_type in ENCODERS


def blocks(classifier: Any) -> nn.ModuleList:
    """The encoder's blocks."""
    body = classifier.base_model
    found: nn.ModuleList = body.layers if classifier.config.model_type == "modernbert" else body.encoder.layer
    return found


def target_pattern(names: tuple[str, ...]) -> str:
    """The regular expression of the names of the layers that these targets mean, as PEFT takes
    one.
    """
    found = sorted({pattern for name in names for pattern in _TARGETS[name]})
    return rf".*\.({'|'.join(found)})"


def product_number(layer: str) -> int:
    """A number for each product of an encoder, as `dropout.product_number` has for a decoder.

    >>> product_number("base_model.model.bert.encoder.layer.2.output.dense")
    11
    """
    found = re.search(r"(?:^|\.)layers?\.(\d+)\.(.*)$", layer)
    assert found is not None, f"{layer} is no layer of an encoder's block"
    own = found[2]
    return 4 * int(found[1]) + _LATER.get(own, _PLACES.get(own.rpartition(".")[2], 3))


def positions_of(config: Any, position_ids: torch.Tensor) -> torch.Tensor:
    """Rows of the table of positions: RoBERTa's first token has the one after the padding's."""
    return position_ids + config.pad_token_id + 1 if "roberta" in config.model_type else position_ids


def drop_by_post(classifier: nn.Module, current: Current) -> None:
    """Replace the base's dropout by our own, without dropout on attention's probabilities."""
    found = [(name, one) for name, one in classifier.named_modules() if isinstance(one, nn.Dropout)]
    for number, (name, dropout) in enumerate(found):
        parent, _, child = name.rpartition(".")
        owner = classifier.get_submodule(parent)
        if not hasattr(owner, "query") and dropout.p > 0:  # BertSelfAttention's is on probabilities
            setattr(owner, child, PostDropout(dropout.p, _FIRST_NUMBER + number, current))
        else:
            dropout.p = 0.0


def logits_of_posts(
    classifier: Any,
    hidden_TH: torch.Tensor,
    segments: Segments,
    posts: int,
    counters: Counters | None,
    current: Current,
) -> torch.Tensor:
    """Logits of shape NC of the first `posts` segments, in float32 outside of any autocast.
    `counters` are those of the pack's tokens, `current` what the model's dropout reads.
    """
    # an empty segment, of a post that fills up a recording, begins after the last token
    first_N = segments.cu_lengths[:posts].long().clamp(max=len(hidden_TH) - 1)
    if classifier.config.model_type == "modernbert" and classifier.config.classifier_pooling == "mean":
        pooled_NH = _means(hidden_TH.float(), segments, posts)
    else:
        pooled_NH = hidden_TH.index_select(0, first_N).float()
    with (
        torch.autocast(hidden_TH.device.type, enabled=False),
        current.of(None if counters is None else counters.at(first_N)),
    ):
        logits_NC: torch.Tensor = _HEADS[classifier.config.model_type](classifier, pooled_NH)
    return logits_NC


def _means(hidden_TH: torch.Tensor, segments: Segments, posts: int) -> torch.Tensor:
    """Mean of each post's tokens, summed in the same order in any pack; 0 of an empty segment.

    `unsafe` leaves out checks of the lengths, for which the host would wait; those of `segments`
    cover all tokens.
    """
    means_SH: torch.Tensor = torch.segment_reduce(
        hidden_TH, "mean", lengths=segments.cu_lengths.diff().long(), initial=0.0, unsafe=True
    )
    return means_SH[:posts]


def _of_bert(classifier: Any, pooled_NH: torch.Tensor) -> Any:
    return classifier.classifier(classifier.dropout(classifier.bert.pooler(pooled_NH[:, None])))


def _of_roberta(classifier: Any, pooled_NH: torch.Tensor) -> Any:
    return classifier.classifier(pooled_NH[:, None])


def _of_modernbert(classifier: Any, pooled_NH: torch.Tensor) -> Any:
    return classifier.classifier(classifier.drop(classifier.head(pooled_NH)))


_HEADS = {
    "bert": _of_bert,
    "roberta": _of_roberta,
    "xlm-roberta": _of_roberta,
    "modernbert": _of_modernbert,
}


def packed(
    input_ids_NL: torch.Tensor, lengths_N: torch.Tensor, counters: Counters | None
) -> tuple[torch.Tensor, torch.Tensor, Segments, torch.Tensor, Counters | None]:
    """Right-padded rows as the pack of their tokens: what `EmotionClassifier.forward` takes."""
    device = input_ids_NL.device
    place_L = torch.arange(input_ids_NL.shape[1], device=device)
    real_NL = place_L < lengths_N.to(device)[:, None]
    ends_N = lengths_N.cpu().cumsum(0)
    return (
        input_ids_NL[real_NL][None],
        place_L.expand_as(real_NL)[real_NL][None],
        Segments.of([0, *ends_N.tolist()], device),
        ends_N.to(device) - 1,
        None if counters is None else Counters(counters.key, counters.places[real_NL]),
    )
