"""What lies in `recipes/`: accelerate reads the configurations, the scripts run on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from processes import free_port

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = [
    *("--tokenizer", "bytes", "--window", "32", "--max-valid-tokens", "256", "--backbone", "nano", "--steps", "2"),
    *("--batch-size", "8"),
]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.mixed_precision == "no"  # vwn says it, for the routing to stay float32
    if "fsdp" in path.stem:
        assert config.distributed_type == "FSDP"
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


@pytest.mark.parametrize("path", [*RECIPES.glob("*.sh"), *RECIPES.glob("*.sbatch")], ids=lambda p: p.name)
def test_scripts_are_scripts(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.stem in ("eight_gpus", "four_nodes"):  # without the dashes a launcher takes --m for an option of its own
        assert "-m -- vwn" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment", "sharded"),
    [
        ("one_gpu.sh", {}, False),
        ("eight_gpus.sh", {"ACCELERATE": str(RECIPES / "eight_gpus_fsdp2.yaml")}, True),
        ("four_nodes.sh", {"NODES": "1", "PARALLEL": "fsdp2"}, True),
    ],
)
def test_scripts_train(name, environment, sharded, tmp_path, text):
    """On this machine's processors: two processes, gloo, and what has accelerate shard there, from sitecustomize."""
    hook = f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
    hook += "import os\nif 'RANK' in os.environ:\n    import processes\n    processes.shard_on_cpu()\n"
    (tmp_path / "sitecustomize.py").write_text(hook)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {
        "PATH": binaries, "PYTHONPATH": os.pathsep.join(paths), "DATA": str(text), "PROCESSES": "2",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    out = tmp_path / "run"
    done = subprocess.run(
        ["bash", str(RECIPES / name), str(out), *SMALL],
        env=os.environ | settings | environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "result.json").read_text())["curve"][-1]["loss"] < 6
    assert (out / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir() == sharded
    assert (out / "model.safetensors").exists()
