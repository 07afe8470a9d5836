"""Heads whose weights are solved for, each for a whole path of its own setting; val chooses a value.

Notation: N training rows, D width, C classes or labels, X [N, D], y int64 [N] or, multi-label, [N, L] with NaN where
unknown. A label's unknown rows are left out for that label alone. A class that train has not (a label without
positives) gets the constant logit ``LOW``; a label without negatives ``-LOW``. They see the prevalence of train, so no
prior correction belongs to them. To add one: a function here, a line in ``SOLVERS`` and one in `catalogue.HEADS`.

A solver takes x float32 [N, D] standardised, y, the kind of the task and C, and gives every value of its path as
(setting, module), in order; ``note`` receives a sentence where something is to be said. Nothing is drawn at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from heads.models.common import own_randomness
from heads.models.vector import QUERIES, KNearest, Linear

LOW = -1e4  # no probability is left of it, whatever the temperature
ROWS = 4096  # of X are centred at once
EXACT = 2e9  # products N·D² up to which XᵀX is made in float64: a twentieth of a second
PENALTIES = np.logspace(-5, 3, 45)
STRENGTHS = np.logspace(-4, 4, 10)  # the path of scikit-learn's LogisticRegressionCV
STEPS = 1000  # of L-BFGS at most, for each C
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)  # DINO's 10, 20, 100, 200, and fewer for fewer images
TEMPERATURES = (0.02, 0.04, 0.07, 0.14, 0.28)  # about Wu et al.'s 0.07

Path = list[tuple[dict[str, float], nn.Module]]
Note = Callable[[str], None]
Solver = Callable[[torch.Tensor, np.ndarray, str, int, Note], Path]


def ridge(x: torch.Tensor, y: np.ndarray, kind: str, classes: int, note: Note) -> Path:
    """min |Y - XWᵀ - b|² + lambda m |W|² with targets of ±1 and b free, for all lambda at once: what scikit-learn's
    RidgeClassifier(alpha=lambda m) gives for each (of two classes its one column, and its negative). m is the mean
    eigenvalue of XᵀX of centred X, N for standardised features, so one path fits any N and any scale.

    With X and Y centred, W = Yᵀ X (XᵀX + lambda m I)⁻¹ = Yᵀ (XXᵀ + lambda m I)⁻¹ X; the smaller of the two matrices is
    taken. Q T Qᵀ of it, T tridiagonal, serves every lambda: (T + lambda m I) is solved in O(C·D), so the eigenvectors
    by which big_vision's few-shot evaluation does this (evaluators/fewshot_lsr.py) need not be known (30 against 93 ms
    for D=768). All in float64, but for the products of a large XᵀX, which are summed in float32 by blocks of 4,096
    rows: that moves its eigenvalues by 4e-7 m, where features stored as float16 already move them by 1e-4 m and the
    least lambda is 1e-5 (126 against 62 ms for 10,000 × 768)."""
    values = x.numpy()
    targets = 2.0 * (y if kind == "multilabel" else y[:, None] == np.arange(classes)) - 1  # ±1 [N, C], NaN unknown
    weight = np.zeros((len(PENALTIES), classes, values.shape[1]))
    bias = np.zeros((len(PENALTIES), classes))
    alike: dict[bytes, list[int]] = {}  # columns that are known for the same rows
    for column in np.flatnonzero(~np.isnan(targets).all(axis=0)).tolist():
        alike.setdefault(np.isnan(targets[:, column]).tobytes(), []).append(column)
    for columns in alike.values():
        rows = np.flatnonzero(~np.isnan(targets[:, columns[0]]))
        part = values if len(rows) == len(values) else values[rows]
        weight[:, columns], bias[:, columns] = _ridges(part, targets[np.ix_(rows, np.array(columns))])
    return _linears([{"lambda": float(value)} for value in PENALTIES], weight, bias, _constants(y, kind, classes))


def _ridges(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [K, c, D] and biases [K, c] of targets y [n, c]."""
    n, width = x.shape
    mean, level = x.mean(0, dtype=np.float64), y.mean(0)
    if n < width:
        centred = x - mean  # float64
        solved = _shifted(centred @ centred.T, y - level, width)
        weight = solved.transpose(0, 2, 1) @ centred
    else:
        both = np.zeros((width + y.shape[1],) * 2)  # XᵀX and XᵀY in one product
        dtype = np.float64 if n * width**2 <= EXACT else np.float32
        block, product = np.empty((min(ROWS, n), len(both)), dtype), np.empty(both.shape)
        middle = np.concatenate([mean, level]).astype(dtype)
        for start in range(0, n, ROWS):
            centred = block[: min(ROWS, n - start)]
            centred[:, :width], centred[:, width:] = x[start : start + ROWS], y[start : start + ROWS]
            centred -= middle
            if dtype == np.float64:
                both += np.matmul(centred.T, centred, out=product)
            else:  # by torch, whose products may go to oneDNN
                factor = torch.from_numpy(centred)
                both += torch.mm(factor.T, factor).numpy()
        weight = _shifted(both[:width, :width], both[:width, width:], width).transpose(0, 2, 1)
    return weight, level - weight @ mean


