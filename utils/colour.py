"""Conversion of HDR and wide-gamut video to sRGB.

ITU-R BT.2100 defines PQ and HLG, and BT.2408 their reference white, 203 cd/m2, which is 1.0 here.
"""

from functools import cache

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
WHITE, PEAK = 203, 1000  # cd/m2: white, and what is brightest in most HDR video
KNEE = 0.6  # below it light stays as it is; what lies between it and the peak is compressed into what remains to 1
TO_BT709 = {  # linear RGB of other primaries to those of BT.709 and sRGB, row by row
    ColorPrimaries.BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    ColorPrimaries.SMPTE432: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),  # Display P3
}


def needs_mapping(trc: int, primaries: int) -> bool:
    """Whether pixels with these tags look wrong where they are taken for sRGB."""
    return trc in HDR or primaries in TO_BT709


def to_srgb(signal: np.ndarray, trc: int, primaries: int) -> np.ndarray:
    """uint16 [H, W, 3], full range, to uint8 [H, W, 3]; HDR is tone-mapped.

    trc, primaries: AVColorTransferCharacteristic and AVColorPrimaries; transfers that are not HDR count as sRGB's.
    """
    light = _light(trc)[signal]
    if trc == ColorTrc.ARIB_STD_B67:  # light of the scene: as a display of PEAK cd/m2 shows it
        luminance = light @ np.array((0.2627, 0.6780, 0.0593), np.float32)
        light *= PEAK / WHITE * luminance[..., None] ** 0.2
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    if trc in HDR:
        light *= _tone(np.maximum(light.max(-1, keepdims=True), 1e-6))
    return _srgb_codes()[(light.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]


def _tone(brightest: np.ndarray) -> np.ndarray:
    """Tone mapping factor by the largest of a pixel's values: 1 up to KNEE, then extended Reinhard, white at PEAK."""
    above = (brightest.clip(KNEE, PEAK / WHITE) - KNEE) / (1 - KNEE)
    most = (PEAK / WHITE - KNEE) / (1 - KNEE)
    mapped = KNEE + (1 - KNEE) * above * (1 + above / most**2) / (1 + above)
    return np.where(brightest > KNEE, mapped / brightest, 1)


@cache
def _light(trc: int) -> np.ndarray:
    """Linear light for each of 65,536 signal values, float32."""
    signal = np.linspace(0, 1, 65_536)
    if trc == ColorTrc.SMPTE2084:
        root = signal ** (32 / 2523)
        light = ((root - 3424 / 4096).clip(0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610) * 10_000 / WHITE
    elif trc == ColorTrc.ARIB_STD_B67:
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@cache
def _srgb_codes() -> np.ndarray:
    """The sRGB value 0 to 255 for each of 65,536 values of linear light, uint8."""
    light = np.linspace(0, 1, 65_536)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (signal * 255).round().astype(np.uint8)
