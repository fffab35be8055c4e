"""PyTorch PEFT: the same model in PyTorch, its linear layers replaced by `get_peft_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals.problem import (
    HEAD_DIM,
    LEARNING_RATE,
    STEPS,
    TARGETS,
    WEIGHT_DECAY,
    Problem,
    Sizes,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = lambda y: y.view(batch, length, max(1, width // HEAD_DIM), -1).transpose(1, 2)
        normal = self.attention_norm(x)
        query, key, value = (split(f(normal)) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """`benchmarks.model.Transformer`, plain, in PyTorch."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Block(sizes.width) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Step:
    """One eager training step."""

    def __init__(self, problem: Problem) -> None:
        sizes = problem.sizes
        config = LoraConfig(
            r=sizes.rank, lora_alpha=sizes.alpha, lora_dropout=0.0, target_modules=list(TARGETS)
        )
        self.model = get_peft_model(Transformer(sizes), config)
        _load(self.model, problem)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.count = sum(p.numel() for p in trained)
        self.optimiser = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.tokens = torch.from_numpy(problem.tokens).long()

    def __call__(self) -> torch.Tensor:
        self.optimiser.zero_grad()
        logits = self.model(self.tokens)[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def costs(self) -> dict[str, Any]:
        """As the others', with PyTorch's own counters; nothing is traced or compiled."""
        losses = [float(self()) for _ in range(STEPS)]
        with FlopCounterMode(display=False) as counter:
            self()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self()
        return {
            "trace_and_lower": 0.0,
            "compile": 0.0,
            "flops": counter.get_total_flops(),
            "temp_bytes": _peak(profiled),
            "trained": self.count,
            "losses": losses,
        }


def _load(model: nn.Module, problem: Problem) -> None:
    state = model.state_dict()
    values = {_name(path): w for path, w in problem.weights.items()}
    values |= {_name(path, ".lora_A.default"): a for path, a in problem.a.items()}
    values |= {_name(path, ".lora_B.default"): b for path, b in problem.b.items()}
    for name in state:
        short = name.removeprefix("base_model.model.").replace(".base_layer", "")
        value = torch.from_numpy(values.pop(short).copy())
        transposed = value.ndim == 2 and "embed" not in name
        state[name].copy_(value.T if transposed else value)
    if values:
        raise ValueError(f"no place for {sorted(values)}")


def _name(path: str, inside: str = "") -> str:
    *parents, last = path.replace("layer_", "layers/").replace("attention/", "").split("/")
    ending = last if last == "bias" else "weight"
    return ".".join(parents) + f"{inside}.{ending}"


def _peak(profiled: Any) -> int:
    """The most bytes that were allocated at a time, beyond those at the start."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


class Experts(nn.Module):
    """A stack of kernels, one an expert, as mixture-of-experts models hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("etd,edf->etf", x, self.kernel)


class Ragged(Experts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([3, 3, 8], dtype=torch.int32)
        return torch._grouped_mm(x.bfloat16(), self.kernel.bfloat16(), offs=ends)  # noqa: SLF001


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: torch.tanh(self.dense(x)), x, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def structures() -> dict[str, str]:
    """Which structures get factors. PyTorch has no scan and no dense layer of more dims."""
    modules = lambda *names: {"target_modules": list(names)}
    experts = {"target_parameters": ["0.kernel"], "target_modules": []}
    ids, x, images = torch.arange(12)[None], torch.randn(4, 8), torch.randn(2, 3, 8, 8)
    tried: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
        "Dense": (lambda: nn.Sequential(nn.Linear(8, 8)), x, modules("0")),
        "remat": (Checkpointed, x, modules("dense")),
        "embedding": (lambda: nn.Sequential(nn.Embedding(12, 8)), ids, modules("0")),
        "tied output head": (Tied, ids, modules("embed")),
        "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), images, modules("0")),
        "experts, einsum": (lambda: nn.Sequential(Experts()), torch.randn(3, 4, 8), experts),
        "experts, ragged_dot": (lambda: nn.Sequential(Ragged()), torch.randn(8, 8), experts),
    }  # fmt: skip
    answers = {name: _attempt(*case) for name, case in tried.items()}
    none = "n/a: no such structure in PyTorch"
    return answers | {"scan over layers": none, "DenseGeneral": none}


def _whether_the_head_follows(model: Tied) -> str:
    """Whether both uses of the adapted embedding see the factors."""
    rows = model.embed(torch.arange(12))
    same = torch.allclose(model.head(torch.eye(8)).T, rows, atol=1e-6)
    return "yes" if same else "the lookup alone is adapted, the tied head is not"


def _attempt(make: Callable[[], nn.Module], x: torch.Tensor, options: dict[str, Any]) -> str:
    try:
        model = make()
        before = model(x).detach().float()
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))
        factors = [p for p in adapted.parameters() if p.requires_grad]
        for factor in factors:
            factor.data.fill_(0.1)
        after = adapted(x).float()
        if not float((after - before).detach().abs().max()) > 1e-6:
            return "the factors change nothing"
        after.sum().backward()
        if any(f.grad is None or not float(f.grad.abs().max()) > 0 for f in factors):
            return "a factor has no gradient"
        if isinstance(model, Tied):
            return _whether_the_head_follows(model)
    except Exception as error:  # noqa: BLE001 (whatever the library raises is the answer)
        first, *_ = str(error).strip().split("\n")
        return f"{type(error).__name__}: {first}"
    return "yes"
