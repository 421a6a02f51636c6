"""The slow truth: per-step, per-example gradients by untying, and the formulas of the paper spelled out.

Imports nothing from `captum_sdi`. The looped modules are replaced by one deep copy per iteration, so that ordinary
autograd gives each iteration a gradient of its own; modules outside the loop are copied apart, too, so that a tensor
shared by an embedding and a head has one gradient before and one after the loop. One example at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Untying:
    """How a model comes apart.

    `outside` says of every other module with parameters whether it works before ("prelude") or after ("coda") the
    loop; the reference does not find out by itself.
    """

    loop: Sequence[str]
    anchors: Sequence[str]
    n_steps: int
    outside: Mapping[str, str] = field(default_factory=dict)


class _Copies(nn.Module):
    """Stands in a looped module's place: the copy of the current step answers."""

    def __init__(self, module: nn.Module, clock: dict[str, int], n_steps: int, starts_step: bool) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(n_steps))
        self.clock, self.starts_step = clock, starts_step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.starts_step:
            self.clock["step"] += 1
        return self.copies[self.clock["step"]](*args, **kwargs)


def step_gradients(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], untying: Untying, names: Sequence[str]
) -> Tensor:
    """Gradients of one example's loss by bin: ``(2 + t, all entries of the named parameters)``.

    The first row is the prelude, the second the coda, the others are the loop steps.
    """
    tied = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    wanted = [tied[name] for name in names]
    model = copy.deepcopy(model).eval()
    clock = {"step": -1}
    bins: dict[tuple[int, int], list[nn.Parameter]] = {}  # (tied identity, bin) -> its untied parameters

    def keep(prefix: str, module: nn.Module, bin: int) -> None:
        for local, parameter in module.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(True)
            bins.setdefault((tied[f"{prefix}.{local}"], bin), []).append(parameter)

    for name in untying.loop:
        copies = _Copies(model.get_submodule(name), clock, untying.n_steps, name in untying.anchors)
        model.set_submodule(name, copies)
        for step, module in enumerate(copies.copies):
            keep(name, module, 2 + step)
    for name, place in untying.outside.items():
        model.set_submodule(name, copy.deepcopy(model.get_submodule(name)))
        keep(name, model.get_submodule(name), {"prelude": 0, "coda": 1}[place])

    parameters = [p for group in bins.values() for p in group]
    grads = torch.autograd.grad(loss(model), parameters, allow_unused=True)
    by_parameter = {id(p): g for p, g in zip(parameters, grads, strict=True) if g is not None}
    shapes = {id(p): p for p in parameters}

    def gradient(identity: int, bin: int) -> Tensor:
        group = bins.get((identity, bin), [])
        some = next(p for (other, _), ps in bins.items() if other == identity for p in ps)
        total = torch.zeros_like(shapes[id(some)])
        for parameter in group:
            total += by_parameter.get(id(parameter), 0)
        return total.flatten().detach()

    return torch.stack(
        [torch.cat([gradient(identity, bin) for identity in wanted]) for bin in range(2 + untying.n_steps)]
    )


def with_block_swapped(model: nn.Module, other: nn.Module, untying: Untying, step: int) -> nn.Module:
    """A copy of the model whose loop has another model's modules in one step."""
    swapped = copy.deepcopy(model).eval()
    clock = {"step": -1}
    for name in untying.loop:
        copies = _Copies(model.get_submodule(name), clock, untying.n_steps, name in untying.anchors)
        copies.copies[step] = copy.deepcopy(other.get_submodule(name))
        swapped.set_submodule(name, copies.eval())
    return swapped


@dataclass
class Truth:
    """Everything the library reports, from the definitions."""

    totals: Tensor  # (q, n)
    trajectories: Tensor  # (q, n, t)
    prelude: Tensor  # (q, n)
    coda: Tensor  # (q, n)
    matrix: Tensor  # (q, n, s, t)
    self_totals: Tensor  # (n,)
    self_trajectories: Tensor  # (n, t)


