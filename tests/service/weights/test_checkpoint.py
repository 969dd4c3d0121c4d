"""Checkpoint directories of real files, links, pipes and sockets."""

import errno
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shopr1_client.errors import StorageError
from shopr1_service.policy.adapters.lora_config import AdapterError, parse_config
from shopr1_service.weights import checkpoint as checkpoint_module
from shopr1_service.weights.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    INDEX_FILE,
    MAX_ADAPTER_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    CheckpointDirectory,
    CheckpointError,
    resolve_below,
)
from shopr1_service.weights.files import CheckpointFile
from shopr1_service.weights.paths import real_path

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS = {
    "embed.weight": torch.arange(6.0).view(2, 3),
    "norm.weight": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def directory(root: Path) -> Path:
    directory = root / "step-1"
    directory.mkdir()
    return directory


def save(path: Path, tensors: Mapping[str, Tensor] = WEIGHTS) -> None:
    safetensors.torch.save_file(dict(tensors), path)


def index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def save_shards(directory: Path) -> None:
    """One tensor in each of two shards."""
    for file, (name, tensor) in zip((FIRST, SECOND), WEIGHTS.items(), strict=True):
        save(directory / file, {name: tensor})
    index(directory, {"embed.weight": FIRST, "norm.weight": SECOND})


def refused(directory: Path, *more_roots: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        CheckpointDirectory(str(directory), [directory.parent, *more_roots]).weights()
    assert f"{caught.value}{caught.value.location}".encode()
    return caught.value


# --- paths ------------------------------------------------------------------------------------------


def test_paths_below_a_root(root: Path, directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "step-2").mkdir(parents=True)
    for path, expected in [
        (str(directory), directory),
        (f"{directory}/", directory),
        ("step-1", directory),
        ("./step-1", directory),
        (".", other),
        (str(root), root),
        ("step-2", other / "step-2"),
    ]:
        assert resolve_below(path, [other, root]) == expected


def test_the_first_root_that_has_it(root: Path, directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "step-1").write_text("no directory")
    assert resolve_below("step-1", [other, root]) == directory
    (other / "step-1").unlink()
    (other / "step-1").mkdir()
    assert resolve_below("step-1", [other, root]) == other / "step-1"


def test_links_that_stay_below_the_roots(root: Path, directory: Path, tmp_path: Path) -> None:
    (root / "latest").symlink_to("step-1")
    (root / "again").symlink_to(root / "latest")
    (tmp_path / "linked-root").symlink_to(root)
    assert resolve_below("latest", [root]) == directory
    assert resolve_below("again", [root]) == directory
    # The root itself may be a link, and the path spelt in either way.
    for path in ("step-1", str(directory), str(tmp_path / "linked-root" / "step-1")):
        assert resolve_below(path, [tmp_path / "linked-root"]) == directory


def messages(paths: Mapping[str, str], roots: list[Path]) -> set[str]:
    """Error messages for these paths, without the paths."""
    found = set()
    for path in paths.values():
        with pytest.raises(CheckpointError) as caught:
            resolve_below(path, roots)
        assert caught.value.location == "path"
        found.add(str(caught.value).removesuffix(repr(path)))
    return found


def test_errors_do_not_reveal_files_elsewhere(root: Path, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("")
    (tmp_path / "root-too").mkdir()  # begins like the root
    for name, target in {
        "to-directory": "../secret",
        "to-file": "../secret/file",
        "to-nothing": "../nothing",
        "to-root": "/",
        "to-itself": "to-itself",
    }.items():
        (directory / name).symlink_to(tmp_path / "root" / target if target.startswith(".") else target)
    paths = {
        "directory": str(tmp_path / "secret"),
        "file": str(tmp_path / "secret" / "file"),
        "below a file": str(tmp_path / "secret" / "file" / "x"),
        "missing": str(tmp_path / "nothing"),
        "parent": str(tmp_path),
        "everything": "/",
        "neighbour": str(tmp_path / "root-too"),
        "missing inside": str(root / "nothing"),
        "missing, relative": "nothing",
        **{link.name: f"step-1/{link.name}" for link in directory.iterdir()},
        "behind a link": "step-1/to-root/etc",
        "too long": "a" * 300,
        "NUL": "step-1\0",
        "half a surrogate pair": "\ud800",
        "home": "~",
    }
    assert messages(paths, [root]) == {"no directory of this name below the `policy_roots`: "}


def test_dots_are_refused_wherever_they_lead(root: Path, directory: Path) -> None:
    paths = {
        path: path for path in ("..", "../root/step-1", "step-1/..", f"{directory}/../step-1", "x/../../..")
    }
    assert messages(paths, [root]) == {"must not contain '..': "}


def test_a_file_is_no_directory(root: Path) -> None:
    (root / "file").write_text("")
    assert messages({"file": "file", "absolute": str(root / "file")}, [root]) == {"not a directory: "}


def test_without_roots_nothing_is_read(directory: Path) -> None:
    assert messages({"any": str(directory)}, []) == {"reading from directories is off: set `policy_roots`"}


def test_roots_that_are_not_there(directory: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert resolve_below("step-1", [missing, directory.parent]) == directory
    assert len(messages({"any": "step-1", "itself": str(missing)}, [missing])) == 1


# --- checkpoints ------------------------------------------------------------------------------------


def read_back(path: str, root: Path) -> dict[str, bytes]:
    """Bytes of each tensor of a checkpoint."""
    found: dict[str, bytes] = {}
    for shard in CheckpointDirectory(path, [root]).weights():
        content = shard.file.path.read_bytes()
        assert len(content) == shard.file.num_bytes == shard.data_start + shard.header.num_bytes
        data = content[shard.data_start :]
        found |= {entry.name: data[entry.start : entry.end] for entry in shard.header.entries}
    return found


EXPECTED = {"embed.weight": struct.pack("<6f", *range(6)), "norm.weight": b"\x80\x3f" * 3}


def test_one_file(root: Path, directory: Path) -> None:
    save(directory / SINGLE_FILE)
    (directory / "config.json").write_text("{}")
    assert read_back("step-1", root) == EXPECTED
    checkpoint = CheckpointDirectory(str(directory), [root])
    assert checkpoint.path == directory
    [shard] = checkpoint.weights()
    assert shard.file.path == directory / SINGLE_FILE
    assert shard.header.num_bytes == 30


def test_shards(root: Path, directory: Path) -> None:
    save_shards(directory)
    assert read_back("step-1", root) == EXPECTED
    shards = CheckpointDirectory("step-1", [root]).weights()
    assert [(shard.file.path.name, shard.header.num_bytes) for shard in shards] == [(FIRST, 24), (SECOND, 6)]


def test_an_index_of_one_file(root: Path, directory: Path) -> None:
    save(directory / SINGLE_FILE)
    index(directory, dict.fromkeys(WEIGHTS, SINGLE_FILE))
    assert read_back("step-1", root) == EXPECTED


def test_files_that_are_links_below_the_roots(root: Path, directory: Path) -> None:
    # As the cache of the Hugging Face hub lays them out.
    (root / "blobs").mkdir()
    save(root / "blobs" / "3f6c")
    (directory / SINGLE_FILE).symlink_to("../blobs/3f6c")
    assert read_back("step-1", root) == EXPECTED
    [shard] = CheckpointDirectory("step-1", [root]).weights()
    assert shard.file.path == root / "blobs" / "3f6c"


def test_an_index_and_another_file_are_ambiguous(directory: Path) -> None:
    save_shards(directory)
    save(directory / SINGLE_FILE)
    assert str(refused(directory)) == f"{INDEX_FILE} is of other files than {SINGLE_FILE}: which is meant?"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights there"),
        (["config.json", FIRST], "no weights there"),
        (["adapter_model.safetensors"], "no weights there"),
        (["pytorch_model.bin"], "pickled weights are not read"),
        (["pytorch_model-00001-of-00002.bin", "config.json"], "pickled weights are not read"),
        (["step.pt"], "pickled weights are not read"),
        (["consolidated.00.pth", "policy.gguf"], "pickled weights are not read"),
        (["policy-q8.gguf"], "GGUF files are not read for updates"),
    ],
)
def test_directories_without_a_checkpoint(directory: Path, files: list[str], message: str) -> None:
    for file in files:
        (directory / file).write_bytes(b"")
    error = refused(directory)
    assert str(error).startswith(message)
    assert str(error).endswith(f"; looked for {SINGLE_FILE} or {INDEX_FILE}")
    assert error.location == "path"


# --- files ------------------------------------------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[:-1]


def cut_in_the_header(content: bytes) -> bytes:
    return content[:20]


def cut_in_the_length(content: bytes) -> bytes:
    return content[:7]


def longer(content: bytes) -> bytes:
    return content + b"\0"


def absurd(content: bytes) -> bytes:
    return b"\xff" * 8 + content[8:]


def other_dtype(content: bytes) -> bytes:
    return content.replace(b'"BF16"', b'"C64" ')


def other_shape(content: bytes) -> bytes:
    return content.replace(b"[2,3]", b"[2,4]")


def empty(_content: bytes) -> bytes:
    return b""


def pointer(_content: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("change", "message", "location"),
    [
        (cut, " is cut off: ", SINGLE_FILE),
        (cut_in_the_header, " is cut off in its header, at 20 bytes", SINGLE_FILE),
        (cut_in_the_length, ": no safetensors header", SINGLE_FILE),
        (empty, ": no safetensors header", SINGLE_FILE),
        (pointer, ": no safetensors header", SINGLE_FILE),
        (longer, " has more bytes after its tensors: ", SINGLE_FILE),
        (absurd, ": no safetensors header", SINGLE_FILE),
        (other_dtype, ": tensor 'norm.weight': dtype: must be 'F64'", "norm.weight"),
        (other_shape, ": tensor 'embed.weight': data_offsets are ", "embed.weight"),
    ],
)
def test_a_file_that_lies(
    directory: Path, change: Callable[[bytes], bytes], message: str, location: str
) -> None:
    path = directory / SINGLE_FILE
    save(path)
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert path.read_bytes() != content
    error = refused(directory)
    assert str(error).startswith(f"{SINGLE_FILE}{message}")
    assert error.location == location


def test_a_huge_header_is_not_read(directory: Path) -> None:
    # A sparse file: a terabyte that takes no room.
    path = directory / SINGLE_FILE
    save(path)
    os.truncate(path, 2**40)
    assert "has more bytes after its tensors: 1,099,511,627,776 bytes" in str(refused(directory))


def as_directory(path: Path, _tmp_path: Path) -> None:
    path.mkdir()


def as_pipe(path: Path, _tmp_path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path, _tmp_path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_out(path: Path, tmp_path: Path) -> None:
    save(tmp_path / "outside.safetensors")
    path.symlink_to(tmp_path / "outside.safetensors")


def as_link_to_nothing(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "nothing")


def as_link_to_itself(path: Path, _tmp_path: Path) -> None:
    path.symlink_to(path)


MAKERS = [
    (as_directory, "{}: not a regular file"),
    (as_pipe, "{}: not a regular file"),
    (as_device, "{}: not a regular file"),
    (as_link_out, "{} is not there, or a link that leads out of the `policy_roots`"),
    (as_link_to_nothing, "{} is not there, or a link that leads out of the `policy_roots`"),
    (as_link_to_itself, "{} is not there, or a link that leads out of the `policy_roots`"),
]


@pytest.mark.timeout(60)  # a pipe that is waited for is waited for forever
@pytest.mark.parametrize(("make", "message"), MAKERS)
@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, SECOND])
def test_files_that_are_not_regular(
    directory: Path, tmp_path: Path, make: Callable[[Path, Path], None], message: str, name: str
) -> None:
    if name == SECOND:
        save_shards(directory)
        (directory / SECOND).unlink()
    make(directory / name, tmp_path)
    error = refused(directory, Path("/dev"))
    assert (str(error), error.location) == (message.format(name), name)


def test_errors_of_the_system_are_reported(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(SINGLE_FILE)
        error = refused(directory)
    assert (str(error), error.location) == (f"{SINGLE_FILE}: No such device or address", SINGLE_FILE)


def test_a_link_that_is_created_after_the_check_is_not_followed(directory: Path) -> None:
    save(directory / "real")
    (directory / "link").symlink_to("real")
    opened = CheckpointFile(directory / "real", [directory])
    assert opened.read(0, 8) == (directory / "real").read_bytes()[:8]
    with pytest.raises(OSError, match="symbolic links"):
        CheckpointFile(directory / "link", [directory])


# --- indices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_map", "message", "location"),
    [
        ({"embed.weight": FIRST, "norm.weight": FIRST}, f"'norm.weight' is not in {FIRST}", "norm.weight"),
        ({"embed.weight": SECOND}, f"'norm.weight' is in {SECOND}, but not indexed", "norm.weight"),
        (
            {"embed.weight": SECOND, "norm.weight": FIRST},
            f"'embed.weight' is in {FIRST}, but indexed in {SECOND}",
            "embed.weight",
        ),
        (
            {"embed.weight": FIRST, "norm.weight": SECOND, "more": SECOND},
            f"'more' is not in {SECOND}",
            "more",
        ),
    ],
)
def test_index_and_shards_must_agree(
    directory: Path, weight_map: dict[str, str], message: str, location: str
) -> None:
    save_shards(directory)
    index(directory, weight_map)
    error = refused(directory)
    assert message in str(error)
    assert error.location == location


def test_files_that_the_index_does_not_name_are_none_of_it(root: Path, directory: Path) -> None:
    save_shards(directory)
    index(directory, {"embed.weight": FIRST})
    assert set(read_back("step-1", root)) == {"embed.weight"}


def test_no_tensor_is_in_two_shards(directory: Path) -> None:
    save_shards(directory)
    save(directory / SECOND)
    error = refused(directory)
    assert str(error) == f"tensor 'embed.weight' is in {SECOND}, but indexed in {FIRST}"


@pytest.mark.parametrize(
    "file",
    [
        "",
        ".safetensors",
        "..",
        "../outside.safetensors",
        "below/model.safetensors",
        "/etc/passwd",
        "model.bin",
        "a\0.safetensors",
        "a" * 241 + ".safetensors",
        None,
        1,
        ["model.safetensors"],
    ],
)
def test_shards_lie_beside_the_index(directory: Path, tmp_path: Path, file: object) -> None:
    save(directory.parent / "outside.safetensors")
    (directory / "below").mkdir()
    save(directory / "below" / SINGLE_FILE)
    index(directory, {"embed.weight": file, "norm.weight": file})
    error = refused(directory, tmp_path)
    assert str(error) == f"{INDEX_FILE}: tensor 'embed.weight' must be in a safetensors file of the directory"
    assert error.location == "embed.weight"


def test_a_shard_that_is_missing(directory: Path) -> None:
    save_shards(directory)
    (directory / FIRST).unlink()
    assert refused(directory).location == FIRST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON: "),
        (b"[]", "must be a JSON object"),
        (b"{}", "weight_map must be an object with tensors"),
        (b'{"weight_map": {}}', "weight_map must be an object with tensors"),
        (b'{"weight_map": ["w"]}', "weight_map must be an object with tensors"),
        (b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "not JSON: duplicate key 'w'"),
        (b'{"weight_map": {"\\ud800": "a.safetensors"}}', "not JSON: not UTF-8"),
        (b'{"metadata": NaN}', "not JSON: NaN"),
        (b'{"metadata": ' + b"[" * 10**5, "not JSON: "),
        (b'{"weight_map": {"' + b"w" * 1025 + b'": "a.safetensors"}}', "a tensor's name is too long"),
    ],
)
def test_malformed_indices(directory: Path, text: bytes, message: str) -> None:
    (directory / INDEX_FILE).write_bytes(text)
    error = refused(directory)
    assert str(error).startswith(f"{INDEX_FILE}: {message}")
    assert error.location == INDEX_FILE
    assert len(str(error)) < 300


