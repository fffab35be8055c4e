"""What an installation promises: a light import, tidy internals, a README that runs as pasted."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lorax_fn as lora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lorax_fn"
README = (ROOT / "README.md").read_text()
MODULES = sorted(PACKAGE.rglob("*.py"))

# The runtime dependencies; jaxlib and the like come in through these.
ALLOWED = {"jax", "flax", "optax", "numpy", "lorax_fn"}
HEAVY = {"torch", "tensorflow", "transformers", "safetensors", "tokenizers", "matplotlib"}


def run_python(code: str, **options) -> str:
    """Standard output of a fresh interpreter."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(module: Path, *, top_level_only: bool) -> set[str]:
    """The full names of what a module imports, as `package.module`."""
    tree = ast.parse(module.read_text())
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sh_blocks(heading: str) -> list[str]:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_imports_at_module_level_only_runtime_dependencies(module):
    third_party = {
        top
        for name in imported(module, top_level_only=True)
        if (top := name.partition(".")[0]) not in sys.stdlib_module_names
    }
    commands = {"typer", "tqdm"} if relative(module) == "lorax_fn/cli/app.py" else set()
    assert third_party <= ALLOWED | commands


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_jax_internals_are_touched_in_compat_only(module):
    internal = {
        name for name in imported(module, top_level_only=False) if name.startswith("jax._src")
    }
    assert not internal or relative(module) == "lorax_fn/interpreter/compat.py"
    assert "jax._src." not in re.sub(r"(import|from) jax\._src\S*", "", module.read_text())


def test_import_loads_no_heavy_package():
    added = run_python(
        "import sys, jax, flax, optax, numpy\n"
        "before = set(sys.modules)\n"
        "import lorax_fn\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    ).split()
    assert "lorax_fn" in added
    unexpected = set(added) - ALLOWED - sys.stdlib_module_names
    assert not unexpected
    assert not HEAVY & set(run_python("import sys, lorax_fn; print(*sys.modules)").split())


def test_import_starts_no_backend():
    started = run_python(
        "import lorax_fn\n"
        "from jax._src.xla_bridge import backends_are_initialized\n"
        "print(backends_are_initialized())"
    )
    assert started == "False\n"


def test_version_is_the_one_in_pyproject():
    declared = re.search(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert importlib.metadata.version("lorax-fn") == declared[1]
    assert f"\n## {declared[1]}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_package_ships_its_type_marker():
    assert (Path(lora.__file__).parent / "py.typed").is_file()


def test_public_names_are_documented():
    undocumented = [name for name in lora.__all__ if not getattr(lora, name).__doc__]
    assert not undocumented


def test_readme_names_every_public_function():
    missing = [name for name in lora.__all__ if not re.search(rf"`[^`\n]*\b{name}\b", README)]
    assert not missing


def test_readme_quickstart_runs_as_pasted(tmp_path):
    [code] = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert max(map(len, code.splitlines())) <= 100
    out = run_python(code, cwd=tmp_path)
    assert float(re.search(r"^loss (\S+)$", out, re.MULTILINE)[1]) < 0.1
    assert re.search(r"attention/query/kernel", out)
    assert float(out.split()[-1]) < 1e-4
    assert not list(tmp_path.iterdir())


def test_readme_arithmetic_is_true():
    kernel = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    rules = [lora.LoRA(r"w", rank=8, alpha=16)]
    factors = jax.eval_shape(lambda key: lora.init(key, kernel, rules), jax.random.key(0))
    adapted = sum(leaf.size for leaf in jax.tree.leaves(factors))
    full = kernel["w"].size
    for figure in (f"{full:,}", f"{adapted:,}", f"**{full // adapted} times**"):
        assert figure in README


@pytest.mark.parametrize(
    ("heading", "ends_with"),
    [("Run it", "python examples/finetune_minilm.py"), ("Test it", "pytest -q -n auto")],
)
def test_readme_has_one_command_under_each_heading(heading, ends_with):
    [command] = sh_blocks(heading)
    [line] = command.splitlines()
    assert line.startswith("python3 -m venv .venv && ")
    assert line.endswith(ends_with)


def test_readme_has_no_other_command():
    assert len(re.findall(r"^```sh$", README, re.MULTILINE)) == 2


def test_files_name_no_machine():
    machine = re.compile(r"(?<![\w.~/-])/(?:work|root|home|opt)/")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|--(?:extra-)?index-url")
    folders = ("lorax_fn", "tests", "examples", "benchmarks", "docs", "notebooks", ".ci")
    files = [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".yaml"}]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    read = {".py", ".md", ".toml", ".yaml", ".json", ".sh", ""}
    ours = [path for path in files if path.suffix in read and "_cache" not in str(path)]
    texts = {relative(path): path.read_text() for path in ours}
    assert "lorax_fn/__init__.py" in texts
    found = [name for name, text in texts.items() if machine.search(text) or registry.search(text)]
    assert not found
