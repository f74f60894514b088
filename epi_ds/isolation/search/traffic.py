"""What a refresh sends: a cost model of its collectives, and the transport that ``exchange: auto`` picks by it.

[Note: costs] Latency and bandwidth terms of the alpha-beta model: ``time = alpha * steps + bytes / bandwidth``. Bytes
sent per rank are those of bandwidth-optimal collectives; a ring takes W - 1 steps for them, recursive doubling or
halving log2 W (R. Thakur, R. Rabenseifner, W. Gropp, Optimization of Collective Communication Operations in MPICH,
2005). Which of them a backend uses is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from epi_ds.choices import Normalizer, Selection, StateFormat, Transport
from epi_ds.errors import UserError
from epi_ds.isolation.importance.stored import code_shift_of
from epi_ds.isolation.search.bracket import count_dtype
from epi_ds.isolation.search.threshold import search_widths

# Round figures of an Ethernet cluster between nodes. They decide `auto` and nothing else: the bits are the same.
STEP_SECONDS = 20e-6
BYTES_PER_SECOND = 1e9

# Matrices and norms of a decoder block, embeddings and head.
TYPICAL_KINDS = 12

# Fields of an `Answers`.
ANSWER_INTEGERS = 3


class Collective(StrEnum):
    """A collective operation over W ranks."""

    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"

    def sent_bytes(self, input_bytes: int, world_size: int) -> int:
        """Bytes every rank sends when each puts in ``input_bytes``."""
        others = world_size - 1
        if self is Collective.ALL_GATHER:
            return others * input_bytes
        return (2 if self is Collective.ALL_REDUCE else 1) * others * input_bytes // world_size

    def ring_steps(self, world_size: int) -> int:
        """Messages one after another on a ring."""
        return (2 if self is Collective.ALL_REDUCE else 1) * (world_size - 1)

    def tree_steps(self, world_size: int) -> int:
        """Messages one after another by recursive doubling or halving."""
        return (2 if self is Collective.ALL_REDUCE else 1) * (world_size - 1).bit_length()


class Message(NamedTuple):
    """Integers that every rank puts into one exchange of a refresh."""

    name: str
    rows: int
    width: int
    item_bytes: int
    host_bytes: int = 0
    """Memory that making them takes beside them."""
    has_answers: bool = False
    """Whether owners of rows may answer for all, instead of everyone getting all sums."""

    @property
    def numel(self) -> int:
        """Integers of the message."""
        return self.rows * self.width


class Cost(NamedTuple):
    """What one refresh costs every rank by one transport."""

    transport: Transport
    collectives: int
    sent_bytes: int
    transient_bytes: int
    """Largest memory at any time, the backend's own buffers left out."""
    ring_steps: int
    tree_steps: int

    @property
    def seconds(self) -> float:
        """Modelled time of the communication, by which `pick` chooses. See [Note: costs]."""
        return STEP_SECONDS * self.tree_steps + self.sent_bytes / BYTES_PER_SECOND


