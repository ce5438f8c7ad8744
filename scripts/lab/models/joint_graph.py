"""The joint graph of a network's forward and backward, traced for a number of rows: which of its
tensors carry rows, and where to cut it. See `forward_once`.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
}
COPIES = {aten.clone.default, aten._to_copy.default, aten._unsafe_view.default}
HALF = {torch.bfloat16, torch.float16}


class CannotTrace(Exception):
    """This network, or this torch, cannot forward once. The message is the reason, in one line."""


class Layout(NamedTuple):
    """Where a tensor has its rows: dimension `dim` is (outer, rows, inner) folded into one."""

    dim: int
    outer: int
    rows: int


class Joint:
    """A traced forward and backward."""

    def __init__(self, module: fx.GraphModule, inputs: int, results: int):
        """inputs, results: how many the traced function has."""
        self.module = module
        self.nodes = list(module.graph.nodes)
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        if len(placeholders) != inputs + 1:
            raise CannotTrace("its loss is not the one result that has a gradient")
        self.inputs = placeholders[:inputs]  # parameters, buffers, then the batch
        self.tangent = placeholders[inputs]  # [rows]: what each loss weighs
        outputs = list(self.nodes[-1].args[0])
        self.results: list[Node] = outputs[:results]  # those of `Rows`, then the new buffers
        self.gradients: list[Node | None] = outputs[results:]  # of the inputs
        self.late = {self.tangent}  # the nodes of the backward
        for node in self.nodes:
            if node.op != "output" and not self.late.isdisjoint(node.all_input_nodes):
                self.late.add(node)

    def noise(self) -> list[Node]:
        """The random tensors of the forward: masks of dropout and of stochastic depth."""
        early = [n for n in self.nodes if n not in self.late]
        drawn = [n for n in early if is_random(n)]
        drawn += [n for n in early if n.target is operator.getitem and is_random(n.args[0])]
        return [n for n in drawn if shape_of(n) is not None]


class Tracing(TorchFunctionMode):
    """Traces BatchNorm without cuDNN, whose backward needs an opaque reserve; limits the time."""

    def __init__(self, deadline: float):
        """deadline: by the thread's own clock: a busy machine refuses no network."""
        super().__init__()
        self.deadline = deadline

    def __torch_function__(
        self, function: Callable, types: Any, args: Sequence = (), named: dict | None = None
    ) -> Any:
        if time.thread_time() > self.deadline:
            raise CannotTrace("tracing it takes too long")
        if function is torch.batch_norm:
            return function(*args[:8], False)
        return NATIVE.get(function, function)(*args, **(named or {}))


