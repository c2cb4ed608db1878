"""Pictures, captions and answers from a run, finished or on its way.

    python sample.py "a red circle left of a blue square" "three green circles"
    python sample.py --image picture.png                                      describes it
    python sample.py --image picture.png --ask "how many circles are there?"
    python sample.py --image picture.png --reconstruct    picture -> vectors -> picture
    python sample.py --image picture.png "make the circle blue"               edits it
    python sample.py --chat                                                   all of it, by turns

Without --run the newest run below out/ is used, else the weights that come along. Scores are the
business of tests/shapeseval.py.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data as D
import model as M
from train import ORDER, Config, load_checkpoint


@dataclass(frozen=True)
class Settings:
    """What to do and how: the fields are the flags, the comments their help."""

    prompts: tuple = ()  # texts to draw, or changes of --image, one row of pictures each
    run: str = ""  # folder of a run, or a file of weights
    out: str = "out/samples.png"  # the picture to write
    image: str = ""  # picture file to read
    ask: str = D.DESCRIBE  # question about the picture
    reconstruct: bool = False  # draw the picture again from its vectors
    plan: bool = True  # write what stands where before drawing; "PROMPT | PLAN" brings a plan
    chat: bool = False  # talk: "draw ..." begins a picture, then questions and changes
    seed: int = 0  # of the noise
    count: int = 4  # pictures for each prompt
    steps: int = 8  # of the flow head
    guidance: float = 1.5  # of the flow head; 1 is off
    ode: bool = False  # solve the flow's equation; without, each step draws new noise
    decoder_steps: int = 2  # of the decoder
    decoder_guidance: float = 1.0  # of the decoder; 1 is off

    def __post_init__(self):
        if min(self.count, self.steps, self.decoder_steps) < 1:
            raise ValueError("--count, --steps and --decoder_steps: expected 1 or more")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed {self.seed}: expected 0 to 2147483647")
        if "" in map(D.tidy, self.prompts):
            raise ValueError("a prompt is empty: expected words")


def find_run(given=""):
    """The checkpoint of a run: the given one, else the newest below out/, else the shipped one."""
    runs = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    shipped = Path(__file__).with_name("weights") / "shapes.safetensors"
    path = Path(given) if given else [shipped, *runs][-1]
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"--run {given}: there is no {path}; train.py makes one")
    return path


def row_noise(seeds, shape, device):
    """A source of noise (B, *shape), each row from its own seed: no picture depends on another."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