def test_an_index_is_read_to_its_limit_only(directory: Path) -> None:
    (directory / INDEX_FILE).touch()
    os.truncate(directory / INDEX_FILE, MAX_INDEX_BYTES + 1)
    assert str(refused(directory)) == f"{INDEX_FILE} is larger than 33,554,432 bytes"


# --- adapters ---------------------------------------------------------------------------------------


def save_adapter(directory: Path) -> None:
    save(directory / ADAPTER_FILE)
    (directory / ADAPTER_CONFIG_FILE).write_text("{}")


def refused_adapter(directory: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        CheckpointDirectory("step-1", [directory.parent]).adapter()
    return caught.value


def test_an_adapter(root: Path, directory: Path) -> None:
    save_adapter(directory)
    config, shard = CheckpointDirectory("step-1", [root]).adapter()
    assert (config, shard.file.path) == (b"{}", directory / ADAPTER_FILE)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights there"),
        ([ADAPTER_CONFIG_FILE], "no weights there"),
        ([ADAPTER_FILE], "no weights there"),
        ([SINGLE_FILE], "no weights there"),
        ([ADAPTER_CONFIG_FILE, "adapter_model.bin"], "pickled weights are not read"),
        (["adapter.gguf"], "GGUF files are not read"),
    ],
)
def test_directories_without_an_adapter(directory: Path, files: list[str], message: str) -> None:
    for file in files:
        (directory / file).write_bytes(b"")
    error = refused_adapter(directory)
    assert str(error).startswith(message)
    assert str(error).endswith(f"; looked for {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}")


