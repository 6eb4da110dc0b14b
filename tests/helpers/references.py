"""Per-sample losses and gradients by plain autograd, one sample at a time: the expected values."""

import torch
import torch.nn.functional as F


def sample_loss(
    model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Return one sample's summed cross-entropy from the model's own logits.

    It is over all tokens but the first, or over those of the ``labels`` that are not -100.
    """
    # Virtual tokens of prompt learning come first.
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, -len(tokens) :]
    targets = (tokens if labels is None else labels)[1:]
    return F.cross_entropy(logits[:-1].float(), targets, reduction="sum")


def projected_gradient_by_autograd(
    model, engine, tokens: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Return one sample's row: whole weight gradients by autograd, then both projections."""
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    weights = [target.module.weight for target in engine.targets]
    gradients = torch.autograd.grad(sample_loss(model, tokens, labels), weights)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    row = []
    for target, gradient in zip(engine.targets, gradients, strict=True):
        p_i, p_o = (p.double() for p in engine.projection_matrices[target.name])
        out_by_in = gradient.double() if target.rule.type_name == "Linear" else gradient.double().T
        row.append((p_o @ out_by_in @ p_i.T).flatten())
    return torch.cat(row)


def whole_gradients(model, tokens):
    """Return the gradients of all parameters of a sample's loss, by the model's own forward."""
    parameters = dict(model.named_parameters())
    model.requires_grad_(True)
    loss = sample_loss(model, tokens)
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    model.requires_grad_(False)
    return dict(zip(parameters, found, strict=True))


def gradient_of(layer, gradients):
    """Return a layer's gradient ``(n_o, n_i)``, or of all experts side by side."""
    *above, expert, last = layer.name.split(".")
    if layer.expert is not None:
        assert int(expert) == layer.expert
    name = layer.name if layer.expert is None else ".".join([*above, last])
    gradient = gradients.get(name, gradients.get(f"{name}.weight")).double()
    if gradient.dim() == 2:
        return gradient
    # A projection maps the hidden width to the experts' or back.
    by_expert = [g if g.shape == layer.widths[::-1] else g.T for g in gradient]
    assert by_expert[0].shape == layer.widths[::-1] != layer.widths
    return by_expert[layer.expert] if layer.expert is not None else torch.cat(by_expert, dim=1)


def row_by_autograd(model, engine, tokens):
    """Return one sample's row with every layer that an engine takes, fused experts too."""
    gradients, row = whole_gradients(model, tokens), []
    for layer in engine.targets:
        p_i, p_o = (p.double() for p in engine.projection_matrices[layer.name])
        if layer.signs is not None:
            p_i = torch.cat([p_i * signs for signs in layer.signs], dim=1)
        row.append((p_o @ gradient_of(layer, gradients) @ p_i.T).flatten())
    return torch.cat(row)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return ``|got - want| / |want|``."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def loss_of(model, ids, labels):
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def dot_products_by_autograd(model, ids, labels, validation):
    """Return ``(dots, |g_i| |g_v|)``, each ``(B, P)``, by autograd in float64, sample by sample."""
    before = model.state_dict()
    dtype = next(model.parameters()).dtype
    model.double()
    parameters = list(model.parameters())
    validation_gradients = torch.autograd.grad(loss_of(model, *validation), parameters)
    n_targets = (labels[:, 1:] != -100).sum()
    dots, sizes = [], []
    for x, y in zip(ids, labels, strict=True):
        length = int((y != -100).sum())
        loss = loss_of(model, x[None, :length], y[None, :length]) * (length - 1) / n_targets
        gradients = torch.autograd.grad(loss, parameters)
        dots.append(
            torch.stack(
                [(a * b).sum() for a, b in zip(gradients, validation_gradients, strict=True)]
            )
        )
        sizes.append(
            torch.stack(
                [a.norm() * b.norm() for a, b in zip(gradients, validation_gradients, strict=True)]
            )
        )
    model.to(dtype).load_state_dict(before)
    return torch.stack(dots), torch.stack(sizes)
