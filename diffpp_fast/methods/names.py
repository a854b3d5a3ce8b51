"""The methods by the names that configurations have for them."""

from __future__ import annotations

from collections.abc import Mapping

from diffpp_fast.methods.decoupled_dmd import DecoupledDMD
from diffpp_fast.methods.didr import DIDR
from diffpp_fast.methods.diff_instruct import DiffInstruct, DiffInstructPP
from diffpp_fast.methods.dmd import DMD2
from diffpp_fast.methods.method import Method
from diffpp_fast.methods.sid import SiD
from diffpp_fast.methods.sim import SIM, DiffInstructStar

METHODS: Mapping[str, type[Method]] = {
    "diff_instruct": DiffInstruct,
    "diff_instruct_pp": DiffInstructPP,
    "dmd2": DMD2,
    "decoupled_dmd": DecoupledDMD,
    "sid": SiD,
    "sim": SIM,
    "diff_instruct_star": DiffInstructStar,
    "didr": DIDR,
}
