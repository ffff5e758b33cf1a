"""The size of heads: where queries meet keys, the directions that matter least to their products, and cuts along them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import patterns
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from patterns import attention as attentive
from test_graph import traced
from torch import nn

from toolkit.errors import ProofError
from toolkit.graph import apply, example_input, prove, trace
from toolkit.graph.program import operand
from toolkit.prune import attention, pruner
from toolkit.prune.attention import Attention, Directions, aimed, attentions, balanced, directions, narrowed, rotated
from toolkit.prune.engine import Engine, distortion
from toolkit.prune.positions import relative
from toolkit.prune.pruner import State, cut, held_groups, score
from toolkit.prune.repair import outputs, surviving, with_parameters
from toolkit.run.loop import options

PLAIN = [
    attentive.FusedAttention, attentive.ChunkedAttention, attentive.SeparateAttention, attentive.MultiheadFirst,
    attentive.MultiheadSecond, attentive.RelativePositions, attentive.ShiftedWindows, attentive.ReducedKeys,
]  # fmt: skip
OTHERS = [  # queries or keys are normed, turned by position, shared among heads, or never meet
    attentive.LinearAttention, attentive.GroupedQueries, attentive.CosineAttention, attentive.Rotary, attentive.NormedQueries,
    attentive.ChannelAttention,
]  # fmt: skip


class Deranged(nn.Module):
    """The keys' heads meet the queries' in another order: query head 3 i + j meets key head 2 j + i."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 6, 4).transpose(1, 2)
        k = self.k(x).view(n, t, 3, 2, 4).permute(0, 3, 2, 1, 4).reshape(n, 6, t, 4)
        v = self.v(x).view(n, t, 6, 4).transpose(1, 2)
        return self.head(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 24).mean(1))


def images(program, count: int) -> torch.Tensor:
    return torch.randn(count, *program.example.shape[1:], generator=torch.Generator().manual_seed(5))


def in_double(program) -> Engine:
    engine = Engine.of(program)
    return engine.with_params({p: v.double() if v.is_floating_point() else v for p, v in engine.params.items()})


def only(program) -> Attention:
    (found,) = attentions(program).values()
    return found


def along(engine: Engine, each: Attention, x: torch.Tensor) -> Directions:
    return directions(engine, [each], x)[each.group]


