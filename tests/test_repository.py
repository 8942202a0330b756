"""The rules of the repository. Each is a function from a folder to a list of problems, and each is shown to find one."""
import ast
import base64
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parent))
import readme
import run

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mae_repro"

# folder or top module of the package -> what it may import, besides itself
BELOW_ANALYSIS = {"parts", "methods", "views", "training", "evaluation"}
ARROWS = {
    "parts": set(),
    "methods": {"parts"},
    "views": {"parts"},
    "training": {"parts", "methods", "views"},
    "evaluation": {"parts", "views", "training"},
    "analysis": BELOW_ANALYSIS,
    "reproduction": {*BELOW_ANALYSIS, "analysis"},
    "ledger": {*BELOW_ANALYSIS, "analysis", "reproduction"},
    "parity": {"parts", "methods"},
    "cli": {*BELOW_ANALYSIS, "analysis", "reproduction", "ledger", "parity"},
}
KB = 1024
NOTEBOOK_BYTES, ALL_NOTEBOOKS_BYTES = 300 * KB, 8 * KB * KB
PARITY_BYTES, WEIGHTS_BYTES = 4 * KB * KB, 2 * KB * KB
FLAGS = {"gpu", "slow", "data", "weights"}
# Written in halves, so that this file does not break its own rule.
HOMES = "|".join(["ho" "me", "ro" "ot", "wo" "rk", "Us" "ers", "tm" "p", "private", "mnt"])
ABSOLUTE = re.compile(rf"(?<![\w.~:/-])/(?:{HOMES})/[\w.]|site-packages[/]|[A-Z]:\\\\?Users")


# ---------------------------------------------------------------- reading a repository

def modules(root: Path) -> dict[str, Path]:
    "Dotted name below the package -> file, for every module that a notebook should export."
    base = root / PACKAGE
    files = (p for p in sorted(base.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py"))
    return {".".join(p.relative_to(base).with_suffix("").parts): p for p in files}


def notebooks(root: Path) -> list[Path]:
    "Every notebook, without Jupyter's check-points."
    return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def cells(notebook: Path, kind: str) -> list[tuple[int, str, dict]]:
    "(number, source, cell) of the cells of one kind."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(i, "".join(c["source"]), c) for i, c in enumerate(found) if c["cell_type"] == kind]


def directives(source: str) -> dict[str, str]:
    "The `#| name value` lines of a cell."
    lines = re.findall(r"^#\|\s*(\S+)[ \t]*(.*)$", source, flags=re.M)
    return {name.rstrip(":"): value.strip() for name, value in lines}


def imports(file: Path, root: Path):
    "(line, dotted name, star) of each import of a module, at any depth; relative ones are made absolute."
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for a in node.names: yield node.lineno, a.name, False
        if isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(x for x in (start, node.module) if x)
            for a in node.names: yield node.lineno, f"{base}.{a.name}", a.name == "*"


def here(path: Path, root: Path) -> str: return path.relative_to(root).as_posix()


# ---------------------------------------------------------------- the rules

def stale_modules(root: Path) -> list[str]:
    "Each module has its notebook and each notebook exports one module, of its own name and folder; numbers are used once."
    found, owners = [], {}
    for nb in notebooks(root):
        name, exported = here(nb, root), False
        defaults, others = [], []
        for i, source, _ in cells(nb, "code"):
            marks = directives(source)
            if "default_exp" in marks: defaults.append(marks["default_exp"])
            for mark in ("export", "exports", "exporti"):
                if mark in marks: exported, others = True, others + ([f"cell {i}"] if marks[mark] else [])
        if len(defaults) > 1: found.append(f"{name} names {len(defaults)} modules; one notebook exports one module")
        if others: found.append(f"{name} exports to another module in {others[0]}")
        if exported and not defaults: found.append(f"{name} exports code but has no `#| default_exp`")
        if not defaults or not exported: continue
        folder = nb.parent.relative_to(root / "nbs").parts
        wanted = ".".join([*folder, re.sub(r"^\d+_", "", nb.stem)])
        if defaults[0] != wanted: found.append(f"{name} exports {defaults[0]}, its place and name say {wanted}")
        if defaults[0] in owners: found.append(f"{name} and {owners[defaults[0]]} export the same module {defaults[0]}")
        owners[defaults[0]] = name
        if defaults[0] not in modules(root): found.append(f"{name} exports {defaults[0]}, which is not there")
    found += [f"{here(file, root)} has no notebook" for mod, file in modules(root).items() if mod not in owners]
    numbers = Counter(m.group() for nb in notebooks(root) if (m := re.match(r"\d+", nb.stem)))
    found += [f"notebook number {n} is used {times} times" for n, times in numbers.items() if times > 1]
    unnumbered = [here(nb, root) for nb in notebooks(root) if not re.match(r"\d\d_", nb.stem) and nb.stem != "index"]
    return found + [f"{nb} has no number" for nb in unnumbered]


def arrows(root: Path) -> list[str]:
    "Imports between the folders of the package go only where ARROWS lets them."
    found = []
    for mod, file in modules(root).items():
        own = mod.split(".")[0]
        if own not in ARROWS: found.append(f"{here(file, root)}: {own} is not in the table of arrows"); continue
        for line, name, _ in imports(file, root):
            parts = name.split(".")
            if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == "__version__": continue
            if parts[1] != own and parts[1] not in ARROWS[own]:
                found.append(f"{here(file, root)}:{line}: {own} may not import {'.'.join(parts[1:])}")
    return found


def foreign_imports(root: Path) -> list[str]:
    "Modules import neither nbdev nor fastcore; nothing is imported by star, in a module, a test or a notebook."
    found = []
    for file in [*modules(root).values(), *sorted((root / "tests").rglob("*.py"))]:
        for line, name, star in imports(file, root):
            where = f"{here(file, root)}:{line}"
            if star: found.append(f"{where}: star import of {name[:-2]}")
            if name.split(".")[0] in ("nbdev", "fastcore", "execnb"): found.append(f"{where}: imports {name}")
    for nb in notebooks(root):
        for i, source, _ in cells(nb, "code"):
            if re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M): found.append(f"{here(nb, root)} cell {i}: star import")
    return found