def _batch_norm(
    images: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm by torch's own kernel."""
    arguments = (images, weight, bias, mean, variance, training, momentum, eps)
    return torch.batch_norm(*arguments, False)


NATIVE = {F.batch_norm: _batch_norm}


def shape_of(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def is_view(node: Node) -> bool:
    return node.target in RESHAPES or getattr(node.target, "is_view", False)


def is_widened(node: Node) -> bool:
    """Whether it is a copy in a type of more bytes, as autocast makes some."""
    if node.target is not aten._to_copy.default:
        return False
    before = node.args[0].meta["val"].dtype
    return before.is_floating_point and before.itemsize < node.meta["val"].dtype.itemsize


def is_random(node: Node) -> bool:
    """Whether it draws random numbers. Fused attention has the tag, but draws only for dropout."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return seeded and (not is_attention(node) or drops_in_attention(node))


def is_pointwise(node: Node) -> bool:
    """Whether each number depends on the numbers at its own place alone, and not on chance."""
    tags = getattr(node.target, "tags", ())
    return node.target in COPIES or (torch.Tag.pointwise in tags and not is_random(node))


def extract(
    module: fx.GraphModule, given: Sequence[Node], outputs: Sequence[Node | None]
) -> fx.GraphModule:
    """The part of a graph that computes `outputs` from `given`. Raises CannotTrace where it needs
    another input.
    """
    ends = set(given)
    needed = set()
    stack = [node for node in outputs if node is not None]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [] if node in ends else node.all_input_nodes
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in module.graph.nodes:
        if node not in needed or node in copies:
            continue
        if node.op == "placeholder":
            raise CannotTrace(f"{node.name} is needed on both sides of the cut")
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([None if node is None else copies[node] for node in outputs])
    return fx.GraphModule(module, graph)


def take_rows(tensor: Tensor, dim: int, outer: int, total: int, rows: Tensor) -> Tensor:
    """The chosen rows of a tensor with that `Layout`, in its own order of strides."""
    split = tensor.unflatten(dim, (outer, total, tensor.shape[dim] // (outer * total)))
    order = sorted(range(split.ndim), key=lambda d: -split.stride(d))
    taken = split.permute(order).index_select(order.index(dim + 1), rows)
    return taken.permute([order.index(d) for d in range(split.ndim)]).flatten(dim, dim + 2)


PIECE = 512  # positions of a picture that one partial sum takes at most


def _sum_of_channels(values: Tensor) -> Tensor:
    """[rows, channels, ...] -> [channels], in two steps: first sums over pieces of each row.
    Inductor does not split a sum over gathered rows. One for each channel, or one for each row of
    a large picture, would leave most of the GPU's cores idle.
    """
    places = values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)
    positions = places.shape[2]
    size = max(n for n in range(1, PIECE + 1) if positions % n == 0)
    return places.unflatten(2, (positions // size, size)).sum(3).sum((0, 2))


def batch_norm_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor | None,
    _running_mean: Tensor | None,
    _running_variance: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    _training: bool,
    eps: float,
    _mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of BatchNorm over some rows of a batch that was normalised by the statistics of
    all its rows: (gradients of the images, the weight, the bias).

    images, gradient: [rows, channels, ...]; mean, inverse_std: [channels], of all rows. BatchNorm's
    output changes neither with the mean of its input nor with its scale. So the usual backward of a
    whole batch has no part along these two directions. Here the mean and the deviations of the
    chosen rows are taken out of the gradient likewise. The gradient of the weights before BatchNorm
    then stands at right angles to these weights, as with autograd. On a ResNet-18 and the harder
    half of 256 pictures its cosine with autograd's gradient through the whole batch is .970 to
    .989. With the usual formula over these rows it is .893 to .948.
    """
    shape = [1, -1] + [1] * (images.ndim - 2)
    given = gradient.float()
    normal = (images.float() - mean.view(shape)) * inverse_std.view(shape)
    of_bias = _sum_of_channels(given)
    of_weight = _sum_of_channels(given * normal)
    count = images.numel() // images.shape[1]
    centre = _sum_of_channels(normal) / count
    variance = _sum_of_channels(normal.square()) / count - centre.square()
    variance = variance + eps * inverse_std.square()
    average = of_bias / count
    slope = (of_weight / count - average * centre) / variance
    scale = inverse_std if weight is None else inverse_std * weight
    left = given - average.view(shape) - (normal - centre.view(shape)) * slope.view(shape)
    return (left * scale.view(shape)).to(images.dtype), of_weight, of_bias


def find_layouts(
    full: Joint, part: Joint, total: int, rows: int
) -> dict[Node, Layout | str | None]:
    """For every node of the trace of `total` rows its Layout; None where it carries no rows, the
    reason where it carries them in a way that cannot be gathered.

    Raises CannotTrace where the two traces differ by more than sizes.
    """
    twins = list(zip(full.nodes, part.nodes, strict=False))
    alike = len(full.nodes) == len(part.nodes) and all(
        a.target == b.target
        and [n.name for n in a.all_input_nodes] == [n.name for n in b.all_input_nodes]
        for a, b in twins
    )
    if not alike:
        raise CannotTrace("what it computes depends on the number of samples")
    found: dict[Node, Layout | str | None] = {}
    for node, twin in twins:
        found[node] = _layout(node, shape_of(node), shape_of(twin), found, (total, rows))
    return found


def _layout(
    node: Node,
    ours: tuple[int, ...] | None,
    theirs: tuple[int, ...] | None,
    found: dict[Node, Layout | str | None],
    sizes: tuple[int, int],
) -> Layout | str | None:
    """One node of `find_layouts`. ours, theirs: its shapes in the two traces."""
    total, rows = sizes
    dims = [d for d, (a, b) in enumerate(zip(ours or (), theirs or (), strict=False)) if a != b]
    if not dims:
        return None
    dim = dims[0]
    problem = f"{node.name} has shape {ours} for {total} samples and {theirs} for {rows}"
    fold, rest = divmod(ours[dim], total)
    if len(dims) > 1 or rest or fold * rows != theirs[dim]:
        return problem
    around = node.args[0].all_input_nodes if node.target is operator.getitem else ()
    sources = [n for n in (*around, *node.all_input_nodes) if isinstance(found.get(n), Layout)]
    if node.target in RESHAPES and sources:
        return _reshaped(shape_of(sources[0]), found[sources[0]], ours, dim) or problem
    outers = {found[n].outer for n in sources if shape_of(n)[found[n].dim] == ours[dim]}
    if fold == 1 or not sources:
        return Layout(dim, 1, total)
    return Layout(dim, outers.pop(), total) if len(outers) == 1 else problem


def _reshaped(
    before: tuple[int, ...], layout: Layout, after: tuple[int, ...], dim: int
) -> Layout | None:
    """The layout after a reshape that puts the rows into dimension `dim`; None where it splits a
    row.
    """
    inner = before[layout.dim] // (layout.outer * layout.rows)
    block = inner * math.prod(before[layout.dim + 1 :])  # numbers from a row to the next
    inner, rest = divmod(block, math.prod(after[dim + 1 :]))
    if rest or not inner or after[dim] % (layout.rows * inner):
        return None
    return Layout(dim, after[dim] // (layout.rows * inner), layout.rows)


def find_saved(joint: Joint, layouts: dict[Node, Layout | str | None]) -> list[Node]:
    """Where to cut: the nodes of the forward that the backward is handed, inputs among them.

    A view is made again, not saved. So is what follows number by number from one saved tensor, such
    as an activation function's output. What contains a mean over rows is always saved: the backward
    would take that mean over other rows. Raises CannotTrace where rows cannot be gathered.
    """
    late = joint.late
    needed = {n for node in late for n in node.all_input_nodes if n not in late}
    needed |= {n for n in joint.gradients if n is not None and n not in late}
    saved: dict[Node, None] = {}
    for node in _bases(joint.nodes, needed, layouts):
        leaves = None if node.op == "placeholder" else _leaves(node, saved, layouts)
        saved.update(dict.fromkeys([node] if leaves is None else leaves))
    for node in saved:
        if isinstance(layouts[node], str):
            raise CannotTrace(layouts[node])
    return list(saved)


def _remade(node: Node, layouts: dict[Node, Layout | str | None]) -> bool:
    """Whether a node may be computed again from fewer rows: each of its rows needs no other."""
    has_rows = [layouts[n] is not None for n in node.all_input_nodes]
    return isinstance(layouts[node], Layout) or not any(has_rows)


def _bases(
    nodes: list[Node], needed: set[Node], layouts: dict[Node, Layout | str | None]
) -> list[Node]:
    """The needed nodes, in their order. For a view it is what it is a view of; a constant is left
    out. A copy in a larger type counts as a view: the original takes less memory.
    """
    found = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        constant = node.op == "get_attr" or (
            node.op == "call_function" and not node.all_input_nodes and not is_random(node)
        )
        if (is_view(node) or is_widened(node)) and _remade(node, layouts):
            stack += node.all_input_nodes
        elif not constant:
            found.add(node)
    return [node for node in nodes if node in found]


def _leaves(
    node: Node, saved: dict[Node, None], layouts: dict[Node, Layout | str | None]
) -> set[Node] | None:
    """From what to make a node again; None where it has to be saved. Of the inputs that carry rows
    at most one may be as large as the node.
    """
    if layouts[node] is None or not is_pointwise(node):
        return None
    leaves = set()
    seen = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder" or n in saved:
            leaves.add(n)
        elif (is_pointwise(n) or is_view(n)) and _remade(n, layouts):
            stack += n.all_input_nodes
        elif n.op != "get_attr":
            return None
    size = math.prod(shape_of(node))
    large = [n for n in leaves if 4 * math.prod(shape_of(n)) >= size and layouts[n] is not None]
    return leaves if len(large) <= 1 else None


def in_float32(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with float32 wherever it asks for a type of half the bytes."""

    def widened(value: Any) -> Any:
        return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value

    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node in graph.nodes:
        node.args = tree_map(widened, node.args)
        node.kwargs = tree_map(widened, node.kwargs)
    return fx.GraphModule(module, graph)


def is_attention(node: Node) -> bool:
    """Whether it is attention in one fused kernel, forward or backward."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and "scaled_dot_product" in schema.name


def drops_in_attention(node: Node) -> bool:
    """Whether it is attention with dropout in one fused kernel."""
    if not is_attention(node):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("dropout_p", 0.0) > 0
