"""The size of attention's heads, as queries and keys have it: cut along the directions that matter least to their products.

A head's logits are q . k, and stay what they are when q becomes P q and k becomes Q k with P^T Q = I. So the size has no channels
of its own to choose among: the best r directions are found. With A = E[q q^T]^1/2 and B = E[(k - m)(k - m)^T]^1/2, m the mean
over the tokens of one softmax, which does not see it, and A B = U S V^T,

    P = S^1/2 U^T A^-1,    Q = S^1/2 V^T B^-1,

the first r rows of both lose sum_{i>r} S_i^2 of E|q . (k - m)|^2, where q and k are independent, and no other r rows lose less
(Eckart and Young 1936). Tokens count in both by how far the network's outputs move with their query or key, as in `positions`:
of a last block whose class token alone is read, one query counts. Values are left as they are: nothing absorbs what they lose
so well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Node

from toolkit.graph import Program
from toolkit.graph.labels import Entries
from toolkit.graph.program import operand
from toolkit.graph.rules import argument, aten
from toolkit.graph.rules.core import operators
from toolkit.graph.rules.mixing import ATTENTION, PRODUCTS
from toolkit.graph.rules.reducing import SOFTMAXES
from toolkit.graph.rules.reshaping import COPIES, EXPANSIONS, PERMUTES, SPLITS, VIEWS
from toolkit.prune.consumers import Consumer, consumer, matrix
from toolkit.prune.engine import Engine, Values
from toolkit.prune.positions import IMAGES as POSITION_IMAGES
from toolkit.prune.positions import relative, squared_gradients
from toolkit.schema import ChannelGroup

IMAGES = 64  # that second moments are taken of
FLOOR = 1e-6  # of the largest eigenvalue of a moment: less is as good as nothing
MOVES = (*PERMUTES, *operators("select.int", "slice.Tensor", "unsqueeze", "squeeze.dim"))
SHIFTED = tuple(operators("add.Tensor", "sub.Tensor", "masked_fill.Scalar", "masked_fill.Tensor", "where.self"))
SCALED = tuple(operators("mul.Tensor", "div.Tensor", "mul.Scalar", "div.Scalar"))


@dataclass(frozen=True)
class Side:
    """Queries or keys of an attention.

    Attributes:
        operand: the node that its product reads.
        maker: the convolution or linear whose outputs they are.
        rows: [heads, size] rows of its weight.
        heads: head of every leading index of the operand, flattened, at the example's batch.
        turned: whether the size comes before the tokens, as in a matrix product's second operand.
    """

    operand: str
    maker: Consumer
    rows: Entries
    heads: Entries
    turned: bool

    def vectors(self, value: torch.Tensor) -> torch.Tensor:
        """The operand as [leading, tokens, size]."""
        return (value.mT if self.turned else value).flatten(0, -3)


@dataclass(frozen=True)
class Attention:
    """Where queries meet keys: the channel group of their size, and both sides; head i of one meets head i of the other.

    Of `relative` logits only differences within a row matter, as to a softmax.
    """

    group: str
    queries: Side
    keys: Side
    relative: bool


@dataclass(frozen=True)
class Directions:
    """P and Q [heads, size, size] of the module's docstring, in falling order of what they give to the logits."""

    queries: torch.Tensor
    keys: torch.Tensor


QUERIES, KEYS = operator.attrgetter("queries"), operator.attrgetter("keys")


# --- where they are -----------------------------------------------------------------------------------------------------


def attentions(program: Program) -> dict[str, Attention]:
    """By channel group, every size of queries and keys that can be cut; not those that something looks into on the way."""
    found = (attention(program, group) for group in program.prunable if group.kind == "head_dim")
    return {each.group: each for each in found if each}


def attention(program: Program, group: ChannelGroup) -> Attention | None:
    """The attention of which the group is the size; None where it is more than that."""
    units = program.units[group.name]
    if len(group.consumers) != 1:
        return None
    node = program.nodes[group.consumers[0]]
    if node.target not in (*ATTENTION, *PRODUCTS):
        return None
    first = 1 if node.target in operators("addmm", "baddbmm") else 0
    left = side(program, operand(node, first), units, turned=False)
    right = side(program, operand(node, first + 1), units, turned=node.target not in ATTENTION)
    if left is None or right is None or {left.maker.node, right.maker.node} != set(group.producers) or alike(left, right):
        return None
    keys = softened(program, node)
    pair = paired(program, *((right, left) if keys == 0 else (left, right)))
    return pair and Attention(group.name, *pair, relative=keys is not None)


def alike(left: Side, right: Side) -> bool:
    """Whether both sides have rows of parameters in common: what turns one then turns the other."""
    both = {left.maker.weight, left.maker.bias} & {right.maker.weight, right.maker.bias} - {""}
    return bool(both) and bool(np.isin(left.rows, right.rows).any())


