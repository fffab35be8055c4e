"""Loads every adapter below a folder into PEFT, and compares the answers with ours.

    python -m tests.io.check_peft_loads FOLDER

The folders are those that `test_written_for_peft.py` writes where `PEFT_FOLDERS` says. Each has the
name of its model before the first "@", and `expected.npy` beside PEFT's two files.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import safetensors.torch

from tests.io import torch_models


def main(root):
    folders = sorted(path.parent for path in Path(root).glob("*/adapter_config.json"))
    for folder in folders:
        model = folder.name.partition("@")[0]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = peft.PeftModel.from_pretrained(torch_models.build(model), folder).eval()
        check_all_loaded(adapted, folder)
        answer, expected = torch_models.output(model, adapted), np.load(folder / "expected.npy")
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4, err_msg=folder.name)
        plain = torch_models.output(model, torch_models.build(model))
        assert np.abs(answer - plain).max() > 0.1, "the adapter does nothing"
        print(f"{folder.name:40s} {np.abs(answer - expected).max():.1e}")
    print(f"{len(folders)} adapters passed")
    assert folders


def check_all_loaded(adapted, folder):
    """Every tensor of the file is in the model, as PEFT itself writes it out."""
    file = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(adapted)
    missing = {name for name in file if name not in state}
    assert not missing, f"{folder.name}: not loaded: {missing}"


if __name__ == "__main__":
    main(sys.argv[1])