def notebook_outputs(root: Path) -> list[str]:
    "Outputs are there, small, PNG, without errors, widget state or paths of somebody's machine."
    found, total = [], 0
    for nb in notebooks(root):
        name, size = here(nb, root), nb.stat().st_size
        total += size
        if size > NOTEBOOK_BYTES: found.append(f"{name}: {size // KB} KB, at most {NOTEBOOK_BYTES // KB}")
        if "widgets" in json.loads(nb.read_text(encoding="utf-8"))["metadata"]: found.append(f"{name}: widget state")
        lessons = shown = 0
        for kind in ("markdown", "code", "raw"):
            for i, source, cell in cells(nb, kind):
                where, marks = f"{name} cell {i}", directives(source)
                texts = [source]
                if kind == "code":
                    lessons += bool(source.strip()) and not {"export", "exporti", "default_exp", "hide", *FLAGS} & {*marks}
                    if marks.get("eval", "").lower() == "false": found.append(f"{where}: `eval: false`; flags are {sorted(FLAGS)}")
                for output in cell.get("outputs", []):
                    shown += 1
                    if output["output_type"] == "error": found.append(f"{where}: ends in {output.get('ename')}")
                    texts.append("".join(output.get("text", "")))
                    for mime, data in output.get("data", {}).items():
                        data = data if isinstance(data, str) else "".join(data) if isinstance(data, list) else json.dumps(data)
                        if "widget" in mime: found.append(f"{where}: a widget; show a still picture instead")
                        if re.match("(image|video|audio)/", mime) and mime != "image/png": found.append(f"{where}: {mime}; PNG only")
                        if mime == "image/png" and base64.b64decode(data)[:4] != b"\x89PNG": found.append(f"{where}: broken PNG")
                        if mime.startswith("image/"): continue
                        if re.search(r"data:(image/(?!png)|video|audio)", data): found.append(f"{where}: embedded media that is not PNG")
                        texts.append(re.sub(r"data:[\w/+-]+;base64,[\w+/=\s\\]+", "", data))
                for text in texts:
                    if match := ABSOLUTE.search(text): found.append(f"{where}: absolute path {match.group()}...")
        if lessons and not shown: found.append(f"{name}: has {lessons} lesson cells and no output; execute it")
    if total > ALL_NOTEBOOKS_BYTES: found.append(f"nbs: {total // KB} KB in all, at most {ALL_NOTEBOOKS_BYTES // KB}")
    return found


