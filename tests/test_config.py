"""Reading a config: strict, every mistake at once and where it is, nothing guessed, nothing executed."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain.config import Config, dump, load
from pretrain.config.idle import idle_settings
from pretrain.config.load import MAX_BYTES, parse
from pretrain.config.resume import MAY_CHANGE, changed_keys, flatten, refused
from pretrain.config.sizes import SIZES
from pretrain.errors import ConfigError

ROOT = Path(__file__).parents[1]

SMALLEST = """\
run: {dir: runs/x}
data: {train: {shards: data/train}}
model: {size: Ti, img_size: [32, 32], patch_size: [4, 4], num_classes: 10}
optim: {lr: 1e-3}
train: {global_batch: 64, total_steps: 10}
"""


def read(text: str = SMALLEST, *overrides: str) -> Config:
    return parse(text, "x.yaml", overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the heading that counts them."""
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    heading, *lines = str(caught.value).splitlines()
    if lines:
        assert heading.startswith(f"{len(lines)} mistake")
    return [line.strip() for line in lines] or [heading]


TEN_MISTAKES = """\
run:
  dir: no
  sed: 1
data:
  train: data/train
  val_crop: 1.5
model:
  size: Ti
  img_size: 32
  patch_size: [4, 4]
  num_classes: 10
  act: gelu_tahn
optim:
  lr: yes
  weight_decay: 0,05
train:
  global_batch: 012
  total_steps: 10
trackin: {uri: null}
"""


def test_ten_mistakes_are_reported_at_once_each_with_its_line_and_what_would_be_right() -> None:
    lines = mistakes(TEN_MISTAKES)
    assert len(lines) == 10
    expected = [
        'x.yaml:2: run.dir: YAML reads no as a boolean; a string is needed: write "no" in quotes',
        "x.yaml:3: run.sed: unknown key (did you mean seed?)",
        "x.yaml:5: data.train: is a section with keys, given 'data/train'",
        "x.yaml:6: data.val_crop: must be less than or equal to 1, given 1.5",
        "x.yaml:9: model.img_size: needs a list such as [16, 16], given 32",
        "x.yaml:12: model.act: 'gelu_tahn' is not allowed; one of: 'gelu', 'gelu_tanh', 'relu', 'elu', 'silu' or 'swiglu' (did you mean gelu_tanh?)",
        "x.yaml:14: optim.lr: must be a valid number, given True",
        "x.yaml:15: optim.weight_decay: must be a valid number, given '0,05'",
        "x.yaml:17: train.global_batch: must be a valid integer, given '012'",
        "x.yaml:19: trackin: unknown key (did you mean tracking?)",
    ]
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_the_error_comes_at_once() -> None:
    start = time.thread_time()  # of the processor: what else the machine does is nothing to it
    mistakes(TEN_MISTAKES)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E+3", 1e3), ("3.", 3.0), (".5", 0.5), ("2", 2.0), ("1_0.5", 10.5)]
)
def test_a_number_reads_as_people_write_it(text: str, value: float) -> None:
    assert read(SMALLEST.replace("1e-3", text)).optim.lr == value


@pytest.mark.parametrize("text", ["012", "0x10", "1:30", "1e2", "64.0", "true", '"64"', "2024-01-01"])
def test_what_is_not_an_integer_is_not_made_one(text: str) -> None:
    (line,) = mistakes(SMALLEST.replace("64", text))
    assert "train.global_batch: must be a valid integer" in line


@pytest.mark.parametrize("text", ["many", "-1", "1.5"])
def test_a_setting_of_two_kinds_is_named_without_the_kinds(text: str) -> None:
    lines = mistakes(SMALLEST.replace("data: {", f"data: {{decode_threads: {text}, "))
    assert all(": data.decode_threads: " in line for line in lines)


@pytest.mark.parametrize("text", [".nan", ".inf", "1e999", "-1.0", "0"])
def test_a_learning_rate_is_positive_and_finite(text: str) -> None:
    (line,) = mistakes(SMALLEST.replace("1e-3", text))
    assert "optim.lr" in line


