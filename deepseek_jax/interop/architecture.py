"""`config.json` of a Hugging Face folder <-> `ModelConfig`.

A model is what the fields say, whatever it is called. Sizes must be there. Rules that a file leaves out (scores,
groups, scales) are those of its family, where DeepSeek's own code and transformers agree; where the two would compute
different things from the same file, it is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from deepseek_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, YarnConfig
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.fields import MISSING, Fields, render, same
from deepseek_jax.model.rope import yarn_mscale


@dataclasses.dataclass(frozen=True)
class _Family:
    """What DeepSeek's classes of one generation compute, and what they assume where a file says nothing."""

    model_type: str
    architecture: str
    score_function: Literal["sigmoid", "softmax"]
    group_score: Literal["top2_sum", "max"]
    topk_methods: tuple[str, ...]
    """The first one is meant where a file names none."""
    use_bias: bool
    normalize_weights: bool
    routed_scale: float
    num_dense_layers: int
    groups: tuple[int, int]
    """`n_group` and `topk_group`."""


_V3 = _Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    score_function="sigmoid",
    group_score="top2_sum",
    topk_methods=("noaux_tc",),
    use_bias=True,
    normalize_weights=True,
    routed_scale=2.5,
    num_dense_layers=3,
    groups=(8, 4),
)
_V2 = _Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    score_function="softmax",
    group_score="max",
    topk_methods=("greedy", "group_limited_greedy"),
    use_bias=False,
    normalize_weights=False,
    routed_scale=1.0,
    num_dense_layers=0,
    groups=(1, 1),
)
_MODEL_TYPES = {"deepseek_v2": _V2, "deepseek_v3": _V3, "kimi_k2": _V3}
_ARCHITECTURES = {family.architecture: family for family in (_V2, _V3)}
_SPARSE = ("deepseek_v32", "DeepseekV32ForCausalLM")

_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
}
"""Fields that have one supported value, which is also meant where they are absent or null."""
_MTP = ("num_nextn_predict_layers", "num_mtp_layers")


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """The model that a parsed `config.json` describes.

    Args:
      config: the parsed file, with `rope_scaling` and `rope_theta` or with transformers 5's `rope_parameters`.
      source: names the file in messages.

    Raises:
      InteropError: an architecture, a field or a value that is missing, of the wrong type or not supported.
    """
    fields = Fields(config, source)
    family = _family(fields)
    _refuse_what_differs(fields)
    rope_interleaved(config, source=source)
    layers, depth = fields.integer("num_hidden_layers"), _mtp_depth(fields, family)
    dense = fields.integer("first_k_dense_replace", absent=family.num_dense_layers)
    if config.get("n_routed_experts", MISSING) is None:
        dense = layers + depth
    if depth and dense > layers:  # their MTP modules are layers that follow, ours always have experts
        raise fields.error(_MTP[0], f"{depth} is not supported with MTP modules that have no experts; supported: 0")
    rope_theta, yarn = _rope(fields)
    try:
        return ModelConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            num_layers=layers,
            num_dense_layers=min(dense, layers),
            dense_ffn_size=fields.integer("intermediate_size"),
            attention=AttentionConfig(
                num_heads=fields.integer("num_attention_heads"),
                q_lora_rank=fields.integer("q_lora_rank", null=None) or None,
                kv_lora_rank=fields.integer("kv_lora_rank"),
                qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
                qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
                v_head_dim=fields.integer("v_head_dim"),
                rope_theta=rope_theta,
                yarn=yarn,
            ),
            moe=_moe(fields, family),
            mtp_depth=depth,
            rms_norm_eps=fields.number("rms_norm_eps", absent=1e-6),
            init_std=fields.number("initializer_range", absent=0.02),
            tie_embeddings=fields.boolean("tie_word_embeddings", absent=False),
        )
    except ConfigError as error:
        raise InteropError(f"{source}: {error}") from None