def softened(program: Program, node: Node) -> int | None:
    """Over which operand's tokens the softmax behind a product goes, which are the keys'; None where there is none."""
    if node.target in ATTENTION:
        return 1
    shape = program.shapes[node.name]
    tokens = [torch.arange(shape[-2])[:, None].expand(shape), torch.arange(shape[-1]).expand(shape)]
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in SOFTMAXES:
            axis = argument(node, 1, "dim")
            varies = [bool((index != index.narrow(axis, 0, 1)).any()) for index in tokens]
            return varies.index(True) if sum(varies) == 1 else None
        if not (movable(node) or node.target in SHIFTED):
            return None
        tokens = [moved(program, node, index) for index in tokens]
        if tokens[0].shape != program.shapes.get(node.name):
            return None
    return None


def side(program: Program, node: Node, units: Entries, *, turned: bool) -> Side | None:
    """Queries or keys from the product's operand; None where they are not just outputs of one operator, moved and scaled."""
    traced = rows_of(program, node)
    entries = program.dims[node.name][-2 if turned else -1]
    if traced is None or traced[1].ndim < 3 or entries is None or not np.array_equal(entries, units):
        return None
    maker, index = consumer(program, traced[0]), (traced[1].mT if turned else traced[1]).flatten(0, -3)
    if maker is None or maker.groups > 1 or not bool((index == index[:, :1]).all()):
        return None
    rows, heads = np.unique(index[:, 0].numpy(), axis=0, return_inverse=True)
    return Side(node.name, maker, rows, heads.reshape(-1), turned)


def paired(program: Program, queries: Side, keys: Side) -> tuple[Side, Side] | None:
    """Both sides with their heads in one order; None where a head of one side meets several of the other."""
    shapes = [program.shapes[each.operand][:-2] for each in (queries, keys)]
    try:
        whole = np.broadcast_shapes(*shapes)
    except ValueError:  # keys for several queries' heads
        return None
    sides = [
        np.broadcast_to(each.heads.reshape(shape), whole).reshape(-1) for each, shape in zip((queries, keys), shapes, strict=True)
    ]
    pairs = np.unique(np.stack(sides, 1), axis=0)
    if not len(pairs) == len(queries.rows) == len(keys.rows) == len(np.unique(pairs[:, 1])):
        return None
    order = pairs[:, 1]  # of the keys' heads, in the queries' order
    return queries, Side(keys.operand, keys.maker, keys.rows[order], np.argsort(order)[keys.heads], keys.turned)


def rows_of(program: Program, node: Node) -> tuple[Node, torch.Tensor] | None:
    """(the operator that made a tensor's entries, which of its output channels each is); None where they are not only moved or
    scaled on the way.
    """
    shape = program.shapes.get(node.name, ())
    if node.target in (aten.linear.default, aten.conv2d.default):
        axis = 1 if node.target is aten.conv2d.default else len(shape) - 1
        return node, torch.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - 1 - axis)).expand(shape)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target is operator.getitem:
        if source.target not in SPLITS:
            return None
        found, axis = rows_of(program, operand(source, 0)), argument(source, 2, "dim", 0)
        sizes = [each[axis] for each in program.part_shapes[source.name]]
        return found and (found[0], torch.split(found[1], sizes, axis)[argument(node, 1)])
    if not movable(node):
        return None
    found = rows_of(program, source)
    return found and (found[0], moved(program, node, found[1]))


def movable(node: Node) -> bool:
    """Whether an operator does nothing but move its input's entries, or multiply all by one number."""
    if node.target in (*MOVES, *SCALED):
        return not any(isinstance(a, Node) for a in node.args[1:])
    return node.target in (*VIEWS, *EXPANSIONS, *COPIES)


def moved(program: Program, node: Node, index: torch.Tensor) -> torch.Tensor:
    """What stands for every entry of an operator's input, carried to its output; as it is where entries do not move."""
    if node.target in VIEWS:
        return index.reshape(program.shapes[node.name])
    if node.target in EXPANSIONS:
        return index.expand(program.shapes[node.name])
    return node.target(index, *node.args[1:]) if node.target in MOVES else index  # type: ignore[operator]


# --- what their directions are ------------------------------------------------------------------------------------------


