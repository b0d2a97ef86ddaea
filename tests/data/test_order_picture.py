"""The picture of the sample order is one of the order that training has."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def test_the_picture_in_the_docs_is_what_its_script_draws(tmp_path):
    """Drawn again from the order module, it is the same; so it cannot show an order that is no more."""
    drawn = tmp_path / "order.svg"
    subprocess.run(
        [sys.executable, str(ROOT / "docs" / "order_picture.py"), str(drawn)], check=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert drawn.read_text() == (ROOT / "docs" / "order.svg").read_text()
    ElementTree.parse(drawn)
    assert "![" in (ROOT / "docs" / "order.md").read_text()
