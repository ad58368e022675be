"""The shades of tokens: text on them is read, and their two hues are told apart, in both schemes and by every eye."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

import numpy as np
import pytest

from understudy.report.tokens import LEVELS

STYLE = (files("understudy.report") / "templates" / "style.css").read_text(encoding="utf-8")
# What dichromats see, in linear RGB: G. M. Machado, M. M. Oliveira and L. A. F. Fernandes, "A physiologically-based
# model for simulation of color vision deficiency", 2009, severity 1.
SEEN = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def scheme(name: str) -> Mapping[str, np.ndarray]:
    """The style sheet's colours by their names, as sRGB in 0..1."""
    light, dark = re.findall(r":root\{([^}]*)\}", STYLE)
    found = dict(re.findall(r"--([\w-]+):(#\w+)", light if name == "light" else dark))
    return {key: _rgb(value) for key, value in found.items()}


def _rgb(code: str) -> np.ndarray:
    digits = code[1:] if len(code) == 7 else "".join(2 * one for one in code[1:])
    return np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])


def linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB under D65, of linear RGB."""
    ratio = TO_XYZ @ rgb.clip(0, 1) / TO_XYZ.sum(1)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def shade(colours: Mapping[str, np.ndarray], hue: str, level: int) -> np.ndarray:
    """As the page mixes it: part of the hue, the rest the card behind."""
    part = round(level * 100 / LEVELS) / 100
    return part * colours[hue] + (1 - part) * colours["card"]


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("hue", ["pos", "neg", "seq"])
def test_text_on_every_shade_has_a_contrast_of_four_and_a_half(hue: str, name: str) -> None:
    """WCAG 2.2, 1.4.3."""
    colours = scheme(name)
    weights = TO_XYZ[1]
    for level in range(LEVELS + 1):
        low, high = sorted(weights @ linear(own) for own in (colours["text"], shade(colours, hue, level)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, level


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("eye", SEEN)
def test_orange_and_blue_stay_apart(eye: str, name: str) -> None:
    """A difference of 2.3 in CIELAB is just noticed; from a quarter of the scale on, the two are several of them apart
    from each other."""
    colours = scheme(name)
    for level in range(LEVELS // 4, LEVELS + 1):
        warm, cold = (lab(SEEN[eye] @ linear(shade(colours, hue, level))) for hue in ("pos", "neg"))
        assert np.linalg.norm(warm - cold) >= 10, level


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("eye", SEEN)
@pytest.mark.parametrize("hue", ["pos", "neg", "seq"])
def test_shades_grow_away_from_the_page(hue: str, eye: str, name: str) -> None:
    colours = scheme(name)
    seen = [lab(SEEN[eye] @ linear(shade(colours, hue, level))) for level in range(LEVELS + 1)]
    distances = [float(np.linalg.norm(own - seen[0])) for own in seen]
    assert distances == sorted(distances)
    assert distances[-1] >= 20
