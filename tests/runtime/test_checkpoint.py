"""Checkpoints are written atomically, and resuming from one matches the uninterrupted run bit for bit."""

import copy
import pickle
import resource
import threading
import zlib
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from bigtrain.runtime import zero
from bigtrain.runtime.checkpoint import Checkpoints, check_fits, checksum, damage


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def save_whole(checkpoints, *what):
    checkpoints.save(*what)
    checkpoints.settle()


def a_network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))
    net[0].bias.requires_grad_(False)
    return net


def groups(net):
    """In another order than the module's: moments are matched to weights by name, not by position."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return [{"params": trained[::-1][:2]}, {"params": trained[::-1][2:]}]


def train(net, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def state_of(net, optimizer):
    moments = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [*net.state_dict().values(), *(s[kind] for s in moments for kind in sorted(s) if s[kind] is not None)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_exact(tmp_path, accelerator, kind):
    """Resuming from a checkpoint matches uninterrupted training bit for bit."""
    net = a_network()
    optimizer = OPTIMIZERS[kind](groups(net))
    train(net, optimizer, range(5))
    save_whole(Checkpoints(tmp_path, accelerator, net, optimizer), 5, {"epoch": 1, "batch": 2}, net)
    saved = copy.deepcopy(state_of(net, optimizer))
    train(net, optimizer, range(5, 10))

    other = a_network(seed=1)
    again = OPTIMIZERS[kind](groups(other))
    checkpoints = Checkpoints(tmp_path, accelerator, other, again)
    assert checkpoints.load() == {"step": 5, "epoch": 1, "batch": 2}
    checkpoints.load_moments(other)
    for one, two in zip(state_of(other, again), saved, strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype
    train(other, again, range(5, 10))
    for one, two in zip(state_of(other, again), state_of(net, optimizer), strict=True):
        assert torch.equal(one, two)


def test_learning_rate(tmp_path, accelerator):
    """The learning rate stays the optimizer's own and is not taken from the checkpoint."""
    net = a_network()
    optimizer = OPTIMIZERS["adamw"](groups(net))
    train(net, optimizer, range(1))
    save_whole(Checkpoints(tmp_path, accelerator, net, optimizer), 1, {}, net)
    again = torch.optim.AdamW(groups(net), lr=7.0)
    checkpoints = Checkpoints(tmp_path, accelerator, net, again)
    checkpoints.load()
    checkpoints.load_moments(net)
    assert [group["lr"] for group in again.param_groups] == [7.0, 7.0]


@pytest.fixture
def checkpoints(tmp_path, accelerator):
    """checkpoints(keep=) over one network whose first bias tells the step it was saved at."""
    net = a_network()
    optimizer = OPTIMIZERS["sgd with momentum"](groups(net))
    train(net, optimizer, range(1))

    def make(**options):
        made = Checkpoints(tmp_path / "checkpoints", accelerator, net, optimizer, **options)

        def save(step):
            nn.init.constant_(net[0].bias, step)
            made.save(step, {"batch": step}, net)
            nn.init.zeros_(net[0].bias)  # as training would go on: what is written are copies
            made.settle()

        def load():
            state = made.load()
            return state, net[0].bias[0].item()

        return save, load, tmp_path / "checkpoints"

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_saved(checkpoints):
    """Where nothing was saved, nothing is loaded."""
    _, load, _ = checkpoints()
    assert load()[0] == {}


def test_keep_newest(checkpoints):
    """The newest checkpoints are kept, and the newest of all is loaded."""
    save, load, folder = checkpoints(keep=2)
    for step in (10, 20, 30, 40):
        save(step)
    assert names(folder) == ["step-000030", "step-000040"]
    assert load() == ({"step": 40, "batch": 40}, 40)


def test_seven_digit_steps(checkpoints):
    """Steps of seven digits are newer than those of six."""
    save, load, folder = checkpoints(keep=2)
    for step in (999_998, 999_999, 1_000_000):
        save(step)
    assert names(folder) == ["step-1000000", "step-999999"]
    assert load()[1] == 1_000_000


