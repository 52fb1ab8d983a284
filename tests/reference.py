"""Float64 numpy twins, written from the formulas: sums over tokens, loops over positions and heads. No jax here.

Notation: P is the teacher's distribution, Q the student's, both of logits / T. Gradients are with respect to the
student's logits, in closed form.
"""

import numpy as np


def log_softmax(logits, temperature=1.0):
    x = np.asarray(logits, np.float64) / temperature
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def softmax(logits, temperature=1.0):
    return np.exp(log_softmax(logits, temperature))


def _by_row(function, *arrays):
    """Applies ``function`` to the rows of arrays ``[..., V]`` and stacks the results."""
    *leading, vocab = arrays[0].shape
    rows = [function(*row) for row in zip(*(array.reshape(-1, vocab) for array in arrays), strict=True)]
    return np.array(rows).reshape(leading)


def kl_of_log_probs(log_a, log_b):
    """Σ a (log a − log b) over the tokens with mass in a."""
    total = 0.0
    for one, other in zip(log_a, log_b, strict=True):
        if np.exp(one) > 0.0:
            total += np.exp(one) * (one - other)
    return total


def forward_kl(student, teacher, temperature=1.0):
    return _by_row(kl_of_log_probs, log_softmax(teacher, temperature), log_softmax(student, temperature))


def reverse_kl(student, teacher, temperature=1.0):
    return _by_row(kl_of_log_probs, log_softmax(student, temperature), log_softmax(teacher, temperature))


def _log_mixture(log_p, log_q, beta):
    return np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)


def generalized_jsd(student, teacher, beta, temperature=1.0):
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _by_row(kl_of_log_probs, log_p, log_m) + (1.0 - beta) * _by_row(kl_of_log_probs, log_q, log_m)


def cross_entropy(student, labels, label_smoothing=0.0, z_loss=0.0):
    student = np.asarray(student, np.float64)

    def one(logits, label):
        vocab = len(logits)
        high = max(logits)
        log_z = high + np.log(sum(np.exp(logit - high) for logit in logits))
        targets = [label_smoothing / vocab + (1.0 - label_smoothing) * (v == label) for v in range(vocab)]
        nats = sum(target * (log_z - logit) for target, logit in zip(targets, logits, strict=True) if target > 0.0)
        return nats + z_loss * log_z**2

    rows = student.reshape(-1, student.shape[-1])
    return np.array([one(*row) for row in zip(rows, np.ravel(labels), strict=True)]).reshape(np.shape(labels))


# ---- gradients with respect to the student's logits


def forward_kl_gradient(student, teacher, temperature=1.0):
    return (softmax(student, temperature) - softmax(teacher, temperature)) / temperature


def _through_softmax(log_q, log_a, log_b, temperature):
    """d/dlogits = Q (slope − Σ Q slope) / T of a function with d/dQ = log a − log b =: slope."""
    q, slope = np.exp(log_q), np.zeros_like(log_q)
    possible = q > 0.0
    slope[possible] = log_a[possible] - log_b[possible]
    return q * (slope - np.sum(q * slope, axis=-1, keepdims=True)) / temperature


def reverse_kl_gradient(student, teacher, temperature=1.0):
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return _through_softmax(log_q, log_q, log_p, temperature)


def generalized_jsd_gradient(student, teacher, beta, temperature=1.0):
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return (1.0 - beta) * _through_softmax(log_q, log_q, _log_mixture(log_p, log_q, beta), temperature)


def cross_entropy_gradient(student, labels, label_smoothing=0.0, z_loss=0.0):
    student = np.asarray(student, np.float64)
    vocab = student.shape[-1]
    q = softmax(student)
    target = (1.0 - label_smoothing) * np.eye(vocab)[labels] + label_smoothing / vocab
    log_z = np.max(student, -1) + np.log(np.sum(np.exp(student - np.max(student, -1, keepdims=True)), -1))
    return q - target + 2.0 * z_loss * log_z[..., None] * q


# ---- the decoder


def _rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2) + epsilon) * scale


