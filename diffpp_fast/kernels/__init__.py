"""The operators that are not yet made of one file: a module in every room, with functions of the same arguments."""

from importlib import import_module

from diffpp_fast import backends

for _op in (
    "reward_pixels",
    "group_norm_silu",
    "geglu",
    "ada_layer_norm",
):
    _rooms = {"reference": "kernels.reference", "cpu": "kernels.native", "triton": "ops.triton"}
    if _op not in ("geglu", "ada_layer_norm"):
        _rooms["cuda"] = "kernels.native"
    for _backend, _room in _rooms.items():
        backends._sources[_op][_backend] = lambda name=f"diffpp_fast.{_room}.{_op}": import_module(name)  # type: ignore[misc]
