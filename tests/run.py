"""`make test`: one stage after the other, stopping at the first that fails; pytest last, so that its closing line ends the output.

Needs no git and changes no file: what nbdev would write is written into a copy and compared.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import readme

ROOT = Path(os.path.abspath(__file__)).parents[1]
BIN = Path(sys.executable).parent
# E9, F: does not parse on 3.10, or unknown, unused and shadowed names. The rest are traps: mutable defaults, `except:`, `is "text"`.
RUFF = "check --isolated --no-cache --quiet --target-version py310 --select E9,E722,F,B006,PLE".split()


def sh(command: list, folder: Path, **env: str) -> subprocess.CompletedProcess:
    "Run a tool of this environment in `folder`; output and errors together in `.stdout`."
    command = [str(BIN / command[0]), *map(str, command[1:])]
    env = {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, **env}
    return subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def tree(folder: Path, glob: str) -> dict[str, bytes]:
    "Relative path -> content of the files in `folder` that match, without caches and check-points."
    files = (p.relative_to(folder) for p in folder.glob(glob) if p.is_file())
    return {f.as_posix(): (folder / f).read_bytes() for f in files if not any(part[0] in "._" for part in f.parts[:-1])}


def differences(before: dict[str, bytes], after: dict[str, bytes], extra: str, missing: str, changed: str) -> list[str]:
    "One line for each file that is not the same in both."
    return [f"{name}: {extra if name not in after else missing if name not in before else changed}"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def export_in_sync(root: Path) -> list[str]:
    "What nbdev_export would change in the package, found in a copy that starts from the __init__ files alone."
    with tempfile.TemporaryDirectory() as copy:
        copy = Path(copy).resolve() / root.resolve().name
        shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*", "*_files"))
        shutil.copy(root / "settings.ini", copy)
        before = tree(root / "mae_repro", "**/*.py")
        for name, content in before.items():
            if not name.endswith("__init__.py"): continue
            (copy / "mae_repro" / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / "mae_repro" / name).write_bytes(content)
        done = sh(["nbdev_export"], copy)
        if done.returncode: return ["nbdev_export failed:", done.stdout]
        return differences(before, tree(copy / "mae_repro", "**/*.py"), "no notebook exports it", "not exported yet", "differs from its notebook")


def notebooks_clean(root: Path) -> list[str]:
    "What nbdev_clean would change in the notebooks: counts, metadata, addresses. It keeps outputs."
    with tempfile.TemporaryDirectory() as copy:
        copy = Path(copy).resolve()
        shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*", "*_files"))
        shutil.copy(root / "settings.ini", copy)
        before = tree(root / "nbs", "**/*.ipynb")
        done = sh(["nbdev_clean"], copy)
        if done.returncode or "Failed to clean" in done.stdout: return ["nbdev_clean failed:", done.stdout]
        return differences(before, tree(copy / "nbs", "**/*.ipynb"), "left out", "new", "not clean")


def lint_folder(root: Path) -> list[str]:
    "Mistakes that a linter can see, in the exported modules and the tests."
    done = sh(["ruff", *RUFF, "--output-format", "concise", "mae_repro", "tests"], root)
    return [done.stdout.strip()] if done.returncode else []


def notebooks_run(root: Path) -> list[str]:
    "Every cell of every notebook that is not flagged gpu, slow, data or weights runs, and leaves no file behind."
    before = {*tree(root / "nbs", "**/*")}
    done = sh(["nbdev_test", "--n_workers", "2"], root, OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    if done.returncode or "Success." not in done.stdout: return [done.stdout[-6000:].strip()]
    return [f"nbs/{name}: left behind by a notebook" for name in sorted({*tree(root / "nbs", "**/*")} - before)]


STAGES = [
    ("export in sync", export_in_sync, "run .venv/bin/nbdev_export; modules are never edited by hand, their notebooks are"),
    ("notebooks clean", notebooks_clean, "run .venv/bin/nbdev_clean"),
    ("README fresh", readme.problems, "run make readme"),
    ("ruff", lint_folder, "mend these; a module in its notebook, then run .venv/bin/nbdev_export"),
    ("notebooks run", notebooks_run, "mend these; one alone: .venv/bin/nbdev_test --path nbs/FOLDER/NAME.ipynb"),
]


def main() -> int:
    for name, stage, advice in STAGES:
        start = time.perf_counter()
        found = stage(ROOT)
        print(f"{name:16} {'FAILED' if found else 'ok':6} {time.perf_counter() - start:6.1f} s", flush=True)
        if found:
            print(*found, f"-> {advice}", sep="\n", file=sys.stderr)
            return 1
    return subprocess.call([sys.executable, "-m", "pytest", "-q", "-rs", "tests"], cwd=ROOT, env={**os.environ, "MPLBACKEND": "Agg"})


if __name__ == "__main__":
    sys.exit(main())
