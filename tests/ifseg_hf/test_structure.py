"""The structure of the source: sizes of files and functions, and which module imports which."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling", "processing", "ifseg_hf", "scripts")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
LONG_FILES = {"modeling/modeling_ofa.py": 640}
# pip's names of third-party modules, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
# Folders of ifseg_hf, each with the folders that it may import; scripts may import all of them.
MAY_IMPORT = {
    "data": {"data"},
    "visualization": {"visualization"},
    "evaluation": {"evaluation", "data", "visualization"},
    "training": {"training", "evaluation", "data", "visualization"},
    "experiments": {"experiments", "training", "evaluation", "data", "visualization"},
    "nano": {"nano", "experiments", "training", "evaluation", "data", "visualization"},
    "hub": {"hub", "training"},
    "app": {"app", "hub", "training", "evaluation", "data", "visualization"},
    "cli": {"cli", "app", "hub", "experiments", "training", "evaluation", "data", "visualization"},
}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_name(file: Path) -> str:
    """The dotted name by which a file is imported; modeling/ and processing/ are installed inside of ifseg_hf."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] in ("ifseg_hf", "scripts") else ("ifseg_hf", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def import_nodes(tree: ast.AST):
    """Every import statement in a syntax tree except those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from import_nodes(node)


def imported_names(file: Path) -> set[str]:
    """Absolute dotted names of what a file imports: `from a import b` gives `a.b`."""
    names: set[str] = set()
    package = module_name(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    for node in import_nodes(parse(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def project_imports(file: Path) -> set[str]:
    """The project's modules that a file imports."""
    found = set()
    for name in imported_names(file):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found


def third_party(folder: str) -> set[str]:
    """Top-level names of the third-party modules that the files of a folder import."""
    names = set().union(*(imported_names(file) for file in (ROOT / folder).rglob("*.py")))
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"ifseg_hf"}


def assigned_names(file: Path) -> set[str]:
    """Names of the attributes, annotated fields, functions and classes that a file defines."""
    names = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


def test_files_have_at_most_500_lines():
    lines = {file.relative_to(ROOT).as_posix(): len(file.read_text("utf-8").splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > LONG_FILES.get(name, 500)} == {}


def test_functions_have_at_most_80_lines():
    too_long = [
        f"{file.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file in FILES
        for node in ast.walk(parse(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 80
    ]
    assert too_long == []


def test_modules_do_not_import_in_a_cycle():
    graph = {name: project_imports(file) - {name} for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_the_segmentation_model_knows_no_backbone():
    """No import from a file of OFA, and no attribute that only files of OFA define."""
    file = ROOT / "modeling" / "modeling_ifseg.py"
    assert {name for name in imported_names(file) if "ofa" in name.lower()} == set()
    files = set((ROOT / "modeling").glob("*.py"))
    files_of_ofa = {file for file in files if file.stem.endswith("_ofa")}
    of_ofa = set().union(*map(assigned_names, files_of_ofa))
    general = set().union(*map(assigned_names, files - files_of_ofa))
    general |= {"forward", "pad_token_id", "requires_grad", "to", "weight"}  # of torch and transformers
    used = {node.attr for node in ast.walk(parse(file)) if isinstance(node, ast.Attribute)}
    assert used & (of_ofa - general) == set()


@pytest.mark.parametrize("folder", ["modeling", "processing"])
def test_code_of_a_checkpoint_imports_its_folder_only(folder):
    assert third_party(folder) <= {"torch", "transformers", "numpy", "PIL"}
    files = list((ROOT / folder).glob("*.py"))
    for file in files:
        for node in import_nodes(parse(file)):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert not name.startswith("ifseg_hf"), f"{file.name} imports {name}: use a relative import"
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{file.name} imports from outside of its folder"
                assert (ROOT / folder / f"{node.module}.py").is_file(), f"{file.name} imports .{node.module}"
    # A checkpoint has all files in one folder.
    assert [file for file in (ROOT / folder).rglob("*.py") if file not in files] == []


def test_modeling_and_processing_share_no_file_name():
    names = [{file.name for file in (ROOT / folder).glob("*.py")} for folder in ("modeling", "processing")]
    assert names[0] & names[1] == {"__init__.py"}


def test_imports_point_one_way():
    for file in FILES:
        imported = {name.split(".")[0] for name in imported_names(file)}
        assert not imported & {"modeling", "processing", "scripts", "tests"}, file
        _, _, rest = module_name(file).partition("ifseg_hf.")
        folder = rest.split(".")[0]
        if folder in MAY_IMPORT:
            folders = {name.split(".")[1] for name in project_imports(file) if name.count(".") >= 1}
            assert folders & set(MAY_IMPORT) <= MAY_IMPORT[folder], f"{file} imports {folders}"


def test_every_import_is_a_declared_dependency():
    required = {Requirement(line) for line in distribution("ifseg-hf").requires or []}
    always = {canonicalize_name(requirement.name) for requirement in required if requirement.marker is None}
    used = third_party("ifseg_hf") | third_party("modeling") | third_party("processing")
    used = {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in used}
    demo = {canonicalize_name(r.name) for r in required if r.marker and r.marker.evaluate({"extra": "demo"})}
    optional = {"scikit-learn": "sklearn", "scikit-image": "skimage"}
    extras = {
        canonicalize_name(r.name)
        for r in required
        for extra in ("onnx", "peft", "train", "plot", "app")
        if r.marker and r.marker.evaluate({"extra": extra})
    }
    assert {name for name in used if name not in optional.values()} <= always | extras
    assert demo == set(optional)


def test_tested_versions_are_in_the_declared_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in distribution("ifseg-hf").requires or []:
        requirement = Requirement(line)
        if requirement.name != "ifseg-hf":
            assert tested[canonicalize_name(requirement.name)] in requirement.specifier, line
