"""Checkpoints that a killed process was replacing, and random states of devices."""
import os
import signal

import pytest
import torch
from forked import CONTEXT

from timm_lm.training import checkpoint as checkpoint_module
from timm_lm.training.checkpoint import CheckpointStore, Progress, random_states, restore_random_states


def save(store, value):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).state_dict()
    return store.save(7, Progress(0, 7), dict(model=dict(weight=torch.tensor([value]))), optimizer, [random_states()],
                      dict(scheduler=None))


def replace_and_die(folder):
    """Be killed between the two renames that put a checkpoint in the place of an older one."""
    replace, calls = os.replace, []

    def deadly(source, target):
        if calls:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(source)
        replace(source, target)

    os.replace = deadly
    save(CheckpointStore(folder), 2.)


def test_checkpoint_that_was_being_replaced_is_found_and_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    folder = save(store, 1.)
    writer = CONTEXT.Process(target=replace_and_die, args=(tmp_path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL and not folder.exists()
    found = store.newest()
    assert found.group('model')['weight'] == 1 and found.progress == Progress(0, 7)
    assert store.newest_state()['progress'] == dict(epoch=0, batch=7)
    store.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert store.read(folder).group('model')['weight'] == 1


@pytest.mark.parametrize('device', ['mps', 'xpu'])
def test_random_states_of_other_devices_come_back(tmp_path, monkeypatch, device):
    """By what PyTorch would tell of a device, which is not there."""
    state = torch.tensor([1, 2, 3], dtype=torch.uint8)
    restored = []
    monkeypatch.setattr(checkpoint_module, '_has_device', lambda name: name == device)
    monkeypatch.setattr(getattr(torch, device), 'get_rng_state', lambda: state)
    monkeypatch.setattr(getattr(torch, device), 'set_rng_state', restored.append)
    store = CheckpointStore(tmp_path)
    restore_random_states(store.read(save(store, 1.)), rank=0)
    assert len(restored) == 1 and torch.equal(restored[0], state)
