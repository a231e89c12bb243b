"""INC's arithmetic once more, in numpy and ml_dtypes alone: nothing here imports the package."""

import math

import ml_dtypes
import numpy as np

TYPES = {  # device, number type -> numpy's type, its largest value, exponents of the scales
    ("GAUDI2", "E4M3"): (ml_dtypes.float8_e4m3, 240.0, [4, 0, -4, -8]),
    ("GAUDI3", "E4M3"): (ml_dtypes.float8_e4m3fn, 448.0, list(range(7, -56, -1))),
    ("GAUDI2", "E5M2"): (ml_dtypes.float8_e5m2, 57344.0, [4, 0, -4, -8]),
    ("GAUDI3", "E5M2"): (ml_dtypes.float8_e5m2, 57344.0, list(range(7, -56, -1))),
}
ACT, WEIGHT = 0.25, 0.5


def cast(x: np.ndarray, unit: tuple[str, str]) -> np.ndarray:
    """Rounded as the device does, values beyond the largest cut to it."""
    kind, top, _ = TYPES[unit]
    return np.clip(np.asarray(x, np.float32), -top, top).astype(kind).astype(np.float32)


def rounded(x: np.ndarray, scale: np.ndarray | float, unit: tuple[str, str]) -> np.ndarray:
    return cast(np.asarray(x, np.float32) / np.float32(scale), unit) * np.float32(scale)


def pow2(s: float) -> float:
    return 2.0 ** math.ceil(math.log2(s)) if s > 0 else 1.0


def hw(s: float, unit: tuple[str, str]) -> float:
    """The nearest scale of the device above, or its largest."""
    ladder = sorted(2.0**e for e in TYPES[unit][2])
    return next((step for step in ladder if step >= s), ladder[-1])


def act(method: str, amax: float, unit: tuple[str, str], backoff: float = ACT) -> float:
    s = amax / (TYPES[unit][1] * backoff)
    if method == "unit_scale":
        return 1.0
    if method == "hw_aligned_single_scale":
        return 2.0 ** TYPES[unit][2][0]
    if method == "maxabs_arbitrary":
        return s
    return hw(s, unit) if "hw" in method.split("_weight")[0] else pow2(s)


def weight(method: str, w: np.ndarray, unit: tuple[str, str], backoff: float = WEIGHT) -> np.ndarray:
    """-> a number, or [N, 1]."""
    top = TYPES[unit][1]
    base = float(np.abs(w).max()) / (top * backoff)
    fixed = {"unit_scale": 1.0, "hw_aligned_single_scale": 2.0 ** TYPES[unit][2][0], "maxabs_arbitrary": base,
             "maxabs_pow2": pow2(base), "maxabs_hw": hw(base, unit),
             "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw": hw(base, unit)}  # fmt: skip
    if method in fixed:
        return np.array(fixed[method])
    if method in ("maxabs_hw_opt_weight", "maxabs_pow2_opt_weight"):
        steps = [2.0**e for e in TYPES[unit][2]] if "hw" in method else [2.0**e for e in range(-10, 10)]
        return np.array(best(w, steps, unit))
    rows = np.array([[pow2(float(np.abs(row).max()) / (top * backoff))] for row in w])
    if "opt" in method:
        factors = [2.0**e for e in range(-3, 5)]
        pairs = zip(w, rows, strict=True)
        rows = np.array([[best(row, [own * f for f in factors], unit, first=True)] for row, (own,) in pairs])
    return rows


def best(w: np.ndarray, steps: list[float], unit: tuple[str, str], first: bool = False) -> float:
    found, least = steps[0], math.inf
    for step in steps:
        error = float(((rounded(w, step, unit).astype(np.float64) - w.astype(np.float64)) ** 2).sum())
        if error < least or (error == least and not first):
            found, least = step, error
    return found
