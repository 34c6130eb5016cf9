"""VectorQuantizer against taming's formulas; VectorQuantize against vector-quantize-pytorch."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vlmkernels import nn
from vlmkernels.ops.vq_lookup import nearest

theirs = pytest.importorskip(
    "vector_quantize_pytorch", reason="pip install vector-quantize-pytorch (extra `test`)"
)


def taming(z: Tensor, weight: Tensor, beta: float, legacy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """VectorQuantizer2.forward of taming-transformers, with an exact argmin."""
    rows = z.permute(0, 2, 3, 1).contiguous()
    indices = nearest(rows.view(-1, weight.shape[1]), weight, "euclidean")
    z_q = weight[indices].view(rows.shape)
    to_z, to_codes = (z_q.detach() - rows).square().mean(), (z_q - rows.detach()).square().mean()
    loss = to_z + beta * to_codes if legacy else beta * to_z + to_codes
    z_q = rows + (z_q - rows).detach()
    return z_q.permute(0, 3, 1, 2), loss, indices


@pytest.mark.parametrize("legacy", [True, False])
def test_taming(legacy: bool) -> None:
    ours = nn.VectorQuantizer(32, 8, beta=0.25, legacy=legacy, sane_index_shape=True)
    assert [*ours.state_dict()] == ["embedding.weight"]
    assert ours.embedding.weight.abs().max() <= 1 / 32
    z = torch.randn(2, 8, 5, 3, requires_grad=True)
    z_q, loss, (perplexity, encodings, indices) = ours(z)
    weight = ours.embedding.weight
    want_q, want_loss, want_indices = taming(z, weight, 0.25, legacy)
    assert perplexity is None and encodings is None
    assert torch.equal(indices, want_indices.view(2, 5, 3))
    torch.testing.assert_close((z_q, loss), (want_q, want_loss))
    dz_q = torch.randn_like(z_q)
    for got, want in zip(
        torch.autograd.grad((z_q, loss), (z, weight), (dz_q, loss.new_tensor(2.0))),
        torch.autograd.grad((want_q, want_loss), (z, weight), (dz_q, loss.new_tensor(2.0))),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    entry = ours.get_codebook_entry(indices.flatten(), (2, 5, 3, 8))
    assert torch.equal(entry, z_q)


def test_vector_quantizer_arguments() -> None:
    assert nn.VectorQuantizer(16, vq_embed_dim=4, beta=1.0).e_dim == 4  # as diffusers calls it
    module = nn.VectorQuantizer(16, 4, 0.5)
    assert module(torch.randn(1, 4, 2, 3))[2][2].shape == (6,)
    assert module(torch.randn(1, 4, 2, 2), temp=1.0, return_logits=False)[0].shape == (1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"options of a Gumbel quantiser, got \{'temp': 0.5\}"):
        module(torch.randn(1, 4, 2, 2), temp=0.5)
    with pytest.raises(ValueError, match="expected one of e_dim and vq_embed_dim, got None and"):
        nn.VectorQuantizer(16)
    with pytest.raises(ValueError, match=r"remap must be None, got 'used\.npy'"):
        nn.VectorQuantizer(16, 4, 0.5, remap="used.npy")


OPTIONS: dict[str, dict] = {
    "defaults": {},
    "straight through": {"rotation_trick": False, "commitment_weight": 0.25},
    "cosine": {"use_cosine_sim": True},
    "projected": {"codebook_dim": 4},
    "heads": {"heads": 3, "codebook_dim": 4},
    "separate heads": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "channels first": {"channel_last": False},
    "images": {"accept_image_fmap": True},
    "dead codes stay": {"threshold_ema_dead_code": 0, "decay": 0.5},
    "frozen": {"freeze_codebook": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_vector_quantize(name: str) -> None:
    """Outputs, gradients and codebooks agree over training steps, then in evaluation."""
    options = OPTIONS[name]
    want = theirs.VectorQuantize(dim=12, codebook_size=20, **options)
    ours = nn.VectorQuantize(dim=12, codebook_size=20, **options)
    assert ours.state_dict().keys() == want.state_dict().keys()
    ours.load_state_dict(want.state_dict())
    shape = (2, 12, 5, 4) if name == "images" else (2, 12, 15)
    for step in range(4):
        if step == 3:
            ours.eval(), want.eval()
        x = torch.randn(shape) if name in ("images", "channels first") else torch.randn(2, 15, 12)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        results = ours(leaves[0]), want(leaves[1])
        for got, value in zip(*results, strict=True):
            torch.testing.assert_close(got, value)
        if step < 3:
            for (quantized, _, loss), leaf in zip(results, leaves, strict=True):
                ((quantized * x.cos()).sum() + loss).backward()
                assert leaf.grad is not None
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        for (key, got), value in zip(
            ours.named_buffers(), want.state_dict().values(), strict=False
        ):
            assert got.shape == want.state_dict()[key].shape, value.shape
            torch.testing.assert_close(got, want.state_dict()[key])
    if name not in ("images", "channels first"):
        _, indices, _ = ours(torch.randn(2, 15, 12))
        got = ours.get_output_from_indices(indices)
        if name == "heads":  # which theirs does not take
            assert got.shape == (2, 15, 12)
        else:
            torch.testing.assert_close(got, want.get_output_from_indices(indices))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_where_the_gradient_goes(learnable: bool, training: bool, leaf: bool) -> None:
    """To x in training alone; to learnable codes where x takes none."""
    options = {"learnable_codebook": learnable, "ema_update": not learnable}
    want = theirs.VectorQuantize(dim=6, codebook_size=9, **options).train(training)
    ours = nn.VectorQuantize(dim=6, codebook_size=9, **options).train(training)
    ours.load_state_dict(want.state_dict())
    x = torch.randn(1, 7, 6)
    gradients = []
    for module in (ours, want):
        tokens = x.clone().requires_grad_(leaf)
        quantized, _, _ = module(tokens)
        if quantized.requires_grad:
            quantized.square().sum().backward()
        gradients.append((tokens.grad, getattr(module._codebook.embed, "grad", None)))
    for got, value in zip(*gradients, strict=True):
        assert (got is None) == (value is None)
        torch.testing.assert_close(got, value)


def test_masked_tokens_do_not_count() -> None:
    want = theirs.VectorQuantize(dim=8, codebook_size=10, rotation_trick=False)
    ours = nn.VectorQuantize(dim=8, codebook_size=10, rotation_trick=False)
    ours.load_state_dict(want.state_dict())
    x, lens = torch.randn(3, 6, 8), torch.tensor([6, 2, 0])
    for got, value in zip(ours(x, lens=lens), want(x, lens=lens), strict=True):
        torch.testing.assert_close(got, value)
    torch.testing.assert_close(ours._codebook.embed, want._codebook.embed)
    x[1, 2:], x[2] = torch.nan, torch.nan  # padding
    loss = ours(x, mask=torch.arange(6) < lens[:, None])[2]
    assert loss.isfinite() and ours._codebook.embed.isfinite().all()
    with pytest.raises(ValueError, match=r"mask or lens, not both, and only for x"):
        ours(x[0], lens=lens)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kmeans_init", [False, True])
@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_a_token_that_is_not_finite_moves_no_code(
    use_cosine_sim: bool, kmeans_init: bool, heads: int
) -> None:
    options = {"kmeans_init": kmeans_init, "use_cosine_sim": use_cosine_sim, "heads": heads}
    options |= {"threshold_ema_dead_code": 3, "separate_codebook_per_head": heads > 1}
    options |= {"codebook_dim": 8 // heads}
    vq = nn.VectorQuantize(dim=8, codebook_size=6, **options)
    x = torch.randn(1, 40, 8)
    x[0, ::3, :2], x[0, 7, 1] = torch.nan, torch.inf  # in the first head
    for _ in range(5):
        vq(x)
        counts = vq._codebook.cluster_size
        assert vq._codebook.embed.isfinite().all() and counts.isfinite().all()
    if not kmeans_init:  # 25 of 40 tokens count in the first head, all of them in the second
        totals = torch.tensor([25.0, 40.0])[:heads]
        vq._codebook.threshold_ema_dead_code = 0
        for _ in range(60):
            vq(x)
        torch.testing.assert_close(counts.sum(-1), totals, rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_finite_token_leaves_the_codes() -> None:
    vq = nn.VectorQuantize(dim=4, codebook_size=3, threshold_ema_dead_code=5, decay=1.0)
    before = vq.codebook.clone()
    vq(torch.full((1, 7, 4), torch.nan))
    torch.testing.assert_close(vq.codebook, before, rtol=1e-4, atol=1e-4)


def test_dead_codes_become_tokens() -> None:
    vq = nn.VectorQuantize(dim=4, codebook_size=16, threshold_ema_dead_code=2, decay=0.1)
    x = torch.randn(1, 12, 4)
    vq(x)
    codes, size = vq.codebook, vq._codebook.cluster_size[0]
    revived = (codes[:, None] == x[0]).all(-1)
    # Every token at most once: 12 tokens for up to 16 dead codes.
    assert revived.any(1).sum() == min(12, 16) and (revived.sum(0) <= 1).all()
    assert (size[revived.any(1)] == 2).all()
    torch.testing.assert_close(vq._codebook.embed_avg[0, revived.any(1)], codes[revived.any(1)] * 2)


def test_kmeans_init_finds_clusters() -> None:
    centres = torch.randn(4, 6) * 10
    x = (centres[torch.arange(400) % 4] + 0.1 * torch.randn(400, 6))[None]
    vq = nn.VectorQuantize(dim=6, codebook_size=24, kmeans_init=True, kmeans_iters=5)
    assert not vq._codebook.initted and not vq.codebook.any()
    vq.eval()
    quantized, _, _ = vq(x)
    assert vq._codebook.initted
    assert (quantized - x).norm(dim=-1).max() < 1
    before = vq.codebook.clone()
    vq(x)
    assert torch.equal(vq.codebook, before)


def test_kmeans_init_from_few_tokens() -> None:
    """Fewer tokens than codes: every code is a token, and stays one while nothing chooses it."""
    x = torch.randn(1, 5, 6)
    vq = nn.VectorQuantize(dim=6, codebook_size=13, kmeans_init=True)
    vq(x[:, :0])  # nothing to start from yet
    assert not vq._codebook.initted
    for _ in range(3):
        quantized, _, _ = vq(x)
        torch.testing.assert_close(quantized, x, atol=1e-4, rtol=1e-4)
        nearest_token = torch.cdist(vq.codebook, x[0]).amin(1)
        assert vq._codebook.initted and nearest_token.max() < 1e-3


MEMORY = """
import torch
from vector_quantize_pytorch import VectorQuantize as Theirs
from vlmkernels import nn

