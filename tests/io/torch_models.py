"""The models of `peft_cases` in PyTorch."""

import torch
import transformers

from tests.io import peft_cases


class Experts(torch.nn.Module):
    """Every expert on every row; `transposed` as transformers marks parameters of (E, in, out)."""

    def __init__(self, transposed):
        super().__init__()
        e, d, k = peft_cases.EXPERTS, peft_cases.WIDTH, peft_cases.INNER
        up, down = ((e, d, k), (e, k, d)) if transposed else ((e, k, d), (e, d, k))
        self.is_transposed = transposed
        self.up_proj = torch.nn.Parameter(torch.empty(up))
        self.down_proj = torch.nn.Parameter(torch.empty(down))

    def forward(self, x):
        up, down = self.up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return torch.tanh(x @ up) @ down  # (E, rows, d)


class Mixture(torch.nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.router = torch.nn.Linear(peft_cases.WIDTH, peft_cases.EXPERTS)
        self.experts = Experts(transposed)

    def forward(self, x):
        shares = torch.softmax(self.router(x), -1)  # (rows, E)
        return (shares.T[..., None] * self.experts(x)).sum(0)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(peft_cases.WIDTH, peft_cases.INNER)
        self.down = torch.nn.Linear(peft_cases.INNER, peft_cases.WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(peft_cases.LAYERS)))

    def forward(self, x):
        return self.blocks(x)


OWN = {
    "experts": lambda: Mixture(transposed=False),
    "experts-transposed": lambda: Mixture(transposed=True),
    "stack": Stack,
}


def build(model):
    """The model with its weights, in evaluation mode."""
    if model in OWN:
        built = OWN[model]()
    else:
        config, arguments = peft_cases.MODELS[model]
        config = getattr(transformers, config)(**arguments, attn_implementation="eager")
        auto = {
            "bert": transformers.AutoModelForSequenceClassification,
            "vit": transformers.AutoModelForImageClassification,
        }.get(model, transformers.AutoModelForCausalLM)
        built = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(torch.from_numpy(peft_cases.weight(name, tuple(parameter.shape))))
    return built.eval()


def output(model, built):
    """What a model answers to its inputs: logits, or the array that it returns."""
    with torch.no_grad():
        answer = built(torch.from_numpy(peft_cases.inputs(model)))
    return getattr(answer, "logits", answer).numpy()
