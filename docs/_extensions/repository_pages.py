"""Pages of the site whose source is not in `docs/`: the notebooks, and the measurements."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


LINK = re.compile(r"(?<=\]\()\.\./((?:\.\./)*(?:benchmarks|notebooks)/[\w/]+)\.(?:md|ipynb)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Called by MkDocs once it has found the files of `docs/`."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for uri, content in notebook_page(path).items():
            files.append(File.generated(config, f"notebooks/{uri}", content=content))
    for path in sorted((root / "benchmarks").rglob("*")):
        if path.suffix in (".md", ".png"):
            uri = path.relative_to(root).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Links to these files, as the repository has them, become links to their pages."""
    return LINK.sub(r"\1.md", markdown)


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """A notebook as Markdown, with its pictures: name of a file to its content."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = html_block(output.data["text/html"])
    names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    body, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)
    return {f"{path.stem}.md": body, **resources["outputs"]}


def html_block(html: str) -> str:
    """
    HTML that Markdown leaves as it is.

    It would take indented tags for code, and put all that follows into the paragraph that
    transformers' progress table opens at its end.
    """
    return re.sub(r"^\s+(?=<)|<p>\s*\Z", "", html, flags=re.MULTILINE)
