"""The notebooks: short, and they run from a clean kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short(path):
    """At most 60 lines of code, the rest is told in words."""
    notebook = nbformat.read(path, 4)
    lines = [line for cell in code_cells(notebook) for line in cell.source.split("\n")]
    assert len([line for line in lines if line.strip()]) <= 60
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 3


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_the_walkthrough_runs(micro_run, monkeypatch, folder):
    """From a clean kernel on a micro run, in either folder, within 60 s a cell."""
    path = next(path for path in NOTEBOOKS if path.stem == "walkthrough")
    notebook = nbformat.read(path, 4)
    monkeypatch.setenv("NANO_BLIP3O_RUN", str(micro_run))
    folder = str(path.parents[1] / folder)
    NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 10
    assert "our ten steps are sample_flow's: True" in text and "(2, 64, " in text
