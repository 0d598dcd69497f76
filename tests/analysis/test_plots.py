"""The picture of a training run."""

import sys

import pytest
import torch

from sae_fast.analysis.plots import plot_training
from sae_fast.extras import MissingExtra


def history(steps=30):
    terms = dict(loss=9.0, reconstruction=4.0, auxiliary=4.0, sparsity=1.0, l0=64.0, fvu=0.5)
    return [{"step": i} | {name: value / (i + 1) for name, value in terms.items()} for i in range(steps)]


@pytest.mark.parametrize("records", [1, 30])
@pytest.mark.parametrize("density", [torch.zeros(10), torch.tensor([0.0, 1e-4, 0.5, 1.0])], ids=["all dead", "alive"])
def test_it_draws_whatever_the_run_was_like(tmp_path, records, density):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    plot_training(history(records), density, tmp_path / "a.png", held_out={"l0": 40.0, "fvu": 0.1}, title="A run")
    with image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1430, 936)
        assert len(picture.convert("L").getcolors()) > 50  # not a blank page


def test_the_processs_own_figures_are_left_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    before = pyplot.get_fignums(), pyplot.get_backend()
    plot_training(history(), torch.rand(10), tmp_path / "a.png")
    assert (pyplot.get_fignums(), pyplot.get_backend()) == before


def test_no_history(tmp_path):
    with pytest.raises(ValueError, match="history: got no records"):
        plot_training([], torch.rand(10), tmp_path / "a.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sae-fast\[demo\]'"):
        plot_training(history(), torch.rand(10), tmp_path / "a.png")
