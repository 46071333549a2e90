"""What the grafter refuses before anything runs: configurations and filters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from helpers.grafting import config_of
from sgl_comm import SglCommError, envs
from sgl_comm.grafter import Filter, Grafter, GrafterConfig, Pad, Replicate, Shard
from sgl_comm.grafter.layouts import as_layout


def config(**fields: Any) -> GrafterConfig:
    return GrafterConfig(**{**config_of("target", (1, 1), 29500), "b2t_filter": "True", **fields})


def test_where_it_is_disabled_nothing_else_counts() -> None:
    nonsense = GrafterConfig(enable=False, role="nobody", timeout=-1, b2t_filter="import os", backend="pigeon")
    with Grafter(nonsense) as grafter:
        value = torch.ones(3)
        grafter.maybe_intercept(value, {"name": "x"})
        grafter.dump("x", value, layer=1)
        with grafter.hook_modules(torch.nn.Linear(2, 2)):
            pass
        assert grafter.counts == {}


@pytest.mark.parametrize(
    "field", ["role", "master_address", "master_port", "baseline_world_size", "target_world_size", "b2t_filter"]
)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(SglCommError, match=rf"^grafter: got enable=True without .*{field}"):
        config(**{field: GrafterConfig.__dataclass_fields__[field].default})


def test_all_missing_fields_are_named_at_once() -> None:
    with pytest.raises(SglCommError) as caught:
        GrafterConfig(enable=True)
    for field in ("role", "master_address", "master_port", "baseline_world_size", "target_world_size", "t2b_filter"):
        assert field in str(caught.value)
    with pytest.raises(SglCommError, match="without record_dir, baseline_world_size;"):
        GrafterConfig(enable=True, mode="record", role="baseline", b2t_filter="True")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"role": "peer"}, "got role 'peer'; expected one of baseline, target"),
        ({"backend": "mpi"}, "got backend 'mpi'; expected one of gloo, nccl, shm"),
        ({"mode": "look"}, "got mode 'look'; expected one of graft, observe, record"),
        ({"on_dtype": "warn"}, "got on_dtype 'warn'; expected one of error, cast, skip"),
        ({"on_shape": "broadcast"}, "got on_shape 'broadcast'; expected one of error, cast, skip"),
        ({"timeout": "3"}, "got timeout of str; expected float"),
        ({"master_port": "29500"}, "got master_port of str; expected int | None"),
        ({"strict": 1}, "got strict of int; expected bool"),
        ({"layout": 3}, "got layout of int; expected Layout | str | None"),
        ({"token": b"x"}, "got token of bytes; expected str"),
        ({"token": "\udcff"}, "got a token that is no text"),
        ({"timeout": 0}, "got timeout 0; expected a number of seconds above 0"),
        ({"timeout": float("nan")}, "got timeout nan; expected a number of seconds above 0"),
        ({"master_port": 70000}, "got master_port 70000; expected 1 to 65535"),
        ({"target_world_size": -2}, "got target_world_size -2; expected 1 to"),
        ({"target_world_size": 3}, "got baseline_world_size 1 and target_world_size 3, and neither a layout nor"),
        ({"master_address": "10.1.2.3"}, "got master_address '10.1.2.3' and no token; expected a token"),
        ({"layout": "Shard"}, "got layout 'Shard'; expected Replicate, Shard(dim) or Pad(dim, size[, layout])"),
        ({"layout": "Replicate", "b2t_filter": "rank == 0"}, "got a filter that asks for rank"),
        ({"b2t_filter": "name =="}, "got b2t_filter 'name ==': invalid syntax"),
        ({"t2b_filter": "exit()"}, "got t2b_filter 'exit()': a call of anything but search and match"),
    ],
)
def test_a_bad_value_raises_when_the_configuration_is_made(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SglCommError) as caught:
        config(**fields)
    assert str(caught.value).startswith("grafter: ")
    assert words in str(caught.value)


def test_a_token_lets_other_hosts_in() -> None:
    assert "secret" not in repr(config(master_address="10.1.2.3", token="secret"))
    assert config(master_address="::1").master_address == "::1"
    assert config(master_address="localhost").master_address == "localhost"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.at_all", "No module named 'nowhere'"),
        ("helpers.grafting.nothing", "has no attribute 'nothing'"),
        ("helpers.grafting.TIMEOUT_S", "is a float; expected a function"),
        ("grafting", "expected package.module.function"),
    ],
)
def test_a_bad_transform_path_raises_when_the_grafter_is_made(path: str, words: str) -> None:
    with pytest.raises(SglCommError, match="got transform_path") as caught:
        Grafter(config(transform_path=path))
    assert words in str(caught.value)


def test_who_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert config().side_rank() == 0
    two = {"target_world_size": 2, "baseline_world_size": 2}
    with pytest.raises(SglCommError, match="expected the field rank, since the target has 2 ranks"):
        config(**two).side_rank()
    monkeypatch.setenv("RANK", "1")
    assert config(**two).side_rank() == 1
    assert config(**two, rank=0).side_rank() == 0
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SglCommError, match=r"got rank 2 \(RANK\); expected 0 to 1"):
        config(**two).side_rank()
    with pytest.raises(SglCommError, match=r"got rank -1 \(rank\)"):
        config(**two, rank=-1).side_rank()


def test_the_environment_says_the_same_as_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.GRAFTER.values():
        monkeypatch.delenv(variable.name, raising=False)
    assert GrafterConfig.from_env() == GrafterConfig()
    fields = config_of("baseline", (2, 3), 29501)
    fields |= {"rank": 1, "backend": "shm", "group_name": "pair", "timeout": 2.5, "mode": "observe", "strict": True}
    fields |= {"b2t_filter": "layer == 3", "t2b_filter": "layer == 4", "transform_path": "a.b", "token": "t"}
    fields |= {"on_dtype": "cast", "on_shape": "skip", "report_dir": "r", "layout": "Pad(1, 10, Shard(1))"}
    for name, value in fields.items():
        monkeypatch.setenv(envs.GRAFTER[name].name, str(int(value) if isinstance(value, bool) else value))
    assert GrafterConfig.from_env() == GrafterConfig(**fields)
    assert GrafterConfig.from_env().layout == Pad(1, 10, Shard(1))


def test_every_field_has_a_variable_with_its_default() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(GrafterConfig)}
    assert fields.keys() == envs.GRAFTER.keys()
    for name, default in fields.items():
        text = envs.GRAFTER[name].default
        number = float(default) if isinstance(default, (bool, float)) else None
        assert text == (default or "") if number is None else float(text) == number


@pytest.mark.parametrize(
    ("name", "text"), [("enable", "yes"), ("master_port", "ten"), ("timeout", "soon"), ("strict", "2")]
)
def test_a_variable_of_another_type_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    variable = envs.GRAFTER[name].name
    monkeypatch.setenv(variable, text)
    with pytest.raises(SglCommError, match=f"got {variable}='{text}'"):
        GrafterConfig.from_env()


def test_layouts_as_text() -> None:
    for layout in (Replicate(), Shard(0), Shard(-1), Pad(0, 1000), Pad(1, 7, Shard(1))):
        assert as_layout(str(layout)) == layout
    for text in (
        "",
        "Shard()",
        "Shard(1.0)",
        "Shard(x)",
        "Shard(True)",
        "Pad(1)",
        "print(1)",
        "Shard(0)(1)",
        "1",
        "(" * 5000,
    ):
        with pytest.raises(SglCommError, match="expected Replicate"):
            as_layout(text)


TAGS = {"name": "layers.3.mlp", "layer": 3, "step": 7, "rank": 1, "hot": True, "none": None}
MATCHES = [
    "True", "name == 'layers.3.mlp'", "search('mlp$', name)", "match('layers', name)", "layer in (2, 3)",
    "layer in [3]", "2 <= layer < 4", "layer % 2 == 1 and step != 6", "not match('mlp', name)", "hot", "none is None",
    "absent is None", "not absent", "layer + 1 == step - 3", "-layer < 0", "rank == 1 or False",
    "'mlp' in name", "not layer > 'a'", "not search('x', layer)", "not (layer % 0 == 0)", "layer is not None",
    "not name + 1 == 2", "name not in ('a', 'b')",
]  # fmt: skip


@pytest.mark.parametrize("text", MATCHES)
def test_filters_match_tags(text: str) -> None:
    assert Filter.parse(text)(TAGS) is True
    assert Filter.parse(f"not ({text})")(TAGS) is False


def test_a_filter_knows_its_tags() -> None:
    assert Filter.parse("search('x', name) and layer == 3 or rank").names == {"name", "layer", "rank"}


HOSTILE = [
    "__import__('os').system('true')", "name.__class__", "().__class__.__bases__", "open('/etc/passwd')", "exit()",
    "[x for x in (1, 2)]", "(x for x in name)", "{x: 1 for x in name}", "{1, 2}", "{'a': 1}", "lambda: 1",
    "9 ** 9 ** 9", "2 ** 99999999", "layer ** 2", "'a' * 10 ** 9", "layer * 2", "1 << 99999", "layer // 1", "layer / 1",
    "layer | 1", "~layer", "name[0]", "name[::2]", "f'{name}'", "(name := 'x')", "name if layer else 1", "*name",
    "yield", "await name", "search", "search(name, name)", "search('x')", "search('x', name, 1)",
    "search('x', string=name)", "search('(', name)", "re.search('x', name)", "match(*name)", "getattr(name, 'x')",
    "eval('1')", "__builtins__",
    "...", "b'x' == name", "1j == layer", "9" * 30 + " == layer", "9" * 5000, "import os", "name = 1", "name; name",
    "", " ",
    "(" * 3000 + "1" + ")" * 3000, "not " * 3000 + "1", "-" * 3000 + "1", "name" + " + name" * 1500, "1 if 1 else 1",
    "\0", "name == 'x'\n__import__('os')", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_expressions_are_refused_when_parsed(text: str) -> None:
    with pytest.raises(SglCommError) as caught:
        Filter.parse(text)
    assert str(caught.value).startswith("grafter: got ")
    assert len(str(caught.value)) < 400


def test_a_name_is_a_tag_and_nothing_else() -> None:
    """Names of Python's own have no meaning."""
    assert Filter.parse("print is None and os is None and name is not None")(TAGS) is True