def truth(checkpoints: Sequence[tuple[float, Sequence[Tensor], Sequence[Tensor]]]) -> Truth:
    """Influence from gradients: for each checkpoint (η, training examples' bins, test examples' bins)."""
    parts = []
    for eta, train, test in checkpoints:
        whole = [g.sum(0) for g in train]
        parts.append(
            (
                eta * torch.stack([torch.stack([phi.sum(0) @ g for g in whole]) for phi in test]),
                eta * torch.stack([torch.stack([phi[2:] @ g for g in whole]) for phi in test]),
                eta * torch.stack([torch.stack([phi[0] @ g for g in whole]) for phi in test]),
                eta * torch.stack([torch.stack([phi[1] @ g for g in whole]) for phi in test]),
                eta * torch.stack([torch.stack([g[2:] @ phi[2:].T for g in train]) for phi in test]),
                eta * torch.stack([g @ g for g in whole]),
                eta * torch.stack([g[2:] @ g.sum(0) for g in train]),
            )
        )
    return Truth(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))


def next_token_loss(logits: Tensor, labels: Tensor, causal: bool = True) -> Tensor:
    """Mean over one example's own targets, written without library losses: ``(p, v)`` and ``(p,)``."""
    if causal:
        logits, labels = logits[:-1], labels[1:]
    terms = [-torch.log_softmax(logits[i], 0)[labels[i]] for i in range(len(labels)) if labels[i] != -100]
    return torch.stack(terms).mean()


def spread(model: nn.Module, scale: float = 0.3, seed: int = 1) -> nn.Module:
    """Weights far from initialisation: there all loop steps look alike and hide an off-by-one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


def aliased_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    names: Sequence[str],
    loop: Sequence[str],
    anchors: Sequence[str],
) -> dict[str, Tensor]:
    """Gradients of one example's loss by bin, for models that deep copies would not untie: ``(2 + t, entries)`` each.

    Before each call of a module that owns parameters, every one of them is replaced by a fresh alias, and the gradient
    of that alias is that use's. Those of a module that is never called are replaced before the calls of the closest one
    around it that is. Needs no list of what lies outside the loop, and follows tied parameters, whoever owns them. The
    first row is the prelude, the second the coda, the others are the steps that calls of the anchors start.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tracked = {id(parameters[name]): name for name in names}
    inside = {id(part) for name in loop for part in model.get_submodule(name).modules()}
    called: set[nn.Module] = set()
    spies = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()]
    loss(model.eval())
    for spy in spies:
        spy.remove()
    owned: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {module: [] for module in called}
    for prefix, module in model.named_modules():
        around = prefix
        while (caller := model.get_submodule(around)) not in called:
            around = around.rpartition(".")[0]
        mine = [(module, k, p) for k, p in module._parameters.items() if p is not None and id(p) in tracked]
        owned[caller] += mine
    log: list[tuple[str, Any]] = []  # ("step", None), ("loop", None) or ("use", (name, alias, inside))

    def note(kind: str) -> Callable[..., None]:
        return lambda *_: log.append((kind, None))

    def alias(module: nn.Module, args: object) -> None:
        for holder, local, parameter in owned[module]:
            fresh = parameter.detach().requires_grad_(True)
            holder._parameters[local] = fresh  # type: ignore[assignment]
            log.append(("use", (tracked[id(parameter)], fresh, id(module) in inside)))

    # A step begins first; then come the aliases, before any hook of the model's own that computes from parameters.
    hooks = [module.register_forward_pre_hook(alias, prepend=True) for module, own in owned.items() if own]
    hooks += [model.get_submodule(name).register_forward_pre_hook(note("step"), prepend=True) for name in anchors]
    hooks += [model.get_submodule(name).register_forward_pre_hook(note("loop")) for name in loop]
    try:
        value = loss(model.eval())
    finally:
        for hook in hooks:
            hook.remove()
        for own in owned.values():
            for holder, local, parameter in own:
                holder._parameters[local] = parameter

    last = max(i for i, (kind, _) in enumerate(log) if kind == "loop")
    uses, step = [], -1
    for i, (kind, use) in enumerate(log):
        step += kind == "step"
        if kind == "use":
            name, fresh, is_inside = use
            uses.append((name, fresh, 0 if step < 0 else 2 + step if is_inside or i < last else 1))
    grads = torch.autograd.grad(value, [fresh for _, fresh, _ in uses], allow_unused=True)
    result = {name: torch.zeros(3 + step, parameters[name].numel(), dtype=value.dtype) for name in names}
    for (name, _, bin), grad in zip(uses, grads, strict=True):
        if grad is not None:
            result[name][bin] += grad.flatten()
    return result


