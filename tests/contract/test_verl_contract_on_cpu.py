"""What this package relies on in verl, and that it relies on nothing else."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from rredcot_verl import compat

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rredcot_verl"
INSTALLED_SYMBOLS = {**compat.SYMBOLS, **compat.CPU_SYMBOLS, **compat.SERVER_SYMBOLS}
ALL_SYMBOLS = {**INSTALLED_SYMBOLS, **compat.MEGATRON_SYMBOLS, **compat.VLLM_SYMBOLS, **compat.SGLANG_SYMBOLS}


def _imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every `from module import name` and `import module` in a file, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return found


def test_every_symbol_is_in_the_installed_verl():
    assert compat.check_symbols(INSTALLED_SYMBOLS) == []


def test_every_symbol_is_in_the_installed_megatron():
    pytest.importorskip("megatron.core", reason="needs megatron-core: pip install '.[megatron]'")
    assert compat.check_symbols(compat.MEGATRON_SYMBOLS) == []


@pytest.mark.parametrize(
    "name, parameters, word",
    [
        ("verl.no_such_module:x", (), "No module"),
        ("verl.trainer.ppo.core_algos:no_such_function", (), "no attribute"),
        ("verl.trainer.ppo.core_algos:register_adv_est", ("no_such_parameter",), "no_such_parameter"),
        ("verl.experimental.agent_loop:AgentLoopOutput", ("no_such_field",), "no_such_field"),
        ("verl.trainer.ppo.v1.trainer_base:PPOTrainer.no_such_attribute", (), "no attribute"),
    ],
)
def test_a_missing_symbol_is_named(name, parameters, word):
    (fault,) = compat.check_symbols({name: parameters})
    assert name in fault and word in fault


def test_what_only_instances_have_is_found_in_the_code_of_their_class():
    symbols = {f"verl.trainer.ppo.v1.trainer_base:PPOTrainer.{name}": () for name in ("config", "global_steps")}
    assert compat.check_symbols(symbols) == []


def test_the_table_names_every_verl_import_of_the_package():
    modules_and_names = {tuple(symbol.replace(":", ".", 1).split(".")) for symbol in ALL_SYMBOLS}
    for path in PACKAGE.rglob("*.py"):
        for module, name in _imports(path):
            if module.split(".")[0] != "verl":
                continue
            wanted = (*module.split("."), *([name] if name else []))
            listed = any(symbol[: len(wanted)] == wanted for symbol in modules_and_names)
            assert listed, f"{path.relative_to(ROOT)}: {'.'.join(wanted)} is not in rredcot_verl/compat.py"


def test_hooks_name_verl_modules_and_our_functions():
    from rredcot_verl import cpu, register

    for verl_module, target in {**register.HOOKS, **cpu.HOOKS}.items():
        if "megatron" not in verl_module or importlib.util.find_spec("megatron") is not None:
            __import__(verl_module)
        module, function = target.split(":")
        parameters = inspect.signature(getattr(__import__(module, fromlist=[function]), function)).parameters
        assert len(parameters) == 1, f"{target} takes the verl module"


def test_required_verl_is_the_same_everywhere():
    required = (ROOT / "REQUIRED_VERL.txt").read_text().strip()
    assert required == f"verl=={compat.REQUIRED_VERL}"
    assert f'"{required}"' in (ROOT / "pyproject.toml").read_text()


def test_no_assignment_into_verl():
    """No monkey patch: the package assigns to no attribute of a verl, Ray, vLLM, Megatron or transformers module."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        foreign = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).split(".")[0]
            in ("verl", "ray", "transformers", "vllm", "megatron")
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in foreign, f"{path}:{node.lineno} assigns to {ast.unparse(target)}"


def _modules_after(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; print('\\n'.join(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {line.split(".")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("package", ["core", "readout"])
def test_the_maths_imports_torch_and_nothing_else(package):
    loaded = _modules_after(
        f"import torch; before = set(sys.modules); import pkgutil, importlib, rredcot_verl.{package} as c; "
        f"[importlib.import_module(f'rredcot_verl.{package}.{{m.name}}') for m in pkgutil.iter_modules(c.__path__)]"
    )
    third_party = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party <= {"rredcot_verl", "torch"}, third_party


def test_verifiers_import_nothing_heavy():
    """They are loaded by every reward worker, and start processes of their own."""
    loaded = _modules_after("import rredcot_verl.rewards.math, rredcot_verl.rewards.code")
    assert not loaded & {"torch", "verl", "ray", "transformers", "sympy", "math_verify"}


def test_the_plugin_module_imports_nothing_heavy():
    loaded = _modules_after("import rredcot_verl.register")
    assert not loaded & {"torch", "verl", "ray", "transformers", "pydantic", "hydra", "omegaconf"}
    assert "wrapt" in loaded


MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "readout": set(),
    "config": set(),
    "pages": set(),
    "answers": {"config"},
    "report": {"pages"},
    "probes": {"answers", "core", "config"},
    "passes": {"probes", "core", "config", "live"},
    "servers": {"probes", "core", "config"},
    "sources": {"servers", "passes", "probes", "answers", "readout", "core", "config"},
    "run": {"sources", "servers", "passes", "probes", "answers", "core", "config", "cpu"},
    "agent": {"run", "sources", "servers", "passes", "probes", "answers", "core", "config", "live"},
    "cpu": {"servers", "passes", "probes", "core", "config", "live"},
    "rewards": {"answers", "config"},
    "data": {"rewards", "answers", "probes", "config"},
    "preflight": {
        "data",
        "rewards",
        "run",
        "sources",
        "servers",
        "passes",
        "probes",
        "answers",
        "core",
        "config",
        "cpu",
    },
}
"""Package to what it may import of ours besides itself; CONTRIBUTING.md says the same. The others stand above."""


def test_direction_of_imports():
    """Nobody imports the plugin module, and only those above it the trainer."""
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0]
        for module, _ in _imports(path):
            parts = module.split(".")
            if parts[0] != "rredcot_verl" or len(parts) < 2 or parts[1] == part:
                continue
            assert parts[1] != "register", f"{path.relative_to(ROOT)} imports {module}"
            if part in MAY_IMPORT:
                assert parts[1] in MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {module}"
