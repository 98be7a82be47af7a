"""The entry point ``vllm.general_plugins``: tells vLLM of our model type and of what runs it."""

from typing import Any

from vwn.common.errors import UserError

ARCHITECTURE = "VirtualWidthForCausalLM"


def register() -> None:
    """Register the Auto classes of transformers and, where vLLM is installed, the model with its registry.

    vLLM calls this in each of its processes before any other work, so the model itself is named, not imported.
    """
    import vwn.hf  # noqa: F401

    try:
        from vllm import ModelRegistry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        return
    ModelRegistry.register_model(ARCHITECTURE, f"vwn.vllm.model:{ARCHITECTURE}")


def prepare(config: Any, pipeline_stages: int = 1) -> None:
    """Have a ``VirtualWidthConfig`` say, in place, what vLLM's transformers backend reads from the backbone's config.

    That is the width of the embedding table and whether it is tied. MTP modules are left out: nothing would run them.
    An option that vLLM has no inputs or no place for is refused.
    """
    refused = {
        f"ngram_order = {config.ngram_order} needs the ids before each token": config.ngram_order > 1,
        f"table_factor = {config.table_factor} needs a layer in front of the unembedding": config.table_factor > 1,
        "frozen = True keeps the routing in buffers": bool(config.frozen),
        f"{pipeline_stages} pipeline stages hand on states of hidden_size, not over-width ones": pipeline_stages > 1,
    }
    for reason, holds in refused.items():
        if holds:
            raise UserError(f"{reason}, which vLLM does not have; generate with transformers")
    config.num_mtp_modules = 0
    config.backbone.tie_word_embeddings = config.tie_word_embeddings
    if config.embedding == "direct" and config.n != config.m:
        config.backbone.embedding_size = config.geometry.over_width
