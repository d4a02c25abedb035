"""What can be measured on any video without knowing its world: how much moves, how smoothly, how sharp, how steady."""

from __future__ import annotations

import itertools

import cv2
import numpy as np

METRICS = ("dynamic_degree", "motion_change", "sharpness", "brightness_flicker")
_LEAST_SIDE = 32  # px; smaller videos are enlarged for the flow, which works on 8 x 8 patches


def measure_motion(video: np.ndarray) -> dict[str, float]:
    """Measure one video; needs neither a prompt's meaning nor a reference.

    Args:
        video: [F, H, W, 3] float in [0, 1].
    Returns:
        `dynamic_degree`: mean optical flow, px / frame; `motion_change`: mean change of the flow from frame to frame
        over its size, 0 for steady motion; `sharpness`: mean gradient of the brightness, 1 / px; `brightness_flicker`:
        mean change of a frame's brightness. NaN where there are too few frames.
    Raises:
        ValueError: video is not [F, H, W, 3].
    Source: DIS optical flow, arXiv 1603.03590 (OpenCV's).
    """
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be [F, H, W, 3], got {list(video.shape)}")
    grey = video.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # [F, H, W]
    flow = _optical_flow(grey)  # [F - 1, H, W, 2]
    rows, columns = np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1]
    size = np.linalg.norm(flow, axis=-1).mean() if len(flow) else float("nan")
    change = np.linalg.norm(np.diff(flow, axis=0), axis=-1).mean() if len(flow) > 1 else float("nan")
    return {
        "dynamic_degree": float(size),
        "motion_change": float(change / max(size, 1e-6)),
        "sharpness": float(np.hypot(rows, columns).mean()),
        "brightness_flicker": float(np.abs(np.diff(grey.mean(axis=(1, 2)))).mean()) if len(grey) > 1 else float("nan"),
    }


def _optical_flow(grey: np.ndarray) -> np.ndarray:
    """Flow [F - 1, H, W, 2] in px / frame between neighbouring frames."""
    scale = max(1, -(-_LEAST_SIDE // min(grey.shape[1:])))
    frames = [np.repeat(np.repeat(frame, scale, 0), scale, 1) for frame in (255 * grey).round().astype(np.uint8)]
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [
        estimator.calc(now, after, np.zeros((*now.shape, 2), np.float32)) for now, after in itertools.pairwise(frames)
    ]
    if not flows:
        return np.zeros((0, *grey.shape[1:], 2), np.float32)
    return np.stack(flows)[:, ::scale, ::scale] / scale