def import_cells(root: Path) -> list[str]:
    "An exported cell either imports or defines: nbdev treats a cell that does both as imports when it makes docs and tests."
    found = []
    for nb in notebooks(root):
        for i, source, _ in cells(nb, "code"):
            if not {"export", "exporti"} & {*directives(source)}: continue
            kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body}
            if len(kinds) == 2: found.append(f"{here(nb, root)} cell {i}: imports share a cell with other code")
    return found


def data_budgets(root: Path) -> list[str]:
    "data/parity is small; each file of data/pretrained is small; each weights file has a sidecar that says how it was made."
    def said(content) -> set[str]:
        "Keys with a value, at any depth."
        if not isinstance(content, dict): return set()
        return {k for k, v in content.items() if v not in (None, "", {})}.union(*map(said, content.values()))

    found = []
    parity = sum(p.stat().st_size for p in (root / "data/parity").rglob("*") if p.is_file())
    if parity > PARITY_BYTES: found.append(f"data/parity: {parity // KB} KB, at most {PARITY_BYTES // KB}")
    for file in sorted(p for p in (root / "data/pretrained").rglob("*") if p.is_file()):
        name, size = here(file, root), file.stat().st_size
        if size > WEIGHTS_BYTES: found.append(f"{name}: {size // KB} KB, at most {WEIGHTS_BYTES // KB}")
        if file.suffix in (".json", ".md"): continue
        sidecar = file.with_suffix(".json")
        if not sidecar.exists(): found.append(f"{name}: no {sidecar.name} beside it"); continue
        missing = {"recipe", "seed", "command", "date"} - said(json.loads(sidecar.read_text(encoding="utf-8")))
        if missing: found.append(f"{here(sidecar, root)}: does not say {', '.join(sorted(missing))}")
    return found


def slug(heading: str) -> str:
    "The anchor that forges give a heading."
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


def dead_links(root: Path) -> list[str]:
    "Relative links and pictures of README.md, of data/README.md and of the notebooks lead to something."
    pages = [(p, p.read_text(encoding="utf-8")) for p in (root / "README.md", root / "data/README.md") if p.exists()]
    pages += [(nb, "\n\n".join(source for _, source, _ in cells(nb, "markdown"))) for nb in notebooks(root)]
    found = [] if (root / "README.md").exists() else ["README.md is missing"]
    for page, text in pages:
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
        anchors = {slug(h) for h in re.findall(r"^#+ (.*)$", text, re.M)}
        for _, link in readme.LINK.findall(text):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z][a-z0-9+.-]*:", link, re.I): continue
            if path.startswith("/") or (path and not (page.parent / unquote(path)).exists()):
                found.append(f"{here(page, root)}: {link} leads nowhere")
            if not path and page.suffix == ".md" and anchor not in anchors: found.append(f"{here(page, root)}: no heading for {link}")
    return found


def machine_paths(root: Path) -> list[str]:
    "No file of the repository names a folder of the machine it was written on."
    wanted = ("mae_repro/**/*.py", "tests/**/*.py", "*.md", "data/**/*.md", "data/**/*.json", "*.ini", "*.txt", "*.toml", "Makefile", ".ci/*", ".github/**/*.yml")
    found = []
    for file in sorted({p for glob in wanted for p in root.glob(glob) if p.is_file()}):
        for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if ABSOLUTE.search(line): found.append(f"{here(file, root)}:{n}: {line.strip()[:80]}")
    return found


def versions(root: Path) -> list[str]:
    "constraints.txt pins what settings.ini asks for, inside its ranges; the package knows its version."
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / "settings.ini", encoding="utf-8")
    cfg, found = parser["DEFAULT"], []
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    pins = {canonicalize_name(r.name): r for r in pinned}
    found += [f"constraints.txt: {r} is not one version" for r in pinned if [s.operator for s in r.specifier] != ["=="] or r.url]
    asked = [Requirement(line) for key in ("requirements", "dev_requirements") for line in cfg[key].split("\n") if line.strip()]
    for need in [*asked, *map(Requirement, ("setuptools>=70", "wheel", "packaging"))]:
        pin = pins.get(canonicalize_name(need.name))
        if not pin: found.append(f"constraints.txt: {need.name} is missing"); continue
        if not all(need.specifier.contains(s.version) for s in pin.specifier): found.append(f"constraints.txt: {pin} is outside {need}")
    if f'__version__ = "{cfg["version"]}"' not in (root / PACKAGE / "__init__.py").read_text(): found.append("__version__ is not that of settings.ini")
    return found


