"""From scores to a plan: which query heads and MLP channels each layer keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.evidence.evidence import Evidence
from sinkprune.models.streamed import stream_of
from sinkprune.planning.allocation import Choice, Rules, best_channels, by_share, head_units
from sinkprune.planning.block_rules import BLOCK_TARGETS, DEFAULT_BLOCK_RULE, block_order, check_block_rule
from sinkprune.planning.blocks import Budget, block_channels, block_target, by_blocks
from sinkprune.planning.channels import NEED_CALIBRATION, channel_scores, check_channel_rule
from sinkprune.planning.criteria import HeadCriterion, criterion_for
from sinkprune.planning.expert_rules import (
    DEFAULT_EXPERT_RULE,
    check_expert_rule,
    expert_channel_scores,
    expert_scores,
)
from sinkprune.planning.experts import EXPERT_TARGETS, by_experts, keep_experts, require_experts
from sinkprune.planning.fits import cost, fitted
from sinkprune.planning.latency_planning import by_time
from sinkprune.plans import Geometry, LayerPlan, PrunePlan
from sinkprune.targets import Fit, fit_for

if TYPE_CHECKING:
    from sinkprune.evidence.calibration import Calibration
    from sinkprune.evidence.profiles import SinkProfile
    from sinkprune.planning.latency_table import LatencyTable

TARGETS = ("heads", "mlp", *EXPERT_TARGETS, *BLOCK_TARGETS)
UNITS = ("heads", "experts", "blocks", "parameters", "flops")
DEFAULT_CRITERION = "reconstruction"  # docs/study.md says why


def plan(
    model: nn.Module,
    profile: SinkProfile | None = None,
    criterion: str | HeadCriterion = DEFAULT_CRITERION,
    ratio: float = 0.38,
    unit: str = "heads",
    *,
    calibration: Calibration | None = None,
    targets: Iterable[str] = ("heads",),
    channel_rule: str | None = None,
    expert_rule: str | None = None,
    block_rule: str | None = None,
    length: int | None = None,
    target_speedup: float | None = None,
    target_latency: float | None = None,
    latency_table: LatencyTable | None = None,
    allocation: str = "global",
    min_heads: int = 1,
    max_layer_share: float = 1.0,
    round_heads: int = 1,
    round_channels: int = 1,
    whole_groups: bool = False,
    whole_layers: bool = False,
    fit: str | None = None,
    seed: int = 0,
) -> PrunePlan:
    """Decide what to remove from ``model``.

    Args:
        model: a dense model of a known family.
        profile: sink statistics of this model, for criteria that need them.
        criterion: a registered name (settings may follow: ``"sink_variance:gated=true"``), or a criterion.
        ratio: share to remove, in [0, 1).
        unit: what ``ratio`` is a share of: ``"heads"`` (query heads), ``"experts"``, ``"blocks"`` (rounded),
            ``"parameters"`` (of the blocks, as they are stored) or ``"flops"`` (of the blocks, at ``length``
            tokens, which fewer experts do not save).
        calibration: rows of ``sp.calibrate``, for criteria and channel rules that need them.
        targets: with a unit other than heads: any of ``"heads"``, ``"mlp"`` (channels of dense MLPs),
            ``"experts"`` and ``"expert_channels"`` (as many of every expert), each giving the same share of
            its own. Experts go in equal numbers from every layer and every group of its router.
            ``"blocks"``, alone or with heads and mlp: whole blocks, which take their part of the budget
            first, to the nearest block; ``"attention"`` or ``"mlp_blocks"`` alone: that half of blocks. One
            block stays at least. What went, and in which order, is in ``details["blocks"]``.
        channel_rule: which MLP channels go first: ``"magnitude"``, ``"wanda"``, ``"sink_wanda"`` or
            ``"flap"``; None = ``"flap"`` with calibration rows, else ``"magnitude"``.
        expert_rule: which experts go first: ``"reap"`` (the default), ``"reconstruction"``, ``"ablation"`` or
            ``"random"``.
        block_rule: which blocks go first: ``"influence"`` (the default), ``"reconstruction"``, ``"ablation"``
            or ``"random"``; all but random need calibration rows.
        length: tokens of a forward, for ``unit="flops"`` (None: 1024, or the model's context where that is
            shorter) and for a target (None: the only length of the table).
        target_speedup, target_latency: instead of a ratio and its unit: how many times faster than dense a
            step shall be, or how many seconds it may take, by ``latency_table``. Then ``allocation`` is
            neither: counts are chosen where time falls, at the least loss (``latency_planning``).
        latency_table: of this model's sizes (``sp.measured_table``, ``sp.computed_table``).
        allocation: ``"global"`` ranks all layers' heads together, ``"uniform"`` takes the same share of each
            layer, to the nearest unit of the whole budget, ``"equal"`` exactly as many heads of each.
            Channels go uniformly.
        min_heads: fewest query heads (or groups, with ``whole_groups``) a layer keeps; 0 allows to empty
            layers.
        max_layer_share: most of a layer's heads, and of its channels, that may go, in (0, 1].
        round_heads, round_channels: a layer that loses any keeps a multiple of these.
        whole_groups: remove query heads only together with the key/value head they share.
        whole_layers: remove heads only as whole layers' attention, by the mean of a layer's head scores,
            whatever ``min_heads``; ``targets="attention"`` does the same by a rule for blocks.
        fit: a target that shall hold the result, ``"llama.cpp"``, ``"transformers"``, ``"sglang"``,
            ``"vllm"`` or ``"lmdeploy"``, with settings as ``targets.fit_for`` takes them
            (``"sglang:tp=2"``): whole groups, and where the target needs it as many heads in every layer,
            channels in multiples. What it cost is in ``details["fit"]``.
        seed: for criteria that draw.

    Raises:
        ValueError: an argument out of range, a target that can't hold such a plan, a ratio out of reach (the
            message says the maximum), a profile of another model, evidence that a rule needs and that was
            not given, or weights that are not finite.
    """
    adapter, rule = adapter_for(model), criterion_for(criterion)
    adapter.require_loaded()
    adapter.require_dense("plan on")
    geometry, evidence = adapter.geometry(), Evidence(profile, calibration, seed)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    asked = Rules(
        allocation, min_heads, max_layer_share, round_heads, round_channels, whole_groups, whole_layers
    )
    room = None if fit is None else fit_for(fit, geometry.family)
    rules = asked if room is None else fitted(asked, room, geometry, targets)
    timed = target_speedup is not None or target_latency is not None or latency_table is not None
    ratio, unit = _share_of_a_target(fit) if timed else (ratio, unit)
    tokens = usual_length(geometry) if length is None else length
    blocks = block_target(geometry, targets, unit, only_share=not timed and room is None)
    _check_share(ratio, unit, targets, tokens, seed)
    channels_by = channel_rule or ("magnitude" if calibration is None else "flap")
    experts_by, blocks_by = expert_rule or DEFAULT_EXPERT_RULE, block_rule or DEFAULT_BLOCK_RULE
    require_experts(geometry, targets, unit, timed)
    check_expert_rule(experts_by, evidence if "experts" in targets else None)
    check_block_rule(blocks_by, evidence if blocks else None)
    heads_too = "heads" in targets or not set(targets) & {*EXPERT_TARGETS, *BLOCK_TARGETS}
    ranked = rule if heads_too else None
    _check_evidence(adapter, ranked, evidence, targets, channels_by)
    _check_weights(adapter, targets, ranked, experts_by, blocks_by)
    worth = partial(_channel_worth, channels_by, adapter, evidence)
    scores = scores_of(ranked, adapter, evidence)
    units = head_units(geometry, scores, rules)
    if blocks is not None:
        budget = Budget(ratio, unit, tokens)
        choice = _by_blocks(blocks_by, adapter, evidence, blocks, budget, targets, rules, scores)
    elif timed:
        goal = (target_speedup, target_latency)
        choice = by_time(geometry, scores, units, targets, latency_table, length, goal, rules, worth)
    else:
        by = by_share if geometry.experts is None or unit == "heads" else by_experts
        choice = by(geometry, units, ratio, unit, targets, rules, tokens)
    made = PrunePlan(
        geometry=geometry,
        fingerprint=adapter.fingerprint(),
        layers=_kept_layers(choice, worth, targets, experts_by, adapter, evidence),
        criterion=rule.name if heads_too else blocks_by if blocks else experts_by,
        ratio=ratio,
        unit=unit,
        targets=targets,
        allocation=rules.allocation,
        seed=seed,
        details={"settings": vars(rule), **asdict(rules), "channel_rule": channels_by, "length": tokens}
        | choice.told,
    )
    if room is not None:
        made.details["fit"] = _fit_cost(room, made, scores, asked, choice)
    if timed:
        made.ratio, made.allocation = made.parameters_removed, "latency"
    return made


def usual_length(geometry: Geometry) -> int:
    """Tokens of a forward where none are said: 1024, or the context where that is shorter."""
    return min(1024, geometry.context)


def _share_of_a_target(fit: str | None) -> tuple[float, str]:
    """Ratio and unit until the plan is made."""
    if fit is not None:
        raise ValueError(f"fit={fit!r} takes a ratio: counts that a target speed chooses differ by layer")
    return 0.0, "parameters"


def _fit_cost(room: Fit, made: PrunePlan, scores: Tensor, asked: Rules, choice: Choice) -> dict[str, Any]:
    """What it cost to make ``made`` so that ``room`` holds it."""
    by_heads = made.unit == "heads"
    share = made.heads_removed / sum(made.geometry.heads) if by_heads else made.parameters_removed
    return cost(room, made.geometry, scores, asked, choice.heads, choice.channels, made.ratio, share)


def _by_blocks(block_rule: str, adapter: Adapter, evidence: Evidence, target: str, *asked: Any) -> Choice:
    geometry = adapter.geometry()
    order = block_order(block_rule, adapter, evidence, target, geometry.num_layers - 1)
    choice = by_blocks(geometry, order, target, *asked)
    choice.told["blocks"]["rule"] = block_rule
    return choice


def _channel_worth(rule: str, adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """Scores of every layer's channels; none where it has experts."""
    geometry = adapter.geometry()
    return [
        torch.zeros(0) if geometry.experts_of(layer) else channel_scores(rule, adapter, evidence, layer)
        for layer in range(geometry.num_layers)
    ]


