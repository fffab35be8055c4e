"""Files: the library's own format, and the folders of Hugging Face PEFT."""

from lorax_fn.io.native import load, save
from lorax_fn.io.peft_load import load_peft
from lorax_fn.io.peft_save import save_peft
from lorax_fn.io.places import Place

__all__ = ["Place", "load", "load_peft", "save", "save_peft"]
