"""The table of operations: every case whose weights must stay factored."""

import os

from tests.battery.cases import (
    control,
    conv,
    derivatives,
    dot,
    lookup,
    ragged,
    shapes,
    sharded,
)

FACTORED = [
    *dot.CASES,
    *conv.CASES,
    *lookup.CASES,
    *ragged.CASES,
    *shapes.CASES,
    *control.CASES,
    *derivatives.CASES,
    *sharded.CASES,
]

# One operation or two for each interpreter rule; all of them with ALL_OPERATIONS=1.
OPERATIONS = [
    "dot/contract_around_out",
    "dot/two_out",
    "dot/all_half",
    "dot/tied_both_sides",
    "einsum/experts",
    "einsum/batch_dims_apart",
    "conv/2d_everything",
    "conv/2d_depthwise",
    "embedding/two_dims_of_ids",
    "embedding/fill_with_a_value",
    "stack/traced",
    "stack/every_expert_on_every_token",
    "stack/layer_then_lookup",
    "ragged/dot",
    "chain/long",
    "chain/reshape_split_out",
    "chain/cast_to_half",
    "chain/dynamic_slice_out",
    "chain/times_both_vectors",
    "chain/fused_qkv_some_adapted",
    "chain/stack_of_experts",
    "chain/split",
    "scan/stacked_layers",
    "while/carry",
    "cond/chooses_between_weights",
    "checkpoint/weight_comes_out",
    "inside/vmap_over_experts",
    "shard_map/on_contract",
]
ALL = os.environ.get("ALL_OPERATIONS") == "1"
