"""Inference: `from pipeline import DiagonalPipeline`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.diagonal import DiagonalPipeline, DiagonalPipelineOutput, Video

__all__ = ["DiagonalPipeline", "DiagonalPipelineOutput", "Video"]


def __getattr__(name: str):
    """Import on first use: the trainer needs the loop in pipeline/chunk.py, and neither weights nor video files."""
    if name in __all__:
        from pipeline import diagonal

        return vars(diagonal)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
