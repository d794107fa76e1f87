"""The house: which room may import which, what importing does, and the face it shows."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flex_model
import flex_model.core
from flex_model import errors

PACKAGE = Path(flex_model.__file__).parent
FRAMEWORKS = ("megatron", "fairscale", "transformers", "accelerate")

# Floors from the ground up. A room imports from itself and from floors below, and rooms that share
# a floor do not know each other, but for those named together with what they stand on.
FLOORS = (
    {"errors"},
    {"layouts"},
    {"distributed"},
    {"core"},
    {"report", "loading"},
    {"capture", "importance", "sparsity", "interventions", "testing"},
    {"compress", "pruning"},
    {"cli"},
    {"__main__"},
)
# The package itself is the face of the core.
FACE = "core"


def _files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts]


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return FACE if first == "__init__.py" else first.removesuffix(".py")


def _floor(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    pytest.fail(f"{room} is on no floor of the house: give it one in {__file__}")


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module imported, absolute, and whether inside a function."""
    tree = ast.parse(path.read_text())
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            yield node.module or "", node in lazy


def _rooms_imported(path: Path) -> Iterator[str]:
    for name, _ in _imports(path):
        parts = name.split(".")
        if parts[0] == "flex_model":
            yield parts[1] if len(parts) > 1 else FACE


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_from_floors_below(path: Path) -> None:
    """Catches a floor that leaks: a layout that knows collectives, a core that knows a report."""
    own = _room(path)
    for room in _rooms_imported(path):
        if room == own:
            continue
        assert _floor(room) < _floor(own), f"{own} may not import {room} ({path.name})"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_are_imported_in_their_own_file_alone(path: Path) -> None:
    """Catches a framework that has to be installed, or that is loaded, for another's sake."""
    for name, lazy in _imports(path):
        framework = name.split(".")[0]
        if framework in FRAMEWORKS:
            assert lazy, f"{path.name} imports {framework} as it is loaded"
            assert framework in path.stem, f"{path.name} is not {framework}'s own file"


def test_the_imports_are_found() -> None:
    """Catches a check that passes because it sees nothing."""
    seen = {room for path in _files() for room in _rooms_imported(path)}
    assert {"errors", "layouts", "distributed", "core"} <= seen
    assert next(iter(_imports(Path(__file__)))) == ("ast", False)


@pytest.mark.parametrize("module", ["flex_model", "flex_model.core", "every module"])
def test_importing_loads_no_framework_and_makes_no_group(module: str) -> None:
    """Catches work at import: seconds of loading, or a process group that no caller has made."""
    names = [module]
    if module == "every module":
        names = [_dotted(path) for path in _files() if _room(path) not in ("cli", "__main__")]
    program = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import torch.distributed as dist\n"
        "import torch\n"
        f"loaded = [name for name in {FRAMEWORKS!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not dist.is_initialized()\n"
        "assert torch.get_default_dtype() == torch.float32\n"
        "assert torch.is_grad_enabled()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "importing writes to the terminal"


def _dotted(path: Path) -> str:
    parts = ("flex_model", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("module", ["flex_model", "flex_model.core"])
@pytest.mark.parametrize("name", ["FlexModel", "HookFunction", "DummyModule"])
def test_public_names(module: str, name: str) -> None:
    """Catches a name of flex-model 0.1.0 that is gone, or two different things of one name."""
    found = importlib.import_module(module)
    assert name in found.__all__
    assert getattr(found, name) is getattr(flex_model, name)


# flex-model 0.1.0's signatures: parameters in order with their defaults, as its users wrote them.
SIGNATURES = {
    "FlexModel": (
        "module output_ptr tensor_parallel_size=1 pipeline_parallel_size=1 data_parallel_size=1 "
        "process_group=None"
    ),
    "FlexModel.forward": "*args groups='all' complement=False **kwargs",
    "FlexModel.register_forward_hook": "hook_function",
    "FlexModel.register_forward_pre_hook": "hook_function",
    "FlexModel.register_full_backward_hook": "hook_function",
    "FlexModel.register_full_backward_pre_hook": "hook_function",
    "FlexModel.register_hook": "hook_function",
    "FlexModel.register_trainable_module": "name module",
    "FlexModel.create_hook_group": (
        "group_name group_constructor expected_shape=None editing_function=None unpack_idx=0 "
        "hook_type='forward'"
    ),
    "FlexModel.update_hook_groups": "group_constructor group_name",
    "FlexModel.remove_hook_groups": "group_constructor group_name",
    "FlexModel.get_hook_function_groups": "hook_function",
    "FlexModel.get_group_hook_functions": "group_name",
    "FlexModel.restore": "",
    "HookFunction": "module_name expected_shape=None editing_function=None unpack_idx=0",
    "DummyModule.forward": "inputs",
}


def _spelled(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
    return f"{stars.get(parameter.kind, '')}{parameter.name}{default}"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_0_1_0(name: str) -> None:
    """Catches an argument moved, renamed or given another default: users pass them by position.
    What is new comes behind, by keyword only and with a default.
    """
    found: object = flex_model
    for part in name.split("."):
        found = getattr(found, part)
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]  # type: ignore[arg-type]
    due = SIGNATURES[name].split()
    old = [p for p in parameters if _spelled(p) in due]
    assert [_spelled(p) for p in old] == due
    for parameter in parameters:
        if parameter not in old:
            assert parameter.kind is parameter.KEYWORD_ONLY, f"{parameter} can be given by position"
            assert parameter.default is not parameter.empty, f"{parameter} must be given"


def test_get_module_parameter_takes_what_it_took() -> None:
    """Catches ``get_module_parameter(name, shape)`` by position; the shape may now be left out."""
    signature = inspect.signature(flex_model.FlexModel.get_module_parameter)
    signature.bind(None, "name", (2, 3))
    assert list(signature.parameters)[1:3] == ["parameter_name", "expected_shape"]


@pytest.mark.parametrize("name", ["wrapped_module_names", "trainable_modules_names"])
def test_names_are_properties(name: str) -> None:
    """Catches a property that has to be called."""
    assert isinstance(getattr(flex_model.FlexModel, name), property)
    assert isinstance(flex_model.FlexModel.all_modules_names, property)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_share_a_base_and_are_of_a_built_in_kind(name: str) -> None:
    """Catches an error that ``except FlexModelError``, or the kind callers expect, would miss."""
    error = getattr(errors, name)
    assert issubclass(error, errors.FlexModelError)
    if error is not errors.FlexModelError:
        assert issubclass(error, (ValueError, TypeError, RuntimeError))
        assert inspect.getdoc(error)