def test_an_adapter_is_looked_for_below_the_roots_only(directory: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="no directory of this name below"):
        CheckpointDirectory(str(tmp_path), [directory.parent])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("make", "message"), [maker for maker in MAKERS if maker[0] is not as_device])
@pytest.mark.parametrize("name", [ADAPTER_CONFIG_FILE, ADAPTER_FILE])
def test_files_of_an_adapter_that_are_none(
    directory: Path, tmp_path: Path, make: Callable[[Path, Path], None], message: str, name: str
) -> None:
    save_adapter(directory)
    (directory / name).unlink()
    make(directory / name, tmp_path)
    error = refused_adapter(directory)
    assert (str(error), error.location) == (message.format(name), name)


def test_an_adapter_that_lies(directory: Path) -> None:
    save_adapter(directory)
    os.truncate(directory / ADAPTER_FILE, 100)
    assert refused_adapter(directory).location == ADAPTER_FILE
    save_adapter(directory)
    os.truncate(directory / ADAPTER_CONFIG_FILE, MAX_ADAPTER_CONFIG_BYTES + 1)
    assert str(refused_adapter(directory)) == f"{ADAPTER_CONFIG_FILE} is larger than 1,048,576 bytes"


# --- files that change meanwhile --------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    path.with_name("new").rename(path)


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def delete(path: Path, _content: bytes) -> None:
    path.unlink()


