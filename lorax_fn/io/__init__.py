"""Files: the library's own format, and the folders of Hugging Face PEFT."""

from lorax_fn.io.native import load, save

__all__ = ["load", "save"]
