"""What the measurements share, for traces that are cut by hand."""

from rredcot_verl.analyze.measuring import Context, Segments
from rredcot_verl.analyze.policy import Policy
from rredcot_verl.analyze.records import CuttingRecord
from rredcot_verl.analyze.segmentations import parse_segmentations
from rredcot_verl.analyze.timing import Stopwatch
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary

CUTTING = "fixed-3"


def make_context(model, tokenizer, traces, boundaries, problems, temperature=1.0, max_pack_tokens=4096) -> Context:
    """Read the traces in order; `boundaries` by number of the trace."""
    settings = parse({"segmentation": {"min_tokens": 2}})
    elicitation = Elicitation(Vocabulary(tokenizer, settings.segmentation.keywords), settings)
    cut = [CuttingRecord(trace, CUTTING, own, own) for trace, own in boundaries.items()]
    return Context(
        Policy(model, tokenizer, (tokenizer.eos_token_id,), 512),
        elicitation,
        settings,
        Segments(parse_segmentations([CUTTING], settings), elicitation, 64, cut),
        {problem.group: problem for problem in problems},
        {trace.trace: elicitation.read(trace.response_ids, trace.prompt_ids) for trace in traces},
        temperature,
        max_pack_tokens,
        Stopwatch(model.device),
    )