# --- training, differentiated by plain autograd through all of it ---


@dataclass(frozen=True)
class PlainAdamW:
    """AdamW written out: `step(theta, gradient, memory, k, rate, decay)` for update k = 1, 2, ..."""

    betas: tuple[float, float]
    eps: float

    def step(self, theta: Tensor, g: Tensor, memory: Any, k: int, rate: float, decay: Tensor) -> tuple[Tensor, Any]:
        b1, b2 = self.betas
        m, v = memory or (torch.zeros_like(theta), torch.zeros_like(theta))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        corrected = v / (1 - b2**k)
        is_seen = corrected > 0  # the root of zero has no derivative
        root = torch.where(is_seen, corrected.where(is_seen, torch.ones_like(v)).sqrt(), torch.zeros_like(v))
        return (1 - rate * decay) * theta - rate * m / (1 - b1**k) / (root + self.eps), (m, v)


@dataclass(frozen=True)
class PlainSGD:
    """SGD written out, with coupled weight decay."""

    momentum: float
    nesterov: bool

    def step(self, theta: Tensor, g: Tensor, memory: Any, k: int, rate: float, decay: Tensor) -> tuple[Tensor, Any]:
        g = g + decay * theta
        b = g if memory is None else self.momentum * memory + g
        return theta - rate * (g + self.momentum * b if self.nesterov else b), b


@dataclass(frozen=True)
class PlainTraining:
    """A training run: one loss for each example alone, no batch, no padding."""

    model: nn.Module
    loss_of: Callable[[Callable[..., Any], int], Tensor]
    """``(a call of the model, example)`` to the example's loss."""
    optimizer: PlainAdamW | PlainSGD
    rates: Sequence[float]
    batches: Sequence[Sequence[int]]
    shares: Sequence[Sequence[float]]
    """Of each example's loss in its update's."""
    decay: Tensor
    max_norm: float | None

    def flat(self, model: nn.Module) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def end(self, weights: Tensor) -> Tensor:
        """The last parameters, which autograd can follow back to `weights` (updates, examples)."""
        theta, memory = self.flat(self.model).requires_grad_(), None
        for k, (batch, shares) in enumerate(zip(self.batches, self.shares, strict=True)):
            terms = [weights[k, i] * a * self._loss(theta, i) for i, a in zip(batch, shares, strict=True)]
            (g,) = torch.autograd.grad(torch.stack(terms).sum(), theta, create_graph=True)
            if self.max_norm is not None:
                g = g * (self.max_norm / (g.norm() + 1e-6)).clamp(max=1)
            theta, memory = self.optimizer.step(theta, g, memory, k + 1, self.rates[k], self.decay)
        return theta

    def _loss(self, theta: Tensor, example: int) -> Tensor:
        sizes = [parameter.numel() for parameter in self.model.parameters()]
        named = {
            name: piece.view_as(parameter)
            for (name, parameter), piece in zip(self.model.named_parameters(), theta.split(sizes), strict=True)
        }

        def call(**inputs: Any) -> Any:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return torch.func.functional_call(self.model, named, kwargs=inputs)

        return self.loss_of(call, example)