def link_out(path: Path, _content: bytes) -> None:
    """The same file, which a link now leads to."""
    path.rename(path.parent.parent.parent / "outside")
    path.symlink_to("../../outside")


@pytest.mark.parametrize("change", [replace, overwrite, delete, link_out])
@pytest.mark.parametrize("name", [INDEX_FILE, FIRST, SECOND, "config.json"])
def test_a_file_that_changes_while_the_others_are_read(
    directory: Path, change: Callable[[Path, bytes], None], name: str
) -> None:
    save_shards(directory)
    (directory / "config.json").write_text("{}")
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    checkpoint.read("config.json", 10)
    shards = checkpoint.weights()
    checkpoint.check_unchanged()
    change(directory / name, (directory / name).read_bytes())
    with pytest.raises(CheckpointError, match="was replaced or written to while it was read") as caught:
        checkpoint.check_unchanged()
    assert caught.value.location == name
    assert [shard.file.read(shard.data_start, 6) for shard in shards] == [
        EXPECTED[shard.header.entries[0].name][:6] for shard in shards
    ]


def test_files_that_are_not_read_may_change(directory: Path) -> None:
    save(directory / SINGLE_FILE)
    (directory / "trainer_state.json").write_text("{}")
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    checkpoint.weights()
    (directory / "trainer_state.json").write_text("{ }")
    checkpoint.check_unchanged()


