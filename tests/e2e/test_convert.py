"""Hugging Face to Megatron-Core and back: the same tensors bit for bit, in the stored dtype, for every architecture."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_older
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_model

from megatron_opd.cli import main
from megatron_opd.convert import hf_files
from megatron_opd.convert.hf_files import HfTensors, hash_tensor, write_hf_directory
from megatron_opd.hf import lineage
from megatron_opd.hf.lineage import fingerprint_model, hash_tensors, read_lineage, tensor_index, write_lineage
from megatron_opd.records import Lineage


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_is_bit_exact(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "model", kind, dtype=dtype)
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert hash_tensors(tmp_path / "back") == hash_tensors(model)
    assert fingerprint_model(tmp_path / "back", name="x") == fingerprint_model(model, name="x")


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    assert main(["convert", "to-mcore", str(model), str(model)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 2
    error = capsys.readouterr().err
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        assert name in error


@pytest.mark.parametrize(
    ("field", "value", "said"), [("moe_intermediate_size", 16, "has shape"), ("num_experts", 2, "not part of"), ("mlp_only_layers", [0], "mlp_only_layers")]
)  # fmt: skip
def test_a_config_of_other_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: object, said: str
) -> None:
    model = make_model(tmp_path / "model", "qwen3-moe")
    config = json.loads((model / "config.json").read_text())
    field = "num_local_experts" if field == "num_experts" and field not in config else field
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mcore").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_tensor_in_memory_has_its_hash_on_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "model", "qwen2", dtype=dtype)
    tensors = HfTensors(model)
    assert {name: hash_tensor(name, tensors.read(name)) for name in tensors.names()} == hash_tensors(model)


def test_a_byte_that_the_disk_changes_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    save = hf_files.save_file

    def save_badly(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        save(tensors, path, **options)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(hf_files, "save_file", save_badly)
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 2
    assert "1 tensors read back from disk are not what was written" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    (weights,) = (tmp_path / "mcore").glob("*.distcp")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 2
    assert f"{weights} has {weights.stat().st_size} bytes, but" in capsys.readouterr().err
    make_older(tmp_path / "mcore", checksums=False)
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path / 'mcore'} has no checksums" in printed.out
    assert f"of {weights.name}, which has {weights.stat().st_size}; the file is cut" in printed.err
    assert not (tmp_path / "back").exists()


def test_a_tensor_that_is_lost_on_the_way_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    save = hf_files.save_file
    monkeypatch.setattr(
        hf_files,
        "save_file",
        lambda tensors, path, **options: save({name: t for name, t in tensors.items() if name != "lm_head.weight"}, path, **options),
    )
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 2
    assert "1 tensors read back from disk are not what was written (lm_head.weight)" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both directions end with the file and the room, at whatever byte the disk is full, and leave nothing behind."""
    model, disk = make_model(tmp_path / "model"), tmp_path / "disk"
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system needs root and mount")
    try:
        for kib in (16, 120, 190, 212, 240):
            (disk / "filler").write_bytes(bytes((600 - kib) << 10))
            for direction, source in (("to-hf", tmp_path / "mcore"), ("to-mcore", model)):
                capsys.readouterr()
                code = main(["convert", direction, str(source), str(disk / "result")])
                error = capsys.readouterr().err
                assert code == (2 if kib < 212 else code), (kib, direction, error)
                if code:
                    assert re.search(r"could not be written: .* \(\d\.\d MiB are free there\)|: No space left", error), error
                    assert "Traceback" not in error
                assert [path.name for path in disk.iterdir() if path.name != "filler"] == ([] if code else ["result"])
                shutil.rmtree(disk / "result", ignore_errors=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", None), ("hidden_size", "big"), ("num_hidden_layers", 0), ("num_attention_heads", 2.5), ("head_dim", -8), ("rms_norm_eps", []),
     ("rope_theta", "x"), ("rope_scaling", 3), ("rope_scaling", {"rope_type": "llama3"}), ("rope_scaling", {"rope_type": "llama3", "factor": None}),
     ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": None}), ("architectures", 3)],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: object) -> None:
    model = make_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 2
    error = capsys.readouterr().err
    assert f"{model}/config.json" in error
    assert {"rope_scaling": "rope_scaling" if value == 3 else "factor", "architectures": "architectures is 3"}.get(
        field, f"{field} = {value!r}"
    ) in error


_KILLED = """
import os, signal, sys
from megatron_opd.cli import main

def hook(event, arguments):  # kill -9 before the rename that gives the result its name, or right after it
    if event == "os.rename" and str(arguments[1]) == target and moments:
        if moments.pop() == "after":
            os.rename(*arguments[:2])
        os.kill(os.getpid(), signal.SIGKILL)

source, target, *moments = sys.argv[1:]
sys.addaudithook(hook)
main(["convert", "to-hf", source, target])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_conversion_loses_nothing(tmp_path: Path, moment: str) -> None:
    """Killed right after the result has its name, the lineage is there; right before, the next run removes what was left."""
    model, target = make_model(tmp_path / "model"), tmp_path / "back"
    write_lineage(model, Lineage(base=fingerprint_model(model)), for_weights=True)
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    run = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "mcore"), str(target), moment])
    assert run.returncode == -signal.SIGKILL
    assert target.exists() == (moment == "after")
    if moment == "before":
        (living := tmp_path / f".back.{socket.gethostname()}-{os.getppid()}.tmp").mkdir()
        assert len(list(tmp_path.glob(".back.*.tmp"))) == 2
        assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(target)]) == 0
        assert list(tmp_path.glob(".back.*.tmp")) == [living]
    assert read_lineage(model) is not None
    assert read_lineage(target) == read_lineage(model)


def test_the_fingerprint_is_known_without_another_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    wanted = fingerprint_model(model, name="x")
    monkeypatch.setattr(lineage, "hash_tensors", lambda directory: pytest.fail("the weights were read once more"))
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert fingerprint_model(tmp_path / "back", name="x") == wanted


_MEASURE = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from megatron_opd.convert.commands import to_mcore
from megatron_opd.convert.to_hf import convert_to_hf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model, folder = sys.argv[1], Path(sys.argv[2])
before = peak()
to_mcore(model, str(folder / "mcore"))
convert_to_hf(folder / "mcore", folder / "back", max_shard_bytes=16 << 20)
print(peak() - before)
"""


def test_conversion_holds_a_part_of_the_model(tmp_path: Path) -> None:
    """Peak memory of both directions grows by less than a third of the model's size."""
    whole = make_model(tmp_path / "whole", layers=12, dtype=torch.bfloat16, hidden_size=512, intermediate_size=6144)
    source = HfTensors(whole)
    names = sorted(source.names())
    write_hf_directory(
        tmp_path / "model", ((name, source.read(name)) for name in names), side_files=whole, dtype=torch.bfloat16, max_shard_bytes=16 << 20
    )
    size = sum(end - start for _, start, end, _, _ in tensor_index(tmp_path / "model").values())
    assert size > 200 << 20
    grown = int(
        subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path / "model"), str(tmp_path)], check=True, capture_output=True, text=True
        ).stdout
    )
    assert grown < size / 3, (grown, size)
    assert hash_tensors(tmp_path / "back") == hash_tensors(tmp_path / "model")


