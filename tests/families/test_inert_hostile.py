"""Nothing in a hostile whole-module file runs, and the file is refused."""

from __future__ import annotations

import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx.graph_module
from pickles import Call, archive, nothing_runs, read, text
from torch import nn

from compactmlip.errors import CheckpointError
from compactmlip.families.inert import InertGlobal, InertObject, modules, state_dict

NOTICED: dict[str, Callable[[], Any]] = {
    "exec": lambda: exec("1"),
    "import": lambda: __import__("this_module_is_missing"),
    "pickle.find_class": lambda: pickle.loads(b"cos\nsep\n."),
    "os.mkdir": lambda: os.mkdir("/dev/null/no"),
    "open": lambda: open(os.devnull).close(),
}


@pytest.mark.parametrize("event", list(NOTICED))
def test_what_runs_is_noticed(event: str, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=f"it ran .*'{event}'"),
        nothing_runs(tmp_path),
        suppress(Exception),
    ):
        NOTICED[event]()


def _memoised(marker: Path) -> bytes:
    """``posix.system`` whose two words are fetched from the memo."""
    words = pickle.PROTO + b"\x04" + text("system") + pickle.MEMOIZE + text("posix") + pickle.MEMOIZE
    names = pickle.POP + pickle.POP + pickle.BINGET + b"\x01" + pickle.BINGET + b"\x00"
    call = text(f"touch {marker}") + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    return words + names + pickle.STACK_GLOBAL + call


def _after_valid_content(marker: Path) -> bytes:
    """A complete container, then the call."""
    content = pickle.dumps(OrderedDict(a=[1, 2], b={"c": np.float64(3)}), 2)[:-1]
    call = b"cposix\nsystem\n" + text(f"touch {marker}") + pickle.TUPLE1 + pickle.REDUCE
    return content + call + pickle.POP + pickle.STOP


def _write(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def _second_file(marker: Path) -> Path:
    path = marker.with_name("second.pt")
    torch.save(Call(os.system, f"touch {marker}"), path)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system, protocol 2": (lambda m: pickle.dumps(Call(os.system, f"touch {m}"), 2), "posix.system"),
    "os.system, protocol 4": (lambda m: pickle.dumps(Call(os.system, f"touch {m}"), 4), "posix.system"),
    "os.system, protocol 0": (lambda m: pickle.dumps(Call(os.system, f"touch {m}"), 0), "posix.system"),
    "eval": (lambda m: pickle.dumps(Call(eval, _write(m)), 2), "builtins.eval"),
    "exec": (lambda m: pickle.dumps(Call(exec, _write(m)), 4), "builtins.exec"),
    "memoised names": (_memoised, "posix.system"),
    "after valid content": (_after_valid_content, "posix.system"),
    "torch.load": (
        lambda m: pickle.dumps(Call(torch.load, str(_second_file(m)), "cpu"), 2),
        "torch.serialization.load",
    ),
    "INST": (lambda m: b"(" + b"S'touch %s'\n" % bytes(m) + b"iposix\nsystem\n.", "opcode STRING"),
    "OBJ": (lambda m: b"(cposix\nsystem\n" + text(f"touch {m}") + b"o.", "posix.system"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_calls_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, refused = HOSTILE[name]
    marker = tmp_path / "ran"
    content = build(marker)
    path = archive(tmp_path / "hostile.model", content)
    with pytest.raises(CheckpointError, match=rf"(?s)hostile.model: refused, .*{refused}.*has been run"):
        read(path)
    assert not marker.exists()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.load, about the environment variable
        pickle.loads(content)  # a careless reader: without this the refusal would prove nothing
    assert marker.exists()


def test_a_call_hidden_in_a_real_model_is_refused(tmp_path: Path) -> None:
    """The model is whole; one of its submodules' attributes is a call, deep inside and late."""
    marker = tmp_path / "ran"
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2)))
    model[1][0].note = [{"deep": Call(os.system, f"touch {marker}")}]
    torch.save(model, tmp_path / "m.model")
    with pytest.raises(CheckpointError, match="refers to posix.system"):
        read(tmp_path / "m.model")
    assert not marker.exists()
    torch.load(tmp_path / "m.model", weights_only=False)
    assert marker.exists()


