"""Files that documents quote: between ``<!-- file: PATH -->`` and ``<!-- end -->`` stands the file, as it is.

``python -m tests.embedding`` brings the documents up to date; a test holds them to it.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"<!-- file: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def embedded(text: str) -> str:
    """``text`` with every quoted file as it is now."""

    def block(match: re.Match[str]) -> str:
        path = ROOT / match[1]
        language = {".py": "py", ".toml": "toml"}[path.suffix]
        return f"<!-- file: {match[1]} -->\n```{language}\n{path.read_text(encoding='utf-8')}```\n<!-- end -->"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(embedded(document.read_text(encoding="utf-8")), encoding="utf-8")
