"""GPUs and how they are joined: a small table from the vendors' data sheets, a word or a file for a cluster."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

import yaml

from vwn.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU. 10^9 bytes are a GB."""

    memory_gb: float
    tflops: float
    """Peak of dense matrix products in bfloat16, 10^12 FLOP/s."""
    hbm_gb_s: float
    """Bandwidth of its memory."""
    intra_gb_s: float
    """Bandwidth to the other GPUs of its node, one way: half of what data sheets add up."""
    inter_gb_s: float
    """Its share of the bandwidth between nodes, one way: one network port each, as in the vendors' own nodes."""


# Dense bfloat16 without sparsity, from the data sheets of A100 SXM 80 GB, H100 SXM, H200 SXM, HGX B200 and Instinct
# MI300X; the network is that of DGX A100 (200 Gb/s ports), DGX H100, H200 and B200, and usual with MI300X (400 Gb/s).
GPUS = {
    "a100": Gpu(80, 312, 2039, 300, 25),
    "h100": Gpu(80, 989, 3350, 450, 50),
    "h200": Gpu(141, 989, 4800, 450, 50),
    "b200": Gpu(180, 2250, 7700, 900, 50),
    "mi300x": Gpu(192, 1307, 5300, 448, 50),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Args:
        name: of the kind of GPU, to show.
        gpu: one of them.
        per_node: GPUs that share a node's fast links.
        nodes: how many.
        latency_us: of one hop of a message, microseconds.
    """

    name: str
    gpu: Gpu
    per_node: int
    nodes: int
    latency_us: float = 5.0

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.per_node * self.nodes

    def seconds(self, data: float, size: int, stride: int, share: float, messages: float) -> float:
        """Time of collectives in which every GPU ends up with, or gives away, all of some data.

        An all-gather or a reduce-scatter as a ring: a GPU receives ``(N - 1) / N`` of the data, a node what its
        members together lack, over the ports of those members.

        Args:
            data: bytes, all collectives together, whole (not a GPU's share of them).
            size: GPUs in the group, ``N``.
            stride: distance of neighbours in the group, in ranks.
            share: of the nominal bandwidth that is reached.
            messages: collectives, each of which waits ``N - 1`` hops.
        """
        if size == 1:
            return 0.0
        members = min(size, max(1, self.per_node // stride))
        nodes = ceil(size / members)
        inside = data * (size - 1) / size / self.gpu.intra_gb_s if members > 1 else 0.0
        between = data * (nodes - 1) / nodes / (members * self.gpu.inter_gb_s)
        return max(inside, between) / (share * 1e9) + messages * (size - 1) * self.latency_us * 1e-6

    def hop_seconds(self, data: float, stride: int, share: float) -> float:
        """Time of sending ``data`` bytes to the GPU ``stride`` ranks away."""
        near = stride < self.per_node
        return data / ((self.gpu.intra_gb_s if near else self.gpu.inter_gb_s) * share * 1e9) + self.latency_us * 1e-6


def parse_cluster(text: str) -> Cluster:
    """A cluster from its word, ``KIND:GPUSxNODES``, or from a YAML or JSON file.

    The file has ``per_node``, ``nodes`` and either ``gpu``, a kind of the table, or all fields of :class:`Gpu`; single
    ones beside ``gpu`` replace the table's. ``name`` and ``latency_us`` may be left out.

    Raises:
        UserError: a kind, field or value that does not exist.
    """
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        return _from_file(Path(text))
    kind, _, size = text.partition(":")
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not found:
        raise UserError(
            f"--cluster is KIND:GPUSxNODES, such as h100:8x16 for 16 nodes of 8, or a .yaml or .json file; got {text!r}"
        )
    return Cluster(kind, _known(kind), int(found[1]), int(found[2]))


def _known(kind: Any) -> Gpu:
    if kind not in GPUS:
        raise UserError(
            f"the GPU {kind!r} is not in the table ({', '.join(GPUS)}); describe the cluster in a .yaml file "
            "(docs/scale.md)"
        )
    return GPUS[kind]


def _from_file(path: Path) -> Cluster:
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the cluster {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"the cluster {path} is not {path.suffix[1:]}: {error}") from error
    numbers = [f.name for f in fields(Gpu)]
    known = ["name", "gpu", "per_node", "nodes", "latency_us", *numbers]
    if not isinstance(content, dict) or (wrong := [k for k in content if k not in known]):
        what = f"has no {wrong[0]!r}" if isinstance(content, dict) else "is a list of fields"
        raise UserError(f"a cluster {what} (in {path}); there are {', '.join(known)}")
    needed = ["per_node", "nodes", *([] if "gpu" in content else numbers)]
    for name in [*needed, *(k for k in content if k not in ("name", "gpu", *needed))]:
        value = content.get(name)
        whole = name in ("per_node", "nodes")
        above = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (above and (0 if name == "latency_us" else 1e-12) <= value < inf):  # type: ignore[operator]
            kind = "a whole number, 1 or more" if whole else "a number above 0"
            raise UserError(f"{name} of the cluster {path} must be {kind}, got {value!r}")
    own = {k: v for k, v in content.items() if k in numbers}
    gpu = replace(_known(content["gpu"]), **own) if "gpu" in content else Gpu(**own)
    name = str(content.get("name", content.get("gpu", path.stem)))
    return Cluster(name, gpu, content["per_node"], content["nodes"], content.get("latency_us", 5.0))