GLOBALS = """
    builtins.__import__ builtins.compile builtins.open builtins.setattr compactmlip.checkpoint.save
    copyreg._reconstructor e3nnx.f importlib.import_module maced.f nn.Module numpy.load
    numpy.testing.runstring operator.attrgetter os.popen pickle.loads pty.spawn runpy.run_path
    subprocess.Popen torch.distributed.rpc.remote torch.hub.load torch.load torch.nnx.f
    torch.ops.load_library torch.serialization.load torch.storage._load_from_bytes
    torch.utils.collect_env.run types.CodeType __torch__.f
"""


@pytest.mark.parametrize("name", GLOBALS.split())
@pytest.mark.parametrize("stack", [False, True])
def test_other_globals_are_refused_even_uncalled(name: str, stack: bool, tmp_path: Path) -> None:
    module, _, last = name.rpartition(".")
    by_line = f"c{module}\n{last}\n".encode()
    named = text(module) + text(last) + pickle.STACK_GLOBAL if stack else by_line
    path = archive(tmp_path / "m.model", b"\x80\x04" + named + pickle.STOP)
    with pytest.raises(CheckpointError, match=f"refers to {name}."):
        read(path)


def test_graph_modules_keep_their_code_as_text(tmp_path: Path) -> None:
    """torch.fx pickles source code, which loading executes; here it is an argument like any other."""
    marker = tmp_path / "ran"
    body = {
        "_code": "def forward(self, x):\n    return x\n",
        "_modules": {},
        "_parameters": {},
        "_buffers": {},
    }
    call = Call(torch.fx.graph_module.reduce_graph_module, body, _write(marker) + "\n")
    path = archive(tmp_path / "m.model", pickle.dumps(call, 2))
    root = read(path)
    assert (root.name, root.args, root.state) == ("GraphModule", (_write(marker) + "\n",), body)
    assert not marker.exists()
    pickle.loads(pickle.dumps(call))  # what torch does
    assert marker.exists()


def test_allowed_names_never_run(tmp_path: Path) -> None:
    """Calls inside the packages of a model, however they are combined, are only recorded."""
    marker = tmp_path / "ran"
    inside = b"ctorch.nn.modules.module\nModule\n"
    spoiled = b"c__builtin__\ngetattr\n" + inside + text("__init__") + pickle.TUPLE2 + pickle.REDUCE
    for word in ("__globals__", "os"):
        spoiled = b"c__builtin__\ngetattr\n" + spoiled + text(word) + pickle.TUPLE2 + pickle.REDUCE
    jit = b"ctorch.jit\nload\n" + text(str(_second_file(marker))) + pickle.TUPLE1 + pickle.REDUCE
    partial = b"cfunctools\npartial\n" + spoiled + pickle.TUPLE1 + pickle.REDUCE
    state = pickle.EMPTY_DICT + b"".join(
        text(key) + value + pickle.SETITEM
        for key, value in {"a": spoiled, "b": jit, "c": partial + pickle.EMPTY_TUPLE + pickle.BUILD}.items()
    )
    content = b"\x80\x02" + inside + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD + pickle.STOP
    root = read(archive(tmp_path / "m.model", content))
    assert root.attribute("a") == InertGlobal("torch.nn.modules.module.Module.__init__.__globals__", "os")
    assert root.attribute("b").module == "torch.jit" and root.attribute("b").name == "load"
    assert not marker.exists()


