"""Writing safetensors tensor by tensor: the official reader reads them, and one tensor is alive at a time."""

import weakref
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from afd.models.weights.sources import LazyTensor
from afd.models.weights.streaming import split_shards, write_tensors


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor as if it were in a file."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_the_official_reader_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {f"{dtype}-{n}".removeprefix("torch."): torch.arange(n).to(dtype) for dtype in dtypes for n in (0, 1, 5)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "truth": torch.tensor([True]),
    }
    path = tmp_path / "deep" / "w.safetensors"
    lazies = {name: lazy(tensor) for name, tensor in tensors.items()}
    assert write_tensors(lazies, path, metadata={"note": "é"}) == sum(t.nbytes for t in tensors.values())
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    write_tensors(lazies, path, dtype=torch.bfloat16)
    back = load_file(path)
    assert torch.equal(back["strided"], tensors["strided"].bfloat16())
    assert back["int64-5"].dtype == torch.int64
    assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    reads: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def read() -> Tensor:
        value = torch.zeros(1000)
        reads.append(weakref.ref(value))
        alive.append(sum(each() is not None for each in reads))
        return value

    tensors = {f"{i}": LazyTensor((1000,), torch.float32, read) for i in range(5)}
    write_tensors(tensors, tmp_path / "w.safetensors", dtype=torch.float16)
    assert alive == [1] * 5


def test_shards_keep_the_order_and_the_limit() -> None:
    tensors = {f"{i}": lazy(torch.zeros(size)) for i, size in enumerate((3, 3, 10, 1, 1, 1))}
    shards = split_shards(tensors, 24, dtype=None)
    assert [list(shard) for shard in shards] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert [list(shard) for shard in split_shards(tensors, 12, dtype=torch.float16)] == [
        ["0", "1"],
        ["2"],
        ["3", "4", "5"],
    ]