@threadpool_limits.wrap(limits=1, user_api="blas")  # at each of hundreds of small steps two threads would wait
def _shifted(matrix: np.ndarray, right: np.ndarray, width: int) -> np.ndarray:
    """(matrix + lambda m I)⁻¹ right [K, r, c] for every lambda > 0; matrix [r, r] symmetric, without negative
    eigenvalues, m = trace / D (1 where X is constant)."""
    from scipy.linalg import lapack

    shifts = PENALTIES * (np.trace(matrix) / width or 1.0)
    if len(matrix) < 3:
        return np.stack([np.linalg.solve(matrix + shift * np.eye(len(matrix)), right) for shift in shifts])
    reduced, diagonal, off, tau, info = lapack.dsytrd(matrix, lower=1, lwork=64 * len(matrix))
    assert info == 0
    reflectors = np.asfortranarray(reduced[1:, :-1])  # Q leaves the first row alone

    def rotate(values: np.ndarray, transpose: bool) -> np.ndarray:
        room = max(64 * len(matrix), values.shape[1])  # of many classes a row at least
        lower, _, info = lapack.dormqr("L", "T" if transpose else "N", reflectors, tau, values[1:], room)
        assert info == 0
        return np.concatenate([values[:1], lower])

    turned = rotate(right, transpose=True)
    parts = []
    for shift in shifts:
        *_, part, info = lapack.dgtsv(off, diagonal + shift, off, turned)
        assert info == 0
        parts.append(part)
    back = rotate(np.concatenate(parts, axis=1), transpose=False)  # [m, K·c]
    return back.reshape(len(matrix), len(shifts), -1).transpose(1, 0, 2)


def logreg(x: torch.Tensor, y: np.ndarray, kind: str, classes: int, note: Note) -> Path:
    """Multinomial logistic regression (of two classes binary; multi-label: one a label) with an L2 penalty, by
    scikit-learn's L-BFGS (Liu & Nocedal 1989), for each C of a path.

    C goes from strong to weak penalties and every fit starts from the one before it; each stops where a cold one would
    (scikit-learn's tol of 1e-4 on the largest gradient). One that has not stopped after 1,000 steps is used, and said.
    """
    values = x.numpy()
    weight = np.zeros((len(STRENGTHS), classes, values.shape[1]))
    bias = np.zeros((len(STRENGTHS), classes))
    constant = _constants(y, kind, classes)
    learnt, late = np.flatnonzero(np.isnan(constant)), list[float]()
    if kind == "multilabel":
        for label in learnt:
            rows = np.flatnonzero(~np.isnan(y[:, label]))
            for k, (w, b) in enumerate(_regressions(values[rows], y[rows, label] == 1, late)):
                weight[k, label], bias[k, label] = w[0], b[0]
    elif len(learnt) > 1:
        for k, (w, b) in enumerate(_regressions(values, y, late)):
            both = len(learnt) == 2  # scikit-learn's one column: the log-odds of the second
            weight[k, learnt] = np.concatenate([-w, w]) / 2 if both else w
            bias[k, learnt] = np.concatenate([-b, b]) / 2 if both else b
    if late:
        where = ", ".join(f"{value:g}" for value in sorted(set(late)))
        note(
            f"logreg has not converged in {STEPS:,} steps at C = {where}; its weights there are those of the last step"
        )
    return _linears([{"C": float(value)} for value in STRENGTHS], weight, bias, constant)


