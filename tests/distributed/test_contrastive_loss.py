"""The contrastive losses over 2 and 4 Gloo processes against one process with the whole batch.

One set of processes computes everything; the tests look at what they saved.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from bench.rivals.contrastive_loss import open_clip_loss
from tests.ops.test_contrastive_loss import clip, inputs, siglip
from vlmkernels import nn

HAS_OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
WORLDS, LOCAL, DIM = (2, 4), 6, 8
MODES = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad


def whole_batch(kind: str, world: int) -> list[Tensor]:
    torch.manual_seed(world)
    return [x.float() for x in inputs(kind, world * LOCAL, DIM, 10.0, -3.0)]


def run(module: torch.nn.Module, kind: str, rank: int, world: int) -> list[Tensor]:
    """This process's loss and gradients; the upstream gradient is 2."""
    image, text, *scalars = whole_batch(kind, world)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    leaves = [x.clone().requires_grad_() for x in (image[mine], text[mine], *scalars)]
    loss = module(*leaves)
    return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", max(WORLDS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=max(WORLDS))
    results: dict[tuple[Any, ...], list[Tensor]] = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        place = {"rank": rank, "world_size": world, "group": group}
        for mode in MODES:
            results["clip", world, *mode] = run(nn.ClipLoss(*mode, **place), "clip", rank, world)
        results["siglip", world] = run(nn.SigLipLoss(**place), "siglip", rank, world)
        for kind, module in (
            ("clip", nn.ClipLoss(False, True, **place)),
            ("siglip", nn.SigLipLoss(**place)),
        ):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            results["compiled", kind, world] = run(compiled, kind, rank, world)
        half = nn.ClipLoss(True, True, **place)
        image, text, scale = whole_batch("clip", world)
        mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
        text = text[mine].bfloat16().requires_grad_()  # a locked image tower, in bf16
        half(image[mine].bfloat16(), text, scale).backward()
        results["locked", world] = [text.grad]
    if HAS_OPEN_CLIP:
        peer = open_clip_loss()
        world = max(WORLDS)
        place = {"rank": rank, "world_size": world}
        for mode in MODES:
            results["peer clip", *mode] = run(peer.ClipLoss(*mode, **place), "clip", rank, world)
        for way in ("bidir", "shift", "gather"):
            module = peer.SigLipLoss(dist_impl=way, **place)
            results["peer siglip", way] = run(module, "siglip", rank, world)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[Any, ...], list[Tensor]]]:
    """Of each process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=max(WORLDS))
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(max(WORLDS))]


def exact(kind: str, world: int) -> list[Tensor]:
    """Loss and gradients of the whole batch on one process, in float64."""
    leaves = [x.double().requires_grad_() for x in whole_batch(kind, world)]
    loss = (clip if kind == "clip" else siglip)(*leaves)
    return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=3e-6, rtol=2e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("local_loss", [False, True])
def test_clip(results: Any, world: int, local_loss: bool) -> None:
    """Averaged over the processes, as DistributedDataParallel does, all is the whole batch's."""
    loss, dimage, dtext, dscale = exact("clip", world)
    ours = [results[rank]["clip", world, local_loss, True] for rank in range(world)]
    close(torch.stack([x[0] for x in ours]).mean(), loss)
    close(torch.cat([x[1] for x in ours]) / world, dimage)
    close(torch.cat([x[2] for x in ours]) / world, dtext)
    close(torch.stack([x[3] for x in ours]).mean(), dscale)
    if not local_loss:
        for mine in ours:
            close(mine[0], loss)


@pytest.mark.parametrize("world", WORLDS)
def test_siglip(results: Any, world: int) -> None:
    loss, dimage, dtext, dscale, dbias = exact("siglip", world)
    ours = [results[rank]["siglip", world] for rank in range(world)]
    close(torch.stack([x[0] for x in ours]).mean(), loss)
    close(torch.cat([x[1] for x in ours]) / world, dimage)
    close(torch.cat([x[2] for x in ours]) / world, dtext)
    close(torch.stack([x[3] for x in ours]).mean(), dscale)
    close(torch.stack([x[4] for x in ours]).mean(), dbias)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("local_loss", [False, True])
def test_clip_without_gathered_gradients(results: Any, world: int, local_loss: bool) -> None:
    """open_clip's two other modes, by what they differentiate: this process's features alone."""
    for rank in range(world):
        image, text, scale = (x.double() for x in whole_batch("clip", world))
        mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
        leaves = [image[mine].clone().requires_grad_(), text[mine].clone().requires_grad_()]
        if local_loss:
            labels = torch.arange(world * LOCAL)[mine]
            by_image, by_text = scale * leaves[0] @ text.T, scale * leaves[1] @ image.T
            entropy = torch.nn.functional.cross_entropy
            loss = (entropy(by_image, labels) + entropy(by_text, labels)) / 2
        else:
            both = [
                torch.cat([x[: mine.start], leaf, x[mine.stop :]])
                for x, leaf in zip((image, text), leaves, strict=True)
            ]
            loss = clip(*both, scale)
        got = results[rank]["clip", world, local_loss, False]
        close(got[0], loss)
        for a, want in zip(got[1:3], torch.autograd.grad(2 * loss, leaves), strict=True):
            close(a, want)
        close(got[3], exact("clip", world)[3])


@pytest.mark.parametrize("world", WORLDS)
def test_one_gradient_in_bf16(results: Any, world: int) -> None:
    image, text, scale = whole_batch("clip", world)
    text = text.bfloat16().double().requires_grad_()
    clip(image.bfloat16().double(), text, scale.double()).backward()
    got = torch.cat([results[rank]["locked", world][0] for rank in range(world)])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double() / world, text.grad, atol=2e-3, rtol=3e-2)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_compile(results: Any, world: int, kind: str) -> None:
    """In one graph, without a break; backward too."""
    eager = ("clip", world, False, True) if kind == "clip" else ("siglip", world)
    for rank in range(world):
        for got, want in zip(
            results[rank]["compiled", kind, world], results[rank][eager], strict=True
        ):
            assert torch.equal(got, want)


def test_open_clip(results: Any) -> None:
    """Its modules on the same processes: all equal, logit_scale's gradient after averaging."""
    world = max(WORLDS)
    if not HAS_OPEN_CLIP:
        pytest.skip("open_clip is not installed")
    for mode in MODES:
        ours = [results[rank]["clip", world, *mode] for rank in range(world)]
        theirs = [results[rank]["peer clip", *mode] for rank in range(world)]
        for mine, peer in zip(ours, theirs, strict=True):
            for got, want in zip(mine[:3], peer[:3], strict=True):
                close(got, want)
        close(ours[0][3], torch.stack([x[3] for x in theirs]).mean())
    for way, rank in itertools.product(("bidir", "shift", "gather"), range(world)):
        for got, want in zip(
            results[rank]["siglip", world], results[rank]["peer siglip", way], strict=True
        ):
            close(got, want)