def resident(name):  # kB
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def peak(module, x):
    open("/proc/self/clear_refs", "w").write("5")  # starts VmHWM anew
    before = resident("VmRSS")
    module(x)
    return resident("VmHWM") - before

torch.set_num_threads(1)
options = {"dim": 16, "codebook_size": 8192, "rotation_trick": False}
x = torch.randn(1, 4096, 16)
for training in (False, True):
    ours, theirs = nn.VectorQuantize(**options), Theirs(**options)
    ours.train(training)(x[:, :8]), theirs.train(training)(x[:, :8])
    print(peak(ours, x), peak(theirs, x))
"""


def test_memory() -> None:
    """Of the whole process, as the kernel of the operating system counts it."""
    output = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True)
    matrix = 4096 * 8192 * 4 / 1024
    in_evaluation, in_training = output.stdout.decode().splitlines()
    for line in (in_evaluation, in_training):
        ours, peer = map(int, line.split())
        assert 50 * ours <= matrix and 10 * ours <= peer, line


def test_residual() -> None:
    options = {"dim": 8, "num_quantizers": 3, "codebook_size": 12, "codebook_dim": 6}
    want, ours = theirs.ResidualVQ(**options), nn.ResidualVQ(**options)
    ours.load_state_dict(want.state_dict())
    x = torch.randn(2, 9, 8)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = ours(leaves[0]), want(leaves[1])
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value)
    for (quantized, _, losses), leaf in zip(results, leaves, strict=True):
        (quantized.square().sum() + losses.sum()).backward()
        assert leaf.grad is not None
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    with pytest.raises(ValueError, match="heads must be 1, got 2"):
        nn.ResidualVQ(**options, heads=2)


def test_unsupported_arguments() -> None:
    assert nn.VectorQuantize(8, 4, stochastic_sample_codes=False)
    with pytest.raises(ValueError, match="affine_param is not supported, must be False, got True"):
        nn.VectorQuantize(8, 4, affine_param=True)
    for sizes in ((0, 4), (8, 0), (8, 4, 0), (8, 4, 2, 0)):
        with pytest.raises(ValueError, match="VectorQuantize: sizes must be positive, got 0"):
            nn.VectorQuantize(*sizes)
    with pytest.raises(TypeError, match=r"codebook_size must be of type int, got 2\.5"):
        nn.VectorQuantize(8, 2.5)
    for decay in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\] and eps not negative"):
            nn.VectorQuantize(8, 4, decay=decay)
    with pytest.raises(ValueError, match="ResidualVQ: sizes must be positive, got 0"):
        nn.ResidualVQ(dim=8, num_quantizers=0, codebook_size=4)
    with pytest.raises(ValueError, match="VectorQuantizer: sizes must be positive, got 0 and 4"):
        nn.VectorQuantizer(0, 4)
    with pytest.raises(TypeError, match="unknown argument 'codebook_sise'"):
        nn.VectorQuantize(8, 4, codebook_sise=3)
    with pytest.raises(ValueError, match="learnable_codebook excludes ema_update"):
        nn.VectorQuantize(8, 4, learnable_codebook=True, ema_update=True)


def test_no_tensor_at_all() -> None:
    residual = nn.ResidualVQ(dim=8, num_quantizers=2, codebook_size=4)
    for module in (nn.VectorQuantize(8, 4), nn.VectorQuantizer(4, 8), residual):
        with pytest.raises(
            TypeError, match=rf"^{type(module).__name__}: . must be a torch\.Tensor"
        ):
            module(None)


def test_bad_tokens() -> None:
    vq, x = nn.VectorQuantize(8, 4), torch.randn(2, 3, 8)
    images = nn.VectorQuantize(8, 4, accept_image_fmap=True)
    first = nn.VectorQuantize(8, 4, channel_last=False)
    for module, wrong in (
        *((vq, torch.randn(shape)) for shape in ((), (8,), (2, 3, 7), (1, 2, 3, 8))),
        *((images, torch.randn(shape)) for shape in ((2, 8, 3), (2, 7, 3, 3))),
        (first, torch.randn(2, 3, 8)),
    ):
        with pytest.raises(ValueError, match=r"VectorQuantize: x must be .* with dim 8, got"):
            module(wrong)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        vq(x.long())
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 3\), got"):
            vq(x, mask=mask)
    for lens in (torch.ones(3, dtype=torch.long), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"lens must be integers \(2,\), got"):
            vq(x, lens=lens)
    for shape in ((1, 5, 2, 2), (1, 4, 2)):
        with pytest.raises(ValueError, match=r"z must have shape \(batch, 4, height, width\), got"):
            nn.VectorQuantizer(8, 4, 0.25)(torch.randn(shape))


def _train(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    vq = nn.VectorQuantize(dim=4, codebook_size=12, decay=0.5)
    dead = nn.VectorQuantize(dim=4, codebook_size=40, threshold_ema_dead_code=1, kmeans_init=True)
    x = torch.randn(2, 30, 4)
    torch.manual_seed(rank)
    for module in (vq, dead):
        for _ in range(2):
            module(x[rank : rank + 1])
    torch.save([vq.state_dict(), dead.state_dict()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_learn_as_one(tmp_path: object) -> None:
    """EMA over a process group equals one process with all tokens; replacements agree."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_train, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        for key in a:
            assert torch.equal(a[key], b[key]), key
    torch.manual_seed(0)
    alone = nn.VectorQuantize(dim=4, codebook_size=12, decay=0.5)
    nn.VectorQuantize(dim=4, codebook_size=40, kmeans_init=True)
    x = torch.randn(2, 30, 4)
    for _ in range(2):
        alone(x)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first[0][key], value)
