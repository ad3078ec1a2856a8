"""Every parameter of every family has one role, one layer and one unit; what is not in the table is refused."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from freezing.families import (
    CONFIGS,
    LLAMA_COUNTS,
    NUM_LAYERS,
    OUTSIDE,
    UNITS_IN_A_LAYER,
    build_units,
    count_in_layer,
    list_parameters,
)

from hftcli.errors import ModelError
from hftcli.freezing.proposal import propose_roles
from hftcli.freezing.roles import FAMILIES, Parameter, Unit, assign_roles, check_family, compile_pattern, list_patterns
from hftcli.freezing.rule import FreezeRule


def test_every_family_is_tested():
    assert set(CONFIGS) == set(UNITS_IN_A_LAYER) == set(FAMILIES)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_parameter_has_exactly_one_role(model_type: str, is_tied: bool):
    parameters = list_parameters(model_type, **CONFIGS[model_type], tie_word_embeddings=is_tied)
    units = assign_roles(model_type, parameters)

    family = FAMILIES[model_type]
    patterns = {compile_pattern(pattern): role for role in family for pattern in list_patterns(family, role)}
    for unit in units:
        assert [role for pattern, role in patterns.items() if re.fullmatch(pattern, unit.name)] == [unit.role], unit.name
    covered = [parameter for unit in units for parameter in unit.parameters]
    assert sorted(covered, key=lambda p: p.name) == sorted(parameters, key=lambda p: p.name)
    assert sum(unit.num_parameters for unit in units) == sum(parameter.num_elements for parameter in parameters)
    assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_layers_and_roles_are_those_of_the_model(model_type: str, is_tied: bool):
    units = build_units(model_type, **CONFIGS[model_type], tie_word_embeddings=is_tied)

    for layer in range(NUM_LAYERS):
        inside = [unit for unit in units if unit.layer == layer]
        assert Counter(unit.role for unit in inside) == count_in_layer(model_type, layer)
        assert all(f".{layer}." in unit.name for unit in inside)
    outside = Counter(unit.role for unit in units if unit.layer is None)
    head = {} if is_tied else {"head": 1}
    assert outside == OUTSIDE.get(model_type, {"embedding": 1, "final_norm": 1}) | head


@pytest.mark.parametrize("model_type", CONFIGS)
def test_tied_embeddings_count_once(model_type: str):
    tied = build_units(model_type, **CONFIGS[model_type], tie_word_embeddings=True)
    untied = build_units(model_type, **CONFIGS[model_type], tie_word_embeddings=False)
    (head,) = (unit for unit in untied if unit.role == "head")
    assert head.num_parameters == 40 * 16
    assert tied == tuple(unit for unit in untied if unit != head)


def test_units_keep_the_order_of_the_parameters():
    parameters = list_parameters("llama", **CONFIGS["llama"])
    assert [unit.parameters for unit in assign_roles("llama", parameters)] == [(parameter,) for parameter in parameters]


def test_weight_and_bias_are_one_unit():
    units = {unit.name: unit for unit in build_units("qwen2", **CONFIGS["qwen2"])}
    query = units["model.layers.3.self_attn.q_proj"]
    assert query == Unit(
        "model.layers.3.self_attn.q_proj",
        "attention",
        3,
        (
            Parameter("model.layers.3.self_attn.q_proj.weight", (16, 16)),
            Parameter("model.layers.3.self_attn.q_proj.bias", (16,)),
        ),
    )
    assert query.num_parameters == 16 * 16 + 16
    assert len(units["model.layers.3.self_attn.o_proj"].parameters) == 1


def test_fused_experts_are_one_unit_each():
    experts = [unit for unit in build_units("mixtral", **CONFIGS["mixtral"]) if unit.role == "experts"]
    assert [unit.name for unit in experts[:2]] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert [unit.num_parameters for unit in experts[:2]] == [4 * 64 * 16, 4 * 16 * 32]


def test_a_mixture_may_have_dense_layers():
    units = build_units("qwen3_moe", **CONFIGS["qwen3_moe"], mlp_only_layers=[1])
    assert Counter(unit.role for unit in units if unit.layer == 1) == LLAMA_COUNTS | {"norm": 4}
    assert Counter(unit.role for unit in units if unit.layer == 2) == UNITS_IN_A_LAYER["qwen3_moe"]


def test_layers_with_two_digits():
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 12})
    assert {unit.layer for unit in units} == {None, *range(12)}


def test_an_unknown_family_is_refused():
    parameters = [Parameter("backbone.blocks.0.mixer.weight", (4, 4))]
    with pytest.raises(ModelError) as caught:
        assign_roles("mamba9", parameters)
    assert "'mamba9'" in caught.value.message
    assert "backbone.blocks.0.mixer.weight" in caught.value.message
    assert "`hft plan` on this model prints a proposal" in caught.value.fix
    with pytest.raises(ModelError, match="mamba9"):
        check_family("mamba9")
    check_family("llama")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.x_proj.weight",
        "model.layers.0.self_attn_q_proj.weight",
        "model.layers.zero.self_attn.q_proj.weight",
        "model.norm.scale",
    ],
)
def test_an_unknown_parameter_is_refused(name: str):
    known = Parameter("model.norm.weight", (4,))
    with pytest.raises(ModelError) as caught:
        assign_roles("llama", [known, Parameter(name, (4, 4))])
    assert name in caught.value.message
    assert "freeze.roles" in caught.value.fix


def test_a_recipe_names_the_roles_of_a_family_that_nobody_knows():
    """Mamba's own names, and an index outside of the layers."""
    shapes = {
        "net.tok": (40, 16), "net.in.0": (16, 16), "net.blocks.0.mix.weight": (16, 16), "net.blocks.0.mix.bias": (16,),
        "net.blocks.0.exp.3.up.weight": (8, 16), "net.blocks.0.dt_bias": (4,), "net.blocks.11.scale": (16,),
        "out.weight": (40, 16),
    }  # fmt: skip
    parameters = [Parameter(name, shape) for name, shape in shapes.items()]
    roles = {
        "embedding": "net.tok", "bridge": "net.in.*", "mixer": "net.blocks.*.mix", "experts": ("net.blocks.*.exp.*.up",),
        "small": "net.blocks.*.dt_bias", "norm": "net.blocks.*.(scale|norm)", "head": "out",
    }  # fmt: skip
    units = assign_roles("mamba9", parameters, FreezeRule(roles=roles).roles)
    assert [(unit.name, unit.role, unit.layer) for unit in units] == [
        ("net.tok", "embedding", None), ("net.in.0", "bridge", None), ("net.blocks.0.mix", "mixer", 0),
        ("net.blocks.0.exp.3.up", "experts", 0), ("net.blocks.0.dt_bias", "small", 0), ("net.blocks.11.scale", "norm", 11),
        ("out", "head", None),
    ]  # fmt: skip
    assert len(units[2].parameters) == 2

    without = {role: pattern for role, pattern in roles.items() if role != "mixer"}
    with pytest.raises(ModelError, match=r"no role is known for parameter net.blocks.0.mix.weight of model_type 'mamba9'"):
        assign_roles("mamba9", parameters, without)
    with pytest.raises(ModelError, match=r"net.blocks.0.mix has 2 roles by freeze.roles: mixer, mlp"):
        assign_roles("mamba9", parameters, roles | {"mlp": "net.blocks.*.mi(x|y)"})
    with pytest.raises(ModelError, match=r"freeze.roles.mlp: net.blocks.\*.ffn is the name of nothing"):
        assign_roles("mamba9", parameters, roles | {"mlp": "net.blocks.*.ffn"})


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"attention": "layers.*.(q|k"}, "is no pattern"),
        ({"attention": "layers.*.q[ab]"}, "is no pattern"),
        ({"attention": "layers.0.q"}, "no \\* for the index of the layer"),
        ({"atention": "layers.*.q"}, "Input should be 'attention', 'mixer'"),
    ],
)
def test_roles_that_are_no_patterns_are_refused(roles: dict[str, str], expected: str):
    with pytest.raises(ValueError, match=expected):
        FreezeRule(roles=roles)


@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - {"mixtral"}))
def test_what_is_proposed_from_names_is_what_the_table_has(model_type: str):
    """But for what no name tells: it is said, or a person has to see it."""
    parameters = list_parameters(model_type, **CONFIGS[model_type], tie_word_embeddings=False)
    found, unknown = propose_roles(parameters)
    known = {unit.name: unit.role for unit in assign_roles(model_type, parameters)}
    if unknown:
        assert model_type == "gemma3n_text"
        return
    guessed = {unit.name: unit.role for unit in assign_roles("nobody's", parameters, found)}
    assert guessed == known


def test_no_freezing_module_imports_torch():
    code = (
        "import sys, hftcli.freezing.roles, hftcli.freezing.selection, hftcli.freezing.budget;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