# --- parts of one example's gradient, one at a time ---


def one_target_loss(logits: Tensor, labels: Tensor, column: int, causal: bool = True) -> Tensor:
    """What the target at one position adds to `next_token_loss`; zero where there is none."""
    n_targets = sum(int(label) != -100 for label in labels[int(causal) :])
    if column < int(causal) or labels[column] == -100:
        return 0 * logits.sum()
    log_probabilities = torch.log_softmax(logits[column - int(causal)], 0)
    return -log_probabilities[labels[column]] / n_targets


def live_at(model: nn.Module, position: int) -> nn.Module:
    """A copy whose parameters count at one position alone: elsewhere frozen copies answer with the same output."""
    model = copy.deepcopy(model)

    def answer(frozen: nn.Module) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            axis = output.ndim - 2
            is_live = torch.arange(output.shape[axis]).unsqueeze(-1) == position
            return torch.where(is_live, output, frozen(*args))

        return hook

    owners = [module for module in model.modules() if module._parameters]
    for module in owners:
        module.register_forward_hook(answer(copy.deepcopy(module).requires_grad_(False)))
    return model


def map_truth(checkpoints: Sequence[tuple[float, Sequence[Tensor], Sequence[Tensor]]], sizes: Sequence[int]) -> Tensor:
    """Influence split along every axis, from gradients split along every axis of one side.

    For each checkpoint (η, train gradients, test gradients), of each example ``(token, position, 2 + t, entries)``;
    `sizes` says how many entries each parameter has. Returned is ``(q, n, token, train token, position, train position,
    step, train step, parameter, checkpoint)`` with steps in the order prelude, loop steps, coda.
    """
    order = [0, *range(2, checkpoints[0][1][0].shape[2]), 1]
    every = []
    for eta, train, test in checkpoints:
        parts = []
        for phis, gs in zip(
            torch.stack(list(test))[..., order, :].split(list(sizes), -1),
            torch.stack(list(train))[..., order, :].split(list(sizes), -1),
            strict=True,
        ):
            parts.append(eta * torch.einsum("qapse,nbrue->qnabprsu", phis, gs))
        every.append(torch.stack(parts, -1))
    return torch.stack(every, -1)


def damped_fisher_inverse(gradients: Tensor, sizes: Sequence[int], damping: float) -> Tensor:
    """(F + λ)⁻¹ from gradients ``(n, entries)``, with F the mean of g gᵀ within each parameter's block and 0 elsewhere.

    λ is `damping` times the mean of the eigenvalues that can differ from zero: of the block's trace by how many.
    """
    blocks = []
    for block in gradients.split(list(sizes), dim=1):
        n, width = block.shape
        fisher = sum(torch.outer(gradient, gradient) for gradient in block) / n
        shift = damping * fisher.diagonal().sum() / min(n, width)
        blocks.append(torch.linalg.inv(fisher + shift * torch.eye(width).to(fisher)))
    return torch.block_diag(*blocks)


def damped_hessian_inverse(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], names: Sequence[str], damping: float
) -> Tensor:
    """(H₊ + λ)⁻¹ of the named parameters: H entry by entry, its negative eigenvalues 0, λ relative to the largest."""
    model = copy.deepcopy(model).eval()
    parameters = [model.get_parameter(name).requires_grad_(True) for name in names]
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(loss(model), parameters, create_graph=True)
    gradient = torch.cat([part.flatten() for part in first])
    second = torch.autograd.grad(gradient, parameters, torch.eye(len(gradient)).to(gradient), is_grads_batched=True)
    hessian = torch.cat([part.flatten(1) for part in second], dim=1)
    values, vectors = torch.linalg.eigh(hessian)
    shift = damping * values.max()
    return vectors @ torch.diag(1 / (values.clamp(min=0) + shift)) @ vectors.T
