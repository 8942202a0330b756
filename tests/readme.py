"""README.md from nbs/index.ipynb: `python tests/readme.py` (or `make readme`) writes it; `render` only computes it.

The outputs of the notebook are used as they are. Pictures become files in nbs/index_files, and links, which in the
notebook start from nbs/, start from the root, so that the page renders on any forge. Directives in a code cell:
`#| hide` leaves the cell out, `#| echo: false` shows only its output, `#| fig-alt: words` names its picture.
"""
import base64
import os
import posixpath
import re
import sys
from pathlib import Path

import nbformat

NOTEBOOK, PAGE, PICTURES = "nbs/index.ipynb", "README.md", "nbs/index_files"
LINK = re.compile(r"(\]\(\s*<?|\b(?:src|href|srcset)=[\"'])([^)\s\"'>]+)")


def from_root(markdown: str) -> str:
    "The same markdown with its relative links moved from nbs/ to the root; code is left alone."
    def moved(match: re.Match) -> str:
        start, link = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", link, re.I): return match.group()
        return start + posixpath.normpath(posixpath.join("nbs", link))
    pieces = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]*`)", markdown, flags=re.M | re.S)
    return "".join(piece if i % 2 else LINK.sub(moved, piece) for i, piece in enumerate(pieces))


def render(root: Path) -> dict[str, bytes]:
    "Path in the repository -> content, for the page and its pictures. Needs nothing but the notebook."
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(root / NOTEBOOK, as_version=4)
    page, files = [], {}
    exporter = MarkdownExporter()
    for cell in notebook.cells:
        if cell.cell_type == "markdown": page.append(from_root(cell.source))
        if cell.cell_type != "code" or not cell.source.strip(): continue
        flags = re.findall(r"^#\|\s*(.*)$", cell.source, flags=re.M)
        if "hide" in flags: continue
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        exporter.exclude_input = "echo: false" in flags or not cell.source
        alt = next((f.split(":", 1)[1].strip() for f in flags if f.startswith("fig-alt:")), "what the code above draws")
        for i, output in enumerate(cell.outputs):
            if "image/png" not in output.get("data", {}): continue
            name = f"{PICTURES}/{len(files)}.png"
            files[name] = base64.b64decode(output.data["image/png"])
            cell.outputs[i] = nbformat.v4.new_output("display_data", {"text/markdown": f"![{alt}]({name})"})
        text, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(metadata=notebook.metadata, cells=[cell]))
        page.append(text.strip("\n"))
    body = "\n\n".join(text.strip("\n") for text in page if text.strip())
    note = f"<!-- made from {NOTEBOOK} by `make readme`; edit the notebook, not this file -->"
    return {PAGE: f"{body}\n\n{note}\n".encode(), **files}


def write(root: Path) -> list[str]:
    "Write the page and its pictures, remove pictures it no longer shows; returns what was written."
    files = render(root)
    for old in (root / PICTURES).glob("*.png"):
        if old.relative_to(root).as_posix() not in files: old.unlink()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return list(files)


def problems(root: Path) -> list[str]:
    "Each file of the README that is missing, differs from what the notebook gives, or is left over."
    if not (root / NOTEBOOK).exists(): return [f"{NOTEBOOK} is missing"]
    files = render(root)
    found = {p.relative_to(root).as_posix() for p in (root / PICTURES).glob("*.png")}
    stale = [n for n, content in files.items() if not (root / n).exists() or (root / n).read_bytes() != content]
    return [f"{n} is not what {NOTEBOOK} gives" for n in stale] + [f"{n} is shown nowhere" for n in sorted(found - {*files})]


if __name__ == "__main__":
    print("wrote", ", ".join(write(Path(os.path.abspath(__file__)).parents[1])))
    sys.exit()