def _regressions(x: np.ndarray, y: np.ndarray, late: list[float]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Coefficients [C or 1, D] and intercepts along the path; a C that did not converge is added to ``late``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(warm_start=True, max_iter=STEPS)
    for value in STRENGTHS:
        model.set_params(C=float(value))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(x, y)
        if any(issubclass(each.category, ConvergenceWarning) for each in caught):
            late.append(float(value))
        yield model.coef_.copy(), model.intercept_.copy()


@torch.inference_mode()
def path_logits(path: Path, chunks: Iterable[torch.Tensor]) -> np.ndarray:
    """Logits float64 [K, n, C] of the heads of a path, of features in chunks float32 [b, D]: one product for all linear
    ones, one search for all k and temperatures."""
    searching = [model for _, model in path if isinstance(model, KNearest)]
    linear = [model.ln for _, model in path if isinstance(model, Linear)]
    assert len(path) in (len(searching), len(linear))
    if searching:
        most = max(searching, key=lambda model: int(model.k))
        nearest = (most.search(part, int(most.k)) for x in chunks for part in x.split(QUERIES))
        parts = [torch.stack([model.votes(*each) for model in searching]) for each in nearest]
    else:
        weight = torch.stack([ln.weight for ln in linear])  # [K, C, D]
        bias = torch.stack([ln.bias for ln in linear])[:, None]
        parts = [(x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).transpose(0, 1) + bias for x in chunks]
    return torch.cat(parts, 1).double().numpy()


def knn(x: torch.Tensor, y: np.ndarray, kind: str, classes: int, note: Note) -> Path:
    """`KNearest` for every k up to N and every temperature; with k = 1 one is enough: it does nothing."""
    vectors = nn.functional.normalize(x.float(), dim=1)
    labels = torch.from_numpy(np.asarray(y, dtype=np.float32 if kind == "multilabel" else np.int64))
    pairs = [(k, t) for k in NEIGHBOURS if k <= len(x) for t in (TEMPERATURES if k > 1 else (0.07,))]
    return [
        ({"k": float(k), "temperature": t}, KNearest.of(vectors, labels, classes, k=k, temperature=t)) for k, t in pairs
    ]


def centroid(x: torch.Tensor, y: np.ndarray, kind: str, classes: int, note: Note) -> Path:
    """The nearest class mean: Snell et al. 2017, arXiv:1703.05175 (section 2.4: it is linear).

    z_c = -|x - m_c|² / (2 s² sqrt(D)) + |x|² / (2 s² sqrt(D)), the second term the same for all classes; s² is the mean
    variance of a channel within the classes. (With D for sqrt(D) it is a Gaussian classifier's log-likelihood, which
    takes the channels for independent; the temperature finds the scale, from 1/20 to 20 times this one.) Multi-label:
    for each label the log-odds of the mean of its positives against that of its negatives."""
    values = x.numpy().astype(np.float64)
    constant = _constants(y, kind, classes)
    weight, bias = np.zeros((classes, values.shape[1])), np.zeros(classes)
    learnt = np.flatnonzero(np.isnan(constant))
    if kind == "multilabel":
        for label in learnt:
            mean, scale = _means(values, y[:, label], (0, 1))
            weight[label] = (mean[1] - mean[0]) / scale
            bias[label] = (mean[0] @ mean[0] - mean[1] @ mean[1]) / (2 * scale)
    else:
        mean, scale = _means(values, y, tuple(learnt))
        weight[learnt], bias[learnt] = mean / scale, -(mean**2).sum(1) / (2 * scale)
    return _linears([{}], weight[None], bias[None], constant)


def _means(x: np.ndarray, y: np.ndarray, values: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The mean of the rows of each value of y, and s² sqrt(D); of all rows where no class varies within."""
    parts = [x[y == value] for value in values]
    mean = np.stack([part.mean(0) for part in parts])
    inside = sum(((part - m) ** 2).sum() for part, m in zip(parts, mean, strict=True))
    variance = inside / sum(map(len, parts)) / x.shape[1] or x.var(0).mean() or 1.0
    return mean, float(variance * np.sqrt(x.shape[1]))


def _constants(y: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """The logit of a class or label about which train says nothing, [C]; NaN for the others."""
    if kind == "multilabel":
        positive, negative = (y == 1).any(0), (y == 0).any(0)
        return np.where(positive & negative, np.nan, np.where(positive, -LOW, LOW))
    return np.where(np.bincount(y, minlength=classes) > 0, np.nan, LOW)


def _linears(settings: list[dict[str, float]], weight: np.ndarray, bias: np.ndarray, constant: np.ndarray) -> Path:
    """A head for each of weight [K, C, D] and bias [K, C], in which a class that has a constant has that alone."""
    learnt = np.isnan(constant)
    weights = torch.from_numpy((weight * learnt[:, None]).astype(np.float32))
    biases = torch.from_numpy(np.where(learnt, bias, constant).astype(np.float32))
    with own_randomness(torch.Generator()), torch.no_grad():  # what a layer draws at first is written over
        models = [Linear((weight.shape[2],), len(constant)).eval() for _ in settings]
        for model, w, b in zip(models, weights, biases, strict=True):
            model.ln.weight.copy_(w)
            model.ln.bias.copy_(b)
    return list(zip(settings, models, strict=True))


SOLVERS: dict[str, Solver] = {"ridge": ridge, "logreg": logreg, "knn": knn, "centroid": centroid}