def directions(engine: Engine, found: Iterable[Attention], images: torch.Tensor) -> dict[str, Directions]:
    """By channel group, from second moments over at most IMAGES images; without any, as if inputs were white noise."""
    found = list(found)
    sides = {side.operand: side for each in found for side in (each.queries, each.keys)}
    step = len(engine.program.example)  # heads are known by their place at this number of images
    pieces = [images[i : i + step] for i in range(0, min(len(images), IMAGES) - step + 1, step)] if found else []
    counts = token_importance(engine, sides, pieces[: POSITION_IMAGES // step])
    totals = {name: white(engine, side) for name, side in sides.items()} if not pieces else {}
    for piece in pieces:
        with torch.no_grad():
            kept = engine.run(piece, keep=sides)[1]
        for each in found:
            for side in (each.queries, each.keys):
                now = moment(
                    side, side.vectors(kept[side.operand]), counts[side.operand], centred=side is each.keys and each.relative
                )
                totals[side.operand] = totals[side.operand] + now if side.operand in totals else now
    return {each.group: balanced(totals[each.queries.operand], totals[each.keys.operand]) for each in found}


def token_importance(engine: Engine, sides: Mapping[str, Side], pieces: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """By operand, what an error in a token's query or key counts [heads, tokens]: as `positions` has it of outputs' positions."""
    found: dict[str, torch.Tensor] = {}
    for squares in squared_gradients(engine, pieces, sides):
        for name, square in squares.items():
            power = sides[name].vectors(square).sum(-1).double()
            heads = torch.zeros(len(sides[name].rows), power.shape[1], dtype=torch.float64)
            heads.index_add_(0, torch.from_numpy(sides[name].heads), power)
            found[name] = found[name] + heads if name in found else heads
    return {name: torch.stack([relative(head) for head in heads]) for name, heads in found.items()}


def moment(side: Side, vectors: torch.Tensor, counts: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """Sum of w x x^T [heads, size, size] in float64 over vectors [leading, tokens, size], tokens counted by w [heads, tokens];
    `centred`: x less the mean over its tokens.
    """
    weight = counts[torch.from_numpy(side.heads), :, None]
    x = vectors.double()
    x = x - (weight * x).sum(1, keepdim=True) / weight.sum(1, keepdim=True) if centred else x
    size = vectors.shape[-1]
    return torch.zeros(len(side.rows), size, size, dtype=torch.float64).index_add_(
        0, torch.from_numpy(side.heads), x.mT @ (weight * x)
    )


def white(engine: Engine, side: Side) -> torch.Tensor:
    """The moments that inputs without any correlation would give."""
    rows = matrix(engine.params[side.maker.weight])[side.rows]
    return rows @ rows.mT


def balanced(queries: torch.Tensor, keys: torch.Tensor) -> Directions:
    """P and Q of these second moments."""
    (a, a_inverse), (b, b_inverse) = roots(queries), roots(keys)
    u, s, vt = torch.linalg.svd(a @ b)
    half = s.sqrt()[..., None]
    return Directions(half * (u.mT @ a_inverse), half * (vt @ b_inverse))


def roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a second moment, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(FLOOR * values[..., -1:].clamp_min(1e-12)).sqrt()[..., None, :]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def turned(params: Mapping[str, torch.Tensor], side: Side, by: torch.Tensor) -> Values:
    """The operator's parameters with its outputs x [size] of every head become `by` [heads, size, size] x."""
    c = side.maker
    found: Values = {}
    for path in (c.weight, c.bias) if c.bias else (c.weight,):
        changed = params[path].clone(memory_format=torch.contiguous_format)
        flat = changed.view(len(changed), -1)
        flat[side.rows] = (by @ flat[side.rows].double()).to(flat.dtype)
        found[path] = changed
    return found


def narrowed(params: Mapping[str, torch.Tensor], each: Attention, along: Directions, width: int) -> Values:
    """Parameters that give the logits of `width` directions, at the full size: queries become Q_r^T P_r q."""
    return turned(params, each.queries, along.keys[:, :width].mT @ along.queries[:, :width])


def rotated(params: Mapping[str, torch.Tensor], each: Attention, along: Directions) -> Values:
    """Parameters with the same logits whose first outputs of a head are its best directions."""
    first = turned(params, each.queries, along.queries)
    return first | turned({**params, **first}, each.keys, along.keys)


def composed(
    dense: Program, alive: Mapping[str, Sequence[int]], before: Directions | None, now: Directions, group: str
) -> Directions:
    """Directions `now` of a network that has these channels of the dense one's, as directions of the dense network's heads; those
    of heads that are gone are zero. `before`: what its size consists of already, None where that is whole.
    """
    each = attentions(dense)[group]
    stays = ~dense.gone({name: kept for name, kept in alive.items() if name != group})
    found = []
    for side, of in ((each.queries, QUERIES), (each.keys, KEYS)):
        entries = dense.dims[operand(dense.nodes[side.maker.node], 1).name][0]
        assert entries is not None
        heads, basis = torch.from_numpy(stays[entries][side.rows].all(1)), of(now)
        whole = torch.zeros(len(heads), basis.shape[1], side.rows.shape[1], dtype=basis.dtype)
        whole[heads] = basis @ of(before)[heads] if before else basis
        found.append(whole)
    return Directions(*found)


def aimed(
    found: Iterable[Attention], node: str, y: torch.Tensor, alive: Mapping[str, Sequence[int]], known: Mapping[str, Directions]
) -> tuple[torch.Tensor, Entries]:
    """(outputs [n, O] of a dense operator with directions in the places of a size's channels that are alive; those outputs of
    which no directions are known).
    """
    lost: Entries = np.empty(0, np.int64)
    for each in found:
        for side, of in ((each.queries, QUERIES), (each.keys, KEYS)):
            if side.maker.node != node or each.group not in alive:
                continue
            places = side.rows[:, list(alive[each.group])]
            if each.group in known:
                turned = torch.einsum("nhd,hrd->nhr", y[:, side.rows], of(known[each.group]).to(y.dtype))
                y = y.index_copy(1, torch.from_numpy(places.reshape(-1)), turned.flatten(1))
            else:
                lost = np.union1d(lost, places)
    return y, lost
