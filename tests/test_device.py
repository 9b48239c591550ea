"""Where a site computes: named in `site.toml`, refused when it is not there."""

import pytest
import torch

from hospitium_client.samples import Samples
from hospitium_client.settings import SiteSettings
from hospitium_client.training.device import device_named
from hospitium_common.errors import ConfigError


def test_the_processor_is_always_there_and_the_default():
    assert device_named(SiteSettings(name="north", title="North").compute.device).type == "cpu"


@pytest.mark.parametrize(
    ("name", "seen", "index"), [("cuda", 1, 0), ("cuda:0", 1, 0), ("cuda:1", 2, 1)]
)
def test_a_graphics_processor_that_torch_sees_is_taken(name, seen, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert device_named(name) == torch.device("cuda", index)


@pytest.mark.parametrize(("name", "seen"), [("cuda", 0), ("cuda:1", 1), ("cuda:12", 2)])
def test_a_device_that_is_not_there_is_refused_and_nothing_else_taken(name, seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(ConfigError, match=rf"{name}.*sees {seen} .*site.toml"):
        device_named(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", "mps", "", "cuda:-1"])
def test_other_names_are_refused_in_the_settings_and_here(name):
    with pytest.raises(ConfigError, match="expected"):
        device_named(name)
    with pytest.raises(ValueError, match="device"):
        SiteSettings(name="north", title="North", compute={"device": name})


def test_records_move_and_whom_they_belong_to_stays_with_the_sampler():
    samples = Samples(
        inputs=torch.zeros(3, 2), targets=torch.zeros(3).long(), patients=torch.tensor([0, 1, 1])
    ).to(torch.device("meta"))
    assert (samples.inputs.device.type, samples.targets.device.type) == ("meta", "meta")
    assert samples.patient_count == 2
