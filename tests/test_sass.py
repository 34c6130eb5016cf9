"""What the compiler made of the CUDA kernels: nothing spilled, and tensor cores where they belong.

Reads the machine code in _C with cuobjdump and nvdisasm (test requirements); no GPU is needed.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmkernels import _core

if _core._load("_C").build_info()["cuda"] == 0:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)

# One reading of the machine code for all tests here, also where they are spread over processes.
pytestmark = pytest.mark.xdist_group("sass")
TOOLS = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
PATH = os.pathsep.join([*map(str, TOOLS), os.environ["PATH"], "/usr/local/cuda/bin"])
# Kernels that multiply matrices.
MATRIX = (
    *("attention_fwd", "attention_dq", "attention_dkdv", "attention_dbias", "attention_decode"),
    *("patch_embed", "patch_embed_dx", "patch_embed_dweight"),
    *("contrastive_forward", "contrastive_ds", "contrastive_products"),
    *("qformer_attention_fwd", "qformer_attention_bwd"),
    *("qformer_attention_fwd_hopper", "qformer_attention_bwd_hopper"),
    *("vq_lookup", "vq_lookup_hopper"),
    *("attention_fwd_sm90", "attention_fwd_masked_sm90", "attention_bwd_sm90"),
    *("attention_bwd_wide_sm90", "attention_dbias_sm90"),
    *("patch_embed_hopper", "patch_embed_dx_hopper", "patch_embed_dweight_hopper"),
    *("patch_embed_rows_hopper", "patch_embed_resident"),
)


def cuobjdump(option: str) -> str:
    tool = shutil.which("cuobjdump", path=PATH)
    assert tool, "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return subprocess.run(
        [tool, option, _core._load("_C").__file__],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": PATH},
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    """The instructions of each kernel, of every architecture in the binary."""
    return dict(sections(cuobjdump("-sass")))


def launch_registers(listing: str) -> dict[str, int]:
    """Of a thread of each kernel for sm_90a."""
    listing = "".join(part for part in listing.split("arch = ") if part.startswith("sm_90a"))
    return {n: int(r) for n, r in re.findall(r"Function (\S+):\s+REG:(\d+)", listing)}


def sections(listing: str) -> Iterator[tuple[str, str]]:
    arch = ""
    for part in re.split(r"(?=\s+Function : |arch = )", listing):
        if part.startswith("arch = "):
            arch = part.split()[2]
        elif name := re.match(r"\s+Function : (\S+)", part):
            yield f"{arch} {name[1]}", part


def test_every_kernel_is_there(kernels: dict[str, str]) -> None:
    assert kernels
    for name in (
        *("null_kernel", "attention_fwd_kernel", "attention_dkdv_kernel"),
        *("rope_kernel", "qk_norm_rope_kernel", "qk_norm_rope_backward_kernel"),
        *("norm_kernel", "norm_backward_kernel", "column_sums_kernel"),
        *("activation_kernel", "activation_backward_kernel"),
    ):
        assert any(name in kernel for kernel in kernels), name


def test_nothing_spills(kernels: dict[str, str]) -> None:
    """Local memory is slow memory: spilled registers, or an array with a computed index."""
    spilled = [name for name, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)]
    assert spilled == []


def test_matrix_kernels_use_tensor_cores(kernels: dict[str, str]) -> None:
    for kind in MATRIX:
        assert any(f"{kind}_kernel" in name for name in kernels), kind
    for name, code in kernels.items():
        if "_sm90_kernel" in name:  # empty for other architectures
            assert not name.startswith("sm_90a") or re.search(r"\bHGMMA\b", code), name
            assert not name.startswith("sm_90a") or re.search(r"\bUTMALDG\b", code), name
        elif any(f"{kind}_kernel" in name for kind in MATRIX):
            assert re.search(r"\b(HMMA|HGMMA)\b", code), name
            # Asynchronous copies feed them.
            assert re.search(r"\b(LDGSTS|UTMALDG|UBLKCP)\b", code), name


def test_wgmma_is_asynchronous(kernels: dict[str, str]) -> None:
    """Where ptxas serialises, every product ends a group of its own, and is waited for."""
    for name, code in kernels.items():
        products = re.findall(r"\bHGMMA\b.*?;", code)
        groups = sum("gsb0" in product for product in products)
        assert 2 * groups <= len(products), name


def test_warpgroups_share_the_registers_of_the_launch(kernels: dict[str, str]) -> None:
    """setmaxnreg moves what the launch had; a warp that asks for more waits for ever."""
    registers = launch_registers(cuobjdump("--dump-resource-usage"))
    checked = 0
    for name, code in kernels.items():
        sizes = {
            kind: {int(size, 0) for size in re.findall(rf"USETMAXREG\.{kind}.*?(\w+) ;", code)}
            for kind in ("TRY_ALLOC", "DEALLOC")
        }
        if not any(sizes.values()):
            continue
        (consumer,), (producer,) = sizes["TRY_ALLOC"], sizes["DEALLOC"]
        launched = registers[name.split()[1]]
        warpgroups = 65536 // (128 * launched)  # one CTA has all of the SM
        assert producer + (warpgroups - 1) * consumer <= warpgroups * launched, name
        checked += 1
    assert checked or not registers