def _turn(i, size, theta, scaling, length):
    """Radians per position of pair i of size / 2, scaled; ``length`` is that of the text."""
    if scaling is None or scaling.kind == "none":
        return theta ** (-2.0 * i / size)
    factor, original = scaling.factor, scaling.original_length
    if scaling.kind == "dynamic":
        stretch = factor * max(length, original) / original - (factor - 1.0)
        return (theta * stretch ** (size / (size - 2.0))) ** (-2.0 * i / size)
    plain = theta ** (-2.0 * i / size)
    if scaling.kind == "linear":
        return plain / factor
    if scaling.kind == "longrope":
        return plain / (scaling.long_factors if length > original else scaling.short_factors)[i]
    if scaling.kind == "llama3":
        wavelength = 2.0 * np.pi / plain
        if wavelength > original / scaling.low_frequency:
            return plain / factor
        if wavelength < original / scaling.high_frequency:
            return plain
        smooth = (original / wavelength - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        return (1.0 - smooth) * plain / factor + smooth * plain
    bounds = [
        size * np.log(original / (turns * 2.0 * np.pi)) / (2.0 * np.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    if scaling.truncate:
        bounds = [np.floor(bounds[0]), np.ceil(bounds[1])]
    low, high = max(bounds[0], 0.0), min(bounds[1], size - 1.0)
    slow = min(max((i - low) / (high - low if high != low else 1e-3), 0.0), 1.0)
    return slow * plain / factor + (1.0 - slow) * plain


def _rotate(x, position, theta, scaling=None, length=None):
    """Rotates the pair (x_i, x_{i + K/2}) by the angle position · theta^(−2i/K), or its scaled version."""
    half = len(x) // 2
    turned = np.empty_like(x)
    for i in range(half):
        angle = position * _turn(i, len(x), theta, scaling, length)
        turned[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        turned[i + half] = x[i] * np.sin(angle) + x[i + half] * np.cos(angle)
    if scaling is not None and scaling.kind in ("yarn", "longrope"):
        given, growth = scaling.attention_factor, np.log(scaling.factor)
        usual = (
            0.1 * growth + 1.0 if scaling.kind == "yarn" else np.sqrt(1.0 + growth / np.log(scaling.original_length))
        )
        turned *= usual if given is None else given
    return turned


def _project(x, leaf, equation):
    return np.einsum(equation, x, leaf["kernel"]) + leaf.get("bias", 0.0)


def _layer(config, leaves, x_LD, positions, segments, n=0):
    length, repeat = len(x_LD), config.heads // config.groups
    attention = leaves["attention"]
    normed = [_rms_norm(x, leaves["attention_norm"]["scale"], config.norm_epsilon) for x in x_LD]
    query, key, value = ([_project(x, attention[n], "d,dhk->hk") for x in normed] for n in ("query", "key", "value"))
    window = config.sliding_window if not config.window_layers or config.window_layers[n] else None

    def turn(x, name, position):
        if config.qk_norm:
            x = _rms_norm(x, attention[f"{name}_norm"]["scale"], config.norm_epsilon)
        if config.rope_layers and not config.rope_layers[n]:
            return x
        return _rotate(x, position, config.rope_theta, config.rope_scaling, max(positions) + 1)

    y_LD = np.empty_like(x_LD)
    for t in range(length):
        heads = np.zeros((config.heads, config.key_size))
        for h in range(config.heads):
            g = h // repeat  # neighbouring query heads share a group
            first = 0 if window is None else max(0, t + 1 - window)
            seen = [s for s in range(first, t + 1) if segments[s] == segments[t]]
            turned = turn(query[t][h], "query", positions[t])
            keys = [turn(key[s][g], "key", positions[s]) for s in seen]
            weights = softmax(np.array([turned @ k for k in keys]) / np.sqrt(config.key_size))
            heads[h] = sum(weight * value[s][g] for weight, s in zip(weights, seen, strict=True))
        x = x_LD[t] + _project(heads, attention["output"], "hk,hkd->d")
        mlp, normed_x = leaves["mlp"], _rms_norm(x, leaves["mlp_norm"]["scale"], config.norm_epsilon)
        gate = _project(normed_x, mlp["gate"], "d,df->f")
        wide = gate / (1.0 + np.exp(-gate)) * _project(normed_x, mlp["up"], "d,df->f")
        y_LD[t] = x + _project(wide, mlp["down"], "f,fd->d")
    return y_LD


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def _take(tree, n):
    return {name: _take(leaf, n) if isinstance(leaf, dict) else leaf[n] for name, leaf in tree.items()}


def decoder_logits(config, params, tokens, positions=None, segments=None):
    """Logits ``[B, L, V]`` of a decoder, by loops over tokens and heads."""
    params = _float64(params)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    head = params["embedding"].T if config.tied else params["head"]
    rows = []
    for row, position, segment in zip(tokens, positions, segments, strict=True):
        x_LD = params["embedding"][row]
        for n in range(config.layers):
            x_LD = _layer(config, _take(params["layers"], n), x_LD, position, segment, n)
        rows.append([_rms_norm(x, params["norm"]["scale"], config.norm_epsilon) @ head for x in x_LD])
    return np.array(rows)


# ---- the optimizer


def adamw(parameters, gradients, rates, *, beta1, beta2, weight_decay, decayed, epsilon=1e-8):
    """Parameters after updates with the given gradients and learning rates, as written in arXiv 1711.05101."""
    parameters = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    first = {name: np.zeros_like(value) for name, value in parameters.items()}
    second = {name: np.zeros_like(value) for name, value in parameters.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        for name in parameters:
            g = np.asarray(gradient[name], np.float64)
            first[name] = beta1 * first[name] + (1.0 - beta1) * g
            second[name] = beta2 * second[name] + (1.0 - beta2) * g**2
            direction = (first[name] / (1.0 - beta1**t)) / (np.sqrt(second[name] / (1.0 - beta2**t)) + epsilon)
            decay = weight_decay * parameters[name] if name in decayed else 0.0
            parameters[name] = parameters[name] - rate * (direction + decay)
    return parameters
