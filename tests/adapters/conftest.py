"""The script that made the reference needs PyTorch, which the tests do not."""

collect_ignore = ["make_peft_reference.py"]