def test_the_script_is_the_subcommand(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    script = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    for arguments in (["to-mcore", str(model), str(tmp_path / "mcore")], ["to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]):
        subprocess.run([sys.executable, str(script), *arguments], check=True)
    assert hash_tensors(tmp_path / "back") == hash_tensors(model)


SIDE_FILES = {
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "qwen.tiktoken", "vocab.txt", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "generation_config.json", "added_tokens.json", "tokenizer.json",
    "tokenizer_config.json", "config.json",
}  # fmt: skip
LEFT_BEHIND = {
    "modeling_abacus.py", "tokenization_abacus.py", "tokenizer.py", "README.md", "optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
    "pytorch_model.bin", ".gitattributes", ".tokenizer.json.swp", "opd_other.json", "preprocessor_config.json", "additional_chat_templates/code.py", "original/params.json",
}  # fmt: skip


def test_what_belongs_to_a_model_travels_and_nothing_else(tmp_path: Path) -> None:
    """Both ways, from a directory of links into a cache, as a download makes it."""
    blobs = make_model(tmp_path / "blobs")
    for name in (SIDE_FILES | LEFT_BEHIND) - {path.name for path in blobs.iterdir()}:
        (blobs / name).parent.mkdir(exist_ok=True)
        (blobs / name).write_text("{}" if name.endswith(".json") else name)
    config = json.loads((blobs / "config.json").read_text())
    (blobs / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_abacus.Abacus"}, "quantization_config": None})
    )
    settings = json.loads((blobs / "tokenizer_config.json").read_text())
    (blobs / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["tokenization_abacus.A", None]}}))
    model = tmp_path / "model"
    for path in blobs.rglob("*"):
        if path.is_file():
            (model / path.relative_to(blobs)).parent.mkdir(parents=True, exist_ok=True)
            (model / path.relative_to(blobs)).symlink_to(path)
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    found = {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert found == SIDE_FILES | {"model.safetensors", lineage.CACHE_FILE, lineage.LINEAGE_FILE, lineage.ORIGIN_FILE}
    assert not any(path.is_symlink() for path in (tmp_path / "back").rglob("*"))
    for name in SIDE_FILES - {"config.json", "tokenizer_config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (blobs / name).read_bytes()
    carried = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & set(carried)
    tokenizer = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert "auto_map" not in tokenizer
    assert tokenizer["tokenizer_class"] in ("PreTrainedTokenizerFast", settings["tokenizer_class"])
    assert tokenizer["tokenizer_class"] != "TokenizersBackend"


@pytest.mark.parametrize(("kind", "fields"), [("qwen3", {}), ("llama", {"rope_scaling": None}), ("qwen3-moe", {})])
def test_a_converted_config_is_written_for_every_version(tmp_path: Path, kind: str, fields: dict[str, object]) -> None:
    """Whichever of the fields the source has."""
    model = make_model(tmp_path / "model", kind, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] is None
    if kind == "qwen3-moe":
        assert config["num_experts"] == config["num_local_experts"] == 4


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    model = make_model(tmp_path / "model")
    before = os.umask(umask)
    try:
        assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
        assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    finally:
        os.umask(before)
    for path in [*(tmp_path / "mcore").rglob("*"), *(tmp_path / "back").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_value_that_float16_can_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = 65504.0 + 512
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back"), "--dtype", "float16"]) == 2
    assert (
        f"{name} has values up to 66048, which float16 can't hold (at most 65504); convert to bfloat16 or float32"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "back").exists()
    tensors[name][0, 0] = 65280.0
    tensors[name][0, 1] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore-2")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore-2"), str(tmp_path / "back"), "--dtype", "float16"]) == 0


def test_old_weights_with_frequencies_in_them(tmp_path: Path) -> None:
    """Early Llama directories hold rotary_emb.inv_freq, in fp32 beside weights in bf16: no mixture."""
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, model / "model.safetensors", metadata={"format": "pt"}
    )
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert set(load_file(tmp_path / "back" / "model.safetensors")) == set(tensors)
