"""The blocks of `algorithm.rredcot`: strict, frozen, and the only place where a default is written in Python."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GROUND_TRUTH = "reward_model.ground_truth"

DEFAULT_KEYWORDS = (
    "wait",
    "hmm",
    "but",
    "so",
    "therefore",
    "thus",
    "hence",
    "however",
    "alternatively",
    "instead",
    "first",
    "second",
    "next",
    "then",
    "now",
    "finally",
    "let me",
    "let's",
    "maybe",
    "actually",
    "because",
    "since",
    "suppose",
    "check",
)


class Block(BaseModel):
    """What is unknown, ill-typed or not finite is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SegmentationConfig(Block):
    """How a response is cut into segments, online: a cut is decided by what stands before it. The ingredients are the
    paper's (newlines, keywords, uncertainty); that they are read off what is written, counts and lengths are ours."""

    method: str = Field(
        "keyword_entropy",
        min_length=1,
        description="What ends a segment. `newline`: a line; `keyword`: a sentence that began with a keyword; "
        "`entropy`: one in which the model was uncertain; `keyword_entropy`: any of these; with each, after twice the "
        "spacing, any sentence; `fixed`: its length alone; or your own, `package.module:function`.",
    )
    num_segments: int = Field(
        64,
        ge=1,
        le=256,
        description="Most segments of a response. The spacing of cuts is data.max_response_length / (num_segments - "
        "2), `min_tokens` at least: two are kept for where the answer opens and where thinking ends.",
    )
    min_tokens: int = Field(32, ge=1, description="Shortest segment, in tokens the model wrote, the last one excepted.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest segment, in tokens the model wrote: cut there, inside a sentence if need be. Less than "
        "the spacing counts as the spacing; null: any.",
    )
    keywords: tuple[str, ...] = Field(
        DEFAULT_KEYWORDS,
        strict=False,
        description="A sentence that began with one of these words (any case) ends a segment.",
    )

    @model_validator(mode="after")
    def _lengths(self) -> "SegmentationConfig":
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"segmentation.max_tokens={self.max_tokens} must be null or at least "
                f"segmentation.min_tokens={self.min_tokens}"
            )
        if any(not word.strip() for word in self.keywords):
            raise ValueError(f"segmentation.keywords={list(self.keywords)} holds an empty word")
        return self


class ElicitationConfig(Block):
    """How the answer is asked for at a prefix: close the thinking block if one is open, then open the answer."""

    format: Literal["auto", "boxed", "hash", "plain", "answer", "code", "custom"] = Field(
        "auto",
        description="`boxed`: \\boxed{}; `hash`: #### (GSM8K); `plain`: Answer:; `auto`: of these three the one "
        "that most responses used so far, at first `boxed`; `answer`: <answer>...</answer> (R1-Zero); `code`: the last "
        "fenced block of Python; `custom`: the three fields below.",
    )
    opening: str | None = Field(
        None, min_length=1, description="custom: text that opens the answer, e.g. '\\nResult:'."
    )
    pattern: str | None = Field(
        None, min_length=1, description="custom: regular expression of opening and answer, the answer in group 1."
    )
    closing: tuple[str, ...] = Field(
        (), strict=False, description="custom: texts that end an answer, besides the end-of-sequence tokens."
    )
    think_open: str = Field(
        "<think>", min_length=1, description="Text that opens a thinking block, of one token or several."
    )
    think_close: str = Field("</think>", min_length=1, description="Text that closes it; what follows is said.")
    think_exit: str | None = Field(
        None,
        min_length=1,
        description="Text with which a probe leaves an open thinking block, think_close last; null: a new line, "
        "think_close and an empty line.",
    )
    think_skip: str | None = Field(
        None,
        description="Text with which a probe at the start of a response says that nothing is thought, where the prompt "
        "does not; null: what the chat template adds with enable_thinking=false, as Qwen3's empty block; '': nothing.",
    )

    @model_validator(mode="after")
    def _custom(self) -> "ElicitationConfig":
        given = [name for name in ("opening", "pattern") if getattr(self, name) is not None]
        if self.format == "custom" and len(given) < 2:
            raise ValueError("elicitation.format=custom needs elicitation.opening and elicitation.pattern")
        if self.format != "custom" and (given or self.closing):
            raise ValueError(
                f"elicitation.{(given or ['closing'])[0]} is set but elicitation.format={self.format}; it needs "
                "elicitation.format=custom"
            )
        if self.think_exit is not None and not self.think_exit.rstrip().endswith(self.think_close.rstrip()):
            raise ValueError(
                f"elicitation.think_exit={self.think_exit!r} must end in elicitation.think_close={self.think_close!r}"
            )
        return self

    @property
    def leave_thinking(self) -> str:
        """Text with which a probe leaves an open thinking block."""
        return self.think_exit or f"\n{self.think_close}\n\n"