MODULE = b"\x80\x02ctorch.nn.modules.module\nModule\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ
STORAGE = (
    pickle.MARK + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02t" + b"Q"
)  # two numbers
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
TRICKS = {
    "state of a class": (b"ctorch\nFloatStorage\nN}" + text("dtype") + b"K\x01s\x86b", "sets the state"),
    "state of a function": (TENSOR + b"N}" + text("__defaults__") + b"K\x01s\x86b", "sets the state"),
    "append to a tensor": (TENSOR + b"(" + STORAGE + b"K\x00K\x02\x85K\x01\x85t" + b"RK\x01a", "appends"),
    "items of a name": (b"cfunctools\npartial\nK\x01K\x02s", "sets items"),
    "call of an object": (MODULE[2:] + b")R", "calls an object of type InertObject"),
    "call of text": (text("os.system") + b")R", "calls an object of type str"),
    "extension": (b"\x82\x01", "opcode EXT1"),
    "persistent id as text": (b"P0\n", "opcode PERSID"),
    "persistent id of a file": (b"(" + text("file") + b"K\x01K\x02K\x03K\x04t" + b"Q", "persistent id"),
    "storage of a class": (STORAGE.replace(b"torch\nFloatStorage", b"torch.nn\nModule"), "persistent id"),
    "computed global": (b"\x8c\x02os" + pickle.EMPTY_TUPLE + pickle.STACK_GLOBAL, "computes the name"),
    "text codec": (b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R", "encodes text as rot13"),
    "object array": (
        b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R",
        "numpy data of type 'O8'",
    ),
    "list in an array": (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)cnumpy\ndtype\n" + text("f8") + b"\x85R\x89]tb",
        "array of Python objects",
    ),
    "big-endian numbers": (
        b"cnumpy\ndtype\n" + text("f8") + b"\x85R(K\x03" + text(">") + b"tb",
        "big-endian",
    ),
    "tensor of no storage": (TENSOR + b"(K\x01K\x00K\x02\x85K\x01\x85tR", "other than a storage"),
    "tensor by another function": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cfunctools\npartial\nN)NtR",
        "builds a tensor with",
    ),
    "outside its storage": (TENSOR + b"(" + STORAGE + b"K\x00K\x03\x85K\x01\x85tR", "out of bounds"),
    "offset outside": (TENSOR + b"(" + STORAGE + b"K\x01K\x02\x85K\x01\x85tR", "out of bounds"),
    "storage of another size": (STORAGE.replace(b"K\x02t", b"K\x03t"), "has 8 bytes, not 3 numbers"),
    "missing storage": (STORAGE.replace(text("0"), text("../../x")), "no item named"),
    "stack underflow": (b"K\x01\x86", "more from its stack"),
    "unhashable key": (b"}]K\x01s", "unhashable"),
    "mark missing": (b"K\x01t", "pop from empty list"),
}


@pytest.mark.parametrize("name", list(TRICKS))
def test_tricks_are_refused(name: str, tmp_path: Path) -> None:
    content, message = TRICKS[name]
    before = (dict(vars(torch.FloatStorage)), torch._utils._rebuild_tensor_v2.__defaults__)
    numbers = np.array([1, 2], np.float32).tobytes()
    path = archive(tmp_path / "m.model", b"\x80\x04" + content + pickle.STOP, **{"data/0": numbers})
    with pytest.raises(CheckpointError, match=message):
        read(path)
    assert (dict(vars(torch.FloatStorage)), torch._utils._rebuild_tensor_v2.__defaults__) == before


def test_hostile_torchscript_inside_a_model_is_refused(tmp_path: Path) -> None:
    inside = archive(tmp_path / "script", pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}"), 2))
    content = MODULE + b"}" + text("__codegen__") + b"}" + text("forward") + pickle.BINBYTES
    data = inside.read_bytes()
    content += len(data).to_bytes(4, "little") + data + b"ss" + pickle.BUILD + pickle.STOP
    with pytest.raises(CheckpointError, match="refers to posix.system"):
        read(archive(tmp_path / "m.model", content))
    assert not (tmp_path / "ran").exists()


def test_modules_that_contain_themselves(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    model[0].add_module("parent", model)
    torch.save(model, tmp_path / "m.model")
    root = read(tmp_path / "m.model")
    assert [name for name, _ in modules(root)] == ["", "0"]
    with pytest.raises(CheckpointError, match="contains itself"):
        state_dict(root)


def test_very_many_names_of_few_modules() -> None:
    module = InertObject("torch.nn", "Module")
    for _ in range(60):
        module = InertObject("torch.nn", "Module", state={"_modules": {"a": module, "b": module}})
    assert len(list(modules(module))) == 61
    with pytest.raises(CheckpointError, match="more than 100000 modules"):
        state_dict(module)