def rope_interleaved(config: Mapping[str, Any], *, source: str = "config.json") -> bool:
    """Whether the rotary rows of the weights pair neighbours (DeepSeek's layout) or are half-split already.

    Raises `InteropError` where the field is no bool, or says half-split of V2, whose code only knows neighbours.
    """
    fields = Fields(config, source)
    interleaved = fields.boolean("rope_interleave", absent=True)
    if not interleaved and _family(fields) is _V2:
        raise fields.unsupported("rope_interleave", True)
    return interleaved


def _family(fields: Fields) -> _Family:
    """Whose classes the file is for, by `model_type`, or by `architectures` where that is absent."""
    name, table = fields.values.get("model_type"), _MODEL_TYPES
    if name is None:
        names = fields.values.get("architectures")
        name, table = names[0] if isinstance(names, list) and names else names, _ARCHITECTURES
    supported = ", ".join(_MODEL_TYPES)
    if not name:
        raise InteropError(f"{fields.source}: model_type is missing; supported: {supported}")
    if name in _SPARSE:
        raise InteropError(
            f"{fields.source}: architecture {name}: its sparse attention (the indexer) is not supported yet; "
            f"supported: {supported}"
        )
    if not isinstance(name, str) or name not in table:
        raise InteropError(f"{fields.source}: unknown architecture {name}; supported: {supported}")
    return table[name]


def _refuse_what_differs(fields: Fields) -> None:
    """Raises `InteropError` if a field asks for a mechanism that `ModelConfig` does not have."""
    values = fields.values
    for name, supported in _ONLY.items():
        if values.get(name) is not None and not same(values[name], supported):
            raise fields.unsupported(name, supported)
    if values.get("sliding_window") is not None and values.get("use_sliding_window") is not False:
        raise fields.unsupported("sliding_window", None)
    if any(kind != "full_attention" for kind in fields.get("layer_types", (list,), "a list", [], [])):
        raise fields.unsupported("layer_types", ["full_attention"])
    if values.get("index_topk") is not None:
        raise fields.error("index_topk", f"{render(values['index_topk'])}: sparse attention is not supported yet")
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", absent=heads, null=heads) != heads:
        raise fields.unsupported("num_key_value_heads", heads)


def _mtp_depth(fields: Fields, family: _Family) -> int:
    given = {name: fields.integer(name, null=0) for name in _MTP if name in fields.values}
    if len(set(given.values())) > 1:
        raise fields.error(_MTP[0], f"({given[_MTP[0]]}) and {_MTP[1]} ({given[_MTP[1]]}) disagree; remove one")
    for name, depth in given.items():
        if depth and family is _V2:
            raise fields.unsupported(name, 0)
        return depth
    return 0


def _moe(fields: Fields, family: _Family) -> MoEConfig:
    """The experts and their router. Raises `ConfigError` for sizes that do not fit together."""
    fields.choice("scoring_func", (family.score_function,))
    method = fields.choice("topk_method", family.topk_methods)
    normalize = fields.boolean("norm_topk_prob", absent=family.normalize_weights)
    scale = fields.number("routed_scaling_factor", absent=family.routed_scale)
    if family is _V2 and normalize and scale != 1:
        # DeepSeek's V2 code then divides by the sum and leaves the scale out; other code applies it all the same.
        raise fields.error(
            "norm_topk_prob",
            f"true with routed_scaling_factor {scale} is read differently by different "
            "code for V2; supported: routed_scaling_factor 1.0, or norm_topk_prob false",
        )
    num_experts = fields.integer("n_routed_experts", null=None)
    if num_experts is None:  # every layer is dense: the smallest experts there are, in no layer
        sizes = dict.fromkeys(("num_experts", "experts_per_token", "num_groups", "groups_per_token"), 1)
        sizes |= {"num_shared_experts": 0, "expert_ffn_size": fields.integer("intermediate_size")}
    else:
        num_groups = fields.integer("n_group", absent=family.groups[0], null=1)
        kept = {"null": 1} if num_groups == 1 else {}
        groups_per_token = fields.integer("topk_group", absent=min(family.groups[1], num_groups), **kept)
        sizes = {
            "num_experts": num_experts,
            "num_shared_experts": fields.integer("n_shared_experts", null=0),
            "experts_per_token": fields.integer("num_experts_per_tok"),
            "expert_ffn_size": fields.integer("moe_intermediate_size"),
            "num_groups": num_groups,
            "groups_per_token": num_groups if method == "greedy" else groups_per_token,
        }
    return MoEConfig(
        **sizes,
        score_function=family.score_function,
        group_score=family.group_score,
        normalize_weights=normalize,
        routed_scale=scale,
        use_bias=family.use_bias,
    )


