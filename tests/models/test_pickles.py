"""The restricted unpickler: equal to torch on state dicts, and nothing in a file is ever run."""

import builtins
import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from pivotjax.checkpoints.pickles import read_state_dict
from pivotjax.errors import InputError

LAYOUTS = {"zip": True, "stream": False}


def some_state():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    kinds = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"]
    state = OrderedDict((f"of.{kind}", torch.randint(100, (3, 2)).to(getattr(torch, kind))) for kind in kinds)
    state["of.bool"] = torch.tensor([True, False])
    state["view.transposed"], state["view.slice"] = base.T, base[1:3, ::2]  # one storage, two views
    state["scalar"], state["empty"] = torch.tensor(3.5), torch.zeros(0, 3)
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    state["nested"] = {"a": torch.ones(2), "b": {"c": torch.zeros(1)}}
    return state


def saved(folder, state, layout):
    path = folder / "model.pth"
    torch.save(state, path, _use_new_zipfile_serialization=LAYOUTS[layout])
    assert zipfile.is_zipfile(path) == (layout == "zip")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_equal_torch(tmp_path, layout):
    read = read_state_dict(saved(tmp_path, some_state(), layout))
    expected = some_state()
    nested = expected.pop("nested")
    expected |= {"nested.a": nested["a"], "nested.b.c": nested["b"]["c"]}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert str(read[name].dtype) == str(tensor.dtype)[6:]
        np.testing.assert_array_equal(read[name], tensor.detach().numpy(), strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_and_a_module_state_dict(tmp_path, layout):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    read = read_state_dict(saved(tmp_path, module.state_dict(), layout))
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(read[name].astype(np.float32), tensor.float().numpy())


class Runs:
    """Unpickles by calling `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def by_layout(path, payload: bytes, layout):
    """A file of torch's layout whose main pickle is `payload`."""
    if layout == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + payload + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch, layout, protocol):
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    attacks = [
        Runs(os.system, f"touch {ran}"),
        Runs(exec, f"open({str(ran)!r}, 'w')"),
        Runs(builtins.open, str(ran), "w"),
        Runs(getattr, OrderedDict, "fromkeys"),
        Runs(torch.load, str(tmp_path / "other.pth")),
        {"weight": Runs(os.mkdir, str(ran))},
    ]
    for attack in attacks:
        path = by_layout(tmp_path / "evil.pth", pickle.dumps(attack, protocol), layout)
        with pytest.raises(InputError, match=r"evil\.pth refused: its pickle names \w+\.\w+"):
            read_state_dict(path)
        assert not ran.exists()
    pickle.loads(pickle.dumps(attacks[0], protocol))  # the attack itself works
    assert ran.exists()


def test_nothing_is_imported_for_a_refusal(tmp_path):
    sys.modules.pop("this", None)
    path = by_layout(tmp_path / "evil.pth", b"\x80\x02cthis\ns\n.", "stream")
    with pytest.raises(InputError, match=r"this\.s"):
        read_state_dict(path)
    assert "this" not in sys.modules


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_always_one_clear_line(tmp_path, layout):
    data = saved(tmp_path, some_state(), layout).read_bytes()
    path = tmp_path / "damaged.pth"
    random = np.random.default_rng(0)
    for cut in [0, 3, len(data) - 1, *random.integers(4, len(data) - 1, 60)]:
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"damaged\.pth") as error:
            read_state_dict(path)
        assert "\n" not in str(error.value)
    for _ in range(300):  # flipped bytes: an array, or an InputError, and nothing else
        flipped = bytearray(data)
        for at in random.integers(0, min(len(data), 4000), 3):
            flipped[at] = random.integers(256)
        path.write_bytes(flipped)
        try:
            read_state_dict(path)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("what, words", [([1, 2], "list"), ({"a": "text"}, "str"), ({"a": {"b": 3}}, "a.b")])
def test_only_dictionaries_of_tensors(tmp_path, what, words):
    torch.save(what, tmp_path / "model.pth")
    with pytest.raises(InputError, match=words):
        read_state_dict(tmp_path / "model.pth")


def test_a_tensor_may_not_reach_outside_its_storage(tmp_path):
    """torch._utils._rebuild_tensor_v2(storage of 4 floats, offset, shape, strides) with sizes it must not have."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, bytearray) else None

    views = [((0, (2, 2), (2, 1)), True), ((1, (4,), (1,)), False), ((0, (2, 3), (3, 1)), False),
             ((-1, (2,), (1,)), False), ((0, (1 << 40,), (0,)), False), ((0, (2,), (-1,)), False)]  # fmt: skip
    for view, fits in views:
        file = io.BytesIO()
        rebuild = Runs(torch._utils._rebuild_tensor_v2, bytearray(), *view, False, OrderedDict())
        Pickler(file, 2).dump({"a": rebuild})
        path = by_layout(tmp_path / "model.pth", file.getvalue(), "stream")
        raw = path.read_bytes().removesuffix(pickle.dumps([], 2))
        path.write_bytes(raw + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + np.arange(4, dtype=np.float32).tobytes())
        if fits:
            np.testing.assert_array_equal(read_state_dict(path)["a"], [[0, 1], [2, 3]])
        else:
            with pytest.raises(InputError, match="a tensor"):
                read_state_dict(path)
