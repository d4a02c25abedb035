"""The default implementation follows the table of measurements, on each device that a test can pretend to have."""

from dataclasses import replace

import pytest
import torch

from afd_kernels import attention_defaults, block_causal_attention_backends
from afd_kernels.attention_defaults import DefaultRow, default_impl, measured_order, read_table
from afd_kernels.block_causal_attention import IMPLS, check_impl, parse_impl
from afd_kernels.cached_attention import IMPLS as CACHED_IMPLS

OPERATION = "block_causal_attention"
H200 = DefaultRow(
    OPERATION, "NVIDIA H200", 90, "bfloat16", "chunks:flash3", 20.0, "teacher", "abc", "torch 2", "2030-01-01"
)
TABLE = [
    H200,
    replace(H200, impl="triton:tma", median_ms=10.0),
    replace(H200, impl="chunks:sdpa", median_ms=30.0),
    replace(H200, device="NVIDIA H100 PCIe", impl="flex", median_ms=40.0),
    replace(H200, device="cpu", capability=0, dtype="float32", impl="reference"),
]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(attention_defaults, "read_table", lambda: TABLE)
    measured_order.cache_clear()
    attention_defaults._LOGGED.clear()
    yield
    measured_order.cache_clear()


def test_an_order_is_the_devices_own_or_that_of_its_kind(table):
    fastest_first = ("triton:tma", "chunks:flash3", "chunks:sdpa")
    assert measured_order(OPERATION, "NVIDIA H200", 90, "bfloat16") == ("NVIDIA H200", fastest_first)
    assert measured_order(OPERATION, "NVIDIA H100 PCIe", 90, "bfloat16") == ("NVIDIA H100 PCIe", ("flex",))
    assert measured_order(OPERATION, "NVIDIA GH200 480GB", 90, "bfloat16") == ("NVIDIA H100 PCIe", ("flex",))
    assert measured_order(OPERATION, "NVIDIA B200", 100, "bfloat16") == ("", ())
    assert measured_order(OPERATION, "NVIDIA H200", 90, "float32") == ("", ())
    assert measured_order("cached_attention", "NVIDIA H200", 90, "bfloat16") == ("", ())


def test_the_fastest_that_can_run_is_taken_and_said_once(table, caplog):
    cpu = torch.device("cpu")

    def only_reference(impl):
        if impl != "reference":
            raise ValueError(impl)

    def nothing(impl):
        raise ImportError(impl)

    with caplog.at_level("INFO"):
        for _ in range(2):
            assert default_impl(OPERATION, cpu, torch.float32, only_reference, "chunks") == "reference"
        assert default_impl(OPERATION, cpu, torch.float32, nothing, "chunks") == "chunks"
        assert default_impl(OPERATION, cpu, torch.float64, lambda impl: None, "sdpa") == "sdpa"
    assert [record.message.removeprefix("block_causal_attention runs ") for record in caplog.records] == [
        "impl=reference on cpu (fastest of those measured on cpu that can run here)",
        "impl=chunks on cpu (not measured on cpu in float32: the library kernel, the safe choice)",
        "impl=sdpa on cpu (not measured on cpu in float64: the library kernel, the safe choice)",
    ]


def test_the_shipped_table_names_implementations_there_are():
    rows = read_table()
    assert {(row.operation, row.device, row.dtype) for row in rows} >= {(OPERATION, "cpu", "float32")}
    for row in rows:
        assert row.median_ms > 0
        if row.operation == OPERATION:
            name, option = parse_impl(row.impl)
            assert name in IMPLS
            assert option or name in ("reference", "flex"), f"{row.impl}: a measurement has a backend or variant"
        else:
            assert row.impl in CACHED_IMPLS


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("device,impl\ncpu,chunks\n")
    with pytest.raises(ValueError, match=r"must have the columns \['operation', .*, got \['device', 'impl'\]"):
        read_table(path)


@pytest.mark.parametrize(
    ("impl", "error", "message"),
    [
        ("magic", ValueError, "impl must be one of reference, "),
        ("triton", ValueError, r"needs CUDA tensors \(or TRITON_INTERPRET=1 on CPU\), got cpu"),
        ("chunks:flash3", ImportError, "'flash3' is not installed; to install it: build FlashAttention's"),
        ("varlen", ImportError, "needs a varlen kernel; to install one: pip install"),
        ("flex", ValueError, "impl='flex' has no backward on CPU"),
    ],
)
def test_an_implementation_that_cannot_train_here_is_known_before_there_are_tensors(impl, error, message):
    with pytest.raises(error, match=message):
        check_impl(impl, torch.device("cpu"), torch.bfloat16, 64)


def test_what_is_installed_may_still_not_take_the_inputs(monkeypatch):
    monkeypatch.setattr(block_causal_attention_backends, "is_installed", lambda backend: True)
    with pytest.raises(ValueError, match=r"attention backend 'flash3' takes float16 or bfloat16, got torch\.float32"):
        check_impl("chunks:flash3", torch.device("cuda"), torch.float32, 64)
    with pytest.raises(ValueError, match="attention backend 'flash3' needs CUDA tensors, got cpu"):
        check_impl("varlen:flash3", torch.device("cpu"), torch.bfloat16, 64)
    for impl in ("reference", "chunks", "chunks:sdpa"):
        check_impl(impl, torch.device("cpu"), torch.float64, 24)
