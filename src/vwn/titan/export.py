"""A checkpoint of torchtitan as a folder for transformers: ``python -m vwn.titan.export CHECKPOINT OUT``.

One process, on the CPU; the checkpoint may come from any parallelism.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from vwn.common.errors import UserError
from vwn.nn.initialisation import current_name
from vwn.titan.sizes import Backbone, VirtualWidth, hf_config
from vwn.titan.state_dict_adapter import from_transformers, to_transformers


def export(checkpoint: Path, out: Path) -> Any:
    """Write the model of ``checkpoint`` (``.../checkpoint/step-N``) to ``out``, and return it.

    Raises:
        UserError: no checkpoint, no ``config.json`` of the run two folders above it, or an ``out`` that is there.
    """
    from vwn.hf import VirtualWidthForCausalLM

    if not (checkpoint / ".metadata").is_file():
        raise UserError(
            f"{checkpoint} is not a checkpoint of torchtitan; give a folder such as outputs/checkpoint/step-500"
        )
    if out.exists():
        raise UserError(f"{out} exists already; give a folder that is to be made")
    config = checkpoint.resolve().parent.parent / "config.json"
    try:
        run = json.loads(config.read_text(encoding="utf-8"))
        sizes = Backbone(**run["backbone"]), VirtualWidth(**run["virtual_width"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{config} is not the configuration of a run of vwn.titan; restore it") from error
    model = VirtualWidthForCausalLM(hf_config(*sizes))
    state = from_transformers({name: torch.empty_like(t) for name, t in model.state_dict().items()})
    stored = {current_name(name): name for name in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata}
    state = {stored.get(name, name): weight for name, weight in state.items()}  # an earlier one has other names
    dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    model.load_state_dict(to_transformers({current_name(name): weight for name, weight in state.items()}))
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source := Path(run.get("hf_assets_path") or "") / name).is_file():
            shutil.copyfile(source, out / name)
    return model


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m vwn.titan.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder such as outputs/checkpoint/step-500")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