@pytest.mark.parametrize("pattern", [*PLAIN, Deranged])
def test_turned_queries_and_keys_give_the_same_network(pattern) -> None:
    program = trace(Deranged(), torch.randn(1, 7, 8)) if pattern is Deranged else traced(pattern)
    engine, x = in_double(program), images(program, 6).double()
    each = only(program)
    other = engine.with_params(rotated(engine.params, each, along(engine, each, x)))
    assert not all(torch.equal(other.params[p], v) for p, v in engine.params.items())
    assert torch.allclose(outputs(other, x), outputs(engine, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", [*PLAIN, Deranged])
def test_the_first_directions_sliced_are_the_network_narrowed(pattern) -> None:
    program = trace(Deranged(), torch.randn(1, 7, 8)) if pattern is Deranged else traced(pattern)
    engine, x = in_double(program), images(program, 6).double()
    each = only(program)
    assert each.relative
    found = along(engine, each, x)
    whole = with_parameters(program, rotated(engine.params, each, found))
    for width in range(1, program.group(each.group).width):
        kept = {each.group: range(width)}
        sliced = apply(whole, kept)
        assert prove(whole, sliced, kept) <= 1e-9
        masked = outputs(engine.with_params(narrowed(engine.params, each, found, width)), x)
        assert distortion(outputs(Engine.of(sliced), x.float()).double(), masked) < 1e-8
        assert distortion(masked, outputs(engine, x)) > 1e-12


@pytest.mark.parametrize("pattern", OTHERS)
def test_a_size_that_something_looks_into_is_held(pattern) -> None:
    program = traced(pattern)
    assert not attentions(program)
    sizes = [g.name for g in program.prunable if g.kind == "head_dim"]
    assert sizes and all(held_groups(program)[name] for name in sizes)


def test_a_size_whose_queries_are_measured_besides_is_held() -> None:
    class Measured(Deranged):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (layer(x).view(n, t, 6, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = (q @ k.mT).softmax(-1) @ v * q.norm(dim=-1, keepdim=True)
            return self.head(y.transpose(1, 2).reshape(n, t, 24).mean(1))

    program = trace(Measured(), torch.randn(1, 7, 8))
    assert not attentions(program) and any(g.kind == "head_dim" for g in program.prunable)


def attending(make) -> type[nn.Module]:
    """A network whose attention is `make(module, x) -> [N, tokens, 24]`."""

    class Attending(Deranged):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(make(self, x).mean(1))

    return Attending


def by_head(x: torch.Tensor, size: int = 4) -> torch.Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def together(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def one_projection(m, x):
    q = by_head(m.q(x))
    return together((q @ q.mT).softmax(-1) @ by_head(m.v(x)))


def one_projection_twice(m, x):
    return together((by_head(m.q(x)) @ by_head(m.q(x * 0.5)).mT).softmax(-1) @ by_head(m.v(x)))


def fewer_keys(m, x):
    k, v = (by_head(layer(x))[:, :2] for layer in (m.k, m.v))
    return together(F.scaled_dot_product_attention(by_head(m.q(x)), k, v, enable_gqa=True))


def as_many_tokens_as_images(m, x):
    return together((by_head(m.q(x)) @ by_head(m.k(x))[:, :, : len(x)].mT).softmax(-1) @ by_head(m.v(x))[:, :, : len(x)])


@pytest.mark.parametrize("make", [one_projection, one_projection_twice, fewer_keys, as_many_tokens_as_images])
def test_what_is_not_one_projection_for_each_side_is_held(make) -> None:
    program = trace(attending(make)(), torch.randn(1, 7, 8))
    assert not attentions(program)
    assert all(held_groups(program)[g.name] for g in program.prunable if g.kind == "head_dim")


def test_queries_that_depend_on_no_image_are_traced() -> None:
    def latent(m, x):
        q = by_head(m.q(m.latents)).expand(len(x), -1, -1, -1)
        return together(F.scaled_dot_product_attention(q, by_head(m.k(x)), by_head(m.v(x))))

    model = attending(latent)()
    model.latents = nn.Parameter(torch.randn(1, 5, 8))
    program, x = trace(model, torch.randn(1, 7, 8)), torch.randn(3, 7, 8)
    assert torch.allclose(program.module(x), model(x), atol=1e-6)
    for group in program.prunable:
        kept = {group.name: range(max(1, group.width // 2))}
        assert prove(program, apply(program, kept), kept) <= 1e-9


def test_logits_bent_on_the_way_to_a_softmax_are_not_relative() -> None:
    def capped(m, x):
        return together((by_head(m.q(x)) @ by_head(m.k(x)).mT).tanh().softmax(-1) @ by_head(m.v(x)))

    assert not only(trace(attending(capped)(), torch.randn(1, 7, 8))).relative


def test_convolutions_in_any_layout_are_turned() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (by_head(part.flatten(2).mT) for part in self.qkv(x).chunk(3, 1))
            return self.head(together((q @ k.mT).softmax(-1) @ v).mean(1))

    program = trace(Mapped().to(memory_format=torch.channels_last), torch.randn(1, 3, 6, 6))
    each, x = only(program), images(program, 8).numpy()
    done = cut(program, State(program), {each.group: range(2)}, x, repair_=False, seed=0, progress=lambda *_: None)
    assert done.proof <= 1e-9


def test_a_turn_that_changes_the_network_is_refused(monkeypatch) -> None:
    program = traced(attentive.FusedAttention)
    monkeypatch.setattr(pruner, "rotated", narrowed_by_half)
    with pytest.raises(ProofError, match="changed the network.* --keep qkv:head_dim"):
        cut(program, State(program), {only(program).group: range(2)}, images(program, 8).numpy(), repair_=False, seed=0,
            progress=lambda *_: None)  # fmt: skip


def narrowed_by_half(params, each, found):
    return {each.keys.maker.weight: 0.5 * params[each.keys.maker.weight]}


@given(st.integers(0, 999), st.integers(1, 5), st.integers(2, 40))
def test_no_other_directions_lose_less_of_the_logits(seed, width, samples) -> None:
    """Of queries and keys independent of each other, by brute force over all pairs; the loss is what the docstring says."""
    rng = np.random.default_rng(seed)
    q, k = (torch.from_numpy(rng.standard_normal((samples, 6)) @ rng.standard_normal((6, 6))) for _ in "qk")
    moments = [(each.T @ each)[None] for each in (q, k)]
    found = balanced(*moments)

    def lost(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((q @ k.T - q @ left.T @ right @ k.T).square().sum())

    shares = [side[0] @ moment[0] @ side[0].T for side, moment in zip((found.queries, found.keys), moments, strict=True)]
    assert samples < 8 or torch.allclose(*shares, atol=1e-3 * float(shares[0].max()))  # neither side is the larger
    best = lost(found.queries[0, :width], found.keys[0, :width])
    singular = torch.linalg.svdvals(q @ k.T)
    expected = float(singular[width:6].square().sum())
    assert best == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(singular.square().sum()))
    for _ in range(5):
        mix = torch.from_numpy(rng.standard_normal((6, 6)))
        assert lost(mix[:width], torch.linalg.inv(mix).T[:width]) >= best * (1 - 1e-6) - 1e-6


def test_heads_that_meet_in_another_order_have_the_directions_of_those_that_they_meet() -> None:
    class Straight(Deranged):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (layer(x).view(n, t, 6, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.head(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 24).mean(1))

    torch.manual_seed(0)
    model, straight = Deranged(), Straight()
    straight.load_state_dict(model.state_dict())
    with torch.no_grad():
        for theirs, own in ((straight.k.weight, model.k.weight), (straight.k.bias, model.k.bias)):
            theirs.copy_(own.view(3, 2, 4, -1).transpose(0, 1).reshape(own.shape))
    found = []
    for network in (model, straight):
        program = trace(network, torch.randn(1, 7, 8))
        engine, x, each = in_double(program), images(program, 6).double(), only(program)
        found.append(outputs(engine.with_params(narrowed(engine.params, each, along(engine, each, x), 2)), x))
    assert torch.allclose(*found, atol=1e-9)


def test_keys_alike_at_all_tokens_cost_nothing() -> None:
    """Softmax does not see what all keys have in common, however large; directions are not spent on it."""
    model = Deranged()
    with torch.no_grad():
        model.k.weight.view(6, 4, 8)[:, 1:] = 0.0  # one direction tells the tokens apart
        model.k.bias.normal_(std=100.0)
    program = trace(model, torch.randn(1, 7, 8))
    engine, x = in_double(program), images(program, 6).double()
    each = only(program)
    one = engine.with_params(narrowed(engine.params, each, along(engine, each, x), 1))
    assert distortion(outputs(one, x), outputs(engine, x)) < 1e-9


@pytest.mark.parametrize("first", ["queries", "keys"])
def test_keys_are_what_the_softmax_chooses_among(first) -> None:
    class Ordered(Deranged):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (layer(x).view(n, t, 6, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            weights = (q @ k.mT).softmax(-1) if first == "queries" else (k @ q.mT * 0.5).softmax(2).mT
            return self.head((weights @ v).transpose(1, 2).reshape(n, t, 24).mean(1))

    each = only(trace(Ordered(), torch.randn(1, 7, 8)))
    assert each.relative
    assert (each.queries.maker.weight, each.keys.maker.weight) == ("q.weight", "k.weight")
    assert (each.queries.turned, each.keys.turned) == ((False, True) if first == "queries" else (True, False))


def test_without_a_softmax_what_keys_have_in_common_counts() -> None:
    class Linear(Deranged):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (layer(x).view(n, t, 6, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.head(((q @ k.mT / t).relu() @ v).transpose(1, 2).reshape(n, t, 24).mean(1))

    model = Linear()
    with torch.no_grad():
        model.k.weight.view(6, 4, 8)[:, 1:] = 0.0
        model.k.bias.view(6, 4)[:, 0] = 0.0
        model.k.bias.view(6, 4)[:, 1] = 30.0  # one direction in common, another that tells the tokens apart
        model.k.bias.view(6, 4)[:, 2:] = 0.0
    program = trace(model, torch.randn(1, 7, 8))
    engine, x = in_double(program), images(program, 6).double()
    each = only(program)
    two, one = (engine.with_params(narrowed(engine.params, each, along(engine, each, x), width)) for width in (2, 1))
    assert not each.relative
    assert distortion(outputs(two, x), outputs(engine, x)) < 1e-9 < distortion(outputs(one, x), outputs(engine, x)) < 0.1


def test_queries_that_nobody_reads_get_no_directions(monkeypatch) -> None:
    """Only the first token is read, whose query has one direction; counted alike, the others' queries would take the most."""

    class First(Deranged):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (layer(x).view(n, t, 6, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.head(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 24)[:, 0])

    torch.manual_seed(0)
    model = First()
    with torch.no_grad():
        model.q.weight.mul_(4.0)
        model.q.bias.zero_()
    program = trace(model, torch.randn(1, 7, 8))
    engine, x = in_double(program), images(program, 32).double()
    x[:, 0, 1:] = 0.0
    each, lost = only(program), []
    for counts in (relative, torch.ones_like):
        monkeypatch.setattr(attention, "relative", counts)
        one = engine.with_params(narrowed(engine.params, each, along(engine, each, x), 1))
        lost.append(distortion(outputs(one, x), outputs(engine, x)))
    assert lost[0] < 0.1 * lost[1]


@pytest.fixture(scope="module")
def scored():
    """A network that attends sharply, and the scores of its heads' size."""
    torch.manual_seed(0)
    model = attentive.FusedAttention()
    with torch.no_grad():
        model.qkv.weight.mul_(8.0)
    program = trace(model, example_input(patterns.SHAPES[attentive.FusedAttention]))
    x = images(program, 96).numpy()
    each = only(program)
    found = score(
        program, State(program), x, {each.group: (1, 2, 3, 4)}, "causal",
        repair=True, round_=0, seed=0, effect_passes=2.0, progress=lambda *_: None,
    )  # fmt: skip
    return program, x, each, found


def test_a_response_is_that_of_the_cut(scored) -> None:
    program, x, each, found = scored
    responses = {r.width: r.distortion for r in found.groups[each.group].responses}
    assert responses[4] == 0 < responses[3] < responses[1]
    assert found.groups[each.group].order == (3, 2, 1, 0)
    engine = Engine.of(program)
    sample, fit = torch.from_numpy(x[: found.images]), torch.from_numpy(x[found.images :])
    other = outputs(engine.with_params(narrowed(engine.params, each, along(engine, each, fit), 2)), sample)
    assert responses[2] == pytest.approx(distortion(other, outputs(engine, sample)), rel=1e-5)


def made(program, each: Attention, x: np.ndarray) -> list[torch.Tensor]:
    """Rows [n, O] of what makes queries and of what makes keys."""
    places = {side.maker.node for side in (each.queries, each.keys)}
    kept = Engine.of(program).run(torch.from_numpy(x), keep=places)[1]
    return [kept[side.maker.node].flatten(0, -2) for side in (each.queries, each.keys)]


@pytest.mark.parametrize("model", [attentive.FusedAttention, attentive.SeparateAttention, Deranged])
def test_what_the_dense_network_has_in_the_places_of_directions(model) -> None:
    """Of cuts that change no input of queries and keys, it is what the pruned network has there: in rounds, heads cut between."""
    torch.manual_seed(0)
    program = trace(model(), example_input(patterns.SHAPES.get(model, (2, 7, 8))))
    each, x = only(program), images(program, 32).numpy()
    (heads,) = (g for g in program.prunable if g.kind == "heads") if model is not Deranged else (None,)
    state = State(program)
    for kept in ({each.group: [0, 1, 2]}, {heads.name: [0, 2]} if heads else {}, {each.group: [0, 2]}):
        state = cut(program, state, kept, x, repair_=False, seed=0, progress=lambda *_: None).state
        engine = attentions(state.program)[each.group]
        for side, dense, pruned in zip(
            (each.queries, each.keys), made(program, each, x), made(state.program, engine, x), strict=True
        ):
            target, lost = aimed([each], side.maker.node, dense, state.alive, state.directions)
            keep = surviving(program, operand(program.nodes[side.maker.node], 1).name, 0, state.alive)
            assert torch.allclose(target[:, keep], pruned, atol=1e-4) and not len(lost)
            unknown, lost = aimed([each], side.maker.node, dense, state.alive, {})
            assert torch.equal(unknown, dense) and set(side.rows[:, list(state.alive[each.group])].flat) <= set(lost)


def test_no_width_is_promised_of_a_size_that_is_no_group_any_more() -> None:
    program = traced(attentive.FusedAttention)
    job = SimpleNamespace(program=program, candidates={only(program).group: (1, 2, 3, 4), "qkv:heads": (0, 1, 2, 3)})
    single = State(apply(program, {"qkv:heads": [1]}), {"qkv:heads": (1,)})
    assert "qkv:head_dim" not in {g.name for g in single.program.groups}
    assert options(job, single)["qkv:head_dim"] == (4,)
    pair = State(apply(program, {"qkv:heads": [1, 2]}), {"qkv:heads": (1, 2)})
    assert options(job, pair) == {"qkv:head_dim": (1, 2, 3, 4), "qkv:heads": (0, 1, 2)}


@pytest.mark.parametrize("known", [True, False])
def test_queries_and_keys_are_repaired_where_their_directions_are_known(scored, known) -> None:
    program, x, each, _ = scored
    first = cut(program, State(program), {each.group: range(3)}, x, repair_=False, seed=0, progress=lambda *_: None).state
    first = first if known else replace(first, directions={})
    kept = {"stem": range(10)}  # what queries, keys and values are made of changes
    plain, done = (cut(program, first, kept, x, repair_=repair, seed=0, progress=lambda *_: None) for repair in (False, True))
    assert done.proof <= 1e-9 and done.state.alive == {each.group: (0, 1, 2), "stem": tuple(range(10))}
    assert done.repaired is not None and done.repaired.kept
    name = str(operand(program.nodes[each.queries.maker.node], 1).target)
    before, after = (Engine.of(c.state.program).params[name] for c in (plain, done))
    same = (before == after).flatten(1).all(1)
    assert len(same) == 2 * 3 * 3 + 3 * 4  # of queries and keys, and of values
    assert not same[18:].any() and (not same[:18].any() if known else same[:18].all())


def test_parts_that_are_cast_on_the_way_are_not_split() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(len(x), -1, 3, 8).double().unbind(2)
            return q - k + v

    model, x = Cast(), example_input((2, 5, 8))
    assert trace(model, x[:1]).module(x).dtype == model(x).dtype == torch.float64


@pytest.mark.parametrize("last", ["unbind", "select", "sum"])
@pytest.mark.parametrize("order", [(2, 0, 3, 1, 4), (0, 2, 1, 3, 4), (3, 0, 2, 1, 4)])
def test_parts_made_side_by_side_are_split_where_they_are_only_told_apart(order, last) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            axis = order.index(2)
            y = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(order)
            if last == "sum":
                return y.sum(axis)
            q, k, v = y.unbind(axis) if last == "unbind" else (y.select(axis, i) for i in (0, 1, 2))
            return q - 2 * k + 3 * v

    model, x = Fused(), example_input((2, 5, 8))
    program = trace(model, x[:1])
    split = [n for n in program.module.graph.nodes if "split" in str(n.target)]
    assert len(split) == (last != "sum")
    assert torch.allclose(program.module(x), model(x), atol=1e-6)