@pytest.mark.parametrize("word", ["no", "off", "yes", "True"])
def test_a_boolean_word_in_a_string_field_says_to_quote_it(word: str) -> None:
    (line,) = mistakes(SMALLEST.replace("runs/x", word))
    assert f'write "{word}" in quotes' in line
    assert read(SMALLEST.replace("runs/x", f'"{word}"')).run.dir == word


@pytest.mark.parametrize("text", [".", "..", "-", "2024-01-01", "1:30", "012", "./x", "~/x"])
def test_a_path_that_looks_like_something_else_stays_a_path(text: str) -> None:
    config = read(SMALLEST.replace("runs/x", f"'{text}'" if text == "-" else text))
    assert config.run.dir == text


def test_a_key_given_twice_is_refused() -> None:
    (line,) = mistakes(SMALLEST + "optim: {lr: 1e-4}\n")
    assert line == "x.yaml:6: optim: given twice in one section"


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"x\.yaml:2: .*aliases \(\*name\) are not used in configs"),
        (SMALLEST + "<<: {a: 1}\n", "unknown key"),
        (SMALLEST.replace("1e-3", "!!python/object/apply:os.abort []"), r"x\.yaml:4: .*tags .*are not used"),
        (SMALLEST.replace("1e-3", "!env HOME"), r"x\.yaml:4: .*tags \(!env\)"),
        (SMALLEST.replace("1e-3", "!!float x"), r"x\.yaml:4: .*tags"),
        ("a: b: c", r"x\.yaml:1: not valid YAML: mapping values are not allowed here"),
        (SMALLEST + "---\n" + SMALLEST, r"x\.yaml:6: not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, r"x\.yaml: not valid YAML"),
        (SMALLEST.replace("64", "9" * 5000), r"x\.yaml: not valid YAML"),
        ("run: \x00", r"x\.yaml: not valid YAML"),
        ("", "a config is a mapping of sections"),
        ("- run", "a config is a mapping of sections"),
    ],
    ids=lambda value: value[:24],
)
def test_hostile_or_broken_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


@given(st.text(alphabet=st.sampled_from("a:-[]{}*&!|>%@'\"#,? \n.0123e_~"), max_size=60))
@example("run: .")
@example("? ? :")
def test_no_text_ends_in_anything_but_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        read(text)


