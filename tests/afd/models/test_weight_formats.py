"""Students out of every format people have, strictly, from small files with the real names and nesting."""

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd.config import RunConfig
from afd.config_file import dump_config
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.models.weights import load_student, original_name, read_student_shape, save_student
from afd.models.weights.accounting import check_names_and_shapes

MakeStudent = Callable[..., CausalStudent]
DiffusersFolder = Callable[..., Path]
REFERENCE = Path(__file__).parents[2] / "data" / "self_forcing_tiny.safetensors"
CANNOT_TELL = {"num_heads": 2, "text_len": 8}
WAN = {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "head_dim": 16, "text_len": 8}


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """The reference's weights under the original code's names."""
    return {name[len("weight.") :]: w for name, w in load_file(REFERENCE).items() if name.startswith("weight.")}


def assert_same(student: CausalStudent, weights: dict[str, Tensor]) -> None:
    """The student holds exactly these weights (original names)."""
    held = {original_name(name): tensor for name, tensor in student.state_dict().items()}
    assert held.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(held[name], tensor), name


def shifted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same shapes."""
    return {name: tensor + 1 for name, tensor in weights.items()}


@pytest.fixture
def diffusers_folder(make_transformer: Callable[[Any], Any]) -> DiffusersFolder:
    """`diffusers_folder(student, folder, num_shards=1)`: what diffusers' `save_pretrained` writes for these weights."""

    def write(student: CausalStudent, folder: Path, *, num_shards: int = 1) -> Path:
        model = make_transformer(student.shape)
        model.load_state_dict(student.state_dict())
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=num_bytes // num_shards + 1)
        return folder

    return write


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name,
        lambda name: f"model.{name}",
        lambda name: f"model._fsdp_wrapped_module.{name}",
        lambda name: (
            "model._fsdp_wrapped_module."
            + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)
        ),
        lambda name: f"module._orig_mod.model.{name}",
        lambda name: f"model.diffusion_model.{name}",
    ],
)
def test_a_self_forcing_checkpoint_loads(
    original: dict[str, Tensor], tmp_path: Path, wrap: Callable[[str], str]
) -> None:
    path = tmp_path / "self_forcing_dmd.pt"
    wrapped = {wrap(name): tensor for name, tensor in original.items()}
    torch.save({"generator": {wrap(n): t for n, t in shifted(original).items()}, "generator_ema": wrapped}, path)
    assert_same(load_student(path, config=CANNOT_TELL), original)
    assert_same(load_student(path, config=CANNOT_TELL | {"init_weights": "raw"}), shifted(original))
    torch.save({"generator": wrapped, "critic": {"a.b": torch.zeros(1)}}, path)
    student = load_student(path, config=CANNOT_TELL | {"chunk_frames": 1}, dtype=torch.float64)
    assert student.dtype == torch.float64
    assert student.shape.chunk_frames == 1
    with torch.no_grad():
        reference = load_file(REFERENCE)
        inputs = (reference[name].double() for name in ("x", "t.chunk1", "context"))
        x, t, context = inputs
        v = student(x, t / 1000, context, clean=reference["clean"].double())
    torch.testing.assert_close(v.float(), reference["out.teacher_forcing.chunk1"], rtol=0, atol=2e-5)


