"""Wrong labels, estimated from what a model that has not learned from the posts predicts: confident learning.

Source: Northcutt, Jiang & Chuang 2021, arXiv:1911.00068 (thresholds and confident joint of section
3.1, pruning by noise rate of section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LabelNoise:
    """What is known of the labels of N posts that exclude one another."""

    joint_YY: np.ndarray
    """Estimated share of the posts with (given label, true label), float64, sum 1."""
    rows_S: np.ndarray
    """Suspicious posts, the most suspicious first, int64."""
    likely_S: np.ndarray
    """The label that each of them likely has, int64."""

    @property
    def wrong(self) -> float:
        """Estimated share of wrong labels."""
        return float(1 - np.trace(self.joint_YY))


def estimate_label_noise(given_N: np.ndarray, scores_NY: np.ndarray) -> LabelNoise:
    """The joint distribution of given and true labels, and the posts whose label is likely wrong.

    Of each pair of labels as many posts are suspicious as the joint says, those with the largest
    p(likely) - p(given); never one whose given label is the likeliest.

    Args:
        given_N: label ids, int, at least one.
        scores_NY: probabilities by a model that was not trained on these posts.
    """
    counts_Y = np.bincount(given_N, minlength=scores_NY.shape[1])
    joint_YY = joint_of(confident_joint(given_N, scores_NY), counts_Y)
    numbers = np.arange(len(given_N))
    own_N = scores_NY[numbers, given_N]
    margins_N = np.full(len(given_N), -np.inf)
    likely_N = given_N.copy()
    doubted_N = scores_NY.argmax(axis=1) != given_N
    for given, likely in np.argwhere(joint_YY > 0):
        wanted = int(round(joint_YY[given, likely] * len(given_N)))
        if given == likely or not wanted:
            continue
        rows = np.flatnonzero((given_N == given) & doubted_N)
        margins = scores_NY[rows, likely] - own_N[rows]
        chosen = np.argsort(-margins, kind="stable")[:wanted]
        rows, margins = rows[chosen], margins[chosen]
        nearer = margins > margins_N[rows]
        margins_N[rows[nearer]] = margins[nearer]
        likely_N[rows[nearer]] = likely
    suspects = np.flatnonzero(likely_N != given_N)
    order = np.argsort(-margins_N[suspects], kind="stable")
    return LabelNoise(joint_YY, suspects[order], likely_N[suspects[order]])


def confident_joint(given_N: np.ndarray, scores_NY: np.ndarray) -> np.ndarray:
    """Posts by (given label, confident label), int64, (Y, Y); posts that are confident of none do not count.

    A post is confident of a label from the mean probability on that the posts given this label have
    for it; of several such labels the likeliest counts.
    """
    width = scores_NY.shape[1]
    thresholds_Y = np.array(
        [
            scores_NY[given_N == label, label].mean() if (given_N == label).any() else np.inf
            for label in range(width)
        ]
    )
    above_NY = scores_NY >= thresholds_Y
    confident = above_NY.any(axis=1)
    labels_N = np.where(above_NY, scores_NY, -np.inf).argmax(axis=1)
    joint_YY = np.zeros((width, width), dtype=np.int64)
    np.add.at(joint_YY, (given_N[confident], labels_N[confident]), 1)
    return joint_YY


def joint_of(confident_YY: np.ndarray, counts_Y: np.ndarray) -> np.ndarray:
    """The confident joint as shares whose rows have the shares of the given labels (equation 2).

    Args:
        confident_YY: of ``confident_joint``; a row without a post is taken as right.
        counts_Y: posts of each given label.
    """
    rows_YY = confident_YY.astype(np.float64)
    empty_Y = rows_YY.sum(axis=1) == 0
    rows_YY[empty_Y, empty_Y] = 1.0
    rows_YY *= (counts_Y / rows_YY.sum(axis=1))[:, None]
    return rows_YY / counts_Y.sum()