def into_empty(directory: Path) -> None:
    directory.rename(directory.with_name("moved"))
    directory.mkdir()


def into_links(directory: Path) -> None:
    """Another directory with the same files, and perhaps others beside them."""
    directory.rename(directory.with_name("moved"))
    shutil.copytree(directory.with_name("moved"), directory, copy_function=os.link)


def into_another(directory: Path) -> None:
    """A whole checkpoint: as long as nothing of the former one was read, all of it could be used."""
    directory.rename(directory.with_name("moved"))
    shutil.copytree(directory.with_name("moved"), directory)


@pytest.mark.parametrize("change", [into_empty, into_links, into_another])
@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_directory_that_changes_while_it_is_read(
    directory: Path, change: Callable[[Path], None], num_read: int
) -> None:
    save_shards(directory)
    (directory / "config.json").write_text("{}")
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    for name in (INDEX_FILE, FIRST, SECOND)[:num_read]:
        checkpoint.read(name, MAX_INDEX_BYTES)
    change(directory)
    with pytest.raises(CheckpointError, match=r"replaced|is not there"), checkpoint.unchanged():
        checkpoint.weights()


def test_files_that_were_looked_for_must_not_appear(directory: Path) -> None:
    save(directory / SINGLE_FILE)
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    assert not checkpoint.has("config.json")
    checkpoint.weights()
    checkpoint.check_unchanged()
    (directory / "trainer_state.json").write_text("{}")
    checkpoint.check_unchanged()
    (directory / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json appeared while") as caught:
        checkpoint.check_unchanged()
    assert caught.value.location == "config.json"


@pytest.mark.parametrize("name", [INDEX_FILE, FIRST, SECOND])
def test_file_that_is_replaced_before_it_is_opened(directory: Path, name: str) -> None:
    """By then it is of another save than the files that were listed beside it."""
    save_shards(directory)
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    replace(directory / name, (directory / name).read_bytes())
    with pytest.raises(CheckpointError, match="was replaced or written to while it was read") as caught:
        checkpoint.weights()
    assert caught.value.location == name


@pytest.mark.parametrize(
    "name", [f".{SECOND}.aB3xY9", f"{SECOND}.tmp", f".{SECOND}.part", f"{INDEX_FILE}.incomplete"]
)
def test_copy_under_way(directory: Path, name: str) -> None:
    """As of rsync: some files are of the former checkpoint yet, and nothing else shows it."""
    save_shards(directory)
    for other in ("optimizer.bin.tmp", ".trainer_state.json.aB3xY9", f"{FIRST}.backup", "notes.part"):
        (directory / other).write_bytes(b"")
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    checkpoint.weights()
    checkpoint.check_unchanged()
    (directory / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="a copy is under way") as caught:
        checkpoint.check_unchanged()
    assert caught.value.location == name


# --- links that are made between the check and the opening ------------------------------------------


@pytest.mark.parametrize(
    "name", [SINGLE_FILE, INDEX_FILE, "config.json", "tokenizer.json", ADAPTER_CONFIG_FILE]
)
@pytest.mark.parametrize("part", ["file", "directory", "parent"])
def test_part_that_becomes_a_link_out_of_the_roots(
    root: Path, tmp_path: Path, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, outside = root / "run" / "step-1", tmp_path / "outside" / "run" / "step-1"
    for each in (directory, outside):
        each.mkdir(parents=True)
    save(directory / name)
    (outside / name).write_text("confidential")

    def swap(path: Path, roots: Sequence[Path]) -> Path | None:
        real = real_path(path, roots)
        below = {"file": f"run/step-1/{name}", "directory": "run/step-1", "parent": "run"}[part]
        (root / below).rename(tmp_path / "moved")
        (root / below).symlink_to(tmp_path / "outside" / below)
        return real

    checkpoint = CheckpointDirectory("run/step-1", [root])
    monkeypatch.setattr(checkpoint_module, "real_path", swap)
    with pytest.raises(CheckpointError, match=r"symbolic links|Not a directory") as caught:
        checkpoint.read(name, MAX_INDEX_BYTES)
    assert "confidential" not in str(caught.value)
    assert (directory / name).read_text() == "confidential"


def test_directory_that_becomes_a_link_before_it_is_listed(
    root: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()

    def swap(path: str, roots: Sequence[Path]) -> Path:
        real = resolve_below(path, roots)
        directory.rmdir()
        directory.symlink_to(tmp_path / "outside")
        return real

    monkeypatch.setattr(checkpoint_module, "resolve_below", swap)
    with pytest.raises(CheckpointError, match=r"symbolic links|Not a directory"):
        CheckpointDirectory("step-1", [root])


# --- faults -----------------------------------------------------------------------------------------


def failing_with(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)


def test_disk_that_fails_is_no_fault_of_the_checkpoint(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(directory / SINGLE_FILE)
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    failing_with(monkeypatch, errno.EIO)
    with pytest.raises(StorageError, match=f"{SINGLE_FILE} cannot be read: Input/output error"):
        checkpoint.weights()


def test_change_is_the_reason_for_other_errors(directory: Path) -> None:
    save(directory / SINGLE_FILE)
    checkpoint = CheckpointDirectory("step-1", [directory.parent])
    [shard] = checkpoint.weights()
    os.truncate(directory / SINGLE_FILE, shard.data_start)
    with pytest.raises(CheckpointError, match="was replaced or written to"), checkpoint.unchanged():
        shard.file.read(shard.data_start, 8)
    with pytest.raises(ZeroDivisionError), CheckpointDirectory("step-1", [directory.parent]).unchanged():
        raise ZeroDivisionError


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE])
@pytest.mark.parametrize(
    "content",
    [
        b"confidential\n" * 10,
        b'{"weight_map": "confidential"}',
        b'{"weight_map": {"w": "confidential"}}',
        b'{"peft_type": "confidential", "r": "confidential"}',
        b"confidential\xff",
        b'{"w": NaN, "v": confidential}',
        (30).to_bytes(8, "little") + b'{"w": {"dtype": "confidential"}}',
    ],
)
def test_errors_quote_no_content(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    if name == INDEX_FILE:
        error: Exception = refused(directory)
    elif name == SINGLE_FILE:
        error = refused(directory)
        assert str(int.from_bytes(b"confiden", "little")) not in str(error).replace(",", "")
    else:
        save_adapter(directory)
        (directory / name).write_bytes(content)
        with pytest.raises((CheckpointError, AdapterError)) as caught:
            parse_config(CheckpointDirectory("step-1", [directory.parent]).adapter()[0])
        error = caught.value
    assert "confiden" not in f"{error}{vars(error)}"