def _rope(fields: Fields) -> tuple[float, YarnConfig | None]:
    """The base of the rotation and its extension, from either spelling; both at once must say the same."""
    sections = [s for s in map(fields.section, ("rope_scaling", "rope_parameters")) if s is not None]
    given = [f.number("rope_theta", absent=None, null=None) for f in (fields, *sections)]
    thetas = {theta for theta in given if theta is not None}
    if len(thetas) > 1:
        raise fields.error("rope_theta", f"has {len(thetas)} values: {', '.join(map(str, sorted(thetas)))}; keep one")
    try:
        yarns = {_yarn(section) for section in sections}
    except ConfigError as error:
        raise InteropError(f"{fields.source}: {error}") from None
    if len(yarns) > 1:
        raise fields.error("rope_scaling", "and rope_parameters disagree; remove one")
    return thetas.pop() if thetas else 10_000.0, yarns.pop() if yarns else None


def _yarn(section: Fields) -> YarnConfig | None:
    """The extension that `rope_scaling` or `rope_parameters` describes, None for plain rotation."""
    nested = [name for name, value in section.values.items() if isinstance(value, Mapping)]
    if nested:
        raise section.error(nested[0], "is an object: one rotation for each kind of layer is not supported")
    if section.number("partial_rotary_factor", absent=1.0, null=1.0) != 1:
        raise section.unsupported("partial_rotary_factor", 1)
    name = "rope_type" if "rope_type" in section.values else "type"
    if name not in section.values and "factor" in section.values:
        raise section.error("rope_type", "is missing beside factor; supported: default, yarn")
    if section.choice(name, ("default", "yarn")) == "default":
        return None
    if not section.boolean("truncate", absent=True):
        raise section.unsupported("truncate", True)
    mscale, all_dim = (section.number(key, absent=None, null=None) for key in ("mscale", "mscale_all_dim"))
    if not all_dim and mscale in (None, 1):
        mscale, all_dim = 1.0, 0.0
    elif not mscale or not all_dim:
        # transformers then takes both as absent for the rotation; DeepSeek's code takes 1 and 0 for the absent one.
        raise section.error(
            "mscale", "without mscale_all_dim, or the reverse, is read differently by different code; give both"
        )
    yarn = YarnConfig(
        factor=section.number("factor"),
        original_length=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast", absent=32.0, null=32.0),
        beta_slow=section.number("beta_slow", absent=1.0, null=1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    implied = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    if not math.isclose(section.number("attention_factor", absent=implied, null=implied), implied, rel_tol=1e-6):
        raise section.unsupported("attention_factor", None, implied)
    return yarn


def write_architecture(
    model: ModelConfig, *, base: Mapping[str, Any] | None = None, max_position_embeddings: int | None = None
) -> dict[str, Any]:
    """The `config.json` of a model, for DeepSeek's own code and for transformers 4 and 5.

    Args:
      model: what to describe. A sigmoid router makes it a `deepseek_v3`, a softmax router a `deepseek_v2`.
      base: a `config.json` of the same family whose other fields are kept, as its spelling of the rotation is.
      max_position_embeddings: tokens; by default what YaRN reaches, or what `base` says, or 4096.

    Raises:
      InteropError: neither family has this model, or `base` is of another one or says what the model is not.
    """
    family = _V3 if model.moe.score_function == "sigmoid" else _V2
    moe = _representable(model, family)
    start = Fields({} if base is None else base, "the config.json to start from")
    result = dict(start.values)
    if result.get("model_type") is not None or result.get("architectures") is not None:
        written = _family(start)
        if written is not family:
            raise InteropError(
                f"{start.source} is a {written.model_type}, which has no {model.moe.score_function} router: "
                f"start from a {family.model_type}"
            )
    for name, value in {"architectures": [family.architecture], "model_type": family.model_type}.items():
        result[name] = result.get(name) or value
    reach = _reach(model, start)
    _update(result, {"max_position_embeddings": max_position_embeddings or reach})
    _update(result, _sizes(model) | _router(moe, family))
    depth = {name: model.mtp_depth for name in _MTP if name in result}
    _update(result, depth or ({} if family is _V2 else {_MTP[0]: model.mtp_depth}))
    _write_rope(result, model.attention)
    # Refuses what `base` says against the model, and a combination that other code reads in two ways.
    read_architecture(result, source="the config.json to write")
    return result


def _representable(model: ModelConfig, family: _Family) -> MoEConfig:
    """The model's experts as the family's files can say it. Raises `InteropError` where they cannot."""
    moe = model.moe
    if moe.use_bias != family.use_bias:
        raise InteropError(
            f"config.json cannot say moe.use_bias={moe.use_bias} with moe.score_function={moe.score_function}: "
            f"{family.model_type} has {family.use_bias}"
        )
    if model.mtp_depth and family is _V2:
        raise InteropError(
            f"config.json cannot say model.mtp_depth={model.mtp_depth} with moe.score_function=softmax: "
            "deepseek_v2 has no MTP"
        )
    if moe.group_score == family.group_score:
        return moe
    if moe.groups_per_token < moe.num_groups:
        raise InteropError(
            f"config.json cannot say moe.group_score={moe.group_score} with moe.score_function={moe.score_function}: "
            f"{family.model_type} ranks groups by {family.group_score}"
        )
    # All groups are kept, so how they are ranked does not matter: one group says the same.
    return dataclasses.replace(moe, num_groups=1, groups_per_token=1, group_score=family.group_score)


def _reach(model: ModelConfig, base: Fields) -> int:
    """`max_position_embeddings`, in tokens: the base's if its extension is the model's, else what YaRN reaches."""
    yarn = model.attention.yarn
    reach = 4096 if yarn is None else round(yarn.original_length * yarn.factor)
    return base.integer("max_position_embeddings", absent=reach, null=reach) if _rope(base)[1] == yarn else reach


def _sizes(model: ModelConfig) -> dict[str, Any]:
    attention = model.attention
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn_size,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.num_dense_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _router(moe: MoEConfig, family: _Family) -> dict[str, Any]:
    limited = moe.groups_per_token < moe.num_groups
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_ffn_size,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "scoring_func": moe.score_function,
        "topk_method": family.topk_methods[-1 if limited else 0],
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.routed_scale,
    }


def _write_rope(result: dict[str, Any], attention: AttentionConfig) -> None:
    """Sets the rotation in the spelling that is there already: the older one, which all code reads, or the newer."""
    yarn = attention.yarn
    newer = result.get("rope_parameters") is not None
    if newer:
        section = _yarn_section(yarn, result["rope_parameters"], "rope_type") or {"rope_type": "default"}
        _update(section, {"rope_theta": attention.rope_theta})
        result["rope_parameters"] = section
    if not newer or "rope_theta" in result:
        _update(result, {"rope_theta": attention.rope_theta})
    if "rope_scaling" in result or (yarn is not None and not newer):
        result["rope_scaling"] = _yarn_section(yarn, result.get("rope_scaling") or {}, "type")


def _yarn_section(yarn: YarnConfig | None, base: Mapping[str, Any], type_name: str) -> dict[str, Any] | None:
    """`base` with the numbers of the extension; None without one."""
    if yarn is None:
        return None
    section = dict(base)
    values = {
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    names: list[str] = [name for name in ("type", "rope_type") if name in section]
    _update(section, dict.fromkeys(names or [type_name], "yarn") | values)
    return section


def _update(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Sets the new values in place; a number that is there already keeps its spelling (`40`, not `40.0`)."""
    for name, value in new.items():
        if name not in values or not same(values[name], value):
            values[name] = value
