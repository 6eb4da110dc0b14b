"""GradDotProd: inner products between per-sample training gradients and a validation gradient."""
