"""Ways to cut a trace into segments (*cuttings*) that the bench compares, by names such as `keyword_entropy-8`."""

from collections.abc import Sequence

from rredcot_verl.config.blocks import SegmentationConfig
from rredcot_verl.config.schema import RREDCoTConfig, parse
from rredcot_verl.core.segmentation import get_segmenter

DEFAULT_ABLATION = (
    "fixed-16",
    "newline-16",
    "keyword-16",
    "entropy-16",
    "keyword_entropy-8",
    "keyword_entropy-16",
    "keyword_entropy-32",
)

LABELS = "labels"
"""Name of the cutting that a labelled set brings: at the ends of its steps."""
Rules = dict[str, SegmentationConfig | None]
"""Ways to cut by name; None where the traces say themselves where they are cut."""


def parse_segmentations(names: Sequence[str] | None, settings: RREDCoTConfig, *, labelled: bool = False) -> Rules:
    """The segmentations of some names, lengths and keywords being the run's; the first one is the main one.

    Args:
        names: `METHOD-NUM_SEGMENTS` each; None for the settings' own and the usual ablation after it.
        settings: The `algorithm.rredcot` block.
        labelled: The traces are labelled: their own steps come first, and nothing else where no name is given.

    Raises:
        ValueError: A name is malformed, or its method or number is not one that `segmentation` takes.
    """
    found: Rules = {LABELS: None} if labelled else {}
    if names is None and not labelled:
        own = f"{settings.segmentation.method}-{settings.segmentation.num_segments}"
        names = [own, *DEFAULT_ABLATION]
    for name in dict.fromkeys(names or ()):
        method, _, number = name.rpartition("-")
        if not method or not number.isdecimal():
            raise ValueError(f"--cuttings {name!r}: expected METHOD-NUM_SEGMENTS, e.g. keyword_entropy-8")
        block = settings.model_dump()
        block["segmentation"] |= {"method": method, "num_segments": int(number)}
        try:
            rule = parse(block).segmentation
            get_segmenter(rule.method)
        except ValueError as error:
            raise ValueError(f"--cuttings {name!r}: {error}") from error
        found[name] = rule
    return found