def _kept_layers(
    choice: Choice,
    worth: Callable[[], list[Tensor]],
    targets: tuple[str, ...],
    expert_rule: str,
    adapter: Adapter,
    evidence: Evidence,
) -> list[LayerPlan]:
    """The chosen heads, and of channels and experts those with the highest scores."""
    geometry = adapter.geometry()
    channels: list[Any] = [None] * geometry.num_layers
    if "blocks" in choice.told:
        channels = block_channels(choice, worth() if choice.channels is not None else [], geometry)
    elif choice.channels is not None:
        best = best_channels(worth(), choice.channels)
        channels = [None if geometry.experts_of(layer) else ids for layer, ids in enumerate(best)]
    layers = [LayerPlan(heads, ids) for heads, ids in zip(choice.heads, channels, strict=True)]
    if set(targets) & set(EXPERT_TARGETS):
        by_expert = expert_scores(expert_rule, adapter, evidence) if "experts" in targets else None
        narrower = expert_channel_scores(adapter, evidence) if "expert_channels" in targets else None
        keep_experts(geometry, layers, choice, by_expert, narrower)
        choice.told["expert_rule"] = expert_rule
    return layers


def scores_of(rule: HeadCriterion | None, adapter: Adapter, evidence: Evidence) -> Tensor:
    """The criterion's scores ``[layers, most heads]``, zeros without one.

    Raises:
        ValueError: scores that are not finite.
    """
    if rule is None:
        return torch.zeros(adapter.geometry().num_layers, max(adapter.geometry().heads))
    scores = rule.score(adapter, evidence)
    if not all(torch.isfinite(scores[i, :n]).all() for i, n in enumerate(adapter.geometry().heads)):
        raise ValueError(f"criterion {rule.name!r} gave scores that are not finite")
    return scores


