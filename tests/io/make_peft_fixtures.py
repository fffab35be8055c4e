"""Writes `peft_fixtures/`: adapters that PEFT saved, and what their models answer with them.

    python -m venv env && env/bin/pip install torch==2.13.0 peft==0.21.2 transformers==4.57.1
    env/bin/python -m tests.io.make_peft_fixtures

The adapters' tensors are random, those of zero and one included.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import torch

from tests.io import peft_cases, torch_models

FOLDER = Path(__file__).with_name("peft_fixtures")


def main():
    warnings.simplefilter("ignore")
    shutil.rmtree(FOLDER, ignore_errors=True)
    outputs = {}
    for seed, (case, (model, arguments)) in enumerate(peft_cases.CASES.items()):
        torch.manual_seed(seed)
        built = torch_models.build(model)
        plain = torch_models.output(model, built)
        adapted = peft.get_peft_model(built, peft.LoraConfig(**arguments)).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 4)
        outputs[case] = torch_models.output(model, adapted)
        moved = np.abs(outputs[case] - plain).max()
        adapted.save_pretrained(FOLDER / case)
        (FOLDER / case / "README.md").unlink()
        print(f"{case:20s} {moved:.2f}")
        assert moved > 0.1, "the adapter does too little to be told from none"
    np.savez_compressed(FOLDER / "outputs.npz", **outputs)


if __name__ == "__main__":
    main()
