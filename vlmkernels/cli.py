"""The `vlmkernels` command. Each command is one function here; what it needs is imported inside."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmkernels.recipes.cli import train_app
from vlmkernels.recipes.digits.cli import demo

if TYPE_CHECKING:
    import torch

    from vlmkernels.models.chat import Chat

app = typer.Typer(
    help="Vision-language models on fused kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo)
app.add_typer(train_app, name="train")


@app.command()
def info(
    verbose: Annotated[bool, typer.Option(help="Also the tiles of the attention kernels.")] = False,
) -> None:
    """Show the version, how it was built, and which backend every op takes on this machine."""
    from vlmkernels.info import report

    print(report(verbose))


@app.command()
def models() -> None:
    """List the models: sizes, what they take and give, and how complete they are."""
    from vlmkernels.models import MODELS

    rows = [(m.title, m.does, ", ".join(m.sizes), m.status, m.paper) for m in MODELS.values()]
    rows.insert(0, ("model", "does", "sizes", "status", "paper"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may repeat.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Directory of frames.")] = None,
    video_fps: Annotated[
        float | None, typer.Option(help="Frames per second in them; two a second are taken.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.")] = 512,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer after this text; may repeat.")
    ] = None,
    num_beams: Annotated[
        int, typer.Option(help="Above 1: so many answers go on together, the best is shown.")
    ] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a sampled answer.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, ...; the checkpoint's if empty.")] = "",
) -> None:
    """Ask a question about images and videos; the answer appears as it is made, beams at once."""
    from vlmkernels.models import load, load_processor
    from vlmkernels.models.beam_search import Beams
    from vlmkernels.models.chat import ChatProcessor
    from vlmkernels.models.generation import Sampling, expect_no_sampling, stream_text

    where, computed_in = _device(device), _dtype(dtype)
    Sampling(temperature, None, top_p).expect_drawing(seed=seed)  # before the long loading
    if Beams(num_beams).num_beams > 1:
        expect_no_sampling({"temperature": temperature})
    processor = load_processor(model)
    pictures = [("image", p) for p in image or []] + [("video", p) for p in video or []]
    content = [{"type": kind, kind: path} for kind, path in pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    if not isinstance(processor, ChatProcessor):
        raise ValueError(f"model: expected one that answers in text, got {model}")
    options = {} if video_fps is None else {"video_fps": video_fps}
    inputs = processor.from_messages([message], **options)
    loaded = _generator(load(model, dtype=computed_in, device=where), model)
    how = {"temperature": temperature, "top_p": top_p, "seed": seed}
    asked: dict[str, Any] = {**inputs, "stop_strings": stop, "tokenizer": processor.tokenizer}
    asked |= {"max_new_tokens": max_new_tokens}
    if num_beams == 1:
        steps = loaded.generate_steps(**how, **asked)
    else:
        tokens = loaded.generate(num_beams=num_beams, **asked)
        steps = tokens[:, loaded.before_answer(inputs, 1).shape[1] :].T
    for piece in stream_text(processor.tokenizer, steps):
        print(piece, end="", flush=True)
    print()


@app.command()
def chat(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may repeat.")] = None,
    system: Annotated[str | None, typer.Option(help="Text before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 512,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer after this text; may repeat.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats sampled answers.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, ...; the checkpoint's if empty.")] = "",
) -> None:
    """Talk about images: a question a line. "/image FILE" shows another one with the next question,
    "/draw FILE" saves the last with the boxes of the answer; an empty line ends."""
    from vlmkernels.models import load, load_processor
    from vlmkernels.models.chat import Chat, ChatProcessor
    from vlmkernels.models.generation import Sampling

    where, computed_in = _device(device), _dtype(dtype)
    Sampling(temperature, None, top_p).expect_drawing(seed=seed)  # before the long loading
    processor = load_processor(model)
    if not isinstance(processor, ChatProcessor):
        raise ValueError(f"model: expected one that answers in text, got {model}")
    loaded = _generator(load(model, dtype=computed_in, device=where), model)
    talk = Chat(loaded, processor, system)
    options = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop_strings": stop}
    options |= {"max_new_tokens": max_new_tokens}
    shown: list[Path] = list(image or [])
    for line in iter(sys.stdin.readline, ""):
        command, _, rest = line.strip().partition(" ")
        if not command:
            return
        try:
            if command == "/image":
                shown.append(Path(rest))
            elif command == "/draw":
                _draw(talk, Path(rest))
            else:
                for piece in talk.stream(line.strip(), shown, **options):
                    print(piece, end="", flush=True)
                print()
                shown = []
        except (ValueError, OSError) as error:
            if not sys.stdin.isatty():
                raise
            dropped = f" ({len(shown)} images to show are dropped)" if shown else ""
            print(f"{error}{dropped}", file=sys.stderr)
            shown = []


def _generator(loaded: Any, path: Path) -> Any:
    from vlmkernels.models.generation import Generates

    if not isinstance(loaded, Generates):
        raise ValueError(f"model: expected one that answers in text, got {path}")
    return loaded


def _draw(talk: Chat, file: Path) -> None:
    from vlmkernels.models.qwen_vl import draw

    picture = talk.last_image()
    if picture is None:
        raise ValueError("/draw: expected an answer about an image before, found none")
    draw(picture, talk.messages[-1]["content"][0]["text"]).save(file)


@app.command()
def classify(
    model: Annotated[Path, typer.Option(help="Checkpoint directory of a CLIP or a ViT.")],
    image: Annotated[list[Path], typer.Option(help="Image file; may repeat.")],
    labels: Annotated[str, typer.Option(help="CLIP: names with commas between them.")] = "",
    template: Annotated[
        list[str] | None, typer.Option(help="CLIP: prompt with {} for the name; may repeat.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many to show.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, ...; the checkpoint's if empty.")] = "",
) -> None:
    """Say what images show, the likeliest first: of the labels given (CLIP) or learnt (ViT)."""
    from vlmkernels.models import load, load_processor
    from vlmkernels.models.classify import classify as rank

    where, computed_in = _device(device), _dtype(dtype)
    processor, loaded = load_processor(model), load(model, dtype=computed_in, device=where)
    names = [name.strip() for name in labels.split(",") if name.strip()]
    for path, ranking in zip(
        image, rank(loaded, processor, image, names, template or ()), strict=True
    ):
        if len(image) > 1:
            print(path)
        for name, probability in ranking[:top]:
            print(f"{probability:7.2%}  {name}")


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def bench(context: typer.Context) -> None:
    """Measure ops and models against their rivals; `vlmkernels bench --help` tells the options."""
    root = Path(__file__).parent
    places = [root / "_bench", root.parent]  # in a wheel, and in the source tree
    found = [str(place) for place in places if (place / "bench" / "run.py").exists()]
    if not found:
        raise OSError("bench: expected the folder bench/ beside the package, found none")
    sys.path.insert(0, found[0])
    from bench.run import main as run

    run(context.args)


@app.command()
def ring(
    tokens: Annotated[int, typer.Option(help="Tokens of the whole sequence.")] = 1 << 20,
    ranks: Annotated[int, typer.Option(help="GPUs that share it.")] = 16,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    heads_k: Annotated[int, typer.Option(help="Key heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    document: Annotated[int, typer.Option(help="Length of packed documents; 0: one.")] = 0,
    bandwidth: Annotated[float, typer.Option(help="GB/s per direction and GPU.")] = 360.0,
    flops: Annotated[float, typer.Option(help="TFLOP/s that attention achieves.")] = 600.0,
) -> None:
    """Derive compute, transfers and memory of one causal attention layer, forward and backward."""
    from vlmkernels.distributed.costs import show_costs

    show_costs(tokens, ranks, heads, heads_k, head_dim, document, bandwidth, flops)


def _device(name: str) -> torch.device:
    import torch

    gpus = torch.cuda.device_count()
    name = name or ("cuda" if gpus else "cpu")
    # Read here, not by torch: it keeps eight bits of the number, and cuda:256 would be cuda:0.
    match = re.fullmatch(r"cpu(?::0)?|cuda(?::(?P<index>0|[1-9][0-9]*))?", name)
    if match is None:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cuda") and int(match["index"] or 0) >= gpus:
        raise ValueError(f"device: expected one that is there, got {name!r} with {gpus} GPUs")
    return torch.device(name)


def _dtype(name: str) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point one such as bfloat16, got {name!r}")
    return dtype


def main() -> None:
    """Run the command line. Exit code 2: the arguments or files are at fault; 1: the run failed."""
    try:
        app()
    except (ValueError, TypeError) as error:
        _fail(error, 2)
    except (RuntimeError, OSError, ImportError) as error:  # an optional package may be missing
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    print(f"vlmkernels: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