class Studio:
    """A run, ready to draw and to read. Of an unfinished run, the averages so far."""

    def __init__(self, path, settings=None):
        self.settings = settings or Settings()
        state = load_checkpoint(path)
        progress = state["progress"]
        missing = ORDER[ORDER.index(progress["stage"]) : -1]
        if missing:
            print(f"{path} is on its way; not finished: {', '.join(missing)}")
        self.config = Config(**state["config"])
        self.facts = state["set"]
        self.seconds = progress["seconds"]
        line = self.facts.get("line", D.LINE)
        self.plans = re.compile(f"{line}(; {line})*")
        self.tokenizer = M.Tokenizer(state["words"])
        self.device = D.find_device("auto")
        net = M.BLIP3o(self.config, len(self.tokenizer), self.facts["side"], self.facts["channels"])
        net.load_state_dict(state["model"] | progress["averages"])
        self.net = net.to(self.device).eval().requires_grad_(False)

    def sequences(self, rows):
        ids, _ = M.build_sequences(self.tokenizer, rows, self.config.tokens, self.config.queries)
        return ids.to(self.device)

    def write(self, rows, vectors=None, seeds=None):
        """Continues rows, each with an open answer: greedily, or with chance from seeds."""
        noise = row_noise(seeds, (1,), self.device) if seeds is not None else None
        written = self.net.backbone.write(self.sequences(rows), vectors, noise=noise)
        return [self.tokenizer.decode(row) for row in written]

    def look(self, vectors):
        """Pictures (B, N, C) -> rows that begin with one and with what the backbone sees where."""
        if self.facts["kind"] != "shapes":  # other pictures have no plans
            return [[("image", None)] for _ in vectors]
        row = [("image", None), ("user", D.LOCATE)]
        seen = self.write([[*row, ("bot", None)]] * len(vectors), vectors)
        return [[*row, ("bot", plan)] for plan in seen]

    def begin(self, prompts, vectors=None):
        """Rows that end in prompts, each about a picture if there are vectors."""
        rows = [[] for _ in prompts] if vectors is None else self.look(vectors)
        return [[*row, ("user", D.tidy(text))] for row, text in zip(rows, prompts)]

    def plan(self, prompts, seeds, vectors=None):
        """What pictures will hold and where, a line for each object, written by the backbone.
        With vectors (B, N, C) of pictures, prompts are instructions that change them."""
        rows = [[*row, ("bot", None)] for row in self.begin(prompts, vectors)]
        return self.write(rows, vectors, seeds)

    def generate(self, rows, seeds, vectors=None):
        """Rows of a dialogue -> what the flow head makes next: normalised vectors (B, N, C), or
        latents. vectors (B, N, C) are of the picture in each row, which it changes."""
        s = self.settings
        noise = row_noise(seeds, self.net.head.shape, self.device)
        how = {"steps": s.steps, "guidance": s.guidance, "shift": 4.0, "source": vectors}
        how["fresh_noise"] = None if s.ode else noise
        ids = self.sequences([[*row, ("queries", None)] for row in rows])
        return self.net.generate(ids, noise(), vectors, **how)

    def decode(self, vectors, seeds):
        """Vectors (B, N, C) -> pictures (B, S, S, 3) uint8."""
        s = self.settings
        seeds = [seed + 2**31 for seed in seeds]  # not the head's noise; torch keeps 32 bits
        noise = row_noise(seeds, self.net.decoder.shape, self.device)()
        how = {"steps": s.decoder_steps, "guidance": s.decoder_guidance}
        return self.net.decode(vectors, noise, **how).cpu().numpy()

    def draw(self, prompts, seeds, plans=None, vectors=None):
        """Prompts, a seed for each, and plans unless drawn at once -> pictures (B, S, S, 3) uint8.
        With vectors (B, N, C) of pictures, prompts are instructions that change them."""
        rows = self.begin(prompts, vectors)
        for row, plan in zip(rows, plans or []):
            if plan is not None:
                row.append(("bot", plan))
        made = self.generate(rows, seeds, vectors)
        if self.config.target == "vae":
            return self.net.decode_latents(made).cpu().numpy()
        return self.decode(made, seeds)

    @cached_property
    def tower(self):  # opened where a picture is read: drawing needs none
        tower = D.open_tower(self.facts["tower"], self.config.tokens, self.facts["weights"])
        if tower.tag != self.facts["tag"]:
            raise ValueError(f"the run learned with {self.facts['tag']}, this is {tower.tag}")
        return tower.to(self.device)

    @torch.no_grad()
    def see(self, images):
        """Pictures (B, S, S, 3) uint8, for a tower at its own side -> normalised vectors."""
        images = torch.from_numpy(images).to(self.device)
        if self.net.clip is None:
            return self.net.normalise["clip"](self.tower(images))
        return self.net.normalise["clip"](self.net.clip.vectors(M.to_pixels(images)))

    def open(self, file):
        """A picture file -> the picture (1, S, S, 3) uint8, its normalised vectors (1, N, C)."""
        sides = [self.facts["side"]]
        sides.append(sides[0] if self.net.clip else self.tower.side)
        try:
            small, large = D.open_picture(Path(file).read_bytes(), sides)
        except ValueError as error:
            raise ValueError(f"--image {file}: {error}") from error
        return small[None], self.see(large[None])

    def answer(self, vectors, questions):
        """One answer for each image and question; the question "describe" gives the caption."""
        return self.plan(questions, None, vectors)  # a plan is an answer too


class Chat:
    """A dialogue. The model itself decides what a turn is: where it writes a plan, a picture
    follows. The context is the last picture and what was said since."""

    def __init__(self, studio, vectors=None):
        self.studio = studio
        self.vectors = vectors
        self.row = [] if vectors is None else studio.look(vectors)[0]
        self.seed = studio.settings.seed

    def say(self, text):
        """One turn of the user -> (answer or plan, picture (S, S, 3) uint8 or None)."""
        text = D.tidy(text)
        anew = text.startswith("draw ")
        if anew:
            self.row, self.vectors = [], None
        self.seed += 1
        self.row.append(("user", text.removeprefix("draw ")))
        chance = [self.seed] if anew else None
        said = self.studio.write([[*self.row, ("bot", None)]], self.vectors, chance)[0]
        self.row.append(("bot", said))
        if text == D.LOCATE or not self.studio.plans.fullmatch(said):
            return said, None
        self.vectors = self.studio.generate([self.row], [self.seed], self.vectors)
        self.row = self.studio.look(self.vectors)[0]
        return said, self.studio.decode(self.vectors, [self.seed])[0]


