"""The regression target of every prediction type, from its definition."""

TARGETS = {
    "epsilon": lambda x0, eps, a, s: eps,
    "v_prediction": lambda x0, eps, a, s: a * eps - s * x0,
    "flow_prediction": lambda x0, eps, a, s: eps - x0,
    "sample": lambda x0, eps, a, s: x0,
}
