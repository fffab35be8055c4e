"""Scripts that are run where PyTorch and PEFT are installed are no tests."""

collect_ignore = ["check_peft_loads.py", "make_peft_fixtures.py", "torch_models.py"]
