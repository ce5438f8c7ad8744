"""Forward once: every sample of a batch goes forward, and the chosen rows alone go backward through
what that forward saved.

A step then costs 1 + 2a of a forward for a share a of chosen rows, where scoring by a forward of
its own and training on the chosen costs 1 + 3a. Autograd cannot be handed fewer rows than it saw.
So the joint graph of forward and backward is traced twice, for all rows and for the chosen number,
and both are cut at the same nodes. The forward comes from the first, the backward from the second,
and between them each saved tensor that carries rows is gathered. A tensor carries rows where its
shape differs between the traces.

Without BatchNorm the gradient is autograd's, of the chosen rows. BatchNorm normalises by the
statistics of all rows; for its backward over the chosen ones see `batch_norm_backward`.

Private parts of torch are used here and in `joint_graph` alone: `aot_export_joint_simple`, the tags
and schemas of operators, and the dictionaries of a module's parameters and buffers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.base.errors import one_line
from lab.machine.devices import Normalise, RandomGenerators, compiled
from lab.method.losses import Loss
from lab.models.joint_graph import (
    HALF,
    CannotTrace,
    Joint,
    Tracing,
    aten,
    batch_norm_backward,
    drops_in_attention,
    extract,
    find_layouts,
    find_saved,
    in_float32,
    is_attention,
    shape_of,
    take_rows,
)

TRACE_SECONDS = 120.0  # a ResNet-50 takes 5 on one core, the slowest of timm's that trace about 60


class Rows(NamedTuple):
    """What a forward tells of each sample, [batch] each; `losses` is what the backward is of."""

    losses: Tensor  # the loss that is minimised, float32
    significance: Tensor  # nats, float32
    correct: Tensor  # bool: the predicted class is the label's
    plain: Tensor  # cross-entropy without smoothing, nats
    confidence: Tensor  # the largest probability
    predicted: Tensor  # int64: its class
    targets: Tensor | None  # [batch, classes]: the new rows of a loss that keeps some (see `Loss`)


Compute = Callable[..., Rows]  # model, images, labels and what else `inputs` holds -> Rows


def row_forward(normalise: Normalise, measure: Callable, loss: Loss) -> Compute:
    """What a step computes: model, uint8 images, labels and perhaps rows of the loss -> Rows."""

    def compute(
        model: nn.Module, images: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> Rows:
        with normalise.autocast():
            logits = model(normalise(images))
        losses, plain, targets = loss.of_batch(logits.float(), labels, rows)
        known = logits.detach().float()
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        confidence, predicted = known.softmax(-1).max(-1)
        correct = known.argmax(-1) == classes
        return Rows(losses, measure(known, labels), correct, plain, confidence, predicted, targets)

    return compute


def filled(rows: Tensor, capacity: int, total: int) -> tuple[Tensor, Tensor]:
    """(int64 [capacity] distinct rows, float32 [capacity] weights): first the chosen `rows`, of
    weight 1, then others of the batch, of weight 0. The device is not waited for.
    """
    free = torch.ones(total, device=rows.device).index_fill_(0, rows, 0.0)
    others = free.sort(descending=True, stable=True).indices[: capacity - len(rows)]
    weights = torch.zeros(capacity, device=rows.device)
    weights[: len(rows)] = 1.0
    return torch.cat([rows, others]), weights


# ------------------------------------------------------------------------------------- CUDA graphs


class Captured:
    """A function of tensors as a CUDA graph. Its results live until the next call."""

    def __init__(
        self, function: Callable, fixed: Sequence[Tensor], given: Sequence[Tensor], pool: Any = None
    ):
        """fixed: its first inputs, which stay where they are; given: those that a call brings."""
        self.given = [tensor.clone() for tensor in given]
        inputs = [*fixed, *self.given]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may pin memory meanwhile: the loader's do
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.results = function(*inputs)

    def __call__(self, *given: Tensor) -> list[Any]:
        for place, tensor in zip(self.given, given, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.results


# ------------------------------------------------------------------------------------ Forward once


class ForwardOnce:
    """The forward of all rows of a batch and the backward of some, for one network.

        once = ForwardOnce.build(model, compute, (images, labels), capacity, "default")
        told = once.forward(images, labels)           # Rows: losses, significance, correct, ...
        once.backward(rows, weights)                  # adds to every parameter's .grad

    All batches have one shape. Each number of rows has a backward of its own (`prepare`). The trace
    fixes train and eval mode, `requires_grad`, autocast, and all else that the network's code
    decides by. A changed mode or `requires_grad` is refused; weights may be replaced by others of
    their shape. All activations of the batch are kept until the backward, or the next forward.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: Compute,
        inputs: Sequence[Tensor],
        mode: str,
        seconds: float,
    ):
        """Use `build`, which traces."""
        self.model = model
        self.compute = compute
        self.inputs = tuple(inputs)
        self.mode = "default" if mode == "reduce-overhead" else mode
        self.seconds = seconds
        self.total = len(inputs[0])
        self.device = inputs[0].device
        self.graphs = mode == "reduce-overhead" and self.device.type == "cuda"
        self.captured: Captured | None = None
        self.addresses: list[int] = []  # of the state when it was captured
        parameters = dict(model.named_parameters())
        self.parameters = len(parameters)  # the first so many of the names
        self.names = [*parameters, *dict(model.named_buffers())]
        self.places = [_place(model, name) for name in self.names]
        state = self.state()
        self.frozen = [(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in state]
        self.modes = [(module, module.training) for module in model.modules()]
        self.shapes = [(tensor.shape, tensor.dtype) for tensor in inputs]
        self.exact_attention = False
        self.fields: list[str] = []  # of `Rows` that are not None
        self.parts: dict[int, Joint] = {}  # by the number of rows
        self.backwards: dict[int, Callable] = {}  # likewise: saved, rows, weights -> gradients
        self.replays: dict[int, Captured] = {}  # likewise, as CUDA graphs: rows, weights
        self.saved: list[Tensor] | None = None
        self.lent: set[int] = set()  # addresses of gradients that CUDA graphs will overwrite

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: nn.Module,
        compute: Compute,
        inputs: Sequence[Tensor],
        capacity: int,
        mode: str = "off",
        seconds: float = TRACE_SECONDS,
    ) -> ForwardOnce:
        """Trace, check against autograd, and compile.

        compute: see `row_forward`. inputs: a batch as in training (images, labels, perhaps rows of
        the loss). Its samples are all different; random pixels will do. It is kept for `prepare`.
        capacity: rows of a backward. mode: off, default or reduce-overhead, see `compiled`.
        seconds: how long a trace may take. Weights, buffers and random generators are left as they
        were. Raises CannotTrace with the reason.
        """
        _check_network(model, len(inputs[0]), capacity)
        once = cls(model, compute, inputs, mode, seconds)
        with once._unchanged(), _reasons():
            once._trace_forward(capacity)
            once._check_all_rows()
        once.prepare(capacity)
        return once

    # ---- What a step calls

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Rows:
        """Forward a batch. Updates the network's buffers, once."""
        self._keep_gradients()
        self.saved = None  # frees those of the last batch before there are new ones
        self._check_unchanged(inputs)
        state = self.state()
        with torch.autocast(self.device.type, enabled=False):
            if not self.graphs:
                results = self.run_forward(*state, *inputs)
            else:
                if self.captured is None or self.addresses != _addresses(state):
                    self._capture()
                results = self.captured(*inputs)
                inputs = self.captured.given
        self.saved = self._saved(results, [*state, *inputs])
        return self._rows(results)

    @torch.no_grad()
    def backward(self, rows: Tensor, weights: Tensor) -> None:
        """Add the gradient of sum(weights * losses[rows]) to the parameters' `.grad`.

        rows: int64, as many as were prepared, all different, in any order. weights: float32, one
        each. They hold the divisor of the sum, the weights of the samples and the GradScaler's
        scale. To be called once for each forward.
        """
        saved = self.saved
        if saved is None:
            raise RuntimeError("a backward needs a forward before it")
        if len(rows) not in self.backwards:
            raise ValueError(f"a backward of {len(rows)} rows was not prepared")
        self.saved = None
        with torch.autocast(self.device.type, enabled=False):
            if self.graphs:
                gradients = self.replays[len(rows)](rows, weights)
            else:
                gradients = self.backwards[len(rows)](*saved, rows, weights)
        self._accumulate(gradients)

    def _accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        """Add to `.grad`, in the parameter's own order of strides, as autograd does."""
        sums = []
        added = []
        owned = set()  # a compiler may return one tensor for two equal gradients
        for parameter, gradient in zip(self.state(), gradients, strict=False):
            if gradient is None:
                continue
            alike = gradient.stride() == parameter.stride() and gradient.dtype == parameter.dtype
            if parameter.grad is None and alike and gradient.data_ptr() not in owned:
                parameter.grad = gradient
                owned.add(gradient.data_ptr())
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(parameter.grad)
            added.append(gradient)
        if sums:
            torch._foreach_add_(sums, added)
        if self.graphs:
            self.lent = owned

    def _keep_gradients(self) -> None:
        """Copy the gradients that lie where the next replay writes: an accumulation window may need
        them.
        """
        for parameter in self.state()[: self.parameters] if self.lent else ():
            if parameter.grad is not None and parameter.grad.data_ptr() in self.lent:
                parameter.grad = parameter.grad.clone()
        self.lent = set()

    def state(self) -> list[Tensor]:
        """The parameters and buffers that the network has now, in the order of `names`."""
        return [place[key] for place, key in self.places]

    def _check_unchanged(self, inputs: Sequence[Tensor]) -> None:
        """Raises RuntimeError or ValueError where what was frozen has changed."""
        for module, training in self.modes:
            if module.training != training:
                raise RuntimeError("a module's train or eval mode changed since it was traced")
        for name, tensor, frozen in zip(self.names, self.state(), self.frozen, strict=True):
            if (tensor.shape, tensor.dtype, tensor.requires_grad) != frozen:
                raise RuntimeError(f"{name}: shape, type or requires_grad changed since the trace")
        if [(tensor.shape, tensor.dtype) for tensor in inputs] != self.shapes:
            raise ValueError(f"the batch is not of the shapes that were traced: {self.shapes}")

    def _saved(self, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What a backward takes. inputs: the state and the batch."""
        return [inputs[i] for i in self.given] + list(results[len(self.fields) :])

    def _rows(self, results: Sequence[Tensor]) -> Rows:
        told = dict(zip(self.fields, results, strict=False))
        return Rows(**(dict.fromkeys(Rows._fields) | told))

    # ---- Tracing

    def _trace(self, rows: int) -> Joint:
        """The joint graph for so many rows, of the example's first."""
        several = [torch.cat([tensor, tensor[:1]])[:rows] for tensor in self.inputs]
        layout = torch.channels_last if _is_channels_last(self.inputs[0]) else None
        batch = [tensor.contiguous() for tensor in several]
        batch[0] = batch[0].contiguous(memory_format=layout) if layout else batch[0]
        state = self.state()
        first = {id(tensor): name for name, tensor in zip(self.names, state, strict=True)}
        paths = {  # every path to a tensor: several modules may share one
            f"model.{path}.{key}".replace("..", "."): first[id(tensor)]
            for path, module in self.model.named_modules()
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        }
        whole = _Whole(self.model, self.compute)

        def function(*args: Tensor) -> list[Tensor]:
            given = dict(zip(self.names, args, strict=False))
            buffers = {name: given[name].clone() for name in self.names[self.parameters :]}
            given |= buffers
            given = {path: given[name] for path, name in paths.items()}
            batch = args[len(self.names) :]
            told = functional_call(whole, given, batch, tie_weights=False)._asdict()
            self.fields = [field for field, value in told.items() if value is not None]
            rest = [told[field].detach().clone() for field in self.fields[1:]]
            return [told["losses"], *rest, *buffers.values()]

        fake = FakeTensorMode(allow_non_fake_inputs=True)  # for constants, such as the moments
        args = tuple(fake.from_tensor(t, static_shapes=True) for t in (*state, *batch))
        with torch.enable_grad(), self._kernels(self.seconds):
            module = _joint_tracer()(function, args, trace_joint=True)
        results = len(self.fields) + len(self.names) - self.parameters
        return Joint(module, len(args), results)

    @contextlib.contextmanager
    def _kernels(self, seconds: float = math.inf) -> Iterator[None]:
        """For a trace, and for what is compared with one: BatchNorm without cuDNN, and attention
        with dropout by single operations. A fused kernel keeps a seed, not the mask of each row.
        """
        exact = sdpa_kernel(SDPBackend.MATH) if self.exact_attention else contextlib.nullcontext()
        with Tracing(time.thread_time() + seconds), exact:
            yield

    def _trace_forward(self, capacity: int) -> None:
        """Trace the forward for all rows and for another number, and cut it."""
        full = self._trace(self.total)
        if any(drops_in_attention(node) for node in full.nodes):
            self.exact_attention = True
            full = self._trace(self.total)
        other = capacity if capacity < self.total else self.total + 1
        part = self._trace(other)
        self.full = full
        self.parts = {self.total: full, other: part}
        self.layouts = find_layouts(full, part, self.total, other)
        saved = find_saved(full, self.layouts)
        self.given = [i for i, node in enumerate(full.inputs) if node in saved]
        made = [node for node in saved if node not in full.inputs]
        self.cut = [full.inputs[i] for i in self.given] + made
        told = full.results[: len(self.fields)]
        self.eager_forward = self._forward_graph([*told, *made])
        self.run_forward = compiled(self.eager_forward, self.mode)

    def _forward_graph(self, outputs: Sequence[Node]) -> fx.GraphModule:
        """State and batch -> `outputs`. It writes the buffers that change."""
        full = self.full
        news = dict(zip(full.inputs[self.parameters :], full.results[len(self.fields) :]))  # noqa: B905
        changed = {old: new for old, new in news.items() if not _is_copy_of(new, old)}
        module = extract(full.module, full.inputs, [*outputs, *changed.values()])
        graph = module.graph
        places = dict(zip(full.inputs, graph.nodes, strict=False))
        end = list(graph.nodes)[-1]
        results = list(end.args[0])
        with graph.inserting_before(end):
            for old, new in zip(changed, results[len(outputs) :], strict=True):
                graph.call_function(aten.copy_.default, (places[old], new))
        end.args = (results[: len(outputs)],)
        module.recompile()
        return module

    def _backward_graph(self, part: Joint) -> fx.GraphModule:
        """What the forward saved, rows, weights -> the parameters' gradients."""
        twins = dict(zip(self.full.nodes, part.nodes, strict=True))
        given = [twins[node] for node in self.cut]
        module = extract(part.module, [*given, part.tangent], part.gradients[: self.parameters])
        graph = module.graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        places = list(graph.nodes)[: len(given) + 1]
        with graph.inserting_before(places[-1]):
            rows = graph.placeholder("rows")
        for node, place in zip(self.cut, places, strict=False):
            layout = self.layouts[node]
            if layout is None or not place.users:
                continue
            with graph.inserting_before(min(place.users, key=order.__getitem__)):
                taken = graph.call_function(take_rows, (place, *layout, rows))
            place.replace_all_uses_with(taken, lambda user, taken=taken: user is not taken)
        for node in graph.nodes:
            if node.target is aten.native_batch_norm_backward.default and node.args[7]:
                node.target = batch_norm_backward  # the seventh: in training
        module.recompile()
        return module

    @torch.no_grad()
    def prepare(self, capacity: int) -> None:
        """Trace, check and compile the backward of another number of rows, if there is none yet.

        Raises CannotTrace with the reason.
        """
        if capacity in self.backwards:
            return
        with self._unchanged(), _reasons():
            part = self.parts.get(capacity) or self._trace(capacity)
            if capacity != self.total:
                layouts = find_layouts(self.full, part, self.total, capacity)
                if any(layouts[node] != self.layouts[node] for node in self.cut):
                    raise CannotTrace("its rows lie elsewhere for another number of samples")
            eager = self._backward_graph(part)
            self._check_some_rows(part, eager, capacity)
            backward = compiled(eager, self.mode)
            self._check_compiled(eager, backward, capacity)
            self.backwards[capacity] = backward
            if self.graphs:
                self._capture()

    def _capture(self) -> None:
        """Record the forward and every backward as CUDA graphs, in one memory pool. There, what the
        forward saved stays until a backward has run; a backward may use the rest.
        """
        self.captured = None
        self.replays = {}
        state = self.state()
        with self._unchanged():
            self.captured = Captured(self.run_forward, state, self.inputs)
            results = self.captured(*self.inputs)
            saved = self._saved(results, [*state, *self.captured.given])
            for capacity, backward in self.backwards.items():
                rows = torch.arange(capacity, device=self.device)
                weights = torch.ones(capacity, device=self.device)
                pool = self.captured.graph.pool()
                self.replays[capacity] = Captured(backward, saved, [rows, weights], pool)
        self.addresses = _addresses(state)

    # ---- Checks at the start: a wrong gradient is found before it trains anything

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Leave buffers and random generators as they were. Autocast is off, as in a step: what is
        compiled here then fits there.
        """
        buffers = self.state()[self.parameters :]
        before = [buffer.clone() for buffer in buffers]
        generators = RandomGenerators(self.device)
        states = generators.local_state()
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for (place, key), buffer in zip(self.places[self.parameters :], buffers, strict=True):
                place[key] = buffer  # the network's code may have put another one there
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            generators.load_local_state(states)

    def _weights(self, rows: int) -> Tensor:
        return 0.5 + torch.rand(rows, device=self.device)

    def _check_all_rows(self) -> None:
        """Compare the losses, the buffers and the gradient of all rows with autograd's. The rows
        have another order: it finds a tensor whose rows are not where they are taken to be.
        """
        weights = self._weights(self.total)
        order = torch.randperm(self.total, device=self.device)
        state = self.state()
        trained = state[: self.parameters]
        with self._unchanged():
            with torch.enable_grad(), self._kernels():
                losses = self.compute(self.model, *self.inputs).losses
                wanted = [p for p in trained if p.requires_grad]
                found = torch.autograd.grad((losses * weights).sum(), wanted, allow_unused=True)
            gradients = dict(zip(map(id, wanted), found, strict=True))
            buffers = [buffer.clone() for buffer in self.state()[self.parameters :]]
        results = self.eager_forward(*state, *self.inputs)
        saved = self._saved(results, [*state, *self.inputs])
        self._compare("loss", results[:1], [losses.detach()])
        self._compare("buffer", state[self.parameters :], buffers)
        found = self._backward_graph(self.full)(*saved, order, weights[order])
        self._compare("gradient", found, [gradients.get(id(p)) for p in trained])

    def _check_some_rows(self, part: Joint, backward: fx.GraphModule, capacity: int) -> None:
        """Compare the gradient of some rows with that of a batch of these rows alone. The whole
        batch is made of copies of them, random masks too, so BatchNorm has the same statistics.

        That finds a mean over rows that the backward takes again. With fewer than 8 different
        samples nothing is checked: BatchNorm over so few amplifies rounding. It is done in float32,
        because a deep network with BatchNorm amplifies the rounding of bfloat16: to 95 % of the
        gradient in a ResNet-50 at its start.
        """
        different = math.gcd(self.total, capacity)
        if different < 8 or capacity == self.total:
            return
        full = self.full
        twins = dict(zip(full.nodes, part.nodes, strict=True))
        state = self.state()
        copies = torch.randperm(self.total, device=self.device) % different
        chosen = copies.sort(stable=True).indices.view(different, -1)
        rows = chosen[:, : capacity // different].flatten()
        weights = self._weights(capacity)
        noise = full.noise()
        exact = not any(is_attention(node) for node in full.nodes)  # its kernels take no float32
        plain = in_float32 if exact else lambda module: module
        drawing = plain(extract(full.module, full.inputs, noise))
        made = self.cut[len(self.given) :]
        making = plain(extract(full.module, [*full.inputs, *noise], made))
        given = [*part.inputs, part.tangent, *(twins[n] for n in noise)]
        alone = plain(extract(part.module, given, part.gradients[: self.parameters]))
        batch = [tensor[copies] for tensor in self.inputs]
        few = [tensor[rows] for tensor in batch]
        with without_tf32():
            drawn = drawing(*state, *self.inputs)
            masks = [self._rows_of(n, mask, copies) for n, mask in zip(noise, drawn, strict=True)]
            values = making(*state, *batch, *masks)
            saved = [[*state, *batch][i] for i in self.given] + list(values)
            found = plain(backward)(*saved, rows, weights)
            masks = [self._rows_of(n, mask, rows) for n, mask in zip(noise, masks, strict=True)]
            expected = alone(*state, *few, weights, *masks)
        self._compare("gradient of some rows", found, expected, exact)

    def _rows_of(self, node: Node, value: Tensor, rows: Tensor) -> Tensor:
        layout = self.layouts[node]
        if isinstance(layout, str):
            raise CannotTrace(layout)
        return value if layout is None else take_rows(value, *layout, rows)

    def _check_compiled(self, eager: Callable, backward: Callable, capacity: int) -> None:
        """Compare what is compiled with the graphs it comes from, by the same saved tensors."""
        if backward is eager:
            return
        state = self.state()
        inputs = [*state, *self.inputs]
        results = self.run_forward(*inputs)
        if not self.full.noise():
            self._compare("compiled loss", results[:1], self.eager_forward(*inputs)[:1])
        saved = self._saved(results, inputs)
        rows = torch.randperm(self.total, device=self.device)[:capacity]
        weights = self._weights(capacity)
        found = backward(*saved, rows, weights)
        self._compare("compiled gradient", found, eager(*saved, rows, weights))

    def _compare(
        self,
        what: str,
        found: Sequence[Tensor | None],
        expected: Sequence[Tensor | None],
        exact: bool = False,
    ) -> None:
        """Raises CannotTrace where they differ by more than rounding. exact: by that of float32, of
        which a ResNet-50 on a GPU makes 2 %. Rows in a wrong place give more than 100 %.
        """
        types = {n.meta["val"].dtype for n in self.full.nodes if shape_of(n) is not None}
        allowed = 1e-3 if self.device.type == "cpu" else 1e-2  # TF32
        allowed = 0.25 if types & HALF else allowed
        allowed = 0.1 if exact else allowed
        off = difference(found, expected)
        if not off <= allowed:
            raise CannotTrace(f"its traced {what} is off by {off:.2g} of autograd's")


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 in full on a GPU."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest relative error of a tensor, by norms. To each norm a hundredth of the norm of all
    is added, for small tensors. None counts as zero.
    """
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if not (a is None and b is None)]
    if not pairs:
        return 0.0
    pairs = [(_like(a, b).double(), _like(b, a).double()) for a, b in pairs]
    norms = torch.stack([b.norm() for _, b in pairs])
    errors = torch.stack([(a - b).norm() for a, b in pairs])
    scale = norms + 0.01 * norms.norm()
    return (errors / scale.clamp(min=1e-30)).max().item()