def test_a_missing_and_an_overlong_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.yaml"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read the config"):
        load(tmp_path)
    long = tmp_path / "long.yaml"
    long.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="at most"):
        load(long)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.total_epochs=3", "give exactly one of total_steps, total_epochs, total_samples"),
        ("optim.warmup_steps=1 optim.warmup_epochs=1", "give at most one of warmup_steps"),
        ("optim.min_lr=1.0", "min_lr 1.0 is above lr 0.001"),
        ("model.img_size=[30,32]", "img_size height 30 is not a multiple of patch_size height 4"),
        ("model.num_heads=4", "size Ti means num_heads 3, but num_heads 4 is given"),
        ("model.size=null", "give `size` .* or all of embed_dim"),
        ("model.mean=[0.5,0.5]", "mean has 2 values; give 1 or 3"),
        ("model.std=[0.0]", "must be above 0"),
        ("model.pos_embed=relative", "acts inside attention, .* add pos_embed_at every_layer"),
        ("model.pos_embed=rope_2d model.pos_embed_at=every_layer", "rope_2d has no table: leave it out"),
        ("model.pos_embed=none model.pos_embed_at=every_layer_shared", "none has no table: leave it out"),
        (
            "model.size=null model.embed_dim=6 model.depth=1 model.num_heads=1 model.mlp_dim=8 "
            "model.pos_embed=rope_2d",
            "rope_2d needs the width of a head to be a multiple of 4; it is 6",
        ),
        (
            "model.size=null model.embed_dim=6 model.depth=1 model.num_heads=1 model.mlp_dim=8 "
            "model.pos_embed=sincos_2d_mae",
            "sincos_2d_mae needs embed_dim to be a multiple of 4; it is 6",
        ),
        (
            "model.size=null model.embed_dim=4 model.depth=1 model.num_heads=1 model.mlp_dim=8 "
            "model.pos_embed=sincos_2d_big_vision",
            "needs embed_dim of at least 8; it is 4",
        ),
        ("engine.compile=true engine.zero_stage=3", "compile needs zero_stage 0, 1 or 2"),
        ("data.augment.scale=[0.5,0.1]", "0 < low <= high <= 1"),
        ("data.augment.ratio=[0.0,1.0]", "0 < low <= high"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(override: str, message: str) -> None:
    lines = mistakes(SMALLEST, *override.split(" "))
    assert any(re.search(message, line) for line in lines)


MIX = "data.train={mix: [{name: a, shards: d/a, weight: 3}, {name: %s, shards: d/b, weight: %s}]}"


def test_a_mixture_is_read_with_its_weights_as_whole_numbers() -> None:
    train = read(SMALLEST, MIX % ("b", "0.5")).data.train
    assert (train.names, train.ratios, train.patterns) == (("a", "b"), (6, 1), ("d/a", "d/b"))
    alone = read().data.train
    assert (alone.names, alone.ratios, alone.patterns) == (("train",), (1,), ("data/train",))


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("a", "1", "two sources of mix are named a"),
        ("../b", "1", r"data\.train\.mix\.1\.name: must be .* pattern"),
        ("b", "0", r"data\.train\.mix\.1\.weight: must be greater than 0"),
        ("b", "1.00001", "more than 65,536; give round ones, such as 3 : 1"),
        (
            "b",
            "1, wieght: 2",
            r"wieght: unknown key \(did you mean weight\?\); allowed here: name, shards, weight",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(name: str, weight: str, message: str) -> None:
    (line,) = mistakes(SMALLEST, MIX % (name, weight))
    assert re.search(message, line)


def test_training_data_is_one_folder_or_several_sources() -> None:
    for train in (
        "{}",
        "{shards: x, mix: [{name: a, shards: a, weight: 1}, {name: b, shards: b, weight: 1}]}",
    ):
        (line,) = mistakes(SMALLEST, f"data.train={train}")
        assert "data.train: give exactly one of shards, mix" in line
    (line,) = mistakes(SMALLEST, "data.train={mix: [{name: a, shards: a, weight: 1}]}")
    assert "mix is a list of 2 to 16 sources; given: 1" in line


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_fills_the_shape(name: str) -> None:
    model = read(SMALLEST, f"model.size={name}").model
    assert (model.width, model.num_blocks, model.heads, model.mlp_width) == tuple(SIZES[name])


def test_overrides_replace_add_and_open_sections() -> None:
    config = read(
        SMALLEST, "optim.lr=3e-4", "data.val.shards=data/val", "init.from=runs/a", "model.img_size=[48, 32]"
    )
    assert config.optim.lr == 3e-4
    assert config.data.val is not None
    assert config.data.val.shards == "data/val"
    assert config.init is not None
    assert config.init.source == "runs/a"
    assert config.model.img_size == (48, 32)
    assert config.data.train.shards == "data/train"


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", ".lr=3"])
def test_an_override_of_another_form_says_how_to_write_it(override: str) -> None:
    assert mistakes(SMALLEST, override) == [
        f"override {override!r}: write it as key.sub=value, for instance optim.lr=1e-3"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=3", r"override 'optim\.lrr=3': optim\.lrr: unknown key \(did you mean lr\?\)"),
        ("optim.lr=", r"override 'optim\.lr=': optim\.lr: must be a valid number, given None"),
        ("optim.lr=[", r"override 'optim\.lr=\[':1: not valid YAML"),
        ("optim=3", r"override 'optim=3': optim: is a section with keys"),
        ("run.dir.x=3", r"run\.dir: must be a valid string"),
    ],
)
def test_a_wrong_override_is_the_place_that_is_named(override: str, message: str) -> None:
    (line,) = mistakes(SMALLEST, override)
    assert re.search(message, line)


paths = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029\ufeff"),
    min_size=1,
    max_size=30,
)
numbers = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)


