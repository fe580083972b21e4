"""prefdistill: robust offline preference optimisation by reward model distillation."""