def _like(tensor: Tensor | None, other: Tensor | None) -> Tensor:
    return torch.zeros_like(other) if tensor is None else tensor.detach()


class _Whole(nn.Module):
    """A network and what is computed with it, as one module."""

    def __init__(self, model: nn.Module, compute: Compute):
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Rows:
        return self.compute(self.model, *inputs)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turn what tracing and compiling may raise into one line. A lack of memory is passed on: the
    network may be traceable.
    """
    try:
        yield
    except (CannotTrace, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch's tracing raises anything, and so may a layer
        if "DataDependent" in type(error).__name__:
            raise CannotTrace("its code decides by the values that it computes") from error
        first = str(error).strip().split("\n")[0]
        raise CannotTrace(one_line(f"{type(error).__name__}: {first}", 200)) from error


def _joint_tracer() -> Callable:
    try:
        from torch._functorch.aot_autograd import aot_export_joint_simple
    except ImportError:
        raise CannotTrace(f"torch {torch.__version__} has no aot_export_joint_simple") from None
    return aot_export_joint_simple


def _check_network(model: nn.Module, total: int, capacity: int) -> None:
    """Raises CannotTrace for what is known before tracing."""
    _joint_tracer()
    if not 1 <= capacity <= total or total < 2:
        raise CannotTrace(f"{capacity} rows of a batch of {total}")
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            raise CannotTrace(f"{type(module).__name__} is traced step by step: minutes")
        if isinstance(module, nn.SyncBatchNorm):
            raise CannotTrace("SyncBatchNorm waits for other processes within its backward")


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that a parameter or buffer is in, and its key."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _is_copy_of(node: Node, other: Node) -> bool:
    return node.target is aten.clone.default and node.args[0] is other


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
