"""download.py: no network, a silent one, a wrong answer; what `--dataset auto` stands for."""

import threading
import time
import urllib.error

import pytest

import preprocess
from data_sets import write_cifar
from preprocess import DataError, load
from sasa.data import download


def no_network(*_args, **_options):
    raise urllib.error.URLError("Name or service not known")


def silent_network(*_args, **_options):
    time.sleep(5)
    raise urllib.error.URLError("timed out at last")


class Portal:
    """Answers everything with its own page."""

    length, url = 5, None

    def __init__(self, *_args, **_options):
        self.left = [b"login"]

    def read(self, _size):
        return self.left.pop() if self.left else b""

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"])
def test_no_network_is_one_clear_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match=f"{name} is not in .*cannot be downloaded.*Name or service") as error:
        load(dataset=name, data_dir=tmp_path / "nothing")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert ("dataset-fashion-mnist" in str(error.value)) == (name == "FashionMNIST")


def test_a_silent_network_is_waited_for_only_so_long(tmp_path, monkeypatch):
    assert download.NETWORK_WAIT_S <= 10
    monkeypatch.setattr(download, "NETWORK_WAIT_S", 0.3)
    monkeypatch.setattr("urllib.request.urlopen", silent_network)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"no answer within 0\.3 s"):
        load(dataset="MNIST", data_dir=tmp_path)  # two mirrors: they share the wait
    assert time.monotonic() - begin < 2


def test_a_failed_download_is_one_clear_line(tmp_path, monkeypatch):
    def expect(words, dataset):
        with pytest.raises(DataError, match=words) as error:
            load(dataset=dataset, data_dir=tmp_path)
        assert "\n" not in str(error.value)

    monkeypatch.setattr("urllib.request.urlopen", Portal)
    expect(r"the download failed .*corrupted", "CIFAR10")

    def lost_later(*args, **_options):  # the first request is made in a thread, the download is not
        return Portal() if threading.current_thread() is not threading.main_thread() else no_network()

    monkeypatch.setattr("urllib.request.urlopen", lost_later)
    expect(r"the download failed \(Error downloading train-images.* Tried", "MNIST")


def test_auto(tmp_path, monkeypatch):
    asked = []

    def network(*_args, **_options):
        asked.append(1)
        no_network()

    monkeypatch.setattr("urllib.request.urlopen", network)
    name, reason = preprocess.resolve_auto(tmp_path, has_gpu=False)
    assert name == "DIGITS" and "no GPU" in reason and not asked
    name, reason = preprocess.resolve_auto(tmp_path, has_gpu=True)
    assert name == "DIGITS" and "Name or service" in reason and asked
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    asked.clear()
    assert [preprocess.resolve_auto(tmp_path, has_gpu=gpu)[0] for gpu in (False, True)] == ["CIFAR10"] * 2 and not asked