def save_grid(path, images, labels, columns):
    """Rows of pictures (B, S, S, 3), a label under each row; prints the path."""
    scale = max(1, 128 // images.shape[1])
    tile = images.shape[1] * scale + 4  # px
    row = tile + 18  # room for the label
    sheet = Image.new("RGB", (max(columns * tile, 420) + 4, len(labels) * row + 4), "white")
    for i, image in enumerate(images.repeat(scale, 1).repeat(scale, 2)):
        corner = (i % columns * tile + 4, i // columns * row + 4)
        sheet.paste(Image.fromarray(image), corner)
    for i, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((4, i * row + tile + 2), label, fill="black")
    D.write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))
    print(path)


def sample(s):
    """Does what the settings ask for."""
    if not (s.prompts or s.image or s.chat):
        raise ValueError("expected a prompt, --image or --chat; --help lists the flags")
    path = find_run(s.run)
    print(f"weights {path}")
    try:  # before anything is drawn
        Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {s.out}: {error}") from error
    studio = Studio(path, s)
    able = studio.config.target == "clip" and studio.facts["kind"] == "shapes"
    if not able and (s.chat or s.image and s.prompts):
        raise ValueError(f"{path} did not learn to edit: only --target clip on shapes does")
    picture, vectors = studio.open(s.image) if s.image else (None, None)
    if s.chat:
        return talk(studio, vectors)
    if s.prompts:
        draw(studio, picture, vectors)
    elif s.reconstruct:
        again = studio.decode(vectors.expand(s.count, -1, -1), range(s.seed, s.seed + s.count))
        images = np.concatenate([picture, again])
        save_grid(Path(s.out), images, ["the picture, then drawn"], s.count + 1)
    else:
        print(*studio.answer(vectors, [s.ask]))


def split_plan(prompt, plans):
    """PROMPT | PLAN -> (prompt, plan), else (prompt, None). ValueError if a plan has a mistake.
    plans is the pattern of plans."""
    text, _, plan = prompt.rpartition(" | ")
    plan = D.tidy(plan)
    if text and plans.fullmatch(plan):
        return text, plan
    if text and re.search(f"{D.CELL}$", plan):
        raise ValueError(f"{plan!r}: expected a plan as in 'circle red c4; square blue f2'")
    return prompt, None


def draw(studio, picture, vectors):
    """A row of pictures for each prompt; edits stand after the picture that they change."""
    s, rows = studio.settings, []
    own = None if vectors is None else vectors.expand(s.count, -1, -1)
    given = [split_plan(prompt, studio.plans) for prompt in s.prompts]
    for n, (text, plan) in enumerate(given):
        seeds = range(s.seed + n * s.count, s.seed + (n + 1) * s.count)
        texts = [text] * s.count
        plans = [plan] * s.count
        if s.plan and not plan and studio.facts["kind"] == "shapes":
            said = studio.plan(texts, seeds, own)
            plans = [line if studio.plans.fullmatch(line) else None for line in said]
            print(*(f"{text} | {line or 'no plan'}" for line in plans), sep="\n")
        images = studio.draw(texts, seeds, plans, own)
        rows.append(images if picture is None else np.concatenate([picture, images]))
    save_grid(Path(s.out), np.concatenate(rows), s.prompts, len(rows[0]))


def talk(studio, vectors):
    """Turns from the keyboard until an empty line or the end, about --image if there is one."""
    chat, path = Chat(studio, vectors), Path(studio.settings.out)
    with suppress(EOFError):
        while text := input("> ").strip():
            said, picture = chat.say(text)
            print(said)
            if picture is not None:
                save_grid(path, picture[None], [text], 1)


def main(arguments=None):
    with D.plain_errors("sample.py"):
        sample(D.parse(Settings, __doc__, arguments))


if __name__ == "__main__":
    main()
