"""Which rows of a pass have a dropout mask: those of runs that ask for one, in requests that compute gradients."""

from __future__ import annotations

from collections.abc import Sequence

from tinsmith.model.lora.masks import RowMask
from tinsmith.training.blocks import Piece
from tinsmith.training.lanes import Lane


def mask_of(lanes: Sequence[Lane]) -> RowMask | None:
    """Of all rows of data of one run, one after another; None without dropout, and in a forward pass."""
    return mask_of_pieces([Piece(lane, 0, lane.ref.num_tokens, 0) for lane in lanes])


def mask_of_pieces(pieces: Sequence[Piece]) -> RowMask | None:
    """The same of the pieces' rows alone."""
    slot, staging = pieces[0].lane.op.slot, pieces[0].lane.op.staging
    dropout = slot.spec.options.dropout
    if not dropout or staging is None:
        return None
    device = slot.rows["param"].device
    masks = []
    for piece in pieces:
        ref, seq = piece.lane.ref, piece.lane.op.item.seq_id
        whole = RowMask.of_datum(slot.spec.seed, seq, ref.datum, ref.num_tokens, dropout, device)
        masks.append(whole.at(slice(piece.start, piece.end)))
    return RowMask.joined(masks)
