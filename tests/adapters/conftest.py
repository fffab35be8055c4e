"""The scripts that made the references need PyTorch, which the tests do not."""

collect_ignore = ["make_peft_combinations.py", "make_peft_reference.py"]