RULES = [stale_modules, arrows, foreign_imports, notebook_outputs, import_cells, data_budgets, dead_links, machine_paths, versions]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_repository_keeps(rule):
    problems = rule(ROOT)
    assert not problems, "\n" + "\n".join(problems)


# ---------------------------------------------------------------- each rule can fail

def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "id": "c", "execution_count": None, "metadata": {}, "source": source.splitlines(True), "outputs": list(outputs)}


def prose(source: str) -> dict: return {"cell_type": "markdown", "id": "m", "metadata": {}, "source": source.splitlines(True)}


def shows(mime: str, data: str) -> dict: return {"output_type": "display_data", "metadata": {}, "data": {mime: data}}


def put(root: Path, name: str, *content, **metadata) -> None:
    "Write a notebook from cells, or any other file from text or bytes."
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".ipynb"):
        for i, cell in enumerate(content): cell["id"] = f"cell-{i}"
        metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}, **metadata}
        content = [json.dumps({"cells": list(content), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1, sort_keys=True) + "\n"]
    path.write_bytes(content[0] if isinstance(content[0], bytes) else content[0].encode())


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
EXPORT = "#| export\ndef one() -> int: return 1"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    "A repository of one module that keeps every rule."
    root = tmp_path_factory.mktemp("sound") / "repository"
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    put(root, "settings.ini", re.sub(r"requirements =\n(    .*\n)+", "requirements =\n    einops>=0.8\n", settings))
    put(root, "constraints.txt", "# pins\neinops==0.8.1\nsetuptools==81.0.0\nwheel==0.45\npackaging==25.0\n")
    put(root, "mae_repro/__init__.py", (ROOT / "mae_repro/__init__.py").read_text())
    put(root, "mae_repro/parts/__init__.py", "")
    put(root, "tests/test_ones.py", "def test_one(): assert True\n")
    picture = code("one()", shows("image/png", PNG))
    put(root, "nbs/parts/01_ones.ipynb", prose("# Ones"), code("#| default_exp parts.ones"), code(EXPORT), picture, prose("[home](../index.ipynb)"))
    put(root, "nbs/index.ipynb", prose("# Title\nSee [ones](parts/01_ones.ipynb), `[no](link)` and [below](#below).\n## Below"), code("#| echo: false\n#| fig-alt: a square\n1", shows("image/png", PNG)))
    put(root, "data/pretrained/a.safetensors", b"x")
    put(root, "data/pretrained/a.json", json.dumps({"config": {}, "made": dict(recipe="mae-tiny", seed=0, command="mae-repro pretrain", date="2026-01-01")}))
    assert run.sh(["nbdev_export"], root).returncode == 0
    readme.write(root)
    return root


@pytest.fixture
def mini(sound, tmp_path):
    "A copy of the sound repository, to break."
    return shutil.copytree(sound, tmp_path / "repository")


def test_the_miniature_keeps_every_rule(mini):
    assert {rule.__name__: rule(mini) for rule in RULES} == {rule.__name__: [] for rule in RULES}
    assert run.export_in_sync(mini) == run.notebooks_clean(mini) == readme.problems(mini) == run.lint_folder(mini) == []


def module(text: str, name: str = "mae_repro/views/photos.py"): return lambda root: put(root, name, text)


def notebook(*cells, name: str = "nbs/views/20_photos.ipynb", **metadata): return lambda root: put(root, name, *cells, **metadata)


MACHINE = "/wo" "rk/mine"
BROKEN = {
    "module without notebook": (stale_modules, module("x = 1"), "photos.py has no notebook"),
    "notebook without module": (stale_modules, notebook(code("#| default_exp views.photos"), code(EXPORT)), "is not there"),
    "module of another folder": (stale_modules, notebook(code("#| default_exp parts.ones"), code(EXPORT)), "say views.photos"),
    "module exported twice": (stale_modules, notebook(code("#| default_exp parts.ones"), code(EXPORT), name="nbs/parts/02_ones.ipynb"), "the same module"),
    "two modules in a notebook": (stale_modules, notebook(code("#| default_exp views.photos\n"), code("#| default_exp views.x"), code(EXPORT)), "names 2 modules"),
    "cell exported elsewhere": (stale_modules, notebook(code("#| default_exp views.photos"), code("#| export parts.ones\nx = 1")), "another module"),
    "export without a module": (stale_modules, notebook(code(EXPORT)), "no `#| default_exp`"),
    "number used twice": (stale_modules, notebook(prose("x"), name="nbs/views/01_photos.ipynb"), "used 2 times"),
    "notebook without number": (stale_modules, notebook(prose("x"), name="nbs/views/photos.ipynb"), "has no number"),
    "arrow upwards": (arrows, module("from ..views.photos import x", "mae_repro/parts/up.py"), "parts may not import views"),
    "arrow sideways": (arrows, module("def f():\n    from mae_repro.methods import mae"), "views may not import methods"),
    "arrow to a method": (arrows, module("from .. import methods", "mae_repro/evaluation/knn.py"), "evaluation may not import methods"),
    "arrow to cli": (arrows, module("import mae_repro.cli", "mae_repro/analysis/report.py"), "analysis may not import cli"),
    "unknown folder": (arrows, module("x = 1", "mae_repro/utils/x.py"), "not in the table"),
    "nbdev imported": (foreign_imports, module("from nbdev.showdoc import show_doc"), "imports nbdev"),
    "fastcore imported": (foreign_imports, module("def f(): import fastcore.basics"), "imports fastcore"),
    "star in a module": (foreign_imports, module("from torch.nn import *"), "star import of torch.nn"),
    "star in a notebook": (foreign_imports, notebook(code("from torch import *")), "star import"),
    "large notebook": (notebook_outputs, notebook(prose("x" * 400_000)), "at most 300"),
    "large notebooks": (notebook_outputs, lambda root: [put(root, f"nbs/parts/{i}_x.ipynb", prose("x" * 290_000)) for i in range(40)], "in all"),
    "svg": (notebook_outputs, notebook(code("1", shows("image/svg+xml", "<svg/>"))), "PNG only"),
    "broken png": (notebook_outputs, notebook(code("1", shows("image/png", "AAAA"))), "broken PNG"),
    "gif in html": (notebook_outputs, notebook(code("1", shows("text/html", "<img src='data:image/gif;base64,AAAA'>"))), "not PNG"),
    "widget": (notebook_outputs, notebook(code("1", shows("application/vnd.jupyter.widget-view+json", "{}"))), "a widget"),
    "widget state": (notebook_outputs, notebook(prose("x"), widgets={}), "widget state"),
    "error": (notebook_outputs, notebook(code("1/0", {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "", "traceback": []})), "ZeroDivisionError"),
    "not executed": (notebook_outputs, notebook(code("1")), "execute it"),
    "eval false": (notebook_outputs, notebook(code("#| eval: false\n1")), "eval: false"),
    "path in a source": (notebook_outputs, notebook(code(f"open('{MACHINE}')", shows("text/plain", "1"))), "absolute path"),
    "path in an output": (notebook_outputs, notebook(code("1", shows("text/plain", f"'{MACHINE}'"))), "absolute path"),
    "imports with code": (import_cells, notebook(code("#| export\nimport os\nx = os.sep")), "imports share a cell"),
    "large vectors": (data_budgets, lambda root: put(root, "data/parity/a.npz", bytes(4_300_000)), "data/parity"),
    "large weights": (data_budgets, lambda root: put(root, "data/pretrained/a.safetensors", bytes(2_200_000)), "at most 2048"),
    "weights without sidecar": (data_budgets, lambda root: put(root, "data/pretrained/b.safetensors", b""), "no b.json"),
    "sidecar without seed": (data_budgets, lambda root: put(root, "data/pretrained/a.json", '{"recipe": "x", "command": "y", "date": "z"}'), "does not say seed"),
    "no README": (dead_links, lambda root: (root / "README.md").unlink(), "README.md is missing"),
    "dead link": (dead_links, lambda root: put(root, "README.md", "[x](nbs/99_none.ipynb)"), "leads nowhere"),
    "dead picture": (dead_links, lambda root: put(root, "README.md", '<img width="9" src="nbs/none.png">'), "leads nowhere"),
    "dead anchor": (dead_links, lambda root: put(root, "README.md", "[x](#none)"), "no heading"),
    "dead link in a notebook": (dead_links, notebook(prose("[next](21_none.ipynb)")), "leads nowhere"),
    "path in a module": (machine_paths, module(f"data = '{MACHINE}'"), "photos.py:1"),
    "pin missing": (versions, lambda root: put(root, "constraints.txt", "setuptools==81.0.0\nwheel==0.45\npackaging==25.0\n"), "einops is missing"),
    "pin out of range": (versions, lambda root: put(root, "constraints.txt", "einops==0.7\nsetuptools==81.0.0\nwheel==0.45\npackaging==25.0\n"), "outside einops"),
    "pin from a host": (versions, lambda root: put(root, "constraints.txt", "einops @ https://example.org/einops.whl\n"), "not one version"),
    "another version": (versions, lambda root: put(root, "mae_repro/__init__.py", "__version__ = '9'"), "__version__"),
    "not exported": (run.export_in_sync, notebook(code("#| default_exp views.photos"), code(EXPORT)), "views/photos.py: not exported yet"),
    "module edited": (run.export_in_sync, module("def one(): return 2", "mae_repro/parts/ones.py"), "ones.py: differs"),
    "module left behind": (run.export_in_sync, module("x = 1"), "views/photos.py: no notebook exports it"),
    "broken notebook": (run.export_in_sync, lambda root: (root / "nbs/views.ipynb").write_text("{"), "nbdev_export failed"),
    "count kept": (run.notebooks_clean, lambda root: put(root, "nbs/views/20_photos.ipynb", {**code("1"), "execution_count": 3}), "20_photos.ipynb: not clean"),
    "metadata kept": (run.notebooks_clean, notebook(prose("x"), authors=["me"]), "20_photos.ipynb: not clean"),
    "notebook unreadable": (run.notebooks_clean, lambda root: (root / "nbs/views.ipynb").write_text("{"), "nbdev_clean failed"),
    "README edited": (readme.problems, lambda root: put(root, "README.md", "# Title\n"), "README.md is not what"),
    "picture gone": (readme.problems, lambda root: (root / "nbs/index_files/0.png").unlink(), "0.png is not what"),
    "picture left over": (readme.problems, lambda root: put(root, "nbs/index_files/9.png", b""), "9.png is shown nowhere"),
    "newer syntax": (run.lint_folder, module("x = f'{'a'}'"), "syntax"),
    "unknown name": (run.lint_folder, module("def f(): return torch"), "F821"),
    "cell that fails": (run.notebooks_run, notebook(code("assert 1 == 2, 'two is not one'")), "two is not one"),
    "cell that litters": (run.notebooks_run, notebook(code("open('litter.txt', 'w').close()")), "litter.txt: left behind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rule_finds(name, mini):
    rule, damage, words = BROKEN[name]
    damage(mini)
    assert words.lower() in "\n".join(rule(mini)).lower()


def test_flagged_cells_are_skipped(mini):
    put(mini, "nbs/views/20_photos.ipynb", *(code(f"#| {flag}\nraise RuntimeError") for flag in sorted(FLAGS)))
    assert run.notebooks_run(mini) == []


def test_readme_is_the_notebook_seen_from_the_root(mini):
    page = (mini / "README.md").read_text()
    assert "[ones](nbs/parts/01_ones.ipynb)" in page and "[below](#below)" in page and "`[no](link)`" in page
    assert "![a square](nbs/index_files/0.png)" in page and "echo" not in page
    assert (mini / "nbs/index_files/0.png").read_bytes() == base64.b64decode(PNG)


# ---------------------------------------------------------------- what pip installs

def test_the_wheel_works_without_the_checkout(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT / name, copy)
    for name in (PACKAGE, "data"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)]
    subprocess.run(pip, check=True, cwd=tmp_path, capture_output=True, text=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel: wheel.extractall(site)
    for folder, to in ((ROOT / PACKAGE, PACKAGE), (ROOT / "data/parity", f"{PACKAGE}/data/parity"), (ROOT / "data/pretrained", f"{PACKAGE}/data/pretrained")):
        wanted = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert wanted <= {p.relative_to(site / to) for p in (site / to).rglob("*")}, f"{to} is not whole in the wheel"
    metadata = next(site.glob("*.dist-info"))
    assert "mae-repro = mae_repro.cli:main" in (metadata / "entry_points.txt").read_text()
    names = [f"{PACKAGE}.{name}" for name in modules(ROOT)]
    script = f"import importlib; mods = [importlib.import_module(n) for n in {names}]; assert all({str(site)!r} in m.__file__ for m in mods)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