def rows_per_rank(num_rows: int, world_size: int) -> int:
    """Rows that every rank owns, after padding to a multiple of the world size."""
    return -(-num_rows // world_size)


def owned_rows(num_rows: int, *, rank: int, world_size: int) -> slice:
    """Return the rows that a rank answers for: neighbouring ones, none for ranks beyond the last row."""
    share = rows_per_rank(num_rows, world_size)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


def refresh_messages(
    layer_numel: Sequence[int],
    *,
    selection: Selection,
    normalizer: Normalizer,
    code_shift: int = 0,
    kind_numel: Sequence[int] = (0,) * TYPICAL_KINDS,
) -> tuple[Message, ...]:
    """Return the exchanges of one refresh, in order: the search for thresholds and the counts of its report.

    layer_numel  entries of every layer over all ranks
    code_shift   see `find_thresholds`
    kind_numel   entries of every kind of matrix, see `Layout.kind_names`
    """
    num_layers, layer_item = len(layer_numel), count_dtype(max(layer_numel)).itemsize
    group_item = count_dtype(max(*layer_numel, *kind_numel)).itemsize
    per_layer = selection is Selection.PER_LAYER
    messages = [Message("extremes", 2, num_layers, 8)]
    if selection is Selection.NORMALIZED_GLOBAL and normalizer is Normalizer.MEAN:
        messages.append(Message("sums", 2, num_layers, 8))
    for index, width in enumerate(search_widths(selection, code_shift=code_shift)):
        # Edges (int32) of all layers and a byte to choose by; the counts are the wire's own. A global round makes its
        # edges of taus, through temporaries of 64 bits, and counts by layer.
        host_bytes = num_layers * width * (5 if per_layer else 64)
        rows, item = (num_layers, layer_item) if per_layer else (1, count_dtype(sum(layer_numel)).itemsize)
        messages.append(Message(f"round {index + 1}", rows, width, item, host_bytes, has_answers=True))
    # Isolated now, and before and now, by layer and by kind of matrix; the comparison with the first mask.
    messages.append(Message("mask counts", 1, 2 * (num_layers + len(kind_numel)) + 2, group_item))
    return tuple(messages)


def cost_of(messages: Sequence[Message], *, transport: Transport, world_size: int) -> Cost:
    """Return what the messages of a refresh cost by a transport (not ``auto``)."""
    sent: list[tuple[Collective, int]] = []
    transient = 0
    for message in messages:
        wire = message.numel * message.item_bytes
        if transport is Transport.REDUCE_SCATTER and message.has_answers:
            share = rows_per_rank(message.rows, world_size)
            wire = share * world_size * message.width * message.item_bytes
            answer = share * ANSWER_INTEGERS * message.item_bytes
            sent += [(Collective.REDUCE_SCATTER, wire), (Collective.ALL_GATHER, answer)]
            # With padding a second copy, then the share of the sums, then everyone's answers.
            held = 2 * wire + wire // world_size + answer * world_size
        elif transport is Transport.ALL_GATHER:
            sent.append((Collective.ALL_GATHER, wire))
            held = (world_size + 2) * wire
        else:
            sent.append((Collective.ALL_REDUCE, wire))
            held = wire
        transient = max(transient, message.host_bytes + held)
    return Cost(
        transport,
        collectives=len(sent),
        sent_bytes=sum(kind.sent_bytes(size, world_size) for kind, size in sent),
        transient_bytes=transient,
        ring_steps=sum(kind.ring_steps(world_size) for kind, _ in sent),
        tree_steps=sum(kind.tree_steps(world_size) for kind, _ in sent),
    )


def compare(messages: Sequence[Message], *, selection: Selection, world_size: int) -> tuple[Cost, ...]:
    """Return the cost by every transport that the selection can use."""
    usable = [Transport.ALL_GATHER, Transport.ALL_REDUCE]
    if selection is Selection.PER_LAYER:
        usable.append(Transport.REDUCE_SCATTER)
    return tuple(cost_of(messages, transport=transport, world_size=world_size) for transport in usable)


def pick(costs: Sequence[Cost]) -> Cost:
    """Return the cost of the transport that ``auto`` picks: the quickest by the model, the first of equals."""
    return min(costs, key=lambda cost: cost.seconds)


def estimate(
    *,
    world_size: int,
    num_layers: int,
    parameters: int,
    selection: Selection,
    normalizer: Normalizer,
    state: StateFormat,
) -> dict[str, Any]:
    """Return what one refresh costs by every transport, as plain numbers for JSON: see `Cost`.

    ``parameters`` are dealt evenly to ``num_layers`` layers, and to a dozen kinds of matrices.

    Raises UserError for a normaliser that the selection ignores, or fewer parameters than layers.
    """
    if normalizer is not Normalizer.MINMAX and selection is not Selection.NORMALIZED_GLOBAL:
        raise UserError(
            f"normalizer belongs to selection: normalized_global, and would be ignored by {selection.value}; remove it"
        )
    if parameters < num_layers:
        raise UserError(f"{parameters} parameters cannot fill {num_layers} layers; give fewer layers")
    messages = refresh_messages(
        [-(-parameters // num_layers)] * num_layers,
        selection=selection,
        normalizer=normalizer,
        code_shift=code_shift_of(state),
        kind_numel=[-(-parameters // TYPICAL_KINDS)] * TYPICAL_KINDS,
    )
    costs = compare(messages, selection=selection, world_size=world_size)
    return {
        "world_size": world_size,
        "layers": num_layers,
        "parameters": parameters,
        "selection": selection.value,
        "normalizer": normalizer.value if selection is Selection.NORMALIZED_GLOBAL else None,
        "state": state.value,
        "messages": [{"name": m.name, "integers": m.numel, "integer_bytes": m.item_bytes} for m in messages],
        "transports": [
            {**cost._asdict(), "transport": cost.transport.value, "model_seconds": cost.seconds} for cost in costs
        ],
        "auto": pick(costs).transport.value,
    }
