"""Reading and writing the run's configuration: every mistake gets one line that teaches."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from afd.config import RunConfig, StudentSection, StudentShape, configured_shape
from afd.config_file import ConfigError, dump_config, load_config


def write(folder: Path, text: str) -> Path:
    """A YAML file."""
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The one line a wrong configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == RunConfig()


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\nrollout:\n  group_size: 8\n  shift: 2.0\n")
    config = load_config(
        path,
        [
            "rollout.group_size=2",
            "--nft.nft_beta=0.1",
            "rollout.steps=[900, 10]",
            "data.train_shards=a/b",
            "student.init_from=null",
            "teacher.physics.gravity=-2",
        ],
    )
    assert (config.seed, config.rollout.group_size, config.rollout.shift) == (3, 2, 2.0)
    assert (config.nft.nft_beta, config.rollout.steps) == (0.1, (900, 10))
    assert config.data.train_shards == Path("a/b")
    assert config.student.init_from is None
    assert config.teacher.physics.gravity == -2


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("seed: 3\nrollout:\n  group_size: 8\n  shift: 2.0\n")
    config = load_config(write(tmp_path, "base: below.yaml\nrollout:\n  shift: 5.0\n"), ["seed=4"])
    assert (config.seed, config.rollout.group_size, config.rollout.shift) == (4, 8, 5.0)


def test_a_base_that_is_missing_or_leads_back_is_refused(tmp_path: Path) -> None:
    assert "nowhere.yaml of" in refusal(write(tmp_path, "base: nowhere.yaml\n"))
    assert "must not lead back to" in refusal(write(tmp_path, "base: run.yaml\n"))
    assert "must be the name of a YAML file, got 3" in refusal(write(tmp_path, "base: 3\n"))


def test_dump_reads_back_to_an_equal_configuration(tmp_path: Path) -> None:
    overrides = ["seed=7", "rollout.steps=[1000,1]", "student.init_from=weights/a.safetensors", "nft.variant=plain"]
    config = load_config(write(tmp_path, ""), overrides)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(write(tmp_path, dump_config(RunConfig()))) == RunConfig()


@pytest.mark.parametrize("text", ["off", "'off'", '"off"'])
def test_off_is_a_word_where_a_word_is_wanted(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, f"prepare:\n  dedupe_videos: {text}\n"))
    assert config.prepare.dedupe_videos == "off"
    assert load_config(write(tmp_path, ""), [f"prepare.dedupe_videos={text}"]).prepare.dedupe_videos == "off"
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "value"), [("off", False), ("no", False), ("on", True), ("true", True), ("No", False)]
)
def test_what_is_true_or_false_may_be_said_in_many_ways(tmp_path: Path, text: str, value: bool) -> None:
    assert load_config(write(tmp_path, f"data:\n  shuffle: {text}\n")).data.shuffle is value


@pytest.mark.parametrize(
    "text", ["runs/a #2", "/x/a: b", "2024-06-01", "2024-13-01", "17", "1e3", "[a]", "{a", "- b", "off", "a 'b'"]
)
def test_words_and_paths_are_taken_as_they_stand(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "")
    assert load_config(path, [f"output_dir={text}"]).output_dir == Path(text)
    assert load_config(path, output_dir=text).output_dir == Path(text)
    config = load_config(path, [f"teacher.folder.path={text}", f"teacher.pipeline.negative_prompt={text}"])
    assert config.teacher.folder.path == Path(text)
    assert config.teacher.pipeline.negative_prompt == text
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_null_and_quotes_mean_what_they_mean_in_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "teacher:\n  licence: mine\n  folder:\n    path: a\n")
    assert load_config(path, ["teacher.folder.path=null"]).teacher.folder.path is None
    assert load_config(path, ["teacher.folder.path="]).teacher.folder.path is None
    assert load_config(path, ["teacher.folder.path='null'"]).teacher.folder.path == Path("null")
    assert load_config(path, ['teacher.licence=""']).teacher.licence == ""
    assert load_config(path, ['teacher.licence="a # b"']).teacher.licence == "a # b"
    assert load_config(path, output_dir="null").output_dir == Path("null")
    for nothing in ("output_dir=", "output_dir=null"):
        assert refusal(path, nothing).startswith("output_dir: Input is not a valid path")
    with pytest.raises(ConfigError, match="output_dir: Input is not a valid path"):
        load_config(path, output_dir="")


def test_a_date_in_a_file_is_a_word(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "output_dir: 2024-06-01\n")).output_dir == Path("2024-06-01")
    assert load_config(write(tmp_path, "output_dir: 2024-13-01\n")).output_dir == Path("2024-13-01")


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "rollout:\n  group_size: 8\nseed: 1\nrollout:\n  shift: 2.0\n")
    assert refusal(path) == f"--config {path} is not valid YAML: key 'rollout' appears twice, in lines 1 and 4"
    path = write(tmp_path, "rollout: {group_size: 8, group_size: 4}\n")
    assert refusal(path).endswith("key 'group_size' appears twice, in lines 1 and 1")
    merged = "teacher:\n  <<: {num_prompts: 7, first_seed: 2}\n  num_prompts: 9\n"
    teacher = load_config(write(tmp_path, merged)).teacher
    assert (teacher.num_prompts, teacher.first_seed) == (9, 2)


def test_the_shipped_configuration_is_valid() -> None:
    assert load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml").rollout.group_size > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout:\n  group_sise: 4\n", "unknown key rollout.group_sise, did you mean rollout.group_size?"),
        ("rolout:\n  group_size: 4\n", "unknown key rolout, did you mean rollout?"),
        ("group_size: 4\n", "unknown key group_size, did you mean rollout.group_size?"),
        ("nft:\n  group_size: 4\n", "unknown key nft.group_size, did you mean rollout.group_size?"),
        ("zzzzzz: 4\n", "unknown key zzzzzz"),
        ("17: 4\n", "unknown key 17"),
    ],
)
def test_unknown_keys_get_a_suggestion(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(write(tmp_path, text)) == message


@pytest.mark.parametrize("key", ["train_batch_size", "lr", "student.lr", "gradient_clipping", "nft.precision"])
def test_deepspeeds_knobs_are_sent_to_its_json(tmp_path: Path, key: str) -> None:
    expected = f"{key} belongs in the DeepSpeed JSON (--ds_config), not in the YAML configuration"
    assert refusal(write(tmp_path, ""), f"{key}=1") == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps=0", "num_steps: Input should be greater than 0, got 0"),
        ("num_steps=many", "num_steps: Input should be a valid integer"),
        ("rollout.policy=newest", "rollout.policy: Input should be 'current' or 'ema', got 'newest'"),
        ("averages.ema_decay=1.5", "averages.ema_decay: Input should be less than or equal to 1, got 1.5"),
        ("discriminator.label_smoothing=0.5", "discriminator.label_smoothing: Input should be less than 0.5"),
        ("nft.nft_beta=.nan", "nft.nft_beta: "),
        ("rollout.steps=[1000, x]", "rollout.steps.1: Input should be a valid integer"),
        ("rollout=4", "rollout must be a section with fields ['batch_size', 'compile', 'context_noise', "),
        ("rollout.group_size", "override must read section.field=value, got 'rollout.group_size'"),
        ("rollout..group_size=4", "override must read section.field=value, got 'rollout..group_size=4'"),
        ("seed.x=4", "override seed.x: 'seed' is a value, not a section"),
        ("rollout.steps=[1000", "override rollout.steps must have a YAML value, got '[1000'"),
        ("seed=0x_", "override seed must have a YAML value, got '0x_'"),
        ("teacher.licence='a", 'override teacher.licence must have a YAML value, got "\'a"'),
    ],
)
def test_wrong_values_name_the_field_and_what_came(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(write(tmp_path, "seed: 0\n"), override).startswith(message)


def test_a_section_as_a_whole_says_what_came_itself(tmp_path: Path) -> None:
    line = refusal(write(tmp_path, ""), "teacher.kind=shards", "teacher.live.enabled=true")
    assert line == "teacher: live.enabled needs a teacher to ask: kind must not be shards"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.yaml") == f"--config {tmp_path / 'absent.yaml'} does not exist"
    assert refusal(tmp_path) == f"--config {tmp_path} does not exist"


@pytest.mark.parametrize("content", [b"rollout: [1, 2\n", b"a: b: c\n", b"\xff\xfe\xff"])
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"--config {path} is not valid YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("- 1\n", "list"), ("hello\n", "str"), ("3\n", "int")])
def test_a_file_must_hold_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path) == f"--config {path} must hold a mapping of sections, got {kind}"


def test_the_configuration_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        config.rollout.group_size = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_is_documented() -> None:
    def undocumented(section: type, prefix: str) -> list[str]:
        names = []
        for name, field in section.model_fields.items():  # pyright: ignore[reportAttributeAccessIssue]
            nested = field.annotation
            if hasattr(nested, "model_fields"):
                names += undocumented(nested, f"{prefix}{name}.")
            elif not field.description:
                names.append(f"{prefix}{name}")
        return names

    assert undocumented(RunConfig, "") == []


def test_a_student_section_may_choose_how_it_attends_and_must_agree_about_the_rest() -> None:
    shape = StudentShape(num_layers=2, chunk_frames=3)
    section = StudentSection(num_layers=2, chunk_frames=1, window_frames=4, sink_frames=1, attention_impl="reference")
    assert configured_shape(shape, section) == shape.model_copy(
        update={"chunk_frames": 1, "window_frames": 4, "sink_frames": 1, "attention_impl": "reference"}
    )
    with pytest.raises(ValueError, match=r"student\.num_heads must be 2, as in the student's file, got 3"):
        configured_shape(shape, StudentSection(num_heads=3))
