"""Routers that know of tasks: definitions, limits, losses, and ids that do not exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers.naive import naive_topk_weights
from guilomo.layers.routers import HmoraRouter, LoraMixerRouter, MeteoraRouter, TaskRouter, router_options
from guilomo.layers.routers.hmora import TaskTable
from guilomo.layers.routing import NOWHERE, Place, Router, Tokens

I, E, N = 9, 5, 6  # noqa: E741
TASKS = torch.tensor([2, 0, 1, 2, 4, 0])


def _x(*between: int) -> Tensor:
    return torch.randn(N, *between, I, dtype=torch.float64)


def _hmora(depth: float = 0.5, top_k: int = E, **options: object) -> HmoraRouter:
    place = Place(depth, TaskTable(E, E).double())
    router = HmoraRouter(I, E, top_k, place, **{"tasks": E, "hidden": 7, **options}).double()
    torch.nn.init.normal_(place.shared.scores)
    return router


def _route(router: Router, x: Tensor, tasks: Tensor | None = TASKS) -> Tensor:
    return router.route(router.logits(x), Tokens(x, task=tasks)).weights


def test_moelora_is_the_softmax_of_the_embedded_task() -> None:
    router = TaskRouter(I, E, 2, tasks=E, width=3).double()
    weights = _route(router, _x(4))
    assert weights.shape == (N, 4, E)
    for row, task in enumerate(TASKS.tolist()):
        wanted = (router.weight @ router.embedding[task]).softmax(0)
        assert torch.allclose(weights[row], wanted.expand(4, E), rtol=1e-12)
        assert torch.allclose(router.gates_of(task), weights[row, 0], rtol=1e-14)
    assert torch.equal(_route(router, _x(4)), weights), "the token does not matter"
    assert not torch.allclose(weights[0], weights[1], rtol=1e-3)


def test_moelora_gradients() -> None:
    router = TaskRouter(I, E, 2, tasks=E, width=3).double()
    x, reads = _x(4), torch.randn(N, 4, E, dtype=torch.float64)
    found = torch.autograd.grad((_route(router, x) * reads).sum(), (router.embedding, router.weight))
    rows = torch.stack([(router.weight @ router.embedding[t]).softmax(0).expand(4, E) for t in TASKS.tolist()])
    wanted = torch.autograd.grad((rows * reads).sum(), (router.embedding, router.weight))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(found, wanted, strict=True))
    assert not found[0][3].any(), "no row has task 3"


@pytest.mark.parametrize("temperature", [1.0, 15.0])
@pytest.mark.parametrize("top_k", [2, 3, E])
def test_meteora_is_the_softmax_of_the_kept_logits(top_k: int, temperature: float) -> None:
    router = MeteoraRouter(I, E, top_k, temperature=temperature).double()
    x = _x(4)
    u = x @ router.weight.T
    kept = naive_topk_weights(u.flatten(0, 1), top_k).view_as(u) > 0
    wanted = (u / temperature).masked_fill(~kept, -torch.inf).softmax(-1)
    assert torch.allclose(_route(router, x), wanted, rtol=1e-12)
    assert torch.allclose(_route(router, x, None), wanted, rtol=1e-12)


def test_meteora_of_one_expert_has_weight_one_and_learns_from_tasks_alone() -> None:
    router = MeteoraRouter(I, E, 1).double().train()
    x = _x(4)
    routing = router.route(router.logits(x), Tokens(x, task=TASKS))
    assert torch.equal(routing.weights, routing.chosen.double())
    (of_weights,) = torch.autograd.grad((routing.weights * torch.randn(E)).sum(), router.weight, retain_graph=True)
    assert not of_weights.any()
    (of_loss,) = torch.autograd.grad(routing.penalty.sum(), router.weight)
    assert of_loss.any()


def test_meteora_own_loss_is_the_cross_entropy_of_the_task() -> None:
    router = MeteoraRouter(I, E, 2).double().train()
    x = _x(4)
    penalty = router.route(router.logits(x), Tokens(x, task=TASKS)).penalty
    for row, task in enumerate(TASKS.tolist()):
        wanted = -(x[row] @ router.weight.T).log_softmax(-1)[:, task]
        assert torch.allclose(penalty[row], wanted, rtol=1e-12)
    assert router.route(router.logits(x), Tokens(x)).penalty is None
    assert router.eval().route(router.logits(x), Tokens(x, task=TASKS)).penalty is None


def test_meteora_another_adapter_changes_nothing_while_its_logit_is_minus_infinity() -> None:
    u = torch.randn(20, E, dtype=torch.float64)
    more = torch.cat([u, torch.full((20, 1), -torch.inf, dtype=torch.float64)], dim=-1)
    tokens = Tokens(torch.zeros(20, I))
    before, after = MeteoraRouter(I, E, 2).route(u, tokens), MeteoraRouter(I, E + 1, 2).route(more, tokens)
    assert torch.equal(after.weights[:, :E], before.weights)
    assert not after.weights[:, E].any()


def test_meteora_starts_at_standard_normal_gates() -> None:
    weight = MeteoraRouter(400, 50, 2).weight
    assert abs(float(weight.detach().std()) - 1) < 0.02


def test_lora_mixer_hard_is_one_expert_per_task() -> None:
    router = LoraMixerRouter(I, E, 3, NOWHERE, stage="hard").double()
    weights = _route(router, _x(4))
    assert torch.equal(weights, torch.nn.functional.one_hot(TASKS, E).double()[:, None].expand(N, 4, E))
    (gradient,) = torch.autograd.grad(weights.sum(), router.weight)
    assert not gradient.any(), "of zero, but there: distributed training waits for it"


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_lora_mixer_soft(top_k: int) -> None:
    router, x = LoraMixerRouter(I, E, top_k, NOWHERE, stage="soft").double(), _x(4)
    u = x @ router.weight.T
    soft = _route(router.train(), x, None)
    assert torch.allclose(soft, u.softmax(-1), rtol=1e-12)
    sharp = _route(router.eval(), x, None)
    kept = naive_topk_weights(u.flatten(0, 1), top_k).view_as(u) > 0
    assert torch.allclose(sharp, u.masked_fill(~kept, -torch.inf).softmax(-1), rtol=1e-12)
    assert torch.equal(soft, sharp) == (top_k == E)


@pytest.mark.parametrize(("depth", "mix"), [(0.0, -2.0), (0.5, 0.0), (1.0, 2.0)])
def test_hmora_mixes_token_and_task(depth: float, mix: float) -> None:
    router = _hmora(depth)
    assert router.mix.item() == mix
    x = _x(4)
    token = ((x @ router.down.T).clamp_min(0) @ router.up.T).softmax(-1)
    task = router._held[0].scores.softmax(-1)[TASKS][:, None]
    share = 1 / (1 + torch.exp(-router.mix))
    wanted = (1 - share) * token + share * task
    routing = router.route(router.logits(x), Tokens(x, task=TASKS))
    assert torch.allclose(routing.weights, wanted, rtol=1e-12)
    assert torch.allclose(routing.probabilities, wanted, rtol=1e-12), "balance losses see what multiplies the experts"
    leaves = (router.down, router.up, router.mix, router._held[0].scores)
    reads = torch.randn(N, 4, E, dtype=torch.float64)
    found, naive = (torch.autograd.grad((w * reads).sum(), leaves) for w in (routing.weights, wanted))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, naive, strict=True))


@pytest.mark.parametrize("select", ["renormalize", "softmax"])
def test_hmora_keeps_the_largest(select: str) -> None:
    router, x = _hmora(top_k=2, select=select), _x(4)
    g = _route(_copy_at_all(router), x).flatten(0, 1)
    found = _route(router, x).flatten(0, 1)
    for row, weights in zip(g, found, strict=True):
        kept = row.topk(2).indices
        only = row[kept] / row[kept].sum() if select == "renormalize" else row[kept].softmax(0)
        assert torch.allclose(weights[kept], only, rtol=1e-12)
        assert int((weights > 0).sum()) == 2


def _copy_at_all(router: HmoraRouter) -> HmoraRouter:
    dense = HmoraRouter(I, E, E, Place(0.5, router._held[0]), tasks=E, hidden=7).double()
    dense.load_state_dict(router.state_dict())
    return dense


def test_hmora_softmax_of_a_softmax_is_the_released_quirk() -> None:
    """(.9, .1) becomes (.69, .31)."""
    router = HmoraRouter(I, 3, 2, Place(1.0, TaskTable(1, 3).double()), tasks=1, lean=40.0, select="softmax").double()
    with torch.no_grad():
        router._held[0].scores.copy_(torch.tensor([[0.9, 0.1, 1e-9]]).log())
    weights = _route(router, _x(), torch.zeros(N, dtype=torch.int64))
    assert torch.allclose(weights, torch.tensor([0.69, 0.31, 0.0], dtype=torch.float64).expand(N, 3), atol=0.005)


@pytest.mark.parametrize("kind", [TaskRouter, MeteoraRouter, LoraMixerRouter, HmoraRouter])
@pytest.mark.parametrize("bad", [5, -1])
def test_ids_that_do_not_exist(kind: type[Router], bad: int) -> None:
    routers = {
        TaskRouter: lambda: TaskRouter(I, E, 2, tasks=E),
        MeteoraRouter: lambda: MeteoraRouter(I, E, 2),
        LoraMixerRouter: lambda: LoraMixerRouter(I, E, 2, NOWHERE, stage="hard"),
        HmoraRouter: _hmora,
    }
    x = torch.randn(N, I, dtype=torch.float64)
    with pytest.raises(GuilomoError, match=rf"router_task_ids holds {bad}: expected 0 to 4"):
        _route(routers[kind]().double(), x, torch.tensor([0, 1, bad, 0, 0, 0]))


@pytest.mark.parametrize("kind", ["task", "hard", "hmora"])
def test_missing_tasks(kind: str) -> None:
    router = {
        "task": lambda: TaskRouter(I, E, 2, tasks=E),
        "hard": lambda: LoraMixerRouter(I, E, 2, NOWHERE, stage="hard"),
        "hmora": _hmora,
    }[kind]()
    with pytest.raises(GuilomoError, match=r"router_task_ids.*tasks_given"):
        _route(router.double(), _x(), None)


def test_parameters() -> None:
    assert MeteoraRouter.parameters_for(E, I) == E * I == sum(p.numel() for p in MeteoraRouter(I, E, 2).parameters())
    made = sum(p.numel() for p in TaskRouter(I, E, 2, tasks=4, width=3).parameters())
    assert TaskRouter.parameters_for(E, I, tasks=4, width=3) == made == 3 * (4 + E)
    options = router_options("hmora", {"tasks": E, "hidden": 7})
    assert HmoraRouter.parameters_for(E, I, **options) == sum(p.numel() for p in _hmora().parameters())
    assert HmoraRouter.shared_parameters(E, I, **options) == E * E


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("task", {"tasks": 0}, r"tasks'\] = 0.*at least 1"),
        ("task", {"tasks": 3, "width": 0}, r"width'\] = 0.*at least 1"),
        ("hmora", {}, r"tasks'\] = None.*Set it"),
        ("hmora", {"tasks": 3, "lean": float("nan")}, r"lean'\] = nan.*finite"),
        ("hmora", {"tasks": 3, "select": "topk"}, r"select'\].*renormalize, softmax"),
        ("meteora", {"temperature": 0}, r"temperature'\] = 0.*above 0"),
        ("lora_mixer", {"stage": "har"}, r"stage'\] = 'har'.*Did you mean 'hard'"),
    ],
)
def test_bad_options(router: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        router_options(router, options)