def check_ratio(ratio: float) -> None:
    """Raise ``ValueError`` outside [0, 1), ``TypeError`` for what is no number."""
    if not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number, got {ratio!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")


def _check_share(ratio: float, unit: str, targets: tuple[str, ...], length: int, seed: int) -> None:
    check_ratio(ratio)
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
    if not targets or set(targets) - set(TARGETS):
        raise ValueError(f"targets must be chosen from {TARGETS}, got {targets}")
    if unit == "heads" and targets != ("heads",):
        other = "experts" if targets == ("experts",) else "parameters"
        raise ValueError(f"unit='heads' removes heads only, got targets={targets}; use unit={other!r}")
    for name, value in {"length": length, "seed": seed}.items():
        if type(value) is not int:
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


def _check_evidence(
    adapter: Adapter,
    rule: HeadCriterion | None,
    evidence: Evidence,
    targets: tuple[str, ...],
    channel_rule: str,
) -> None:
    check_channel_rule(channel_rule)
    if rule is not None and rule.needs_profile and evidence.profile is None:
        raise ValueError(f"criterion {rule.name!r} needs a profile: pass sp.profile(model, prompts, ...)")
    if evidence.calibration is None:
        if rule is not None and rule.needs_calibration:
            raise ValueError(f"criterion {rule.name!r} needs calibration=sp.calibrate(model, text, ...)")
        if "mlp" in targets and channel_rule in NEED_CALIBRATION:
            raise ValueError(f"channel rule {channel_rule!r} needs calibration=sp.calibrate(model, ...)")
    if evidence.profile is not None:
        evidence.profile.check_model(adapter)


def _check_streams(adapter: Adapter, rule: HeadCriterion | None, *others: str) -> None:
    """Raise ``ValueError`` naming a rule that needs all blocks at once, where they are read one at a time."""
    if stream_of(adapter.model) is None:
        return
    names = [name for name in others if name == "ablation"]
    names += [] if rule is None or rule.streams else [rule.name]
    if names:
        raise ValueError(f"{names[0]} runs whole models, and this one's blocks are read one at a time")


def _check_weights(
    adapter: Adapter, targets: tuple[str, ...], rule: HeadCriterion | None, *others: str
) -> None:
    """Raise ``ValueError`` naming the first projection, of those that ``targets`` chooses among, that holds a
    NaN or an infinity: a rule that does not read it would rank and keep it; or a rule that can't have all the
    weights that it asks for."""
    _check_streams(adapter, rule, *others)
    geometry = adapter.geometry()
    for layer in range(geometry.num_layers):
        chosen = vars(adapter.attention_weights(layer)) if "heads" in targets else {}
        mlp = adapter.expert_mlp(layer)
        if mlp is not None:
            of_experts = dict(mlp.named_parameters()) if set(targets) & set(EXPERT_TARGETS) else {}
            chosen = chosen | {name.removesuffix(".weight"): weight for name, weight in of_experts.items()}
        elif "mlp" in targets and geometry.channels[layer]:
            chosen = chosen | vars(adapter.mlp_weights(layer))
        for role, tensor in chosen.items():
            if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel():
                continue
            small = tensor.is_floating_point() and tensor.itemsize == 1  # PyTorch asks no 8-bit float
            least, most = (tensor.float() if small else tensor).aminmax()  # hands on a NaN; 30x isfinite
            if not (least.isfinite() and most.isfinite()):
                part = f"{role.removesuffix('_bias')} projection's {'bias' if '_bias' in role else 'weight'}"
                raise ValueError(f"the {part} of layer {layer} is not finite: the checkpoint is damaged")
