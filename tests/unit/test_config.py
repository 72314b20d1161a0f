"""Recipes: every shipped one loads, every fault is named with its path and what would be right, overrides do what they say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megatron_opd.cli import build_parser
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.recipe.files import apply_overrides, build_recipe, load_recipe, parse_override, shipped_recipes

MINIMAL = 'name = "mine"\n[models]\nteacher = "models/big"\nstudent = "models/small"\n'


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_resolves(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(f"{name}.toml") == recipe
    assert not re.search(r"\{(name|run_dir|teacher|student)\}", str(recipe.model_dump()))
    assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_there_are_shipped_recipes() -> None:
    assert "tiny" in shipped_recipes()


def test_the_resolved_recipe_of_any_settings_round_trips() -> None:
    overrides = [
        "eval.held_out.teacher=null", "generate=null", "rollout.num_prompts=3", "train.max_response_tokens=9", "train.loss.advantage_clip=2.5", "engine.context_length=64",
        'rollout.encoding.system="Say \\"hi\\" to {someone}.\\nThen stop. é"', "score.top_k=4", 'engine.urls=["http://127.0.0.1:1"]', "sft.steps=5",
    ]  # fmt: skip
    recipe = load_recipe("tiny", overrides)
    assert recipe.generate is None
    assert recipe.eval["held_out"].teacher is None
    assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_every_optional_field_that_is_off_round_trips() -> None:
    """TOML has no null: a field that is off must not come back as its default."""

    def optional(model: type[BaseModel], path: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            if type(None) in kinds:
                found.append(f"{path}{name}")
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    found += optional(kind, f"{path}{name}.held_out." if name == "eval" else f"{path}{name}.")
        return found

    fields = [field for field in optional(Recipe, "") if field not in ("generate", "rollout", "sft.global_batch", "train.global_batch")]
    assert len(fields) > 10
    for field in fields:
        recipe = load_recipe("tiny", [f"{field}=null"])
        assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe, field


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", r"train\.lrr: no such field; did you mean 'lr'\?"),
        ("trian.lr=1", r"trian: no such field; did you mean 'train'\?"),
        ("train.parallel.tq=2", r"train\.parallel\.tq: no such field; there are tp, pp, "),
        ("rollout.sampling.temprature=1", r"rollout\.sampling\.temprature: no such field; did you mean 'temperature'\?"),
        ("rollout.encoding.sistem=x", r"rollout\.encoding\.sistem: no such field; did you mean 'system'\?"),
        ("models.zzz=x", r"models\.zzz: no such field; there are teacher, student$"),
        ("train.lr=fast", r"train\.lr: .*valid number.*\(got 'fast'\)"),
        ("train.global_batch=0", r"train\.global_batch: .*greater than 0 \(got 0\)"),
        ("train.global_batch=null", r"train: .*global_batch = null: steps need a size; give global_batch, or global_batch_tokens in its place$"),
        ("rollout.subset_seed=1", r"rollout: .*subset_seed = 1 draws num_prompts prompts of the file; give num_prompts, or leave it out$"),
        ("train.global_batch=2.5", r"train\.global_batch: .*valid integer.*\(got 2.5\)"),
        ("engine.kind=vllm", r"engine\.kind: .*'auto', 'transformers' or 'sglang' \(got 'vllm'\)"),
        ("train=3", r"train: .*\(got 3\)"),
        ("train.lr=inf", r"train\.lr: .*finite.*\(got inf\)"),
        ("train.lr=nan", r"train\.lr: .*\(got nan\)"),
        ("train.lr=1e38", r"train: .*lr = 1e\+38 makes steps that float32 can't hold; it may be at most 1e\+30$"),
        ("sft.lr=1e38", r"sft: .*lr = 1e\+38 makes steps that float32 can't hold; it may be at most 1e\+30$"),
        ("train.schedule.min_lr=1", r"train: .*schedule\.min_lr = 1 is above lr = 0\.001; lower it, or raise lr$"),
        ("sft.keep_every=15", r"sft: .*keep_every = 15 is not a multiple of save_every = 10: other steps are not saved; take 20, or another"),
        ("rollout.sampling.temperature=inf", r"rollout\.sampling\.temperature: .*finite"),
        ("rollout.sampling.temperature=-1", r"rollout\.sampling\.temperature: .*\(got -1\)"),
        ("rollout.sampling.top_p=0", r"rollout\.sampling\.top_p: .*greater than 0"),
        ("rollout.sampling.seed=-1", r"rollout\.sampling\.seed: .*\(got -1\)"),
        ("train.seed=99999999999999999999", r"train\.seed: .*less than"),
        ("score.teacher=../other", r"score\.teacher: .*\(got '../other'\)"),
        ("name=a/b", r"name: .*\(got 'a/b'\)"),
        ("models.teacher=null", r"models\.teacher: .*valid string.*\(got None\)"),
        ("models.teacher=7", r"models\.teacher: .*valid string.*\(got 7\)"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_path_and_value(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)^tiny: 1 field\(s\) wrong\n  {message}"):
        load_recipe("tiny", [override])


def test_a_batch_is_of_rollouts_or_of_tokens() -> None:
    """What is laid over a recipe wins; both in one place are refused, and neither is the default."""
    said: list[str] = []
    tokens = load_recipe("tiny", ["sft.global_batch_tokens=5000"], say=said.append).sft
    assert (tokens.global_batch, tokens.global_batch_tokens, tokens.batch, tokens.step_tokens(7)) == (None, 5000, "5,000 tokens", 5000)
    assert said == ["tiny: sft.global_batch is not used, as sft.global_batch_tokens = 5000 is given over it"]
    count = load_recipe("tiny", ["sft.global_batch=9"]).sft
    assert (count.global_batch, count.global_batch_tokens, count.batch, count.step_tokens(7)) == (9, None, "9 rollouts", 63)
    with pytest.raises(ConfigError, match=r"sft: .*global_batch = null: steps need a size"):
        load_recipe("tiny", ["sft.global_batch=null"])
    with pytest.raises(ConfigError, match=r"sft: .*global_batch = 9 and global_batch_tokens = 5000 both say what a step is"):
        load_recipe("tiny", ["sft.global_batch=9", "sft.global_batch_tokens=5000"])
    tokens.model_copy(update={"micro_batch_tokens": 1250}).check_ranks("sft", 4)
    with pytest.raises(
        ConfigError, match=r"^sft\.global_batch_tokens = 5000 is less than a micro-batch of 1251 for each of 4 data-parallel"
    ):
        tokens.model_copy(update={"micro_batch_tokens": 1251}).check_ranks("sft", 4)


def test_a_divergence_over_a_recipe_with_a_clip() -> None:
    said: list[str] = []
    loss = load_recipe("opd_8b", ["train.loss.name=reverse_kl"], say=said.append).train.loss
    assert (loss.name, loss.advantage_clip) == ("reverse_kl", None)
    assert said == ["opd_8b: train.loss.advantage_clip is not used, as train.loss.name = 'reverse_kl' is given over it"]
    assert load_recipe("opd_8b", ["train.loss.name=exopd"]).train.loss.advantage_clip == 10
    assert load_recipe("opd_8b", ["train.loss.name=constant"]).train.loss.advantage_clip is None
    with pytest.raises(ConfigError, match="has no advantage"):
        load_recipe("opd_8b", ["train.loss={name='jsd', advantage_clip=2}"])


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            "tiny", ["train.lrr=3", "trian.x=4", "engine.kind=foo", "rollout.sampling.top_p=2", "sft.steps=-1", "models.student=null"]
        )
    message = str(caught.value)
    assert "6 field(s) wrong" in message
    for path in ("train.lrr", "trian", "engine.kind", "rollout.sampling.top_p", "sft.steps", "models.student"):
        assert f"\n  {path}: " in message


def test_what_a_recipe_must_have(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"(?s)empty.toml: 2 field\(s\) wrong\n  name: Field required\n  models: Field required"):
        load_recipe(str(path))
    path.write_text(MINIMAL + "[rollout]\n[eval.a]\n")
    with pytest.raises(ConfigError, match=r"(?s)rollout\.prompts: Field required.*eval\.a\.prompts: Field required"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("train.lr=1e-6", ["train", "lr"], 1e-6),
        ("a=3", ["a"], 3),
        ("a.b.c=true", ["a", "b", "c"], True),
        ("a=null", ["a"], None),
        ("a='null'", ["a"], "null"),
        ("a=", ["a"], ""),
        ("a=some/path.jsonl", ["a"], "some/path.jsonl"),
        ("a=s3://bucket/x=y", ["a"], "s3://bucket/x=y"),
        ('a="quoted = text"', ["a"], "quoted = text"),
        ("a=[1, 2]", ["a"], [1, 2]),
        ("a={b = 1}", ["a"], {"b": 1}),
        ("a=007", ["a"], "007"),
        ("a=dir #1", ["a"], "dir #1"),
    ],
)
def test_override_values(override: str, keys: list[str], value: Any) -> None:
    assert parse_override(override) == (keys, value)
    assert type(parse_override(override)[1]) is type(value)


@pytest.mark.parametrize("override", ["train.lr", "=3", ".lr=3", "train.=3", "train..lr=3", ""])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r} is not of the form section.field=value")):
        load_recipe("tiny", [override])


@pytest.mark.parametrize("text", ["Count the digits", "data/digits.jsonl", "a. " * 300])
def test_what_is_no_toml_is_text(text: str) -> None:
    assert parse_override(f"generate.encoding.system={text}") == (["generate", "encoding", "system"], text)


def test_an_override_holds_one_value() -> None:
    with pytest.raises(ConfigError, match="more than one value"):
        load_recipe("tiny", ["train.lr=3\nsteps = 4"])


@pytest.mark.parametrize(
    "overrides", [["train.lr.x=3"], ["name.x=3"], ["engine.urls=[]", "engine.urls.0=x"], ["generate=null", "generate.prompts=x"]]
)
def test_overriding_through_a_value(overrides: list[str]) -> None:
    key = overrides[-1].split("=")[0].split(".")[-2]
    with pytest.raises(ConfigError, match=rf"override '{re.escape(overrides[-1])}': '{key}' is a value, not a section"):
        load_recipe("tiny", overrides)


def test_overrides_take_effect_in_order_and_make_sections(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file),
        ["train.lr=1e-3", "train.lr=1e-4", "rollout.prompts=p.jsonl", "train.parallel.tp=2", "train.steps=7", "train.steps=null"],
    )
    assert (recipe.train.lr, recipe.train.parallel.tp, recipe.train.steps) == (1e-4, 2, None)
    assert require(recipe.rollout, "rollout").prompts == "p.jsonl"
    with pytest.raises(ConfigError, match=r"no \[generate\] section; .* \(generate.prompts=\.\.\.\)"):
        require(recipe.generate, "generate")


def test_overrides_leave_the_tree_alone() -> None:
    tree = {"name": "x", "train": {"lr": 1.0}}
    assert apply_overrides(tree, ["train.lr=2.0", "train.steps=1"]) == {"name": "x", "train": {"lr": 2.0, "steps": 1}}
    assert tree == {"name": "x", "train": {"lr": 1.0}}


def test_placeholders(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file),
        ["generate.prompts={run_dir}/p.jsonl", "rollout.prompts=p", "eval.a.prompts=p", "rollout.store=/data/{name}/{name}.zarr"],
    )
    assert require(recipe.generate, "generate").model == "models/big"
    assert require(recipe.generate, "generate").prompts == "runs/mine/p.jsonl"
    assert require(recipe.rollout, "rollout").store == "/data/mine/mine.zarr"
    assert recipe.eval["a"].teacher == "models/big"
    assert recipe.sft.init == "models/small"
    assert recipe.score.store == recipe.train.store == "runs/mine/rollouts.opd.zarr"


def test_placeholders_inside_of_placeholders(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["models.teacher={run_dir}/{name}-teacher", "models.student=/m/{name}", "run_dir=out/{name}"])
    assert recipe.models.teacher == recipe.score.model == "out/mine/mine-teacher"
    assert recipe.models.student == recipe.sft.init == "/m/mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.store={rundir}/x",
            r"train\.store: no placeholder \{rundir\} here \(got '\{rundir\}/x'\); there are \{name\}, \{run_dir\}, \{teacher\}, \{student\}",
        ),
        ("run_dir={run_dir}/x", r"run_dir: no placeholder \{run_dir\} here .*there are \{name\}"),
        ("models.teacher={teacher}", r"models\.teacher: no placeholder \{teacher\}"),
        ('engine.urls=["http://{host}:1"]', r"engine\.urls\.0: no placeholder \{host\}"),
    ],
)
def test_unknown_placeholders(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", [override])


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    for name in ("tinny", "no/such/file.toml", "../tiny", str(tmp_path / "gone")):
        with pytest.raises(
            ConfigError, match=rf"no recipe '{re.escape(name)}': neither a file nor the folder of a run nor one of .*\btiny\b"
        ):
            load_recipe(name)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00\x01", b"[train]\nlr = 1\nlr = 2\n"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken.toml: not TOML: .+"):
        load_recipe(str(path))


def test_paths_are_expanded_once_and_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Home and variables, in every path field; a placeholder of an expanded path is expanded too; a variable's value is taken as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$ODD")
    recipe = load_recipe(
        "tiny",
        [
            "run_dir=~/runs/x",
            "models.teacher=${SCRATCH}/teacher",
            "train.store=s3://bucket/~/a",
            "rollout.sft_teacher=$HOME/t",
            "eval.held_out.teacher=~/e",
        ],
    )
    assert recipe.run_dir == "/home/me/runs/x"
    assert (recipe.sft.store, recipe.train.output) == ("/home/me/runs/x/sft.opd.zarr", "/home/me/runs/x/opd")
    assert recipe.score.model == recipe.models.teacher == "/scratch/$ODD/teacher"
    assert recipe.train.store == "s3://bucket/~/a"
    assert recipe.rollout is not None
    assert (recipe.rollout.sft_teacher, recipe.eval["held_out"].teacher) == ("/home/me/t", "/home/me/e")
    assert load_recipe("tiny", ["eval.held_out.teacher=none"]).eval["held_out"].teacher is None


def path_fields() -> list[str]:
    """Every text field that means a place on a disk, by its name."""
    recipe = load_recipe("tiny", ["rollout.sft_teacher=x"])
    sections: dict[str, Any] = {name: getattr(recipe, name) for name in ("generate", "sft", "rollout", "score", "train", "models")}
    found = []
    for section, content in (sections | {"eval.held_out": recipe.eval["held_out"]}).items():
        for name in type(content).model_fields:
            is_path = name in ("model", "prompts", "store", "output", "init", "sft_teacher", "student")
            if is_path or (name == "teacher" and section in ("eval.held_out", "models")):
                found.append(f"{section}.{name}")
    return [*found, "run_dir"]


@pytest.mark.parametrize("field", path_fields())
def test_a_path_that_can_not_be_expanded_is_named(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(field)}: the environment variable \$\{{UNSET\}} is not set \(got '\$\{{UNSET\}}/x'\)$"
    ):
        load_recipe("tiny", [f"{field}=${{UNSET}}/x"])
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)}: no home directory is known for ~nobody-of-that-name "):
        load_recipe("tiny", [f"{field}=~nobody-of-that-name/x"])


def test_what_is_no_path_keeps_its_signs() -> None:
    recipe = load_recipe("tiny", ["rollout.encoding.system=~ costs $UNSET", 'engine.launch.options=["--x=$UNSET"]', "run_dir=a$/b~"])
    assert recipe.rollout is not None
    assert recipe.rollout.encoding.system == "~ costs $UNSET"
    assert recipe.engine.launch is not None
    assert recipe.engine.launch.options == ["--x=$UNSET"]
    assert recipe.run_dir == "a$/b~"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "PATH"],
        ["show", "PATH"],
        ["show", "x", "--html", "PATH"],
        ["convert", "to-hf", "PATH", "x"],
        ["convert", "to-mcore", "x", "PATH"],
        ["report", "PATH"],
        ["demo", "--run-dir", "PATH"],
    ],
)
def test_paths_of_the_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = build_parser().parse_args([word.replace("PATH", "~/runs") for word in words])
    assert any(value in ("/home/me/runs", ["/home/me/runs"]) for value in vars(args).values())
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([word.replace("PATH", "$UNSET/runs") for word in words])
    assert ended.value.code == 2
    assert "the environment variable $UNSET is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.prompts=p", r"eval: .*eval\.prompts: every evaluation has a name .*\(here are held_out\); give eval\.held_out\.prompts"),
        ("eval.sft.prompts=p", r"eval\.sft: this can't be the name of an evaluation: that is what a model is called"),
        ("eval.'a b'.prompts=p", r"this can't be the name of an evaluation: letters, digits"),
        ("eval.held_out.promts=p", r"eval\.held_out\.promts: no such field; did you mean 'prompts'\?"),
        ("eval.held_out.code.memory=1", r"eval\.held_out\.code\.memory: no such field; did you mean 'memory_mib'\?"),
        ("eval.held_out.output=elsewhere", r"eval\.held_out\.output: no such field"),  # report and compare read RUN_DIR/eval
        ("eval.held_out.models=['student']", r"eval\.held_out\.models\.0: .*a model of the run is expected"),
        ("eval.held_out.models=['opd','opd']", r"eval\.held_out: .*each of them once"),
        ("eval.held_out.models=['round-2']", r"eval\.held_out: 'round-2', but the recipe has rounds\.count = 1"),
        ("eval.held_out.baseline=base", r"eval\.held_out: .*baseline = 'base' is not one of models"),
        ("eval.held_out.baseline=best", r"eval\.held_out\.baseline: .*a model of the run is expected"),
        ("eval.held_out.dates=['2025-02-30','2025-03-01']", r"eval\.held_out\.dates: .*'2025-02-30' is no day of the calendar .*give one"),
        ("eval.held_out.dates=['2025-03-01','2025-02-01']", r"eval\.held_out\.dates: .*2025-03-01 comes after 2025-02-01"),
        ("eval.held_out.dates=['yesterday','2025-02-01']", r"'yesterday' is no date: YYYY-MM-DD is expected"),
    ],
)
def test_what_an_evaluation_can_not_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", [override])


def test_an_evaluation_without_a_name_is_refused_with_the_remedy(recipe_file: Path) -> None:
    """As recipes of older versions have it, also in the folder of a run."""
    old = '[eval]\nname = "sft"\nmodel = "m"\nprompts = "p"\nsampling = { top_p = 0.9 }\n'
    recipe_file.write_text(recipe_file.read_text() + old)
    with pytest.raises(ConfigError) as refused:
        load_recipe(str(recipe_file))
    assert (
        "eval.name, eval.model, eval.prompts: every evaluation has a name and a section of its own, [eval.NAME]; in the recipe's file write "
        "[eval.aime24] for [eval], [eval.aime24.sampling] for [eval.sampling], and leave out name and model, in whose place stands "
        "models = ['sft', 'opd']; or do without it: eval=null"
    ) in str(refused.value)
    assert load_recipe(str(recipe_file), ["eval=null"]).eval == {}


def test_evaluations_by_name() -> None:
    given = [
        "eval.b.prompts=p",
        "eval.b.dates=[2024-08-01, 2025-02-01]",
        "eval.b.code.seconds=2",
        "eval.b.teacher=none",
        "eval.system.prompts={run_dir}/p",
    ]
    recipe = load_recipe("tiny", given)
    assert list(recipe.eval) == ["held_out", "b", "system"]
    assert (recipe.eval["b"].dates, recipe.eval["b"].code.seconds) == (("2024-08-01", "2025-02-01"), 2.0)
    assert recipe.eval["system"].prompts == "runs/tiny/p", "the name of a field for free text is a name like any other"
    assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe
    assert list(load_recipe("tiny", [*given, "eval.held_out=null"]).eval) == ["b", "system"]
    assert load_recipe("tiny", ["eval=null"]).eval == {}


def test_what_a_model_is_compared_with() -> None:
    stage = load_recipe("tiny", ["rounds.count=2", "train.steps=4", "eval.held_out.models=['sft','round-1','opd']"]).eval["held_out"]
    labels = ("teacher", "base", "sft", "round-1", "opd", "mine")
    assert [stage.baseline_of(label) for label in labels] == [None, None, None, "sft", "sft", "sft"]
    against = stage.model_copy(update={"baseline": "round-1"})
    assert [against.baseline_of(label) for label in labels] == [None, None, None, None, "round-1", "round-1"]
    assert [stage.model_copy(update={"baseline": "none"}).baseline_of(label) for label in labels] == [None] * 6
    alone = stage.model_copy(update={"models": ["opd"]})
    assert [alone.baseline_of(label) for label in labels] == [None] * 6
