"""What is secret in a recipe is in none of the records of a run, and in no error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_opd.cli import main
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.inference import EngineConfig, LaunchConfig
from megatron_opd.safety.redact import holds_secret, is_secret_name, redact_address, redact_words, secret_values
from megatron_opd.serve.launch import ServerProcess

SECRET = "hf_Zq8vXw2Lk9"
LAUNCH = {
    "environment": {"HF_TOKEN": SECRET, "PYTHONPATH": "", "CACHE": "/scratch/cache", "OTHER": "$OTHER_KEY", "LIMIT": "3"},
    "options": ["--api-key", SECRET, f"--admin-api-key={SECRET}", "--max-total-tokens", "8192"],
    "command": ["apptainer", "exec", "--env", f"HF_TOKEN={SECRET}", "image.sif", "python", "-m", "sglang.launch_server"],
}


def recipe() -> Recipe:
    return load_recipe("tiny", [f"engine.launch.{field}={value!r}".replace("': '", "' = '") for field, value in LAUNCH.items()])


def test_a_recipe_is_written_without_its_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe()
    assert made.engine.launch is not None
    assert made.engine.launch.environment["HF_TOKEN"] == SECRET
    text = made.to_toml()
    assert SECRET not in text
    assert SECRET not in repr(made.recorded())
    assert "/scratch/cache" not in text
    assert '"$OTHER_KEY"' in text
    assert '"8192"' in text
    (tmp_path / "recipe.toml").write_text(text)
    again = load_recipe(str(tmp_path / "recipe.toml"))  # good for every stage but those that start servers
    assert again.engine.launch is not None
    with pytest.raises(ConfigError, match=r"engine\.launch\.environment\.HF_TOKEN: the value is not kept .* write '\$HF_TOKEN'"):
        again.engine.launch.variables()
    with pytest.raises(ConfigError, match=r"engine\.launch\.command: a word is \(not kept\)"):
        again.engine.launch.words()
    assert main(["rollout", "tiny", "--dry-run", f"engine.launch.environment.HF_TOKEN={SECRET}"]) == 0
    assert SECRET not in capsys.readouterr().out


def test_a_variable_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    launch = LaunchConfig(environment={"HF_TOKEN": "$MY_TOKEN", "B": "${MY_TOKEN}", "C": "a$MY_TOKEN", "D": "$"})
    assert launch.variables() == {"HF_TOKEN": SECRET, "B": SECRET, "C": "a$MY_TOKEN", "D": "$"}
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ConfigError, match="HF_TOKEN is to be taken from the environment variable MY_TOKEN, which is not set"):
        launch.variables()


@pytest.mark.parametrize(
    "override",
    [
        f"engine.launch.environment={{HF_TOKEN={SECRET!r}",  # cut: no TOML, so a text
        f"engine.launch.environment.HF_TOKEN={{x={SECRET!r}}}",
        f"engine.launch.environment.HF_TOKEN={SECRET}{{run}}",
        f"engine.launch.options=--api-key={SECRET}",
        f"engine.launch=[{SECRET!r}]",
        f"engine={SECRET}",
        f"engine.urls=http://user:{SECRET}@host",
        f"engine.urls=['http://user:{SECRET}@host:port']",
        f"engine.urls=user:{SECRET}@host:30000",
        f"rollout.store=s3://key:{SECRET}@bucket/store",
        f"rollout.store=s3://key:{SECRET}/more@bucket/store",
        f"rollout.store=https://host/store?token={SECRET}",
        f"train.lr=http://user:{SECRET}@host",
    ],
)
def test_no_error_repeats_a_secret(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", "tiny", "rollout.prompts=x", override]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert override.split("=")[0].split(".")[0] in printed.err


def test_the_end_of_a_servers_log_is_shown_without_secrets(tmp_path: Path) -> None:
    """SGLang writes its own arguments there."""
    command = [sys.executable, "-c", "import os, sys; print(sys.argv, os.environ['HF_TOKEN']); sys.exit(3)"]
    launch = LaunchConfig(command=command, environment={"HF_TOKEN": SECRET}, options=["--api-key", "Qx7"])
    process = ServerProcess(EngineConfig(launch=launch), launch, tmp_path, number=0, log_dir=tmp_path)
    process.start()
    assert process._process is not None
    process._process.wait(60)
    death = process.death() or ""
    assert "exited with code 3" in death
    assert death.count("(not kept)") == 2
    assert SECRET not in death
    assert "Qx7" not in death
    assert SECRET in process.log.read_text()
    process.stop()


def test_what_is_secret_is_known_by_its_name() -> None:
    for name in (
        "--api-key",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "--ssl-keyfile-password",
        "X-Amz-Signature",
        "WANDB_API_KEY",
        "auth",
        "--accesskey",
    ):
        assert is_secret_name(name), name
    for name in (
        "--max-total-tokens",
        "--tokenizer-path",
        "--ssl-keyfile",
        "CUDA_VISIBLE_DEVICES",
        "--monkey",
        "PYTHONPATH",
        "--speculative-token-map",
        "",
    ):
        assert not is_secret_name(name), name
    words = ["--api-key", "a", "--api-key=b", "KEY=c", "--key", "--tp", "2", "http://u:p@h/", "x=1"]
    kept = ["--api-key", "(not kept)", "--api-key=(not kept)", "KEY=(not kept)", "--key", "--tp", "2", "(not kept)", "x=1"]
    assert redact_words(words) == kept
    assert secret_values({"A": "short", "B": "/a/long/path", "C": "long enough", "MY_KEY": "k"}, words) == [
        *("http://u:p@h/", "long enough"),
        *("k", "a", "b", "c"),
    ]


SLASHES = ("s3://AKIA:pw/def@b/x", "s3://AKIA:pw?def@b", "zip://a.zip::https://user:pw@host/a.zip", "s3://u%3Apw@b/x")


def test_addresses_are_shown_without_secrets() -> None:
    assert redact_address("http://user:pw@host:1/a/b?token=x#y") == "http://host:1/a/b"
    assert redact_address("s3://key:pw@bucket/store") == "s3://bucket/store"
    assert redact_address("user:pw@host") == "host"
    assert redact_address("runs/a@b") == "runs/a@b"
    for address in (
        "s3://bucket/a@b:c",
        "abfs://container@account.dfs.core.windows.net/store",
        "runs/x:y@z",
        "s3://bucket/a?versionId=3",
        "http://h:80/a@b",
    ):
        assert not holds_secret(address), address
    for address in ("s3://a:b@c/d", "https://h/s?sig=x", "https://h/s?X-Amz-Signature=x", "ftp://:pw@h", *SLASHES):
        assert holds_secret(address), address
        assert "pw" not in redact_address(address)