@given(directory=paths, shards=paths, lr=numbers, seed=st.integers(0, 2**32 - 1), campaign=st.none() | paths)
@example(directory="1e-3", shards="012", lr=1e-8, seed=0, campaign="no")
@example(directory="!x", shards=".", lr=5e-324 * 1e20, seed=1, campaign="null")
@example(directory="*a", shards="&a b", lr=1.0, seed=1, campaign="# x")
def test_a_dumped_config_reads_back_the_same(
    directory: str, shards: str, lr: float, seed: int, campaign: str | None
) -> None:
    values = read().model_dump(by_alias=True) | {
        "run": {"dir": directory, "seed": seed, "campaign": campaign},
        "data": {"train": {"shards": shards}},
        "init": {"from": directory},
    }
    values["optim"]["lr"] = lr
    config = Config.model_validate(values)
    assert parse(dump(config), "dumped") == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_opens_with_its_command(path: Path) -> None:
    load(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(str(path.relative_to(ROOT)) in line for line in header), "the header shows the command"


def test_the_same_settings_are_no_change() -> None:
    assert changed_keys(read(), read()) == []


def test_a_longer_training_and_another_log_interval_may_follow() -> None:
    assert changed_keys(read(), read(SMALLEST, "train.total_steps=20", "train.log_every_steps=1")) == []
    assert changed_keys(read(), read(SMALLEST, "tracking.uri=null", "checkpoint.keep=5")) == []


@pytest.mark.parametrize("override", ["train.global_batch=32", "run.seed=1", "data.lanes=4"])
def test_a_change_of_what_is_computed_is_named(override: str) -> None:
    changes = changed_keys(read(), read(SMALLEST, override))
    key, value = override.split("=")
    assert any(c.key == key and re.fullmatch(rf"{key}: .* -> '?{value}'?", c.words) for c in changes)
    assert refused(changes, allowed=[key]) == [c.words for c in changes]  # no option lets these change


def test_a_run_keeps_its_beginning_which_may_have_moved() -> None:
    begun, moved = read(SMALLEST, "init.from=x"), read(SMALLEST, "init.from=y")
    assert [c.words for c in changed_keys(begun, moved)] == ["init.from: 'x' -> 'y'"]
    assert refused(changed_keys(begun, moved), []) == ["init.from: 'x' -> 'y'"]
    assert refused(changed_keys(begun, moved), ["init.from"]) == []
    assert refused(changed_keys(read(), begun), ["init"])
    assert refused(changed_keys(begun, read(SMALLEST, "init.from=x", "init.position=drop")), ["init"])


def test_the_shards_of_a_mixture_may_have_moved() -> None:
    before, now = (read(SMALLEST, (MIX % ("b", "1")).replace("d/", folder)) for folder in ("d/", "e/"))
    changes = changed_keys(before, now)
    assert [c.key for c in changes] == ["data.train.mix.0.shards", "data.train.mix.1.shards"]
    assert len(refused(changes, [])) == 2
    assert refused(changes, ["data.train.mix"]) == []


def test_a_change_of_a_mixture_is_named_by_its_source() -> None:
    before, now = (read(SMALLEST, MIX % ("b", weight)) for weight in ("1", "2"))
    assert [change.words for change in changed_keys(before, now)] == ["data.train.mix.1.weight: 1.0 -> 2.0"]
    assert refused(changed_keys(before, now), ["data"])


def test_other_changes_are_refused_until_they_are_allowed() -> None:
    changes = changed_keys(read(), read(SMALLEST, "optim.lr=0.5", "objective.label_smoothing=0.1"))
    assert len(refused(changes, [])) == 2
    assert len(refused(changes, ["optim"])) == 1
    assert refused(changes, ["optim.lr", "objective.label_smoothing"]) == []


def test_every_key_that_may_change_exists() -> None:
    keys = flatten(read(SMALLEST, "init.from=x", "data.val.shards=y"))
    for name in MAY_CHANGE:
        assert any(key == name or key.startswith(name + ".") for key in keys), name


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        (["optim.name=sgd", "optim.betas=[0.8, 0.9]"], ["optim.betas"]),
        (["optim.momentum=0.8"], ["optim.momentum"]),
        (["optim.schedule=constant", "optim.min_lr=1e-4"], ["optim.min_lr"]),
        (["data.augment.crop=resize", "data.augment.scale=[0.5, 1.0]"], ["data.augment.scale"]),
        (["data.augment.crop=resize_crop", "data.augment.ratio=[1.0, 1.0]"], ["data.augment.ratio"]),
        (["data.augment.crop=inception", "data.augment.ratio=[1.0, 1.0]"], []),
        (
            [
                "model.in_chans=1",
                "data.augment.color_jitter.hue=0.1",
                "data.augment.color_jitter.contrast=0.1",
            ],
            ["data.augment.color_jitter.hue"],
        ),
        (["objective.mix_prob=0.5"], ["objective.mix_prob"]),
        (["objective.mixup_alpha=0.2", "objective.mix_switch_prob=0.1"], ["objective.mix_switch_prob"]),
        (["data.decode_threads=0", "data.prefetch_steps=5"], ["data.prefetch_steps"]),
        (["data.decode_threads=0", "data.workers=processes"], ["data.workers"]),
        (["train.eval_every_steps=5", "data.val_crop=0.9"], ["data.val_crop", "train.eval_every_steps"]),
        (["data.val.shards=x", "train.eval_every_steps=5", "data.val_crop=0.9"], []),
        (["model.global_pool=avg", "model.pos_embed_order=pe_then_cls"], ["model.pos_embed_order"]),
        (
            ["model.global_pool=avg", "model.num_registers=1", "model.pos_embed_order=pe_then_cls"],
            [],
        ),
        (["model.pos_embed=none", "model.pos_embed_order=pe_then_cls"], ["model.pos_embed_order"]),
        (["model.rope_reference_grid=[4,4]"], ["model.rope_reference_grid"]),
        (["model.pos_embed=rope_2d", "model.rope_reference_grid=[4,4]"], []),
        (["model.pos_embed=rope_2d", "init.from=x", "init.position=reset"], ["init.position"]),
        (["model.pos_embed=rope_2d", "init.from=x", "init.resize_kernel=bicubic"], ["init.resize_kernel"]),
        (
            ["model.pos_embed=rope_2d", "init.from=x", "init.patch=resize", "init.resize_kernel=bicubic"],
            [],
        ),
        (["init.from=x", "init.position=drop", "init.resize_kernel=bilinear"], ["init.resize_kernel"]),
        (["tracking.uri=null", "run.campaign=c"], ["run.campaign"]),
        ([], []),
    ],
)
def test_a_setting_that_cannot_take_effect_is_named(given: list[str], idle: list[str]) -> None:
    assert [words.partition("=")[0] for words in idle_settings(read(SMALLEST, *given))] == idle


def test_a_decay_rate_of_one_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"optim\.betas.*less than 1"):
        read(SMALLEST, "optim.betas=[0.9, 1.0]")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("run.campaign=token=hunter2", "run.campaign"),
        ("tracking.uri=http://me:hunter2@head:5000", "tracking.uri"),
        ("data.train.shards=s3://bucket/a?X-Amz-Signature=hunter2", "data.train.shards"),
        ("tracking.hf_token=hunter2", "tracking.hf_token"),
        ("optim.name=hf_hunter2hunter2hunter2", "optim.name"),
        ("init={from: https://hunter2@host/x}", "init.from"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(override: str, where: str) -> None:
    words = "\n".join(mistakes(SMALLEST, override))
    assert "looks like a secret" in words
    assert where in words
    assert "hunter2" not in words