class SelfValueConfig(Block):
    """How the outlook v_k = E[R | s_k] at a boundary is estimated from the log-probability of known answers."""

    engine: Literal["auto", "actor", "rollout"] = Field(
        "auto",
        description="Who reads the log-probabilities. `actor`: the training engine, under the weights "
        "of old_log_prob; `rollout`: the rollout server, while others still generate; `auto`: the actor where it can "
        "share prefixes, else the rollout server where that can score, else the actor with separate sequences.",
    )
    share_prefix: bool = Field(
        True,
        description="actor: one pass for a trace with all its probes; false: every probe is a sequence of its own, as "
        "it is where the engine cannot share; see docs/self_value.md.",
    )
    fuse: Literal["auto", True, False] = Field(
        "auto",
        description="actor with a shared prefix: true: the pass that computes old_log_prob reads the probes too, with "
        "an attention of ours: cheapest, but old_log_prob is of that attention; false: the probes have a pass of their "
        "own, about a forward pass without logits more, and old_log_prob is verl's, untouched; `auto`: true where the "
        "policy's own attention is the same kernel (sdpa off the GPU, flex_attention on it), else false.",
    )
    form: Literal["auto", "joint", "normalized", "geometric", "hidden"] = Field(
        "auto",
        description="`joint`: probability mass on useful answers (the paper's sum, one term per distinct answer); "
        "`normalized`: that mass over the mass of all proposals (ours); `geometric`: exp of the mean log-probability a "
        "token (ours); `hidden`: no probes, a regression on the policy's hidden state (ours, see readout); `auto`: "
        "joint, and for the estimators vps and mig geometric, which is theirs.",
    )
    calibration: Literal["auto", "none", "logistic"] = Field(
        "auto",
        description="`logistic`: regress the verified outcome on what is known at a boundary, by a fit to earlier "
        "steps (ours, see readout). form=hidden is that regression already. `auto`: logistic where the credit asks for "
        "values of the reward's level, adv_estimator=rredcot with credit.form critic or td; else none.",
    )
    proposals: Literal["reference", "group", "union"] = Field(
        "reference",
        description="Which answers are probed: the ground truth, the distinct verified answers of the prompt's other "
        "rollouts, or both.",
    )
    reference_key: str = Field(
        GROUND_TRUTH,
        min_length=1,
        description="Where a row of the data keeps its reference answers (one or a list), as a dotted path. Where the "
        "ground truth is not an answer (unit tests), the key of the reference solutions.",
    )
    max_proposals: int = Field(
        4,
        ge=1,
        le=64,
        description="Most texts probed at a boundary: distinct answers first, then other spellings of them that other "
        "responses of the group used, where the whole group is known; see docs/method.md.",
    )
    max_answer_tokens: int = Field(
        64, ge=1, description="Longest answer probed, in tokens; longer ones are dropped and counted."
    )
    max_closing_tokens: int = Field(
        4,
        ge=1,
        le=64,
        description="actor with separate sequences only: most closing tokens summed, one sequence each. A shared "
        "prefix and the rollout servers sum all of them; vLLM without our logits processor 128 at least and all that "
        "ever had probability (see rredcot/lost_closing_mass).",
    )
    score_opening: bool = Field(
        False,
        description="true: the probability of the elicitation text counts too, the paper's p(u|s_k); false: it is "
        "forced, i.e. given (ours).",
    )
    probe_uniform_groups: bool = Field(
        False,
        description="true: probe groups that are all right or all wrong too, for metrics: only credit.form=critic "
        "gives them a gradient, and probes them anyway. Set for estimators that compare no rollouts of a prompt.",
    )
    reward_range: tuple[float, float] = Field(
        (0.0, 1.0),
        strict=False,
        description="Lowest and highest reward the verifier gives, e.g. [-1, 1] for "
        "verl's DAPO score. verl's own penalty for overlong responses may go below it.",
    )
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="rollout: a trace has failed when its server has finished no request of any kind, responses among "
        "them, for so many seconds. Waiting for a turn is no failure.",
    )
    max_concurrency: int = Field(
        64,
        ge=1,
        description="rollout: traces sent to the servers at once, per agent loop worker. A server reads four at a "
        "time; beside 32 responses it has one request of theirs under way, more as fewer are generated, and one for "
        "half of the time beside 64.",
    )

    @model_validator(mode="after")
    def _combinations(self) -> "SelfValueConfig":
        if self.form == "normalized" and self.proposals == "reference":
            raise ValueError(
                "self_value.form=normalized with self_value.proposals=reference is always 1: the mass on correct "
                "answers is divided by the mass on all of them, so it needs self_value.proposals=group or union"
            )
        if self.form == "normalized" and self.max_proposals < 2:
            raise ValueError("self_value.form=normalized needs self_value.max_proposals of at least 2, got 1")
        low, high = self.reward_range
        if not low < high:
            raise ValueError(f"self_value.reward_range=[{low}, {high}] must be [lowest, highest] with lowest < highest")
        if self.form == "hidden" and self.engine == "rollout":
            raise ValueError(
                "self_value.form=hidden with self_value.engine=rollout: hidden states are read on the training engine; "
                "set self_value.engine=actor or auto"
            )
        return self