def test_half_written(checkpoints):
    """A half-written checkpoint is passed over, and its leftovers do not stop the next."""
    save, load, folder = checkpoints()
    save(10)
    save(20)
    (folder / "step-000020").rename(folder / "step-000020.tmp")  # killed before the rename
    assert load()[1] == 10
    save(20)
    assert names(folder) == ["step-000010", "step-000020"]
    assert load()[1] == 20


@pytest.mark.parametrize("harm", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "missing", "empty"])
def test_damaged_passed_over(checkpoints, capsys, harm, how):
    """A damaged checkpoint is passed over with a warning, for the one before it."""
    save, load, folder = checkpoints()
    save(10)
    save(20)
    file = folder / "step-000020" / harm
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -(file.stat().st_size // 3)] if how == "truncated" else b"")
    assert load() == ({"step": 10, "batch": 10}, 10)
    said = capsys.readouterr().out
    assert "step-000020 is not whole" in said
    assert "continuing from" in said and said.strip().endswith("step-000010")


def test_step_saved_again(checkpoints):
    """A step that is saved again is there once."""
    save, load, folder = checkpoints()
    for _ in range(2):
        save(10)
    assert names(folder) == ["step-000010"]
    assert load()[1] == 10


def test_damaged_replaced(checkpoints):
    """A damaged checkpoint is replaced when its step comes again."""
    save, load, folder = checkpoints()
    save(10)
    save(20)
    (folder / "step-000020" / "optimizer.safetensors").write_bytes(b"")
    assert load()[1] == 10
    save(20)
    assert names(folder) == ["step-000010", "step-000020"] and load()[1] == 20


def test_damaged_later_step(checkpoints):
    """A damaged checkpoint of a later step does not get the one just saved deleted."""
    save, load, folder = checkpoints(keep=1, keep_every=10)
    save(10)
    save(20)
    (folder / "step-000020" / "optimizer.safetensors").write_bytes(b"")
    save(15)
    assert names(folder) == ["step-000010", "step-000015", "step-000020"] and load()[1] == 15


def test_keep_every(checkpoints):
    """The checkpoints of every `keep_every` steps stay too."""
    save, load, folder = checkpoints(keep=1, keep_every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(step)
    assert names(folder) == ["step-000020", "step-000040", "step-000060", "step-000070"]
    assert load()[1] == 70


@pytest.mark.parametrize("harm", ["model.safetensors", "optimizer.safetensors"])
def test_changed_byte(checkpoints, capsys, harm):
    """A byte that the disk has changed is found, and the checkpoint before is loaded."""
    save, load, folder = checkpoints()
    save(10)
    save(20)
    file = folder / "step-000020" / harm
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # of a weight: the file reads as before
    file.write_bytes(content)
    assert load()[1] == 10
    assert f"{harm} is not as it was written" in capsys.readouterr().out


def test_none_whole(checkpoints, capsys):
    """Where no checkpoint is whole, the run starts over and says so."""
    save, load, folder = checkpoints()
    save(10)
    (folder / "step-000010" / "state.json").unlink()
    assert load()[0] == {}
    assert "step-000010 is not whole" in capsys.readouterr().out


@contextmanager
def full_disk():
    """Files cannot grow beyond 500 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk(checkpoints):
    """A full disk is a one-sentence error, and the previous checkpoint is unchanged."""
    save, load, folder = checkpoints()
    save(10)
    before = {path.name: path.read_bytes() for path in (folder / "step-000010").iterdir()}
    says = r"the checkpoint of step 20 cannot be written .*step-000010 is as it was. Make"
    with pytest.raises(OSError, match=says), full_disk():
        save(20)
    assert names(folder) == ["step-000010"]  # no temporary folder
    assert {path.name: path.read_bytes() for path in (folder / "step-000010").iterdir()} == before
    assert load()[1] == 10


def test_full_disk_at_first(checkpoints):
    """A full disk at the first checkpoint is a one-sentence error, and nothing is left behind."""
    save, _, folder = checkpoints()
    with pytest.raises(OSError, match=r"step 10 cannot be written .*; there is none before it. Make room"), full_disk():
        save(10)
    assert names(folder) == []


def test_other_network(checkpoints, accelerator):
    """A checkpoint of another network is refused, and the shapes are told."""
    save, _, folder = checkpoints()
    save(10)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2))
    other = Checkpoints(folder, accelerator, net, OPTIMIZERS["sgd"](net.parameters()))
    with pytest.raises(ValueError, match=r"0\.weight is \(8, 4\), here \(6, 4\)"):
        other.load()


def test_no_pickle_is_written_or_read(checkpoints):
    save, load, folder = checkpoints()
    save(10)
    assert names(folder / "step-000010") == ["model.safetensors", "optimizer.safetensors", "state.json"]
    (folder / "step-000010" / "model.safetensors").write_bytes(pickle.dumps({"0.weight": [1.0]}))
    assert load()[0] == {}


def test_checksum_is_of_all_blocks(tmp_path):
    """Read in blocks of 4 MiB, a file of 5 MiB has the checksum of its whole content."""
    content = bytes(range(256)) * (5 << 12)
    (tmp_path / "file").write_bytes(content)
    assert checksum(tmp_path / "file") == zlib.crc32(content)


def test_folder_that_cannot_be_made(tmp_path, accelerator):
    """A file in place of the folder gives the same error, whatever cleanup is left to do."""
    net = nn.Linear(1, 1)
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file", accelerator, net, torch.optim.SGD(net.parameters()))
    with pytest.raises(OSError, match=r"checkpoint of step 10 cannot be written .*; there is none before it"):
        save_whole(checkpoints, 10, {}, net)


def test_part_under_zero(tmp_path, accelerator, monkeypatch):
    """ZeRO's names are relative to the trained submodule; the checkpoint holds the full module, with ZeRO's weights."""
    whole = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.constant_(whole[0].weight, 3.0)
    optimizer = torch.optim.SGD(whole[1].parameters())
    monkeypatch.setattr(zero, "is_used", lambda accelerator: True)
    monkeypatch.setattr(zero, "whole_weights", lambda prepared: {"weight": torch.tensor([[5.0]])})
    monkeypatch.setattr(zero, "moments", lambda prepared: {"weight/exp_avg": torch.tensor([[7.0]])})
    save_whole(Checkpoints(tmp_path, accelerator, whole[1], optimizer, state=whole), 1, {}, whole[1])

    monkeypatch.undo()
    again = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(again[1].parameters())
    checkpoints = Checkpoints(tmp_path, accelerator, again[1], optimizer, state=again)
    assert checkpoints.load() == {"step": 1}
    assert [weight.item() for weight in again.parameters()] == [3, 5]
    checkpoints.load_moments(again[1])
    assert optimizer.state[again[1].weight]["exp_avg"].item() == 7


def test_what_does_not_fit_is_named(tmp_path):
    """Weights missing on one side are reported like mismatched shapes."""
    given, needed = {"b": torch.ones(3), "same": torch.ones(1)}, {"a": torch.ones(2), "same": torch.ones(1)}
    with pytest.raises(ValueError, match=r"network: b is \(3,\), here not; a is not there, here \(2,\)\. Was"):
        check_fits(tmp_path, given, needed)


def test_damage_names_the_error(tmp_path):
    """A missing file and invalid JSON are reported as different errors."""
    assert damage(tmp_path).startswith("FileNotFoundError: ")
    (tmp_path / "state.json").write_text("{")
    assert damage(tmp_path).startswith("JSONDecodeError: ")


def test_slow_disk(tmp_path, accelerator, monkeypatch):
    """Training goes on while a checkpoint is written; the next one waits for it, and both are whole."""
    net = a_network()
    checkpoints = Checkpoints(tmp_path, accelerator, net, OPTIMIZERS["sgd"](groups(net)))
    may_write = threading.Event()
    write = checkpoints._write_whole
    monkeypatch.setattr(checkpoints, "_write_whole", lambda *what: may_write.wait() and write(*what))
    checkpoints.save(1, {}, net)
    assert names(tmp_path) == [] and checkpoints.newly_whole() == []
    threading.Timer(0.2, may_write.set).start()
    checkpoints.save(2, {}, net)
    assert names(tmp_path)[0] == "step-000001"
    checkpoints.settle()
    assert [step for step, _ in checkpoints.newly_whole()] == [1, 2] and checkpoints.newest.name == "step-000002"
