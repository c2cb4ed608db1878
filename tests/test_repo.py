"""The repository itself: its size as numbers, its imports, its README's numbers and commands."""

import ast
import io
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import data
import sample
import train
from notebooks import shapes as world

ROOT = Path(__file__).parents[1]
FILES = ("model.py", "train.py", "data.py", "sample.py")
CODE_LINES = 1525  # of the four files; the aim is 1,100
PHYSICAL_LINES = 2225  # the aim is 1,650
TOKENS_A_LINE = 12.0
LONGEST = 50  # lines of a function
PACKAGES = "torch torchvision timm einops tqdm numpy PIL safetensors huggingface_hub filelock"
FORBIDDEN = ("/tmp/", "/work/", "/root/", "/home/", "not to be had", "TODO", "FIXME", "XXX")


def texts():
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


def nodes(tree, *kinds):
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def count(text):
    """(lines that hold code, tokens on them): without blanks, comments and docstrings."""
    tree, skipped = ast.parse(text), "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
    said, lines, tokens, depth = set(), set(), 0, 0
    for node in nodes(tree, ast.Module, ast.ClassDef, ast.FunctionDef):
        if ast.get_docstring(node) is not None:
            said.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if token.start[0] in said or name in skipped:
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
        # an f-string is one token, with all that is inside
        tokens += depth == 0
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return len(lines), tokens


def test_the_counter_by_hand():
    """Four lines of code with 12 tokens among comments, blanks and docstrings."""
    text = '"""Doc."""\n\n# no\nx = (\n    1,  # yes\n)\n\ndef f(a):\n    """Doc\n    on."""\n'
    assert count(text) == (4, 12)
    assert count('x = f"{a + b} c"\n') == (1, 3)


def test_the_four_files_stay_small():
    assert sorted(FILES) == sorted(path.name for path in ROOT.glob("*.py"))
    counts = [count(text) for text in texts().values()]
    code, tokens = (sum(numbers) for numbers in zip(*counts))
    assert code <= CODE_LINES
    assert sum(len(text.splitlines()) for text in texts().values()) <= PHYSICAL_LINES
    assert tokens / code <= TOKENS_A_LINE
    assert max(lines for lines, _ in counts) <= 490  # the aim is 480


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short_and_imports_are_named(name):
    """Each file says what it is. It imports the standard library and the listed packages."""
    tree = ast.parse(texts()[name])
    assert ast.get_docstring(tree)
    long = [f for f in nodes(tree, ast.FunctionDef) if f.end_lineno - f.lineno >= LONGEST]
    assert not [f.name for f in long]
    allowed = {*PACKAGES.split(), *sys.stdlib_module_names, *(file[:-3] for file in FILES)}
    modules = [node.module for node in nodes(tree, ast.ImportFrom)]
    modules += [alias.name for node in nodes(tree, ast.Import) for alias in node.names]
    assert {module.split(".")[0] for module in modules} <= allowed


QUIET = """
import sys, torch, timm, torchvision, PIL.Image, PIL.ImageFile
def state():
    return (torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(),
            PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, sys.argv)
before = state()
import model, train, data, sample
assert state() == before, (before, state())
"""


def test_importing_does_nothing():
    """It prints nothing, and changes no setting of torch or Pillow."""
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_style_is_checked():
    """ruff finds nothing to say."""
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or shutil.which("ruff")
    if not ruff:
        pytest.skip("ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        told = subprocess.run([ruff, *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0, told.stdout + told.stderr


def test_requirements_have_lower_bounds():
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            assert re.fullmatch(r"-r \S+|[\w-]+>=[\d.]+", line), line


def test_no_data_and_no_path_of_a_machine_is_committed():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for path in filter(Path.is_file, map(ROOT.joinpath, listed.stdout.splitlines())):
        assert path.stat().st_size < 20e6 and path.suffix not in (".tar", ".npy", ".pt"), path
        if path.suffix in (".py", ".md", ".flags", ".toml", ".txt") and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in FORBIDDEN if word in text], path


# ---------------------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"^ *```\w*\n(.*?)^ *```", README, re.M | re.S))


def commands():
    """The words of each `python FILE.py ...` of README's blocks and of the Makefile."""
    makefile = (ROOT / "Makefile").read_text().replace("$(RUN)", "python").replace("\t", "")
    for line in f"{BLOCKS}\n{makefile}".replace("\\\n", " ").splitlines():
        found = re.search(r"(?:python3?|torchrun(?: --?[\w-]+ ?\d*)*) (\S+\.py\b.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


def test_the_readme_is_short_and_its_file_guide_has_the_counter_s_numbers():
    """A row for each file, with its lines of code."""
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1800
    toys = {"notebooks/shapes.py": Path(world.__file__).read_text(encoding="utf-8")}
    for name, text in (texts() | toys).items():
        (row,) = re.findall(rf"^\| *`?{name}`? *\|.*", README, re.M)
        assert count(text)[0] in map(int, re.findall(r"\d+", row)), (name, count(text)[0])


def test_every_command_parses(capsys):
    """Each program exists and knows the flags."""
    shown = list(commands())
    settings = {"train.py": train.Config, "sample.py": sample.Settings}
    settings |= {"data.py": data.Photos, "notebooks/shapes.py": world.Shapes}
    assert {name for name, *_ in shown} >= settings.keys()
    for name, *words in shown:
        assert (ROOT / name).exists(), name
        words = [word.replace("@", f"@{ROOT}/") for word in words]
        if name in settings and words != ["..."]:
            try:
                data.parse(settings[name], "", words)
            except SystemExit as stop:
                assert stop.code == 0, f"{name} {words}: {capsys.readouterr().err}"


def test_links_anchors_and_targets_exist():
    headings = re.findall(r"^#+ (.+)", README, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not re.match(r"\w+:", link):
            assert (ROOT / link.split("#")[0]).exists(), link
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?:\$ )?make ([\w-]+)", BLOCKS, re.M)) <= targets
