"""The compiled core: what it links to, which tensors it takes, what it says about the others."""

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_any_input import CASES, valid_arguments
from vlmkernels import _core, ops


def test_links_to_no_torch_and_no_driver() -> None:
    linked = subprocess.run(["ldd", _core.C.__file__], check=True, text=True, capture_output=True)
    names = [line.split()[0] for line in linked.stdout.splitlines()]
    assert names
    assert [n for n in names if n.startswith(("libtorch", "libc10", "libcuda"))] == []


def test_loads_without_torch() -> None:
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); assert 'torch' not in sys.modules;"
        "print(m.build_info()['compilers'])"
    )
    command = [sys.executable, "-c", code, _core.C.__file__]
    result = subprocess.run(command, check=True, text=True, capture_output=True)
    assert result.stdout.strip() == _core.C.build_info()["compilers"]


class Subclass(torch.Tensor):
    pass


def test_refuses_subclasses_by_name() -> None:
    """A subclass inherits the exchange API but not always the storage."""
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"null: x must be a plain torch.Tensor, got .*Subclass"):
        _core.C.null(x.as_subclass(Subclass), x)
    with pytest.raises(TypeError, match=r"null: y must be a plain torch.Tensor, got list"):
        _core.C.null(x, [1.0])


def test_takes_parameters_and_offsets() -> None:
    x = torch.nn.Parameter(torch.arange(8.0))
    y = torch.zeros(9)
    assert _core.C.null(x[3:6], y[2:5])
    assert torch.equal(y, torch.tensor([0, 0, 3.0, 4, 5, 0, 0, 0, 0]))


def test_checks_outputs_too() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"null: y must have the shape of x \(3,\), got \(4,\)"):
        _core.C.null(x, torch.ones(4))
    with pytest.raises(TypeError, match=r"null: y must have the dtype of x \(float32\), got"):
        _core.C.null(x, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_meta_and_fake_tensors_compute_shapes_only(case: str) -> None:
    function, arguments = valid_arguments(torch.float32, "cpu")[case]
    if case == "attention packed":  # the longest sequence would be data, which there is none of

        def function(q, k, v, cu_seqlens_q, cu_seqlens_k):  # type: ignore[no-untyped-def]
            return ops.attention(
                *(q, k, v), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=3, max_seqlen_k=3, causal=True,
            )  # fmt: skip

    def results(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        found = function(*arguments)
        return [*found] if isinstance(found, tuple) else [found]

    want = [(x.shape, x.dtype) for x in results(arguments)]
    meta = results([x.to("meta") for x in arguments])
    assert all(x.is_meta for x in meta)
    assert [(x.shape, x.dtype) for x in meta] == want
    with torch._subclasses.FakeTensorMode() as mode:
        fake = results([mode.from_tensor(x) for x in arguments])
    assert all(isinstance(x, torch._subclasses.FakeTensor) for x in fake)
    assert [(x.shape, x.dtype) for x in fake] == want


def test_double_backward_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    (dx,) = torch.autograd.grad(
        ops.null(x), x, torch.ones(3, requires_grad=True), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_lazy_signs_are_resolved() -> None:
    assert torch.equal(ops.null(torch._neg_view(torch.ones(3))), -torch.ones(3))


def test_forward_mode_and_transforms_compute_with_the_reference() -> None:
    """A kernel would drop the tangent, or see a wrapper, without a word."""
    x = torch.arange(3.0)
    with fwad.dual_level():
        y = ops.null(fwad.make_dual(x, torch.ones(3)))
        assert torch.equal(fwad.unpack_dual(y).tangent, torch.ones(3))
    assert torch.equal(torch.func.jvp(ops.null, (x,), (x,))[1], x)
    assert torch.equal(torch.func.vmap(ops.null)(torch.ones(2, 3)), torch.ones(2, 3))
    assert torch.equal(torch.func.grad(lambda x: ops.null(x).sum())(x), torch.ones(3))


def test_dispatch_modes_see_the_op() -> None:
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        ops.null(torch.ones(3))
    assert "vlmkernels.null.default" in seen
