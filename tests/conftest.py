"""Shared by all tests: one thread, so that runs agree to the bit and share the machine politely."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("MKL_CBWR", "AUTO")  # before MKL is loaded: on AMD its bits depend on where an array begins

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose kernels run on a CPU only so


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    gc.freeze()  # or each collection, and Trainer asks for some, would go through all of PyTorch and transformers


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def perturb(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Add noise to *every* parameter, so that no identity, zero or one hides a path; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.add_((scale * noise).to(parameter.dtype))
    return module


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared text goes to a directory of the test session's own, for its subprocesses too.

    The compiled operations are kept between sessions: their folders are named by a hash of the sources.
    """
    own = tmp_path_factory.mktemp("cache")
    kept = Path(__file__).parents[1] / ".cache" / "vwn" / "ops"
    kept.mkdir(parents=True, exist_ok=True)
    (own / "ops").symlink_to(kept, target_is_directory=True)
    os.environ["VWN_CACHE"] = str(own)


@pytest.fixture(params=["reference", "compiled"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the ops that runs on a CPU."""
    from vwn.ops import backends

    if reason := backends.module(request.param).unavailable(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder for texts."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up sentences, 60 KB, in which letters and words follow from what comes before."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(60)]
    follows = {w: draw.sample(words, 4) for w in words}
    word, sentence = words[0], []
    while sum(map(len, sentence)) < 50_000:
        sentence.append(word)
        word = draw.choice(follows[word])
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(sentence))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Any, Any]:
    """A finished training run of 20 steps, its configuration and result; leave its directory as it is."""
    from runs import config  # it imports Triton on the way
    from vwn.training.run import train

    run = config(tmp_path_factory.mktemp("run") / "out", text)
    return run, train(run)
