"""What a parameter is in a transformer, told by its name.

[Note: names] Names of modules are a convention and no rule: what stands here was read off the common families of
transformers (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, BLOOM, Falcon, BERT, T5, Mixtral and other
mixtures of experts). A name that fits none of them is `MatrixKind.OTHER`, never a guess.
"""

from __future__ import annotations

import re
from enum import StrEnum


class MatrixKind(StrEnum):
    """A role that parameters have in every block, or outside of them."""

    EMBEDDING = "embedding"
    QUERY = "q"
    KEY = "k"
    VALUE = "v"
    QKV = "q k v"
    """Several of the three in one matrix."""
    ATTENTION_OUTPUT = "o"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate up"
    """Both in one matrix."""
    DOWN = "down"
    ROUTER = "router"
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"


# The last part of a name that is neither a number nor one of these says what a parameter is.
_ENDINGS = {"weight", "bias", "base_layer", "modules_to_save", "default", "lora_A", "lora_B"}

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|^w[tp]e$|^shared$|^relative_attention_bias$", re.IGNORECASE)
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)

# Whatever module they are in.
_ANYWHERE = {
    MatrixKind.HEAD: "lm_head embed_out score classifier head",
    MatrixKind.QUERY: "q_proj query q_lin wq to_q query_proj q_a_proj q_b_proj",
    MatrixKind.KEY: "k_proj key k_lin wk to_k key_proj",
    MatrixKind.VALUE: "v_proj value v_lin wv to_v value_proj",
    MatrixKind.QKV: "query_key_value qkv_proj qkv c_attn Wqkv in_proj_weight in_proj_bias kv_a_proj_with_mqa kv_b_proj",
    MatrixKind.ATTENTION_OUTPUT: "o_proj out_lin",
    MatrixKind.GATE: "gate_proj w1 wi_0",
    MatrixKind.UP: "up_proj w3 wi wi_1 fc1 c_fc fc_in lin1 dense_h_to_4h",
    MatrixKind.GATE_UP: "gate_up_proj",
    MatrixKind.DOWN: "down_proj w2 fc2 fc_out lin2 dense_4h_to_h",
    MatrixKind.ROUTER: "gate router shared_expert_gate",
}
# What is the attention's own in a module of attention, and something else outside of one.
_IN_ATTENTION = {
    MatrixKind.QUERY: "q",
    MatrixKind.KEY: "k",
    MatrixKind.VALUE: "v",
    MatrixKind.ATTENTION_OUTPUT: "o wo c_proj dense out_proj",
}
_OUTSIDE = {MatrixKind.DOWN: "wo c_proj"}


def _by_leaf(table: dict[MatrixKind, str]) -> dict[str, MatrixKind]:
    return {leaf: kind for kind, leaves in table.items() for leaf in leaves.split()}


_KINDS, _KINDS_IN_ATTENTION, _KINDS_OUTSIDE = map(_by_leaf, (_ANYWHERE, _IN_ATTENTION, _OUTSIDE))


def matrix_kind(name: str) -> MatrixKind:
    """Return what a parameter of this name is. A bias is what its weight is, an adapter's what it adapts."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in _ENDINGS]
    if not parts:
        return MatrixKind.OTHER
    *modules, leaf = parts
    if _NORM.search(leaf):
        return MatrixKind.NORM
    if leaf in _KINDS:
        return _KINDS[leaf]
    if _EMBEDDING.search(leaf):
        return MatrixKind.EMBEDDING
    if any(_ATTENTION.search(module) for module in modules):
        return _KINDS_IN_ATTENTION.get(leaf, MatrixKind.OTHER)
    if leaf == "dense" and modules:
        # BERT's feed-forward layers are called by what they make.
        return {"intermediate": MatrixKind.UP, "output": MatrixKind.DOWN}.get(modules[-1], MatrixKind.OTHER)
    return _KINDS_OUTSIDE.get(leaf, MatrixKind.OTHER)