class CreditConfig(Block):
    """How segment values become advantages; see docs/method.md for what each form trades."""

    form: Literal["auto", "critic", "td", "reweight"] = Field(
        "auto",
        description="`critic`: segment-level GAE on calibrated values, with v_0 in the place of the group, in groups "
        "of one reward too (ours); `td`: the same on any values, in units of GRPO's advantage (ours; with lam=1 GRPO's "
        "expectation); `reweight`: GRPO's advantage times a positive weight of mean 1 (the paper's). "
        "`auto`: critic for adv_estimator=rredcot (td with algorithm.filter_groups or without calibration), reweight "
        "for its peers and for sources of your own.",
    )
    lam: float | None = Field(
        None,
        ge=0,
        le=1,
        description="td, critic: lambda; less noise and more of the values' errors below 1; null: verl's.",
    )
    beta: float = Field(1.0, ge=0, le=20, description="reweight: strength, per the range of the reward; 0 is GRPO.")
    pinned: bool = Field(
        True,
        description="reweight: whether d of the last segment is the score less the value before it; false: 0, as in "
        "GRPO-VPS. td and critic always end in the score.",
    )
    control: Literal["none", "shuffled", "inverted", "position"] = Field(
        "none",
        description="A control arm for comparisons, with each response's mean and spread of advantages kept: credit "
        "shuffled among its segments, mirrored, or falling evenly from first to last.",
    )

    def unread(self) -> set[str]:
        """Names of fields that the form does not read."""
        return {"lam"} if self.form == "reweight" else {"beta", "pinned"}


class MonteCarloConfig(Block):
    """Continuations from every boundary, for `algorithm.adv_estimator=vineppo`."""

    num_rollouts: int = Field(9, ge=1, le=1024, description="Continuations from each boundary; 9 is VinePPO's.")
    max_tokens: int | None = Field(
        None, ge=1, description="Longest continuation, in tokens; null: what is left of the response's budget."
    )
    max_concurrency: int = Field(64, ge=1, description="Continuations under way at once, per agent loop worker.")


class ReadoutConfig(Block):
    """The regression behind `self_value.calibration=logistic` and `self_value.form=hidden`."""

    use_probe: bool = Field(True, description="Feature: the logit of the value the probes gave; not with form=hidden.")
    use_position: bool = Field(
        True,
        description="Feature: where the boundary stands, against a long response of the step before; a probe then has "
        "a coefficient of its own early, midway and late.",
    )
    use_hidden: bool = Field(
        False,
        description="Feature: the policy's hidden state at the last token before the boundary, read in the pass that "
        "computes old_log_prob; always with form=hidden.",
    )
    layer: int = Field(-2, description="Decoder layer whose output is read; negative: from the end.")
    dim: int = Field(64, ge=1, le=1024, description="Dimensions that a seeded random projection keeps of it.")
    seed: int = Field(0, ge=0, description="Seed of the projection and of the folds that the ridge is chosen by.")
    window: int = Field(
        8,
        ge=1,
        description="Earlier steps that are fitted to, as far as max_rows reaches. In the first step values are the "
        "mean rewards of the prompt's other rollouts.",
    )
    half_life: float | None = Field(
        None, gt=0, description="Steps after which a row counts half; null: all of the window count alike."
    )
    max_rows: int = Field(
        16384,
        ge=1,
        description="States kept for the fit, the newest.",
    )


class TracesConfig(Block):
    """Credited traces written for people and for `python -m rredcot_verl.report`."""

    dir: str | None = Field(None, min_length=1, description="Folder for <step>.jsonl; null: none are written.")
    freq: int = Field(1, ge=1, description="Write every this many steps.")
    num_traces: int = Field(64, ge=1, description="Most responses written a step.")
    samples_freq: int | None = Field(
        None, ge=1, description="Send credited responses to the trackers every this many steps; null: never."
    )
    num_samples: int = Field(4, ge=1, le=64, description="Most responses sent.")
