"""
Docstrings in the style of Hugging Face, as Markdown.

They are Markdown but for their sections (`Args:`, with entries indented below it) and for
references such as [`~trl.GRPOTrainer`]. Parsers of Google's style show their types, which are
Markdown, as text with backticks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import griffe


SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Example:")
WITH_ENTRIES = ("Args:", "Attributes:")
NAME = re.compile(r"(?:^|(?<=\), ))(\*{0,2}\w+)(?= \(|$)")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[)")
API = Path(__file__).parents[1] / "api"


def to_markdown(text: str) -> str:
    """Sections get bold headings, and entries of arguments and attributes make a list."""
    lines: list[str] = []
    section, fenced = "", False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line in SECTIONS:
            section = line
            lines += ["", f"**{line[:-1].replace('Args', 'Arguments')}**", ""]
        elif not section or (line and not line.startswith("    ")):
            section = ""
            lines.append(line)
        elif section in WITH_ENTRIES and re.match(r" {4}\S.*:$", line):
            lines.append("- " + NAME.sub(r"**`\1`**", line.strip()[:-1]) + ":")
        else:
            lines.append(line[4:])
    return "\n".join(lines)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(
        self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs
    ) -> None:
        documented = self._documented(pkg)
        for one in _objects(pkg):
            if one.docstring is not None:
                text = to_markdown(one.docstring.value)
                one.docstring.value = REFERENCE.sub(partial(_link, one, documented), text)

    def _documented(self, package: griffe.Module) -> dict[str, str]:
        """Paths of what the API pages show: by each path, by name, and by `Class.method`."""
        known: dict[str, str] = {}
        for page in API.glob("*.md"):
            for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
                shown = package[path.removeprefix(f"{package.name}.")]
                shown = shown.final_target if shown.is_alias else shown
                known |= dict.fromkeys((path, shown.path, shown.name), shown.path)
                methods = shown.functions if shown.is_class else {}
                for name, method in methods.items():
                    if method.docstring is not None and not name.startswith("_"):
                        known |= dict.fromkeys(
                            (method.path, f"{shown.name}.{name}"), method.path
                        )
        return known


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    for one in parent.members.values():
        if not one.is_alias:
            yield one
            yield from _objects(one)


def _link(where: griffe.Object, documented: dict[str, str], found: re.Match[str]) -> str:
    """A link to what the site documents, plain code for the rest."""
    short, name = found.groups()
    owner = where if where.is_class else where.parent
    for candidate in (name, f"{owner.path}.{name}"):
        if candidate in documented:
            name = name.rpartition(".")[2] if short else name
            return f"[`{name}`][{documented[candidate]}]"
    return f"`{name.rpartition('.')[2] if short else name}`"
