"""The CUDA kernel's arithmetic, run on the CPU: which byte goes where needs no GPU to be checked.

The source of the kernel is compiled as C++ against `emulated/cuda_runtime_api.h`, which runs its threads one
after another. What only a GPU can show, its speed and the launch itself, is not here.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sinkprune.ops import native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(not CSRC.exists(), reason="the source tree is not here"),
]

ENTRY = """
extern "C" int gather(const int64_t* fields, int count) {
  std::vector<sinkprune::Segment> segments(count);
  for (int i = 0; i < count; ++i) {
    const int64_t* f = fields + 12 * i;
    segments[i] = {reinterpret_cast<const char*>(f[0]), reinterpret_cast<char*>(f[1]),
                   reinterpret_cast<const int64_t*>(f[2]), f[3], f[4], f[5], f[6], f[7], f[8], f[9],
                   static_cast<int32_t>(f[10]), f[11] != 0};
  }
  return sinkprune::launch_gather(segments.data(), count, nullptr);
}
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulated")
    source = (CSRC / "gather.cu").read_text()
    source, launches = re.subn(r"(\w+)<<<(.+?), (\w+), 0, stream>>>\(", r"emulate(\1, \2, \3, ", source)
    assert launches == 1
    (folder / "gather.cpp").write_text(source + ENTRY)
    library = folder / "gather.so"
    command = ["c++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{HERE / 'emulated'}", f"-I{CSRC}"]
    flags = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
    done = subprocess.run(
        [*command, *flags, str(folder / "gather.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(launch: ctypes.CDLL, segments: list[native._Segment]) -> int:
    """Calls the launcher with what `csrc/ops.cpp` would make of the segments."""
    fields: list[int] = []
    for out, source, ids, piece, dim in segments:
        size = source.element_size()
        along_rows = source.dim() == 2 and dim == 0
        source, out = (t if t.dim() == 2 else t[None] for t in (source, out))
        fields += [
            source.data_ptr(),
            out.data_ptr(),
            ids.data_ptr(),
            len(ids),
            piece * (1 if along_rows else size),
        ]
        fields += [source.shape[0 if along_rows else 1] // piece, out.shape[0], out.shape[1] * size]
        fields += [source.stride(0) * size, out.stride(0) * size, size, along_rows]
    return launch.gather((ctypes.c_int64 * len(fields))(*fields), len(segments))


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def check(launch: ctypes.CDLL, segments: list[native._Segment]) -> None:
    expected = [segment._replace(out=segment.out.clone()) for segment in segments]
    for segment in expected:
        native._gather_torch(segment)
    assert run(launch, segments) == 0
    for got, wanted in zip(segments, expected, strict=True):
        assert torch.equal(got.out, wanted.out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("piece", [1, 3, 8, 64])
@pytest.mark.parametrize("dim", [0, 1])
def test_every_load_width_moves_the_right_bytes(
    launch: ctypes.CDLL, dtype: torch.dtype, piece: int, dim: int
) -> None:
    ids = torch.tensor([0, 2, 3, -1, 6])
    for other in (1, 7, 40, 600):
        source = (
            bytes_of(7 * piece, other * dtype.itemsize)
            if dim == 0
            else bytes_of(other, 7 * piece * dtype.itemsize)
        )
        source = source.view(dtype)
        shape = (5 * piece, other) if dim == 0 else (other, 5 * piece)
        check(launch, [native._Segment(torch.ones(shape, dtype=dtype), source, ids, piece, dim)])


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_windows_of_larger_matrices_at_any_alignment(launch: ctypes.CDLL, offset: int) -> None:
    source = bytes_of(24, 300).view(torch.int16)[:, offset : offset + 128]
    buffer = torch.zeros(30, 160, dtype=torch.int16)
    ids = torch.tensor([1, 3, 4])
    check(launch, [native._Segment(buffer[3:15, offset : offset + 128], source, ids, 4, 0)])
    assert not buffer[:3].any()
    assert not buffer[15:].any()
    assert not buffer[:, offset + 128 :].any()
    narrow = torch.zeros(24, 160, dtype=torch.int16)
    check(launch, [native._Segment(narrow[:, offset : offset + 48], source, ids, 16, 1)])
    assert not narrow[:, offset + 48 :].any()


def test_a_layers_whole_set_is_one_launch(launch: ctypes.CDLL) -> None:
    """Projections, biases, output and MLP of a layer, among them an empty one."""
    ids, channels = torch.tensor([0, 2, 5]), torch.tensor([1, 4, 5, 6, 30, 31])
    segments = [
        native._Segment(torch.zeros(24, 33, dtype=torch.uint8), bytes_of(48, 33), ids, 8, 0) for _ in range(3)
    ]
    segments += [
        native._Segment(torch.zeros(24, dtype=torch.uint8), bytes_of(48), ids, 8, 0) for _ in range(3)
    ]
    segments += [native._Segment(torch.zeros(0, 33, dtype=torch.uint8), bytes_of(48, 33), ids[:0], 8, 0)]
    segments += [native._Segment(torch.zeros(33, 24, dtype=torch.uint8), bytes_of(33, 48), ids, 8, 1)]
    segments += [native._Segment(torch.zeros(6, 40, dtype=torch.uint8), bytes_of(32, 40), channels, 1, 0)]
    segments += [native._Segment(torch.zeros(40, 6, dtype=torch.uint8), bytes_of(40, 32), channels, 1, 1)]
    check(launch, segments)


def test_ids_out_of_range_write_zeros(launch: ctypes.CDLL) -> None:
    for dim in (0, 1):
        source = bytes_of(8, 8)
        out = torch.ones((6, 8) if dim == 0 else (8, 6), dtype=torch.uint8)
        assert run(launch, [native._Segment(out, source, torch.tensor([1, 4, 2**40]), 2, dim)]) == 0
        assert torch.equal(out.narrow(dim, 0, 2), source.narrow(dim, 2, 2))
        assert not out.narrow(dim, 2, 4).any()