def test_bare_state_dicts_and_plain_safetensors_load(original: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(original, tmp_path / "bare.pt")
    torch.save(original, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(original, tmp_path / "bare.safetensors")
    for name in ("bare.pt", "old.pt", "bare.safetensors"):
        assert_same(load_student(tmp_path / name, config=CANNOT_TELL), original)
    (tmp_path / "bare.safetensors").unlink()  # nothing of a loaded student hangs on its file


def test_original_wan_folders_load(original: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(original, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 64, "ffn_dim": 160, "freq_dim": 256, "in_dim": 16, "num_heads": 2}
    config |= {"num_layers": 2, "out_dim": 16, "text_len": 8, "eps": 1e-6, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    student = load_student(tmp_path)
    assert_same(student, original)
    assert (student.shape.num_heads, student.shape.text_len) == (2, 8)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("image", [{}, {"in_channels": 36, "image_dim": 10}])
def test_diffusers_folders_and_pipelines_load(
    make_student: MakeStudent,
    diffusers_folder: DiffusersFolder,
    tmp_path: Path,
    num_shards: int,
    image: dict[str, int],
) -> None:
    student = make_student(**WAN | image)
    folder = diffusers_folder(student, tmp_path / "transformer", num_shards=num_shards)
    assert len(list(folder.glob("*.safetensors"))) >= num_shards
    for path in (folder, tmp_path):
        loaded = load_student(path, config={"text_len": 8, "chunk_frames": 5})
        expected = student.shape.model_dump() | {"chunk_frames": 5}
        assert loaded.shape.model_dump() == expected
        for name, tensor in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_wan_is_assumed_where_nobody_tells(make_student: MakeStudent, tmp_path: Path) -> None:
    student = make_student(**WAN | {"head_dim": 128})
    save_file(student.state_dict(), tmp_path / "weights.safetensors")
    shape = read_student_shape(tmp_path / "weights.safetensors")
    assert (shape.num_heads, shape.head_dim, shape.text_len) == (2, 128, 512)


def write_commit(folder: Path, student: CausalStudent, average: Mapping[str, Tensor], config: RunConfig) -> Path:
    """The files of a commit that a student is loaded from."""
    save_student(student, folder / "student.safetensors", dtype=torch.float32, note={})
    (folder / "averages").mkdir()
    save_file(dict(average), folder / "averages" / "ema.safetensors")
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_commits_load_averaged_or_raw(make_student: MakeStudent, tmp_path: Path) -> None:
    student, averaged = make_student(chunk_frames=2), make_student(seed=1)
    commit = write_commit(tmp_path / "checkpoints" / "step_1", student, dict(averaged.named_parameters()), RunConfig())
    (tmp_path / "checkpoints" / "latest").write_text("step_1\n")
    assert load_student(tmp_path).shape == load_student(tmp_path / "checkpoints").shape == student.shape
    for which, expected in (("average", averaged), ("raw", student)):
        loaded = load_student(commit, config={"init_weights": which})
        assert loaded.shape == student.shape
        for name, tensor in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_adapters_are_merged_from_every_form(make_student: MakeStudent, tmp_path: Path) -> None:
    student = make_student(chunk_frames=1, **{k: v for k, v in WAN.items() if k != "text_len"})
    base = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    add_lora(student, rank=3, alpha=6, targets=("to_q", "ffn.net.2"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    noisy, t = torch.randn(1, 16, 2, 2, 4, generator=generator), torch.full((1, 2), 0.5)
    prompt = torch.randn(1, 5, 6, generator=generator)
    with torch.no_grad():
        expected = student(noisy, t, prompt)
    adapters = {name: p for name, p in student.state_dict().items() if ".lora_" in name}
    tell = {"num_heads": 2, "text_len": 5, "chunk_frames": 1}
    with_base = tell | {"init_base": tmp_path / "base.safetensors"}
    plain = {f"base_model.model.model.{original_name(n).replace('.default', '')}": t for n, t in adapters.items()}
    torch.save({"generator_lora": plain}, tmp_path / "lora.pt")
    torch.save(
        {"generator": {f"model.{original_name(n)}": t for n, t in student.state_dict().items()}}, tmp_path / "w.pt"
    )
    folder = tmp_path / "peft"
    folder.mkdir()
    named = {f"base_model.model.{n.replace('.default', '')}": t.contiguous() for n, t in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    kohya = {
        n.replace("lora_A.default", "lora_down").replace("lora_B.default", "lora_up"): t for n, t in adapters.items()
    }
    scales = {n.replace(".lora_down.weight", ".alpha"): torch.tensor(6.0) for n in kohya if ".lora_down" in n}
    save_file({f"diffusion_model.{n}": t.contiguous() for n, t in (kohya | scales).items()}, tmp_path / "k.safetensors")
    config = RunConfig.model_validate({"student": {"lora": {"rank": 3, "alpha": 6}}})
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    commit = write_commit(tmp_path / "commit", student, trained, config)
    forms: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "lora.pt", with_base | {"init_lora_alpha": 6}),
        (tmp_path / "w.pt", tell | {"init_lora_alpha": 6}),
        (folder, with_base),
        (tmp_path / "k.safetensors", with_base),
        (commit, {}),
    ]
    for path, told in forms:
        loaded = load_student(path, config=told)
        assert loaded.state_dict().keys() == base.keys(), path
        with torch.no_grad():
            torch.testing.assert_close(loaded(noisy, t, prompt), expected, rtol=0, atol=1e-5, msg=path.name)
    with pytest.raises(ValueError, match=r"without their base \(\d+ layers.*name .* in student.init_base"):
        load_student(tmp_path / "lora.pt", config=tell)
    with pytest.raises(ValueError, match=r"do not say the alpha of their adapters \(rank 3\)"):
        load_student(tmp_path / "lora.pt", config=with_base)


def test_files_that_hold_objects_are_not_executed(tmp_path: Path) -> None:
    torch.save({"generator": {"blocks.0.weight": Path("a")}}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="hold Python objects beside tensors, which are not loaded"):
        load_student(tmp_path / "objects.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_torch_files_are_refused_whatever_they_hold(tmp_path: Path) -> None:
    """Text, random bytes, and both of torch's formats cut short or with bytes changed."""
    draw, path = random.Random(0), tmp_path / "student.pt"
    weights = {"blocks.0.ffn.0.weight": torch.zeros(3, 2), "head.head.weight": torch.zeros(2, 2)}
    files: list[bytes] = []
    for is_zip in (True, False):
        torch.save(weights, path, _use_new_zipfile_serialization=is_zip)
        files.append(path.read_bytes())
    cases = [b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>"]
    cases += [draw.randbytes(draw.randrange(100)) for _ in range(60)]
    cases += [b"\x80\x02" + draw.randbytes(draw.randrange(60)) for _ in range(60)]
    cases += [whole[: draw.randrange(len(whole))] for whole in files for _ in range(20)]
    for _ in range(60):
        changed = bytearray(files[1])
        for _ in range(3):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        cases.append(bytes(changed))
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(ValueError, match=r"student weights .*student\.pt (must|hold|do)"):  # nothing else comes out
            load_student(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"optimizer": {}}, "must hold one of ['generator_ema', .*got ['optimizer']"),
        (lambda w: {"generator": {"decoder.conv_in.weight": torch.zeros(1)}}, "the names look like a VAE"),
        (
            lambda w: {"generator": {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)}},
            "the names look like a CogVideoX, LTX or Flux transformer",
        ),
        (
            lambda w: {n: t for n, t in w.items() if n != "blocks.1.ffn.2.bias"},
            "does not fit the model: blocks.1.ffn.net.2.bias is missing",
        ),
        (
            lambda w: w | {"vace_blocks.0.proj.weight": torch.zeros(2)},
            "vace_blocks.0.proj.weight is not a parameter of the model; likely cause: the file holds a Wan VACE model",
        ),
        (
            lambda w: {n: t for n, t in w.items() if not n.startswith("blocks.0.cross_attn")},
            "(and 7 more)",
        ),
        (
            lambda w: w | {"blocks.0.self_attn.q.weight": torch.zeros(3, 4)},
            "blocks.0.attn1.to_q.weight must be [64, 64], got [3, 4]",
        ),
    ],
)
def test_wrong_checkpoints_are_explained(
    original: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    torch.save(change(original), tmp_path / "wrong.pt")
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        load_student(tmp_path / "wrong.pt", config=CANNOT_TELL)


def test_likely_causes_name_the_family_and_the_size(make_student: MakeStudent) -> None:
    def weights(**changes: Any) -> dict[str, Tensor]:
        return make_student(**WAN | changes).state_dict()

    i2v = {"in_channels": 36, "image_dim": 10}
    for expected, got, message in (
        (weights(), weights(**i2v), "likely cause: image-to-video weights for a text-to-video model"),
        (weights(**i2v), weights(), "likely cause: text-to-video weights for a image-to-video model"),
        (weights(), weights(num_layers=3), r"another size of model \(3 blocks where 2 are expected\), or shards"),
        (weights(), weights(num_heads=3), r"another size of model \(width 48 where 32 is expected\)"),
        (weights(), weights(in_channels=36), "36 input channels where 16 are expected: image-to-video"),
    ):
        with pytest.raises(ValueError, match=message):
            check_names_and_shapes(expected, got, source="file")


def test_contradictions_are_refused(
    make_student: MakeStudent, diffusers_folder: DiffusersFolder, original: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = diffusers_folder(make_student(**WAN), tmp_path / "m", num_shards=3)
    for given, message in (
        ({"num_layers": 30}, r"student.num_layers must be 2, as in student weights .*, got 30"),
        ({"num_heads": 12}, r"student.num_heads must be 2"),
        ({"chunk_frame": 3}, r"chunk_frame, which is not a field of the student section, did you mean chunk_frames\?"),
    ):
        with pytest.raises(ValueError, match=message):
            load_student(folder, config=given)
    torch.save(original, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"num_heads must divide the width 64 .* got 3 heads of 21"):
        load_student(tmp_path / "w.pt", config={"num_heads": 3})
    with pytest.raises(ValueError, match=r"num_heads must divide the width 64 .* got 0 heads of 128"):
        load_student(tmp_path / "w.pt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 40}))
    with pytest.raises(ValueError, match=r"config.json says num_layers 40, the tensors show 2"):
        load_student(folder)
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(ValueError, match="is the configuration of a AutoencoderKLWan, not of a Wan transformer"):
        load_student(folder)
    (folder / "config.json").write_text(json.dumps(config))
    next(folder.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lack 1 of \d shards of their index: .*copy is incomplete"):
        load_student(folder)


def test_paths_that_are_no_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 and then nothing")
    for path, message in (
        (tmp_path / "none", "do not exist"),
        (tmp_path / "notes.txt", "must be a .safetensors file, a torch file"),
        (tmp_path / "half.pt", "half.pt "),
        (tmp_path, r"must be a folder with config.json .* got a folder with \['half.pt', 'notes.txt'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_student(path)


def wan_names(num_layers: int, dim: int, ffn_dim: int, in_dim: int = 16) -> dict[str, tuple[int, ...]]:
    """Every tensor of an original Wan2.1 T2V model and its shape, written out from its description."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, in_dim, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "time_embedding.0.weight": (dim, 256),
        "time_embedding.2.weight": (dim, dim),
        "text_embedding.0.weight": (dim, 4096),
        "text_embedding.2.weight": (dim, dim),
        "time_projection.1.weight": (6 * dim, dim),
        "time_projection.1.bias": (6 * dim,),
        "head.head.weight": (64, dim),
        "head.head.bias": (64,),
        "head.modulation": (1, 2, dim),
    }
    shapes |= {f"{kind}_embedding.{layer}.bias": (dim,) for kind in ("time", "text") for layer in (0, 2)}
    for block in range(num_layers):
        here: dict[str, tuple[int, ...]] = {"modulation": (1, 6, dim), "norm3.weight": (dim,), "norm3.bias": (dim,)}
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                here |= {f"{attention}.{part}.weight": (dim, dim), f"{attention}.{part}.bias": (dim,)}
            here |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        here |= {"ffn.0.weight": (ffn_dim, dim), "ffn.0.bias": (ffn_dim,)}
        here |= {"ffn.2.weight": (dim, ffn_dim), "ffn.2.bias": (dim,)}
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in here.items()}
    return shapes


@pytest.mark.parametrize(
    ("num_layers", "heads", "ffn_dim", "count"), [(30, 12, 8960, 825), (40, 40, 13824, 1095)], ids=["1.3B", "14B"]
)
def test_every_tensor_of_the_real_models_has_its_place(num_layers: int, heads: int, ffn_dim: int, count: int) -> None:
    from diffusers import WanTransformer3DModel

    from afd.models.weights import diffusers_name
    from afd.models.weights.shapes import resolve_shape
    from afd.models.weights.sources import LazyTensor, WeightSource

    def unread() -> Tensor:
        raise AssertionError("only headers are needed")

    names = wan_names(num_layers, heads * 128, ffn_dim)
    assert len(names) == count
    tensors = {
        diffusers_name(f"model.{name}"): LazyTensor(shape, torch.float32, unread) for name, shape in names.items()
    }
    shape = resolve_shape(WeightSource("the list", tensors))
    assert (shape.num_layers, shape.num_heads, shape.head_dim, shape.text_len) == (num_layers, heads, 128, 512)
    with torch.device("meta"):
        ours = CausalStudent(shape).state_dict()
        theirs = WanTransformer3DModel(
            num_attention_heads=heads, ffn_dim=ffn_dim, num_layers=num_layers, text_dim=4096
        ).state_dict()
    check_names_and_shapes(ours, tensors, source="the list")
    check_names_and_shapes(theirs, ours, source="ours")
    assert {original_name(name): tuple(tensor.shape) for name, tensor in ours.items()} == names
